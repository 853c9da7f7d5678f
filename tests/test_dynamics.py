"""Dynamics: Jacobians against autograd, spectra against determinants, fixed points against equations solved by hand."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from blackboards import ALL, MinimalGated, Peephole, random_cells, random_problem
from hypothesis import given, settings
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence

import throughtime as tt
from throughtime.engine.problem import at_step
from throughtime.errors import ShapeError, ThroughtimeError
from throughtime.insight.dynamics import Dynamics, dynamics, lyapunov
from throughtime.insight.step_map import StepMap
from throughtime.nn import Recurrent

CELLS = [tt.Elman, tt.GRU, tt.GRUResetBefore, tt.LSTM, MinimalGated, Peephole]


# -- one step as a map ------------------------------------------------------------------------------------------------


def check_step(cell: tt.Cell) -> None:
    """The Jacobian of several states at once, each against autograd's alone."""
    problem = random_problem(cell, steps=1, rows=3, seed=5)
    step, outside = StepMap(problem), at_step(problem, 0)
    x, state = problem.x[0].detach(), torch.cat(problem.states, -1).detach()
    with torch.no_grad():
        found = step.jacobian(x, state, outside)
    assert found.shape == (3, step.size, step.size)
    for row in range(3):
        here = [value[row : row + 1] for value in outside]

        def after(joined: Tensor, row: int = row, here: list[Tensor] = here) -> Tensor:
            return step.next(x[row : row + 1], joined[None], here)[0]

        expected = torch.autograd.functional.jacobian(after, state[row])
        torch.testing.assert_close(found[row], expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ALL)
def test_the_step_jacobian_is_autograds_for_many_states_at_once(name: str):
    check_step(ALL[name])


@given(random_cells())
@settings(max_examples=40)
def test_the_step_jacobian_of_any_cell_is_autograds(cell: tt.Cell):
    check_step(cell)


# -- singular values of the lag-k Jacobian ----------------------------------------------------------------------------


def end_jacobian(layer: Recurrent, x: Tensor, lag: int) -> Tensor:
    """dh_T/dh_{T-lag} [N, N] of one row x [T, 1, I], by autograd through the layer itself."""
    parts, size = len(layer.cell.states), layer.hidden_size

    def run(joined: Tensor) -> Tensor:
        states = tuple(part.reshape(1, 1, size) for part in joined.split(size))
        _, after = layer(x[len(x) - lag :], states if parts > 1 else states[0])
        return torch.cat([part.flatten() for part in (after if parts > 1 else (after,))])

    start = torch.zeros(parts * size, dtype=torch.double)
    if lag < len(x):
        _, before = layer(x[: len(x) - lag])
        start = torch.cat([part.flatten() for part in (before if parts > 1 else (before,))]).detach()
    return torch.autograd.functional.jacobian(run, start)


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_singular_values_are_those_of_the_whole_way_as_autograd_has_it(cell: tt.Cell):
    layer, x = Recurrent(cell, 3, 5).double(), torch.randn(12, 1, 3, dtype=torch.double)
    (found,) = dynamics(layer, x, lags=[1, 4, 12])
    for values, lag in zip(found.singular_values, (1, 4, 12), strict=True):
        expected = torch.linalg.svdvals(end_jacobian(layer, x, lag)).numpy()
        told = ~np.isnan(values)
        assert told[0]
        np.testing.assert_allclose(values[told], expected[told], rtol=1e-6, atol=1e-18)
        assert (expected[~told] < 1e-13 * expected[0]).all()


def test_rows_of_different_lengths_are_averaged_over_those_that_have_the_lag():
    layer, x = Recurrent(tt.GRU, 3, 4).double(), torch.randn(9, 3, 3, dtype=torch.double)
    lengths = [4, 9, 6]
    (found,) = dynamics(layer, x, lengths=lengths, lags=[1, 5, 9])
    alone = [
        dynamics(layer, x[:length, row : row + 1], lags=[k for k in (1, 5, 9) if k <= length])[0]
        for row, length in enumerate(lengths)
    ]
    assert found.rows_of_lag.tolist() == [3, 2, 1]
    for place, those in enumerate(([0, 1, 2], [1, 2], [1])):
        expected = np.mean([alone[row].log_singular_values[place] for row in those], axis=0)
        np.testing.assert_allclose(found.log_singular_values[place], expected, rtol=1e-9)
    expected = np.average([one.exponents for one in alone], axis=0, weights=lengths)
    np.testing.assert_allclose(found.exponents, expected, rtol=1e-9)
    assert found.steps == sum(lengths)


