"""Beginnings: orthogonal and identity weights, and gates that keep, whichever way a cell's equations turn them."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from blackboards import ALL, MinimalGated, Peephole

import throughtime as tt
from throughtime.equations.keeping import keepers
from throughtime.errors import CellError, ShapeError, ThroughtimeError
from throughtime.insight.dynamics import dynamics
from throughtime.nn import Layer, Recurrent
from throughtime.nn.clipping import suggest_clip
from throughtime.nn.initialise import chrono_, forget_bias_, identity_, orthogonal_

UNITS = 6


@tt.cell(states="h")
def Chung(x, h, W, U, b):
    """Chung et al. 2014, arXiv:1412.3555: the open gate writes the new state."""
    r = tt.sigmoid(W.r @ x + U.r @ h + b.r)
    z = tt.sigmoid(W.z @ x + U.z @ h + b.z)
    n = tt.tanh(W.n @ x + U.n @ (r * h) + b.n)
    return (1 - z) * h + z * n


@tt.cell(states="h")
def MinGRU(x, h, W, b):
    """Feng et al. 2024, arXiv:2410.01201: gates that see the input alone; the open one writes."""
    z = tt.sigmoid(W.z @ x + b.z)
    return (1 - z) * h + z * (W.n @ x + b.n)


@tt.cell(states="h")
def Interpolated(x, h, W, U, b, c):
    """As torch's GRU, but the gate's argument is negated and the mean written as a step towards the old state."""
    z = tt.sigmoid(-(W.z @ x + b.z + U.z @ h + 2 * c.z))
    n = tt.tanh(W.n @ x + U.n @ h + b.n)
    return n + z * (h - n)


@tt.cell(states="h c")
def Coupled(x, h, c, W, U, b):
    """Greff et al. 2017 (CIFG): the input gate is one minus the forget gate."""
    i = tt.sigmoid(W.i @ x + U.i @ h + b.i)
    o = tt.sigmoid(W.o @ x + U.o @ h + b.o)
    c_next = (1 - i) * c + i * tt.tanh(W.g @ x + U.g @ h + b.g)
    return o * tt.tanh(c_next), c_next


@tt.cell(states="h c")
def Shutter(x, h, c, W, U, b):
    """The forget gate turned round, and an input gate that lets in when it is shut."""
    e = tt.sigmoid(W.e @ x + U.e @ h + b.e)
    s = tt.sigmoid(W.s @ x + U.s @ h + b.s)
    c_next = (1 - e) * c + (1 - s) * tt.tanh(W.g @ x + U.g @ h + b.g)
    return tt.tanh(c_next), c_next


SIGNS = {
    "torch's GRU": (tt.GRU, "h", "z", 1),
    "reset before": (tt.GRUResetBefore, "h", "z", 1),
    "LSTM": (tt.LSTM, "c", "f", 1),
    "projected": (tt.ProjectedLSTM, "c", "f", 1),
    "peephole": (Peephole, "c", "f", 1),
    "Chung": (Chung, "h", "z", -1),
    "minimal gated": (MinimalGated, "h", "f", -1),
    "minGRU": (MinGRU, "h", "z", -1),
    "interpolated": (Interpolated, "h", "z", 1),
    "coupled": (Coupled, "c", "i", -1),
    "shutter": (Shutter, "c", "e", -1),
}


def layer_of(cell: tt.Cell, units: int = UNITS) -> Recurrent:
    return Recurrent(cell, 4, units, proj_size=3 if cell.projects else 0).double()


def without_weights(layer: Recurrent) -> Recurrent:
    """Nothing but biases, so that each gate is the sigmoid of its own."""
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name.startswith("weight"):
                parameter.zero_()
    return layer


def kept(layer: Recurrent, state: str) -> np.ndarray:
    """What share of each unit of a state one step keeps, as the layer itself runs: [UNITS]."""
    names = layer.cell.states
    rows = 2
    sizes = layer.cell.sizes(layer.hidden_size, layer.proj_size)
    base = [torch.zeros(1, rows, size, dtype=torch.double) for size in sizes]
    base[names.index(state)][0, 1] = 1.0
    given = tuple(base) if len(names) > 1 else base[0]
    with torch.no_grad():
        _, after = layer(torch.zeros(1, rows, 4, dtype=torch.double), given)
    moved = after[names.index(state)] if len(names) > 1 else after
    return (moved[0, 1] - moved[0, 0]).numpy()


# -- which gate keeps, and which way it turns -------------------------------------------------------------------------


@pytest.mark.parametrize("name", SIGNS)
def test_the_gate_that_keeps_and_its_sign_are_read_off_the_equations(name: str):
    cell, state, gate, sign = SIGNS[name]
    (found,) = keepers(cell)
    assert (found.state, found.gate.name, found.sign) == (state, gate, sign)
    assert keepers(tt.Cell.from_json(cell.to_json()))[0].sign == sign


def test_a_gate_of_its_own_for_what_is_written_is_found_too():
    found = {name: keepers(cell)[0] for name, (cell, *_) in SIGNS.items()}
    writers = {name: (k.writer.name, k.writer_sign) for name, k in found.items() if k.writer is not None}
    assert writers == {"LSTM": ("i", 1), "projected": ("i", 1), "peephole": ("i", 1), "shutter": ("s", -1)}


@pytest.mark.parametrize("name", ["elman", "Decaying", "Unitwise", "Delay", "Echo", "Still", "Follow"])
def test_a_cell_without_such_a_gate_has_none(name: str):
    assert keepers(ALL[name]) == ()


def test_a_gate_that_keeps_only_half_or_only_with_another_is_no_keeper():
    @tt.cell(states="h")
    def Half(x, h, W, b):
        return 0.5 * tt.sigmoid(W.z @ x + b.z) * h + tt.tanh(W.n @ x)

    @tt.cell(states="h")
    def Both(x, h, W, b):
        return tt.sigmoid(W.z @ x + b.z) * (tt.sigmoid(W.y @ x + b.y) * h) + tt.tanh(W.n @ x)

    assert keepers(Half) == keepers(Both) == ()


# -- forget bias ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SIGNS)
@pytest.mark.parametrize("bias", [0.0, 1.0, 3.0])
def test_the_layer_keeps_the_sigmoid_of_its_forget_bias(name: str, bias: float):
    cell, state, _, _ = SIGNS[name]
    layer = without_weights(forget_bias_(layer_of(cell), bias))
    np.testing.assert_allclose(kept(layer, state), 1 / (1 + math.exp(-bias)), rtol=1e-12)


@pytest.mark.parametrize("bias", [0.0, 2.0])
def test_a_layer_as_torch_has_it_keeps_the_same_with_both_of_its_biases(bias: float):
    for kind in (tt.nn.LSTM, tt.nn.GRU):  # f is the LSTM's second gate, z the GRU's
        layer = forget_bias_(kind(4, UNITS), bias)
        both = layer.get_parameter("bias_ih_l0") + layer.get_parameter("bias_hh_l0")
        np.testing.assert_allclose(both[UNITS : 2 * UNITS].detach().numpy(), bias)


def changed(layer: Layer, before: dict[str, torch.Tensor]) -> dict[str, set[int]]:
    """The rows of each parameter that are not what they were."""
    rows = {name: (value != before[name]).nonzero()[:, 0].tolist() for name, value in layer.state_dict().items()}
    return {name: set(places) for name, places in rows.items() if places}


def test_every_layer_and_direction_is_set_and_nothing_else():
    layer = tt.nn.LSTM(4, UNITS, num_layers=2, bidirectional=True)
    before = copy.deepcopy(layer.state_dict())
    assert forget_bias_(layer, 1.5) is layer
    names = {f"bias_{side}_l{depth}{way}" for side in ("ih", "hh") for depth in (0, 1) for way in ("", "_reverse")}
    assert changed(layer, before) == {name: set(range(UNITS, 2 * UNITS)) for name in names}
    chrono_(layer, 10)
    assert changed(layer, before) == {name: set(range(2 * UNITS)) for name in names}, "i and f, not g and o"


# -- chrono -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SIGNS)
def test_chrono_spreads_memories_evenly_up_to_the_longest(name: str):
    cell, state, _, _ = SIGNS[name]
    layer = without_weights(chrono_(layer_of(cell, units=600), 100))
    spans = 1 / (1 - kept(layer, state))  # u + 1, u uniform in [1, 99]
    assert spans.min() >= 2 - 1e-9
    assert spans.max() <= 100 + 1e-9
    np.testing.assert_allclose(np.quantile(spans, [0.25, 0.5, 0.75]), [26.5, 51, 75.5], atol=7)


def test_chrono_shuts_the_gate_that_writes_as_far_as_the_other_is_open():
    layer = chrono_(layer_of(tt.LSTM), 50)
    both = (layer.get_parameter("bias_ih_l0") + layer.get_parameter("bias_hh_l0")).detach()
    i, f = both[:UNITS], both[UNITS : 2 * UNITS]
    assert torch.equal(i, -f)
    assert (f >= 0).all()
    assert (f <= math.log(49)).all()
    turned = chrono_(layer_of(Shutter), 50).get_parameter("bias_ih_l0").detach()
    e, s = turned[:UNITS], turned[UNITS : 2 * UNITS]
    assert torch.equal(s, -e)
    assert (e <= 0).all(), "e forgets when it is open"


def test_chrono_takes_its_numbers_from_the_generator_it_is_given():
    layer = tt.nn.GRU(4, UNITS)
    drawn, numbers = [], torch.get_rng_state()
    for seed in (1, 1, 2):
        chrono_(layer, 20, generator=torch.Generator().manual_seed(seed))
        drawn.append(layer.get_parameter("bias_ih_l0").detach().clone())
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert torch.equal(torch.get_rng_state(), numbers)


def test_chrono_makes_reach_longer():
    x = torch.randn(60, 2, 4, dtype=torch.double)
    for cell in (tt.GRU, tt.LSTM, Chung):
        plain = Recurrent(cell, 4, 20).double()
        (before,) = dynamics(plain, x, lags=[59], exponents=1, starts=0)
        (after,) = dynamics(chrono_(plain, 60), x, lags=[59], exponents=1, starts=0)
        assert after.norms[0] > 1e3 * before.norms[0]


# -- orthogonal and identity ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layer", [tt.nn.GRU(4, UNITS, num_layers=2), Recurrent(tt.LSTM, 4, UNITS), tt.nn.RNN(4, UNITS)]
)
def test_every_gates_block_becomes_orthogonal_and_nothing_else_changes(layer: Layer):
    before = copy.deepcopy(layer.state_dict())
    orthogonal_(layer, gain=1.5)
    assert set(changed(layer, before)) == {name for name in before if name.startswith("weight_hh")}
    for name, value in layer.named_parameters():
        if name.startswith("weight_hh"):
            for block in value.detach().chunk(len(value) // UNITS):
                np.testing.assert_allclose(torch.linalg.svdvals(block).numpy(), 1.5, rtol=1e-5)


def test_a_projected_layers_blocks_get_orthonormal_columns():
    layer = orthogonal_(layer_of(tt.ProjectedLSTM))
    for block in layer.get_parameter("weight_hh_l0").detach().chunk(4):
        torch.testing.assert_close(block.mT @ block, torch.eye(3, dtype=torch.double))


def test_every_gates_block_becomes_the_identity():
    layer = identity_(tt.nn.GRU(4, UNITS, bidirectional=True), scale=0.5)
    for name in ("weight_hh_l0", "weight_hh_l0_reverse"):
        assert torch.equal(layer.get_parameter(name), 0.5 * torch.eye(UNITS).repeat(3, 1))


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_what_has_no_such_gate_or_bias_is_refused():
    for change in (forget_bias_, lambda layer: chrono_(layer, 10)):
        with pytest.raises(CellError, match="Elman has no gate, a sigmoid, that keeps all of a state's old value"):
            change(tt.nn.RNN(4, UNITS))
        with pytest.raises(CellError, match="the gate f of LSTM, no biases has no bias to set"):
            change(tt.nn.LSTM(4, UNITS, bias=False))


def test_a_gate_that_would_have_to_turn_both_ways_is_refused():
    @tt.cell(states="h g")
    def Seesaw(x, h, g, W, b):
        z = tt.sigmoid(W.z @ x + b.z)
        n = tt.tanh(W.n @ x + b.n)
        return z * h + (1 - z) * n, (1 - z) * g + z * n

    with pytest.raises(CellError, match="keeps one state where it overwrites another"):
        forget_bias_(Recurrent(Seesaw, 4, UNITS))


def test_a_refused_layer_is_left_as_it_was():
    for layer, change in (
        (tt.nn.LSTM(4, UNITS, bias=False), forget_bias_),
        (layer_of(tt.ProjectedLSTM), identity_),
    ):
        before = copy.deepcopy(layer.state_dict())
        with pytest.raises(ThroughtimeError):
            change(layer)
        assert changed(layer, before) == {}


def test_numbers_that_make_no_sense_are_refused():
    layer = tt.nn.LSTM(4, UNITS)
    for longest in (1, 2.5, True):
        with pytest.raises(ThroughtimeError, match="longest is"):
            chrono_(layer, longest)  # type: ignore[arg-type]
    with pytest.raises(ThroughtimeError, match="forget bias is nan"):
        forget_bias_(layer, math.nan)
    with pytest.raises(ThroughtimeError, match="gain is 0"):
        orthogonal_(layer, gain=0)
    with pytest.raises(ShapeError, match="6 by 3 per gate, and only square ones"):
        identity_(layer_of(tt.ProjectedLSTM))
    with pytest.raises(CellError, match="Follow has no recurrent weights"):
        orthogonal_(Recurrent(ALL["Follow"], 4, UNITS))


# -- where to clip ----------------------------------------------------------------------------------------------------


def test_the_suggested_threshold_is_a_norm_that_was_seen_and_leaves_most_steps_alone():
    norms = np.exp(np.random.default_rng(0).normal(size=1000))
    threshold = suggest_clip(norms)
    assert threshold in norms
    assert np.mean(norms > threshold) == pytest.approx(0.1, abs=0.002)
    assert suggest_clip(norms, quantile=0.5) == pytest.approx(1.0, abs=0.1)


def test_explosions_do_not_move_the_threshold():
    norms = [1.0 + 0.01 * i for i in range(100)]
    assert suggest_clip([*norms, 1e12, math.inf, math.nan]) <= max(norms)


def test_norms_that_suggest_nothing_are_refused():
    with pytest.raises(ThroughtimeError, match="no gradient norm has been seen"):
        suggest_clip([])
    with pytest.raises(ThroughtimeError, match="infinite or NaN, which is no threshold; lower the learning rate"):
        suggest_clip([1.0, math.nan, math.inf])
    with pytest.raises(ThroughtimeError, match="zero, which is no threshold"):
        suggest_clip([0.0, 0.0])
    with pytest.raises(ThroughtimeError, match="norms are not negative"):
        suggest_clip([1.0, -1.0])
    with pytest.raises(ThroughtimeError, match="quantile is 90"):
        suggest_clip([1.0], quantile=90)
