"""The kernels: products with unit equations in their epilogue, transposed products for weight gradients, packing.

A kernel works on a tile: a few rows times a few vectors of units. It finds its buffers in a frame (an array of 64-bit
integers that the driver fills) and is told which rows and units to take. Sums run in blocks of about `BLOCK` terms that
are added to a total, so that float32 sums stay accurate however long they are; the order of every sum depends on the
sizes alone, so a row has the same bits in every company.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from throughtime.engine.plan import BackwardPlan, Group, Plan, Stage
from throughtime.engine.targets.cpu.llvm import Code, Int, Variable, Vector
from throughtime.engine.targets.cpu.machine import machine
from throughtime.equations import expr
from throughtime.equations.expr import OPS, Node

BLOCK = 64
"""How many terms are summed before the sum is added to its total."""

LONG = 64
"""So many unit operations take up a kernel as much as an accumulator does."""


class Frame:
    """The names of a frame's integers, and the place of each."""

    def __init__(self, names: Sequence[str]) -> None:
        self.place = {name: i for i, name in enumerate(dict.fromkeys(names))}

    def __len__(self) -> int:
        return len(self.place)

    def get(self, code: Code, frame: Int, name: str) -> Int:
        """The field's value, in the code under construction."""
        if name not in code.sets:
            code.needs.add(name)
        return code.load_integer(frame, 8 * self.place[name])

    def set(self, code: Code, frame: Int, name: str, value: Int) -> None:
        """Write the field."""
        code.sets.add(name)
        code.store_integer(value, frame, 8 * self.place[name])


TILED = ("saved", "scratch", "ring", "ring_all", "carry", "drive", "vectors", "drive_bias")


def is_tiled(buffer: str) -> bool:
    """Whether a buffer holds a vector of each slot per tile of units; the others are plain rows of numbers."""
    return buffer.split(":")[0] in TILED


def is_pointed(buffer: str) -> bool:
    """Whether a buffer's rows are found through a table of addresses."""
    return buffer.split(":")[0] in ("before", "ring_next", "x_rows", "d_x")


@dataclass(frozen=True)
class Shape:
    """How much one call of a stage kernel does: rows, tiles of units, and whether the last tile is partly empty."""

    rows: int
    tiles: int
    tail: bool


