"""Fused kernels for CPUs: the target that `recurrence.run` prefers.

Sizes decide how the work is shared and what is prepared (`sharing`, `setting`); a run points the prepared frames at its
tensors and lets the drivers walk. None of it changes a bit of a row's values; the blocks of the backward pass, which
order the sums of the weight gradients, depend on the sizes alone.

Kernels take addresses, so every tensor passes `border.check` first, on the way forward and back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from throughtime.engine import border
from throughtime.engine import plan as plans
from throughtime.engine.precision import HALF
from throughtime.engine.problem import Problem, Result
from throughtime.engine.targets.cpu import compiled, gang, segments
from throughtime.engine.targets.cpu.backward_setting import BackwardSetting, block_steps
from throughtime.engine.targets.cpu.forward_setting import ForwardSetting, saved_bytes
from throughtime.engine.targets.cpu.kept import Again, Kept
from throughtime.engine.targets.cpu.machine import machine
from throughtime.engine.targets.cpu.setting import settings
from throughtime.engine.targets.cpu.sharing import Sharing, sharing_of, sizes_of
from throughtime.engine.targets.target import Spec, Stepper, Target
from throughtime.equations.cell import Cell

KEPT_BYTES = 4 * 1024 * 1024
"""A run that keeps no more than this is not worth the time of segments, where they are left to the engine ("auto")."""

OWN = (torch.float32, torch.float64)
"""The formats of the kernels."""


class Cpu(Target):
    """The kernels that are generated from a cell's equations.

    A run in bfloat16 or float16 is a float32 run between two conversions: tensors are widened, which is exact, states
    are carried in float32 from the first step to the last, and outputs, last states and gradients are rounded once.
    """

    name = "cpu"
    obeys_segments = True

    def refusal(self, problem: Problem) -> str | None:
        """Why the problem cannot run here, or None."""
        x = problem.x
        if x.device.type != "cpu":
            return f"the tensors are on {x.device}"
        if x.dtype not in OWN and x.dtype not in HALF:
            return f"its kernels know float32 and float64, and bfloat16 and float16 at the edges, not {x.dtype}"
        if any(t.dtype != x.dtype or t.device != x.device for t in problem.tensors):
            return "its tensors differ in dtype or device"
        if problem.steps == 0 or problem.rows == 0 or 0 in problem.sizes or x.shape[2] == 0:
            return "there is nothing to compute"
        return None

    def note(self, problem: Problem) -> str | None:
        """That a run in half precision carries its states in float32."""
        if problem.x.dtype not in HALF:
            return None
        return f"it computes in float32 and rounds outputs, last states and gradients to {problem.x.dtype} once"

    def forward(self, problem: Problem, save: bool = False) -> Result:
        """Run the recurrence; with `save`, the workspace is what the backward run wants to see again.

        With segments that is not every step's values but the states at the segments' edges. In half precision it begins
        with the outputs in float32, which are the states that the next step saw.
        """
        _pass(problem)
        if problem.x.dtype not in HALF:
            return _forward(problem, save)
        single = _forward(_widened(problem), save)
        output, *states = (tensor.to(problem.x.dtype) for tensor in (single.output, *single.states))
        return Result(output, tuple(states), (single.output, *single.workspace) if save else ())

    def workspace(self, problem: Problem) -> list[Spec]:
        """The outputs in float32 where they are rounded; histories of the other states; saved values; or edges."""
        if problem.x.dtype not in HALF:
            return [Spec(shape, problem.x.dtype) for shape in _workspace_shapes(problem)]
        output = (problem.steps, problem.rows, problem.sizes[problem.cell.output])
        return [Spec(shape, torch.float32) for shape in (output, *_workspace_shapes(_shapes_widened(problem)))]

    def backward(
        self,
        problem: Problem,
        result: Result,
        d_output: Tensor | None,
        d_states: Sequence[Tensor | None],
        needs: Sequence[bool],
    ) -> tuple[Tensor | None, ...]:
        """The gradients of `problem.tensors`, None where `needs` says so; an adjoint of None is zero."""
        _pass(problem)
        _pass_back(problem, result, d_output, d_states)
        if problem.x.dtype not in HALF:
            return _backward(problem, result, d_output, d_states, needs)
        single = Result(result.workspace[0], result.states, result.workspace[1:])
        d_output, *d_states = (None if d is None else d.float() for d in (d_output, *d_states))
        gradients = _backward(_widened(problem), single, d_output, d_states, needs)
        return tuple(None if d is None else d.to(problem.x.dtype) for d in gradients)

    def stepper(self, layers: Sequence[Problem], batched: bool) -> Stepper:
        """Frames made once, on weights that are packed once."""
        from throughtime.engine.targets.cpu import stepping

        for layer in layers:
            _pass(layer)
        if layers[0].x.dtype not in HALF:
            return stepping.Steps(layers, batched)
        return stepping.HalfSteps([stepping.Steps([_widened(layer)], batched) for layer in layers], layers[0].x.dtype)

    def listing(self, cell: Cell, assembly: bool = False) -> str:
        """The kernels of a step, as LLVM IR or assembly."""
        return compiled.listing(cell, assembly=assembly)


TARGET = Cpu()


# ---------------------------------------------------------------------------------------------------------------------
# Who may pass


def _pass(problem: Problem) -> None:
    """Let a problem pass, or raise: shapes that fit each other, and plain memory behind each tensor."""
    problem.check()
    border.check(problem.tensors, problem.x.dtype)
    if problem.reset is not None:
        border.check((problem.reset,), torch.bool)


def _pass_back(problem: Problem, result: Result, d_output: Tensor | None, d_states: Sequence[Tensor | None]) -> None:
    """Let what comes from autograd pass: hooks may have put anything in the place of what was saved or sent."""
    dtype = problem.x.dtype
    shown = Spec((problem.steps, problem.rows, problem.sizes[problem.cell.output]), dtype)
    last = [Spec((problem.rows, size), dtype) for size in problem.sizes]
    specs = TARGET.workspace(problem)
    given = (d_output, *d_states, result.output, *result.workspace)
    for tensor, spec in zip(given, (shown, *last, shown, *specs), strict=True):
        if tensor is not None:
            if tensor.shape != spec.shape:
                raise border.Unaddressable(
                    f"a saved tensor or gradient has shape {list(tensor.shape)}, and {list(spec.shape)} was expected"
                )
            border.check((tensor,), spec.dtype)


def _widened(problem: Problem) -> Problem:
    """The same problem in float32."""
    return problem.with_tensors([tensor.float() for tensor in problem.tensors])


def _shapes_widened(problem: Problem) -> Problem:
    """The same shapes in float32, without the numbers."""
    return problem.with_tensors([t.new_empty((), dtype=torch.float32).expand(t.shape) for t in problem.tensors])


# ---------------------------------------------------------------------------------------------------------------------
# Runs in the kernels' own formats


def _forward(problem: Problem, save: bool) -> Result:
    sizes = sizes_of(problem)
    threads = torch.get_num_threads()
    wanted = sharing_of(problem, sizes, threads, sums=False)
    segment = _segment(problem, sizes, say=True) if save else problem.steps
    with gang.gathered(min(threads, len(wanted.shares))) as crew:
        shared = wanted if crew else sharing_of(problem, sizes, 1, sums=False)
        with _prepared_forward(problem, sizes, save and segment == problem.steps, shared, segment) as prepared:
            return prepared.run(problem, _workspace_shapes(problem) if save else [], crew)


@contextmanager
def _prepared_forward(
    problem: Problem, sizes: tuple[object, ...], save: bool, shared: Sharing, segment: int
) -> Iterator[ForwardSetting]:
    """A setting for these sizes, for one run; it is kept for later unless the run fails."""
    key = ("forward", save, segment, len(shared.shares), *sizes)
    prepared = settings.take(key) or ForwardSetting(problem, save, shared, segment)
    assert isinstance(prepared, ForwardSetting)
    yield prepared
    settings.give(key, prepared)


def _segment(problem: Problem, sizes: tuple[object, ...], say: bool = False) -> int:
    """Steps whose inside is kept, or computed anew, at once: all of them without segments."""
    small = problem.segments == "auto" and saved_bytes(problem, problem.steps) <= KEPT_BYTES
    if problem.segments is None or small:
        return problem.steps
    block = block_steps(problem, sharing_of(problem, sizes, 1, sums=True))
    return segments.length(problem.segments, problem.steps, block, say)


def _workspace_shapes(problem: Problem) -> list[tuple[int, ...]]:
    """The shapes of the workspace, known before a run."""
    cell = problem.cell
    lanes = machine().lanes(problem.x.element_size())
    units = {"hidden": problem.hidden_size, "projected": problem.proj_size}
    padded = {width: -(-count // lanes) * lanes for width, count in units.items()}
    widths = [padded[width] for i, width in enumerate(cell.widths) if i != cell.output]
    segment = problem.steps if problem.segments is None else _segment(problem, sizes_of(problem))
    if segment < problem.steps:
        edges = len(segments.ranges(problem.steps, segment)) - 1
        return [(edges, problem.rows, width) for width in widths]
    for buffer, slots in plans.forward(cell).slots.items():
        kind, width = buffer.split(":")
        if kind == "saved":
            widths.append(padded[width] * slots)
    return [(problem.steps, problem.rows, width) for width in widths]


def _backward(
    problem: Problem,
    result: Result,
    d_output: Tensor | None,
    d_states: Sequence[Tensor | None],
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    sizes = sizes_of(problem)
    threads = torch.get_num_threads()
    segment = _segment(problem, sizes)
    wanted = sharing_of(problem, sizes, threads, sums=True)
    with gang.gathered(min(threads, len(wanted.shares))) as crew, ExitStack() as used:
        shared = wanted if crew else sharing_of(problem, sizes, 1, sums=True)
        key = ("backward", tuple(needs), len(shared.shares), *sizes)
        prepared = settings.take(key) or BackwardSetting(problem, needs, shared)
        assert isinstance(prepared, BackwardSetting)
        kept: Kept | Again
        if segment < problem.steps:
            same = sharing_of(problem, sizes, threads if crew else 1, sums=False)
            again = used.enter_context(_prepared_forward(problem, sizes, True, same, segment))
            kept = Again(again, problem, result, crew)
        else:
            kept = Kept(problem, result)
        gradients = prepared.run(problem, kept, d_output, d_states, crew)
        settings.give(key, prepared)
        return gradients
