"""Which gates decide how much of a state's old value is kept, and which way they turn.

In torch, cuDNN, Keras, ONNX and the lecture a GRU's open gate z keeps the old state; in Chung et al. 2014, the minimal
gated unit and minGRU the open gate writes the new one. Nothing here knows a cell by name: it is read off the equations.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from throughtime.equations import calculus, expr
from throughtime.equations.cell import NAMESPACES, Cell
from throughtime.equations.expr import OPS, Node, make

DRAWS = 5
CLOSE = 1e-12


@dataclass(frozen=True, eq=False)
class Gate:
    """A sigmoid of a cell: what it is called, and the biases inside it.

    `biases` maps (namespace, gate) to the factor with which that bias enters the sigmoid's argument, nearly always 1.
    """

    node: Node
    name: str
    biases: Mapping[tuple[str, str], float]


@dataclass(frozen=True, eq=False)
class Keeper:
    """A gate whose one end keeps all of a state's old value, on the path past every product, and whose other end none.

    `sign` is +1 where the open gate keeps the old value (an LSTM's f, the lecture's z), -1 where it writes the new one
    (Chung's z). Where old and new have separate gates, as in an LSTM, `writer` lets the new one in, and `writer_sign`
    is +1 where it does so when open; where one gate weighs both, as in a GRU, `writer` is None.
    """

    state: str
    gate: Gate
    sign: int
    writer: Gate | None = None
    writer_sign: int = 1


@cache
def keepers(cell: Cell) -> tuple[Keeper, ...]:
    """The gates that keep a cell's states, in the order of the states; none for an Elman network.

    The derivative of the next state by the old one, with products and all gates held fixed, is taken at both ends of
    each gate, for several values of everything else: 1 at one end and 0 at the other make a keeper.
    """
    gates = {node: _leaf(place) for place, node in enumerate(n for n in cell.nodes if n.op == "sigmoid")}
    found = []
    for state, after in zip(cell.states, cell.next, strict=True):
        slope = _direct_slope(after, state, gates)
        if slope is None:
            continue
        inside = set(expr.postorder([slope]))
        for gate, leaf in gates.items():
            sign = _sign(slope, leaf) if leaf in inside else 0
            if sign:
                writer, writer_sign = _writer(state, after, gate, sign)
                of_writer = None if writer is None else _gate(writer)
                found.append(Keeper(state, _gate(gate), sign, of_writer, writer_sign))
    return tuple(found)


def _gate(node: Node) -> Gate:
    (inside,) = node.args
    slopes = calculus.reverse([(inside, expr.constant(1.0))], through_products=False)
    biases = {
        leaf.data: float(slope.data[0])
        for leaf, slope in slopes.items()
        if leaf.op == "parameter" and NAMESPACES[leaf.data[0]].startswith("bias") and slope.op == "const"
    }
    letters = [leaf.data[1] for leaf in slopes if leaf.op in ("product", "parameter") and leaf.data[1]]
    return Gate(node, letters[0] if letters else "without a name", biases)


def _direct_slope(after: Node, state: str, gates: dict[Node, Node]) -> Node | None:
    """The derivative of a next state by its old value, past all products, with every gate a value of its own."""
    apart = expr.substitute(after, gates)
    slopes = calculus.reverse([(apart, expr.constant(1.0))], through_products=False)
    return slopes.get(make("state", (), (state,)))


def _leaf(place: int) -> Node:
    """What stands for a gate held fixed; no outside input can have a name with a space in it."""
    return make("outside", (), (f"gate {place}",))


def _sign(slope: Node, gate: Node) -> int:
    """+1 for a gate that keeps when open, -1 for one that keeps when closed, 0 for one that does neither."""
    at_end = [_values(slope, {gate: end}) for end in (0.0, 1.0)]
    for sign, (none, whole) in ((1, at_end), (-1, at_end[::-1])):
        if _all_near(none, 0.0) and _all_near(whole, 1.0):
            return sign
    return 0


def _writer(state: str, after: Node, gate: Node, sign: int) -> tuple[Node | None, int]:
    """The gate that, shut while the keeper keeps, leaves the state exactly as it was; None if the keeper alone does."""
    kept = {gate: (1.0 + sign) / 2}
    change = after - make("state", (), (state,))
    if _all_near(_values(change, kept), 0.0):
        return None, 1
    gates = [node for node in expr.postorder([after], stop=lambda n: n.op == "sigmoid") if node.op == "sigmoid"]
    for other in gates:
        for writer_sign, shut in ((1, 0.0), (-1, 1.0)):
            if other is not gate and _all_near(_values(change, {**kept, other: shut}), 0.0):
                return other, writer_sign
    return None, 1


def _values(root: Node, known: Mapping[Node, float]) -> list[float]:
    """The node with some values known and every other leaf, product and gate drawn, several times; empty if undefined.

    Draws lie between 0.1 and 0.9, where logarithms and roots exist too.
    """
    draw = random.Random(0)
    found = []
    for _ in range(DRAWS):
        values = dict(known)
        for node in expr.postorder([root]):
            if node.op == "const":
                values[node] = node.data[0]
            elif node.op not in OPS or node.op == "sigmoid":
                values.setdefault(node, draw.uniform(0.1, 0.9))
        try:
            meaning = expr.fold([root], lambda leaf: leaf.data[0], lambda n, args: OPS[n.op].value(*args), values)
        except (ArithmeticError, ValueError):
            return []
        found.append(float(meaning[root]))
    return found


def _all_near(values: list[float], wanted: float) -> bool:
    return bool(values) and all(abs(value - wanted) < CLOSE for value in values)
