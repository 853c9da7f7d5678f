"""What every target is given: one recurrence over time, its tensors in one order, and what comes back."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from throughtime.engine.plan import outside_width
from throughtime.equations.cell import Cell
from throughtime.equations.expr import Node
from throughtime.errors import ShapeError


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

    @cached_property
    def signature(self) -> tuple[object, ...]:
        """The cell and every shape: problems of one signature differ in their numbers, lengths and resets alone."""
        tensors = (self.states, self.parameters, self.outside, self.initial)
        return self.cell.hash, self.x.shape, *[tuple([t.shape for t in each]) for each in tensors]

    def check(self, sorted_rows: bool = True) -> None:
        """Raise ShapeError, naming the tensor, where a shape is not the one that cell, input and units ask for.

        So no target, and no kernel that believes an address, meets a tensor of another size than it was made for.
        Lengths must fall from row to row unless `sorted_rows` is False, as for a recording.
        """
        if self.signature not in _checked:
            self.check_shapes()
            if len(_checked) > 4096:  # lengths that never come again
                _checked.clear()
            _checked.add(self.signature)
        if self.reset is not None and (self.reset.shape != self.x.shape[:2] or self.reset.dtype != torch.bool):
            raise ShapeError(
                f"reset is {self.reset.dtype} of shape {list(self.reset.shape)}; beside x {list(self.x.shape)} it "
                f"holds booleans [T, B] = {list(self.x.shape[:2])}"
            )
        if self.lengths is not None:
            self.check_lengths(sorted(self.lengths, reverse=True) if not sorted_rows else self.lengths)

    def check_shapes(self) -> None:
        """The part of `check` that shapes alone decide; they may be symbols of a program that is being traced."""
        if self.x.dim() != 3:
            raise ShapeError(f"x has shape {list(self.x.shape)}; the engine takes [T, B, I]")
        for name, tensor, wanted in self._wanted():
            if tensor.dim() != len(wanted) or any(a != b for a, b in zip(tensor.shape, wanted, strict=True)):
                units = f"{self.hidden_size} units" + (f", {self.proj_size} projected" if self.proj_size else "")
                raise ShapeError(
                    f"{name} has shape {list(tensor.shape)}; {self.cell.name} with {self.x.shape[2]} inputs and "
                    f"{units} takes {list(wanted)} beside x of shape {list(self.x.shape)}. Were a layer's weights or "
                    "sizes changed by hand? They must all be of the sizes that it was made with"
                )

    def check_lengths(self, lengths: Sequence[int]) -> None:
        """Raise ShapeError for lengths that are not the rows' own: one each, between 0 and T, falling."""
        ends = (self.steps, *lengths, 0)
        if len(lengths) != self.rows or not all(map(operator.ge, ends, ends[1:])):
            raise ShapeError(
                f"lengths are {len(lengths)} numbers for {self.rows} rows; the engine takes one for each row, between "
                f"0 and {self.steps}, falling from row to row"
            )

    def _wanted(self) -> Iterator[tuple[str, Tensor, tuple[int, ...]]]:
        """Every tensor but x by name, with the shape that it must have."""
        cell, (steps, rows, inputs) = self.cell, self.x.shape
        counts = {"a state": (self.states, cell.states), "a parameter": (self.parameters, cell.parameters)}
        counts |= {"an outside input": (self.outside, cell.outside)}
        for kind, (given, needed) in counts.items():
            if len(given) != len(needed):
                raise ShapeError(f"{cell.name} needs {len(needed)} tensors, {kind} each, and got {len(given)}")
        sizes = cell.sizes(self.hidden_size, self.proj_size)
        if cell.needs_equal_sizes and inputs != self.hidden_size:
            yield "x", self.x, (steps, rows, self.hidden_size)
        for parameter, tensor in zip(cell.parameters, self.parameters, strict=True):
            yield parameter.name, tensor, cell.shape(parameter, inputs, self.hidden_size, self.proj_size)
        for state, tensor, size in zip(cell.states, self.states, sizes, strict=True):
            yield f"the state {state} before the first step", tensor, (rows, size)
        for state, tensor, size in zip(cell.states, self.initial, sizes, strict=bool(self.initial)):
            yield f"the state {state} that a reset returns to", tensor, (rows, size)
        for name, tensor in zip(cell.outside, self.outside, strict=True):
            lead = (steps, rows) if name in cell.per_step else (rows,)
            units = self.proj_size if outside_width(cell, name) == "projected" else self.hidden_size
            yield f"the outside input {name}", tensor, (*lead, 1 if tensor.shape[-1:] == (1,) else units)

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
            if parameter.namespace != "P" and tensor.dim():
                return tensor.shape[0] // len(parameter.gates)
        for width, state in zip(self.cell.widths, self.states, strict=True):
            if width == "hidden":
                return state.shape[-1]
        return self.x.shape[-1]

    @property
    def proj_size(self) -> int:
        """The number of units of the projected width, 0 in a cell without P."""
        pairs = zip(self.cell.parameters, self.parameters, strict=True)
        found = (tensor.shape[0] for p, tensor in pairs if p.namespace == "P" and tensor.dim())
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


_checked: set[tuple[object, ...]] = set()
"""Signatures whose shapes were found to fit."""


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
