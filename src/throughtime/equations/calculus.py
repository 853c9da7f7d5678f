"""Derivatives of a cell: the adjoint equations of back-propagation through time, what to save, the step Jacobian.

Everything here is again a graph of nodes, so whatever can run or print a cell can run or print its derivatives. Two
leaves are added: `adjoint(s)`, the adjoint dL/ds_t of a next state, and `transposed(M, delta)`, a product with M^T.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

from throughtime.equations import expr
from throughtime.equations.cell import Cell
from throughtime.equations.expr import OPS, Node, make
from throughtime.errors import CellError


@dataclass(frozen=True)
class Adjoint:
    """One step of back-propagation through time.

    `delta[product]` is the adjoint of a product M @ v: it gives dM += delta v^T. `parameter[node]` is summed over rows
    and steps. `state[s]` is dL/ds_{t-1} through this step; `input` is the part of dL/dx_t from x used unit by unit,
    to which every W^T delta is added; `outside` is per row and unit. `value` maps the forward values, in reverse
    order, to their adjoints (for printing). A missing entry is an adjoint of zero.
    """

    delta: Mapping[Node, Node]
    parameter: Mapping[Node, Node]
    state: Mapping[str, Node]
    outside: Mapping[str, Node]
    input: Node | None
    value: Mapping[Node, Node]

    @property
    def over_time(self) -> tuple[Node, ...]:
        """The adjoints that are used after the loop, over all steps together."""
        ends = [*self.delta.values(), *self.parameter.values(), *self.outside.values()]
        return tuple(dict.fromkeys(ends if self.input is None else [*ends, self.input]))

    @property
    def roots(self) -> tuple[Node, ...]:
        """Everything that a backward step computes."""
        return tuple(dict.fromkeys([*self.over_time, *self.state.values()]))


@cache
def adjoint(cell: Cell) -> Adjoint:
    """Reverse-mode differentiation of one step; sources: Werbos 1990 (BPTT), Griewank & Walther 2008 (reverse mode)."""
    seeds = {make("adjoint", (), (state,)): node for state, node in zip(cell.states, cell.next, strict=True)}
    value = reverse((node, seed) for seed, node in seeds.items())
    pick = {kind: {n: g for n, g in value.items() if n.op == kind} for kind in expr.LEAVES}
    inputs = list(pick["input"].values())
    return Adjoint(
        delta={product: value[product] for product in cell.products if product in value},
        parameter=pick["parameter"],
        state={node.data[0]: g for node, g in pick["state"].items()},
        outside={node.data[0]: g for node, g in pick["outside"].items()},
        input=inputs[0] if inputs else None,
        value=value,
    )


def reverse(seeds: Iterable[tuple[Node, Node]], through_products: bool = True) -> dict[Node, Node]:
    """The adjoint of every node under the seeded ones, in reverse order of computation.

    `through_products=False` treats a product as a leaf, so that the result is unit-by-unit partial derivatives.
    """
    seeds = list(seeds)
    total: dict[Node, Node] = {}

    def add(node: Node, term: Node | None) -> None:
        if term is not None and node.op != "const":
            total[node] = total[node] + term if node in total else term

    for node, seed in seeds:
        add(node, seed)
    result: dict[Node, Node] = {}
    order = expr.postorder([node for node, _ in seeds], stop=lambda node: node.op == "product" and not through_products)
    for node in reversed(order):
        if node not in total:
            continue
        g = result[node] = total[node]
        if node.op == "product":
            if through_products and node.args[0].op != "input":
                add(node.args[0], make("transposed", (g,), node.data))
        elif node.op in OPS:
            for arg, term in zip(node.args, OPS[node.op].derivative(node, g), strict=True):
                add(arg, term)
    return result


# ---------------------------------------------------------------------------------------------------------------------
# What to save


@cache
def saved(cell: Cell) -> tuple[Node, ...]:
    """The fewest forward values that the backward step needs kept, besides x and the states before and after the step.

    A minimum cut: products and costly operations have to be saved or lie above something saved, cheap operations may
    be computed again. Among minimum cuts it takes the one nearest to the backward pass, which computes least again.
    """
    forward = set(cell.nodes)
    operands = [product.args[0] for product in cell.products if product.args[0].op != "input"]
    needed = list(dict.fromkeys([*_frontier(adjoint(cell).roots, forward), *operands]))
    free = {node for node in forward if node.op in expr.LEAVES and node.op != "product"} | set(cell.next)
    needed = [node for node in needed if node not in free]
    cut = _minimum_cut(needed, free)
    return tuple(node for node in cell.nodes if node in cut)


def _frontier(roots: Iterable[Node], forward: set[Node]) -> list[Node]:
    """The forward values that the adjoint expressions touch first."""
    return [node for node in expr.postorder(roots, stop=lambda n: n in forward) if node in forward]


def _minimum_cut(needed: list[Node], free: set[Node]) -> set[Node]:
    """Maximum flow through a graph whose nodes, not edges, have capacity one, and the cut nearest to its end."""
    below = [n for n in expr.postorder(needed, stop=lambda n: n in free or not _cheap(n)) if n not in free]
    inside = set(below)
    many = len(below) + 1
    graph: Network = {"source": {}, "sink": {}}

    def edge(start: object, end: object, capacity: int) -> None:
        graph.setdefault(start, {})[end] = capacity
        graph.setdefault(end, {}).setdefault(start, 0)

    for node in below:
        edge(("in", node), ("out", node), many if node.is_condition else 1)  # a truth is no value to keep
        if not _cheap(node):
            edge("source", ("in", node), many)
        else:
            for arg in node.args:
                if arg in inside:
                    edge(("out", arg), ("in", node), many)
    for node in needed:
        edge(("out", node), "sink", many)
    while (distance := _distances(graph, "source", "sink")) is not None:
        _fill(graph, distance, "source", "sink")
    reaching = _reaching(graph, "sink")
    return {node for node in below if ("out", node) in reaching and ("in", node) not in reaching}


def _cheap(node: Node) -> bool:
    return node.op in OPS and OPS[node.op].cheap


Network = dict[object, dict[object, int]]
"""What may still flow along each edge; every edge has one back, along which flow is undone."""


def _distances(graph: Network, start: object, goal: object) -> dict[object, int] | None:
    """How many edges with capacity lead to each place, as far as the goal; None where none lead to the goal."""
    distance = {start: 0}
    queue = deque([start])
    while queue and goal not in distance:
        here = queue.popleft()
        for there, capacity in graph[here].items():
            if capacity > 0 and there not in distance:
                distance[there] = distance[here] + 1
                queue.append(there)
    return distance if goal in distance else None


def _fill(graph: Network, distance: dict[object, int], start: object, goal: object) -> None:
    """Send flow along shortest paths until each is blocked (Dinic 1970): every edge that fails is tried once."""
    ways = {place: list(graph[place]) for place in distance}
    path = [start]
    while path:
        here = path[-1]
        if here == goal:
            edges = list(pairwise(path))
            flow = min(graph[a][b] for a, b in edges)
            for a, b in edges:
                graph[a][b] -= flow
                graph[b][a] += flow
            path = path[: 1 + next(i for i, (a, b) in enumerate(edges) if graph[a][b] == 0)]
        elif not ways[here]:
            path.pop()
            if path:
                ways[path[-1]].pop()
        elif graph[here][there := ways[here][-1]] > 0 and distance.get(there) == distance[here] + 1:
            path.append(there)
        else:
            ways[here].pop()


def _reaching(graph: Network, goal: object) -> set[object]:
    """Everything from which the goal can still be reached."""
    seen = {goal}
    queue = deque([goal])
    while queue:
        here = queue.popleft()
        for there in graph[here]:
            if there not in seen and graph[there].get(here, 0) > 0:
                seen.add(there)
                queue.append(there)
    return seen


# ---------------------------------------------------------------------------------------------------------------------
# The step Jacobian


@dataclass(frozen=True)
class Chain:
    """One term of the step Jacobian: diag(d_0) M_1 diag(d_1) M_2 ... diag(d_k); with no matrix, a diagonal."""

    diagonals: tuple[Node, ...]
    matrices: tuple[tuple[str, str], ...]


MOST_CHAINS = 256
"""The most chains that a step Jacobian is written out in; a cell of stacked products can have more than 2^64."""


@cache
def jacobian(cell: Cell) -> dict[tuple[str, str], tuple[Chain, ...]]:
    """The derivative of each next state by each state, as a sum of chains of diagonals and weight matrices.

    Raises CellError where there are more than `MOST_CHAINS`.
    """
    slopes: dict[Node, dict[Node, Node]] = {}
    if (count := _chains(cell, slopes)) > MOST_CHAINS:
        raise CellError(
            f"the step Jacobian of {cell.name} is a sum of {count:,} chains of matrices, one for each way through its "
            f"products, and more than {MOST_CHAINS} are not written out; give the cell fewer products in a row"
        )
    found: dict[tuple[str, str], list[Chain]] = {}
    for state, node in zip(cell.states, cell.next, strict=True):
        waiting: list[tuple[Node, Node, tuple[Node, ...], tuple[tuple[str, str], ...]]]
        waiting = [(leaf, slope, (), ()) for leaf, slope in reversed(slopes[node].items())]
        while waiting:
            leaf, slope, diagonals, matrices = waiting.pop()
            diagonals = (*diagonals, slope)
            if leaf.op == "state":
                found.setdefault((state, leaf.data[0]), []).append(Chain(diagonals, matrices))
            else:
                below = reversed(slopes[leaf.args[0]].items())
                waiting.extend((under, by, diagonals, (*matrices, leaf.data)) for under, by in below)
    return {pair: tuple(chains) for pair, chains in found.items()}


def chains_in(cell: Cell) -> int:
    """How many chains the step Jacobian is a sum of."""
    return _chains(cell, {})


def _chains(cell: Cell, slopes: dict[Node, dict[Node, Node]]) -> int:
    """The number of chains; fills `slopes`, the slopes of next states and operands by the states and products below."""
    ways: dict[Node, int] = {}
    operands = [node.args[0] for node in cell.nodes if node.op == "product" and node.args[0].op != "input"]
    for node in dict.fromkeys([*operands, *cell.next]):
        partial = reverse([(node, expr.constant(1.0))], through_products=False)
        slopes[node] = {leaf: slope for leaf, slope in partial.items() if _carries(leaf)}
        ways[node] = sum(1 if leaf.op == "state" else ways[leaf.args[0]] for leaf in slopes[node])
    return sum(ways[node] for node in cell.next)


def _carries(leaf: Node) -> bool:
    """Whether a state's influence comes through this leaf."""
    return leaf.op == "state" or (leaf.op == "product" and leaf.args[0].op != "input")


# ---------------------------------------------------------------------------------------------------------------------
# Stages


def stages(roots: Iterable[Node]) -> tuple[tuple[Node, ...], ...]:
    """The products under the roots, grouped by when they can run: those of a stage need only what came before it.

    Serves both directions: `product` nodes of the step and `transposed` nodes of its adjoint.
    """
    level: dict[Node, int] = {}
    grouped: dict[int, list[Node]] = {}
    for node in expr.postorder(roots):
        deepest = max((level[arg] for arg in node.args), default=0)
        if node.op in ("product", "transposed"):
            grouped.setdefault(deepest, []).append(node)
            deepest += 1
        level[node] = deepest
    return tuple(tuple(grouped[i]) for i in sorted(grouped))
