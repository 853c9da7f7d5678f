"""The cells that the ONNX standard has as operators (RNN, GRU, LSTM), as equations; a cell is known by its graph.

`standard(cell)` says which of the three operators computes a cell, whatever its name, its gates' names and order, the
order of its sums and products, and the biases and peepholes that it leaves out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations, product
from typing import Any

from throughtime.equations import expr
from throughtime.equations.cell import NAMESPACES, Cell, cell
from throughtime.equations.expr import Node, identity, relu, sigmoid, tanh

Unit = Callable[..., Any]
"""An activation: an expression to an expression."""


@cell(states="h")
def RNN(x, h, W, U, b, c, *, f: Unit = tanh, bias: bool = True):
    """ONNX RNN: one activation f."""
    return f((W @ x + b + U @ h + c) if bias else (W @ x + U @ h))


@cell(states="h")
def GRU(x, h, W, U, b, c, *, f: Unit = sigmoid, g: Unit = tanh, bias: bool = True, reset_after: bool = True):
    """ONNX GRU: `reset_after` is linear_before_reset=1."""
    r = f((W.r @ x + b.r + U.r @ h + c.r) if bias else (W.r @ x + U.r @ h))
    z = f((W.z @ x + b.z + U.z @ h + c.z) if bias else (W.z @ x + U.z @ h))
    if reset_after:
        n = g((W.n @ x + b.n + r * (U.n @ h + c.n)) if bias else (W.n @ x + r * (U.n @ h)))
    else:
        n = g((W.n @ x + b.n + U.n @ (r * h) + c.n) if bias else (W.n @ x + U.n @ (r * h)))
    return (1 - z) * n + z * h


@cell(states="h c")
def LSTM(
    x,
    h,
    c,
    W,
    U,
    b,
    d,
    p,
    *,
    f: Unit = sigmoid,
    g: Unit = tanh,
    shown: Unit = tanh,
    bias: bool = True,
    peepholes: bool = False,
    coupled: bool = False,
):
    """ONNX LSTM: activations f, g and `shown` (ONNX's h); `coupled` is input_forget=1, where f = 1 - i."""

    def seen(sum_: Node, weight: Any, state: Node) -> Node:
        return sum_ + weight * state if peepholes else sum_

    i = f(seen((W.i @ x + b.i + U.i @ h + d.i) if bias else (W.i @ x + U.i @ h), p.i if peepholes else 0.0, c))
    forget = (W.f @ x + b.f + U.f @ h + d.f) if bias else (W.f @ x + U.f @ h)
    keep = 1 - i if coupled else f(seen(forget, p.f if peepholes else 0.0, c))
    new = g((W.g @ x + b.g + U.g @ h + d.g) if bias else (W.g @ x + U.g @ h))
    o = (W.o @ x + b.o + U.o @ h + d.o) if bias else (W.o @ x + U.o @ h)
    c_next = keep * c + i * new
    return f(seen(o, p.o if peepholes else 0.0, c_next)) * shown(c_next), c_next


ONNX_GATES = {"RNN": ("i",), "GRU": ("z", "r", "h"), "LSTM": ("i", "o", "f", "c")}
"""The order in which the standard stacks the gates of W, R and of each half of B."""

ONNX_PEEPHOLES = ("i", "o", "f")

OWN_GATES = {"RNN": {"i": ""}, "GRU": {"z": "z", "r": "r", "h": "n"}, "LSTM": {"i": "i", "o": "o", "f": "f", "c": "g"}}
"""What the cells above call each gate of the standard."""

ACTIVATIONS: dict[str, tuple[str, Unit]] = {
    "sigmoid": ("Sigmoid", sigmoid),
    "tanh": ("Tanh", tanh),
    "relu": ("Relu", relu),
    "": ("Affine", identity),
}
"""The activations that are one operation, or none, by its name in `OPS`."""


@dataclass(frozen=True)
class Standard:
    """Which operator of the standard computes a cell, and with which attributes.

    `gates[g]` is the cell's own name of the standard's gate g; `states` holds the places, among the cell's states, of
    the standard's h and c.
    """

    operator: str
    gates: Mapping[str, str]
    states: tuple[int, ...]
    activations: tuple[str, ...]
    peepholes: bool = False
    coupled: bool = False
    reset_after: bool = False

    def attributes(self, directions: int) -> dict[str, Any]:
        """The node's attributes, but for hidden_size and direction."""
        attributes: dict[str, Any] = {"activations": list(self.activations) * directions}
        if affine := self.activations.count("Affine") * directions:
            attributes |= {"activation_alpha": [1.0] * affine, "activation_beta": [0.0] * affine}
        if self.coupled:
            attributes["input_forget"] = 1
        if self.operator == "GRU":
            attributes["linear_before_reset"] = int(self.reset_after)
        return attributes

    def blocks(self, own: Cell) -> dict[str, list[tuple[str, str]]]:
        """What W, R, B and P stack, as the cell's own parameter and gate; B and P only where the cell has them.

        A block that the cell lacks is named all the same, and is zero.
        """
        none = "no gate"  # no gate's name has a blank
        order = [self.gates.get(gate, none) for gate in ONNX_GATES[self.operator]]
        found = {name: [(kind, gate) for gate in order] for name, kind in (("W", "weight_ih"), ("R", "weight_hh"))}
        if {parameter.name for parameter in own.parameters} & {"bias_ih", "bias_hh"}:
            found["B"] = [(kind, gate) for kind in ("bias_ih", "bias_hh") for gate in order]
        if self.peepholes:
            found["P"] = [("weight_p", self.gates.get(gate, none)) for gate in ONNX_PEEPHOLES]
        return found


@lru_cache(maxsize=256)
def standard(own: Cell) -> Standard | None:
    """The operator of the ONNX standard that computes this cell, None if there is none."""
    if own.outside or own.projects or len(own.states) > 2 or _written_out(own) > LONGEST:
        return None
    used = {node.op for node in own.nodes}
    units = [op for op in ACTIVATIONS if not op or op in used]
    peepholes = any(parameter.namespace == "p" for parameter in own.parameters)
    for operator, template, options, activations in _templates(units, peepholes):
        names = renamed(own, template)
        if names is not None:
            known = OWN_GATES[operator]
            gates = {gate: names[name] for gate, name in known.items() if name in names}
            return Standard(operator, gates, _places(own), activations, **options)
    return None


def renamed(own: Cell, template: Cell) -> dict[str, str] | None:
    """The cell's own name of each gate of a template whose mathematics it has, None where it has another.

    Names, the order of gates and states, and the order of sums and products may differ, and biases and peepholes that
    the template adds may be left out. A template shows its first state.
    """
    if len(template.gates) != len(own.gates) or len(template.states) != len(own.states):
        return None
    if own.outside or _written_out(own) > LONGEST:
        return None
    places = _places(own)
    same = {gate: gate for gate in own.gates}
    wanted = [_canonical(own, own.next[place], places, same, None) for place in places]
    vectors = {node.data for node in own.nodes if node.op == "parameter"}
    present = {(NAMESPACES[space], gate) for space, gate in vectors}
    for order in permutations(own.gates):
        names = dict(zip(template.gates, order, strict=True))
        if all(
            sum_ == _canonical(template, template.next[number], range(len(places)), names, present)
            for number, sum_ in enumerate(wanted)
        ):
            return names
    return None


def _places(own: Cell) -> tuple[int, ...]:
    """The places of the cell's states, the one that is shown first."""
    others = [place for place in range(len(own.states)) if place != own.output]
    return (own.output, *others)


def _templates(units: Sequence[str], peepholes: bool) -> Iterator[tuple[str, Cell, dict[str, bool], tuple[str, ...]]]:
    """Every cell above with every choice of activations: operator, cell, what else `Standard` says, ONNX names."""
    for unit in units:
        yield "RNN", RNN(f=ACTIVATIONS[unit][1]), {}, (ACTIVATIONS[unit][0],)
    for pair in product(units, repeat=2):
        named = tuple(ACTIVATIONS[unit][0] for unit in pair)
        f, g = (ACTIVATIONS[unit][1] for unit in pair)
        for after in (True, False):
            yield "GRU", GRU(f=f, g=g, reset_after=after), {"reset_after": after}, named
    for three in product(units, repeat=3):
        named = tuple(ACTIVATIONS[unit][0] for unit in three)
        f, g, shown = (ACTIVATIONS[unit][1] for unit in three)
        for coupled in (False, True):
            options = {"peepholes": peepholes, "coupled": coupled}
            yield "LSTM", LSTM(f=f, g=g, shown=shown, **options), options, named


LONGEST = 1000
"""Operations, if nothing were shared, of the longest cell that is compared; an LSTM with peepholes has about 150."""


def _written_out(own: Cell) -> int:
    sizes: dict[Node, int] = {}
    for node in own.nodes:
        sizes[node] = 1 + sum(sizes[arg] for arg in node.args)
    return sum(sizes[node] for node in own.next)


Term = tuple[float, tuple[Any, ...]]
"""A product: its constant, and its other factors in order."""


def _canonical(
    own: Cell,
    root: Node,
    states: Sequence[int],
    gates: Mapping[str, str],
    present: set[tuple[str, str]] | None,
) -> tuple[Term, ...]:
    """The expression as a sorted sum of sorted products, under other names of gates and with the states by place.

    Vectors that are not `present` (None: all are) are zero, and so are products with them.
    """
    place = {own.states[state]: number for number, state in enumerate(states)}
    meaning: dict[Node, list[Term]] = {}
    for node in expr.postorder([root]):
        meaning[node] = _terms(node, meaning, place, gates, present)
    return _sorted(meaning[root])


def _terms(
    node: Node,
    meaning: Mapping[Node, list[Term]],
    place: Mapping[str, int],
    gates: Mapping[str, str],
    present: set[tuple[str, str]] | None,
) -> list[Term]:
    args = [meaning[arg] for arg in node.args]
    match node.op:
        case "const":
            return [(node.data[0], ())]
        case "add":
            return args[0] + args[1]
        case "sub":
            return args[0] + [(-number, factors) for number, factors in args[1]]
        case "neg":
            return [(-number, factors) for number, factors in args[0]]
        case "mul":
            if not all(args):
                return []
            number = 1.0
            factors: list[Any] = []
            for terms in args:
                if len(terms) == 1:
                    number *= terms[0][0]
                    factors += terms[0][1]
                else:
                    factors.append(("sum", _sorted(terms)))
            return [(number, tuple(sorted(factors, key=repr)))]
        case "parameter":
            name = NAMESPACES[node.data[0]], gates[node.data[1]]
            return [] if present is not None and name not in present else [(1.0, (name,))]
        case "state":
            return [(1.0, (("state", place[node.data[0]]),))]
        case "product":
            return [(1.0, (("product", node.data[0], gates[node.data[1]], _sorted(args[0])),))]
    return [(1.0, ((node.op, *node.data, *map(_sorted, args)),))]


def _sorted(terms: list[Term]) -> tuple[Term, ...]:
    return tuple(sorted(terms, key=repr))
