"""The code of a cell: its drivers, and a table of the kernels that have been needed so far.

Kernels are compiled when sizes first ask for them; their addresses stand in tables that the drivers look into.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from functools import cache as remembered

from throughtime.engine import plan as plans
from throughtime.engine.plan import Plan, Stage
from throughtime.engine.targets.cpu import cache, drivers, gang, kernels, llvm
from throughtime.engine.targets.cpu.backward import OUTER_COLUMNS, OUTER_ROWS, BackwardDriver
from throughtime.engine.targets.cpu.drivers import LIMIT, tiling
from throughtime.engine.targets.cpu.machine import machine
from throughtime.equations.cell import Cell


class Compiled:
    """The driver of one cell, direction and format, and the kernels that have been needed so far."""

    def __init__(self, cell: Cell, itemsize: int, direction: str, save: bool, streaming: bool) -> None:
        self.cell, self.itemsize, self.save, self.streaming = cell, itemsize, save, streaming
        self.plan: Plan = plans.backward(cell) if direction == "backward" else plans.forward(cell)
        self.frame = drivers.frame_of(cell, self.plan)
        self.stages = drivers.stages_of(self.plan, cell)
        self.key = (cell.hash, direction, itemsize)
        self.backward = direction == "backward"
        self.programs: dict[str, list[cache.Program]] = {}  # by the name of a driver or stage
        self.known = 0  # how many there are; what a setting needs is looked at again when there are more
        self.pack, self.walk = self._driver("pack"), self._driver("walk")
        self.add_up = self._driver("add_up") if self.backward else None
        self.table = (ctypes.c_int64 * (len(self.stages) * drivers.TABLE_BYTES // 8))()
        self.limits = (ctypes.c_int64 * (len(self.stages) * (LIMIT + 1)))()
        for number, stage in enumerate(self.stages):
            vectors = kernels.vectors_per_tile(stage)
            for rows in range(1, LIMIT + 1):
                self.limits[number * (LIMIT + 1) + rows] = kernels.tile_limit(vectors, rows)
        self.ready: set[tuple[object, ...]] = set()

    def _driver(self, name: str) -> gang.Call:
        """One of the drivers, by the name of the method that writes it."""
        kind = BackwardDriver if self.backward else drivers.ForwardDriver

        def write() -> llvm.Source:
            driver = kind(name, self.cell, self.plan, self.frame, self.itemsize)
            return driver.code.source(getattr(driver, name)())

        return gang.Call(self._noted(name, cache.program((*self.key, name), name, write)))

    def _noted(self, name: str, program: cache.Program) -> int:
        """The program's address; what it needs of a frame is remembered."""
        self.programs.setdefault(name, []).append(program)
        self.known += 1
        return program.address

    def label(self, driver: str) -> str:
        """A driver in words, for an error."""
        return f"the driver '{driver}' of {self.cell.name}, {'backward' if self.backward else 'forward'}"

    def needs(self, driver: str, stages: Iterable[str]) -> frozenset[str]:
        """The fields that must be set before a driver is called: its own, and those of these stages' kernels."""
        (own,) = self.programs[driver]
        kernels_need = {name for stage in stages for kernel in self.programs[stage] for name in kernel.needs}
        return own.needs | (kernels_need - own.sets)

    def prepare(
        self, stage: Stage, counts: Iterable[int], ladder: bool, tiles: Sequence[tuple[int, int]], units: int
    ) -> None:
        """Have every kernel that the driver will look up for these numbers of rows and ranges of tiles."""
        limit = kernels.row_limit(kernels.vectors_per_tile(stage))
        cuts = {frozenset({height}) for height in (limit, *drivers.ladder_heights(limit)) if height <= max(counts)}
        for heights in cuts if ladder else {frozenset(tiling(count, limit)) for count in counts}:
            key = (stage.name, heights, tuple(tiles), units)
            if key not in self.ready:
                self._prepare(stage, heights, tiles, units)
                self.ready.add(key)

    def _prepare(self, stage: Stage, heights: frozenset[int], tiles: Sequence[tuple[int, int]], units: int) -> None:
        lanes = machine().lanes(self.itemsize)
        at_once = kernels.tile_limit(kernels.vectors_per_tile(stage), max(heights))
        for begin, end in tiles:
            for height in heights:
                for width in tiling(end - begin, at_once):
                    partial = end * lanes > units
                    if partial:
                        self.kernel(stage, kernels.Shape(height, width, tail=True))
                    if not partial or end - begin > width:
                        self.kernel(stage, kernels.Shape(height, width, tail=False))

    def kernel(self, stage: Stage, shape: kernels.Shape) -> None:
        """Have one kernel, unless it is there already."""
        number = next(i for i, s in enumerate(self.stages) if s.name == stage.name)
        place = ((number * 2 + shape.tail) * (LIMIT + 1) + shape.rows) * (LIMIT + 1) + shape.tiles
        if self.table[place]:
            return
        key = (*self.key, stage.name, self.save, self.streaming, shape)
        kind = (self.frame, self.itemsize, self.save, self.streaming)

        def write() -> llvm.Source:
            kernel = kernels.StageKernel("kernel", self.plan, stage, shape, *kind)
            return kernel.code.source(kernel.text())

        self.table[place] = self._noted(stage.name, cache.program(key, "kernel", write))


