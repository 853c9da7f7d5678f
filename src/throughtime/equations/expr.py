"""Expressions: shared, immutable nodes and the one table of operations.

A node is made by one interning constructor, `make`, so that equal expressions are the same object. Every operation is
a row of `OPS`: its value, its derivative, and how each target spells it. Nothing else in the library lists operations.
"""

from __future__ import annotations

import functools
import math
import struct
import threading
import weakref
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from throughtime.errors import CellError


class Arithmetic:
    """Operators that build expressions, for nodes and for what becomes a node when it is used."""

    __slots__ = ()

    def __add__(self, other: Any) -> Node:
        return apply("add", self, other)

    def __radd__(self, other: Any) -> Node:
        return apply("add", other, self)

    def __sub__(self, other: Any) -> Node:
        return apply("sub", self, other)

    def __rsub__(self, other: Any) -> Node:
        return apply("sub", other, self)

    def __mul__(self, other: Any) -> Node:
        return apply("mul", self, other)

    def __rmul__(self, other: Any) -> Node:
        return apply("mul", other, self)

    def __truediv__(self, other: Any) -> Node:
        return apply("div", self, other)

    def __rtruediv__(self, other: Any) -> Node:
        return apply("div", other, self)

    def __neg__(self) -> Node:
        return apply("neg", self)

    def __pos__(self) -> Node:
        return as_node(self)

    def __abs__(self) -> Node:
        return apply("abs", self)

    def __pow__(self, exponent: Any) -> Node:
        if isinstance(exponent, float) and exponent == 0.5:
            return apply("sqrt", self)
        if isinstance(exponent, int) and 1 <= exponent <= 8:
            return functools.reduce(_multiply, [as_node(self)] * exponent)
        shown = exponent if isinstance(exponent, int | float) else type(exponent).__name__
        raise CellError(f"a power of {shown} is not offered; write ** 1 to ** 8, sqrt(a), or exp(k * log(a))")

    def __lt__(self, other: Any) -> Node:
        return apply("less", self, other)

    def __gt__(self, other: Any) -> Node:
        return apply("less", other, self)

    def __le__(self, other: Any) -> Node:
        return apply("less_equal", self, other)

    def __ge__(self, other: Any) -> Node:
        return apply("less_equal", other, self)

    def __mod__(self, other: object) -> NoReturn:
        raise CellError("% and // have no useful derivative and are not offered; bound values with minimum and maximum")

    __rmod__ = __floordiv__ = __rfloordiv__ = __mod__

    def __and__(self, other: object) -> NoReturn:
        raise CellError("comparisons do not combine with &, | or ^; nest them: where(a < b, where(c < d, y, z), z)")

    __rand__ = __or__ = __ror__ = __xor__ = __rxor__ = __and__

    def __rpow__(self, base: object) -> NoReturn:
        raise CellError("a number to the power of a node is not offered; write exp(a * k) with k = math.log(base)")

    def __eq__(self, other: object) -> NoReturn:
        raise CellError("== between nodes has no derivative; write where(a < b, ..., ...), or `is` for the same node")

    def __ne__(self, other: object) -> NoReturn:
        raise CellError("!= between nodes has no derivative; write where(a < b, ..., ...), or `is not`")

    __hash__ = object.__hash__

    def __bool__(self) -> NoReturn:
        raise CellError(
            "the value of a unit is not known while the cell is traced, so `if`, `and`, `or`, `not`, max, min and "
            "a < b < c cannot ask for it; write where(condition, a, b), maximum(a, b) or minimum(a, b)"
        )

    def __float__(self) -> NoReturn:
        raise CellError(
            "a node is not a number, so functions of `math` cannot take it; use throughtime's own, such as tanh(a)"
        )

    __int__ = __index__ = __float__

    def __iter__(self) -> NoReturn:
        raise CellError("a node stands for all units at once; it cannot be looped over or unpacked")

    def __getitem__(self, key: object) -> NoReturn:
        raise CellError("units cannot be picked by index: everything but a product works unit by unit")

    def __matmul__(self, other: Any) -> Node:
        raise CellError("@ needs a matrix on its left: W.gate @ x, U.gate @ h, P @ h")

    def __array__(self, *_: object, **__: object) -> NoReturn:
        raise CellError(
            "NumPy cannot hold a node; use throughtime's functions, such as tanh(a), and plain Python numbers"
        )

    def __array_ufunc__(self, ufunc: Any, *_: object, **__: object) -> NoReturn:
        name = getattr(ufunc, "__name__", "this")
        raise CellError(
            f"numpy.{name} cannot take a node; use throughtime's functions, and float(a) for a NumPy number a"
        )

    @classmethod
    def __torch_function__(cls, function: Any, *_: object, **__: object) -> NoReturn:
        name = getattr(function, "__name__", "this function")
        raise CellError(f"torch's {name} cannot take a node; use throughtime's functions, and plain Python numbers")


