"""How a cell becomes loops: stages of products with unit equations, and where every value lives in memory.

A fused target walks time once forward and once backward. Each step is a list of stages; a stage is a set of products
whose sums are accumulated in registers, followed by unit equations on what was accumulated (its epilogue). This module
decides which products go together, what is written where, and in which order; it knows no machine and prints no code.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property

from throughtime.equations import calculus, expr
from throughtime.equations.cell import VECTORS, Cell
from throughtime.equations.expr import OPS, Node, make


@dataclass(frozen=True)
class Accumulator:
    """A sum that products are added to: `leaf` stands for it in the epilogue, `start` (a memory leaf) begins it."""

    leaf: Node
    products: tuple[Node, ...]
    start: Node | None


@dataclass(frozen=True)
class Group:
    """Products that read one operand, so one loop over it: `feeds[i]` is the accumulator that products[i] adds to."""

    operand: Node
    products: tuple[Node, ...]
    feeds: tuple[int, ...]


@dataclass(frozen=True)
class Stage:
    """Products of one level and width, then unit equations: `stores` pairs values with memory leaves."""

    name: str
    width: str
    groups: tuple[Group, ...]
    accumulators: tuple[Accumulator, ...]
    stores: tuple[tuple[Node, Node], ...]

    @cached_property
    def operations(self) -> int:
        """How many unit operations the epilogue has."""
        return sum(node.op in OPS for node in expr.postorder(value for value, _ in self.stores))


@dataclass
class Plan:
    """One direction of a cell: its stages, and how many slots each tiled buffer has.

    Memory leaves are nodes `memory(buffer, slot)`. Buffers named "...:hidden" or "...:projected" hold slots of a vector
    per tile of units; the others are rows of numbers as torch lays them out.
    """

    stages: tuple[Stage, ...] = ()
    slots: dict[str, int] = field(default_factory=dict)
    vectors: dict[str, dict[tuple[Node, ...], int]] = field(default_factory=dict)
    drive: list[tuple[Node, tuple[Node, ...]]] = field(default_factory=list)
    drive_width: dict[Node, str] = field(default_factory=dict)
    operands: dict[Node, Node] = field(default_factory=dict)
    delta_slot: dict[Node, Node] = field(default_factory=dict)
    saved_slots: dict[str, int] = field(default_factory=dict)

    def ring_slots(self, group: Group) -> tuple[int, ...]:
        """The slots of the ring that a group of transposed products reads, in the order of its panel."""
        return tuple(self.delta_slot[product.args[0]].data[1] for product in group.products)

    def slot(self, buffer: str) -> Node:
        """The next free slot of a tiled buffer."""
        place = self.slots.get(buffer, 0)
        self.slots[buffer] = place + 1
        return memory(buffer, place)

    def vector(self, width: str, parts: tuple[Node, ...]) -> Node:
        """A vector of one number per unit, the sum of parameters, packed once per call."""
        known = self.vectors.setdefault(width, {})
        return memory(f"vectors:{width}", known.setdefault(parts, len(known)))


def memory(buffer: str, slot: int = 0) -> Node:
    """A leaf that is read from memory."""
    return make("memory", (), (buffer, slot))


# ---------------------------------------------------------------------------------------------------------------------
# Forward


@cache
def forward(cell: Cell) -> Plan:
    """The step: input products come ready-made in the drive, states are read through row pointers.

    The stores to "saved:..." are for training. They are part of the one plan, so that leaving them out for inference
    changes no rounding anywhere else.
    """
    plan = Plan()
    width = _width_reader(cell)
    targets = [(node, memory(f"next:{state}")) for state, node in zip(cell.states, cell.next, strict=True)]
    targets += [(node, plan.slot(f"saved:{width(node)}")) for node in calculus.saved(cell)]
    leaves = {node: _read(node) for node in cell.nodes if node.op in ("state", "input", "outside")}
    _Stager(cell, plan, width, leaves, "product").build(targets)
    return plan


def _read(leaf: Node) -> Node:
    """The rows that a state before the step, the input or an outside input is read from."""
    if leaf.op == "input":
        return memory("x")
    return memory(f"{'before' if leaf.op == 'state' else 'outside'}:{leaf.data[0]}")


# ---------------------------------------------------------------------------------------------------------------------
# Backward


@dataclass
class BackwardPlan(Plan):
    """The adjoint step, and what is left for after the loop.

    `carried[s]` holds the products M^T delta that reach state s from the step after, computed when that state's turn
    comes; `delta_slot` says where in the ring each adjoint over time is; `weights` lists, per operand, the products
    whose gradients are sums of delta times that operand.
    """

    carried: dict[str, tuple[Node, ...]] = field(default_factory=dict)
    direct: dict[str, Node] = field(default_factory=dict)
    weights: dict[Node, tuple[Node, ...]] = field(default_factory=dict)


@cache
def backward(cell: Cell) -> BackwardPlan:
    """The adjoint step: first the products that the step after carries back, then the adjoint equations, in stages."""
    plan = BackwardPlan()
    width = _width_reader(cell)
    adjoint = calculus.adjoint(cell)
    uses = _uses([*adjoint.roots])
    targets: list[tuple[Node, Node]] = []
    rewritten: dict[Node, Node] = {}
    for state, next_node in zip(cell.states, cell.next, strict=True):
        of_state = make("adjoint", (), (state,))
        terms = _terms(adjoint.state[state], uses) if state in adjoint.state else []
        carried = {term: None for term in terms if term.op == "transposed" and uses[term] == 1}
        rest = [term for term in terms if term not in carried]
        plan.carried[state] = tuple(carried)
        shown = state == cell.states[cell.output]
        start = None
        if rest or not shown:
            start = plan.direct[state] = plan.slot(f"carry:{width(next_node)}")
        if rest:
            targets.append((_added(rest), start))  # type: ignore[arg-type]
        elif start is not None:
            targets.append((expr.constant(0.0), start))
        rewritten[of_state] = make("carried", (), (state,))
    leaves = {node: _read(node) for node in cell.nodes if node.op in ("state", "input", "outside")}
    for node in calculus.saved(cell):
        buffer = f"saved:{width(node)}"
        leaves[node] = memory(buffer, plan.saved_slots.setdefault(buffer, 0))
        plan.saved_slots[buffer] += 1
    for state, node in zip(cell.states, cell.next, strict=True):
        leaves.setdefault(node, memory(f"after:{state}"))
    for node in _ring_order(cell, adjoint):
        place = plan.delta_slot[node] = plan.slot(f"ring:{width(node)}")
        targets.append((node, place))
    for name, node in adjoint.outside.items():
        targets.append((node, memory(f"d_outside:{name}")))
    if adjoint.input is not None:
        targets.append((adjoint.input, memory("d_x_direct")))
    operands: dict[Node, list[Node]] = {}
    for product in cell.products:
        if product in adjoint.delta:
            operands.setdefault(product.args[0], []).append(product)
    plan.weights = {operand: tuple(products) for operand, products in operands.items()}
    for i, operand in enumerate(o for o in operands if o.op not in ("input", "state")):
        place = plan.operands[operand] = memory(f"operand:{i}")
        targets.append((operand, place))
    _Stager(cell, plan, width, leaves, "transposed", rewritten).build(targets)
    return plan


# ---------------------------------------------------------------------------------------------------------------------
# Products outside the loop, written as stages too


def drive(plan: Plan, width: str) -> Stage | None:
    """Input products and their biases, for many rows at once: the drive that the loop's accumulators start from."""
    products = [(product, vectors) for product, vectors in plan.drive if plan.drive_width[product] == width]
    if not products:
        return None
    accumulators, stores = [], []
    for i, (product, _) in enumerate(products):
        leaf = make("accumulator", (), (i,))
        accumulators.append(Accumulator(leaf, (product,), memory(f"drive_bias:{width}", i)))
        stores.append((leaf, memory(f"drive:{width}", i)))
    group = Group(memory("x_rows"), tuple(p for p, _ in products), tuple(range(len(products))))
    return Stage(f"drive_{width}", width, (group,), tuple(accumulators), tuple(stores))


