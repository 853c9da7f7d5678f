"""Fused kernels for CPUs: prepares buffers and frames, shares out the work, and runs a driver on each thread.

Everything of size lives here: which tilings are needed (their kernels are compiled when first asked for), how many
steps make a block, which thread takes which rows or units. None of it changes a bit of a row's values; the block of the
backward pass, which orders the sums of the weight gradients, depends on the sizes alone.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache as remembered

import torch
from torch import Tensor

from throughtime.engine import plan as plans
from throughtime.engine.plan import BackwardPlan, Plan, Stage
from throughtime.engine.problem import Problem, Result
from throughtime.engine.targets import cache, drivers, gang, kernels, llvm, memory
from throughtime.engine.targets.drivers import LIMIT, OUTER_COLUMNS, OUTER_ROWS, tiling
from throughtime.equations import calculus
from throughtime.equations.cell import Cell
from throughtime.equations.expr import Node

DRIVE_BYTES = 256 * 1024
"""Input products kept per thread before the steps that use them: a part of the second cache."""

RING_BYTES = 512 * 1024
"""Deltas kept before their share of the gradients is taken: they should still be in the second caches then."""

RING_ROWS = 128
"""The fewest rows a block of the backward pass should have, so that the gradients it adds to are not read too often."""

ALONE = 1_000_000
"""Multiply-adds of a whole run below which one thread is quicker than the meeting of several."""


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
# Compiled code


class Compiled:
    """The driver of one cell, direction and format, and the kernels that have been needed so far."""

    def __init__(self, cell: Cell, itemsize: int, direction: str, save: bool) -> None:
        self.cell, self.itemsize, self.save = cell, itemsize, save
        self.plan: Plan = plans.backward(cell) if direction == "backward" else plans.forward(cell)
        self.frame = drivers.frame_of(cell, self.plan)
        self.stages = drivers.stages_of(self.plan, cell)
        self.key = (cell.hash, direction, itemsize)
        make = drivers.BackwardDriver if direction == "backward" else drivers.ForwardDriver
        self.driver = cache.function(
            (*self.key, "driver"), direction, lambda: make(direction, cell, self.plan, self.frame, itemsize).text()
        )
        self.table = (ctypes.c_int64 * (len(self.stages) * drivers.TABLE_BYTES // 8))()
        self.limits = (ctypes.c_int64 * (len(self.stages) * (LIMIT + 1)))()
        for number, stage in enumerate(self.stages):
            vectors = kernels.vectors_per_tile(stage)
            for rows in range(1, LIMIT + 1):
                self.limits[number * (LIMIT + 1) + rows] = kernels.tile_limit(vectors, rows)
        self.ready: set[tuple[object, ...]] = set()

    def prepare(self, stage: Stage, counts: Iterable[int], tiles: Sequence[tuple[int, int]], units: int) -> None:
        """Have every kernel that the driver will look up for these numbers of rows and ranges of tiles."""
        for count in counts:
            key = (stage.name, count, tuple(tiles), units)
            if key not in self.ready:
                self._prepare(stage, count, tiles, units)
                self.ready.add(key)

    def _prepare(self, stage: Stage, count: int, tiles: Sequence[tuple[int, int]], units: int) -> None:
        vectors = kernels.vectors_per_tile(stage)
        lanes = llvm.machine().lanes(self.itemsize)
        heights = tiling(count, kernels.row_limit(vectors))
        if not heights:
            return
        at_once = kernels.tile_limit(vectors, max(heights))
        for begin, end in tiles:
            for height in heights:
                for width in tiling(end - begin, at_once):
                    partial = end * lanes > units
                    if partial:
                        self._kernel(stage, kernels.Shape(height, width, tail=True))
                    if not partial or end - begin > width:
                        self._kernel(stage, kernels.Shape(height, width, tail=False))

    def _kernel(self, stage: Stage, shape: kernels.Shape) -> None:
        number = next(i for i, s in enumerate(self.stages) if s.name == stage.name)
        place = ((number * 2 + shape.tail) * (LIMIT + 1) + shape.rows) * (LIMIT + 1) + shape.tiles
        if self.table[place]:
            return
        key = (*self.key, stage.name, self.save, shape)

        def write() -> str:
            return kernels.StageKernel("kernel", self.plan, stage, shape, self.frame, self.itemsize, self.save).text()

        self.table[place] = cache.function(key, "kernel", write)


@remembered
def compiled(cell: Cell, itemsize: int, direction: str, save: bool) -> Compiled:
    """The code of a cell; made once per process, loaded from the cache where it is there."""
    return Compiled(cell, itemsize, direction, save)


@remembered
def transpose(itemsize: int) -> int:
    """The kernel that packs weights for products with rows."""
    return cache.function(("transpose", itemsize), "kernel", lambda: kernels.transpose_kernel("kernel", itemsize))


@remembered
def gather(itemsize: int, vectors: int) -> int:
    """The kernel that packs an operand's rows."""
    write = lambda: kernels.gather_kernel("kernel", vectors, itemsize)  # noqa: E731
    return cache.function(("gather", itemsize, vectors), "kernel", write)