class Placeholder(Arithmetic):
    """Something that stands for a node once it is used in an equation."""

    __slots__ = ()

    def as_node(self) -> Node:
        """The node, or CellError with what to write instead."""
        raise NotImplementedError


class Node(Arithmetic):
    """One value of a step: an operation on other nodes, or a leaf. Compare with `is`; build with operators."""

    __slots__ = ("__weakref__", "args", "data", "op", "serial", "varies")

    op: str
    args: tuple[Node, ...]
    data: tuple[Any, ...]
    serial: int
    varies: bool
    """Whether the value depends on the input or a state; noted when the node is made, so that nothing has to walk."""

    def __init__(self, *_: object) -> None:
        raise CellError("nodes are made by writing equations inside a function under @cell, not by calling Node()")

    if not TYPE_CHECKING:  # a type checker should still find misspelt attributes

        def __getattr__(self, name: str) -> NoReturn:
            raise AttributeError(f"a node has no .{name}: it stands for all units at once and works unit by unit")

    def __copy__(self) -> Node:
        return self

    def __deepcopy__(self, memo: object) -> Node:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return make, (self.op, self.args, self.data)

    def __repr__(self) -> str:
        return self._shown(4)

    def _shown(self, depth: int) -> str:
        """As far down as `depth`: a graph that shares values can be exponentially long when written out."""
        inside = [*map(repr, self.data), *(arg._shown(depth - 1) if depth else "..." for arg in self.args)]
        return f"{self.op}({', '.join(inside)})"

    @property
    def is_condition(self) -> bool:
        """Whether the node is a truth value, fit only for the first place of `where`."""
        return self.op in ("less", "less_equal")


_nodes: weakref.WeakValueDictionary[tuple[Any, ...], Node] = weakref.WeakValueDictionary()
_lock = threading.RLock()
_last_serial = 0
observer: ContextVar[Callable[[Node], None] | None] = ContextVar("observer", default=None)


def make(op: str, args: tuple[Node, ...] = (), data: tuple[Any, ...] = ()) -> Node:
    """The only way to a node: the existing one if an equal one lives, else a new one."""
    global _last_serial
    bits = tuple(struct.pack("<d", part) if isinstance(part, float) else part for part in data)
    key = (op, tuple(arg.serial for arg in args), bits)
    with _lock:
        node = _nodes.get(key)
        if node is None:
            node = object.__new__(Node)
            node.op, node.args, node.data = op, args, data
            node.varies = op in ("input", "state") or any(arg.varies for arg in args)
            _last_serial += 1
            node.serial = _last_serial
            _nodes[key] = node
    if (watch := observer.get()) is not None:
        watch(node)
    return node


def constant(value: float) -> Node:
    """A number, the same in every unit; keyed by its bits, so that 0.0 and -0.0 stay apart."""
    return make("const", (), (float(value),))


