"""What every target is given: one recurrence over time, its tensors in one order, and what comes back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor

from throughtime.equations.cell import Cell
from throughtime.equations.expr import Node


@dataclass(frozen=True)
class Problem:
    """One recurrence: T steps of B rows.

    x [T, B, I]; states: a tensor [B, width] for each state, before the first step; parameters in the order of
    `cell.parameters`; outside: [T, B, 1 or H] per step, then [B, 1 or H] per sequence; initial: what a reset returns
    to, [B, width] for each state, empty without resets; lengths: the steps of each row, falling from row to row, or
    None for T each; reset [T, B] bool: the state returns to `initial` before that step; reverse: time runs from a
    row's last step to its first; segments: keep the states of every so many steps only and compute the rest anew for
    the backward run ("auto": about the root of T), or None to keep all.
    """

    cell: Cell
    x: Tensor
    states: tuple[Tensor, ...]
    parameters: tuple[Tensor, ...]
    outside: tuple[Tensor, ...] = ()
    initial: tuple[Tensor, ...] = ()
    lengths: tuple[int, ...] | None = None
    reset: Tensor | None = None
    reverse: bool = False
    segments: int | Literal["auto"] | None = None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Everything that can have a gradient, in one order."""
        return (self.x, *self.states, *self.parameters, *self.outside, *self.initial)

    def with_tensors(self, tensors: Sequence[Any]) -> Problem:
        """The same problem on other tensors, given in the order of `tensors`."""
        parts, start = [], 1
        for old in (self.states, self.parameters, self.outside, self.initial):
            parts.append(tuple(tensors[start : start + len(old)]))
            start += len(old)
        states, parameters, outside, initial = parts
        return replace(self, x=tensors[0], states=states, parameters=parameters, outside=outside, initial=initial)

    @property
    def steps(self) -> int:
        """T, the number of steps of the longest row that is there to be read."""
        return self.x.shape[0]

    @property
    def rows(self) -> int:
        """B, the number of sequences."""
        return self.x.shape[1]

    @property
    def hidden_size(self) -> int:
        """The number of units of the hidden width."""
        for parameter, tensor in zip(self.cell.parameters, self.parameters, strict=True):
            if parameter.namespace != "P":
                return tensor.shape[0] // len(parameter.gates)
        for width, state in zip(self.cell.widths, self.states, strict=True):
            if width == "hidden":
                return state.shape[-1]
        return self.x.shape[-1]

    @property
    def proj_size(self) -> int:
        """The number of units of the projected width, 0 in a cell without P."""
        found = (t.shape[0] for p, t in zip(self.cell.parameters, self.parameters, strict=True) if p.namespace == "P")
        return next(found, 0)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The width of each state in units."""
        return tuple(state.shape[-1] for state in self.states)

    def order(self) -> range:
        """The steps in the order in which they are computed."""
        return range(self.steps - 1, -1, -1) if self.reverse else range(self.steps)

    def active(self) -> list[int]:
        """How many rows, from the first, are still running at each step."""
        if self.lengths is None:
            return [self.rows] * self.steps
        ending = [0] * (self.steps + 1)
        for length in self.lengths:
            ending[length] += 1
        running, active = self.rows, []
        for t in range(self.steps):
            running -= ending[t]
            active.append(running)
        return active

    def block(self, node: Node) -> Tensor:
        """The rows of a parameter that belong to one product or parameter node: [rows, columns] or [rows]."""
        namespace, gate = node.data
        for parameter, tensor in zip(self.cell.parameters, self.parameters, strict=True):
            if parameter.namespace == namespace:
                rows = tensor.shape[0] // len(parameter.gates)
                place = parameter.gates.index(gate)
                return tensor[place * rows : (place + 1) * rows]
        raise KeyError(node.data)


@dataclass(frozen=True)
class Result:
    """What a forward run returns: outputs [T, B, width], the last states, and what the backward run wants to see."""

    output: Tensor
    states: tuple[Tensor, ...]
    workspace: tuple[Tensor, ...] = ()


def step_mask(mask: Tensor) -> Tensor:
    """[B] booleans as [B, 1], to select whole rows."""
    return mask.unsqueeze(-1)


def at_step(problem: Problem, t: int) -> list[Tensor]:
    """The outside inputs of one step, [B, 1 or H] each: per step, then per sequence."""
    per_step = len(problem.cell.per_step)
    return [value[t] if place < per_step else value for place, value in enumerate(problem.outside)]


def leaf_value(
    problem: Problem, leaf: Node, x_t: Tensor, states: Sequence[Tensor], outside_t: Sequence[Tensor]
) -> Tensor:
    """What a leaf of the cell stands for at one step."""
    cell = problem.cell
    if leaf.op == "input":
        return x_t
    if leaf.op == "state":
        return states[cell.states.index(leaf.data[0])]
    if leaf.op == "outside":
        return outside_t[cell.outside.index(leaf.data[0])]
    return problem.block(leaf)
