"""What the diagnostics measure, held to results that are known on paper; all in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

import throughtime as tt
from throughtime.insight.dynamics import Dynamics, dynamics, lyapunov
from throughtime.insight.pairs import pairs
from throughtime.insight.reach import reach
from throughtime.nn import Recurrent
from throughtime.nn.initialise import forget_bias_

LINEAR = tt.Elman(activation=tt.identity)


def autonomous(cell: tt.Cell, recurrent: Tensor) -> Recurrent:
    """A layer that hears nothing and has no biases, with these recurrent weights."""
    layer = Recurrent(cell, 1, recurrent.shape[1]).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
        layer.get_parameter("weight_hh_l0").copy_(recurrent)
    return layer


def of(layer: Recurrent, steps: int, **wanted: object) -> Dynamics:
    """The dynamics from a random state, under an input of zero."""
    h_0 = torch.randn(1, 1, layer.hidden_size, dtype=torch.double)
    start = h_0 if len(layer.cell.states) == 1 else (h_0,) * len(layer.cell.states)
    return dynamics(layer, torch.zeros(steps, 1, 1, dtype=torch.double), start, **wanted)[0]  # type: ignore[arg-type]


@pytest.mark.parametrize("scale", [0.5, 0.97, 1.0, 1.2])
def test_a_scaled_orthogonal_linear_network_has_norm_s_to_the_k_and_exponents_ln_s(scale: float):
    orthogonal = torch.linalg.qr(torch.randn(8, 8, dtype=torch.double)).Q
    found = of(autonomous(LINEAR, scale * orthogonal), 60)
    for lag, values in zip(found.lags, found.singular_values, strict=True):
        np.testing.assert_allclose(values, scale ** float(lag), rtol=1e-11)
    np.testing.assert_allclose(found.exponents, math.log(scale), atol=1e-13)


@pytest.mark.parametrize("scale", [0.5, 0.97, 1.0, 1.2])
def test_the_losss_gradient_in_that_network_reaches_back_as_s_to_the_k(scale: float):
    layer = autonomous(LINEAR, scale * torch.linalg.qr(torch.randn(8, 8, dtype=torch.double)).Q)
    x, towards = torch.randn(30, 2, 1, dtype=torch.double), torch.randn(2, 8, dtype=torch.double)
    (found,) = reach(layer, (x,), lambda output: (output[0][-1] * towards).sum())
    np.testing.assert_allclose(found.gradient.share, scale ** np.arange(30.0), rtol=1e-11)


@pytest.mark.parametrize("sigma", [0.3, 0.9, 0.999])
def test_a_tanh_network_whose_largest_singular_value_is_below_one_vanishes_at_its_rate(sigma: float):
    """Pascanu, Mikolov & Bengio 2013: |dh_t/dh_{t-k}| <= sigma_max(U)^k, for every k and every input."""
    layer = Recurrent(tt.Elman, 3, 20).double()
    with torch.no_grad():
        weight = layer.get_parameter("weight_hh_l0")
        weight.mul_(sigma / torch.linalg.matrix_norm(weight, 2))
    (found,) = dynamics(layer, torch.randn(40, 4, 3, dtype=torch.double), lags=range(1, 41))
    assert (found.norms <= sigma**found.lags * (1 + 1e-12)).all()
    assert found.exponents[0] <= math.log(sigma)


def test_the_spectral_radius_does_not_bound_what_happens_on_the_way():
    recurrent = torch.tensor([[0.9, 5.0], [0.0, 0.9]], dtype=torch.double)
    assert torch.linalg.eigvals(recurrent).abs().max() == pytest.approx(0.9)
    found = of(autonomous(LINEAR, recurrent), 400, lags=[1, 9, 100, 400])
    assert found.norms[1] == pytest.approx(19.4, abs=0.03)
    assert found.verdict(9) == "carries: over the 9 steps needed, a gradient can grow 19.4 fold"
    assert found.verdict(100) == (
        "carries: over the 100 steps needed, up to 0.0148 of a gradient is left, after growing up to 19.4 fold at lag 9"
    )
    assert found.verdict(400).startswith("vanishes: over the 400 steps needed, at most 1e-15")


def test_a_network_as_torch_begins_it_vanishes_before_it_has_seen_data():
    layer = tt.nn.RNN(10, 256)
    weight = layer.get_parameter("weight_hh_l0").detach().double()
    radius = float(torch.linalg.eigvals(weight).abs().max())
    assert radius == pytest.approx(0.577, abs=0.03)
    (found,) = dynamics(layer, torch.randn(80, 1, 10), exponents=1, starts=0, lags=[79])
    assert found.verdict(79, trained=False).startswith("vanishes before it has seen data: over the 79 steps needed")
    assert found.half_life < math.log(2) / -math.log(radius) * 1.1


@pytest.mark.parametrize(("bias", "half_life"), [(0, 1.0), (1, 2.2), (2, 5.5), (3, 14.3)])
def test_the_half_life_of_an_lstms_cell_path_is_set_by_its_forget_bias(bias: float, half_life: float):
    layer = forget_bias_(autonomous(tt.LSTM, torch.zeros(4 * 3, 3, dtype=torch.double)), bias)
    found = of(layer, 50)
    assert found.half_life == pytest.approx(half_life, abs=0.05)
    np.testing.assert_allclose(found.exponents[:3], math.log(1 / (1 + math.exp(-bias))), rtol=1e-12)
    assert (found.exponents[3:] == -math.inf).all(), "without U, what was shown is forgotten at once"


def random_network(gain: float, seed: int, units: int = 200) -> Recurrent:
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(units, units, dtype=torch.double, generator=generator)
    return autonomous(tt.Elman, gain * weights / math.sqrt(units))


def test_a_random_tanh_network_below_gain_one_has_the_spectral_radius_as_its_exponent():
    """It falls to the origin, where the Jacobian is U itself."""
    for seed in range(3):
        layer = random_network(0.8, seed)
        radius = torch.linalg.eigvals(layer.get_parameter("weight_hh_l0").detach()).abs().max()
        found = of(layer, 1200, exponents=4, skip=400, lags=[1], starts=0)
        assert found.exponents[0] == pytest.approx(math.log(radius), abs=5e-3)


@pytest.mark.parametrize(("gain", "exponent"), [(1.5, 0.03), (2.0, 0.12)])
def test_random_tanh_networks_above_gain_one_are_chaotic(gain: float, exponent: float):
    """Sompolinsky, Crisanti & Sommers 1988: above gain one; the figures are means of ten matrices of 200 units."""
    largest = [
        of(random_network(gain, seed), 700, exponents=1, skip=200, lags=[1], starts=0).exponents[0]
        for seed in range(10)
    ]
    assert np.mean(largest) == pytest.approx(exponent, abs=0.03)


def test_the_lyapunov_routine_on_the_henon_map():
    """Exponents .419 and -1.623; their sum is the logarithm of the determinant, ln 0.3."""

    def jacobians() -> Iterator[np.ndarray]:
        x, y = 0.1, 0.1
        for step in range(12_000):
            x, y = 1 - 1.4 * x * x + y, 0.3 * x
            if step >= 1000:
                yield np.array([[-2.8 * x, 1.0], [0.3, 0.0]])

    found = lyapunov(jacobians())
    np.testing.assert_allclose(found, [0.419, -1.623], atol=0.01)
    assert found.sum() == pytest.approx(math.log(0.3), abs=1e-12)


@pytest.mark.parametrize("cell", [tt.Elman, tt.GRU, tt.LSTM], ids=lambda cell: cell.name)
def test_the_terms_of_the_double_sum_add_up_to_the_gradients_of_the_weights(cell: tt.Cell):
    """The gradients are autograd's through the layer in training; the terms are those of loss i and step k."""
    layer, towards = Recurrent(cell, 3, 5).double(), torch.randn(12, 4, 5, dtype=torch.double)
    x = torch.randn(12, 4, 3, dtype=torch.double)
    (found,) = pairs(layer, (x,), lambda output: (output[0] * towards).square().sum(-1))
    (layer(x)[0] * towards).square().sum().backward()
    for name in ("weight_ih", "weight_hh"):
        gradient = layer.get_parameter(f"{name}_l0").grad
        assert gradient is not None
        np.testing.assert_allclose(found.gradients[name], gradient.numpy(), rtol=1e-10, atol=1e-12)
        assert found.shares[name].shape == (12, 12)
        assert found.shares[name].sum() == pytest.approx(1.0, abs=1e-10)
