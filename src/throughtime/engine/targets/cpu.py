"""Fused kernels for CPUs: prepares buffers and frames, shares out the work, and runs a driver on each thread.

Everything of size lives here: which tilings are needed (their kernels are compiled when first asked for), how many
steps make a block, which thread takes which rows or units. None of it changes a bit of a row's values; the block of the
backward pass, which orders the sums of the weight gradients, depends on the sizes alone.
"""

from __future__ import annotations

import ctypes
import math
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from throughtime.engine import plan as plans
from throughtime.engine.plan import BackwardPlan, Stage
from throughtime.engine.problem import Problem, Result
from throughtime.engine.targets import gang, kernels, llvm, memory, segments
from throughtime.engine.targets.backward import CHUNK, FEW_COLUMNS, FEW_INPUTS, OUTER_COLUMNS
from throughtime.engine.targets.compiled import (
    Compiled,
    columns,
    compiled,
    dot,
    gather_table,
    listing,
    outer,
    outer_table,
    transpose,
)
from throughtime.equations import calculus
from throughtime.equations.cell import Cell
from throughtime.equations.expr import Node

__all__ = ["backward", "forward", "listing", "refusal", "workspace_shapes"]

DRIVE_BYTES = 256 * 1024
"""Input products kept per thread before the steps that use them: a part of the second cache."""

RING_BYTES = 384 * 1024
"""Deltas kept before their share of the gradients is taken: they should still be in the second caches then."""

RING_ROWS = 128
"""The fewest rows a block of the backward pass should have, so that the gradients it adds to are not read too often."""

STREAMED_BYTES = 6 * 1024 * 1024
"""Saved values of more than this are written past the caches, which they would only sweep clean."""

MOST_RING_ROWS = 1024
"""The most rows of a block, so that no sum over rows becomes a long chain of roundings."""

MOST_SHARDS = 8
"""The most parts that the rows of a backward run are divided into; each has sums as large as the weights."""

ALONE = 1_000_000
"""Multiply-adds of a whole run below which one thread is quicker than the meeting of several."""

STEP_BYTES = 4_500_000
"""Recurrent weights of more than this are read by every thread for its units alone: they come from the third cache in
each step, which cannot feed all of them to every core."""

STEP_BYTES_OF_FEW = 1_500_000
"""The same for fewer than 32 rows, which give a core less to do with each weight."""


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


# ---------------------------------------------------------------------------------------------------------------------
# Sharing the work


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


def sharing(threads: int, rows: int, tiles: int, ragged: bool, work: int, step_bytes: int, sums: bool) -> Sharing:
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


Crew = gang.Team | gang.Gang | None
"""The threads of a run; None is the caller's alone."""


