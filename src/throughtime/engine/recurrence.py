"""What torch sees: one differentiable operation, `run`. It picks a target and can say which and why."""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from throughtime.engine.problem import Problem, Result
from throughtime.engine.targets import reference
from throughtime.equations.cell import Cell
from throughtime.equations.expr import Node
from throughtime.errors import TargetError

TARGETS = ("cpu", "stepwise")
"""Targets with derived adjoints, the one to prefer first. The reference stands apart: autograd differentiates it."""


@functools.cache
def target_module(name: str) -> ModuleType:
    """A target's module, imported when it is first asked for."""
    return importlib.import_module(f"throughtime.engine.targets.{name}")


@dataclass(frozen=True)
class Choice:
    """Which target runs a problem, and why."""

    target: str
    reason: str

    def __str__(self) -> str:
        return f"{self.target}: {self.reason}"


@dataclass
class Record:
    """One recurrence as it ran on the reference: its states after each computed step, part of the autograd graph.

    `states` is in the order of computation, so from each row's last step when `reverse`; rows are the caller's. So is
    `values`, None unless asked for: what every node of the cell was worth at each step. `output` [T, B, width] is what
    was shown. `problem.x` is a node of this run's own, so that a gradient by it is through this recurrence alone.
    """

    problem: Problem
    states: list[tuple[Tensor, ...]] = field(default_factory=list)
    values: list[dict[Node, Tensor]] | None = None
    output: Tensor | None = None

    @property
    def cell(self) -> Cell:
        """The equations of a step."""
        return self.problem.cell

    @property
    def reverse(self) -> bool:
        """Whether time runs from a row's last step to its first."""
        return self.problem.reverse

    @property
    def lengths(self) -> tuple[int, ...] | None:
        """The steps of each row, None for all there are."""
        return self.problem.lengths


_records: ContextVar[tuple[list[Record], bool] | None] = ContextVar("records", default=None)


@contextmanager
def recording(values: bool = False) -> Iterator[list[Record]]:
    """Inside, every recurrence runs on the reference loop and leaves a `Record` in the list, layer by layer.

    With `values`, the records hold every value of every step too.
    """
    records: list[Record] = []
    token = _records.set((records, values))
    try:
        yield records
    finally:
        _records.reset(token)


def is_recording() -> bool:
    """Whether a recording is under way: rows then stay as the caller gave them, and `Problem.lengths` unsorted."""
    return _records.get() is not None


_look: ContextVar[Callable[[Problem], Problem] | None] = ContextVar("look", default=None)


@contextmanager
def watched(look: Callable[[Problem], Problem]) -> Iterator[None]:
    """Inside, `look` is shown every problem before it runs, on whatever target, and gives it back on its own tensors.

    So it can hang autograd hooks on them. Compiled programs run unseen.
    """
    token = _look.set(look)
    try:
        yield
    finally:
        _look.reset(token)


def choose(problem: Problem, target: str | None = None) -> Choice:
    """The target that would run this problem now; raises TargetError if the one asked for cannot."""
    choice = _choose(problem, target)
    if problem.segments is not None and choice.target != "cpu":
        return replace(choice, reason=f"{choice.reason}; it keeps every step, whatever segments= says")
    return choice


def _choose(problem: Problem, target: str | None) -> Choice:
    if _records.get() is not None:
        return Choice("reference", "a recording of the states is under way")
    asked, asker = (
        (target, "the argument target=") if target else (os.environ.get("THROUGHTIME_TARGET"), "THROUGHTIME_TARGET")
    )
    if asked and asked != "auto":
        if asked != "reference" and asked not in TARGETS:
            known = ", ".join([*TARGETS, "reference", "auto"])
            raise TargetError(f"{asker} asks for {asked!r}; the targets are {known}")
        if asked != "reference" and (reason := _beyond_adjoints() or target_module(asked).refusal(problem)):
            raise TargetError(f"{asker} asks for {asked!r}, which cannot run this: {reason}")
        return Choice(asked, f"{asker} asks for it")
    if reason := _beyond_adjoints():
        return Choice("reference", reason)
    passed: list[str] = []
    for name in TARGETS:
        reason = target_module(name).refusal(problem)
        if reason is None:
            return Choice(name, "; ".join(passed) or "the fastest of the targets that can run this")
        passed.append(f"not {name}, because {reason}")
    return Choice("reference", "; ".join(passed))


def _beyond_adjoints() -> str | None:
    """Why first-order adjoints will not do: a functorch transform or a forward-mode level is active."""
    if torch._C._functorch.maybe_current_level() is not None:
        return "a torch.func transform is active, and the reference can be differentiated in every way"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is active, and the reference carries tangents"
    return None


