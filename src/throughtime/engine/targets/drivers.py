"""The time loops: pack the weights, then walk the steps and call kernels, forward or backward, in blocks of steps.

A few drivers per cell and direction, the same for every size: one packs (and clears what is added to), one walks time,
and after a backward walk one adds up. Each is run once per frame. Frames share either the rows or the units of a step
(`rows.*` and `tiles.*`). Frames that share rows know nothing of each other: each has its own ring of deltas and its own
sums, because data that another core has just written is slow to read. Frames that share units meet at a barrier in
every step. Which thread runs which frame, and how many threads there are, changes no bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from llvmlite import ir

from throughtime.engine import plan as plans
from throughtime.engine.plan import BackwardPlan, Group, Plan, Stage
from throughtime.engine.targets.kernels import Frame, node_label, panel_name, row_limit, vectors_per_tile
from throughtime.engine.targets.llvm import Code, Int, Variable
from throughtime.equations.cell import Cell
from throughtime.equations.expr import Node

OUTER_COLUMNS = 3
"""Vectors of columns that a weight-gradient kernel takes at once."""

OUTER_ROWS = 8
"""Rows (units of one slot) that a weight-gradient kernel takes at once, at most."""

CHUNK = 128
"""Rows of a block that are packed for a weight gradient at once: the packed panel stays in the first cache."""

FEW_COLUMNS = 8
"""Operands of at most so many columns have their weight gradients summed unit by unit instead of packed."""


def stages_of(plan: Plan, cell: Cell) -> list[Stage]:
    """Every stage that the drivers of a plan call, in the order of their place in the kernel table."""
    if isinstance(plan, BackwardPlan):
        leaving = [plans.leave(plan, cell, state) for state in cell.states]
        gradient = plans.input_gradient(plan, cell)
        return [*plan.stages, *leaving, *([gradient] if gradient else [])]
    return [*plan.stages, *(s for s in (plans.drive(plan, "hidden"), plans.drive(plan, "projected")) if s)]


def frame_of(cell: Cell, plan: Plan) -> Frame:
    """Every field that the drivers and kernels of a plan may use, numbered the same on every day and machine."""
    names = [
        "ladder",
        "packer",
        "packers",
        "sums",
        "threads",
        "thread",
        "barrier",
        "yield",
        "units_shared",
        "steps",
        "reverse",
        "reset",
        "active",
    ]
    names += ["phase.first", "phase.last", "block", "rows.first", "rows.stride", "rows.count", "rows.batch"]
    names += [
        "kernels",
        "tile_limits",
        "transpose",
        "gather",
        "outer",
        "dot",
        "few_inputs",
        "panel.base",
        "leaving",
        "ring.rows",
    ]
    names += ["d_x.wanted", "x_rows.table", "d_x_rows.table"]
    for width in ("hidden", "projected", "input"):
        names += [f"{name}:{width}" for name in ("tiles", "tiles.first", "tiles.last", "lanes", "units", "column_sums")]
        names += [f"sums:{width}.wanted", f"sums:{width}.base"]
    buffers = ["x", "x_rows", "d_x", "d_output", "d_output_open", "d_x_direct"]
    buffers += ["saved:hidden", "saved:projected", *plan.slots, *(f"vectors:{width}" for width in plan.vectors)]
    buffers += [f"drive_bias:{width}" for width in ("hidden", "projected")]
    buffers += [f"{kind}:{width}" for kind in ("ring_next", "ring_all") for width in ("hidden", "projected")]
    buffers += [place.data[0] for place in plan.operands.values()]
    kinds = ("before", "after", "next", "history", "start", "initial", "leaving", "d_start", "d_initial")
    buffers += [f"{kind}:{state}" for kind in kinds for state in cell.states]
    buffers += [f"{kind}:{name}" for kind in ("outside", "d_outside") for name in cell.outside]
    parts = (
        "base",
        "row",
        "tile",
        "tiles",
        "size",
        "origin",
        "step",
        "ahead",
        "depth",
        "table",
        "entry",
        "count",
        "zero",
    )
    names += [f"{buffer}.{part}" for buffer in dict.fromkeys(buffers) for part in parts]
    for stage in stages_of(plan, cell):
        for group in stage.groups:
            names += [f"{panel_name(stage, group)}.{part}" for part in ("base", "tile")]
    for node in cell.nodes:
        if node.op in ("product", "parameter"):
            label = node_label(node)
            names += [f"weight:{label}", f"d_weight:{label}.base", f"d_weight:{label}.stride"]
    for number in range(len(plan.weights) if isinstance(plan, BackwardPlan) else 0):
        names += [f"weights{number}.{part}" for part in ("wanted", "columns")]
        names += [f"few{number}.{part}" for part in ("base", "kernel")]
    return Frame(names)


class Driver:
    """What both directions share: the frame, tilings, tables of row addresses, packing, the barrier."""

    def __init__(self, name: str, cell: Cell, plan: Plan, frame: Frame, itemsize: int) -> None:
        self.cell, self.plan, self.fields = cell, plan, frame
        self.code = Code(name, ["frame"], itemsize)
        self.item = itemsize
        self.vector_bytes = self.code.lanes * itemsize
        self.stages = stages_of(plan, cell)
        self.met: Variable = self.code.integer_variable(0)
        self.packed: set[str] = set()

    def field(self, name: str) -> Int:
        """A field of the frame."""
        return self.fields.get(self.code, self.code["frame"], name)

    def set(self, name: str, value: Int) -> None:
        """Write a field of the frame."""
        self.fields.set(self.code, self.code["frame"], name, value)

    # threads

    def meet(self) -> None:
        """Wait until every thread is here. A waiting thread spins for a while, then offers its core to others."""
        code = self.code
        threads = self.field("threads")
        with code.when(threads > 1):
            place = self.field("barrier")
            target = self.met.get() + threads
            self.met.set(target)
            code.atomic_add(place, 1)
            spins = code.integer_variable(0)
            with code.forever() as leave_when:
                leave_when(code.load_shared(place) >= target)
                code.pause()
                spins.set(spins.get() + 1)
                with code.when(spins.get() > 2000):
                    code.call(self.field("yield"), [])

    def meet_if_units_are_shared(self) -> None:
        """The next stage reads what other threads wrote, but only if they work on the same rows."""
        with self.code.when(self.field("units_shared") > 0):
            self.meet()

    @contextmanager
    def own_share(self, count: Int) -> Iterator[Int]:
        """Count through this packer's share of so many things."""
        with self.code.loop(count, start=self.field("packer"), step=self.field("packers")) as i:
            yield i

    def for_numbers(self, count: Int) -> tuple[Int, Int, Int]:
        """This packer's share of so many numbers: (first whole vector, last, first number after all vectors)."""
        vectors = count // self.code.lanes
        packer, packers = self.field("packer"), self.field("packers")
        rest = self.code.choose((packer + 1).equals(packers), vectors * self.code.lanes, count)
        return vectors * packer // packers, vectors * (packer + 1) // packers, rest

    def share(self, count: Int) -> tuple[Int, Int]:
        """This frame's share of so many things in a row, where frames share units: (first, last)."""
        thread, threads = self.field("thread"), self.field("threads")
        return count * thread // threads, count * (thread + 1) // threads

    # time and rows

    def time(self, phase: Int) -> Int:
        """The step that is computed as number `phase`."""
        reverse = self.field("reverse") > 0
        return self.code.choose(reverse, self.field("steps") - 1 - phase, phase)

    def running(self, phase: Int) -> Int:
        """How many rows of the whole batch run at a phase."""
        return self.code.load_integer(self.field("active") + self.time(phase) * 8)

    def own_running(self, phase: Int, exists: ir.Value | None = None) -> Int:
        """How many of this thread's rows run at a phase, the first ones; none if the phase does not exist."""
        code, stride = self.code, self.field("rows.stride")
        safe = phase if exists is None else code.choose(exists, phase, 0)
        reached = code.maximum(self.running(safe) - self.field("rows.first") + stride - 1, 0) // stride
        count = code.minimum(reached, self.field("rows.count"))
        return count if exists is None else code.choose(exists, count, 0)

    def own_earlier(self, phase: Int) -> Int:
        """How many of this thread's rows ran at the phase before."""
        return self.own_running(phase - 1, exists=phase > self.field("phase.first"))

    def rank(self, row: Int) -> Int:
        """The row of the whole batch that is this thread's number `row`."""
        return self.field("rows.first") + row * self.field("rows.stride")

    def is_reset(self, time: Int, row: Int) -> Int:
        """1 if the row's state returns to its initial state before this step."""
        place = self.field("reset") + time * self.field("rows.batch") + self.rank(row)
        return self.code.load_byte(place)

    def set_rows(self, buffer: str, first: Int) -> None:
        """Point a buffer of rows of the whole batch at this thread's, from an address for row 0 of the batch."""
        size = self.field(f"{buffer}.size")
        self.set(f"{buffer}.base", first + self.field("rows.first") * size)
        self.set(f"{buffer}.row", self.field("rows.stride") * size)

    def at_time(self, buffer: str, time: Int) -> None:
        """Point a buffer with a part per step at this thread's rows of a step."""
        self.set_rows(buffer, self.field(f"{buffer}.origin") + time * self.field(f"{buffer}.step"))

    def history(self, state: str, phase: Int) -> Int:
        """Where row 0 of a state after a phase is: by step, or in a ring of `depth` steps."""
        depth = self.field(f"history:{state}.depth")
        of_ring = phase % self.code.maximum(depth, 1)
        place = self.code.choose(depth > 0, of_ring, self.time(phase))
        return self.field(f"history:{state}.origin") + place * self.field(f"history:{state}.step")

    def point_at_states(self, phase: Int, count: Int, table_offset: Int) -> None:
        """Fill the tables of rows that a step's states are read from.

        A row reads what the phase before wrote; at its first phase, the state it was given; after a reset, the initial.
        """
        code = self.code
        earlier = self.own_earlier(phase)
        for state in self.cell.states:
            table = self.field(f"before:{state}.table") + table_offset
            stride = self.field(f"before:{state}.entry")
            size, start_size = self.field(f"history:{state}.size"), self.field(f"start:{state}.size")
            last = self.history(state, phase - 1)
            with code.loop(code.minimum(earlier, count)) as m:
                code.store_integer(last + self.rank(m) * size, table + m * stride)
            with code.loop(count, start=code.minimum(earlier, count)) as m:
                given = self.field(f"start:{state}.base") + self.rank(m) * start_size
                code.store_integer(given, table + m * stride)
            with (
                code.when(self.field("reset").differs(0)),
                code.loop(count) as m,
                code.when(self.is_reset(self.time(phase), m) > 0),
            ):
                initial = self.field(f"initial:{state}.base") + self.rank(m) * self.field(f"initial:{state}.size")
                code.store_integer(initial, table + m * stride)
            self.set(f"before:{state}.base", table)
            self.set(f"before:{state}.row", stride)

    # kernels

    def run(self, stage: Stage, first: Int, last: Int, opening: int = 0, all_tiles: bool = False) -> None:
        """Call a stage's kernel for every tile of these rows and of this thread's units.

        Rows are cut evenly. Where their number changes from step to step (`ladder`), they are cut into whole tiles and
        one each of 4, 2 and 1, so that few kernels serve every number.
        """
        code = self.code
        limit = row_limit(vectors_per_tile(stage))
        ladder = self.field("ladder") > 0
        with code.when(code.builder.not_(ladder)):
            even = Tiling(code, last - first, limit)
            self._run_rows(stage, first, even, opening, all_tiles)
        with code.when(ladder):
            whole = (last - first) // limit
            self._run_rows(stage, first, Equal(code, limit, whole), opening, all_tiles)
            row = code.integer_variable(first + whole * limit)
            for height in ladder_heights(limit):
                with code.when(last - row.get() >= height):
                    self._run_rows(stage, row.get(), Equal(code, height, 1), opening, all_tiles)
                    row.set(row.get() + height)

    def _run_rows(self, stage: Stage, first: Int, rows: Tiling | Equal, opening: int, all_tiles: bool) -> None:
        """All tiles of units for rows that are cut in a given way; the weights of a tile serve all the rows in turn."""
        code = self.code
        number = next(i for i, s in enumerate(self.stages) if s.name == stage.name)
        every = self.field(f"tiles:{stage.width}")
        begin = code.integer(0) if all_tiles else self.field(f"tiles.first:{stage.width}")
        end = every if all_tiles else self.field(f"tiles.last:{stage.width}")
        lanes = self.field(f"lanes:{stage.width}")
        table = self.field("kernels") + number * TABLE_BYTES
        with code.when(rows.count > 0):
            limits = self.field("tile_limits") + number * ((LIMIT + 1) * 8)
            tiles = Tiling(code, end - begin, code.load_integer(limits + rows.largest * 8))
            tile = code.integer_variable(begin)
            with code.loop(tiles.count) as i:
                taken = tiles.size(i)
                ends = (tile.get() + taken).equals(every)
                tail = code.choose(code.builder.and_(ends, lanes < code.lanes), 1, 0)
                lanes_here = code.choose(ends, lanes, code.lanes)
                row = code.integer_variable(first)
                with code.loop(rows.count) as j:
                    height = rows.size(j)
                    entry = ((tail * (LIMIT + 1) + height) * (LIMIT + 1) + taken) * 8
                    kernel = code.load_integer(table + entry)
                    code.call(kernel, [code["frame"], row.get(), tile.get(), lanes_here, opening])
                    row.set(row.get() + height)
                tile.set(tile.get() + taken)

    # packing

    def unpacked(self, stage: Stage) -> Iterator[tuple[Group, str]]:
        """The groups of a stage whose panels no stage before it has packed already."""
        for group in stage.groups:
            panel = panel_name(stage, group)
            if panel not in self.packed:
                self.packed.add(panel)
                yield group, panel

    def pack_rows(self, stage: Stage) -> None:
        """Weights for products that read rows: panel[tile][k] holds a vector of units for each product of the group."""
        code = self.code
        for group, panel in self.unpacked(stage):
            vector_step = len(group.products) * self.vector_bytes
            columns = self.field(f"{group.operand.data[0]}.count")
            with self.own_share(self.field(f"tiles:{stage.width}")) as tile:
                to = self.field(f"{panel}.base") + tile * self.field(f"{panel}.tile")
                for place, product in enumerate(group.products):
                    stride = columns * self.item
                    start = self.field(f"weight:{node_label(product)}") + tile * code.lanes * stride
                    left = self.field(f"units:{stage.width}") - tile * code.lanes
                    arguments = [start, stride, left, columns, to + place * self.vector_bytes, vector_step]
                    code.call(self.field("transpose"), arguments)

    def pack_ring(self, stage: Stage) -> None:
        """Weights for products that read the ring: panel[tile of the result][delta] holds a vector of columns."""
        code = self.code
        for group, panel in self.unpacked(stage):
            width = group.operand.data[0].split(":")[1]
            units, columns = self.field(f"units:{width}"), self.field(f"units:{stage.width}")
            with self.own_share(self.field(f"tiles:{stage.width}")) as tile:
                start = self.field(f"{panel}.base") + tile * self.field(f"{panel}.tile")
                to = code.integer_variable(start)
                lanes = code.minimum(columns - tile * code.lanes, code.lanes)
                with code.loop(self.field(f"tiles:{width}")) as source:
                    for product in group.products:
                        base = self.field(f"weight:{node_label(product)}") + tile * self.vector_bytes
                        base = base + source * code.lanes * (columns * self.item)
                        there = code.minimum(units - source * code.lanes, code.lanes)
                        with code.loop(code.lanes) as lane:
                            mask = code.first(code.choose(lane < there, lanes, 0))
                            row = base + lane * (columns * self.item)
                            code.store(code.load(row, 0, mask), to.get())
                            to.set(to.get() + self.vector_bytes)

    def pack_vectors(self, buffer: str, slots: Sequence[Sequence[Node]], width: str) -> None:
        """One vector per tile and slot: the sum of some parameters."""
        code = self.code
        with self.own_share(self.field(f"tiles:{width}")) as tile:
            to = self.field(f"{buffer}.base") + tile * self.field(f"{buffer}.tile")
            mask = code.first(self.field(f"units:{width}") - tile * code.lanes)
            for slot, parts in enumerate(slots):
                total = code.fill(0.0)
                for i, part in enumerate(parts):
                    vector = code.load(self.field(f"weight:{node_label(part)}") + tile * self.vector_bytes, 0, mask)
                    total = vector if i == 0 else total.add(vector)
                code.store(total, to, slot * self.vector_bytes)

    def pack_plan_vectors(self) -> None:
        """The vectors that the plan's epilogues and accumulators start from."""
        for width, slots in self.plan.vectors.items():
            self.pack_vectors(f"vectors:{width}", list(slots), width)