def vectors_per_tile(stage: Stage) -> int:
    """The accumulators that a stage needs for one row and one tile of units.

    Long unit equations count as more, so that their code is written out, and compiled, for fewer rows and tiles.
    """
    return max(1, len(stage.accumulators), stage.operations // LONG)


def row_limit(vectors: int) -> int:
    """The most rows a call may take, so that the accumulators stay in registers."""
    return max(1, min(8, _budget() // vectors))


def tile_limit(vectors: int, rows: int) -> int:
    """The most tiles of units a call may take beside that many rows."""
    return max(1, min(8, _budget() // (vectors * rows)))


def _budget() -> int:
    return 24 if machine().registers >= 32 else 12


# ---------------------------------------------------------------------------------------------------------------------
# Products with an epilogue


class StageKernel:
    """Builds `kernel(frame, first row, first tile, lanes of the last tile, opening)` for a stage.

    An opening call takes rows whose next step does not exist: their products with the ring of that step are left out.
    """

    def __init__(
        self,
        name: str,
        plan: Plan,
        stage: Stage,
        shape: Shape,
        frame: Frame,
        itemsize: int,
        save: bool,
        streaming: bool = False,
    ) -> None:
        self.plan, self.stage, self.shape, self.fields = plan, stage, shape, frame
        self.code = Code(name, ["frame", "row", "tile", "lanes", "opening"], itemsize)
        self.vector_bytes = self.code.lanes * itemsize
        self.mask = self.code.first(self.code["lanes"]) if shape.tail else None
        self.streaming = streaming
        self.known: dict[str, Int] = {}
        self.rows: dict[tuple[str, int], Int] = {}
        self.stores = [(v, p) for v, p in stage.stores if save or not p.data[0].startswith("saved:")]

    def text(self) -> str:
        """The kernel as LLVM IR."""
        if isinstance(self.plan, BackwardPlan):
            self._ask_ahead()
        totals = self._products()
        for row in range(self.shape.rows):
            for tile in range(self.shape.tiles):
                self._epilogue(row, tile, totals)
        return self.code.text()

    def _ask_ahead(self) -> None:
        """Prefetch what the next step back will load: it lies a step away, farther than hardware looks."""
        wanted: dict[str, tuple[str, int]] = {}
        for node in expr.postorder(value for value, _ in self.stage.stores):
            if node.op == "memory":
                kind, _, name = node.data[0].partition(":")
                if kind in ("saved", "d_output"):
                    wanted[node.data[0]] = (node.data[0], 1)
                elif kind in ("before", "after"):
                    steps = 2 if kind == "before" else 1
                    wanted[f"after:{name}"] = (f"after:{name}", max(steps, wanted.get(f"after:{name}", ("", 0))[1]))
        for buffer, steps in wanted.values():
            ahead = self.field(f"{buffer}.ahead") * steps
            size = self.plan.saved_slots[buffer] * self.vector_bytes if buffer in self.plan.saved_slots else 0
            for row in range(self.shape.rows):
                for tile in range(self.shape.tiles):
                    address = self.address(buffer, row, tile) + ahead
                    for offset in range(0, max(size, self.vector_bytes), 64):
                        self.code.prefetch(address, offset, locality=2)

    # addresses

    def field(self, name: str) -> Int:
        """A field of the frame, read once: a store between two readings might have changed it, for all LLVM knows."""
        if name not in self.known:
            self.known[name] = self.fields.get(self.code, self.code["frame"], name)
        return self.known[name]

    def address(self, buffer: str, row: int, tile: int) -> Int:
        """Where a row's values for a tile of units begin."""
        unit = self.code["tile"] + tile
        if buffer.startswith("vectors") or buffer.startswith("drive_bias"):
            return self.field(f"{buffer}.base") + unit * self.field(f"{buffer}.tile")
        step = self.field(f"{buffer}.tile") if is_tiled(buffer) else self.code.integer(self.vector_bytes)
        return self.row(buffer, row) + unit * step

    def row(self, buffer: str, row: int) -> Int:
        """Where a row begins."""
        if (buffer, row) not in self.rows:
            first, stride = self._first_row(buffer)
            place = first + stride * row if row else first
            self.rows[buffer, row] = self.code.load_integer(place) if is_pointed(buffer) else place
        return self.rows[buffer, row]

    def _first_row(self, buffer: str) -> tuple[Int, Int]:
        """Where the first row of the call begins, or its entry in the table, and how far it is to the next."""
        base, stride = self.field(f"{buffer}.base"), self.field(f"{buffer}.row")
        if buffer == "d_output":
            opening = self.code["opening"] > 0
            base = self.code.choose(opening, self.field("d_output_open.base"), base)
            stride = self.code.choose(opening, self.field("d_output_open.row"), stride)
        return base + self.code["row"] * stride, stride

    def load(self, leaf: Node, row: int, tile: int) -> Vector:
        """The value of a memory leaf."""
        buffer, slot = leaf.data
        masked = self.mask if tile == self.shape.tiles - 1 and not is_tiled(buffer) else None
        return self.code.load(self.address(buffer, row, tile), slot * self.vector_bytes, masked)

    def store(self, value: Vector, leaf: Node, row: int, tile: int) -> None:
        """Write to a memory leaf; lanes that are no units are zero in the ring, where a later product reads them."""
        buffer, slot = leaf.data
        mask = self.mask if tile == self.shape.tiles - 1 else None
        if mask is not None and is_tiled(buffer):
            value = Vector(self.code, self.code.builder.select(mask, value.value, self.code.fill(0.0).value))
            mask = None
        streaming = self.streaming and buffer.startswith("saved:")
        self.code.store(value, self.address(buffer, row, tile), slot * self.vector_bytes, mask, streaming)

    # products

    def _products(self) -> list[list[list[Variable]]]:
        """The accumulators, [row][tile][which], after every product of the stage."""
        rows, tiles = range(self.shape.rows), range(self.shape.tiles)

        def start(leaf: Node | None, row: int, tile: int) -> Vector:
            return self.code.fill(0.0) if leaf is None else self.load(leaf, row, tile)

        totals = [
            [[self.code.vector_variable(start(a.start, row, tile)) for a in self.stage.accumulators] for tile in tiles]
            for row in rows
        ]
        for group in self.stage.groups:
            self._group(group, totals)
        return totals

    def _group(self, group: Group, totals: list[list[list[Variable]]]) -> None:
        """One loop over an operand: every product of the group, for every row and tile."""
        code = self.code
        buffer = group.operand.data[0]
        addresses = [self.row(buffer, row) for row in range(self.shape.rows)]
        panel = self.field(f"{panel_name(self.stage, group)}.base")
        stride = self.field(f"{panel_name(self.stage, group)}.tile")
        panels = [panel + (code["tile"] + tile) * stride for tile in range(self.shape.tiles)]
        kind = buffer.split(":")[0]
        if kind in ("ring", "ring_next", "ring_all"):
            feeds, runs = (group.feeds[0],), slot_runs(self.plan.ring_slots(group))
            count = self.field(f"{buffer}.tiles")
            if kind == "ring_next":
                count = code.choose(code["opening"] > 0, 0, count)
            length = sum(run for _, run in runs) * code.lanes
            # The loop's sums are short beside those of x's gradient, which adds up every gate of every unit.
            together = max(1, (BLOCK if kind == "ring_all" else 3 * BLOCK // 2) // length)
            self._walk_ring(addresses, panels, feeds, runs, count, self.field(f"{buffer}.tile"), together, totals)
        else:
            count = self.field(f"{buffer}.count")
            self._walk_rows(addresses, panels, group.feeds, count, totals)

    def _walk_rows(
        self,
        addresses: list[Int],
        panels: list[Int],
        feeds: Sequence[int],
        count: Int,
        totals: list[list[list[Variable]]],
    ) -> None:
        """Operand rows as they lie in memory, `count` numbers each, in blocks."""
        code, item = self.code, self.code.itemsize
        width = len(feeds) * self.vector_bytes
        with code.loop(count, step=BLOCK) as block, self._block(feeds, totals) as sums:
            left = code.minimum(count - block, BLOCK)
            with code.loop(left) as k:
                place = block + k
                self._multiply([a + place * item for a in addresses], [p + place * width for p in panels], feeds, sums)

    def _walk_ring(
        self,
        addresses: list[Int],
        panels: list[Int],
        feeds: Sequence[int],
        runs: Sequence[tuple[int, int]],
        count: Int,
        tile_stride: Int,
        together: int,
        totals: list[list[list[Variable]]],
    ) -> None:
        """Rows of a ring, tile by tile: in each tile the runs of slots that the group's deltas fill."""
        code, item, lanes = self.code, self.code.itemsize, self.code.lanes
        length = sum(run for _, run in runs) * lanes
        width = len(feeds) * self.vector_bytes
        with (
            code.loop(count, step=together) as block,
            self._block(feeds, totals) as sums,
            code.loop(code.minimum(block + together, count), start=block) as tile,
        ):
            done = 0
            for first, run in runs:
                begin = tile * tile_stride + first * self.vector_bytes
                rows = [a + begin for a in addresses]
                base = (tile * length + done) * width
                with code.loop(run * lanes) as k:
                    here = [p + base + k * width for p in panels]
                    self._multiply([a + k * item for a in rows], here, feeds, sums)
                done += run * lanes

    def _block(self, feeds: Sequence[int], totals: list[list[list[Variable]]]) -> _Block:
        return _Block(self.code, feeds, totals)

    def _multiply(
        self, operands: list[Int], panels: list[Int], feeds: Sequence[int], sums: list[list[list[Variable]]]
    ) -> None:
        """One term of every sum: a number of each row times the panel's vectors."""
        code = self.code
        columns = [[code.load(panel, i * self.vector_bytes) for i in range(len(feeds))] for panel in panels]
        for row, operand in enumerate(operands):
            number = code.broadcast(operand)
            for tile, vectors in enumerate(columns):
                for i, vector in enumerate(vectors):
                    total = sums[row][tile][i]
                    total.set(number.fma(vector, total.get()))

    # unit equations

    def _epilogue(self, row: int, tile: int, totals: list[list[list[Variable]]]) -> None:
        """The unit equations of one row and one tile."""
        place = {a.leaf: i for i, a in enumerate(self.stage.accumulators)}

        def leaf(node: Node) -> Vector:
            if node.op == "const":
                return self.code.fill(node.data[0])
            if node.op == "accumulator":
                value: Vector = totals[row][tile][place[node]].get()
                return value
            return self.load(node, row, tile)

        every = [value for value, _ in self.stage.stores]
        needed = [value for value, _ in self.stores]
        values = evaluate(needed, leaf, contracted(every))
        for value, memory in self.stores:
            self.store(values[value], memory, row, tile)


class _Block:
    """Fresh sums for a block of terms, added to the totals when it ends."""

    def __init__(self, code: Code, feeds: Sequence[int], totals: list[list[list[Variable]]]) -> None:
        self.code, self.feeds, self.totals = code, feeds, totals

    def __enter__(self) -> list[list[list[Variable]]]:
        self.sums = [[[self.code.vector_variable() for _ in self.feeds] for _ in tiles] for tiles in self.totals]
        return self.sums

    def __exit__(self, *_: object) -> None:
        for sums_of_row, totals_of_row in zip(self.sums, self.totals, strict=True):
            for sums, totals in zip(sums_of_row, totals_of_row, strict=True):
                for feed, partial in zip(self.feeds, sums, strict=True):
                    totals[feed].set(totals[feed].get().add(partial.get()))


def panel_name(stage: Stage, group: Group) -> str:
    """What the packed weights of a group are called: loops over the same weights in the same order share them."""
    source = group.operand.data[0]
    read = "ring" if source.startswith("ring") else source
    return f"panel:{stage.width}<{read}<{','.join(node_label(product) for product in group.products)}"


def node_label(node: Node) -> str:
    """A product's matrix or a parameter: its namespace and gate."""
    return f"{node.data[0]}.{node.data[1]}"


def slot_runs(slots: Sequence[int]) -> list[tuple[int, int]]:
    """Neighbouring slots taken together: (first, how many)."""
    runs: list[tuple[int, int]] = []
    for slot in slots:
        if runs and slot == runs[-1][0] + runs[-1][1]:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((slot, 1))
    return runs


def contracted(roots: Sequence[Node]) -> dict[Node, int]:
    """Sums and differences that take up a product of theirs as a fused multiply-add: which argument it is.

    A product is taken up if nothing else uses it. The choice looks at the whole stage, saved values included, so
    that training and inference round alike.
    """
    uses: dict[Node, int] = {}
    order = expr.postorder(roots)
    for used in [*roots, *(arg for node in order for arg in node.args)]:
        uses[used] = uses.get(used, 0) + 1
    fused: dict[Node, int] = {}
    for node in order:
        if node.op in ("add", "sub"):
            for place in (1, 0):
                arg = node.args[place]
                if arg.op == "mul" and uses[arg] == 1 and node.args[0] is not node.args[1]:
                    fused[node] = place
                    break
    return fused


def evaluate(roots: Sequence[Node], leaf: Callable[[Node], Vector], fused: dict[Node, int]) -> dict[Node, Vector]:
    """The vectors that the roots are worth, by the llvm column of the op table."""
    absorbed = {node.args[place] for node, place in fused.items()}
    at: dict[Node, Vector] = {}
    for node in expr.postorder(roots):
        if node.op not in OPS:
            at[node] = leaf(node)
        elif node in fused:
            place = fused[node]
            a, b = (at[arg] for arg in node.args[place].args)
            other = at[node.args[1 - place]]
            if node.op == "add":
                at[node] = a.fma(b, other)
            elif place == 0:
                at[node] = a.fma(b, other.neg())
            else:
                at[node] = a.neg().fma(b, other)
        elif node not in absorbed:
            first, *rest = (at[arg] for arg in node.args)
            at[node] = getattr(first, OPS[node.op].llvm)(*rest)
    return at


# ---------------------------------------------------------------------------------------------------------------------
# Weight gradients: C += A^T B, summed over the rows of a block


def outer_kernel(name: str, rows: int, vectors: int, masked: bool, itemsize: int) -> str:
    """`kernel(A, stride of A, panel, count, C, stride of C, lanes)`: C[m, :] += sum over k of A[k, m] * panel[k, :].

    A[k, m] is number m of row k (of the ring), panel[k] is `vectors` vectors of an operand's row.
    """
    code = Code(name, ["a", "a_stride", "panel", "count", "c", "c_stride", "lanes"], itemsize)
    width = code.lanes * itemsize
    mask = code.first(code["lanes"]) if masked else None
    places = [[(code["c"] + code["c_stride"] * m, n * width) for n in range(vectors)] for m in range(rows)]
    for row in places:
        for address, offset in row:
            code.prefetch(address, offset, write=True)
    sums = [[code.vector_variable() for _ in range(vectors)] for _ in range(rows)]
    with code.loop(code["count"]) as k:
        panel, a = code["panel"] + k * (vectors * width), code["a"] + k * code["a_stride"]
        columns = [code.load(panel, n * width) for n in range(vectors)]
        for m in range(rows):
            number = code.broadcast(a, m * itemsize)
            for n in range(vectors):
                sums[m][n].set(number.fma(columns[n], sums[m][n].get()))
    for m in range(rows):
        for n, (address, offset) in enumerate(places[m]):
            only = mask if n == vectors - 1 else None
            code.store(code.load(address, offset, only).add(sums[m][n].get()), address, offset, only)
    return code.text()


def column_kernel(name: str, slots: int, operand: int, itemsize: int) -> str:
    """`kernel(ring, stride, rows table, first, count, C, stride of C)`: sums over a block of ring rows.

    Adds sum_k row[k][first + i] * ring[k] to C[i] for `operand` numbers i of each row; with `operand` 0, the plain sums
    of the ring to C[0]. It serves bias gradients and operands of few columns, where a panel would be mostly empty.
    """
    code = Code(name, ["ring", "stride", "table", "first", "count", "c", "c_stride"], itemsize)
    width = code.lanes * itemsize
    outputs = max(1, operand)
    sums = [[code.vector_variable() for _ in range(slots)] for _ in range(outputs)]
    short = (
        BLOCK if operand else BLOCK // 4
    )  # without a product of its own rounding, a sum shows the order it is taken in
    with code.loop(code["count"], step=short) as block:
        partial = [[code.vector_variable() for _ in range(slots)] for _ in range(outputs)]
        with code.loop(code.minimum(code["count"] - block, short)) as k:
            ring = code["ring"] + (block + k) * code["stride"]
            deltas = [code.load(ring, slot * width) for slot in range(slots)]
            numbers: list[Vector] = []
            if operand:
                row = code.load_integer(code["table"] + (block + k) * 8) + code["first"] * itemsize
                numbers = [code.broadcast(row, i * itemsize) for i in range(operand)]
            for i in range(outputs):
                for slot in range(slots):
                    total = partial[i][slot]
                    value = numbers[i].fma(deltas[slot], total.get()) if operand else total.get().add(deltas[slot])
                    total.set(value)
        for i in range(outputs):
            for slot in range(slots):
                sums[i][slot].set(sums[i][slot].get().add(partial[i][slot].get()))
    for i in range(outputs):
        for slot in range(slots):
            address = code["c"] + code["c_stride"] * i
            code.store(code.load(address, slot * width).add(sums[i][slot].get()), address, slot * width)
    return code.text()


def dot_kernel(name: str, slots: int, first: int, products: int, columns: int, itemsize: int) -> str:
    """`kernel(ring, stride, tile stride, tiles, panel, count, table)`: rows of few numbers, each a dot with a ring row.

    Row k of the table gets, for each column, the sum over tiles and `products` slots from `first` of delta times panel.
    """
    code = Code(name, ["ring", "stride", "tile_stride", "tiles", "panel", "count", "table"], itemsize)
    width = code.lanes * itemsize
    with code.loop(code["count"]) as k:
        row = code["ring"] + k * code["stride"]
        sums = [code.vector_variable() for _ in range(columns)]
        with code.loop(code["tiles"]) as tile:
            ring = row + tile * code["tile_stride"]
            panel = code["panel"] + tile * (products * columns * width)
            for slot in range(products):
                delta = code.load(ring, (first + slot) * width)
                for i in range(columns):
                    weight = code.load(panel, (slot * columns + i) * width)
                    sums[i].set(delta.fma(weight, sums[i].get()))
        to = code.load_integer(code["table"] + k * 8)
        for i in range(columns):
            code.store_sum(sums[i].get(), to + i * itemsize)
    return code.text()


# ---------------------------------------------------------------------------------------------------------------------
# Packing


def gather_kernel(name: str, vectors: int, itemsize: int) -> str:
    """`kernel(table, offset, count, to, stride, lanes)`: copy `vectors` vectors of each pointed row, in order."""
    code = Code(name, ["table", "offset", "count", "to", "stride", "lanes"], itemsize)
    width = code.lanes * itemsize
    mask = code.first(code["lanes"])
    with code.loop(code["count"]) as k:
        row = code.load_integer(code["table"] + k * 8) + code["offset"]
        to = code["to"] + k * code["stride"]
        for n in range(vectors):
            code.store(code.load(row, n * width, mask if n == vectors - 1 else None), to, n * width)
    return code.text()


def transpose_kernel(name: str, itemsize: int) -> str:
    """`kernel(from, stride, rows, columns, to, stride of to)`: to[k] = from[0..lanes][k], zero past `rows`.

    Packs a tile of a weight matrix so that step k of a product reads one vector of all units of the tile.
    """
    code = Code(name, ["from", "stride", "rows", "columns", "to", "to_stride"], itemsize)
    lanes = code.lanes
    with code.loop(code["columns"], step=lanes) as k:
        mask = code.first(code["columns"] - k)
        left = code.minimum(code["columns"] - k, lanes)
        vectors = []
        for j in range(lanes):
            there = code.first(code.maximum(code["rows"] - j, 0) * lanes)
            both = code.builder.and_(mask, there)
            vectors.append(code.load(code["from"] + code["stride"] * j + k * itemsize, 0, both))
        for j, vector in enumerate(_transposed(code, vectors)):
            with code.when(left > j):
                code.store(vector, code["to"] + (k + j) * code["to_stride"])
    return code.text()


def _transposed(code: Code, vectors: list[Vector]) -> list[Vector]:
    """A square of numbers transposed in registers, halves of doubling blocks swapped between pairs of vectors."""
    from llvmlite import ir

    lanes = len(vectors)
    index = ir.VectorType(ir.IntType(32), lanes)
    distance = 1
    while distance < lanes:
        swapped = list(vectors)
        low = [i if not i & distance else lanes + i - distance for i in range(lanes)]
        high = [i + distance if not i & distance else lanes + i for i in range(lanes)]
        for i in range(lanes):
            if not i & distance:
                a, b = vectors[i].value, vectors[i + distance].value
                for place, order in ((i, low), (i + distance, high)):
                    mask = ir.Constant(index, [ir.Constant(ir.IntType(32), j) for j in order])
                    swapped[place] = Vector(code, code.builder.shuffle_vector(a, b, mask))
        vectors = swapped
        distance *= 2
    return vectors
