"""Gates: saturation counted by hand, memory against closed forms, and the sign of every cell's keeping gate."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from blackboards import ALL
from torch import Tensor, nn

from throughtime.equations.catalogue import CELLS, GRU, LSTM, Elman
from throughtime.equations.cell import Cell, cell
from throughtime.equations.expr import relu, sigmoid, tanh
from throughtime.insight.gates import Gates, gates
from throughtime.insight.rehearsal import rehearse
from throughtime.nn import Recurrent

STEPS, ROWS, UNITS = 8, 3, 6


def network(one: Cell) -> Recurrent:
    torch.manual_seed(0)
    return Recurrent(one, UNITS, UNITS, proj_size=4 if one.projects else 0)


def inputs(scale: float = 1.0) -> Tensor:
    return scale * torch.randn(STEPS, ROWS, UNITS, generator=torch.Generator().manual_seed(1))


def of(layer: nn.Module, x: Tensor, **options: Any) -> Gates:
    (found,) = gates(layer, {"x": x, **options})
    return found


@cell(states="h")
def Chung(x, h, W, U, b, c):
    """Chung et al. 2014: the open gate writes the new value."""
    r = sigmoid(W.r @ x + b.r + U.r @ h + c.r)
    z = sigmoid(W.z @ x + b.z + U.z @ h + c.z)
    n = tanh(W.n @ x + b.n + U.n @ (r * h) + c.n)
    return (1 - z) * h + z * n


@cell(states="h")
def MinimalRecurrent(x, h, W, b):
    """Feng et al. 2024, minGRU: a gate of the input alone, which writes."""
    z = sigmoid(W.z @ x + b.z)
    return (1 - z) * h + z * (W.n @ x + b.n)


@cell(states="h")
def Leaky(x, h, W, U, b, *, leak=0.2):
    """A leaky integrator."""
    return (1 - leak) * h + leak * tanh(W @ x + b + U @ h)


@pytest.mark.parametrize(
    ("one", "state", "kept", "gate", "keeps"),
    [
        (GRU, "h", "z", "z", True),
        (CELLS["gru-reset-before"], "h", "z", "z", True),
        (LSTM, "c", "f", "f", True),
        (CELLS["lstm-projected"], "c", "f", "f", True),
        (ALL["Peephole"], "c", "f", "f", True),
        (Chung, "h", "1 - z", "z", False),
        (MinimalRecurrent, "h", "1 - z", "z", False),
        (ALL["MinimalGated"], "h", "1 - f", "f", False),
        (Leaky, "h", "0.8", None, None),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_which_gate_keeps_the_old_state_and_which_way_is_read_off_the_equations(
    one: Cell, state: str, kept: str, gate: str | None, keeps: bool | None
) -> None:
    (memory,) = of(network(one), inputs()).memories
    assert (memory.state, memory.kept, memory.gate, memory.keeps) == (state, kept, gate, keeps)
    again = Cell.from_json(one.to_json())
    (memory,) = of(network(again), inputs()).memories
    assert (memory.kept, memory.keeps) == (kept, keeps), "a cell that comes from a file is the same"


@pytest.mark.parametrize(("bias", "half_life"), [(0, 1.0), (1, 2.2), (2, 5.5), (3, 14.3)])
def test_an_lstms_half_life_is_set_by_its_forget_bias(bias: float, half_life: float) -> None:
    layer = network(LSTM)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
        layer.get_parameter("bias_ih_l0")[UNITS : 2 * UNITS] = bias
    (memory,) = of(layer, inputs()).memories
    assert memory.half_life == pytest.approx(half_life, abs=0.05)
    np.testing.assert_allclose(memory.steps, 1 / math.log(1 + math.exp(-bias)), rtol=1e-12)


def test_a_grus_memory_is_that_of_z_over_real_steps_alone() -> None:
    layer, lengths = network(GRU), [8, 1, 5]
    x = inputs()
    found = of(layer, x, lengths=lengths)
    run = rehearse(layer, {"x": x, "lengths": lengths}, gradients=False, values=True)
    names = run.records[0].cell.names
    z = torch.stack([step[names["z"]] for step in run.records[0].values or []])  # [T, B, H]
    real = [z[t, row] for row, length in enumerate(lengths) for t in range(length)]
    expected = torch.stack(real).log().mean(0)
    np.testing.assert_allclose(found.memories[0].log_kept, expected, rtol=1e-12)
    assert found.memories[0].overall == pytest.approx(-1 / float(expected.mean()))
    assert found.measured == "3 sequences of 1 to 8 steps"


@pytest.mark.parametrize("name", CELLS)
def test_the_direct_path_is_the_jacobian_past_every_matrix(name: str) -> None:
    """With U = 0 (and P out of the way) nothing else is left of d s_t / d s_{t-1}, so autograd can tell."""
    layer = network(CELLS[name])
    with torch.no_grad():
        layer.get_parameter("weight_hh_l0").zero_()
    run = rehearse(layer, {"x": inputs()}, values=True)
    record = run.records[0]
    found = {memory.state: memory for memory in gates(layer, {"x": inputs()})[0].memories}
    for place, state in enumerate(record.cell.states):
        if state not in found:
            continue
        logs = []
        for before, after in zip(record.states, record.states[1:], strict=False):
            (slope,) = torch.autograd.grad(after[place].sum(), before[place], retain_graph=True)
            logs.append(slope.abs().log())
        first = run.records[0].values[0][record.cell.names["z" if "gru" in name else "f"]]  # type: ignore[index]
        logs.append(first.log())
        np.testing.assert_allclose(found[state].log_kept, torch.stack(logs).mean((0, 1)).detach(), rtol=1e-9)


def test_what_is_cut_kept_or_grown_is_told_apart() -> None:
    def memory(bias: float) -> float:
        layer = network(LSTM)
        with torch.no_grad():
            layer.get_parameter("bias_ih_l0")[UNITS : 2 * UNITS] = bias
        return of(layer, inputs()).memories[0].overall

    assert memory(-1000.0) == 0
    assert memory(100.0) == math.inf
    assert of(network(Leaky(leak=-0.1)), inputs()).memories[0].overall == pytest.approx(-1 / math.log(1.1))


def test_saturation_is_the_share_of_activations_near_an_end() -> None:
    layer = network(GRU)
    x = inputs(20.0)
    found = {gate.name: gate for gate in of(layer, x).gates}
    assert list(found) == ["r", "z", "n"]
    record = rehearse(layer, {"x": x}, gradients=False, values=True).records[0]
    for name, gate in found.items():
        values = torch.stack([step[record.cell.names[name]] for step in record.values or []]).flatten(0, 1)
        low = 0.05 if gate.kind == "sigmoid" else -0.95
        np.testing.assert_allclose(gate.high, (values > 0.95).double().mean(0))
        np.testing.assert_allclose(gate.low, (values < low).double().mean(0))
        np.testing.assert_allclose(gate.mean, values.mean(0))
        assert gate.saturated == pytest.approx(float(gate.high.mean() + gate.low.mean()))
        assert 0.3 < gate.saturated < 1
    assert all(gate.saturated < 0.05 for gate in of(layer, inputs(0.1)).gates)


def test_a_gate_that_never_leaves_its_end_is_stuck_and_a_unit_that_never_moves_is_dead() -> None:
    layer = network(Elman(activation=relu))
    with torch.no_grad():
        layer.get_parameter("bias_ih_l0")[2] = -1000.0
    found = of(layer, inputs())
    (gate,) = found.gates
    assert gate.kind == "relu"
    assert gate.stuck.tolist() == [2]
    assert found.dead.tolist() == [2]
    assert found.units == UNITS
    saturated = network(Elman)
    with torch.no_grad():
        saturated.get_parameter("bias_ih_l0")[4] = 1000.0
    found = of(saturated, inputs())
    assert (found.dead.tolist(), found.gates[0].stuck.tolist()) == ([4], [4])
    assert of(network(Elman), inputs()[:1, :1]).dead.tolist() == [], "one step tells nothing about moving"


@pytest.mark.parametrize("name", ALL)
def test_every_cell_is_served_and_what_lies_past_an_end_is_not_read(name: str) -> None:
    one, lengths = ALL[name], [8, 0, 5]
    outside = {label: torch.rand((STEPS, ROWS, 1) if label in one.per_step else (ROWS, 1)) for label in one.outside}
    x = inputs()
    found = of(network(one), x, lengths=lengths, outside=outside or None)
    x[5:, 2], x[:, 1] = math.nan, math.nan
    again = of(network(one), x, lengths=lengths, outside=outside or None)
    for gate, same in zip(found.gates, again.gates, strict=True):
        np.testing.assert_array_equal(gate.mean, same.mean)
        assert np.isfinite(gate.mean).all()
    for memory, same_memory in zip(found.memories, again.memories, strict=True):
        np.testing.assert_array_equal(memory.log_kept, same_memory.log_kept)


def test_torchs_layers_are_seen_layer_by_layer_and_left_alone() -> None:
    model = nn.LSTM(UNITS, UNITS, 2, bidirectional=True, dropout=0.5)
    numbers = torch.get_rng_state()
    found = gates(model, (inputs(),))
    assert torch.equal(torch.get_rng_state(), numbers)
    assert type(model) is nn.LSTM
    assert [str(one.place) for one in found] == [
        f"the layer, layer {depth}, {direction}" for depth in (0, 1) for direction in ("forward", "backward")
    ]
    assert [gate.name for gate in found[0].gates] == ["i", "f", "g", "o", "tanh(c_next)"]