def leave(plan: BackwardPlan, cell: Cell, state: str) -> Stage:
    """What the step that a row began with, or was reset at, carries back to the state it began from: added to rows."""
    place = cell.states.index(state)
    width = cell.widths[place]
    carry = plan.direct.get(state)
    carried = plan.carried[state]
    target = memory(f"leaving:{state}")
    stores: list[tuple[Node, Node]] = []
    accumulators: tuple[Accumulator, ...] = ()
    groups: tuple[Group, ...] = ()
    if carried:
        leaf = make("accumulator", (), (0,))
        accumulators = (Accumulator(leaf, carried, carry),)
        by_ring: dict[str, list[Node]] = {}
        for product in sorted(carried, key=lambda p: int(plan.delta_slot[p.args[0]].data[1])):
            by_ring.setdefault(plan.delta_slot[product.args[0]].data[0], []).append(product)
        groups = tuple(
            Group(memory(ring.replace("ring:", "ring_next:")), tuple(products), (0,) * len(products))
            for ring, products in by_ring.items()
        )
        stores.append((target + leaf, target))
    elif carry is not None:
        stores.append((target + carry, target))
    if carry is not None:
        stores.append((expr.constant(0.0), carry))
    return Stage(f"leave_{state}", width, groups, accumulators, tuple(stores))


