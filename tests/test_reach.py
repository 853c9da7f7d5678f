"""Reach against theory: lag-k norms of networks whose product of Jacobians is known."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from throughtime.equations.catalogue import GRU, LSTM, Elman
from throughtime.equations.cell import Cell
from throughtime.equations.expr import identity, relu
from throughtime.insight.reach import Reach, gradient_norms
from throughtime.nn import Recurrent

UNITS, STEPS = 6, 9


def network(cell: Cell, *, bidirectional: bool = False) -> Recurrent:
    return Recurrent(cell, 3, UNITS, bidirectional=bidirectional).double()


def inputs(rows: int) -> tuple[Tensor, Tensor]:
    """x [T, B, 3] and a direction [B, UNITS] whose product with the last output is the loss."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(STEPS, rows, 3, dtype=torch.double, generator=generator)
    return x, torch.randn(rows, UNITS, dtype=torch.double, generator=generator)


def last_step_norms(layer: Recurrent, x: Tensor, weights: Tensor, lengths: list[int] | None = None) -> np.ndarray:
    ends = torch.tensor(lengths or [len(x)] * x.shape[1]) - 1

    def loss() -> Tensor:
        outputs, _ = layer(x, lengths=lengths)
        return (outputs[ends, torch.arange(x.shape[1])] * weights).sum()

    return gradient_norms(loss)[0]


@pytest.mark.parametrize("scale", [0.5, 0.9, 1.0, 1.3])
def test_a_linear_cell_with_a_scaled_orthogonal_matrix_keeps_exactly_its_power(scale: float) -> None:
    layer = network(Elman(activation=identity))
    orthogonal = torch.linalg.qr(torch.randn(UNITS, UNITS, dtype=torch.double)).Q
    with torch.no_grad():
        layer.get_parameter("weight_hh_l0").copy_(scale * orthogonal)
    reach = Reach.of(last_step_norms(layer, *inputs(4)))
    np.testing.assert_allclose(reach.share, scale ** np.arange(STEPS), rtol=1e-12)
    assert not reach.zeros.any()
    if scale == 1:
        assert reach.hardly_changes
    else:
        assert reach.half_life == pytest.approx(-math.log(2) / math.log(scale), rel=1e-9)


@pytest.mark.parametrize("cell", [Elman, GRU, LSTM], ids=lambda cell: cell.name)
def test_norms_are_those_of_the_product_of_step_jacobians_over_all_states_joined(cell: Cell) -> None:
    layer, (x, weights) = network(cell), inputs(1)
    parts = len(cell.states)

    def step(joined: Tensor, t: int) -> Tensor:
        states = tuple(part.view(1, 1, UNITS) for part in joined.split(UNITS))
        _, after = layer(x[t : t + 1], states if parts > 1 else states[0])
        return torch.cat([part.flatten() for part in (after if parts > 1 else (after,))])

    trajectory = [torch.zeros(parts * UNITS, dtype=torch.double)]
    for t in range(STEPS):
        trajectory.append(step(trajectory[-1], t).detach())
    adjoint = torch.cat([weights[0], torch.zeros((parts - 1) * UNITS, dtype=torch.double)])
    expected = []
    for t in reversed(range(STEPS)):
        expected.append(float(adjoint.norm()))
        adjoint = adjoint @ torch.autograd.functional.jacobian(lambda state, t=t: step(state, t), trajectory[t])
    np.testing.assert_allclose(last_step_norms(layer, x, weights)[:, 0], expected, rtol=1e-10)


@pytest.mark.parametrize("cell", [Elman, GRU, LSTM], ids=lambda cell: cell.name)
def test_a_ragged_row_has_the_norms_it_has_alone_and_none_before_its_first_step(cell: Cell) -> None:
    layer, (x, weights) = network(cell), inputs(4)
    lengths = [3, STEPS, 1, 5]
    together = last_step_norms(layer, x, weights, lengths)
    for row, length in enumerate(lengths):
        alone = last_step_norms(layer, x[:length, row : row + 1], weights[row : row + 1])
        np.testing.assert_allclose(together[:length, row], alone[:, 0], rtol=1e-10)
        assert np.isnan(together[length:, row]).all()


def test_the_backward_direction_counts_its_lags_from_the_first_step() -> None:
    layer, (x, _) = network(Elman(activation=identity), bidirectional=True), inputs(2)
    with torch.no_grad():
        layer.get_parameter("weight_hh_l0_reverse").copy_(0.5 * torch.eye(UNITS))

    def loss() -> Tensor:
        outputs, _ = layer(x, lengths=[STEPS, 4])
        return outputs[0, :, UNITS:].sum()

    forward, backward = gradient_norms(loss)
    assert forward[~np.isnan(forward)].max() == 0
    np.testing.assert_allclose(Reach.of(backward).share, 0.5 ** np.arange(STEPS), rtol=1e-12)
    assert Reach.of(backward).rows.tolist() == [2] * 4 + [1] * (STEPS - 4)


def test_exact_zeros_are_counted_and_kept_out_of_the_mean() -> None:
    layer, (x, weights) = network(Elman(activation=relu)), inputs(2)
    with torch.no_grad():
        layer.get_parameter("weight_ih_l0").fill_(1.0)
        layer.get_parameter("bias_ih_l0").fill_(20.0)
        x[4, 1] = -1000.0  # every unit of row 1 is dead at that step, and nothing passes it
    norms = last_step_norms(layer, x, weights)
    reach = Reach.of(norms)
    assert reach.zeros.tolist() == [0] * 5 + [1] * 4
    np.testing.assert_allclose(reach.share[5:], norms[5:, 0] / norms[0, 0])


def test_a_gradient_fades_at_its_pace_until_it_leaves_the_range_of_its_type() -> None:
    layer = Recurrent(Elman(activation=identity), 3, UNITS)
    with torch.no_grad():
        layer.get_parameter("weight_hh_l0").copy_(2.0**-30 * torch.eye(UNITS))
    x, weights = inputs(1)
    x = x.repeat(3, 1, 1)
    single = Reach.of(last_step_norms(layer, x.float(), weights.float()))
    double = Reach.of(last_step_norms(layer.double(), x, weights))
    np.testing.assert_allclose(double.share, 2.0 ** (-30 * np.arange(27.0)), rtol=1e-12)  # 1e-470 if squared
    assert single.zeros.tolist() == [0] * 5 + [1] * 22
    assert single.half_life == pytest.approx(double.half_life, rel=1e-3)


def test_the_mean_is_geometric_over_the_rows_there_are() -> None:
    reach = Reach.of(np.array([[2.0, 1.0, 3.0], [1.0, 2.0, np.nan], [1.0, np.nan, np.nan]]))
    np.testing.assert_allclose(reach.share, [1.0, 1.0, 0.5])
    assert reach.rows.tolist() == [3, 2, 1]


def test_the_verdict_is_in_plain_words() -> None:
    lags = np.arange(29.0)[:, None]
    assert Reach.of(0.5 ** (lags / 2.2)).verdict(28) == "halves every 2.2 steps; your sequences need 28"
    assert Reach.of(2.0 ** (lags / 3)).verdict(28) == "doubles every 3.0 steps; your sequences need 28"
    assert Reach.of(np.ones((29, 1))).pace == "hardly changes"
    assert Reach.of(np.ones((1, 4))).pace == "cannot be told"
    assert Reach.of(np.zeros((5, 4))).pace == "cannot be told"
