"""Gates: how saturated they are, how many steps a state is kept, and which units are dead. Numbers only."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from throughtime.engine.codegen import Tape, torch_spelling
from throughtime.engine.recurrence import Record
from throughtime.equations import calculus, expr, keeping, latex
from throughtime.equations.cell import Cell
from throughtime.equations.expr import Node, make
from throughtime.insight.rehearsal import Place, lengths_of, rehearse, said_rows

if TYPE_CHECKING:
    from numpy.typing import NDArray

NEAR = 0.05
"""A gate within this of the end of its range is saturated: over .95 or under .05, or |tanh| over .95."""

ENDS = {"sigmoid": (NEAR, 1 - NEAR), "tanh": (NEAR - 1, 1 - NEAR), "relu": (0.0, math.inf)}
"""Below and above which each kind of gate is saturated."""

LONGEST = 200
"""How many characters of an equation a name quotes; more are an ellipsis."""

STILL = 1e-6
"""A unit whose values lie closer together than this, as a share of its largest (or of 1), does not move."""


@dataclass(frozen=True, eq=False)
class Gate:
    """One squashed value of a step: its name, and what share of its activations is near an end. Arrays are [units].

    `kind` is sigmoid, tanh or relu. `high` is the share of activations (over rows and steps) above .95; `low` that
    below .05 of a sigmoid, below -.95 of a tanh, or at exactly 0 of a relu, which has no high end. `mean` is the mean
    activation.
    """

    name: str
    kind: str
    high: NDArray[np.float64]
    low: NDArray[np.float64]
    mean: NDArray[np.float64]

    @property
    def saturated(self) -> float:
        """The share of all activations that are near either end."""
        return float((self.high + self.low).mean())

    @property
    def stuck(self) -> NDArray[np.int64]:
        """The units that never leave one end, in any row at any step."""
        return np.flatnonzero((self.high == 1) | (self.low == 1))


@dataclass(frozen=True, eq=False)
class Memory:
    """How long one state's units are kept by the direct path ds_t/ds_{t-1} alone, past every matrix.

    `kept` writes the factor with which the old state enters, derived from the equations: "f" in an LSTM, "z" in a GRU
    as torch has it, "1 - f" where an open gate writes the new value. `gate` names the gate in it, and `keeps` tells
    whether that gate keeps the old state when it is open (True) or when it is shut (False); both are None where the
    factor is no single gate. `log_kept` [units] is the mean of ln|factor| over rows and steps.
    """

    state: str
    kept: str
    gate: str | None
    keeps: bool | None
    log_kept: NDArray[np.float64]

    @property
    def steps(self) -> NDArray[np.float64]:
        """Memory of each unit in steps: 0 if nothing is kept, infinite if all is, negative if the state grows."""
        return _memory(self.log_kept)

    @property
    def overall(self) -> float:
        """Memory in steps over all units together: -1 / mean(ln factor)."""
        return float(_memory(self.log_kept.mean()))

    @property
    def half_life(self) -> float:
        """Steps in which half of the state is gone along the direct path: ln 2 times `overall`."""
        return math.log(2) * self.overall


@dataclass(frozen=True, eq=False)
class Gates:
    """The gates of one direction of one layer, over the rows and steps of a batch. Made by `gates`.

    `memories` has an entry for each state with a direct path from its last value (an Elman network's has none). `dead`
    are the units of the layer's output, of which there are `units`, that have one value in all rows at all steps.
    `measured` says in words what was measured.
    """

    place: Place
    cell: str
    gates: tuple[Gate, ...]
    memories: tuple[Memory, ...]
    dead: NDArray[np.int64]
    units: int
    measured: str


def gates(model: nn.Module, batch: Any) -> list[Gates]:
    """How every recurrent layer and direction of a model uses its gates on a batch.

    `batch` is what the model's forward takes: a tuple of positional arguments, a dict of keywords, or one object. Every
    sigmoid, tanh and relu of a cell's equations counts as a gate, in cells of one's own too; only steps that belong to
    a row count. The memory is that of the direct path from a state's last value, past every matrix, with all sigmoids
    held fixed; which gate it goes by, and whether that keeps the old state when open or when shut, is derived from the
    equations. The model runs on a copy, in float64.

    Raises ThroughtimeError for a model without a recurrent layer or a batch too large.
    """
    run = rehearse(model, batch, gradients=False, values=True)
    return [_gates_of(place, record) for place, record in zip(run.places, run.records, strict=True)]


def _gates_of(place: Place, record: Record) -> Gates:
    cell, shown = record.cell, record.cell.output
    output = _over_steps(record, [states[shown] for states in record.states])
    return Gates(
        place=place,
        cell=cell.name,
        gates=tuple(_gate(record, node) for node in _squashed(cell)),
        memories=tuple(_memories(record)),
        dead=_still(output),
        units=output.shape[1],
        measured=said_rows(record),
    )


def _gate(record: Record, node: Node) -> Gate:
    active = _over_steps(record, [values[node] for values in record.values or []])
    low, high = ENDS[node.op]
    return Gate(
        name=_name(record.cell, node),
        kind=node.op,
        high=(active > high).mean(axis=0),
        low=(active <= low if node.op == "relu" else active < low).mean(axis=0),
        mean=active.mean(axis=0),
    )


def _memories(record: Record) -> Iterator[Memory]:
    cell = record.cell
    for state, factor in _kept(cell).items():
        tape = Tape([factor], cell.nodes, torch_spelling)
        factors = [
            tape.run(values, lambda number: torch.tensor(number, dtype=torch.float64))[factor]
            for values in record.values or []
        ]
        width = record.states[0][cell.states.index(state)].shape[1]
        log_kept = _mean_log(_over_steps(record, factors, width))
        keeper = next((k for k in keeping.keepers(cell) if k.state == state and _goes_by(factor, k)), None)
        yield Memory(
            state=state,
            kept=_written(cell, factor),
            gate=None if keeper is None else _name(cell, keeper.gate.node),
            keeps=None if keeper is None else keeper.sign > 0,
            log_kept=log_kept,
        )


@cache
def _kept(cell: Cell) -> dict[str, Node]:
    """The factor with which each state's old value enters the new one unit by unit, products and sigmoids fixed."""
    sigmoids = [node for node in cell.nodes if node.op == "sigmoid"]
    # No outside input can have a name with a space in it.
    held = {node: make("outside", (), (f"sigmoid {place}",)) for place, node in enumerate(sigmoids)}
    back = {leaf: node for node, leaf in held.items()}
    found = {}
    for state, after in zip(cell.states, cell.next, strict=True):
        apart = expr.substitute(after, dict(held))
        slopes = calculus.reverse([(apart, expr.constant(1.0))], through_products=False)
        slope = slopes.get(make("state", (), (state,)))
        if slope is not None:
            found[state] = expr.substitute(slope, dict(back))
    return found


def _goes_by(factor: Node, keeper: keeping.Keeper) -> bool:
    """Whether the factor is the keeper's gate and nothing else, or one minus it."""
    gate = keeper.gate.node
    return factor is gate or factor is 1.0 - gate


def _over_steps(record: Record, values: list[Tensor], width: int | None = None) -> NDArray[np.float64]:
    """One value of every computed step, [units], [B, 1] or [B, units] each, as [real steps of all rows, units]."""
    lengths, rows = lengths_of(record), record.problem.rows
    taken = []
    for t, value in zip(record.problem.order(), values, strict=True):
        units = width or value.shape[-1] if value.dim() else width or 1
        taken.append(value.detach().expand(rows, units)[(lengths > t).to(value.device)])
    return torch.cat(taken).double().cpu().numpy() if taken else np.zeros((0, width or 1))


def _squashed(cell: Cell) -> list[Node]:
    """The gates, those that the author named first and in the author's order."""
    named = list(cell.names.values())
    places = {node: place for place, node in enumerate(named)}
    moves: set[Node] = set()  # what changes from step to step or row to row
    for node in cell.nodes:
        if node.varies or node.op == "outside" or any(arg in moves for arg in node.args):
            moves.add(node)
    found = [node for node in cell.nodes if node.op in ENDS and node in moves]
    return sorted(found, key=lambda node: places.get(node, len(named)))


def _still(output: NDArray[np.float64]) -> NDArray[np.int64]:
    """The units of [steps, units] that do not move; none where there is but one step to go by."""
    if len(output) < 2:
        return np.zeros(0, dtype=np.int64)
    largest = np.maximum(1.0, np.abs(output).max(axis=0))
    return np.flatnonzero(np.ptp(output, axis=0) <= STILL * largest)


def _name(cell: Cell, node: Node) -> str:
    """What the author calls a value: a variable, else the state it becomes, else its gate, else written out."""
    for name, named in cell.names.items():
        if named is node:
            return name
    for state, after in zip(cell.states, cell.next, strict=True):
        if after is node:
            return state
    letters = {under.data[1] for under in expr.postorder([node]) if under.op == "product" and under.data[0] != "P"}
    return letters.pop() if len(letters) == 1 and "" not in letters else _written(cell, node)


def _written(cell: Cell, node: Node) -> str:
    return writer(cell)(node).text


def writer(cell: Cell) -> latex.Writer:
    """Writes a cell's nodes as the blackboard has them, by the author's names."""
    write = latex.Writer(latex.TERMINAL, longest=LONGEST)
    for name, node in cell.names.items():
        write.names[node] = latex.Piece(((False, name),))
    return write


def _mean_log(factors: NDArray[np.float64]) -> NDArray[np.float64]:
    with np.errstate(divide="ignore"):  # a factor of 0 keeps nothing, and its logarithm says so
        return np.log(np.abs(factors)).mean(axis=0)


def _memory(log_kept: NDArray[np.float64]) -> NDArray[np.float64]:
    with np.errstate(divide="ignore"):
        return -1 / np.where(log_kept == 0, -0.0, log_kept)