def test_the_backward_direction_is_the_forward_one_on_reversed_sequences():
    layer = Recurrent(tt.LSTM, 3, 4, bidirectional=True).double()
    twin = Recurrent(tt.LSTM, 3, 4).double()
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            parameter.copy_(layer.get_parameter(f"{name}_reverse"))
    rows = [torch.randn(length, 3, dtype=torch.double) for length in (7, 4)]
    forward, backward = dynamics(layer, pack_sequence(rows), exponents=None)
    (expected,) = dynamics(twin, pack_sequence([row.flip(0) for row in rows]), exponents=None)
    assert (forward.backward, backward.backward) == (False, True)
    np.testing.assert_allclose(backward.log_singular_values, expected.log_singular_values, rtol=1e-7, atol=1e-7)
    np.testing.assert_allclose(backward.exponents, expected.exponents, rtol=1e-9)


def test_norms_far_outside_the_range_of_floats_keep_their_logarithms():
    for scale in (1e-3, 1e3):
        layer = Recurrent(tt.Elman(activation=tt.identity), 1, 3).double()
        with torch.no_grad():
            layer.get_parameter("weight_hh_l0").copy_(scale * torch.eye(3))
            layer.get_parameter("weight_ih_l0").zero_()
            layer.get_parameter("bias_ih_l0").zero_()
            layer.get_parameter("bias_hh_l0").zero_()
        (found,) = dynamics(layer, torch.zeros(300, 1, 1, dtype=torch.double))
        np.testing.assert_allclose(found.log_singular_values, np.log(scale) * found.lags[:, None] * np.ones(3))
        word = "explodes" if scale > 1 else "vanishes"
        assert found.verdict(300).startswith(f"{word}: over the 300 steps needed")
        assert ("1e900" if scale > 1 else "1e-900") in found.verdict(300)


# -- the Lyapunov spectrum --------------------------------------------------------------------------------------------


def test_exponents_of_triangular_maps_are_the_means_of_their_diagonals():
    diagonals = torch.tensor([[2.0, 0.5, 0.1], [3.0, 0.25, 0.4]], dtype=torch.double)
    maps = [torch.diag(diagonals[t % 2]) + torch.triu(torch.randn(3, 3, dtype=torch.double), 1) for t in range(20)]
    np.testing.assert_allclose(lyapunov(maps), diagonals.log().mean(0).numpy(), rtol=1e-12)


def test_all_exponents_add_up_to_the_mean_logarithm_of_the_determinants():
    maps = torch.randn(50, 4, 4, dtype=torch.double)
    assert lyapunov(maps).sum() == pytest.approx(float(torch.linalg.slogdet(maps)[1].mean()), rel=1e-12)


def test_fewer_exponents_are_the_first_of_all_of_them():
    maps = torch.randn(200, 5, 5, dtype=torch.double) * torch.tensor([3.0, 1.0, 0.5, 0.1, 0.01])[:, None]
    np.testing.assert_allclose(lyapunov(maps, count=2), lyapunov(maps)[:2], rtol=1e-12)


def test_skipped_steps_turn_the_directions_and_are_not_counted():
    turn = np.array([[0.0, 1.0], [1.0, 0.0]])
    stretch = np.diag([4.0, 0.5])
    np.testing.assert_allclose(lyapunov([turn, stretch, stretch], skip=1), np.log([4.0, 0.5]))


def test_a_map_that_forgets_a_direction_has_an_exponent_of_minus_infinity():
    assert lyapunov([np.diag([0.5, 0.0])] * 3).tolist() == [math.log(0.5), -math.inf]


def test_what_is_no_sequence_of_jacobians_is_refused():
    with pytest.raises(ShapeError, match=r"Jacobian 0 has shape \[2, 3\]; it must be square"):
        lyapunov([np.ones((2, 3))])
    with pytest.raises(ShapeError, match=r"Jacobian 1 has shape \[3, 3\]; it must be \[2, 2\]"):
        lyapunov([np.eye(2), np.eye(3)])
    with pytest.raises(ThroughtimeError, match="2 steps and 2 are skipped"):
        lyapunov([np.eye(2)] * 2, skip=2)
    with pytest.raises(ThroughtimeError, match="count is 3; a map of 2 numbers"):
        lyapunov([np.eye(2)], count=3)