def as_node(value: Any) -> Node:
    """The value itself if it is a node, a constant if it is a plain number, or what it says it is; else refused."""
    if isinstance(value, Node):
        return value
    if isinstance(value, Placeholder):
        return value.as_node()
    if isinstance(value, bool) or not isinstance(value, int | float):
        kind = f"{type(value).__module__}.{type(value).__name__}".removeprefix("builtins.")
        raise CellError(f"{kind} cannot stand in an equation; only nodes and plain numbers can (write float(a))")
    return constant(value)


def apply(op: str, *values: Any) -> Node:
    """An operation of the table on nodes or numbers, with constants folded and neutral elements dropped."""
    row = OPS[op]
    if len(values) != row.arity:
        raise CellError(f"{op} takes {row.arity} arguments, not {len(values)}")
    args = tuple(as_node(value) for value in values)
    for place, arg in enumerate(args):
        wants_condition = op == "where" and place == 0
        if arg.is_condition != wants_condition:
            raise CellError(
                "the first argument of where(condition, a, b) must be a comparison such as a < b"
                if wants_condition
                else "a comparison is not a number; write where(a < b, 1.0, 0.0)"
            )
    simple = _simplified(op, args)
    return make(op, args) if simple is None else simple


def _multiply(a: Node, b: Node) -> Node:
    return apply("mul", a, b)


def _simplified(op: str, args: tuple[Node, ...]) -> Node | None:
    if not OPS[op].truth and all(arg.op == "const" for arg in args):
        try:
            return constant(OPS[op].value(*(arg.data[0] for arg in args)))
        except (ArithmeticError, ValueError):
            return None
    if op == "mul":
        if is_constant(args[0], 1.0):
            return args[1]
        if is_constant(args[1], 1.0):
            return args[0]
    if op == "add" and is_constant(args[0], 0.0):
        return args[1]
    if op in ("add", "sub") and is_constant(args[1], 0.0):
        return args[0]
    if op == "div" and is_constant(args[1], 1.0):
        return args[0]
    if op == "neg" and args[0].op == "neg":
        return args[0].args[0]
    return None


def is_constant(node: Node, value: float) -> bool:
    """Whether the node is this number."""
    return node.op == "const" and node.data[0] == value


# ---------------------------------------------------------------------------------------------------------------------
# The table of operations


@dataclass(frozen=True)
class Op:
    """One row: what an operation is worth, how it is differentiated, and how each target spells it.

    `derivative(y, g)` takes the result y (a node, with its arguments in y.args) and its adjoint g, and returns the
    adjoint of each argument, None where there is none. `torch` names an attribute of the torch module, `llvm` a method
    of the vector vocabulary, `onnx` an operator; `text` and `latex` are formats, and `precedence` how strongly they
    bind: 0 a comparison, 1 a sum, 2 a product, 4 what delimits its arguments itself. `cheap` operations may be computed
    again in the backward pass instead of saved; a `truth` is a comparison.
    """

    arity: int
    value: Callable[..., float]
    derivative: Callable[[Node, Node], tuple[Node | None, ...]]
    torch: str
    llvm: str
    onnx: str
    text: str
    latex: str
    precedence: int = 4
    cheap: bool = True
    truth: bool = False


def _sigmoid(a: float) -> float:
    return 1 / (1 + math.exp(-a)) if a >= 0 else math.exp(a) / (1 + math.exp(a))


def _sign(a: float) -> float:
    return float((a > 0) - (a < 0)) if a == a else a


def _extremum(wins: Callable[[float, float], bool]) -> Callable[[float, float], float]:
    return lambda a, b: a if a != a or wins(a, b) else b


def _split(first_wins: Node, second_wins: Node, g: Node) -> tuple[Node, Node]:
    """The adjoint of an extremum goes to the winner, and half to each at a tie (torch's convention)."""
    half = 0.5 * g
    return where(first_wins, g, where(second_wins, 0.0, half)), where(second_wins, g, where(first_wins, 0.0, half))


