"""Fused kernels for CPUs: the target that `recurrence.run` prefers.

Sizes decide how the work is shared and what is prepared (`sharing`, `setting`); a run points the prepared frames at its
tensors and lets the drivers walk. None of it changes a bit of a row's values; the blocks of the backward pass, which
order the sums of the weight gradients, depend on the sizes alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from throughtime.engine import plan as plans
from throughtime.engine.problem import Problem, Result
from throughtime.engine.targets import gang, llvm, segments
from throughtime.engine.targets.backward_setting import BackwardSetting, block_steps
from throughtime.engine.targets.compiled import listing
from throughtime.engine.targets.forward_setting import ForwardSetting, saved_bytes
from throughtime.engine.targets.kept import Again, Kept
from throughtime.engine.targets.setting import settings
from throughtime.engine.targets.sharing import Sharing, sharing_of, sizes_of

__all__ = ["backward", "forward", "listing", "refusal", "workspace_shapes"]

KEPT_BYTES = 4 * 1024 * 1024
"""A run that keeps no more than this is not worth the time of segments, where they are left to the engine ("auto")."""


def refusal(problem: Problem) -> str | None:
    """Why the problem cannot run here, or None."""
    x = problem.x
    if x.device.type != "cpu":
        return f"the tensors are on {x.device}"
    if x.dtype not in (torch.float32, torch.float64):
        return f"its kernels know float32 and float64, not {x.dtype}"
    if any(t.dtype != x.dtype or t.device != x.device for t in problem.tensors):
        return "its tensors differ in dtype or device"
    if problem.steps == 0 or problem.rows == 0 or 0 in problem.sizes or x.shape[2] == 0:
        return "there is nothing to compute"
    return None


def forward(problem: Problem, save: bool) -> Result:
    """Run the recurrence; with `save`, the workspace is what the backward run wants to see again.

    With segments that is not every step's values but the states at the segments' edges.
    """
    sizes = sizes_of(problem)
    threads = torch.get_num_threads()
    wanted = sharing_of(problem, sizes, threads, sums=False)
    segment = _segment(problem, sizes, say=True) if save else problem.steps
    with gang.gathered(min(threads, len(wanted.shares))) as crew:
        shared = wanted if crew else sharing_of(problem, sizes, 1, sums=False)
        with _prepared_forward(problem, sizes, save and segment == problem.steps, shared, segment) as prepared:
            return prepared.run(problem, workspace_shapes(problem) if save else [], crew)


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


def workspace_shapes(problem: Problem) -> list[tuple[int, ...]]:
    """The shapes of the workspace that `forward` with `save` leaves, known before it runs."""
    cell = problem.cell
    lanes = llvm.machine().lanes(problem.x.element_size())
    units = {"hidden": problem.hidden_size, "projected": problem.proj_size}
    padded = {width: -(-count // lanes) * lanes for width, count in units.items()}
    widths = [padded[width] for i, width in enumerate(cell.widths) if i != cell.output]
    segment = _segment(problem, sizes_of(problem))
    if segment < problem.steps:
        edges = len(segments.ranges(problem.steps, segment)) - 1
        return [(edges, problem.rows, width) for width in widths]
    for buffer, slots in plans.forward(cell).slots.items():
        kind, width = buffer.split(":")
        if kind == "saved":
            widths.append(padded[width] * slots)
    return [(problem.steps, problem.rows, width) for width in widths]


def backward(
    problem: Problem,
    result: Result,
    d_output: Tensor | None,
    d_states: Sequence[Tensor | None],
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """The gradients of `problem.tensors`, None where `needs` says so; an adjoint of None is zero."""
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