LIMIT = 8
"""The most rows, and the most tiles of units, that a kernel takes."""

TABLE_BYTES = 2 * (LIMIT + 1) * (LIMIT + 1) * 8
"""Bytes of a stage's part of the kernel table: [whole or tail][rows][tiles] addresses."""


class Tiling:
    """So many things cut into the fewest pieces of at most `limit`, as even as can be."""

    def __init__(self, code: Code, things: Int, limit: int | Int) -> None:
        self.code = code
        limit = code.integer(limit)
        self.count = (things + limit - 1) // limit
        pieces = code.maximum(self.count, 1)
        self.base, self.extra = things // pieces, things % pieces

    def size(self, i: Int) -> Int:
        """How large piece i is."""
        return self.base + self.code.choose(i < self.extra, 1, 0)

    @property
    def largest(self) -> Int:
        """The size of the largest piece."""
        return self.base + self.code.choose(self.extra > 0, 1, 0)


class Equal:
    """Pieces of one size."""

    def __init__(self, code: Code, size: int, count: int | Int) -> None:
        self.count = code.integer(count)
        self.largest = code.integer(size)

    def size(self, i: Int) -> Int:
        """How large a piece is."""
        return self.largest


def ladder_heights(limit: int) -> list[int]:
    """The sizes that fewer rows than `limit` are cut into, one of each at most."""
    return [height for height in (4, 2, 1) if height < limit]


