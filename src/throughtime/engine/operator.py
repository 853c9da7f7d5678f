"""What a compiler sees: `torch.ops.throughtime.recurrence`, one operator for a whole recurrence, over any T and B.

The eager path (`recurrence.run`) is quicker and does not come here. Three operators are registered:

- `recurrence` is what `torch.compile` and `torch.export` record. It carries the cell as JSON, so that an exported
  program is complete; its target is chosen where it runs, so that a program may move to another machine.
- `recurrence_training` and `recurrence_backward` stand below autograd. The compiler finds them when it splits a
  training step into forward and backward; their target is fixed then, for the workspace between them is its own.

Each has a twin that computes nothing but shapes and strides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._decomp import register_decomposition

from throughtime.engine import border, exported, recurrence
from throughtime.engine.problem import Problem, Result
from throughtime.engine.targets import stepwise, target
from throughtime.equations.cell import Cell
from throughtime.errors import ShapeError, ThroughtimeError

_PROBLEM = "Tensor[] tensors, str cell, Tensor? lengths, Tensor? reset, bool reverse, int? segments, str target"
"""A problem's tensors and the rest of it; `segments` is 0 for "auto"."""

_library = torch.library.Library("throughtime", "DEF")
for _schema in (
    f"recurrence({_PROBLEM}) -> Tensor[]",
    f"recurrence_training({_PROBLEM}) -> Tensor[]",
    f"recurrence_backward({_PROBLEM}, Tensor[] results, Tensor?[] d_results, bool[] needs) -> Tensor[]",
):
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))


@lru_cache(maxsize=256)
def _cell(text: str) -> Cell:
    return Cell.from_json(text)


class _Rest(NamedTuple):
    """What a problem is beside its tensors, and the target that is asked for: as in the schema."""

    cell: str
    lengths: Tensor | None
    reset: Tensor | None
    reverse: bool
    segments: int | None
    target: str


def _problem(tensors: Sequence[Tensor], rest: _Rest) -> Problem:
    """The problem with its lengths still a tensor, for they are not known while shapes alone are computed."""
    if recurrence.is_recording():
        raise ThroughtimeError(
            "a compiled or exported program keeps no states to record; run the model itself inside recording()"
        )
    cell = _cell(rest.cell)
    counts = (1, len(cell.states), len(cell.parameters), len(cell.outside), len(tensors))
    parts, start = [], 0
    for count in counts:
        parts.append(tuple(tensors[start : start + count]))
        start += count
    (x,), states, parameters, outside, initial = parts
    lengths: Any = rest.lengths
    how = (rest.reset, rest.reverse, "auto" if rest.segments == 0 else rest.segments)
    problem = Problem(cell, x, states, parameters, outside, initial, lengths, *how)  # type: ignore[arg-type]
    problem.check_shapes()
    return problem


def _read(problem: Problem) -> Problem:
    """The problem with its lengths as numbers. Raises ShapeError for lengths that no row of x can have."""
    if problem.lengths is None:
        return problem
    lengths = tuple(torch.as_tensor(problem.lengths).tolist())
    if wrong := [length for length in lengths if not 0 <= length <= problem.steps]:
        raise ShapeError(
            f"lengths= holds {wrong[0]}, but the input has {problem.steps} steps; lengths lie between 0 and "
            f"{problem.steps}"
        )
    return replace(problem, lengths=None if min(lengths, default=0) == problem.steps else lengths)


# ---------------------------------------------------------------------------------------------------------------------
# recurrence


def _forward(tensors: list[Tensor], *rest: Any) -> list[Tensor]:
    given = _Rest(*rest)
    problem = _read(_problem(tensors, given))
    chosen = target(recurrence.choose(problem, given.target or None).target)
    try:
        result = chosen.forward(problem)
    except border.Unaddressable:
        if given.target:
            raise
        result = stepwise.TARGET.forward(problem)
    return [_as_input(result.output, problem.x), *_own(result.states, tensors)]


def _forward_shapes(tensors: list[Tensor], *rest: Any) -> list[Tensor]:
    problem = _problem(tensors, _Rest(*rest))
    output = _empty_as_input(problem.x, problem.sizes[problem.cell.output])
    return [output, *(problem.x.new_empty(problem.rows, size) for size in problem.sizes)]


def _forward_differentiable(tensors: list[Tensor], *rest: Any) -> list[Tensor]:
    """Above autograd: nothing is saved unless a gradient is wanted; what goes beyond adjoints is the reference's."""
    beyond = recurrence._beyond_adjoints()
    if not beyond and not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)):
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.throughtime.recurrence(tensors, *rest)
    given = _Rest(*rest)
    problem = _problem(tensors, given)
    choice = recurrence.choose(problem, given.target or None)
    if choice.target == "reference":
        result = target(choice.target).forward(problem)
        return [result.output, *result.states]
    operators = _Operators(given._replace(target=choice.target))
    return list(recurrence._Recurrence.apply(problem, operators, *problem.tensors))