@remembered
def columns(itemsize: int, slots: int, operand: int) -> int:
    """The kernel that sums a ring's slots, times an operand's few numbers if there are any."""
    write = lambda: kernels.column_kernel("kernel", slots, operand, itemsize)  # noqa: E731
    return cache.function(("columns", itemsize, slots, operand), "kernel", write)


_OUTER_PLACES = 2 * (OUTER_ROWS + 1) * (OUTER_COLUMNS + 1)


@remembered
def _outer_table(itemsize: int) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * _OUTER_PLACES)()


@remembered
def _gather_table(itemsize: int) -> ctypes.Array[ctypes.c_int64]:
    table = (ctypes.c_int64 * (OUTER_COLUMNS + 1))()
    for vectors in range(1, OUTER_COLUMNS + 1):
        table[vectors] = gather(itemsize, vectors)
    return table


@remembered
def outer(itemsize: int, units: int, operand: int) -> int:
    """The table of weight-gradient kernels, with those in it that these sizes need."""
    table = _outer_table(itemsize)
    lanes = llvm.machine().lanes(itemsize)
    heights: set[int] = set()
    for of_tile in {min(units, lanes), units % lanes or lanes}:
        heights |= {min(OUTER_ROWS, of_tile - first) for first in range(0, of_tile, OUTER_ROWS)}
    for taken in tiling(-(-operand // lanes), OUTER_COLUMNS):
        for masked in {operand % lanes != 0, False}:
            for rows in heights:
                place = (masked * (OUTER_ROWS + 1) + rows) * (OUTER_COLUMNS + 1) + taken
                if not table[place]:
                    key = ("outer", itemsize, rows, taken, masked)
                    write = lambda r=rows, t=taken, m=masked: kernels.outer_kernel("kernel", r, t, m, itemsize)  # noqa: E731
                    table[place] = cache.function(key, "kernel", write)
    return ctypes.addressof(table)


# ---------------------------------------------------------------------------------------------------------------------
# Sharing the work


@dataclass(frozen=True)
class Share:
    """One thread's rows of the batch (first, step, how many) and whether it takes only its part of the units."""

    first: int
    stride: int
    count: int


@dataclass(frozen=True)
class Sharing:
    """How threads divide a run: by rows, or all rows by units."""

    shares: tuple[Share, ...]
    units_shared: bool

    def tiles(self, thread: int, total: int) -> tuple[int, int]:
        """A thread's tiles of units in the loop."""
        if not self.units_shared:
            return 0, total
        threads = len(self.shares)
        return total * thread // threads, total * (thread + 1) // threads


def sharing(threads: int, rows: int, tiles: int, ragged: bool, work: int) -> Sharing:
    """Rows where there are enough of them, else units where there are enough of those, else one thread."""
    if threads > 1 and work >= ALONE:
        if rows >= 8 * threads:
            if ragged:
                return Sharing(tuple(Share(k, threads, -(-(rows - k) // threads)) for k in range(threads)), False)
            edges = [rows * k // threads for k in range(threads + 1)]
            if rows % (8 * threads):
                edges = [min(rows, -(-edge // 8) * 8) if rows >= 32 * threads else edge for edge in edges]
            return Sharing(tuple(Share(a, 1, b - a) for a, b in zip(edges, edges[1:], strict=False)), False)
        if tiles >= 4 * threads and work >= 8 * ALONE:
            return Sharing(tuple(Share(0, 1, rows) for _ in range(threads)), True)
        if rows >= 2 * threads:
            edges = [rows * k // threads for k in range(threads + 1)]
            return Sharing(tuple(Share(a, 1, b - a) for a, b in zip(edges, edges[1:], strict=False)), False)
    return Sharing((Share(0, 1, rows),), False)


class Setting:
    """The sizes of one run, and the fields that every thread's frame has in common."""

    def __init__(self, problem: Problem, code: Compiled) -> None:
        self.problem, self.code, self.cell = problem, code, problem.cell
        self.item = problem.x.element_size()
        self.lanes = llvm.machine().lanes(self.item)
        self.vector_bytes = self.lanes * self.item
        self.hidden = problem.hidden_size
        projections = [tensor for p, tensor in zip(self.cell.parameters, problem.parameters) if p.namespace == "P"]
        projected = projections[0].shape[0] if projections else 0
        self.units = {"hidden": self.hidden, "projected": projected, "input": problem.x.shape[2]}
        self.tiles = {width: -(-units // self.lanes) for width, units in self.units.items()}
        self.active = problem.active()
        work = problem.rows * problem.steps * sum(p.numel() for p in problem.parameters if p.dim() == 2)
        self.sharing = sharing(
            torch.get_num_threads(), problem.rows, self.tiles["hidden"], problem.lengths is not None, work
        )
        self.arena = memory.Arena()
        self.values: dict[str, int] = {}
        self.common()

    def common(self) -> None:
        """Fields of sizes, of the weights and of the rows that are read."""
        problem, values = self.problem, self.values
        values["yield"] = gang.yield_address()
        values["steps"] = values["phase.last"] = problem.steps
        values["reverse"] = int(problem.reverse)
        values["rows.batch"] = problem.rows
        values["active"] = self.arena.integers(self.active)
        values["kernels"] = ctypes.addressof(self.code.table)
        values["tile_limits"] = ctypes.addressof(self.code.limits)
        values["transpose"] = transpose(self.item)
        for width, units in self.units.items():
            values[f"tiles:{width}"] = values[f"tiles.last:{width}"] = self.tiles[width]
            values[f"units:{width}"] = units
            values[f"lanes:{width}"] = units - (self.tiles[width] - 1) * self.lanes
        self.parameters = [tensor.contiguous() for tensor in problem.parameters]
        for parameter, tensor in zip(self.cell.parameters, self.parameters, strict=True):
            size = tensor.numel() // len(parameter.gates) * self.item
            for i, gate in enumerate(parameter.gates):
                values[f"weight:{parameter.namespace}.{gate}"] = tensor.data_ptr() + i * size
        self.given: list[Tensor] = []
        self.steps_of("x", problem.x)
        for place, name in enumerate(self.cell.outside):
            self.steps_of(f"outside:{name}", self.outside(place))
        for i, state in enumerate(self.cell.states):
            self.rows_of(f"start:{state}", problem.states[i])
            if problem.initial:
                self.rows_of(f"initial:{state}", problem.initial[i])
        if problem.reset is not None:
            reset = problem.reset.contiguous()
            self.given.append(reset)
            values["reset"] = reset.data_ptr()
        for width, slots in self.code.plan.vectors.items():
            values[f"vectors:{width}.tile"] = len(slots) * self.vector_bytes

    def outside(self, place: int) -> Tensor:
        """An outside input as [T, B, H]; one number per row is spread over the units, by copy."""
        value = self.problem.outside[place]
        if place >= len(self.cell.per_step):
            value = value.expand(self.problem.steps, *value.shape)
        return value.expand(*value.shape[:2], self.outside_units(place))

    def outside_units(self, place: int) -> int:
        """How many units an outside input acts on."""
        return self.units[plans.outside_width(self.cell, self.cell.outside[place])]

    def rows_of(self, buffer: str, tensor: Tensor) -> None:
        """A buffer that is the rows [B, width] of a tensor."""
        tensor = self.readable(tensor)
        self.values[f"{buffer}.base"] = self.values[f"{buffer}.origin"] = tensor.data_ptr()
        self.values[f"{buffer}.size"] = tensor.stride(0) * self.item

    def steps_of(self, buffer: str, tensor: Tensor) -> None:
        """A buffer that is the rows of each step of a tensor [T, B, width]."""
        tensor = self.readable(tensor)
        self.values[f"{buffer}.origin"] = tensor.data_ptr()
        self.values[f"{buffer}.step"] = tensor.stride(0) * self.item
        self.values[f"{buffer}.size"] = tensor.stride(1) * self.item

    def readable(self, tensor: Tensor) -> Tensor:
        """The tensor, copied if its rows are not runs of numbers; kept until the run is over."""
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            tensor = tensor.contiguous()
        self.given.append(tensor)
        return tensor

    def tiled(self, buffer: str, rows: int, width: str, slots: int) -> None:
        """A scratch buffer [rows][tiles][slots] of vectors for each thread or for all."""
        values = self.values
        values[f"{buffer}.tile"] = slots * self.vector_bytes
        values[f"{buffer}.row"] = values[f"{buffer}.size"] = self.tiles[width] * slots * self.vector_bytes
        base = self.arena.bytes(rows * values[f"{buffer}.row"])
        values[f"{buffer}.base"] = values[f"{buffer}.origin"] = base

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
            self.values[f"{name}.tile"] = size
            self.values[f"{name}.base"] = self.arena.bytes(self.tiles[stage.width] * size)

    def frames(self) -> list[ctypes.Array[ctypes.c_int64]]:
        """A frame for each thread, alike but for the thread's share and its private buffers."""
        place = self.code.frame.place
        base = (ctypes.c_int64 * len(place))()
        self.values["threads"] = len(self.sharing.shares)
        self.values["units_shared"] = int(self.sharing.units_shared)
        self.values["barrier"] = self.arena.integers([0] * 16)
        for name, value in self.values.items():
            base[place[name]] = value
        frames = []
        for thread, share in enumerate(self.sharing.shares):
            frame = (ctypes.c_int64 * len(place))()
            ctypes.memmove(frame, base, ctypes.sizeof(base))
            own = {"thread": thread, "rows.first": share.first, "rows.stride": share.stride, "rows.count": share.count}
            for width in self.units:
                first, last = self.sharing.tiles(thread, self.tiles[width])
                own[f"tiles.first:{width}"], own[f"tiles.last:{width}"] = first, last
            own |= self.private(thread, share)
            for name, value in own.items():
                frame[place[name]] = value
            frames.append(frame)
        return frames

    def private(self, thread: int, share: Share) -> dict[str, int]:
        """Fields that differ from thread to thread."""
        return {}

    def counts(self, share: Share) -> list[int]:
        """The different numbers of rows that a thread has at a step."""
        found = {max(0, min(share.count, -(-(n - share.first) // share.stride))) for n in set(self.active)}
        return sorted(found - {0})

    def tile_ranges(self, width: str) -> list[tuple[int, int]]:
        """The ranges of tiles that threads take in the loop."""
        return sorted({self.sharing.tiles(k, self.tiles[width]) for k in range(len(self.sharing.shares))})

    def execute(self) -> None:
        """Run the driver on every thread's frame and wait for all of them."""
        with gang.gathered(len(self.sharing.shares)) as crew:
            if crew is None and len(self.sharing.shares) > 1:
                shares = (Share(0, 1, self.problem.rows),)
                self.sharing = Sharing(shares, False)
            self.ready()
            frames = self.frames()
            addresses = [ctypes.addressof(frame) for frame in frames]
            if crew is None:
                gang.Function(self.code.driver)(addresses[0])
            else:
                crew.run(self.code.driver, addresses)

    def ready(self) -> None:
        """Buffers and kernels for the sharing that was settled on."""
        raise NotImplementedError


# ---------------------------------------------------------------------------------------------------------------------
# Forward


def forward(problem: Problem, save: bool) -> Result:
    """Run the recurrence; with `save`, the workspace is what the backward run wants to see again."""
    return _Forward(problem, save).run()


class _Forward(Setting):
    def __init__(self, problem: Problem, save: bool) -> None:
        self.save = save
        super().__init__(problem, compiled(problem.cell, problem.x.element_size(), "forward", save))

    def run(self) -> Result:
        problem, cell, values = self.problem, self.cell, self.values
        self.output = _like_input(problem)
        self.histories: list[Tensor] = []
        depth = 0 if self.save else 2
        for i, state in enumerate(cell.states):
            if i == cell.output:
                history = self.output
            else:
                rows = problem.steps if self.save else 2
                history = memory.tensor((rows, problem.rows, self.tiles[cell.widths[i]] * self.lanes), problem.x.dtype)
                values[f"history:{state}.depth"] = depth
            self.histories.append(history)
            for buffer in (f"history:{state}", f"next:{state}"):
                self.steps_of(buffer, history)
            values[f"before:{state}.count"] = problem.sizes[i]
            values[f"before:{state}.entry"] = 8
        self.workspace = [h for i, h in enumerate(self.histories) if i != cell.output] if self.save else []
        values["x_rows.count"], values["x_rows.row"] = problem.x.shape[2], 8
        for buffer, slots in self.code.plan.slots.items():
            kind, width = buffer.split(":")
            if kind == "saved" and self.save:
                whole = memory.tensor((problem.steps, problem.rows, self.tiles[width] * slots * self.lanes), problem.x.dtype)
                self.workspace.append(whole)
                self.steps_of(buffer, whole)
                values[f"{buffer}.tile"] = slots * self.vector_bytes
        try:
            self.execute()
            return Result(self.output, self._last_states(), tuple(self.workspace))
        finally:
            self.arena.release()

    def ready(self) -> None:
        problem, cell, plan, values = self.problem, self.cell, self.code.plan, self.values
        most = max(share.count for share in self.sharing.shares)
        drives = [s for s in self.code.stages if s.name.startswith("drive")]
        row = sum(plan.slots[f"drive:{s.width}"] * self.tiles[s.width] for s in drives) * self.vector_bytes
        block = max(1, DRIVE_BYTES // max(1, row * most))
        if block * most < 32:
            block = -(-32 // most)
        self.block = values["block"] = min(problem.steps, block)
        for i, place in enumerate(plan.operands.values()):
            width = plans.operand_width(cell, list(plan.operands)[i])
            self.tiled(place.data[0], problem.rows, width, 1)
            values[f"{place.data[0]}.count"] = self.units[width]
        for width, slots in plan.vectors.items():
            values[f"vectors:{width}.base"] = self.arena.bytes(self.tiles[width] * len(slots) * self.vector_bytes)
        for stage in drives:
            slots_of_drive = plan.slots[f"drive:{stage.width}"] * self.vector_bytes
            values[f"drive_bias:{stage.width}.tile"] = slots_of_drive
            values[f"drive_bias:{stage.width}.base"] = self.arena.bytes(self.tiles[stage.width] * slots_of_drive)
        for stage in self.code.stages:
            self.panel(stage)
        for share in self.sharing.shares:
            counts = self.counts(share)
            for stage in plan.stages:
                self.code.prepare(stage, counts, self.tile_ranges(stage.width), self.units[stage.width])
            for stage in drives:
                counts_of_blocks = self._block_counts(share)
                self.code.prepare(stage, counts_of_blocks, self.tile_ranges(stage.width), self.units[stage.width])

    def _block_counts(self, share: Share) -> list[int]:
        """The numbers of rows whose input products are taken together."""
        active = self.active[::-1] if self.problem.reverse else self.active
        if self.problem.lengths is None:
            return sorted({share.count * n for n in {self.block, self.problem.steps % self.block}} - {0})
        counts = [max(0, min(share.count, -(-(n - share.first) // share.stride))) for n in active]
        return sorted({sum(counts[i : i + self.block]) for i in range(0, len(counts), self.block)} - {0})

    def private(self, thread: int, share: Share) -> dict[str, int]:
        plan, own = self.code.plan, {}
        for stage in self.code.stages:
            if stage.name.startswith("drive"):
                drive = f"drive:{stage.width}"
                row = self.tiles[stage.width] * plan.slots[drive] * self.vector_bytes
                own[f"{drive}.tile"] = plan.slots[drive] * self.vector_bytes
                own[f"{drive}.row"] = row
                own[f"{drive}.origin"] = own[f"{drive}.base"] = self.arena.bytes(self.block * share.count * row)
        own["x_rows.base"] = self.arena.bytes(self.block * share.count * 8)
        for state in self.cell.states:
            own[f"before:{state}.table"] = self.arena.bytes(share.count * 8)
        for buffer, slots in plan.slots.items():
            if buffer.startswith("scratch"):
                width = buffer.split(":")[1]
                row = self.tiles[width] * slots * self.vector_bytes
                # Threads that share units share the rows too, and each its tiles of them.
                own[f"{buffer}.base"] = self.arena.bytes(share.count * row)
                own[f"{buffer}.row"], own[f"{buffer}.tile"] = row, slots * self.vector_bytes
        for place in plan.operands.values():
            name = place.data[0]
            size = self.values[f"{name}.size"]
            own[f"{name}.base"] = self.values[f"{name}.origin"] + share.first * size
            own[f"{name}.row"] = share.stride * size
        return own

    def _last_states(self) -> tuple[Tensor, ...]:
        """The state [B, width] after each row's last phase."""
        problem, cell = self.problem, self.cell
        found = []
        for i, (history, start) in enumerate(zip(self.histories, problem.states, strict=True)):
            by_phase = i != cell.output and not self.save
            if problem.lengths is None or problem.reverse:
                last = problem.steps - 1 if by_phase or not problem.reverse else 0
                state = history[last % 2 if by_phase else last, :, : start.shape[1]].clone()
            else:
                times = torch.tensor(problem.lengths).sub_(1).clamp_(min=0)
                state = history[times % 2 if by_phase else times, torch.arange(problem.rows), : start.shape[1]]
            if problem.lengths is not None and problem.lengths[-1] == 0:
                empty = torch.tensor([length == 0 for length in problem.lengths])
                state = torch.where(empty.unsqueeze(-1), start, state)
            found.append(state)
        return tuple(found)


def _like_input(problem: Problem) -> Tensor:
    """The outputs [T, B, width], laid out in memory as x is; zero where rows have ended."""
    x, width = problem.x, problem.sizes[problem.cell.output]
    make = torch.empty if problem.lengths is None else torch.zeros
    if problem.rows > 1 and x.stride(0) < x.stride(1):
        return make(problem.rows, problem.steps, width, dtype=x.dtype).transpose(0, 1)
    return make(problem.steps, problem.rows, width, dtype=x.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Backward


def backward(
    problem: Problem, result: Result, d_output: Tensor, d_states: Sequence[Tensor], needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """The gradients of `problem.tensors`, None where `needs` says so."""
    return _Backward(problem, result, d_output, d_states, needs).run()


class _Backward(Setting):
    code: Compiled

    def __init__(
        self,
        problem: Problem,
        result: Result,
        d_output: Tensor,
        d_states: Sequence[Tensor],
        needs: Sequence[bool],
    ) -> None:
        self.result, self.d_output, self.d_states = result, d_output, d_states
        cell = problem.cell
        counts = [1, len(cell.states), len(cell.parameters), len(cell.outside), len(problem.initial)]
        edges = [sum(counts[:i]) for i in range(len(counts) + 1)]
        self.needs = [list(needs[a:b]) for a, b in zip(edges, edges[1:], strict=False)]
        super().__init__(problem, compiled(cell, problem.x.element_size(), "backward", True))

    @property
    def plan(self) -> BackwardPlan:
        """The adjoint step."""
        plan = self.code.plan
        assert isinstance(plan, BackwardPlan)
        return plan

    def run(self) -> tuple[Tensor | None, ...]:
        try:
            self._inputs()
            self._outputs()
            self.execute()
            return self._gradients()
        finally:
            self.arena.release()

    def _inputs(self) -> None:
        """What the forward run left, and the adjoints that come from outside."""
        problem, cell, values = self.problem, self.cell, self.values
        workspace = list(self.result.workspace)
        for i, state in enumerate(cell.states):
            history = self.result.output if i == cell.output else workspace.pop(0)
            for buffer in (f"history:{state}", f"after:{state}"):
                self.steps_of(buffer, history)
        for buffer, slots in plans.forward(cell).slots.items():
            if buffer.startswith("saved"):
                self.steps_of(buffer, workspace.pop(0))
                values[f"{buffer}.tile"] = slots * self.vector_bytes
        self.steps_of("d_output", self.d_output)
        self.rows_of("d_output_open", self._opening())
        self.block = max(1, RING_BYTES // self._ring_row(), -(-RING_ROWS // problem.rows))
        self.block = values["block"] = min(problem.steps, self.block)
        self.ring_rows = values["ring.rows"] = self.block * problem.rows
        values["outer"] = ctypes.addressof(_outer_table(self.item))
        values["gather"] = ctypes.addressof(_gather_table(self.item))

    def _ring_row(self) -> int:
        """Bytes of the deltas of one step of the whole batch."""
        slots = sum(n * self.tiles[b.split(":")[1]] for b, n in self.plan.slots.items() if b.startswith("ring"))
        return max(1, slots * self.vector_bytes * self.problem.rows)

    def _opening(self) -> Tensor:
        """The adjoint of the output state at each row's last phase: from its output there, and from the final state."""
        problem = self.problem
        d_last = self.d_states[self.cell.output]
        if problem.reverse:
            return self.d_output[0] + d_last
        if problem.lengths is None:
            return self.d_output[-1] + d_last
        times = torch.tensor(problem.lengths).sub_(1).clamp_(min=0)
        return self.d_output[times, torch.arange(problem.rows)] + d_last

    def _outputs(self) -> None:
        """Tensors for the gradients."""
        problem, cell, values = self.problem, self.cell, self.values
        x = problem.x
        self.d_x = None
        if self.needs[0][0]:
            make = torch.empty_like if problem.lengths is None and _has_input_product(cell) else torch.zeros_like
            self.d_x = make(x)
            self.steps_of("d_x", self.d_x)
            values["d_x.wanted"] = int(_has_input_product(cell))
        self.d_x_direct = None
        if self.plan_stores("d_x_direct"):
            self.d_x_direct = torch.zeros_like(x)
            self.steps_of("d_x_direct", self.d_x_direct)
        self.d_outside = []
        for place, name in enumerate(cell.outside):
            d = x.new_zeros(problem.steps, problem.rows, self.outside_units(place))
            self.d_outside.append(d)
            self.steps_of(f"d_outside:{name}", d)
        self.d_start = [torch.zeros_like(s, memory_format=torch.contiguous_format) for s in problem.states]
        self.d_initial = [torch.zeros_like(s) for s in self.d_start] if problem.reset is not None else []
        if problem.lengths is not None and problem.lengths[-1] == 0:
            empty = torch.tensor([length == 0 for length in problem.lengths])
            for d_start, d_state in zip(self.d_start, self.d_states, strict=True):
                d_start[empty] = d_state[empty]  # a row without steps hands its state through
        values["leaving"] = int(any(self.needs[1]) or problem.reset is not None)
        for i, state in enumerate(cell.states):
            self.rows_of(f"d_start:{state}", self.d_start[i])
            if self.d_initial:
                self.rows_of(f"d_initial:{state}", self.d_initial[i])
            values[f"leaving:{state}.size"] = self.values[f"d_start:{state}.size"]
        self.d_parameters: list[Tensor | None] = []
        for parameter, tensor, need in zip(cell.parameters, self.parameters, self.needs[2], strict=True):
            d_parameter = torch.zeros_like(tensor) if need else None
            self.d_parameters.append(d_parameter)
            if d_parameter is None or not parameter.is_matrix:
                continue
            rows = tensor.shape[0] // len(parameter.gates)
            for i, gate in enumerate(parameter.gates):
                label = f"d_weight:{parameter.namespace}.{gate}"
                values[f"{label}.base"] = d_parameter.data_ptr() + i * rows * tensor.shape[1] * self.item
                values[f"{label}.stride"] = tensor.shape[1] * self.item

    def plan_stores(self, buffer: str) -> bool:
        """Whether a stage writes to a buffer."""
        return any(place.data[0] == buffer for stage in self.plan.stages for _, place in stage.stores)

    def ready(self) -> None:
        problem, cell, plan, values = self.problem, self.cell, self.plan, self.values
        rows = self.ring_rows + problem.rows + 1
        for buffer, slots in plan.slots.items():
            kind, width = buffer.split(":")
            if kind == "ring":
                self._ring(buffer, width, slots, rows)
            elif kind in ("carry", "scratch"):
                self.tiled(buffer, problem.rows, width, slots)
                if kind == "carry":
                    self._carry(buffer, width, slots)
        for operand, place in plan.operands.items():
            name, width = place.data[0], plans.operand_width(cell, operand)
            self.tiled(name, self.ring_rows, width, 1)
            values[f"{name}.table"] = self.arena.bytes(self.ring_rows * 8)
        for state in cell.states:
            values[f"before:{state}.table"] = self.arena.bytes(self.ring_rows * 8)
        for buffer in ("x_rows", "d_x_rows"):
            values[f"{buffer}.table"] = self.arena.bytes(self.ring_rows * 8)
        for width, vectors in plan.vectors.items():
            values[f"vectors:{width}.base"] = self.arena.bytes(self.tiles[width] * len(vectors) * self.vector_bytes)
        self._weights()
        used = [s for s in self.code.stages if s.name.startswith("stage") or self._is_used(s)]
        for stage in used:
            self.panel(stage)
        for share in self.sharing.shares:
            counts = self._loop_counts(share)
            for stage in used:
                if stage.name == "input_gradient":
                    self.code.prepare(stage, self._gradient_counts(), [(0, self.tiles["input"])], self.units["input"])
                else:
                    self.code.prepare(stage, counts, self.tile_ranges(stage.width), self.units[stage.width])

    def _is_used(self, stage: Stage) -> bool:
        if stage.name == "input_gradient":
            return bool(self.values.get("d_x.wanted"))
        return bool(self.values["leaving"])

    def _ring(self, buffer: str, width: str, slots: int, rows: int) -> None:
        """[tiles][rows][slots] of vectors; after the block's rows come those kept from the block before, then zeros."""
        values, size = self.values, slots * self.vector_bytes
        tile = rows * size + 128  # so that the tiles of a row do not fall on one set of the first cache
        base = self.arena.bytes(tile * self.tiles[width])
        values[f"{buffer}.size"] = values[f"{buffer}.row"] = size
        values[f"{buffer}.tile"], values[f"{buffer}.tiles"] = tile, self.tiles[width]
        values[f"{buffer}.origin"] = values[f"{buffer}.base"] = base
        zero = values[f"{buffer}.zero"] = base + (rows - 1) * size
        for tile_number in range(self.tiles[width]):
            ctypes.memset(zero + tile_number * tile, 0, size)
        following = buffer.replace("ring:", "ring_next:")
        values[f"{following}.tile"], values[f"{following}.tiles"] = tile, self.tiles[width]
        values[f"{following}.row"] = 8
        values[f"column_sums:{width}"] = columns(self.item, slots, 0)
        if any(n for n, p in zip(self.needs[2], self.cell.parameters, strict=True) if not p.is_matrix):
            values[f"sums:{width}.wanted"] = 1
            values[f"sums:{width}.base"] = self.arena.zeros(self.tiles[width] * slots * self.vector_bytes)

    def _carry(self, buffer: str, width: str, slots: int) -> None:
        """What the final states' adjoints add to the states that are carried unit by unit."""
        problem = self.problem
        whole = self.arena.view(self.values[f"{buffer}.base"], (problem.rows, self.tiles[width], slots, self.lanes), problem.x.dtype)
        whole.zero_()
        for i, (state, place) in enumerate(self.plan.direct.items()):
            index = self.cell.states.index(state)
            if place.data[0] != buffer or index == self.cell.output:
                continue
            padded = torch.nn.functional.pad(self.d_states[index], (0, self.tiles[width] * self.lanes - problem.sizes[index]))
            whole[:, :, place.data[1]] = padded.view(problem.rows, self.tiles[width], self.lanes)

    def _weights(self) -> None:
        """Which weight gradients are wanted, and room for those of few columns."""
        values, cell = self.values, self.cell
        need = {p.namespace: n for p, n in zip(cell.parameters, self.needs[2], strict=True)}
        for number, (operand, products) in enumerate(self.plan.weights.items()):
            if not all(need[product.data[0]] for product in products):
                if any(need[product.data[0]] for product in products):
                    raise AssertionError("products of one operand belong to one parameter")
                continue
            width = self.plan.delta_slot[calculus.adjoint(cell).delta[products[0]]].data[0].split(":")[1]
            count = self._columns(operand)
            values[f"weights{number}.wanted"], values[f"weights{number}.columns"] = 1, count
            if operand.op == "input" and count <= drivers.FEW_COLUMNS:
                slots = self.plan.slots[f"ring:{width}"]
                size = self.tiles[width] * count * slots * self.vector_bytes
                values[f"few{number}.base"] = self.arena.zeros(size)
                values[f"few{number}.kernel"] = columns(self.item, slots, count)
            else:
                outer(self.item, self.units[width], count)

    def _columns(self, operand: Node) -> int:
        if operand.op == "input":
            return self.units["input"]
        if operand.op == "state":
            return self.problem.sizes[self.cell.states.index(operand.data[0])]
        return self.units[plans.operand_width(self.cell, operand)]

    def _loop_counts(self, share: Share) -> list[int]:
        """Numbers of rows that the loop may take together: those with a step after, those without, single ones."""
        counts = self.counts(share)
        if self.problem.lengths is None and self.problem.reset is None:
            return counts
        differences = {a - b for a in [*counts, 0] for b in [*counts, 0] if a > b}
        return sorted({*counts, *differences, 1})

    def _gradient_counts(self) -> list[int]:
        """Numbers of rows in a thread's share of a block."""
        threads = len(self.sharing.shares)
        active = self.active[::-1] if self.problem.reverse else self.active
        found: set[int] = set()
        for begin in range(0, len(active), self.block):
            rows = sum(active[begin : begin + self.block])
            found |= {rows * (k + 1) // threads - rows * k // threads for k in range(threads)}
        return sorted(found - {0})

    def private(self, thread: int, share: Share) -> dict[str, int]:
        own: dict[str, int] = {"panel.base": self.arena.bytes(drivers.CHUNK * OUTER_COLUMNS * self.vector_bytes)}
        for buffer in self.plan.slots:
            if buffer.startswith("ring"):
                own[f"{buffer.replace('ring:', 'ring_next:')}.base"] = self.arena.bytes(share.count * 8)
            elif buffer.startswith(("carry", "scratch")):
                size = self.values[f"{buffer}.size"]
                own[f"{buffer}.base"] = self.values[f"{buffer}.origin"] + share.first * size
                own[f"{buffer}.row"] = share.stride * size
        for state in self.cell.states:
            own[f"before:{state}.entry"] = share.stride * 8
        return own

    # results

    def _gradients(self) -> tuple[Tensor | None, ...]:
        problem, cell = self.problem, self.cell
        if self.d_x is not None and self.d_x_direct is not None:
            self.d_x += self.d_x_direct
        for parameter, d_parameter in zip(cell.parameters, self.d_parameters, strict=True):
            if d_parameter is not None:
                self._summed(parameter.namespace, parameter.gates, d_parameter)
        d_outside = []
        for i, (d, value) in enumerate(zip(self.d_outside, problem.outside, strict=True)):
            d = d if i < len(cell.per_step) else d.sum(0)
            d_outside.append(d.sum(-1, keepdim=True) if value.shape[-1] < d.shape[-1] else d)
        groups = [[self.d_x], self.d_start, self.d_parameters, d_outside, self.d_initial]
        return tuple(
            d if need else None
            for ds, needs in zip(groups, self.needs, strict=True)
            for d, need in zip(ds, needs, strict=True)
        )

    def _summed(self, namespace: str, gates: tuple[str, ...], d_parameter: Tensor) -> None:
        """Take what was summed slot by slot into a parameter's gradient."""
        adjoint, problem = calculus.adjoint(self.cell), self.problem
        rows = d_parameter.shape[0] // len(gates)
        for node, g in adjoint.parameter.items():
            if node.data[0] == namespace:
                ring, slot = self.plan.delta_slot[g].data
                width = ring.split(":")[1]
                shape = (self.tiles[width], self.plan.slots[ring], self.lanes)
                sums = self.arena.view(self.values[f"sums:{width}.base"], shape, problem.x.dtype)
                place = gates.index(node.data[1]) * rows
                d_parameter[place : place + rows] = sums[:, slot].flatten()[:rows]
        for number, (operand, products) in enumerate(self.plan.weights.items()):
            if f"few{number}.base" not in self.values:
                continue
            count = self._columns(operand)
            for product in products:
                if product.data[0] == namespace:
                    ring, slot = self.plan.delta_slot[adjoint.delta[product]].data
                    shape = (self.tiles[ring.split(":")[1]], count, self.plan.slots[ring], self.lanes)
                    sums = self.arena.view(self.values[f"few{number}.base"], shape, problem.x.dtype)
                    place = gates.index(product.data[1]) * rows
                    d_parameter[place : place + rows] += sums[:, :, slot].transpose(1, 2).flatten(0, 1)[:rows]


def _has_input_product(cell: Cell) -> bool:
    return any(product.args[0].op == "input" for product in cell.products)