def tiling(things: int, limit: int) -> set[int]:
    """The sizes of pieces that `Tiling` cuts so many things into."""
    if things <= 0:
        return set()
    pieces = -(-things // limit)
    return {things // pieces, things // pieces + (1 if things % pieces else 0)}


# ---------------------------------------------------------------------------------------------------------------------
# Forward


class ForwardDriver(Driver):
    """`forward(frame)`: input products for a block of steps at once, then the steps of the block."""

    def pack(self) -> str:
        """`pack(frame)`: the weights and biases as the kernels read them."""
        for stage in self.stages:
            self.pack_rows(stage)
        self.pack_plan_vectors()
        for stage in (s for s in self.stages if s.name.startswith("drive")):
            slots = [vectors for p, vectors in self.plan.drive if self.plan.drive_width[p] == stage.width]
            self.pack_vectors(f"drive_bias:{stage.width}", slots, stage.width)
        return self.code.text()

    def walk(self) -> str:
        """`walk(frame)`: the steps."""
        code = self.code
        drives = [s for s in self.stages if s.name.startswith("drive")]
        last = self.field("phase.last")
        with code.loop(last, start=self.field("phase.first"), step=self.field("block")) as begin:
            end = code.minimum(begin + self.field("block"), last)
            if drives:
                self._drive(drives, begin, end)
            done = code.integer_variable(0)
            with code.loop(end, start=begin) as phase:
                count = self.own_running(phase)
                self._step(drives, phase, count, done)
                done.set(done.get() + count)
        return code.text()

    def _drive(self, drives: list[Stage], begin: Int, end: Int) -> None:
        """The input products of this thread's rows and units, for a block."""
        code = self.code
        count = code.integer_variable(0)
        with code.loop(end, start=begin) as phase:
            running = self.own_running(phase)
            x = self.field("x.origin") + self.time(phase) * self.field("x.step")
            with code.loop(running) as m:
                row = x + self.rank(m) * self.field("x.size")
                code.store_integer(row, self.field("x_rows.base") + (count.get() + m) * 8)
            count.set(count.get() + running)
        for stage in drives:
            self.set(f"drive:{stage.width}.base", self.field(f"drive:{stage.width}.origin"))
            self.run(stage, code.integer(0), count.get())

    def _step(self, drives: list[Stage], phase: Int, count: Int, done: Variable) -> None:
        time = self.time(phase)
        self.point_at_states(phase, count, self.code.integer(0))
        for state in self.cell.states:
            self.set_rows(f"next:{state}", self.history(state, phase))
        for stage in drives:
            drive = f"drive:{stage.width}"
            self.set(f"{drive}.base", self.field(f"{drive}.origin") + done.get() * self.field(f"{drive}.row"))
        for buffer in stepping(self.plan, self.cell):
            self.at_time(buffer, time)
        for stage in self.plan.stages:
            self.run(stage, self.code.integer(0), count)
            self.meet_if_units_are_shared()


def stepping(plan: Plan, cell: Cell) -> list[str]:
    """Buffers with a part for every step of time, the same rows in each."""
    named = {place.data[0] for stage in plan.stages for value, place in stage.stores}
    for stage in plan.stages:
        for value, _ in stage.stores:
            named |= {n.data[0] for n in plans.expr.postorder([value]) if n.op == "memory"}
    kinds = ("saved", "x", "outside", "d_output", "d_outside", "d_x_direct")
    return sorted(name for name in named if name.split(":")[0] in kinds)


# ---------------------------------------------------------------------------------------------------------------------
# Backward


FEW_INPUTS = 4
"""Inputs of at most so many numbers get their gradients as dot products; a tile of columns would be mostly empty."""


class BackwardDriver(Driver):
    """`backward(frame)`: block by block the adjoint loop, then the block's share of every gradient while it is warm."""

    plan: BackwardPlan

    def __init__(self, name: str, cell: Cell, plan: Plan, frame: Frame, itemsize: int) -> None:
        super().__init__(name, cell, plan, frame, itemsize)
        self.rings = [name for name in plan.slots if name.startswith("ring:")]
        self.gradient = next((s for s in self.stages if s.name == "input_gradient"), None)

    def pack(self) -> str:
        """`pack(frame)`: the weights as the kernels read them, and zeros in the gradients that will be added to."""
        code = self.code
        for stage in self.stages:
            if stage.groups and stage.name.startswith("stage"):
                self.pack_ring(stage)
        for stage in self.stages:
            if stage.name.startswith("leave") and stage.groups:
                with code.when(self.field("leaving") > 0):
                    self.pack_ring(stage)
        if self.gradient:
            few = self._few_inputs()
            wanted = self.field("d_x.wanted") > 0
            with code.when(code.builder.and_(wanted, code.builder.not_(few))):
                self.pack_ring(self.gradient)
            with code.when(code.builder.and_(wanted, few)):
                self._pack_few_inputs(self.gradient)
        self.pack_plan_vectors()
        with self._sums() as (total, parts, count, numbers):
            self._clear(total, numbers)
            with code.loop(count) as i:
                self._clear(code.load_integer(parts + i * 8), numbers)
        return code.text()

    def add_up(self) -> str:
        """`add_up(frame)`: the gradients of the shards of rows, added to the first one's in their order."""
        code = self.code
        with self._sums() as (total, parts, count, numbers):
            first, last, rest = self.for_numbers(numbers)
            with code.loop(count) as i:
                part = code.load_integer(parts + i * 8)
                with code.loop(last, start=first) as vector:
                    place = vector * self.vector_bytes
                    code.store(code.load(total + place).add(code.load(part + place)), total + place)
                with code.loop(numbers, start=rest) as number:
                    code.add_number(part + number * self.item, total + number * self.item)
        return code.text()

    @contextmanager
    def _sums(self) -> Iterator[tuple[Int, Int, Int, Int]]:
        """For each gradient of a parameter: where it is, the table of the other shards' parts, how many, how long."""
        code = self.code
        table = self.field("sums")
        with code.loop(code.load_integer(table)) as i:
            entry = table + 8 + i * 32
            total, parts, count, numbers = (code.load_integer(entry, 8 * k) for k in range(4))
            yield total, parts, count, numbers

    def _clear(self, address: Int, numbers: Int) -> None:
        code = self.code
        first, last, rest = self.for_numbers(numbers)
        with code.loop(last, start=first) as vector:
            code.store(code.fill(0.0), address + vector * self.vector_bytes)
        with code.loop(numbers, start=rest) as number:
            code.zero_number(address + number * self.item)

    def walk(self) -> str:
        """`walk(frame)`: the steps from last to first."""
        code = self.code
        first = self.field("phase.first")
        self.block_end = code.integer_variable(self.field("phase.last"))
        with code.forever() as leave_when:
            leave_when(self.block_end.get() <= first)
            self._block(first)
        self._finish()
        return code.text()

    def _finish(self) -> None:
        """Hand over what was summed slot by slot: gradients of vectors, and of matrices of few columns."""
        code = self.code
        for node, delta in plans.calculus.adjoint(self.cell).parameter.items():
            ring, slot = self.plan.delta_slot[delta].data
            width = ring.split(":")[1]
            to = self.field(f"d_weight:{node_label(node)}.base")
            first, last = self.share(self.field(f"tiles:{width}"))
            with code.when(to.differs(0)), code.loop(last, start=first) as tile:
                source = self.field(f"sums:{width}.base") + tile * (self.plan.slots[ring] * self.vector_bytes)
                mask = code.first(self.field(f"units:{width}") - tile * code.lanes)
                code.store(code.load(source, slot * self.vector_bytes), to + tile * self.vector_bytes, 0, mask)
        for number, (operand, products) in enumerate(self.plan.weights.items()):
            if operand.op == "input":
                with code.when(self.field(f"few{number}.base").differs(0)):
                    self._finish_few(number, products)

    def _finish_few(self, number: int, products: tuple[Node, ...]) -> None:
        code = self.code
        columns = self.field(f"weights{number}.columns")
        for product in products:
            ring, slot = self.plan.delta_slot[self._delta(product)].data
            width = ring.split(":")[1]
            size = self.plan.slots[ring] * self.vector_bytes
            to = self.field(f"d_weight:{node_label(product)}.base")
            stride = self.field(f"d_weight:{node_label(product)}.stride")
            first, last = self.share(self.field(f"tiles:{width}"))
            with code.when(to.differs(0)), code.loop(last, start=first) as tile, code.loop(columns) as column:
                source = self.field(f"few{number}.base") + (tile * columns + column) * size + slot * self.vector_bytes
                units = code.minimum(self.field(f"units:{width}") - tile * code.lanes, code.lanes)
                with code.loop(units) as lane:
                    target = to + (tile * code.lanes + lane) * stride + column * self.item
                    code.copy_number(source + lane * self.item, target)

    def _few_inputs(self) -> ir.Value:
        """Whether x is so narrow that its gradient is taken by dot products."""
        return self.field("few_inputs") > 0

    def _pack_few_inputs(self, stage: Stage) -> None:
        """Weights of a few inputs for dot products with ring rows: panel[tile][slot][input] is a vector of units."""
        code = self.code
        for group in stage.groups:
            width = group.operand.data[0].split(":")[1]
            columns = self.field("units:input")
            with self.own_share(self.field(f"tiles:{width}")) as tile:
                size = columns * (len(group.products) * self.vector_bytes)
                to = code.integer_variable(self.field(f"{panel_name(stage, group)}.base") + tile * size)
                units = code.minimum(self.field(f"units:{width}") - tile * code.lanes, code.lanes)
                for product in group.products:
                    start = self.field(f"weight:{node_label(product)}") + tile * code.lanes * (columns * self.item)
                    with code.loop(columns) as column:
                        with code.loop(code.lanes) as lane:
                            with code.when(lane < units):
                                number = start + (lane * columns + column) * self.item
                                code.copy_number(number, to.get() + lane * self.item)
                            with code.when(lane >= units):
                                code.zero_number(to.get() + lane * self.item)
                        to.set(to.get() + self.vector_bytes)

    def _block(self, first: Int) -> None:
        """Steps from the block's last back to its first, then its gradients. Edges lie at multiples of the block."""
        code = self.code
        end = self.block_end.get()
        begin = code.maximum((end - 1) // self.field("block") * self.field("block"), first)
        self.offset = code.integer_variable(0)  # rows already in the ring
        self.offset_next = code.integer_variable(self.field("ring.rows"))  # where the step after stands in the ring
        with code.loop(end - begin) as i:
            phase = end - 1 - i
            self._step(phase)
            self.offset_next.set(self.offset.get())
            self.offset.set(self.offset.get() + self.own_running(phase))
        self.meet()  # of frames that share units: the gradients of a block read the deltas of all of them
        self._keep(begin)
        self._gradients()
        self.meet()
        self.block_end.set(begin)

    def _step(self, phase: Int) -> None:
        code = self.code
        count = self.own_running(phase)
        later = self.own_running(phase + 1, exists=phase + 1 < self.field("phase.last"))
        going = code.minimum(count, later)
        time = self.time(phase)
        first = self.offset.get()
        self.point_at_states(phase, count, self._entry(first))
        self._point_at_x(time, count, first)
        self._point_at_ring(self.offset_next.get(), going, later, phase + 1)
        for ring in self.rings:
            self._place(ring, f"{ring}.origin", first)
        for place in self.plan.operands.values():
            self._place(place.data[0], f"{place.data[0]}.origin", first)
        for buffer in stepping(self.plan, self.cell):
            self.at_time(buffer, time)
        for state in self.cell.states:
            self.set_rows(f"after:{state}", self.history(state, phase))
        self._point_at_opening()
        for stage in self.plan.stages:
            self.run(stage, code.integer(0), going)
            self.run(stage, going, count, opening=1)
            self.meet_if_units_are_shared()
        self._leave(phase, time, count)

    def _point_at_opening(self) -> None:
        """Adjoints of outputs at rows' last phases: apart where final states add to them, else with all the others."""
        code = self.code
        apart = self.field("d_output_open.origin").differs(0)
        with code.when(apart):
            self.set_rows("d_output_open", self.field("d_output_open.origin"))
        with code.when(code.builder.not_(apart)):
            for part in ("base", "row"):
                self.set(f"d_output_open.{part}", self.field(f"d_output.{part}"))

    def _entry(self, row: Int) -> Int:
        return row * 8

    def _place(self, buffer: str, origin: str, first: Int) -> None:
        """Point a buffer of the block at this thread's rows of the step."""
        size = self.field(f"{buffer}.size")
        self.set(f"{buffer}.base", self.field(origin) + first * size)
        self.set(f"{buffer}.row", size)

    def _point_at_x(self, time: Int, count: Int, first: Int) -> None:
        """The rows of x and of dL/dx that belong to rows of the ring."""
        code = self.code
        for buffer in ("x", "d_x"):
            table = self.field(f"{buffer}_rows.table") + self._entry(first)
            start = self.field(f"{buffer}.origin") + time * self.field(f"{buffer}.step")
            with code.loop(count) as m:
                code.store_integer(start + self.rank(m) * self.field(f"{buffer}.size"), table + m * 8)

    def _point_at_ring(self, offset: Int, going: Int, later: Int, after: Int) -> None:
        """The rows of the step after, for the products that they carry; a row that was reset there carries nothing."""
        code = self.code
        for ring in self.rings:
            buffer = ring.replace("ring:", "ring_next:")
            size = self.field(f"{ring}.size")
            start = self.field(f"{ring}.origin") + offset * size
            table = self.field(f"{buffer}.base")
            with code.loop(going) as m:
                code.store_integer(start + m * size, table + m * 8)
            with (
                code.when(self.field("reset").differs(0)),
                code.loop(going) as m,
                code.when(self.is_reset(self.time(after), m) > 0),
            ):
                code.store_integer(self.field(f"{ring}.zero"), table + m * 8)

    def _leave(self, phase: Int, time: Int, count: Int) -> None:
        """Rows that began or were reset at this step hand the state's adjoint back to where the state came from."""
        code = self.code
        began = code.minimum(self.own_earlier(phase), count)
        resets = self.field("reset").differs(0)
        some = code.builder.and_(began < count, self.field("leaving") > 0)
        with code.when(code.builder.or_(resets, some)):
            for ring in self.rings:
                table = self.field(f"{ring.replace('ring:', 'ring_next:')}.base")
                with code.loop(count) as m:
                    code.store_integer(self.field(f"{ring}.base") + m * self.field(f"{ring}.row"), table + m * 8)
        with code.when(resets), code.loop(count) as m:
            is_reset = self.is_reset(time, m) > 0
            with code.when(is_reset):
                self._hand_back("d_initial", m, m + 1)
            with code.when(code.builder.and_(code.builder.not_(is_reset), m >= began)):
                self._hand_back("d_start", m, m + 1)
        with code.when(code.builder.and_(some, code.builder.not_(resets))):
            self._hand_back("d_start", began, count)

    def _hand_back(self, to: str, first: Int, last: Int) -> None:
        for state in self.cell.states:
            leaving = next(s for s in self.stages if s.name == f"leave_{state}")
            if not leaving.stores:
                continue
            self.set_rows(f"leaving:{state}", self.field(f"{to}:{state}.base"))
            self.run(leaving, first, last)

    def _keep(self, begin: Int) -> None:
        """The ring's rows of the block's first step, put aside for the block before it."""
        code = self.code
        count = self.own_running(begin)
        for ring in self.rings:
            width = ring.split(":")[1]
            size, tile_stride = self.field(f"{ring}.size"), self.field(f"{ring}.tile")
            origin = self.field(f"{ring}.origin")
            tiles = (self.field(f"tiles.first:{width}"), self.field(f"tiles.last:{width}"))
            with code.loop(tiles[1], start=tiles[0]) as tile, code.loop(count) as m:
                row = origin + tile * tile_stride
                source = row + (self.offset_next.get() + m) * size
                target = row + (self.field("ring.rows") + m) * size
                for slot in range(self.plan.slots[ring]):
                    code.store(code.load(source, slot * self.vector_bytes), target, slot * self.vector_bytes)

    # gradients of a block

    def _gradients(self) -> None:
        rows = self.offset.get()
        if self.gradient:
            with self.code.when(self.field("d_x.wanted") > 0):
                self._input_gradient(self.gradient, rows)
        for number, (operand, products) in enumerate(self.plan.weights.items()):
            with self.code.when(self.field(f"weights{number}.wanted") > 0):
                self._weight_gradient(number, operand, products, rows)
        for ring in self.rings:
            self._column_sums(ring, rows)

    def _input_gradient(self, stage: Stage, rows: Int) -> None:
        code = self.code
        first, last = self.share(rows)
        few = self._few_inputs()
        with code.when(few):
            group = stage.groups[0]
            ring = group.operand.data[0].replace("ring_all:", "ring:")
            arguments = [
                self.field(f"{ring}.origin") + first * self.field(f"{ring}.size"),
                self.field(f"{ring}.size"),
                self.field(f"{ring}.tile"),
                self.field(f"tiles:{ring.split(':')[1]}"),
                self.field(f"{panel_name(stage, group)}.base"),
                last - first,
                self.field("d_x_rows.table") + first * 8,
            ]
            code.call(self.field("dot"), arguments)
        with code.when(code.builder.not_(few)):
            self._input_gradient_by_stage(stage, first, last)

    def _input_gradient_by_stage(self, stage: Stage, first: Int, last: Int) -> None:
        for ring in self.rings:
            whole = ring.replace("ring:", "ring_all:")
            self.set(f"{whole}.base", self.field(f"{ring}.origin"))
            self.set(f"{whole}.row", self.field(f"{ring}.size"))
            self.set(f"{whole}.tile", self.field(f"{ring}.tile"))
            self.set(f"{whole}.tiles", self.field(f"tiles:{ring.split(':')[1]}"))
        self.set("d_x.base", self.field("d_x_rows.table"))
        self.set("d_x.row", self.code.integer(8))
        self.run(stage, first, last, all_tiles=True)

    def _column_sums(self, ring: str, rows: Int) -> None:
        """The sums of every slot over the block's rows: bias gradients and the like."""
        code = self.code
        width = ring.split(":")[1]
        slots = self.plan.slots[ring]
        first, last = self.share(self.field(f"tiles:{width}"))
        with code.when(self.field(f"sums:{width}.wanted") > 0), code.loop(last, start=first) as tile:
            source = self.field(f"{ring}.origin") + tile * self.field(f"{ring}.tile")
            to = self.field(f"sums:{width}.base") + tile * (slots * self.vector_bytes)
            kernel = self.field(f"column_sums:{width}")
            code.call(kernel, [source, self.field(f"{ring}.size"), 0, 0, rows, to, 0])

    def _weight_gradient(self, number: int, operand: Node, products: tuple[Node, ...], rows: Int) -> None:
        """dM += delta^T operand, for this thread's units."""
        code = self.code
        few = self.field(f"weights{number}.columns") <= FEW_COLUMNS
        table = self._operand_table(operand)
        places = {product: self.plan.delta_slot[self._delta(product)] for product in products}
        width = next(iter(places.values())).data[0].split(":")[1]
        share = self.share(self.field(f"tiles:{width}"))
        if operand.op == "input":
            with code.when(few):
                self._few_columns(number, table, places, share, rows)
            with code.when(code.builder.not_(few)):
                self._many_columns(number, table, places, share, rows)
        else:
            self._many_columns(number, table, places, share, rows)

    def _delta(self, product: Node) -> Node:
        return plans.calculus.adjoint(self.cell).delta[product]

    def _operand_table(self, operand: Node) -> Int:
        """Addresses of the operand's rows, one for each row of the ring."""
        if operand.op == "input":
            return self.field("x_rows.table")
        if operand.op == "state":
            return self.field(f"before:{operand.data[0]}.table")
        return self._operand_addresses(self.plan.operands[operand].data[0])

    def _operand_addresses(self, buffer: str) -> Int:
        code = self.code
        table = self.field(f"{buffer}.table")
        with code.loop(self.offset.get()) as row:
            address = self.field(f"{buffer}.origin") + row * self.field(f"{buffer}.size")
            code.store_integer(address, table + row * 8)
        return table

    def _many_columns(
        self, number: int, table: Int, places: dict[Node, Node], share: tuple[Int, Int], rows: Int
    ) -> None:
        """Columns by columns: pack a panel of the operand's rows, then every unit's product with it."""
        code = self.code
        columns = self.field(f"weights{number}.columns")
        vectors = (columns + code.lanes - 1) // code.lanes
        panels = Tiling(code, vectors, OUTER_COLUMNS)
        chunks = Tiling(code, rows, CHUNK)
        begin = code.integer_variable(0)
        with code.loop(chunks.count) as number_of_chunk:
            chunk, count = begin.get(), chunks.size(number_of_chunk)
            column = code.integer_variable(0)
            with code.loop(panels.count) as i:
                taken = panels.size(i)
                lanes = code.minimum(columns - column.get() - (taken - 1) * code.lanes, code.lanes)
                gather = code.load_integer(self.field("gather") + taken * 8)
                source, stride = table + chunk * 8, taken * self.vector_bytes
                code.call(gather, [source, column.get() * self.item, count, self.field("panel.base"), stride, lanes])
                with code.loop(share[1], start=share[0]) as tile:
                    for product, place in places.items():
                        with code.when(self.field(f"d_weight:{node_label(product)}.base").differs(0)):
                            self._outer(product, place, tile, chunk, count, column.get(), taken, lanes)
                column.set(column.get() + taken * code.lanes)
            begin.set(begin.get() + count)

    def _outer(
        self, product: Node, place: Node, tile: Int, chunk: Int, count: Int, column: Int, taken: Int, lanes: Int
    ) -> None:
        """The weight gradient of one product, one tile of units and one panel of columns."""
        code = self.code
        ring, slot = place.data
        width = ring.split(":")[1]
        size = self.field(f"{ring}.size")
        source = self.field(f"{ring}.origin") + tile * self.field(f"{ring}.tile") + chunk * size
        stride = self.field(f"d_weight:{node_label(product)}.stride")
        to = self.field(f"d_weight:{node_label(product)}.base") + tile * code.lanes * stride + column * self.item
        units = code.minimum(self.field(f"units:{width}") - tile * code.lanes, code.lanes)
        with code.loop(units, step=OUTER_ROWS) as unit:
            height = code.minimum(units - unit, OUTER_ROWS)
            masked = code.choose(lanes < code.lanes, 1, 0)
            entry = ((masked * (OUTER_ROWS + 1) + height) * (OUTER_COLUMNS + 1) + taken) * 8
            kernel = code.load_integer(self.field("outer") + entry)
            a = source + slot * self.vector_bytes + unit * self.item
            code.call(kernel, [a, size, self.field("panel.base"), count, to + unit * stride, stride, lanes])

    def _few_columns(
        self, number: int, table: Int, places: dict[Node, Node], share: tuple[Int, Int], rows: Int
    ) -> None:
        """All slots of a tile at once, for each of the operand's few columns, summed apart from the gradient itself."""
        code = self.code
        ring = next(iter(places.values())).data[0]
        slots = self.plan.slots[ring]
        columns = self.field(f"weights{number}.columns")
        with code.loop(share[1], start=share[0]) as tile:
            source = self.field(f"{ring}.origin") + tile * self.field(f"{ring}.tile")
            to = self.field(f"few{number}.base") + tile * columns * (slots * self.vector_bytes)
            kernel = self.field(f"few{number}.kernel")
            arguments = [source, self.field(f"{ring}.size"), table, 0, rows, to, slots * self.vector_bytes]
            code.call(kernel, arguments)