# -- fixed and slow points --------------------------------------------------------------------------------------------


def scalar(weight: float, bias: float, starts: list[float], slow: float = 0.1) -> Dynamics:
    """h -> tanh(weight * h + bias), seen from these states on."""
    layer = Recurrent(tt.Elman, 1, 1).double()
    with torch.no_grad():
        for name, value in {"weight_ih": 0.0, "weight_hh": weight, "bias_ih": bias, "bias_hh": 0.0}.items():
            layer.get_parameter(f"{name}_l0").fill_(value)
    h_0 = torch.tensor(starts, dtype=torch.double)[None, :, None]
    return dynamics(layer, torch.zeros(6, len(starts), 1, dtype=torch.double), h_0, slow=slow)[0]


def test_a_bistable_unit_has_two_attractors_and_the_point_between_them():
    found = scalar(2.0, 0.0, [-1.0, -1e-3, 1e-3, 1.0])
    by_state = sorted(found.fixed_points, key=lambda point: float(point.state[0]))
    root = 0.9575040240772687  # h = tanh(2 h)
    np.testing.assert_allclose([point.state[0] for point in by_state], [-root, 0.0, root], atol=1e-9)
    assert [point.kind for point in by_state] == ["attracting", "repelling", "attracting"]
    eigenvalues = [complex(point.eigenvalues[0]) for point in by_state]
    np.testing.assert_allclose(eigenvalues, [2 * (1 - root**2), 2.0, 2 * (1 - root**2)], rtol=1e-7)
    assert all(point.is_fixed for point in found.fixed_points)
    assert sum(point.starts for point in found.fixed_points) + found.lost == found.starts


def test_just_past_a_fold_a_slow_point_is_left_where_the_fixed_points_were():
    """h = tanh(2 h + b) loses two of its three roots at b = .533: there the unit nearly stops."""
    starts = [-1.0, -0.9, -0.7, 0.9]
    found = scalar(2.0, 0.54, starts, slow=1.0)
    slow = [point for point in found.fixed_points if not point.is_fixed]
    assert [round(float(point.state[0]), 2) for point in slow] == [-0.71]
    assert 1e-4 < slow[0].speed < 1e-2
    assert found.fixed_points[0].is_fixed
    assert found.fixed_points[0].state[0] > 0.9
    assert all(point.is_fixed for point in scalar(2.0, 0.54, starts, slow=1e-3).fixed_points), "not slow enough"


def test_every_fixed_point_of_a_network_is_one_and_has_autograds_eigenvalues():
    layer = Recurrent(tt.GRU, 2, 6).double()
    with torch.no_grad():
        layer.get_parameter("weight_hh_l0").mul_(6)
    x = torch.randn(30, 3, 2, dtype=torch.double)
    (found,) = dynamics(layer, x)
    assert found.fixed_points
    mean = x.mean((0, 1)).reshape(1, 1, 2)
    np.testing.assert_allclose(found.fixed_input, mean.flatten().numpy())
    for point in found.fixed_points:
        state = torch.from_numpy(point.state)
        moved = layer(mean, state.reshape(1, 1, 6))[1].flatten()
        assert float((moved - state).detach().norm()) == pytest.approx(point.speed, abs=1e-12)
        jacobian = torch.autograd.functional.jacobian(lambda h: layer(mean, h.reshape(1, 1, 6))[1].flatten(), state)
        expected = torch.linalg.eigvals(jacobian).abs().sort(descending=True).values.numpy()
        np.testing.assert_allclose(np.abs(point.eigenvalues), expected, rtol=1e-8)


def test_a_layer_that_only_drifts_has_no_fixed_point_and_says_how_many_starts_were_lost():
    layer = Recurrent(tt.Elman(activation=tt.identity), 1, 2).double()
    with torch.no_grad():
        layer.get_parameter("weight_hh_l0").copy_(torch.eye(2))
        layer.get_parameter("bias_ih_l0").fill_(1.0)
        layer.get_parameter("bias_hh_l0").zero_()
        layer.get_parameter("weight_ih_l0").zero_()
    (found,) = dynamics(layer, torch.zeros(10, 1, 1, dtype=torch.double))
    assert found.fixed_points == ()
    assert found.lost == found.starts == 10


