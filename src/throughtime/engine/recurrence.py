"""What torch sees: one differentiable operation, `run`. It picks a target and can say which and why."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad

from throughtime.engine import border
from throughtime.engine.precision import no_autocast, widened
from throughtime.engine.problem import Problem, Result
from throughtime.engine.targets import TARGETS, reference, target
from throughtime.engine.targets.target import Stepper
from throughtime.equations.cell import Cell
from throughtime.equations.expr import Node
from throughtime.errors import TargetError


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


def choose(problem: Problem, asked: str | None = None) -> Choice:
    """The target that would run this problem now; raises TargetError if the one asked for cannot."""
    choice = _choose(problem, asked)
    chosen = target(choice.target)
    notes = [note] if (note := chosen.note(problem)) else []
    if problem.segments is not None and not chosen.obeys_segments:
        notes.append("it keeps every step, whatever segments= says")
    return replace(choice, reason="; ".join([choice.reason, *notes])) if notes else choice


def _choose(problem: Problem, argument: str | None) -> Choice:
    if _records.get() is not None:
        return Choice("reference", "a recording of the states is under way")
    asked, asker = (
        (argument, "the argument target=") if argument else (os.environ.get("THROUGHTIME_TARGET"), "THROUGHTIME_TARGET")
    )
    beyond = _beyond_adjoints()
    if asked and asked != "auto":
        if asked not in TARGETS:
            raise TargetError(f"{asker} asks for {asked!r}; the targets are {', '.join([*TARGETS, 'auto'])}")
        if asked != "reference" and (reason := beyond or target(asked).refusal(problem)):
            raise TargetError(f"{asker} asks for {asked!r}, which cannot run this: {reason}")
        return Choice(asked, f"{asker} asks for it")
    if beyond:
        return Choice("reference", beyond)
    passed: list[str] = []
    for name in TARGETS:
        reason = target(name).refusal(problem)
        if reason is None:
            return Choice(name, "; ".join(passed) or "the fastest of the targets that can run this")
        passed.append(f"not {name}, because {reason}")
    raise TargetError(f"no target can run this: {'; '.join(passed)}")


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


def run(problem: Problem, asked: str | None = None) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Run a recurrence over time and return its outputs [T, B, width] and the states [B, width] at each row's end.

    Differentiable once through the derived adjoint equations and, with `create_graph`, any number of times through the
    reference; on the `native` target as torch's own operators are. Outputs past a row's end are zero. `asked` names a
    target; None leaves the choice to the engine.

    Raises ShapeError for tensors that do not fit each other.
    """
    if torch.compiler.is_compiling():
        return run_operator(problem, asked)
    if (look := _look.get()) is not None:
        problem = look(problem)
    if border.modes_are_watching() and not is_recording():
        return run_operator(problem, asked)
    chosen = target(choose(problem, asked).target)
    if chosen.by_autograd:
        problem.check(sorted_rows=not is_recording())
        return _run_reference(problem) if chosen is reference.TARGET else _shown(chosen.forward(problem))
    try:
        if not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in problem.tensors)):
            return _shown(chosen.forward(problem, False))
        output, *states = _Recurrence.apply(problem, chosen, *problem.tensors)
        return output, tuple(states)
    except border.Unaddressable:
        return run_operator(problem, asked)


def _shown(result: Result) -> tuple[Tensor, tuple[Tensor, ...]]:
    return result.output, result.states


def run_operator(problem: Problem, asked: str | None) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The same through the registered operator: what compilers, modes, fake tensors and subclasses are shown, and
    where torch's dispatcher resolves what is lazy."""
    segments = 0 if problem.segments == "auto" else problem.segments
    lengths = problem.lengths if problem.lengths is None else torch.as_tensor(problem.lengths)
    rest = (lengths, problem.reset, problem.reverse, segments, asked or "")
    found = torch.ops.throughtime.recurrence(list(problem.tensors), problem.cell.json, *rest)
    return found[0], tuple(found[1:])


def stepper(layers: Sequence[Problem], batched: bool, asked: str | None) -> Stepper | None:
    """What takes single steps of a stack of layers on the target that the engine picks; None if it is a run each."""
    return target(choose(layers[0], asked).target).stepper(layers, batched)


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


class Differentiable(Protocol):
    """The part of a target that a run under autograd needs; `operator` has one that goes through the operators."""

    def forward(self, problem: Problem, save: bool) -> Result:
        """Run the recurrence."""

    def backward(
        self,
        problem: Problem,
        result: Result,
        d_output: Tensor | None,
        d_states: Sequence[Tensor | None],
        needs: Sequence[bool],
    ) -> tuple[Tensor | None, ...]:
        """The gradients of `problem.tensors`."""


class _Recurrence(torch.autograd.Function):
    """The recurrence with the cell's derived adjoints as its backward."""

    @staticmethod
    def forward(ctx: Any, problem: Problem, target: Differentiable, *tensors: Tensor) -> tuple[Tensor, ...]:
        result = target.forward(problem, True)
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
        needs = ctx.needs_input_grad[2:]
        if torch.is_grad_enabled() or _batched((d_output, *d_states)):
            return None, None, *_through_reference(problem, (d_output, *d_states), needs)
        result = Result(saved[count], saved[count + 1 : count + 1 + states], saved[count + 1 + states :])
        with no_autocast(problem.x.device.type):
            try:
                gradients = ctx.target.backward(problem, result, d_output, d_states, needs)
            except border.Unaddressable:
                gradients = _backward_elsewhere(ctx.target, problem, result, (d_output, *d_states), needs)
        return None, None, *gradients


def _backward_elsewhere(
    target: Differentiable,
    problem: Problem,
    result: Result,
    d_outputs: Sequence[Tensor | None],
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients where a tensor is no plain memory: with the incoming ones written down, or by the reference."""
    try:
        first, *others = (None if d is None else border.written_down(d) for d in d_outputs)
        return target.backward(problem, result, first, others, needs)
    except border.Unaddressable:
        return _through_reference(problem, d_outputs, needs)


def _through_reference(
    problem: Problem, d_outputs: Sequence[Tensor | None], needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """A backward pass that can be differentiated (create_graph=True) and batched: autograd through the reference.

    In half precision it goes through float32 and each gradient is rounded once, as on the target that ran forward.
    """
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # Names of their own, so that no path from one tensor leads through another (x may itself depend on a weight).
        problem = problem.with_tensors([tensor.view_as(tensor) for tensor in problem.tensors])
        wanted = [tensor for tensor, need in zip(problem.tensors, needs, strict=True) if need]
        result = reference.forward(problem.with_tensors([widened(tensor) for tensor in problem.tensors]))
    d_outputs = [None if d is None else widened(d) for d in d_outputs]
    pairs = zip((result.output, *result.states), d_outputs, strict=True)
    outputs = [(o, d) for o, d in pairs if o.requires_grad and d is not None]
    found = iter(
        torch.autograd.grad(
            [o for o, _ in outputs], wanted, [d for _, d in outputs], create_graph=again, allow_unused=True
        )
    )
    return tuple(next(found) if need else None for need in needs)


def listing(cell: Cell, name: str, assembly: bool = False) -> str:
    """The code that a target generates for a step of a cell; TargetError if the target generates none."""
    if name not in TARGETS:
        raise TargetError(f"{name!r} is no target; the targets are {', '.join(TARGETS)}")
    return target(name).listing(cell, assembly=assembly)