class _Operators:
    """A target for `recurrence._Recurrence` that goes through the operators, so that a compiler can see them."""

    def __init__(self, rest: _Rest) -> None:
        self.rest = rest

    def forward(self, problem: Problem, save: bool) -> Result:
        found = torch.ops.throughtime.recurrence_training(list(problem.tensors), *self.rest)
        states = len(problem.states)
        return Result(found[0], tuple(found[1 : 1 + states]), tuple(found[1 + states :]))

    def backward(
        self,
        problem: Problem,
        result: Result,
        d_output: Tensor | None,
        d_states: Sequence[Tensor | None],
        needs: Sequence[bool],
    ) -> tuple[Tensor | None, ...]:
        results = [result.output, *result.states, *result.workspace]
        found = torch.ops.throughtime.recurrence_backward(
            list(problem.tensors), *self.rest, results, [d_output, *d_states], list(needs)
        )
        wanted = iter(found)
        return tuple(next(wanted) if need else None for need in needs)


# ---------------------------------------------------------------------------------------------------------------------
# recurrence_training and recurrence_backward


def _training(tensors: list[Tensor], *rest: Any) -> list[Tensor]:
    given = _Rest(*rest)
    problem = _read(_problem(tensors, given))
    result = target(given.target).forward(problem, True)
    return [_as_input(result.output, problem.x), *_own(result.states, tensors), *result.workspace]


def _training_shapes(tensors: list[Tensor], *rest: Any) -> list[Tensor]:
    given = _Rest(*rest)
    problem = _problem(tensors, given)
    results = _forward_shapes(tensors, *rest)
    specs = target(given.target).workspace(problem)
    return [*results, *(problem.x.new_empty(spec.shape, dtype=spec.dtype) for spec in specs)]


def _backward(tensors: list[Tensor], *rest: Any) -> list[Tensor]:
    *beside, results, d_results, needs = rest
    given = _Rest(*beside)
    problem = _read(_problem(tensors, given))
    states = len(problem.states)
    result = Result(results[0], tuple(results[1 : 1 + states]), tuple(results[1 + states :]))
    found = target(given.target).backward(problem, result, d_results[0], d_results[1:], needs)
    return [
        _as_input(gradient, problem.x) if place == 0 else gradient.contiguous()
        for place, gradient in enumerate(found)
        if gradient is not None
    ]


def _backward_shapes(tensors: list[Tensor], *rest: Any) -> list[Tensor]:
    needs = rest[-1]
    return [
        _empty_as_input(tensor, tensor.shape[2]) if place == 0 else tensor.new_empty(tensor.shape)
        for place, (tensor, need) in enumerate(zip(tensors, needs, strict=True))
        if need
    ]


for _name, _key, _kernel in (
    ("recurrence", "CompositeExplicitAutograd", _forward),
    ("recurrence", "Autograd", _forward_differentiable),
    ("recurrence_training", "CompositeExplicitAutograd", _training),
    ("recurrence_backward", "CompositeExplicitAutograd", _backward),
):
    _library.impl(_name, _kernel, _key)
for _name, _shapes in (
    ("recurrence", _forward_shapes),
    ("recurrence_training", _training_shapes),
    ("recurrence_backward", _backward_shapes),
):
    torch.library.register_fake(f"throughtime::{_name}", _shapes, lib=_library)


def _for_onnx(tensors: list[Tensor], *rest: Any) -> list[Tensor]:
    return exported.decomposed(_problem(tensors, _Rest(*rest)))


# Only torch.onnx.export takes an operator apart that has a twin; the second line says that it has one.
register_decomposition(torch.ops.throughtime.recurrence.default)(_for_onnx)
register_decomposition(torch.ops.throughtime.recurrence.default, type="meta")(_forward_shapes)


# ---------------------------------------------------------------------------------------------------------------------
# Layout: an operator must return what its twin announced, and tensors that are not its arguments


def _is_batch_first(x: Tensor) -> bool:
    return bool(x.shape[1] > 1 and x.stride(0) < x.stride(1))


def _empty_as_input(x: Tensor, width: int) -> Tensor:
    """[T, B, width], laid out in memory as x is."""
    steps, rows = x.shape[:2]
    if _is_batch_first(x):
        return x.new_empty(rows, steps, width).transpose(0, 1)
    return x.new_empty(steps, rows, width)


def _as_input(tensor: Tensor, x: Tensor) -> Tensor:
    """The tensor [T, B, width] laid out as `_empty_as_input` says; a copy only where a target does otherwise."""
    if _is_batch_first(x):
        return tensor.transpose(0, 1).contiguous().transpose(0, 1)
    return tensor.contiguous()


def _own(states: Sequence[Tensor], given: Sequence[Tensor]) -> list[Tensor]:
    """The states, copied where a target hands one of its arguments through."""
    return [s.clone() if any(s is tensor for tensor in given) else s.contiguous() for s in states]
