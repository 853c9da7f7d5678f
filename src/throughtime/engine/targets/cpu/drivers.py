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
from throughtime.engine.targets.cpu.kernels import Frame, node_label, panel_name, row_limit, vectors_per_tile
from throughtime.engine.targets.cpu.llvm import Code, Int, Variable
from throughtime.equations.cell import Cell
from throughtime.equations.expr import Node


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
    names += ["walk.first", "walk.last", "block", "rows.first", "rows.stride", "rows.count", "rows.batch"]
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
        return self.own_running(phase - 1, exists=phase > 0)

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
        """`walk(frame)`: the phases from `walk.first` up to `walk.last`."""
        code = self.code
        drives = [s for s in self.stages if s.name.startswith("drive")]
        last = self.field("walk.last")
        with code.loop(last, start=self.field("walk.first"), step=self.field("block")) as begin:
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
