"""Forward runs, prepared: whole ones that keep nothing or everything, and ones in segments."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from throughtime.engine import memory
from throughtime.engine import plan as plans
from throughtime.engine.problem import Problem, Result
from throughtime.engine.targets.cpu import segments
from throughtime.engine.targets.cpu.compiled import compiled
from throughtime.engine.targets.cpu.setting import Crew, Setting
from throughtime.engine.targets.cpu.sharing import Share, Sharing
from throughtime.equations import calculus

DRIVE_BYTES = 256 * 1024
"""Input products kept per thread before the steps that use them: a part of the second cache."""

STREAMED_BYTES = 6 * 1024 * 1024
"""Saved values of more than this are written past the caches, which they would only sweep clean."""


class ForwardSetting(Setting):
    """Forward runs: whole ones that save nothing or everything; ones in segments, and segments computed again."""

    def __init__(self, problem: Problem, save: bool, shared: Sharing, segment: int) -> None:
        cell = problem.cell
        self.save, self.segment = save, segment
        streaming = save and saved_bytes(problem, segment) > STREAMED_BYTES
        super().__init__(problem, compiled(cell, problem.x.element_size(), "forward", save, streaming), shared)
        plan = self.code.plan
        for i, state in enumerate(cell.states):
            self.put(f"before:{state}.count", self.sizes[i])
            self.put(f"before:{state}.entry", 8)
            self.put(f"history:{state}.depth", 0 if save or i == cell.output else 2)
        if not save:
            saved = [buffer for buffer in plan.slots if buffer.startswith("saved")]
            self.absent(*(f"{buffer}.{part}" for buffer in saved for part in ("origin", "step", "size")))
        self.put("x_rows.count", self.units["input"])
        self.put("x_rows.row", 8)
        self.drives = [stage for stage in self.code.stages if stage.name.startswith("drive")]
        most = max(share.count for share in shared.shares)
        row = sum(plan.slots[f"drive:{s.width}"] * self.tiles[s.width] for s in self.drives) * self.vector_bytes
        block = max(1, DRIVE_BYTES // max(1, row * most), -(-32 // most))
        self.block = min(self.steps, block)
        self.put("block", self.block)
        for operand, place in plan.operands.items():
            width = plans.operand_width(cell, operand)
            self.tiled(place.data[0], self.rows, width, 1)
            self.put(f"{place.data[0]}.count", self.units[width])
        for stage in self.drives:
            bias = plan.slots[f"drive:{stage.width}"] * self.vector_bytes
            self.put(f"drive_bias:{stage.width}.tile", bias)
            self.put(f"drive_bias:{stage.width}.base", self.arena.bytes(self.tiles[stage.width] * bias))
        for stage in self.code.stages:
            self.panel(stage)
        self.last_two = {} if save else self._make_last_two()
        for thread, share in enumerate(shared.shares):
            self._private(thread, share)
        self._prepare()

    def _make_last_two(self) -> dict[int, Tensor]:
        """Room for states that nobody asked to keep, after this step and the one before: [2, B, width]."""
        found = {}
        for i, width in enumerate(self.cell.widths):
            if i != self.cell.output:
                shape = (2, self.rows, self.tiles[width] * self.lanes)
                address = self.arena.bytes(math.prod(shape) * self.item)
                found[i] = self.arena.view(address, shape, self.dtype)
        return found

    def _private(self, thread: int, share: Share) -> None:
        """Buffers that each thread has for itself."""
        for stage in self.drives:
            drive = f"drive:{stage.width}"
            slots = self.code.plan.slots[drive]
            row = self.tiles[stage.width] * slots * self.vector_bytes
            base = self.arena.bytes(self.block * share.count * row)
            for part, value in {"tile": slots * self.vector_bytes, "row": row, "origin": base, "base": base}.items():
                self.put_for(thread, f"{drive}.{part}", value)
        self.put_for(thread, "x_rows.base", self.arena.bytes(self.block * share.count * 8))
        for state in self.cell.states:
            self.put_for(thread, f"before:{state}.table", self.arena.bytes(share.count * 8))
        for buffer, slots in self.code.plan.slots.items():
            if buffer.startswith("scratch"):
                width = buffer.split(":")[1]
                row = self.tiles[width] * slots * self.vector_bytes
                self.put_for(thread, f"{buffer}.base", self.arena.bytes(share.count * row))
                self.put_for(thread, f"{buffer}.row", row)
                self.put_for(thread, f"{buffer}.tile", slots * self.vector_bytes)

    def _prepare(self) -> None:
        """The kernels for the numbers of rows of this run."""
        for share in self.sharing.shares:
            counts = self.counts(share)
            for stage in self.code.plan.stages:
                self._have(stage, counts, self.tile_ranges(stage.width))
            for stage in self.drives:
                self._have(stage, self._block_counts(share), self.tile_ranges(stage.width))

    def _block_counts(self, share: Share) -> list[int]:
        """The numbers of rows whose input products are taken together."""
        active = self.active[::-1] if self.reverse else self.active
        counts = [share.running(n) for n in active]
        found = set()
        for first, last in segments.ranges(self.steps, self.segment):
            found |= {sum(counts[i : min(i + self.block, last)]) for i in range(first, last, self.block)}
        return sorted(found - {0})

    def run(self, problem: Problem, shapes: Sequence[tuple[int, ...]], crew: Crew) -> Result:
        """One run on these tensors, all of it, in segments if they are shorter; `shapes` are the workspace's."""
        output = _like_input(problem)
        workspace = [memory.tensor(shape, self.dtype) for shape in shapes]
        free = iter(workspace)
        histories = []
        for i in range(len(self.cell.states)):
            kept = next(free) if self.save and i != self.cell.output else None
            histories.append(output if i == self.cell.output else self.last_two[i] if kept is None else kept)
        self.open(problem, crew)
        self.point(0, histories, list(free))
        for number, (first, last) in enumerate(segments.ranges(self.steps, self.segment)):
            self.walk(crew, first, last)
            if last < self.steps:
                for edges, two in zip(workspace, self.last_two.values(), strict=True):
                    edges[number] = two[(last - 1) % 2]
        return Result(output, self._last_states(problem, histories), tuple(workspace))

    def saved_widths(self) -> list[int]:
        """The numbers per row and step of what is saved beside the states."""
        slots = self.code.plan.slots.items()
        return [n * self.tiles[b.split(":")[1]] * self.lanes for b, n in slots if b.startswith("saved")]

    def open(self, problem: Problem, crew: Crew) -> None:
        """Point at a problem's tensors, and pack its weights."""
        self.bind(problem)
        if problem.lengths is not None:
            self._prepare()
        self.pack(crew)

    def point(self, first: int, histories: Sequence[Tensor], saved: Sequence[Tensor], before: int = 0) -> None:
        """Where the states and what is saved go. Saved values begin at step `first`, states `before` steps earlier."""
        for state, history in zip(self.cell.states, histories, strict=True):
            self.steps_of(f"history:{state}", history, first - before)
            self.steps_of(f"next:{state}", history, first - before)
        free = iter(saved)
        for buffer, slots in self.code.plan.slots.items():
            if buffer.startswith("saved") and self.save:
                self.steps_of(buffer, next(free), first)
                self.put(f"{buffer}.tile", slots * self.vector_bytes)

    def _last_states(self, problem: Problem, histories: list[Tensor]) -> tuple[Tensor, ...]:
        """The state [B, width] after each row's last phase."""
        found = []
        for i, (history, start) in enumerate(zip(histories, problem.states, strict=True)):
            by_phase = i != self.cell.output and not self.save
            if problem.lengths is None or problem.reverse:
                last = self.steps - 1 if by_phase or not problem.reverse else 0
                state = history[last % 2 if by_phase else last, :, : self.sizes[i]].clone()
            else:
                times = torch.tensor(problem.lengths).sub_(1).clamp_(min=0)
                state = history[times % 2 if by_phase else times, torch.arange(self.rows), : self.sizes[i]]
            if problem.lengths is not None and 0 in problem.lengths:
                empty = torch.tensor([length == 0 for length in problem.lengths])
                state = torch.where(empty.unsqueeze(-1), start, state)
            found.append(state)
        return tuple(found)


def saved_bytes(problem: Problem, steps: int) -> int:
    """About how much a training run writes for its backward run over so many steps."""
    values = len(calculus.saved(problem.cell))
    return steps * problem.rows * values * problem.hidden_size * problem.x.element_size()


def _like_input(problem: Problem) -> Tensor:
    """The outputs [T, B, width], laid out in memory as x is; zero where rows have ended."""
    x, width = problem.x, problem.sizes[problem.cell.output]
    batch_first = problem.rows > 1 and x.stride(0) < x.stride(1)
    lead = (problem.rows, problem.steps) if batch_first else (problem.steps, problem.rows)
    output = memory.result((*lead, width), x.dtype)
    if problem.lengths is not None:
        output.zero_()
    return output.transpose(0, 1) if batch_first else output