def input_gradient(plan: BackwardPlan, cell: Cell) -> Stage | None:
    """dL/dx for many rows at once: every W^T delta."""
    adjoint = calculus.adjoint(cell)
    products = [
        make("transposed", (adjoint.delta[p],), p.data)
        for p in cell.products
        if p.args[0].op == "input" and p in adjoint.delta
    ]
    if not products:
        return None
    by_ring: dict[str, list[Node]] = {}
    for product in sorted(products, key=lambda p: int(plan.delta_slot[p.args[0]].data[1])):
        by_ring.setdefault(plan.delta_slot[product.args[0]].data[0], []).append(product)
    leaf = make("accumulator", (), (0,))
    groups = tuple(
        Group(memory(ring.replace("ring:", "ring_all:")), tuple(p), (0,) * len(p)) for ring, p in by_ring.items()
    )
    accumulators = (Accumulator(leaf, tuple(products), None),)
    return Stage("input_gradient", "input", groups, accumulators, ((leaf, memory("d_x")),))


def _ring_order(cell: Cell, adjoint: calculus.Adjoint) -> list[Node]:
    """The deltas so ordered that those of x's products stand together, and those of the states' products too."""
    of_input = {adjoint.delta[p] for p in cell.products if p in adjoint.delta and p.args[0].op == "input"}
    of_state = {adjoint.delta[p] for p in cell.products if p in adjoint.delta and p.args[0].op == "state"}
    wanted = [*adjoint.delta.values(), *adjoint.parameter.values()]
    rank = {(True, False): 0, (True, True): 1, (False, True): 2, (False, False): 3}
    return sorted(dict.fromkeys(wanted), key=lambda node: rank[node in of_input, node in of_state])


# ---------------------------------------------------------------------------------------------------------------------
# Sums, levels, stages


def operand_width(cell: Cell, operand: Node) -> str:
    """The width of a computed operand."""
    return cell.width_of.get(operand, "hidden")


def outside_width(cell: Cell, name: str) -> str:
    """The width of the units that an outside input acts on."""
    leaf = make("outside", (), (name,))
    beside = {cell.width_of[n] for n in cell.nodes if n in cell.width_of and any(arg is leaf for arg in n.args)}
    return beside.pop() if len(beside) == 1 else "hidden"


def _width_reader(cell: Cell) -> Callable[[Node], str]:
    """The width of a node of the step or of its adjoint."""
    known = dict(cell.width_of)
    for name in cell.outside:
        known[make("outside", (), (name,))] = outside_width(cell, name)
    for owner, node in calculus.adjoint(cell).value.items():
        known.setdefault(node, known.get(owner, "hidden"))
    return lambda node: known.get(node, "hidden")


def _uses(roots: Iterable[Node]) -> Counter[Node]:
    roots = list(roots)
    count: Counter[Node] = Counter(roots)
    for node in expr.postorder(roots):
        count.update(node.args)
    return count