class Setting:
    """Everything of one run that the sizes decide: buffers, kernels, and a frame for each thread.

    It is made once for a set of sizes and used again; a run only points it at its tensors. A setting serves one run at
    a time.
    """

    def __init__(self, problem: Problem, code: Compiled, shared: Sharing) -> None:
        self.code, self.cell, self.sharing = code, problem.cell, shared
        self.steps, self.rows, inputs = problem.x.shape
        self.dtype = problem.x.dtype
        self.item = problem.x.element_size()
        self.lanes = llvm.machine().lanes(self.item)
        self.vector_bytes = self.lanes * self.item
        self.units = {"hidden": problem.hidden_size, "projected": problem.proj_size, "input": inputs}
        self.tiles = {width: -(-units // self.lanes) for width, units in self.units.items()}
        self.sizes = problem.sizes
        self.reverse = problem.reverse
        self.ladder = problem.lengths is not None or problem.reset is not None
        self.arena = memory.Arena()
        self.place = code.frame.place
        self.frames = [(ctypes.c_int64 * len(self.place))() for _ in shared.shares]
        self.addresses = [ctypes.addressof(frame) for frame in self.frames]
        self.zeroed: list[tuple[int, int]] = []
        self.values: dict[str, int] = {}
        self.given: list[Tensor] = []
        self.weights: list[int] = []
        self._common()

    # fields

    def put(self, name: str, value: int) -> None:
        """Set a field of every thread's frame."""
        if self.values.get(name) == value:
            return
        self.values[name] = value
        i = self.place[name]
        for frame in self.frames:
            frame[i] = value

    def put_for(self, thread: int, name: str, value: int) -> None:
        """Set a field of one thread's frame."""
        self.frames[thread][self.place[name]] = value

    def _common(self) -> None:
        self.put("yield", gang.yield_address())
        self.put("steps", self.steps)
        self.put("reverse", int(self.reverse))
        self.put("rows.batch", self.rows)
        self.put("kernels", ctypes.addressof(self.code.table))
        self.put("tile_limits", ctypes.addressof(self.code.limits))
        self.put("transpose", transpose(self.item))
        self.put("threads", len(self.frames) if self.sharing.units_shared else 1)
        self.put("ladder", int(self.ladder))
        self.put("units_shared", int(self.sharing.units_shared))
        self.put("barrier", self.arena.bytes(64))
        self.active_place = self.arena.bytes(8 * self.steps)
        self.put("active", self.active_place)
        self._set_active([self.rows] * self.steps)
        for width, units in self.units.items():
            self.put(f"tiles:{width}", self.tiles[width])
            self.put(f"units:{width}", units)
            self.put(f"lanes:{width}", units - (self.tiles[width] - 1) * self.lanes)
        for width, slots in self.code.plan.vectors.items():
            self.put(f"vectors:{width}.tile", len(slots) * self.vector_bytes)
            self.put(f"vectors:{width}.base", self.arena.bytes(self.tiles[width] * len(slots) * self.vector_bytes))
        for thread, share in enumerate(self.sharing.shares):
            self.put_for(thread, "thread", thread if self.sharing.units_shared else 0)
            self.put_for(thread, "packer", thread)
            self.put_for(thread, "rows.first", share.first)
            self.put_for(thread, "rows.stride", share.stride)
            self.put_for(thread, "rows.count", share.count)
            for width in self.units:
                first, last = self.sharing.tiles(thread, self.tiles[width])
                self.put_for(thread, f"tiles.first:{width}", first)
                self.put_for(thread, f"tiles.last:{width}", last)

    def _set_active(self, active: list[int]) -> None:
        """How many rows run at each step."""
        self.active = active
        ctypes.memmove(self.active_place, (ctypes.c_int64 * self.steps)(*active), 8 * self.steps)

    # buffers

    def cleared(self, size: int) -> int:
        """Scratch that is zero when a run begins."""
        address = self.arena.bytes(size)
        self.zeroed.append((address, size))
        return address

    def tiled(self, buffer: str, rows: int, width: str, slots: int) -> None:
        """A scratch buffer [rows][tiles][slots] of vectors that all threads see."""
        row = self.tiles[width] * slots * self.vector_bytes
        base = self.arena.bytes(rows * row)
        parts = {"tile": slots * self.vector_bytes, "row": row, "size": row, "base": base, "origin": base}
        for part, value in parts.items():
            self.put(f"{buffer}.{part}", value)
        for thread, share in enumerate(self.sharing.shares):
            self.put_for(thread, f"{buffer}.base", base + share.first * row)
            self.put_for(thread, f"{buffer}.row", share.stride * row)

    def panel(self, stage: Stage) -> None:
        """Room for the packed weights of a stage."""
        for group in stage.groups:
            name = kernels.panel_name(stage, group)
            if f"{name}.base" in self.values:
                continue
            source = group.operand.data[0]
            if source.startswith("ring"):
                slots = len(group.products)
                size = self.tiles[source.split(":")[1]] * self.lanes * slots * self.vector_bytes
            else:
                size = self.values[f"{source}.count"] * len(group.products) * self.vector_bytes
            self.put(f"{name}.tile", size)
            self.put(f"{name}.base", self.arena.bytes(self.tiles[stage.width] * size))

    # pointing at tensors

    def bind(self, problem: Problem) -> None:
        """Point at the tensors that both directions read."""
        self.given = [tensor.contiguous() for tensor in problem.parameters]
        starts = [tensor.data_ptr() for tensor in self.given]
        if starts != self.weights:
            self.weights = starts
            for parameter, tensor, start in zip(self.cell.parameters, self.given, starts, strict=True):
                size = tensor.numel() // len(parameter.gates) * self.item
                for i, gate in enumerate(parameter.gates):
                    self.put(f"weight:{parameter.namespace}.{gate}", start + i * size)
        self.steps_of("x", problem.x)
        for i, name in enumerate(self.cell.outside):
            value = problem.outside[i]
            if i >= len(self.cell.per_step):
                value = value.expand(self.steps, *value.shape)
            self.steps_of(f"outside:{name}", value.expand(self.steps, self.rows, self.outside_units(i)))
        for i, state in enumerate(self.cell.states):
            self.rows_of(f"start:{state}", problem.states[i])
            if problem.initial:
                self.rows_of(f"initial:{state}", problem.initial[i])
        if problem.reset is not None:
            reset = problem.reset.contiguous()
            self.given.append(reset)
            self.put("reset", reset.data_ptr())
        if problem.lengths is not None:
            self._set_active(problem.active())

    def outside_units(self, place: int) -> int:
        """How many units an outside input acts on."""
        return self.units[plans.outside_width(self.cell, self.cell.outside[place])]

    def rows_of(self, buffer: str, tensor: Tensor) -> None:
        """A buffer that is the rows [B, width] of a tensor."""
        tensor = self._readable(tensor)
        start = tensor.data_ptr()
        self.put(f"{buffer}.base", start)
        self.put(f"{buffer}.origin", start)
        self.put(f"{buffer}.size", tensor.stride(0) * self.item)

    def steps_of(self, buffer: str, tensor: Tensor, first: int = 0) -> None:
        """A buffer that is the rows of each step of a tensor [T, B, width], from step `first` on."""
        tensor = self._readable(tensor)
        step = tensor.stride(0) * self.item
        self.put(f"{buffer}.origin", tensor.data_ptr() - first * step)
        self.put(f"{buffer}.step", step)
        self.put(f"{buffer}.size", tensor.stride(1) * self.item)

    def _readable(self, tensor: Tensor) -> Tensor:
        """The tensor, copied if its rows are not runs of numbers; kept until the run is over."""
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            tensor = tensor.contiguous()
        self.given.append(tensor)
        return tensor

    # running

    def counts(self, share: Share) -> list[int]:
        """The different numbers of rows that a thread has at a step."""
        return sorted({share.running(n) for n in set(self.active)} - {0})

    def _have(self, stage: Stage, counts: Sequence[int], tiles: Sequence[tuple[int, int]]) -> None:
        """Have a stage's kernels for these numbers of rows, unless there are none."""
        if counts:
            self.code.prepare(stage, counts, self.ladder, tiles, self.units[stage.width])

    def tile_ranges(self, width: str) -> list[tuple[int, int]]:
        """The ranges of tiles that threads take in the loop."""
        return sorted({self.sharing.tiles(k, self.tiles[width]) for k in range(len(self.frames))})

    def clear(self) -> None:
        """Zero the scratch that a run adds to."""
        for address, size in self.zeroed:
            ctypes.memset(address, 0, size)

    def pack(self, crew: Crew) -> None:
        """Lay out the weights, and zero what is added to."""
        self.clear()
        packers = self._packers(crew)
        self.put("packers", packers)
        self._run(crew, self.code.pack, self.addresses[:packers])

    def walk(self, crew: Crew, first: int, last: int) -> None:
        """Walk from one phase up to another, with as many frames at once as there are threads, and wait for all."""
        self.put("walk.first", first)
        self.put("walk.last", last)
        ctypes.memset(self.values["barrier"], 0, 64)
        threads = 1 + crew.helpers if crew else 1
        for frame in range(0, len(self.frames), threads):
            self._run(crew, self.code.walk, self.addresses[frame : frame + threads])

    def add_up(self, crew: Crew) -> None:
        """Add the sums of the shards of rows."""
        if self.code.add_up and len(self.sharing.crews()) > 1:
            self._run(crew, self.code.add_up, self.addresses[: self._packers(crew)])

    def _packers(self, crew: Crew) -> int:
        return min(1 + crew.helpers if crew else 1, len(self.frames))

    def _run(self, crew: Crew, call: gang.Call, addresses: list[int]) -> None:
        if crew is None or len(addresses) == 1:
            for address in addresses:
                call.function(address)
        else:
            crew.run(call, addresses)

    def drop(self) -> None:
        """Let go of the tensors of a run."""
        self.given = []


class Settings:
    """Settings that are not in use, the last used ones, so that a run of known sizes finds everything prepared."""

    KEPT = 32
    KEPT_BYTES = 1 << 28

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.idle: OrderedDict[tuple[object, ...], list[Setting]] = OrderedDict()
        self.bytes = 0

    def take(self, key: tuple[object, ...]) -> Setting | None:
        """An idle setting for these sizes, if there is one."""
        with self.lock:
            found = self.idle.get(key)
            if not found:
                return None
            self.bytes -= found[-1].arena.size
            return found.pop()

    def give(self, key: tuple[object, ...], setting: Setting) -> None:
        """Keep a setting for later; the longest unused ones go when there are too many."""
        setting.drop()
        with self.lock:
            self.idle.setdefault(key, []).append(setting)
            self.idle.move_to_end(key)
            self.bytes += setting.arena.size
            while len(self.idle) > 1 and (len(self.idle) > self.KEPT or self.bytes > self.KEPT_BYTES):
                for old in self.idle.popitem(last=False)[1]:
                    self.bytes -= old.arena.size
                    old.arena.release()


_settings = Settings()


def _forget() -> None:
    """A forked child keeps what was prepared, under a lock that nobody holds."""
    _settings.lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def _sizes(problem: Problem) -> tuple[object, ...]:
    """What settings differ by, besides direction and threads."""
    return (
        problem.cell.hash,
        problem.x.shape,
        problem.x.dtype,
        *[parameter.shape for parameter in problem.parameters],
        *[outside.shape for outside in problem.outside],
        problem.lengths is None,
        problem.reset is None,
        problem.reverse,
    )


_sharings: dict[tuple[object, ...], Sharing] = {}


def _sharing_of(problem: Problem, sizes: tuple[object, ...], threads: int, sums: bool) -> Sharing:
    """How so many threads divide this run."""
    key = (threads, sums, *sizes)
    found = _sharings.get(key)
    if found is None:
        work = problem.rows * problem.steps * sum(p.numel() for p in problem.parameters if p.dim() == 2)
        lanes = llvm.machine().lanes(problem.x.element_size())
        tiles = -(-problem.hidden_size // lanes)
        if len(_sharings) > 4096:  # lengths that never come again
            _sharings.clear()
        step_bytes = _recurrent_bytes(problem)
        found = sharing(threads, problem.rows, tiles, problem.lengths is not None, work, step_bytes, sums)
        _sharings[key] = found
    return found


def _recurrent_bytes(problem: Problem) -> int:
    """Bytes of the weights that every step reads."""
    pairs = zip(problem.cell.parameters, problem.parameters, strict=True)
    return sum(tensor.numel() * tensor.element_size() for parameter, tensor in pairs if parameter.namespace in "UP")


# ---------------------------------------------------------------------------------------------------------------------
# Forward


def forward(problem: Problem, save: bool) -> Result:
    """Run the recurrence; with `save`, the workspace is what the backward run wants to see again.

    With segments that is not every step's values but the states at the segments' edges.
    """
    sizes = _sizes(problem)
    threads = torch.get_num_threads()
    wanted = _sharing_of(problem, sizes, threads, sums=False)
    segment = _segment(problem, sizes, say=True) if save else problem.steps
    with gang.gathered(min(threads, len(wanted.shares))) as crew:
        shared = wanted if crew else _sharing_of(problem, sizes, 1, sums=False)
        with _forward_setting(problem, sizes, save and segment == problem.steps, shared, segment) as setting:
            return setting.run(problem, crew)


def _segment(problem: Problem, sizes: tuple[object, ...], say: bool = False) -> int:
    """Steps whose inside is kept, or computed anew, at once: all of them without segments."""
    if problem.segments is None:
        return problem.steps
    block = _block(problem, _sharing_of(problem, sizes, 1, sums=True))
    return segments.length(problem.segments, problem.steps, block, say)


@contextmanager
def _forward_setting(
    problem: Problem, sizes: tuple[object, ...], save: bool, shared: Sharing, segment: int
) -> Iterator[_Forward]:
    key = ("forward", save, segment, len(shared.shares), *sizes)
    setting = _settings.take(key) or _Forward(problem, save, shared, segment)
    assert isinstance(setting, _Forward)
    yield setting
    _settings.give(key, setting)


def workspace_shapes(problem: Problem) -> list[tuple[int, ...]]:
    """The shapes of the workspace that `forward` with `save` leaves, known before it runs."""
    cell = problem.cell
    lanes = llvm.machine().lanes(problem.x.element_size())
    units = {"hidden": problem.hidden_size, "projected": problem.proj_size}
    padded = {width: -(-count // lanes) * lanes for width, count in units.items()}
    widths = [padded[width] for i, width in enumerate(cell.widths) if i != cell.output]
    segment = _segment(problem, _sizes(problem))
    if segment < problem.steps:
        edges = len(segments.ranges(problem.steps, segment)) - 1
        return [(edges, problem.rows, width) for width in widths]
    for buffer, slots in plans.forward(cell).slots.items():
        kind, width = buffer.split(":")
        if kind == "saved":
            widths.append(padded[width] * slots)
    return [(problem.steps, problem.rows, width) for width in widths]


class _Forward(Setting):
    """Forward runs: whole ones that save nothing or everything; ones in segments, and segments computed again."""

    def __init__(self, problem: Problem, save: bool, shared: Sharing, segment: int) -> None:
        cell = problem.cell
        self.save, self.segment = save, segment
        streaming = save and _saved_bytes(problem, segment) > STREAMED_BYTES
        super().__init__(problem, compiled(cell, problem.x.element_size(), "forward", save, streaming), shared)
        plan = self.code.plan
        for i, state in enumerate(cell.states):
            self.put(f"before:{state}.count", self.sizes[i])
            self.put(f"before:{state}.entry", 8)
            self.put(f"history:{state}.depth", 0 if save or i == cell.output else 2)
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

    def run(self, problem: Problem, crew: Crew) -> Result:
        """One run on these tensors, all of it; in segments if they are shorter."""
        output = _like_input(problem)
        workspace = [memory.tensor(shape, self.dtype) for shape in workspace_shapes(problem)] if self.keeps else []
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

    @property
    def keeps(self) -> bool:
        """Whether a backward run will follow."""
        return self.save or self.segment < self.steps

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


def _saved_bytes(problem: Problem, steps: int) -> int:
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


# ---------------------------------------------------------------------------------------------------------------------
# Backward


def backward(
    problem: Problem,
    result: Result,
    d_output: Tensor | None,
    d_states: Sequence[Tensor | None],
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """The gradients of `problem.tensors`, None where `needs` says so; an adjoint of None is zero."""
    sizes = _sizes(problem)
    threads = torch.get_num_threads()
    segment = _segment(problem, sizes)
    again = segment < problem.steps
    wanted = _sharing_of(problem, sizes, threads, sums=True)
    with gang.gathered(min(threads, len(wanted.shares))) as crew, ExitStack() as used:
        shared = wanted if crew else _sharing_of(problem, sizes, 1, sums=True)
        key = ("backward", tuple(needs), len(shared.shares), *sizes)
        setting = _settings.take(key) or _Backward(problem, needs, shared)
        assert isinstance(setting, _Backward)
        kept: _Kept | _Again
        if again:
            same = _sharing_of(problem, sizes, threads if crew else 1, sums=False)
            forward_setting = used.enter_context(_forward_setting(problem, sizes, True, same, segment))
            kept = _Again(forward_setting, problem, result, crew)
        else:
            kept = _Kept(problem, result)
        gradients = setting.run(problem, kept, d_output, d_states, crew)
        _settings.give(key, setting)
        return gradients


@dataclass(frozen=True)
class Values:
    """What a forward run left of some steps: each state from `before` steps ahead of `first` on, what it saved."""

    histories: tuple[Tensor, ...]
    saved: tuple[Tensor, ...]
    first: int = 0
    before: int = 0


class _Kept:
    """Every step's values, as the forward run kept them."""

    def __init__(self, problem: Problem, result: Result) -> None:
        self.result, self.output = result, problem.cell.output
        self.ranges = [(0, problem.steps)]

    def values(self, first: int, last: int) -> Values:
        """All of them."""
        others = len(self.result.states) - 1
        histories = list(self.result.workspace[:others])
        histories.insert(self.output, self.result.output)
        return Values(tuple(histories), self.result.workspace[others:])


class _Again:
    """A segment's values, computed anew from the states before it."""

    def __init__(self, setting: _Forward, problem: Problem, result: Result, crew: Crew) -> None:
        self.setting, self.result, self.crew = setting, result, crew
        self.output, self.reverse, self.steps = problem.cell.output, problem.reverse, problem.steps
        self.ranges = segments.ranges(problem.steps, setting.segment)[::-1]
        rows, dtype = problem.rows, problem.x.dtype
        widths = [setting.tiles[width] * setting.lanes for width in setting.cell.widths]
        self.histories = [memory.tensor((setting.segment + 1, rows, width), dtype) for width in widths]
        self.saved = [memory.tensor((setting.segment, rows, width), dtype) for width in setting.saved_widths()]
        setting.open(problem, crew)

    def values(self, first: int, last: int) -> Values:
        """The values of these phases. The state before them lies beside them: one step earlier in the run's time."""
        edge = last - first if self.reverse else 0
        number = first // self.setting.segment - 1
        if number >= 0:
            time = self.steps - first if self.reverse else first - 1
            edges = list(self.result.workspace)
            edges.insert(self.output, self.result.output)
            for i, (history, kept) in enumerate(zip(self.histories, edges, strict=True)):
                before = kept[time if i == self.output else number]
                history[edge, :, : before.shape[1]] = before
        start, before_start = (self.steps - last, 0) if self.reverse else (first, 1)
        self.setting.point(start, self.histories, self.saved, before_start)
        self.setting.walk(self.crew, first, last)
        return Values(tuple(self.histories), tuple(self.saved), start, before_start)


def _block(problem: Problem, shared: Sharing) -> int:
    """The steps of a block: their deltas fit the ring, and are rows enough to be worth a sum, but not too many."""
    item = problem.x.element_size()
    lanes = llvm.machine().lanes(item)
    units = {"hidden": problem.hidden_size, "projected": problem.proj_size}
    rows = max(share.count for share in shared.shares)
    rings = [
        (slots, b.split(":")[1]) for b, slots in plans.backward(problem.cell).slots.items() if b.startswith("ring")
    ]
    step = sum(slots * -(-units[width] // lanes) for slots, width in rings) * lanes * item * rows
    block = max(1, RING_BYTES // max(1, step), -(-RING_ROWS // rows))
    return max(1, min(problem.steps, block, MOST_RING_ROWS // rows))


class _Backward(Setting):
    plan: BackwardPlan

    def __init__(self, problem: Problem, needs: Sequence[bool], shared: Sharing) -> None:
        cell = problem.cell
        super().__init__(problem, compiled(cell, problem.x.element_size(), "backward", True, False), shared)
        assert isinstance(self.code.plan, BackwardPlan)
        self.plan = self.code.plan
        counts = [1, len(cell.states), len(cell.parameters), len(cell.outside), len(problem.initial)]
        edges = [sum(counts[:i]) for i in range(len(counts) + 1)]
        self.needs = [list(needs[a:b]) for a, b in pairwise(edges)]
        self.resets = problem.reset is not None
        self.most_rows = max(share.count for share in shared.shares)
        self.block = _block(problem, shared)
        self.ring_rows = self.block * self.most_rows
        self.put("block", self.block)
        self.put("ring.rows", self.ring_rows)
        self.put("outer", ctypes.addressof(outer_table(self.item)))
        self.put("gather", ctypes.addressof(gather_table(self.item)))
        self.put("d_x.wanted", int(self.needs[0][0] and _has_input_product(cell)))
        self.put("leaving", int(any(self.needs[1]) or self.resets))
        self._parts(problem)
        self._buffers()
        self._tables()
        self._weights()
        self._inputs()
        self.used = [stage for stage in self.code.stages if self._is_used(stage)]
        for stage in self.used:
            self.panel(stage)
        self._prepare()

    def _parts(self, problem: Problem) -> None:
        """Gradients of the rows of every frame but the first, which are added to the first one's in the end."""
        self.crews = self.sharing.crews()
        self.parts: dict[str, list[int]] = {}
        self.part_tables: dict[str, int] = {}
        for parameter, tensor, need in zip(self.cell.parameters, problem.parameters, self.needs[2], strict=True):
            others = self.crews[1:]
            self.parts[parameter.name] = [self.arena.bytes(tensor.numel() * self.item) if need else 0 for _ in others]
            self.part_tables[parameter.name] = self.arena.integers(self.parts[parameter.name] or [0])
        self.put("sums", self.arena.bytes(8 + 32 * len(self.cell.parameters)))

    def _buffers(self) -> None:
        for buffer, slots in self.plan.slots.items():
            kind, width = buffer.split(":")
            if kind == "ring":
                for crew in self.sharing.crews():
                    self._ring(crew, buffer, width, slots)
            elif kind in ("carry", "scratch"):
                self.tiled(buffer, self.rows, width, slots)
                if kind == "carry":
                    size = self.rows * self.values[f"{buffer}.size"]
                    self.zeroed.append((self.values[f"{buffer}.origin"], size))
        for operand, place in self.plan.operands.items():
            name, width = place.data[0], plans.operand_width(self.cell, operand)
            self.tiled(name, 0, width, 1)
            for crew in self.sharing.crews():
                self.put_all(crew, f"{name}.origin", self.arena.bytes(self.ring_rows * self.values[f"{name}.row"]))

    def put_all(self, crew: list[int], name: str, value: int) -> None:
        """Set a field of the frames that see the same buffers."""
        self.values.setdefault(name, value)
        for frame in crew:
            self.put_for(frame, name, value)

    def _ring(self, crew: list[int], buffer: str, width: str, slots: int) -> None:
        """[tiles][rows][slots] of vectors; after the block's rows come those kept from the block before, then zeros."""
        size = slots * self.vector_bytes
        rows = self.ring_rows + self.most_rows + 1
        tile = rows * size + 128  # so that the tiles of a row do not fall on one set of the first cache
        base = self.arena.bytes(tile * self.tiles[width])
        zero = base + (rows - 1) * size
        for number in range(self.tiles[width]):
            ctypes.memset(zero + number * tile, 0, size)
        parts = {"size": size, "row": size, "tile": tile, "tiles": self.tiles[width], "origin": base, "base": base}
        for part, value in {**parts, "zero": zero}.items():
            self.put_all(crew, f"{buffer}.{part}", value)
        following = buffer.replace("ring:", "ring_next:")
        self.put(f"{following}.tile", tile)
        self.put(f"{following}.tiles", self.tiles[width])
        self.put(f"{following}.row", 8)
        for frame in crew:
            self.put_for(frame, f"{following}.base", self.arena.bytes(self.most_rows * 8))
        vectors = [n for n, p in zip(self.needs[2], self.cell.parameters, strict=True) if not p.is_matrix]
        if any(vectors):
            self.put(f"column_sums:{width}", columns(self.item, slots, 0))
            self.put(f"sums:{width}.wanted", 1)
            sums = self.cleared(self.tiles[width] * slots * self.vector_bytes)
            self.put_all(crew, f"sums:{width}.base", sums)

    def _tables(self) -> None:
        """Tables of row addresses, an entry for each row of the ring."""
        names = [f"before:{state}" for state in self.cell.states] + ["x_rows", "d_x_rows"]
        for crew in self.sharing.crews():
            for name in [*names, *(place.data[0] for place in self.plan.operands.values())]:
                self.put_all(crew, f"{name}.table", self.arena.bytes(self.ring_rows * 8))
        for state in self.cell.states:
            self.put(f"before:{state}.entry", 8)
        for frame in range(len(self.frames)):
            panel = CHUNK * OUTER_COLUMNS * self.vector_bytes
            self.put_for(frame, "panel.base", self.arena.bytes(panel))

    def _weights(self) -> None:
        """Which weight gradients are wanted, and room for those of few columns."""
        need = {p.namespace: n for p, n in zip(self.cell.parameters, self.needs[2], strict=True)}
        adjoint = calculus.adjoint(self.cell)
        for number, (operand, products) in enumerate(self.plan.weights.items()):
            wanted = [product for product in products if need[product.data[0]]]
            if not wanted:
                continue
            self.put(f"weights{number}.wanted", 1)
            self.put(f"weights{number}.columns", self._columns(operand))
            ring = self.plan.delta_slot[adjoint.delta[products[0]]].data[0]
            width = ring.split(":")[1]
            if operand.op == "input" and self._columns(operand) <= FEW_COLUMNS:
                slots, count = self.plan.slots[ring], self._columns(operand)
                size = self.tiles[width] * count * slots * self.vector_bytes
                for crew in self.sharing.crews():
                    self.put_all(crew, f"few{number}.base", self.cleared(size))
                self.put(f"few{number}.kernel", columns(self.item, slots, count))
            else:
                outer(self.item, self.units[width], self._columns(operand))

    def _inputs(self) -> None:
        """Dot products for the gradient of an x of few numbers."""
        stage = next((s for s in self.code.stages if s.name == "input_gradient"), None)
        if stage is None or len(stage.groups) != 1 or self.units["input"] > FEW_INPUTS:
            return
        group = stage.groups[0]
        runs = kernels.slot_runs(self.plan.ring_slots(group))
        if len(runs) == 1:
            slots = self.plan.slots[group.operand.data[0].replace("ring_all:", "ring:")]
            self.put("few_inputs", 1)
            self.put("dot", dot(self.item, slots, *runs[0], self.units["input"]))

    def _columns(self, operand: Node) -> int:
        if operand.op == "input":
            return self.units["input"]
        if operand.op == "state":
            return self.sizes[self.cell.states.index(operand.data[0])]
        return self.units[plans.operand_width(self.cell, operand)]

    def _is_used(self, stage: Stage) -> bool:
        if stage.name == "input_gradient":
            return bool(self.values["d_x.wanted"])
        return stage.name.startswith("stage") or bool(self.values["leaving"])

    def _prepare(self) -> None:
        """The kernels for the numbers of rows of this run."""
        for share in self.sharing.shares:
            counts = self.counts(share)
            for stage in self.used:
                if stage.name != "input_gradient":
                    self._have(stage, counts, self.tile_ranges(stage.width))
                elif not self.values.get("few_inputs"):
                    self._have(stage, self._gradient_counts(), [(0, self.tiles["input"])])

    def _gradient_counts(self) -> list[int]:
        """Numbers of rows of a block whose input gradients a frame takes."""
        active = self.active[::-1] if self.reverse else self.active
        pieces = len(self.frames) if self.sharing.units_shared else 1
        found: set[int] = set()
        for share in self.sharing.shares:
            counts = [share.running(n) for n in active]
            for begin in range(0, len(counts), self.block):
                rows = sum(counts[begin : begin + self.block])
                found |= {rows * (k + 1) // pieces - rows * k // pieces for k in range(pieces)}
        return sorted(found - {0})

    # one run

    def run(
        self,
        problem: Problem,
        kept: _Kept | _Again,
        d_output: Tensor | None,
        d_states: Sequence[Tensor | None],
        crew: Crew,
    ) -> tuple[Tensor | None, ...]:
        """One run on these tensors."""
        self.bind(problem)
        if problem.lengths is not None:
            self._prepare()
        if d_output is None:
            d_output = torch.zeros_like(kept.result.output)
        self.steps_of("d_output", d_output)
        self._look_ahead("d_output")
        self._bind_opening(problem, d_output, d_states[self.cell.output])
        self._make_gradients(problem, d_states)
        self.pack(crew)
        self._carry(d_states)
        for first, last in kept.ranges:
            self._bind_values(kept.values(first, last))
            self.walk(crew, first, last)
        self.add_up(crew)
        return self._gradients(problem)

    def _bind_values(self, values: Values) -> None:
        """What the forward run left of the steps to come."""
        for state, history in zip(self.cell.states, values.histories, strict=True):
            self.steps_of(f"history:{state}", history, values.first - values.before)
            self.steps_of(f"after:{state}", history, values.first - values.before)
            self._look_ahead(f"after:{state}")
        saved = iter(values.saved)
        for buffer, slots in plans.forward(self.cell).slots.items():
            if buffer.startswith("saved"):
                self.steps_of(buffer, next(saved), values.first)
                self.put(f"{buffer}.tile", slots * self.vector_bytes)
                self._look_ahead(buffer)

    def _look_ahead(self, buffer: str) -> None:
        """How far from a step of a buffer the next one back in time of the run lies."""
        step = self.values[f"{buffer}.step"]
        self.put(f"{buffer}.ahead", step if self.reverse else -step)

    def _bind_opening(self, problem: Problem, d_output: Tensor, d_last: Tensor | None) -> None:
        """The adjoint of the output state at each row's last phase, where the final state adds to it."""
        if d_last is None:
            self.put("d_output_open.origin", 0)
        elif problem.reverse or problem.lengths is None:
            self.rows_of("d_output_open", d_output[0 if problem.reverse else -1] + d_last)
        else:
            times = torch.tensor(problem.lengths).sub_(1).clamp_(min=0)
            self.rows_of("d_output_open", d_output[times, torch.arange(self.rows)] + d_last)

    def _make_gradients(self, problem: Problem, d_states: Sequence[Tensor | None]) -> None:
        """Tensors for the gradients."""
        cell, x = self.cell, problem.x
        self.d_x = self.d_x_direct = None
        if self.needs[0][0]:
            whole = problem.lengths is None and _has_input_product(cell)
            batch_first = self.rows > 1 and x.stride(0) < x.stride(1)
            lead = (self.rows, self.steps) if batch_first else (self.steps, self.rows)
            d_x = memory.result((*lead, x.shape[2]), self.dtype)
            if not whole:
                d_x.zero_()
            self.d_x = d_x.transpose(0, 1) if batch_first else d_x
            self.steps_of("d_x", self.d_x)
        if any(place.data[0] == "d_x_direct" for stage in self.plan.stages for _, place in stage.stores):
            self.d_x_direct = torch.zeros_like(x, memory_format=torch.contiguous_format)
            self.steps_of("d_x_direct", self.d_x_direct)
        self.d_outside = []
        for place, name in enumerate(cell.outside):
            d = x.new_zeros(self.steps, self.rows, self.outside_units(place))
            self.d_outside.append(d)
            self.steps_of(f"d_outside:{name}", d)
        self.d_start: list[Tensor | None] = [None] * len(cell.states)
        self.d_initial: list[Tensor | None] = [None] * len(problem.initial)
        if self.values["leaving"]:
            self._make_state_gradients(problem, d_states)
        self.d_parameters: list[Tensor | None] = []
        entries = [0]
        for parameter, tensor, need in zip(cell.parameters, problem.parameters, self.needs[2], strict=True):
            d_parameter = memory.result(tensor.shape, self.dtype) if need else None
            self.d_parameters.append(d_parameter)
            starts = [d_parameter.data_ptr() if d_parameter is not None else 0, *self.parts[parameter.name]]
            columns_of = tensor.shape[1] if parameter.is_matrix else 1
            size = tensor.shape[0] // len(parameter.gates) * columns_of * self.item
            for i, gate in enumerate(parameter.gates):
                label = f"d_weight:{parameter.namespace}.{gate}"
                self.put(f"{label}.stride", columns_of * self.item)
                for crew, start in zip(self.crews, starts, strict=True):
                    for frame in crew:
                        self.put_for(frame, f"{label}.base", start + i * size if start else 0)
            if need:
                entries += [starts[0], self.part_tables[parameter.name], len(starts) - 1, tensor.numel()]
        entries[0] = len(entries) // 4
        ctypes.memmove(self.values["sums"], (ctypes.c_int64 * len(entries))(*entries), 8 * len(entries))

    def _make_state_gradients(self, problem: Problem, d_states: Sequence[Tensor | None]) -> None:
        for i, state in enumerate(self.cell.states):
            d_start = torch.zeros(self.rows, self.sizes[i], dtype=self.dtype)
            self.d_start[i] = d_start
            self.rows_of(f"d_start:{state}", d_start)
            self.put(f"leaving:{state}.size", self.values[f"d_start:{state}.size"])
            if self.resets:
                d_initial = self.d_initial[i] = torch.zeros_like(d_start)
                self.rows_of(f"d_initial:{state}", d_initial)
            d_last = d_states[i]
            if d_last is not None and problem.lengths is not None and 0 in problem.lengths:
                empty = torch.tensor([length == 0 for length in problem.lengths])
                d_start[empty] = d_last[empty]  # a row without steps hands its state through

    def _carry(self, d_states: Sequence[Tensor | None]) -> None:
        """What the final states' adjoints add to the states that are carried unit by unit."""
        for state, place in self.plan.direct.items():
            index = self.cell.states.index(state)
            d_last = d_states[index]
            if index == self.cell.output or d_last is None:
                continue
            buffer, slot = place.data
            width = buffer.split(":")[1]
            tiles = self.tiles[width]
            shape = (self.rows, tiles, self.plan.slots[buffer], self.lanes)
            whole = self.arena.view(self.values[f"{buffer}.origin"], shape, self.dtype)
            padded = torch.nn.functional.pad(d_last, (0, tiles * self.lanes - self.sizes[index]))
            whole[:, :, slot] = padded.view(self.rows, tiles, self.lanes)

    # results

    def _gradients(self, problem: Problem) -> tuple[Tensor | None, ...]:
        cell = self.cell
        if self.d_x is not None and self.d_x_direct is not None:
            self.d_x += self.d_x_direct
        d_outside: list[Tensor | None] = []
        for i, (d, value) in enumerate(zip(self.d_outside, problem.outside, strict=True)):
            d = d if i < len(cell.per_step) else d.sum(0)
            d_outside.append(d.sum(-1, keepdim=True) if value.shape[-1] < d.shape[-1] else d)
        groups = [[self.d_x], self.d_start, self.d_parameters, d_outside, self.d_initial]
        gradients = tuple(
            d if need else None
            for ds, needs in zip(groups, self.needs, strict=True)
            for d, need in zip(ds, needs, strict=True)
        )
        self.d_x, self.d_x_direct, self.d_start, self.d_parameters = None, None, [], []
        self.d_outside, self.d_initial = [], []
        return gradients


def _has_input_product(cell: Cell) -> bool:
    return any(product.args[0].op == "input" for product in cell.products)
