"""Pairs of times: the terms are those of the double sum, term by term, and they add up to the gradient."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from blackboards import ALL
from torch import Tensor, nn

import throughtime as tt
from throughtime.equations.catalogue import GRU, LSTM, Elman, ProjectedLSTM
from throughtime.equations.cell import Cell
from throughtime.equations.expr import identity
from throughtime.insight.pairs import Pairs, pairs
from throughtime.nn import Recurrent

STEPS, ROWS, UNITS = 6, 4, 5
RAGGED = [6, 2, 0, 4]


def network(one: Cell, **options: Any) -> Recurrent:
    torch.manual_seed(0)
    return Recurrent(one, UNITS, UNITS, proj_size=3 if one.projects else 0, **options).double()


def inputs(one: Cell, lengths: list[int] | None) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(STEPS, ROWS, UNITS, dtype=torch.double, generator=generator)
    outside = {
        name: torch.rand((STEPS, ROWS, 1) if name in one.per_step else (ROWS, 1), dtype=torch.double)
        for name in one.outside
    }
    return {"x": x, "lengths": lengths, "outside": outside or None}


def losses(result: Any) -> Tensor:
    """Per-step losses [T, B] of a layer's outputs."""
    squares: Tensor = (result[0] * torch.arange(1, result[0].shape[-1] + 1)).square().sum(-1)
    return squares


def assert_add_up(found: list[Pairs], layer: Recurrent, batch: dict[str, Any], lengths: list[int] | None) -> None:
    """Shares add up to one, and terms to what `backward`, by the derived adjoints, leaves in the layer's parameters."""
    layer.target = "stepwise"
    real = torch.arange(STEPS)[:, None] < torch.tensor(lengths or [STEPS] * ROWS)
    torch.where(real, losses(layer(**batch)), 0.0).sum().backward()
    for one in found:
        suffix = f"l{one.place.depth}{'_reverse' if one.place.reverse else ''}"
        for name, gradient in one.gradients.items():
            expected = layer.get_parameter(f"{name}_{suffix}").grad
            assert expected is not None
            np.testing.assert_allclose(gradient, expected.numpy(), rtol=1e-10, atol=1e-10 * float(expected.abs().max()))
            assert one.shares[name].sum() == pytest.approx(1.0 if gradient.any() else 0.0, abs=1e-10)


@pytest.mark.parametrize("lengths", [None, RAGGED], ids=["full", "ragged"])
@pytest.mark.parametrize("name", [name for name, one in ALL.items() if any(p.is_matrix for p in one.parameters)])
def test_in_every_cell_the_terms_add_up_to_the_weights_gradients(name: str, lengths: list[int] | None) -> None:
    layer, batch = network(ALL[name]), inputs(ALL[name], lengths)
    (found,) = pairs(layer, batch, losses)
    assert_add_up([found], layer, batch, lengths)
    assert set(found.shares) == {p.name for p in ALL[name].parameters if p.is_matrix}


@pytest.mark.parametrize("one", [Elman, LSTM, ProjectedLSTM], ids=lambda one: one.name)
def test_in_every_layer_and_direction_too(one: Cell) -> None:
    layer, batch = network(one, num_layers=2, bidirectional=True), inputs(one, RAGGED)
    found = pairs(layer, batch, losses)
    assert len(found) == 4
    assert_add_up(found, layer, batch, RAGGED)


@pytest.mark.parametrize("one", [Elman, GRU, LSTM], ids=lambda one: one.name)
def test_each_term_is_one_losss_gradient_through_one_steps_use_of_the_matrix(one: Cell) -> None:
    """By a copy of the weights for each step, run one step at a time: G_ik = dL_i/dW_k."""
    layer, batch = network(one), inputs(one, None)
    (found,) = pairs(layer, batch, losses)
    weights = {name: parameter.detach() for name, parameter in layer.named_parameters()}
    copies = [{name: value.clone().requires_grad_() for name, value in weights.items()} for _ in range(STEPS)]
    state, outputs, states = None, [], []
    for step, used in zip(batch["x"], copies, strict=True):
        output, state = torch.func.functional_call(layer, used, (step[None], state))
        states.append(state if isinstance(state, tuple) else (state,))
        outputs.append(output[0])
    for i in range(STEPS):
        loss = losses([torch.stack(outputs)])[i].sum()
        for k in range(STEPS):
            for name in ("weight_ih", "weight_hh"):
                (term,) = torch.autograd.grad(loss, copies[k][f"{name}_l0"], retain_graph=True, materialize_grads=True)
                whole = torch.from_numpy(found.gradients[name])
                share = float((term * whole).sum() / whole.square().sum())
                assert found.shares[name][i, k] == pytest.approx(share, abs=1e-12)
                assert (k <= i) or share == 0
    assert found.by_use["weight_hh"] == pytest.approx(found.shares["weight_hh"].sum(axis=0))