def _batched(tensors: Sequence[Tensor | None]) -> bool:
    """Whether a backward pass runs under vmap, as for `is_grads_batched=True` and `jacobian(vectorize=True)`."""
    functorch = torch._C._functorch
    given = [tensor for tensor in tensors if tensor is not None]
    return any(functorch.is_batchedtensor(t) or functorch.is_legacy_batchedtensor(t) for t in given)


def run(problem: Problem, target: str | None = None) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Run a recurrence over time and return its outputs [T, B, width] and the states [B, width] at each row's end.

    Differentiable once through the derived adjoint equations and, with `create_graph`, any number of times through the
    reference. Outputs past a row's end are zero.
    """
    if torch.compiler.is_compiling():
        segments = 0 if problem.segments == "auto" else problem.segments
        rest = (problem.lengths, problem.reset, problem.reverse, segments, target or "")
        found = torch.ops.throughtime.recurrence(list(problem.tensors), problem.cell.json, *rest)
        return found[0], tuple(found[1:])
    if (look := _look.get()) is not None:
        problem = look(problem)
    choice = choose(problem, target)
    if choice.target == "reference":
        return _run_reference(problem)
    save = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in problem.tensors)
    if not save:
        result = target_module(choice.target).forward(problem, False)
        return result.output, result.states
    output, *states = _Recurrence.apply(problem, target_module(choice.target), save, *problem.tensors)
    return output, tuple(states)


def _run_reference(problem: Problem) -> tuple[Tensor, tuple[Tensor, ...]]:
    under_way = _records.get()
    if under_way is None:
        result = reference.forward(problem)
    else:
        records, values = under_way
        x = problem.x
        own = x.view_as(x) if x.requires_grad or not torch.is_grad_enabled() else x.detach().requires_grad_()
        record = Record(replace(problem, x=own), values=[] if values else None)
        records.append(record)
        result = reference.forward(record.problem, record.states, record.values)
        record.output = result.output
    return result.output, result.states


class _Recurrence(torch.autograd.Function):
    """The recurrence with the cell's derived adjoints as its backward."""

    @staticmethod
    def forward(ctx: Any, problem: Problem, target: ModuleType, save: bool, *tensors: Tensor) -> tuple[Tensor, ...]:
        result = target.forward(problem, save)
        # autograd alone holds the tensors, so that it can free or offload them and notices what changes them in place
        ctx.problem, ctx.target = problem.with_tensors([None] * len(tensors)), target
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, result.output, *result.states, *result.workspace)
        return result.output, *result.states

    @staticmethod
    def backward(ctx: Any, d_output: Tensor | None, *d_states: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        count, states = len(ctx.problem.tensors), len(ctx.problem.states)
        problem = ctx.problem.with_tensors(saved[:count])
        needs = ctx.needs_input_grad[3:]
        if torch.is_grad_enabled() or _batched((d_output, *d_states)):
            return None, None, None, *_through_reference(problem, (d_output, *d_states), needs)
        result = Result(saved[count], saved[count + 1 : count + 1 + states], saved[count + 1 + states :])
        with torch.autocast(problem.x.device.type, enabled=False):
            gradients = ctx.target.backward(problem, result, d_output, d_states, needs)
        return None, None, None, *gradients


def _through_reference(
    problem: Problem, d_outputs: Sequence[Tensor | None], needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """A backward pass that can be differentiated (create_graph=True) and batched: autograd through the reference."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # Names of their own, so that no path from one tensor leads through another (x may itself depend on a weight).
        problem = problem.with_tensors([tensor.view_as(tensor) for tensor in problem.tensors])
        wanted = [tensor for tensor, need in zip(problem.tensors, needs, strict=True) if need]
        result = reference.forward(problem)
    pairs = zip((result.output, *result.states), d_outputs, strict=True)
    outputs = [(o, d) for o, d in pairs if o.requires_grad and d is not None]
    found = iter(
        torch.autograd.grad(
            [o for o, _ in outputs], wanted, [d for _, d in outputs], create_graph=again, allow_unused=True
        )
    )
    return tuple(next(found) if need else None for need in needs)


def listing(cell: Cell, target: str, assembly: bool = False) -> str:
    """The code that a target generates for a step of a cell; TargetError if the target generates none."""
    if target not in TARGETS or not hasattr(target_module(target), "listing"):
        raise TargetError(f"{target!r} generates no kernels to print; the target that does is cpu")
    text: str = target_module(target).listing(cell, assembly=assembly)
    return text
