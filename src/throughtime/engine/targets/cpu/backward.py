"""The time loop backward: block by block the adjoints, then the block's share of every gradient while it is warm."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from llvmlite import ir

from throughtime.engine import plan as plans
from throughtime.engine.plan import BackwardPlan, Plan, Stage
from throughtime.engine.targets.cpu.drivers import Driver, Tiling, stepping
from throughtime.engine.targets.cpu.kernels import Frame, node_label, panel_name
from throughtime.engine.targets.cpu.llvm import Int
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
        """`walk(frame)`: the phases from before `walk.last` down to `walk.first`."""
        code = self.code
        first = self.field("walk.first")
        self.block_end = code.integer_variable(self.field("walk.last"))
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
        later = self.own_running(phase + 1, exists=phase + 1 < self.field("steps"))
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