def test_norms_are_the_products_of_jacobians_in_a_lower_triangle() -> None:
    layer = network(Elman(activation=identity))
    with torch.no_grad():
        layer.get_parameter("weight_hh_l0").copy_(0.5 * torch.eye(UNITS))
    direction = torch.ones(ROWS, UNITS, dtype=torch.double)
    (found,) = pairs(layer, inputs(Elman, None), lambda result: (result[0] * direction).sum(-1))
    i, k = np.indices((STEPS, STEPS))
    expected = np.where(k <= i, float(direction.norm()) * 0.5 ** np.maximum(i - k, 0), 0.0)
    np.testing.assert_allclose(found.norms, expected, rtol=1e-12)
    backward = pairs(
        network(Elman(activation=identity), bidirectional=True),
        inputs(Elman, None),
        lambda result: result[0][..., UNITS:].sum(-1),
    )[1]
    assert (backward.norms[k < i] == 0).all()
    assert (backward.norms[k >= i] > 0).all()


def test_one_loss_at_the_end_has_one_term_a_step() -> None:
    layer, batch = network(GRU), inputs(GRU, RAGGED)
    (found,) = pairs(layer, batch, lambda result: result[1].square().sum())
    assert found.scalar
    assert (found.losses.tolist(), found.width) == ([STEPS - 1], 1)
    assert found.norms.shape == found.shares["weight_ih"].shape == (1, STEPS)
    assert found.shares["weight_ih"].sum() == pytest.approx(1.0, abs=1e-12)
    layer(**batch)[1].square().sum().backward()
    gradient = layer.get_parameter("weight_hh_l0").grad
    assert gradient is not None
    np.testing.assert_allclose(found.gradients["weight_hh"], gradient.numpy(), rtol=1e-10)


def test_a_share_can_be_negative() -> None:
    layer = network(Elman(activation=identity))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
    x = torch.zeros(2, 1, UNITS, dtype=torch.double)
    x[0, 0, 0], x[1, 0, 0] = 3.0, -1.0
    (found,) = pairs(layer, (x,), lambda result: result[0][..., 0])
    np.testing.assert_allclose(found.by_use["weight_ih"], [1.5, -0.5])
    assert not found.shares["weight_hh"].any(), "its gradient is exactly zero"


def test_too_many_losses_are_taken_in_groups_and_the_sums_stay_the_same() -> None:
    layer, batch = network(LSTM), inputs(LSTM, RAGGED)
    (single,), (grouped,) = pairs(layer, batch, losses), pairs(layer, batch, losses, terms=4)
    assert (grouped.width, grouped.losses.tolist()) == (2, [0, 2, 4])
    assert grouped.measured.endswith("the losses of 2 steps at a time, for they are too many to take singly")
    for name, shares in single.shares.items():
        np.testing.assert_allclose(grouped.shares[name], shares.reshape(3, 2, STEPS).sum(1), atol=1e-12)


def test_a_long_sequence_is_taken_in_groups_unasked_and_told() -> None:
    layer = Recurrent(Elman, 1, 1)
    (found,) = pairs(layer, torch.ones(1100, 1, 1), lambda result: result[0].sum(-1))
    assert found.width == 62  # 18 terms of 1100 steps each are what 20000 steps back allow
    assert found.shares["weight_hh"].shape == (18, 1100)
    assert "62 steps at a time" in found.measured
    assert found.shares["weight_hh"].sum() == pytest.approx(1.0, abs=1e-10)


def test_frozen_weights_are_looked_into_and_the_model_is_left_alone() -> None:
    torch.manual_seed(0)
    model = nn.LSTM(3, UNITS)
    model.requires_grad_(False)
    numbers = torch.get_rng_state()
    (found,) = pairs(model, (torch.randn(STEPS, ROWS, 3, generator=torch.Generator().manual_seed(1)),), losses)
    assert torch.equal(torch.get_rng_state(), numbers)
    assert found.shares["weight_hh"].sum() == pytest.approx(1.0, abs=1e-10)
    assert type(model) is nn.LSTM
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_progress_is_told_and_nonsense_refused() -> None:
    told: list[tuple[int, int]] = []
    layer, batch = network(GRU), inputs(GRU, None)
    pairs(layer, batch, losses, on_progress=lambda *done: told.append(done))
    assert told == [(n, STEPS + 1) for n in range(1, STEPS + 2)]
    with pytest.raises(tt.ThroughtimeError, match="terms is 0"):
        pairs(layer, batch, losses, terms=0)