@remembered
def compiled(cell: Cell, itemsize: int, direction: str, save: bool, streaming: bool) -> Compiled:
    """The code of a cell; made once per process, loaded from the cache where it is there."""
    return Compiled(cell, itemsize, direction, save, streaming)


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


@remembered
def dot(itemsize: int, slots: int, first: int, products: int, count: int) -> int:
    """The kernel that takes the gradient of an x of few numbers."""
    write = lambda: kernels.dot_kernel("kernel", slots, first, products, count, itemsize)  # noqa: E731
    return cache.function(("dot", itemsize, slots, first, products, count), "kernel", write)


def listing(cell: Cell, itemsize: int = 4, assembly: bool = False) -> str:
    """The kernels that a step of the cell runs on this machine, as LLVM IR or assembly: forward, then backward."""
    parts = []
    for direction in ("forward", "backward"):
        plan: Plan = plans.backward(cell) if direction == "backward" else plans.forward(cell)
        frame = drivers.frame_of(cell, plan)
        for stage in plan.stages:
            rows = kernels.row_limit(kernels.vectors_per_tile(stage))
            shape = kernels.Shape(rows, kernels.tile_limit(kernels.vectors_per_tile(stage), rows), tail=False)
            kernel = kernels.StageKernel(f"{direction}_{stage.name}", plan, stage, shape, frame, itemsize, save=True)
            text = kernel.text()
            stores = ", ".join(f"{place.data[0]}[{place.data[1]}]" for _, place in stage.stores)
            parts.append(
                f"; {cell.name}, {direction}, {stage.name}: {shape.rows} rows x {shape.tiles} x "
                f"{machine().lanes(itemsize)} units ({stage.width}) for {machine().cpu}; writes {stores}\n"
                + (llvm.assembly(text) if assembly else str(llvm.optimised(text)))
            )
    return "\n".join(parts)


_OUTER_PLACES = 2 * (OUTER_ROWS + 1) * (OUTER_COLUMNS + 1)


@remembered
def outer_table(itemsize: int) -> ctypes.Array[ctypes.c_int64]:
    """The weight-gradient kernels by [whole or masked][rows][vectors]."""
    return (ctypes.c_int64 * _OUTER_PLACES)()


@remembered
def gather_table(itemsize: int) -> ctypes.Array[ctypes.c_int64]:
    """The packing kernels by vectors."""
    table = (ctypes.c_int64 * (OUTER_COLUMNS + 1))()
    for vectors in range(1, OUTER_COLUMNS + 1):
        table[vectors] = gather(itemsize, vectors)
    return table


@remembered
def outer(itemsize: int, units: int, operand: int) -> int:
    """The table of weight-gradient kernels, with those in it that these sizes need."""
    table = outer_table(itemsize)
    lanes = machine().lanes(itemsize)
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
