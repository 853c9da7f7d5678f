"""Reach against theory: lag-k norms of networks whose product of Jacobians is known."""

import copy
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from blackboards import ALL
from torch import Tensor, nn

import throughtime as tt
from throughtime.engine.recurrence import recording
from throughtime.equations.catalogue import GRU, LSTM, Elman
from throughtime.equations.cell import Cell
from throughtime.equations.expr import identity, relu
from throughtime.errors import ThroughtimeError
from throughtime.insight.reach import LayerReach, Reach, gradient_norms, reach
from throughtime.insight.rehearsal import Place, rehearse
from throughtime.nn import LastStep, Recurrent

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


# -- whole models -----------------------------------------------------------------------------------------------------


class Classifier(nn.Module):
    """A linear map, any recurrent layer, and a read-out of the last step."""

    def __init__(self, recurrent: nn.Module, *, bidirectional: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.recurrent = recurrent
        self.readout = LastStep(UNITS * (2 if bidirectional else 1), 2, bidirectional=bidirectional)

    def forward(self, x: Tensor, lengths: Any = None) -> Tensor:
        outputs = self.recurrent(self.first(x)) if lengths is None else self.recurrent(self.first(x), lengths=lengths)
        logits: Tensor = self.readout(outputs[0], lengths)
        return logits


def total(logits: Tensor) -> Tensor:
    return logits.square().sum()


def linear(scale: float) -> Recurrent:
    layer = Recurrent(Elman(activation=identity), 3, UNITS)
    with torch.no_grad():
        orthogonal = torch.linalg.qr(torch.randn(UNITS, UNITS, generator=torch.Generator().manual_seed(2))).Q
        layer.get_parameter("weight_hh_l0").copy_(scale * orthogonal)
    return layer


@pytest.mark.parametrize("scale", [0.5, 1.0, 1.3])
def test_a_linear_network_reaches_both_ways_by_exactly_its_power(scale: float) -> None:
    x, _ = inputs(4)
    (found,) = reach(Classifier(linear(scale)), (x, [STEPS, 3, 6, 1]), total)
    powers = scale ** np.arange(STEPS)
    np.testing.assert_allclose(found.gradient.share, powers, rtol=1e-6)  # as orthogonal as float32 weights can be
    np.testing.assert_allclose(found.inputs.share, powers, rtol=1e-6)
    assert found.gradient.rows.tolist() == [4, 3, 3, 2, 2, 2, 1, 1, 1]
    assert str(found.place) == "recurrent"
    assert found.cell == "Elman"


def test_a_matrix_that_is_not_normal_grows_though_its_radius_is_below_one() -> None:
    layer = Recurrent(Elman(activation=identity), 2, 2)
    with torch.no_grad():
        layer.get_parameter("weight_hh_l0").copy_(torch.tensor([[0.9, 5.0], [0.0, 0.9]]))
        layer.get_parameter("weight_ih_l0").copy_(torch.eye(2))
    (found,) = reach(layer, torch.zeros(10, 1, 2), lambda result: result[0][-1].sum(), times=1)
    assert found.inputs.share[9] * math.sqrt(2) == pytest.approx(19.4, abs=0.05)
    assert found.at_needs > 1, "the spectral radius of 0.9 does not bound nine steps"


@pytest.mark.parametrize("norm", [0.5, 0.9])
def test_a_tanh_network_with_a_largest_singular_value_below_one_vanishes_at_least_as_fast(norm: float) -> None:
    """Pascanu, Mikolov & Bengio 2013: the bound holds for every lag, in every row."""
    layer, (x, weights) = network(Elman), inputs(5)
    with torch.no_grad():
        hh = layer.get_parameter("weight_hh_l0")
        hh.mul_(norm / torch.linalg.matrix_norm(hh, 2))
    norms = last_step_norms(layer, x, weights)
    assert (norms <= norms[0] * norm ** np.arange(STEPS)[:, None] * (1 + 1e-12)).all()


def test_torchs_own_rnn_vanishes_before_it_has_seen_data() -> None:
    torch.manual_seed(0)
    model = nn.RNN(3, 256)
    (found,) = reach(model, torch.randn(40, 2, 3), lambda result: result[0][-1].sum(), times=2, probes=2)
    radius = torch.linalg.eigvals(model.weight_hh_l0.double()).abs().max().item()
    assert radius == pytest.approx(0.577, abs=0.03)
    assert found.verdict == "halves every 1.2 steps; the first and the last of your 40 steps do not reach each other"
    assert found.lost_at is not None
    assert found.lost_at < 15


@pytest.mark.parametrize("one", [nn.RNN, nn.GRU, nn.LSTM])
def test_torchs_own_layers_are_seen_as_throughtimes_and_left_as_they_were(one: Any) -> None:
    torch.manual_seed(3)
    model = Classifier(one(3, UNITS, num_layers=2))
    ours = copy.deepcopy(model)
    ours.recurrent.__class__ = {nn.RNN: tt.nn.RNN, nn.GRU: tt.nn.GRU, nn.LSTM: tt.nn.LSTM}[one]
    x, _ = inputs(2)
    before, numbers = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    theirs = reach(model, (x.float(),), total)
    assert torch.equal(torch.get_rng_state(), numbers)
    assert type(model.recurrent) is one
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    for a, b in zip(theirs, reach(ours, (x.float(),), total), strict=True):
        np.testing.assert_array_equal(a.gradient.share, b.gradient.share)
        np.testing.assert_array_equal(a.inputs.share, b.inputs.share)
    assert [str(found.place) for found in theirs] == ["recurrent, layer 0", "recurrent, layer 1"]


def test_nothing_is_left_behind_by_an_error() -> None:
    model, (x, _) = Classifier(nn.GRU(3, UNITS)), inputs(1)
    with pytest.raises(RuntimeError):
        reach(model, (x[:, :, :2],), total)
    assert type(model.recurrent) is nn.GRU
    with recording() as records:
        model(x.float())
    assert records == []


def test_the_inputs_influence_is_the_norm_of_the_jacobian() -> None:
    """Against torch's own Jacobian; six units are fewer than the directions, so no estimate is made."""
    layer, (x, _) = network(GRU), inputs(1)
    (found,) = reach(layer, x, lambda result: result[0][-1].sum(), times=1)
    jacobian = torch.autograd.functional.jacobian(lambda given: layer(given)[0][-1, 0], x)[:, :, 0]  # [H, T, I]
    norms = torch.linalg.vector_norm(jacobian, dim=(0, 2)).flip(0).numpy()
    np.testing.assert_allclose(found.inputs.share, norms / norms[0], rtol=1e-9)


def test_random_directions_estimate_it_within_what_is_promised() -> None:
    torch.manual_seed(1)
    layer, x = Recurrent(LSTM, 3, 24).double(), torch.randn(15, 8, 3, dtype=torch.double)
    loss = lambda result: result[0][-1].sum()  # noqa: E731
    (exact,), (estimated,) = (reach(layer, x, loss, probes=probes) for probes in (48, 8))
    np.testing.assert_allclose(estimated.inputs.share, exact.inputs.share, rtol=0.15)
    (again,) = reach(layer, x, loss, probes=8)
    np.testing.assert_array_equal(again.inputs.share, estimated.inputs.share)
    (other,) = reach(layer, x, loss, probes=8, seed=1)
    assert (other.inputs.share[1:] != estimated.inputs.share[1:]).all()


@pytest.mark.parametrize("lengths", [None, [3, STEPS, 1, 5]])
def test_a_loss_at_every_step_is_followed_back_from_each(lengths: list[int] | None) -> None:
    """With as many times as steps, every |dL_t/dh_{t-k}| counts: done here by hand, one at a time."""
    layer, (x, weights) = network(LSTM), inputs(4)

    def losses(result: Any) -> Tensor:
        return (result[0] * weights).sum(-1)

    batch = {"x": x, "lengths": lengths}
    (found,) = reach(layer, batch, losses, times=STEPS)
    run = rehearse(layer, batch, losses)
    assert run.loss is not None
    columns = []
    for row, length in enumerate(lengths or [STEPS] * 4):
        for t in range(length):
            states = [state for step in run.records[0].states[: t + 1] for state in step]
            gradients = torch.autograd.grad(run.loss[t, row], states, retain_graph=True, materialize_grads=True)
            norms = [torch.cat(gradients[2 * s : 2 * s + 2], 1)[row].norm().item() for s in range(t, -1, -1)]
            columns.append(norms + [math.nan] * (STEPS - t - 1))
    expected = Reach.of(np.array(columns).T)
    np.testing.assert_allclose(found.gradient.share, expected.share, rtol=1e-9)
    np.testing.assert_array_equal(found.gradient.rows, expected.rows)
    assert found.needs is None
    assert "less than 0.001 of it is left from" in found.verdict or "the longest way there is" in found.verdict


def test_losses_past_a_rows_end_are_not_used() -> None:
    layer, (x, _) = network(GRU), inputs(2)
    batch = {"x": x, "lengths": [STEPS, 4]}
    broken = torch.zeros(STEPS, 2, dtype=torch.double)
    broken[4:, 1] = math.nan
    clean = reach(layer, batch, lambda result: result[0].sum(-1))
    spoilt = reach(layer, batch, lambda result: result[0].sum(-1) + broken)
    np.testing.assert_array_equal(clean[0].gradient.share, spoilt[0].gradient.share)


def test_both_directions_and_all_layers_are_told_apart() -> None:
    layer = Recurrent(Elman(activation=identity), 3, UNITS, num_layers=2, bidirectional=True)
    with torch.no_grad():
        for place, name in enumerate(["l0", "l0_reverse", "l1", "l1_reverse"]):
            layer.get_parameter(f"weight_hh_{name}").copy_((0.3 + 0.2 * place) * torch.eye(UNITS))
    x, _ = inputs(3)
    found = reach(Classifier(layer, bidirectional=True), (x, [STEPS, 4, 2]), total)
    assert [str(one.place) for one in found] == [
        f"recurrent, layer {depth}, {direction}" for depth in (0, 1) for direction in ("forward", "backward")
    ]
    for place, one in enumerate(found):
        np.testing.assert_allclose(one.inputs.share, (0.3 + 0.2 * place) ** np.arange(STEPS), rtol=1e-6)
        assert one.read_at_end
    np.testing.assert_allclose(found[2].gradient.share, 0.7 ** np.arange(STEPS), rtol=1e-6)
    np.testing.assert_allclose(found[3].gradient.share, 0.9 ** np.arange(STEPS), rtol=1e-6)


def test_a_direction_read_where_it_has_seen_one_step_is_said_to_be() -> None:
    torch.manual_seed(4)
    layer, (x, _) = Recurrent(GRU, 3, UNITS, num_layers=2, bidirectional=True), inputs(3)
    found = reach(layer, torch.cat([x, x, x]), lambda result: result[0][-1].square().sum())
    assert [one.read_at_end for one in found] == [True, False, True, False]
    assert "does not read this direction at its end" in found[1].verdict


def test_a_layer_that_is_run_twice_is_told_apart_by_its_calls() -> None:
    layer, (x, _) = network(GRU), inputs(1)

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = self.layer(x, self.layer(x)[1])[0]
            return output

    found = reach(Twice(), (x,), lambda output: output[-1].sum())
    assert [str(one.place) for one in found] == ["layer", "layer, call 1"]


def test_what_is_asked_for_in_vain_is_refused_in_words() -> None:
    layer, (x, _) = network(GRU), inputs(2)
    for loss, words in (
        (lambda result: result[0], r"shape \[9, 2, 6\]; return one number"),
        (lambda result: result[0].sum(-1).T, r"shape \[2, 9\], and the layer ran \[9, 2\] steps and rows"),
        (lambda result: 1.0, "the loss is float"),
        (lambda result: result[0].sum().detach(), "does not depend on anything"),
    ):
        with pytest.raises(ThroughtimeError, match=words):
            reach(layer, x, loss)  # type: ignore[arg-type]
    with pytest.raises(ThroughtimeError, match="ran no recurrent layer"):
        reach(nn.GRUCell(3, 4), x[0].float(), total)
    with pytest.raises(ThroughtimeError, match=r"keep 3\.2e\+09 numbers.*give 838 sequences or fewer"):
        reach(Recurrent(GRU, 1, 1000), torch.zeros(1, 1, 1).expand(10, 10_000, 1), total)
    with pytest.raises(ThroughtimeError, match="probes is 0"):
        reach(layer, x, total, probes=0)
    with pytest.raises(ThroughtimeError, match="over no steps"):
        reach(layer, x[:0], lambda result: result[0].sum())
    layer.extra = torch.ones(1, requires_grad=True) * 2
    with pytest.raises(ThroughtimeError, match="cannot be copied"):
        reach(layer, x, total)


def test_a_gradient_that_is_not_finite_is_no_reach() -> None:
    layer, (x, _) = network(Elman(activation=identity)), inputs(2)
    with torch.no_grad():
        layer.get_parameter("weight_hh_l0").copy_(1e60 * torch.eye(UNITS))
    with pytest.raises(ThroughtimeError, match="the layer: a gradient is not finite"):
        reach(layer, 0 * x, lambda result: result[0][-1].sum())


def test_progress_is_told_pass_by_pass() -> None:
    layer, (x, _) = network(GRU), inputs(2)
    told: list[tuple[int, int]] = []
    reach(layer, x, lambda result: result[0].sum(-1), times=3, on_progress=lambda *done: told.append(done))
    assert told == [(n, 6) for n in range(1, 7)]


def of_share(share: list[float], needs: int | None, zeros: float = 0.0) -> LayerReach:
    rows = np.full((len(share), 10), np.array(share)[:, None])
    rows[1:, : int(10 * zeros)] = 0.0
    return LayerReach(Place("net"), "GRU", Reach.of(rows), Reach.of(rows), needs, 1e-3, "10 sequences")


def test_the_verdict_is_against_the_lag_that_the_task_needs() -> None:
    fading = [0.5 ** (k / 2.2) for k in range(80)]
    assert of_share(fading, 79).verdict == (
        "halves every 2.2 steps; the first and the last of your 80 steps do not reach each other"
    )
    assert of_share(fading, 40).verdict == "halves every 2.2 steps; steps that lie 40 apart do not reach each other"
    assert of_share(fading, 5).verdict == "halves every 2.2 steps; 21% of it is left over the 5 steps that are needed"
    assert of_share(fading, None).verdict == (
        "halves every 2.2 steps; less than 0.001 of it is left from 22 steps back on"
    )
    assert of_share(fading, 100).verdict.endswith("steps that are needed cannot be told from these sequences")
    growing = [1.5**k for k in range(20)]
    assert of_share(growing, 19).verdict == (
        "doubles every 1.7 steps; it grows 2.2e+03-fold between the last and the first of your 20 steps"
    )
    assert of_share([1.0] * 20, None).verdict == (
        "hardly changes; 100% of it is left 19 steps back, the longest way there is"
    )
    assert of_share([0.9**k for k in range(9)], 8, zeros=0.4).verdict == (
        "halves every 6.6 steps; 43% of it is left between the last and the first of your 9 steps; "
        "in 40% of the cases nothing arrives at all"
    )
    assert (of_share(fading, 79).lost_at, of_share(growing, 19).lost_at) == (22, None)
    assert of_share([1.0, 1e-5, 1.0, 1e-5], 3).lost_at == 3, "what comes back was not lost"


def test_a_mean_is_taken_over_times_and_the_limits_are_said() -> None:
    layer, (x, _) = network(LSTM), inputs(3)
    (found,) = reach(layer, {"x": x, "lengths": [STEPS, 2, 0]}, lambda result: result[0].sum(-1), times=4)
    assert found.measured == (
        "3 sequences of 0 to 9 steps; the losses at 4 steps of each, evenly spread; the inputs' influence at 4 steps "
        "of each, evenly spread, by 8 random directions of 12"
    )
    assert found.gradient.rows.tolist() == [6, 4, 3, 2, 2, 2, 1, 1, 1]  # at 0, 2, 5, 8 of the first row, 0 and 1


@pytest.mark.parametrize("name", [name for name in ALL if name != "Follow"])  # which depends on no input or weight
def test_every_cell_is_served_and_what_lies_past_an_end_is_not_read(name: str) -> None:
    one, lengths = ALL[name], [STEPS, 0, 5]
    torch.manual_seed(0)
    layer = Recurrent(one, 4, 4, proj_size=3 if one.projects else 0)
    x = torch.randn(STEPS, 3, 4)
    outside = {label: torch.rand((STEPS, 3, 1) if label in one.per_step else (3, 1)) for label in one.outside}
    spoilt = x.clone()
    spoilt[5:, 2], spoilt[:, 1] = math.nan, math.nan
    for loss in (lambda result: result[0].sum(-1), lambda result: result[1][0].sum()):
        (found,), (again,) = (
            reach(layer, {"x": given, "lengths": lengths, "outside": outside or None}, loss, times=3, probes=2)
            for given in (x, spoilt)
        )
        np.testing.assert_array_equal(found.gradient.share, again.gradient.share)
        np.testing.assert_array_equal(found.inputs.share, again.inputs.share)
        assert (found.gradient.rows > 0).any()
        assert found.verdict == again.verdict


def test_a_long_sequence_is_looked_at_at_fewer_times_and_told() -> None:
    (found,) = reach(Recurrent(Elman, 1, 1), torch.ones(1100, 1, 1), lambda result: result[0].sum(-1), probes=1)
    assert "the losses at 3 steps of each" in found.measured
    assert found.gradient.rows[:2].tolist() == [3, 2]


@dataclass(frozen=True)
class Ragged:
    """One object that a model's forward takes."""

    x: Tensor
    lengths: list[int]


class Reader(nn.Module):
    """Takes a packed sequence, one object, or keywords; batch first, with dropout."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(6)
        self.layer = nn.LSTM(3, UNITS, 2, batch_first=True, dropout=0.4)

    def forward(self, given: Any = None, *, x: Any = None, lengths: Any = None) -> Tensor:
        if isinstance(given, Ragged):
            x, lengths = given.x, given.lengths
        packed = given if x is None else nn.utils.rnn.pack_padded_sequence(x, lengths, True, False)
        h_n: Tensor = self.layer(packed)[1][0]
        return h_n[-1].sum()


def test_a_batch_may_be_packed_an_object_or_keywords_and_dropout_draws_nothing_of_the_callers() -> None:
    model, lengths = Reader(), [3, STEPS, 1, 5]
    x = inputs(4)[0].float().transpose(0, 1)
    packed = nn.utils.rnn.pack_padded_sequence(x, lengths, True, False)
    found = []
    for batch in (packed, [packed], Ragged(x, lengths), {"x": x, "lengths": lengths}):
        torch.manual_seed(7)
        found.append(reach(model, batch, lambda loss: loss, times=2))
        expected = torch.rand(1, generator=torch.Generator().manual_seed(7))
        assert torch.equal(torch.rand(1), expected)
    for others in found[1:]:
        for one, other in zip(found[0], others, strict=True):
            np.testing.assert_array_equal(one.gradient.share, other.gradient.share)
            np.testing.assert_array_equal(one.inputs.share, other.inputs.share)
    assert found[0][0].gradient.rows.tolist() == [4, 3, 3, 2, 2, 1, 1, 1, 1]
    assert found[0][0].needs == 2