def _terms(node: Node, uses: Counter[Node]) -> list[Node]:
    """The terms of a sum, through inner sums that nothing else uses."""
    terms: list[Node] = []
    waiting = [node]
    while waiting:
        term = waiting.pop()
        if term.op == "add" and (term is node or uses[term] == 1):
            waiting.extend(reversed(term.args))
        else:
            terms.append(term)
    return terms


def _added(terms: Sequence[Node]) -> Node:
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


Rewriting = Generator[Node, Node, Node]
"""Yields nodes, is sent what they become, returns what its own node becomes."""


@dataclass
class _Store:
    """A value, the memory leaf that it is written to, its width, and the level of the stage that writes it."""

    value: Node
    place: Node
    width: str
    level: int = 0


AGAIN = 32
"""How many operations at most are done again in a later stage, for each value that it needs, rather than read back."""


class _Stager:
    """Rewrites values over memory leaves and accumulators, then deals them out to stages.

    Every walk visits a node once (once a stage, where stages differ) and keeps its place in a list, not on Python's
    stack: a cell may be as long and as deep as its author likes.
    """

    def __init__(
        self,
        cell: Cell,
        plan: Plan,
        width: Callable[[Node], str],
        leaves: dict[Node, Node],
        product_op: str,
        adjoints: dict[Node, Node] | None = None,
    ) -> None:
        self.cell, self.plan, self.width, self.product_op = cell, plan, width, product_op
        self.adjoints = adjoints or {}
        self.done: dict[Node, Node] = dict(leaves)
        self.level: dict[Node, int] = {}
        self.wide: dict[Node, str] = {place: width(leaf) for leaf, place in leaves.items()}
        self.summed: set[Node] = set()
        self.again: dict[Node, int] = {}
        self.accumulators: list[Accumulator] = []
        self.carried: set[Node] = set()
        if isinstance(plan, BackwardPlan):
            self.carried.update(*plan.carried.values())

    def build(self, targets: Sequence[tuple[Node, Node]]) -> None:
        """Fill `plan.stages` so that each target value is stored in its memory leaf."""
        roots = [node for node, _ in targets]
        self.uses = _uses_above(roots, self.done)
        stores = [_Store(self.rewrite(node), place, self._width_of(node, place)) for node, place in targets]
        placed = {place for _, place in targets}
        for operand, place in self.plan.operands.items():
            if place not in placed:
                stores.append(_Store(self.rewrite(operand), place, self.width(operand)))
        self._measure([store.value for store in stores])
        self._date(stores)
        stores += self._crossings(stores)
        self._deal(stores)

    # rewriting

    def rewrite(self, node: Node) -> Node:
        """The same value over memory leaves and accumulators."""
        waiting = [] if node in self.done else [(node, self._rewriting(node))]
        answer: Node | None = None
        while waiting:
            asker, steps = waiting[-1]
            try:
                wanted = steps.send(answer)  # type: ignore[arg-type]
            except StopIteration as finished:
                answer = self.done[asker] = finished.value
                waiting.pop()
            else:
                answer = self.done.get(wanted)
                if answer is None:
                    waiting.append((wanted, self._rewriting(wanted)))
        return self.done[node]

    def _rewriting(self, node: Node) -> Rewriting:
        """One node of `rewrite`, which sends it the new form of every node that it yields."""
        if node in self.adjoints:
            return self._adjoint_of_state(node)
        if node.op == "const":
            return node
        if node.op == "parameter":
            vector = self.plan.vector(self.width(node), (node,))
            self.wide[vector] = self.width(node)
            return vector
        if node.op == self.product_op:
            return (yield from self._sum([node]))
        if node.op == "add":
            return (yield from self._sum(_terms(node, self.uses)))
        args = []
        for arg in node.args:
            args.append((yield arg))
        return expr.apply(node.op, *args)

    def _sum(self, terms: list[Node]) -> Rewriting:
        """A sum whose products go into an accumulator, and the biases beside them into the accumulator's start."""
        alone = {term for term in terms if term.op == self.product_op and (self.uses[term] == 1 or len(terms) == 1)}
        inputs = [t for t in terms if t in alone and t.args[0].op == "input"][:1]
        depths: dict[Node, int] = {}
        for term in terms:
            if term in alone and term.args[0].op != "input":
                depths[term] = yield from self._depth(term)
        depth = max(depths.values(), default=0)
        rest = [term for term in depths if depths[term] == depth]
        vectors = tuple(t for t in terms if t.op == "parameter" and t.data[0] in VECTORS)
        summed = bool(inputs or rest)
        taken = {*inputs, *rest, *vectors} if summed else set()
        others = []
        for term in terms:
            if term not in taken:
                others.append((yield term))
        if not summed:
            return _added(others)
        width = self.width(terms[0]) if len(terms) == 1 else self.width((inputs + rest)[0])
        start: Node | None = None
        if inputs:
            start = self.plan.slot(f"drive:{width}")
            self.plan.drive.append((inputs[0], vectors))
            self.plan.drive_width[inputs[0]] = width
            self.wide[start] = width
        elif vectors:
            start = self.plan.vector(width, vectors)
        base = self._accumulator(tuple(rest), start, width, depth) if rest else start
        assert base is not None
        return _added([base, *others])

    def _adjoint_of_state(self, node: Node) -> Node:
        """dL/ds_t: what the loss says of s_t itself, and what the step after carries back to it."""
        assert isinstance(self.plan, BackwardPlan)
        state = node.data[0]
        place = self.cell.states.index(state)
        width = self.cell.widths[place]
        total: Node | None = self.plan.direct.get(state)
        if self.plan.carried[state]:
            total = self._accumulator(self.plan.carried[state], total, width, 0)
        if place == self.cell.output:
            shown = memory("d_output")
            self.wide[shown] = width
            total = shown if total is None else shown + total
        return expr.constant(0.0) if total is None else total

    def _accumulator(self, products: tuple[Node, ...], start: Node | None, width: str, depth: int) -> Node:
        for product in products:
            if product.op == "product" and product.args[0].op != "state":
                self._operand(product.args[0])
        leaf = make("accumulator", (), (len(self.accumulators),))
        self.accumulators.append(Accumulator(leaf, products, start))
        self.level[leaf], self.wide[leaf], self.again[leaf] = depth, width, 0
        self.summed.add(leaf)
        return leaf

    def _operand(self, operand: Node) -> None:
        """A computed operand is written as rows, so that the next stage's product can read it."""
        if operand not in self.plan.operands:
            self.plan.operands[operand] = memory(f"operand:{len(self.plan.operands)}")

    def _depth(self, product: Node) -> Generator[Node, Node, int]:
        """The stage at which a product can run."""
        operand = product.args[0]
        if operand.op in ("input", "state") or product in self.carried:
            return 0
        value = yield operand
        self._measure([value])
        return self.level[value] + 1

    # levels

    def _measure(self, roots: Iterable[Node]) -> None:
        """Of every node: its level, its width, whether sums of products are in it, what doing it again would cost."""
        for node in expr.postorder(roots, stop=lambda n: n in self.level):
            if node in self.level:
                continue
            self.level[node] = max((self.level[arg] for arg in node.args), default=0)
            if any(arg in self.summed for arg in node.args):
                self.summed.add(node)
            cost = min(AGAIN + 1, 1 + sum(self.again[arg] for arg in node.args)) if node.op in OPS else 0
            self.again[node] = 0 if self._is_dear(node) else cost
            widths = [self.wide[arg] for arg in node.args if arg in self.wide]
            if widths and node not in self.wide:
                self.wide[node] = widths[0]

    def _is_dear(self, node: Node) -> bool:
        """Whether a later stage reads the value back whatever lies under it: a sum of products, a costly function."""
        return node in self.summed and not (node.op in OPS and OPS[node.op].cheap)

    def _width_of(self, node: Node, place: Node) -> str:
        """The width of a value by where it goes: a tiled buffer says it in its name."""
        suffix = place.data[0].split(":")[-1]
        return suffix if suffix in ("hidden", "projected") else self.width(node)

    def _date(self, stores: list[_Store]) -> None:
        """When each value is written: as soon as it is known, but a carry only once nothing reads the old one."""
        last = {a.leaf: self.level[a.leaf] for a in self.accumulators}
        latest: dict[str, int] = {}
        for leaf, level in last.items():
            latest[self.wide[leaf]] = max(latest.get(self.wide[leaf], 0), level)
        for store in stores:
            store.level = self.level[store.value]
            if store.place.data[0].startswith("carry:"):
                store.level = max(store.level, latest.get(store.width, 0))

    def _crossings(self, stores: list[_Store]) -> list[_Store]:
        """Values of one level that a later level needs: written to scratch, and read back there.

        Only what is costly crosses; what takes few cheap operations is done again on the other side.
        """
        self.crossing: dict[Node, Node] = {}
        seen: set[tuple[Node, int]] = set()
        waiting = [(store.value, store.level) for store in reversed(stores)]
        while waiting:
            node, level = visit = waiting.pop()
            if visit in seen or node in self.crossing or not (node.op in OPS or node.op == "accumulator"):
                continue
            seen.add(visit)
            if self.level[node] != level and (self._is_dear(node) or self.again[node] > AGAIN):
                width = self.wide.get(node, "hidden")
                place = self.crossing[node] = self.plan.slot(f"scratch:{width}")
                self.wide[place] = width
                level = self.level[node]
            waiting.extend((arg, level) for arg in reversed(node.args))
        found = [_Store(value, place, self.wide[place]) for value, place in self.crossing.items()]
        self._date(found)
        return found

    def _deal(self, stores: list[_Store]) -> None:
        dealt: dict[tuple[int, str], list[_Store]] = {}
        own: dict[tuple[int, str], list[Accumulator]] = {}
        for store in stores:
            dealt.setdefault((store.level, store.width), []).append(store)
        for accumulator in self.accumulators:
            where = self.level[accumulator.leaf], self.wide[accumulator.leaf]
            own.setdefault(where, []).append(accumulator)
            dealt.setdefault(where, [])
        crossing = sorted(self.crossing.items(), key=lambda pair: self.level[pair[0]], reverse=True)
        earlier: dict[Node, Node] = {}
        stages: list[Stage] = []
        for level, width in sorted(dealt):
            while crossing and self.level[crossing[-1][0]] < level:
                earlier.update([crossing.pop()])
            ends, sums = dealt[level, width], own.get((level, width), [])
            # everything from earlier levels is read back from where it was written
            values = expr.substitute_all([store.value for store in ends], earlier)
            pairs = tuple((value, store.place) for value, store in zip(values, ends, strict=True))
            stages.append(Stage(f"stage{len(stages)}", width, self._groups(sums), tuple(sums), pairs))
        self.plan.stages = tuple(stages)

    def _groups(self, accumulators: list[Accumulator]) -> tuple[Group, ...]:
        """Products by what their loop reads. A loop over the ring feeds one accumulator, in the order of its slots."""
        reading: dict[tuple[Node, int], list[tuple[Node, int]]] = {}
        for i, accumulator in enumerate(accumulators):
            for product in accumulator.products:
                key = i if product.op == "transposed" else -1
                reading.setdefault((self._source(product), key), []).append((product, i))
        groups = []
        for (source, _), pairs in reading.items():
            if isinstance(self.plan, BackwardPlan):
                slots = self.plan.delta_slot
                pairs = sorted(pairs, key=lambda pair: int(slots[pair[0].args[0]].data[1]))
            groups.append(Group(source, tuple(p for p, _ in pairs), tuple(feed for _, feed in pairs)))
        return tuple(groups)

    def _source(self, product: Node) -> Node:
        """What a product's loop reads: rows of a state, rows of a computed operand, or the ring of deltas."""
        operand = product.args[0]
        if product.op == "transposed":
            which = "ring_next" if product in self.carried else "ring"
            return memory(f"{which}:{self.width(operand)}")
        if operand.op == "state":
            return memory(f"before:{operand.data[0]}")
        return self.plan.operands[operand]


def _uses_above(roots: Iterable[Node], given: dict[Node, Node]) -> Counter[Node]:
    """How often each node is used by what has to be computed; nodes that are given are not looked into."""
    roots = list(roots)
    count: Counter[Node] = Counter(roots)
    for node in expr.postorder(roots, stop=lambda n: n in given):
        if node not in given:
            count.update(node.args)
    return count