# fmt: off
OPS: dict[str, Op] = {
    "add": Op(2, lambda a, b: a + b, lambda y, g: (g, g), "add", "add", "Add", "{} + {}", "{} + {}", 1),
    "sub": Op(2, lambda a, b: a - b, lambda y, g: (g, -g), "sub", "sub", "Sub", "{} - {}", "{} - {}", 1),
    "mul": Op(2, lambda a, b: a * b, lambda y, g: (g * y.args[1], g * y.args[0]), "mul", "mul", "Mul",
              "{} ⊙ {}", r"{} \odot {}", 2),
    "div": Op(2, lambda a, b: a / b, lambda y, g: (g / y.args[1], -(g * y / y.args[1])), "div", "div", "Div",
              "{} / {}", r"\frac{{{}}}{{{}}}", 2),
    "neg": Op(1, lambda a: -a, lambda y, g: (-g,), "neg", "neg", "Neg", "-{}", "-{}", 3),
    "exp": Op(1, math.exp, lambda y, g: (g * y,), "exp", "exp", "Exp", "exp({})", r"\exp({})", cheap=False),
    "log": Op(1, math.log, lambda y, g: (g / y.args[0],), "log", "log", "Log", "log({})", r"\log({})", cheap=False),
    "log1p": Op(1, math.log1p, lambda y, g: (g / (1.0 + y.args[0]),), "log1p", "log1p", "",
                "log1p({})", r"\operatorname{{log1p}}({})", cheap=False),
    "sqrt": Op(1, math.sqrt, lambda y, g: (0.5 * g / y,), "sqrt", "sqrt", "Sqrt",
               "sqrt({})", r"\sqrt{{{}}}", cheap=False),
    "abs": Op(1, abs, lambda y, g: (g * sign(y.args[0]),), "abs", "abs", "Abs", "|{}|", "|{}|"),
    "sign": Op(1, _sign, lambda y, g: (None,), "sign", "sign", "Sign", "sign({})", r"\operatorname{{sign}}({})"),
    "tanh": Op(1, math.tanh, lambda y, g: (g * (1.0 - y * y),), "tanh", "tanh", "Tanh",
               "tanh({})", r"\tanh({})", cheap=False),
    "sigmoid": Op(1, _sigmoid, lambda y, g: (g * (y * (1.0 - y)),), "sigmoid", "sigmoid", "Sigmoid",
                  "σ({})", r"\sigma({})", cheap=False),
    "relu": Op(1, lambda a: a if a > 0 or a != a else 0.0, lambda y, g: (where(y <= 0.0, 0.0, g),), "relu", "relu",
               "Relu", "relu({})", r"\operatorname{{relu}}({})"),
    "maximum": Op(2, _extremum(lambda a, b: a > b),
                  lambda y, g: _split(y.args[1] < y.args[0], y.args[0] < y.args[1], g),
                  "maximum", "maximum", "Max", "max({}, {})", r"\max({}, {})"),
    "minimum": Op(2, _extremum(lambda a, b: a < b),
                  lambda y, g: _split(y.args[0] < y.args[1], y.args[1] < y.args[0], g),
                  "minimum", "minimum", "Min", "min({}, {})", r"\min({}, {})"),
    "less": Op(2, lambda a, b: a < b, lambda y, g: (None, None), "lt", "less", "Less", "{} < {}", "{} < {}", 0,
               truth=True),
    "less_equal": Op(2, lambda a, b: a <= b, lambda y, g: (None, None), "le", "less_equal", "LessOrEqual",
                     "{} ≤ {}", r"{} \leq {}", 0, truth=True),
    "where": Op(3, lambda q, a, b: a if q else b,
                lambda y, g: (None, where(y.args[0], g, 0.0), where(y.args[0], 0.0, g)), "where", "where", "Where",
                "where({}, {}, {})", r"\operatorname{{where}}({}, {}, {})"),
}
# fmt: on