# -- the caller's side ------------------------------------------------------------------------------------------------


def test_it_changes_neither_the_layer_nor_the_random_numbers():
    layer = Recurrent(tt.LSTM, 3, 4, num_layers=2, bidirectional=True, dropout=0.5)
    x = torch.randn(6, 2, 3)
    before, numbers = copy.deepcopy(layer.state_dict()), torch.get_rng_state()
    found = dynamics(layer, x)
    assert torch.equal(torch.get_rng_state(), numbers)
    assert layer.training
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    assert all(parameter.grad is None for parameter in layer.parameters())
    assert [(one.layer, one.backward) for one in found] == [(0, False), (0, True), (1, False), (1, True)]
    again = dynamics(layer.eval(), x)
    for one, other in zip(found, again, strict=True):
        np.testing.assert_array_equal(one.log_singular_values, other.log_singular_values)


def test_a_float32_layer_is_measured_as_the_float64_layer_of_the_same_numbers():
    layer, x = tt.nn.GRU(3, 4, batch_first=True), torch.randn(2, 7, 3)
    (single,) = dynamics(layer, x)
    (double,) = dynamics(layer.double(), x.double())
    np.testing.assert_array_equal(single.exponents, double.exponents)


def test_outside_inputs_take_part():
    layer = Recurrent(ALL["Decaying"], 3, 4).double()
    rows = 2
    outside = {
        "gap": torch.rand(5, rows, 1, dtype=torch.double),
        "mask": torch.ones(5, rows, 1, dtype=torch.double),
        "who": torch.randn(rows, 1, dtype=torch.double),
    }
    x = torch.randn(5, rows, 3, dtype=torch.double)
    (found,) = dynamics(layer, x, outside=outside)
    (longer,) = dynamics(layer, x, outside={**outside, "gap": 3 * outside["gap"]})
    assert (longer.norms < found.norms).all(), "a longer gap leaves less"


def test_progress_is_told_part_by_part():
    layer, told = Recurrent(tt.Elman, 3, 4, bidirectional=True), []
    dynamics(layer, torch.randn(5, 2, 3), on_progress=lambda done, total: told.append((done, total)))
    assert told == [(done, 6) for done in range(1, 7)]


def test_how_many_rows_were_followed_is_said():
    layer, x = Recurrent(tt.Elman, 3, 4).double(), torch.randn(5, 9, 3, dtype=torch.double)
    (found,) = dynamics(layer, x, rows=2)
    assert (found.rows, found.rows_given, found.steps) == (2, 9, 10)
    ends = [dynamics(layer, x[:, row : row + 1])[0].exponents for row in (0, 8)]
    np.testing.assert_allclose(found.exponents, np.mean(ends, axis=0), rtol=1e-9)


def test_what_cannot_be_measured_is_refused_in_one_line():
    layer, x = Recurrent(tt.Elman, 3, 4), torch.randn(5, 2, 3)
    with pytest.raises(ThroughtimeError, match=r"not GRU; for torch's own call throughtime.upgrade"):
        dynamics(torch.nn.GRU(3, 4), x)  # type: ignore[arg-type]
    with pytest.raises(ThroughtimeError, match="the lags begin at 6, and the longest row has 5 steps"):
        dynamics(layer, x, lags=[6])
    with pytest.raises(ThroughtimeError, match=r"lags are \[0\]"):
        dynamics(layer, x, lags=[0])
    with pytest.raises(ThroughtimeError, match="skip is 5 and the longest row has 5 steps"):
        dynamics(layer, x, skip=5)
    with pytest.raises(ThroughtimeError, match="rows is 0"):
        dynamics(layer, x, rows=0)
    with pytest.raises(ThroughtimeError, match="no step to follow"):
        dynamics(layer, x, lengths=[0, 0])
    with pytest.raises(ThroughtimeError, match="infinite or NaN on this input"):
        dynamics(layer, x * math.nan)
    with pytest.raises(ThroughtimeError, match="needed is 0"):
        dynamics(layer, x)[0].verdict(0)
