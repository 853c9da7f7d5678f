"""How a run is divided into frames: by rows of the batch, or by units, as the sizes decide and the threads allow."""

from __future__ import annotations

import os
from dataclasses import dataclass
from itertools import pairwise

from throughtime.engine.problem import Problem
from throughtime.engine.targets.cpu.machine import machine

MOST_SHARDS = 8
"""The most parts that the rows of a backward run are divided into; each has sums as large as the weights."""

ALONE = 1_000_000
"""Multiply-adds of a whole run below which one thread is quicker than the meeting of several."""

STEP_BYTES = 4_500_000
"""Recurrent weights of more than this are read by every thread for its units alone: they come from the third cache in
each step, which cannot feed all of them to every core."""

STEP_BYTES_OF_FEW = 1_500_000
"""The same for fewer than 32 rows, which give a core less to do with each weight."""


@dataclass(frozen=True)
class Share:
    """One thread's rows of the batch: the first, the step from one to the next, how many."""

    first: int
    stride: int
    count: int

    def running(self, rows: int) -> int:
        """How many of its rows are among the first `rows` of the batch."""
        return max(0, min(self.count, -(-(rows - self.first) // self.stride)))


@dataclass(frozen=True)
class Sharing:
    """How a run is divided into frames: by rows, each frame on its own, or all rows by units, in step."""

    shares: tuple[Share, ...]
    units_shared: bool = False

    def tiles(self, frame: int, total: int) -> tuple[int, int]:
        """A frame's tiles of units in the loop."""
        if not self.units_shared:
            return 0, total
        frames = len(self.shares)
        return total * frame // frames, total * (frame + 1) // frames

    def crews(self) -> list[list[int]]:
        """The frames that see the same buffers: all where they share units, else each its own."""
        every = list(range(len(self.shares)))
        return [every] if self.units_shared else [[frame] for frame in every]


def by_rows(frames: int, rows: int, ragged: bool) -> Sharing:
    """So many frames with about as many rows each; ragged rows are dealt out, so that long ones fall to all."""
    if ragged:
        return Sharing(tuple(Share(k, frames, -(-(rows - k) // frames)) for k in range(frames)))
    pieces = -(-rows // 8)  # whole pieces of eight where there are plenty of them
    edges = [rows * k // frames for k in range(frames + 1)]
    if pieces >= 4 * frames:
        edges = [min(rows, 8 * (pieces * k // frames)) for k in range(frames)] + [rows]
    return Sharing(tuple(Share(a, 1, b - a) for a, b in pairwise(edges)))


def divided(threads: int, rows: int, tiles: int, ragged: bool, work: int, step_bytes: int, sums: bool) -> Sharing:
    """Rows where there are enough of them and few weights, else units where there are enough of those, else one frame.

    A run that sums over rows (`sums`) is divided by rows in a way that the machine and the sizes decide, not the number
    of threads, for that division orders the sums.
    """
    alone = Sharing((Share(0, 1, rows),))
    if work < ALONE:
        return alone
    by_units = tiles >= 4 * threads and work >= 8 * ALONE
    most = min(MOST_SHARDS, os.cpu_count() or 1) if sums else threads
    heavy = step_bytes > (STEP_BYTES_OF_FEW if rows < 32 else STEP_BYTES) and tiles >= 4 * most
    if not heavy and (rows >= 16 or (rows >= 4 and tiles < 8)):
        frames = min(most, max(2, rows // 8))
        return by_rows(frames, rows, ragged) if frames > 1 else alone
    if threads > 1 and by_units:
        return Sharing(tuple(Share(0, 1, rows) for _ in range(threads)), units_shared=True)
    return alone


def sizes_of(problem: Problem) -> tuple[object, ...]:
    """What settings differ by, besides direction and threads."""
    return (
        problem.signature,
        problem.x.dtype,
        problem.lengths is None,
        problem.reset is None,
        problem.reverse,
    )


_sharings: dict[tuple[object, ...], Sharing] = {}


def sharing_of(problem: Problem, sizes: tuple[object, ...], threads: int, sums: bool) -> Sharing:
    """How so many threads divide this run."""
    key = (threads, sums, *sizes)
    found = _sharings.get(key)
    if found is None:
        work = problem.rows * problem.steps * sum(p.numel() for p in problem.parameters if p.dim() == 2)
        lanes = machine().lanes(problem.x.element_size())
        tiles = -(-problem.hidden_size // lanes)
        if len(_sharings) > 4096:  # lengths that never come again
            _sharings.clear()
        step_bytes = _recurrent_bytes(problem)
        found = divided(threads, problem.rows, tiles, problem.lengths is not None, work, step_bytes, sums)
        _sharings[key] = found
    return found


def _recurrent_bytes(problem: Problem) -> int:
    """Bytes of the weights that every step reads."""
    pairs = zip(problem.cell.parameters, problem.parameters, strict=True)
    return sum(tensor.numel() * tensor.element_size() for parameter, tensor in pairs if parameter.namespace in "UP")