LEAVES = ("const", "input", "state", "parameter", "outside", "product", "transposed", "adjoint")
"""What a node may be besides an operation: see `Cell` for the first six, `calculus` for the last two."""


def tanh(a: Any) -> Node:
    """Hyperbolic tangent, unit by unit."""
    return apply("tanh", a)


def sigmoid(a: Any) -> Node:
    """The logistic function 1 / (1 + exp(-a)), unit by unit."""
    return apply("sigmoid", a)


def relu(a: Any) -> Node:
    """max(a, 0), unit by unit; its derivative at 0 is 0; NaN stays NaN."""
    return apply("relu", a)


def identity(a: Any) -> Node:
    """The argument itself: the activation of a linear network."""
    return as_node(a)


def exp(a: Any) -> Node:
    """The exponential, unit by unit."""
    return apply("exp", a)


def log(a: Any) -> Node:
    """The natural logarithm, unit by unit."""
    return apply("log", a)


def log1p(a: Any) -> Node:
    """log(1 + a), exact for small a, unit by unit."""
    return apply("log1p", a)


def sqrt(a: Any) -> Node:
    """The square root, unit by unit."""
    return apply("sqrt", a)


def sign(a: Any) -> Node:
    """-1, 0 or 1; its derivative is 0 everywhere."""
    return apply("sign", a)


def maximum(a: Any, b: Any) -> Node:
    """The larger one, unit by unit; NaN if either is; at a tie each gets half of the adjoint."""
    return apply("maximum", a, b)


def minimum(a: Any, b: Any) -> Node:
    """The smaller one, unit by unit; NaN if either is; at a tie each gets half of the adjoint."""
    return apply("minimum", a, b)


def where(condition: Any, a: Any, b: Any) -> Node:
    """`a` in the units where the comparison holds, `b` in the others."""
    return apply("where", condition, a, b)


def softplus(a: Any) -> Node:
    """log(1 + exp(a)), written so that it neither overflows nor loses small values."""
    a = as_node(a)
    return maximum(a, 0.0) + log1p(exp(-abs(a)))


# ---------------------------------------------------------------------------------------------------------------------
# Walks


def postorder(roots: Iterable[Node], stop: Callable[[Node], bool] = lambda node: False) -> list[Node]:
    """Every node under the roots once, arguments before what uses them; the walk does not go below a `stop` node."""
    order: list[Node] = []
    seen: set[Node] = set()
    stack = [(root, False) for root in reversed(list(roots))]
    while stack:
        node, ready = stack.pop()
        if ready:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            if not stop(node):
                stack.extend((arg, False) for arg in reversed(node.args))
    return order


def fold(
    roots: Iterable[Node],
    leaf: Callable[[Node], Any],
    operation: Callable[[Node, list[Any]], Any],
    known: dict[Node, Any] | None = None,
) -> dict[Node, Any]:
    """Give every node under the roots a meaning: `leaf(node)`, or `operation(node, meanings of its arguments)`.

    One walk serves every target: torch tensors, LLVM values, Python floats, text. Nodes in `known` keep their meaning.
    """
    known = known or {}
    meaning: dict[Node, Any] = {}
    for node in postorder(roots, stop=lambda n: n in known or n.op not in OPS):
        if node in known:
            meaning[node] = known[node]
        elif node.op in OPS:
            meaning[node] = operation(node, [meaning[arg] for arg in node.args])
        else:
            meaning[node] = leaf(node)
    return meaning


def substitute(node: Node, replacement: dict[Node, Node]) -> Node:
    """The same expression with some nodes replaced by others."""
    return substitute_all([node], replacement)[0]


def substitute_all(nodes: Iterable[Node], replacement: dict[Node, Node]) -> list[Node]:
    """The same expressions with some nodes replaced by others, in one walk over what they share."""
    nodes = list(nodes)
    now = fold(nodes, lambda n: n, lambda n, args: apply(n.op, *args), replacement)
    return [now[node] for node in nodes]
