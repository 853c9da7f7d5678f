"""`@cell`: trace a Python function that reads like the blackboard into a graph, name its products, check it.

A `Cell` is data: expressions, names and nothing else. It serialises to JSON and back, and its content hash is what
caches, run folders and the registered operator know it by.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import linecache
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from types import CodeType, FrameType
from typing import Any

from throughtime.equations import expr
from throughtime.equations.expr import Node, make
from throughtime.errors import CellError

FORMAT = "throughtime-cell-1"

MATRICES = {"W": "weight_ih", "U": "weight_hh", "P": "weight_hr"}
"""Namespaces of products, with the names of their parameters: times x, times a state, projection of computed values."""

VECTORS = {"b": "bias_ih", "c": "bias_hh", "d": "bias_hh", "p": "weight_p"}
"""Namespaces of one value per unit. `d` stands for `c` in a cell that has a state called c."""

NAMESPACES = MATRICES | VECTORS

TAKEN = ("x", *(letter for letter in NAMESPACES if letter not in ("c", "d")))
"""What no state and no outside input may be called; `c` and `d` may, for the second bias then has the other name."""


@dataclass(frozen=True)
class Parameter:
    """One tensor of a cell: its namespace, its torch name, and the gates whose blocks it stacks, in order."""

    namespace: str
    name: str
    gates: tuple[str, ...]

    @property
    def is_matrix(self) -> bool:
        """Whether it is multiplied by @ (two dimensions), or a vector of one value per unit."""
        return self.namespace in MATRICES


@dataclass(frozen=True, eq=False)
class Cell:
    """A recurrent cell as data: the next state as expressions over the input, the states and the parameters.

    `next[i]` is the next value of `states[i]`; `output` says which state the layer shows. `widths[i]` is "hidden" or
    "projected". `names` maps the author's variable names to nodes, for printing only; it is not part of the identity.
    """

    name: str
    states: tuple[str, ...]
    next: tuple[Node, ...]
    gates: tuple[str, ...]
    output: int = 0
    per_step: tuple[str, ...] = ()
    per_sequence: tuple[str, ...] = ()
    names: Mapping[str, Node] = field(default_factory=dict)
    about: str = ""
    retrace: Callable[..., Cell] | None = field(default=None, repr=False)

    def __repr__(self) -> str:
        return f"Cell({self.name}, states={' '.join(self.states)}, gates={' '.join(self.gates)}, {self.hash[:12]})"

    def __call__(self, **constants: Any) -> Cell:
        """The same equations with other constants, such as `Elman(activation=relu)`."""
        if self.retrace is None:
            raise CellError(f"{self.name} was loaded as data; its constants are fixed")
        return self.retrace(**constants)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Cell) and self.hash == other.hash

    def __hash__(self) -> int:
        return hash(self.hash)

    def __reduce__(self) -> tuple[Any, ...]:
        return Cell.from_json, (self.to_json(),)

    @cached_property
    def nodes(self) -> list[Node]:
        """Every node of the graph, arguments before what uses them."""
        return expr.postorder(self.next)

    @cached_property
    def products(self) -> tuple[Node, ...]:
        """The products matrix @ operand, in order of namespace and gate."""
        place = {gate: i for i, gate in enumerate(self.gates)}
        found = [node for node in self.nodes if node.op == "product"]
        return tuple(sorted(found, key=lambda n: (list(MATRICES).index(n.data[0]), place[n.data[1]])))

    @cached_property
    def parameters(self) -> tuple[Parameter, ...]:
        """The parameter tensors in torch's order; gates that a namespace does not use have no block in it."""
        used = {node.data for node in self.nodes if node.op in ("product", "parameter")}
        found = []
        for namespace, name in NAMESPACES.items():
            gates = tuple(gate for gate in self.gates if (namespace, gate) in used)
            if gates:
                found.append(Parameter(namespace, name, gates))
        order = ["weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr", "weight_p"]
        return tuple(sorted(found, key=lambda parameter: order.index(parameter.name)))

    @cached_property
    def width_of(self) -> dict[Node, str]:
        """The width of each unit-wise node: "hidden" or "projected"; nodes of any width are left out."""
        return _widths(self.states, self.next, {})

    @cached_property
    def widths(self) -> tuple[str, ...]:
        """The width of each state, "hidden" or "projected"."""
        return tuple(self.width_of.get(node, "hidden") for node in self.next)

    @property
    def projects(self) -> bool:
        """Whether the cell has a projection P, so that a proj_size has to be given."""
        return any(parameter.namespace == "P" for parameter in self.parameters)

    @cached_property
    def needs_equal_sizes(self) -> bool:
        """Whether x is used unit by unit, so that input and hidden size must agree."""
        unitwise = {arg for node in self.nodes if node.op in expr.OPS for arg in node.args} | set(self.next)
        return any(node.op == "input" for node in unitwise)

    @property
    def outside(self) -> tuple[str, ...]:
        """The names of outside inputs, per step and then per sequence."""
        return self.per_step + self.per_sequence

    def sizes(self, hidden_size: int, proj_size: int = 0) -> tuple[int, ...]:
        """The width of each state in units."""
        return tuple(proj_size if width == "projected" else hidden_size for width in self.widths)

    def shape(self, parameter: Parameter, input_size: int, hidden_size: int, proj_size: int = 0) -> tuple[int, ...]:
        """The shape of a parameter tensor: [gates * rows, columns], or [gates * hidden_size] for a vector."""
        rows = len(parameter.gates) * (proj_size if parameter.namespace == "P" else hidden_size)
        if not parameter.is_matrix:
            return (rows,)
        if parameter.namespace == "W":
            return rows, input_size
        operand = next(node.args[0] for node in self.products if node.data[0] == parameter.namespace)
        projected = self.width_of.get(operand, "hidden") == "projected"
        return rows, proj_size if projected else hidden_size

    def parameter_count(self, input_size: int, hidden_size: int, proj_size: int = 0) -> int:
        """How many numbers the cell learns at these sizes."""
        count = 0
        for parameter in self.parameters:
            size = 1
            for extent in self.shape(parameter, input_size, hidden_size, proj_size):
                size *= extent
            count += size
        return count

    # -- as data ------------------------------------------------------------------------------------------------------

    def _graph(self) -> dict[str, Any]:
        number = {node: i for i, node in enumerate(self.nodes)}
        return {
            "states": list(self.states),
            "output": self.output,
            "gates": list(self.gates),
            "per_step": list(self.per_step),
            "per_sequence": list(self.per_sequence),
            "nodes": [
                [node.op, [number[arg] for arg in node.args], [_written(part) for part in node.data]]
                for node in self.nodes
            ],
            "next": [number[node] for node in self.next],
        }

    @cached_property
    def hash(self) -> str:
        """SHA-256 of the graph: the same for the same mathematics written in the same order, whatever its names."""
        text = json.dumps(self._graph(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def settled(self) -> Cell:
        """The cell itself, with what derives from its graph worked out, for a tracer cannot take a cache's lock."""
        _ = self.json, self.parameters, self.widths
        return self

    @cached_property
    def json(self) -> str:
        """`to_json`, written once: what a compiled program carries."""
        return self.to_json()

    def to_json(self) -> str:
        """The cell as text, for run folders and caches; `Cell.from_json` reads it back without running any code."""
        number = {node: i for i, node in enumerate(self.nodes)}
        names = {name: number[node] for name, node in self.names.items() if node in number}
        record = {"format": FORMAT, "name": self.name, "about": self.about, "names": names, **self._graph()}
        return json.dumps(record, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Cell:
        """Read a cell that `to_json` wrote. Raises CellError for anything else; executes nothing."""
        try:
            record = json.loads(text)
            if record["format"] != FORMAT:
                raise CellError(f"the cell's format is {record['format']!r}, this version reads {FORMAT!r}")
            return _read(record)
        except CellError:
            raise
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError, RecursionError) as error:
            raise CellError(f"this is not a cell's JSON ({type(error).__name__}: {error})") from error


def _written(part: Any) -> Any:
    return part.hex() if isinstance(part, float) else part


def _read(record: dict[str, Any]) -> Cell:
    states, gates, per_step, per_sequence = (
        _words(record, key) for key in ("states", "gates", "per_step", "per_sequence")
    )
    if wrong := [name for name in (*states, *per_step, *per_sequence) if name in TAKEN or not name.isidentifier()]:
        raise CellError(f"the cell's JSON calls a state or an outside input {wrong[0]!r}, which no cell can")
    nodes: list[Node] = []
    for place, (op, args, data) in enumerate(record["nodes"]):
        if any(type(i) is not int or not 0 <= i < place for i in args):
            raise CellError(f"node {place} of the cell's JSON refers to a node that does not come before it")
        node = _read_node(op, [nodes[i] for i in args], data, states, gates, {*per_step, *per_sequence})
        if node is None:
            raise CellError(f"node {place} of the cell's JSON is {op!r} {data!r}, which no cell contains")
        nodes.append(node)

    def pick(i: Any) -> Node:
        if type(i) is not int or not 0 <= i < len(nodes):
            raise CellError(f"the cell's JSON names node {i!r}, and it has {len(nodes)}")
        return nodes[i]

    after = tuple(pick(i) for i in record["next"])
    if type(record["output"]) is not int or not 0 <= record["output"] < len(states) or len(after) != len(states):
        raise CellError("the cell's JSON names an output or a next state that it does not have")
    used = {node.data[1] for node in expr.postorder(after) if node.op in ("product", "parameter")}
    if used != set(gates) or any(node.is_condition for node in after):
        raise CellError("the cell's JSON lists gates that its equations do not have, or a state that is a comparison")
    _widths(states, after, {})
    return Cell(
        name=str(record["name"]),
        about=str(record["about"]),
        states=states,
        next=after,
        gates=gates,
        output=record["output"],
        per_step=per_step,
        per_sequence=per_sequence,
        names={str(name): pick(i) for name, i in record["names"].items()},
    )


def _words(record: dict[str, Any], key: str) -> tuple[str, ...]:
    words = record[key]
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words) or len({*words}) != len(words):
        raise CellError(f"{key} in the cell's JSON must be a list of different names, not {words!r}")
    return tuple(words)


def _read_node(
    op: str, args: list[Node], data: list[Any], states: tuple[str, ...], gates: tuple[str, ...], outside: set[str]
) -> Node | None:
    """The node, checked as if it had been written in a cell; None if no cell contains such a node."""
    if op in expr.OPS:
        return None if data else expr.apply(op, *args)
    match (op, *data):
        case "const", str(bits) if not args:
            return expr.constant(float.fromhex(bits))
        case ("input",) if not args:
            return make(op)
        case "state", name if not args and name in states:
            return make(op, (), (name,))
        case "outside", name if not args and name in outside:
            return make(op, (), (name,))
        case "parameter", namespace, gate if not args and namespace in VECTORS and gate in gates:
            return make(op, (), (namespace, gate))
        case "product", namespace, gate if len(args) == 1 and namespace in MATRICES and gate in gates:
            return _product(namespace, gate, args[0])
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Tracing


class Matrix(expr.Placeholder):
    """`W.r` while a cell is traced: a block of a weight matrix, waiting for its operand."""

    def __init__(self, namespace: str, gate: str) -> None:
        self.namespace, self.gate = namespace, gate

    def __matmul__(self, operand: Any) -> Node:
        return _product(self.namespace, self.gate, expr.as_node(operand))

    def as_node(self) -> Node:
        """A matrix alone is no value."""
        raise CellError(
            f"{self.namespace}.{self.gate} is a matrix; it only multiplies, with @, as in W.r @ x or U.r @ h"
        )


def _product(namespace: str, gate: str, operand: Node) -> Node:
    label = f"{namespace}.{gate}" if gate else namespace
    if operand.is_condition:
        raise CellError(f"{label} @ a comparison: write {label} @ where(a < b, 1.0, 0.0)")
    if operand.op in ("const", "parameter"):
        raise CellError(f"{label} @ a constant of the step is a bias in disguise; write b.{gate or 'gate'}")
    if namespace == "W" and operand.op != "input":
        raise CellError(
            f"{label} multiplies the input x and nothing else; write U for a state or a value of this step, and scale "
            "or mask x before the layer"
        )
    if namespace != "W" and operand.op == "input":
        raise CellError(f"{label} multiplies states and values of this step; for the input x write W")
    if not operand.varies:
        raise CellError(
            f"{label} multiplies something that depends on neither x nor a state: put an outside input among the "
            f"features of x, and write a product of parameters as b.{gate or 'gate'}"
        )
    return make("product", (operand,), (namespace, gate))


class Namespace(expr.Placeholder):
    """`W`, `U`, `P`, `b`, `c`, `d` or `p` while a cell is traced: its attributes are the gates."""

    def __init__(self, letter: str) -> None:
        self._letter = letter

    def __getattr__(self, gate: str) -> Any:
        if gate.startswith("_"):  # an AttributeError, for it may be NumPy or copy asking what this object can do
            raise AttributeError(f"{gate!r} cannot name a gate; a gate's name begins with a letter")
        return self._leaf(gate)

    def _leaf(self, gate: str) -> Any:
        return Matrix(self._letter, gate) if self._letter in MATRICES else make("parameter", (), (self._letter, gate))

    def __matmul__(self, operand: Any) -> Node:
        if self._letter not in MATRICES:
            raise CellError(f"{self._letter} holds one value per unit; it is added or multiplied by *, not by @")
        product: Node = self._leaf("") @ operand
        return product

    def as_node(self) -> Node:
        """The vector of a cell with a single gate, written without one (`b` instead of `b.n`)."""
        if self._letter in MATRICES:
            raise CellError(f"{self._letter} is a matrix; it only multiplies, with @, as in W.r @ x or U.r @ h")
        vector: Node = self._leaf("")
        return vector


def cell(
    function: Callable[..., Any] | None = None,
    *,
    states: str,
    output: str | None = None,
    per_step: str = "",
    per_sequence: str = "",
    name: str | None = None,
) -> Any:
    """Turn a function of equations into a `Cell`.

    The function's arguments are x, the states in order, the outside inputs named by `per_step` and `per_sequence`, and
    the namespaces it uses among W, U, P (matrices), b, c, p (vectors; `d` for `c` where a state has that name).
    Keyword-only arguments are constants. It returns the next states in order. `states="h c"` names the states;
    `output` is the one that the layer shows, by default the first.

    Raises CellError, naming the line, the reason and the way out, for whatever a cell cannot say.
    """

    def decorate(fn: Callable[..., Any]) -> Cell:
        def retrace(**constants: Any) -> Cell:
            wanted = {"states": states, "output": output, "per_step": per_step, "per_sequence": per_sequence}
            return _trace(fn, name or str(getattr(fn, "__name__", "")), wanted, constants, retrace)

        return retrace()

    return decorate if function is None else decorate(function)


def _trace(
    fn: Callable[..., Any],
    name: str,
    wanted: dict[str, Any],
    constants: dict[str, Any],
    retrace: Callable[..., Cell],
) -> Cell:
    if not inspect.isfunction(fn):
        raise CellError(f"@cell goes above a function of equations, not {type(fn).__name__} {name}")
    states = tuple(wanted["states"].split())
    per_step, per_sequence = tuple(wanted["per_step"].split()), tuple(wanted["per_sequence"].split())
    arguments = _arguments(fn, states, per_step + per_sequence, constants)
    gates: dict[str, None] = {}
    gated: set[str] = set()
    lines: dict[Node, int] = {}
    frames: list[FrameType] = []

    def watch(node: Node) -> None:
        if node.op in ("product", "parameter"):
            gates.setdefault(node.data[1])
            if node.data[0] != "P":  # a projection is not a gate and needs no name
                gated.add(node.data[1])
        if (frame := _frame_of(fn.__code__)) is not None:
            lines.setdefault(node, frame.f_lineno)
            frames[:] = [frame]

    with _refusals_located(fn), _observed(watch):
        returned = fn(*arguments, **constants)
    # A frame that is held keeps its variables, as they stood at the end; equations print under the author's names.
    variables = dict(frames.pop().f_locals) if frames else {}

    def check(holds: bool, reason: str, node: Node | None = None) -> None:
        if not holds:
            raise CellError(_located(fn, reason, lines.get(node) if node is not None else None))

    results = returned if isinstance(returned, tuple) else (returned,)
    plural = "state" if len(states) == 1 else "states"
    check(
        len(results) == len(states),
        f"the cell has {len(states)} {plural} ({', '.join(states)}) but returns {len(results)} values; return the next "
        "value of each state, in their order",
    )
    for state, result in zip(states, results, strict=True):
        check(
            isinstance(result, Node),
            f"the next value of {state} is {type(result).__name__}, not an expression; return a value computed from "
            "x, the states and the parameters",
        )
        check(
            not result.is_condition,
            f"the next value of {state} is a comparison; write where(a < b, 1.0, 0.0)",
        )
    output = wanted["output"] or states[0]
    check(output in states, f"output={output!r} is no state; the states are {', '.join(states)}")
    check(
        "" not in gated or len(gated) == 1,
        f"{', '.join(sorted(gated - {''}))}: some products and biases name a gate and some do not; name the "
        "gate everywhere (W.n @ x, b.n), or nowhere",
    )
    try:
        _widths(states, results, lines)
    except _WidthError as error:
        raise CellError(_located(fn, str(error), error.line)) from None
    reachable = set(expr.postorder(results))
    used = {n.data[1] for n in reachable if n.op in ("product", "parameter")}
    return Cell(
        name=name,
        states=states,
        next=results,
        gates=tuple(gate for gate in gates if gate in used),
        output=states.index(output),
        per_step=per_step,
        per_sequence=per_sequence,
        names=_named(variables, reachable, states),
        about=inspect.getdoc(fn) or "",
        retrace=retrace,
    )


def _arguments(
    fn: Callable[..., Any], states: tuple[str, ...], outside: tuple[str, ...], constants: dict[str, Any]
) -> list[Any]:
    """What each positional argument of the function stands for."""

    def refuse(reason: str) -> None:
        raise CellError(_located(fn, reason, None))

    if not states or len(set(states)) != len(states):
        refuse('states= must name each state once, such as states="h" or states="h c"')
    for name in (*states, *outside):
        if name in TAKEN:
            kind, way = ("a state", 'states="h"') if name in states else ("an outside input", 'per_step="mask"')
            means = "the input" if name == "x" else "a namespace of the parameters"
            refuse(f"{kind} is called {name}, and {name} is {means} in every cell; choose another name, such as {way}")
    kinds = inspect.signature(fn).parameters
    positional = [p.name for p in kinds.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in kinds.values()):
        refuse("*args and **kwargs hide what the cell depends on; name the arguments: x, the states, W, U, b, ...")
    lead = ["x", *states]
    if positional[: len(lead)] != lead:
        refuse(
            f"the arguments must begin with {', '.join(lead)}; this function's are {', '.join(positional) or 'none'}"
        )
    constant_names = {p.name for p in kinds.values() if p.kind is p.KEYWORD_ONLY}
    if unknown := set(constants) - constant_names:
        refuse(f"{', '.join(sorted(unknown))} is no constant of this cell; constants are keyword-only arguments")
    values: list[Any] = [make("input"), *(make("state", (), (state,)) for state in states)]
    for argument in positional[len(lead) :]:
        if argument in outside:
            values.append(make("outside", (), (argument,)))
        elif argument in NAMESPACES:
            values.append(Namespace(argument))
        else:
            refuse(
                f"argument {argument!r} is neither a state, an outside input (per_step=, per_sequence=) nor one of the "
                "namespaces W, U, P, b, c, d, p; make a constant keyword-only (after a bare *)"
            )
    if len(set(outside)) != len(outside) or set(outside) & set(lead):
        refuse("per_step= and per_sequence= must name each outside input once, and neither x nor a state")
    if missing := set(outside) - set(positional):
        refuse(f"the outside input {', '.join(sorted(missing))} is not among the function's arguments")
    if "c" in positional[len(lead) :] and "d" in positional[len(lead) :]:
        refuse("c and d are two names of one bias; use c, or d where a state is called c")
    return values


def _named(variables: dict[str, Any], reachable: set[Node], states: tuple[str, ...]) -> dict[str, Node]:
    """The author's variables that name an operation or a product, each node once."""
    names: dict[str, Node] = {}
    taken: set[Node] = set()
    for name, value in variables.items():
        if not isinstance(value, Node) or value not in reachable or value in taken or name in states:
            continue
        if value.op in expr.OPS or value.op == "product":
            names[name] = value
            taken.add(value)
    return names


@contextmanager
def _observed(watch: Callable[[Node], None]) -> Iterator[None]:
    token = expr.observer.set(watch)
    try:
        yield
    finally:
        expr.observer.reset(token)


def _frame_of(code: CodeType) -> FrameType | None:
    """The innermost running call of the code."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return frame


@contextmanager
def _refusals_located(fn: Callable[..., Any]) -> Iterator[None]:
    """Whatever the function raises becomes a CellError that names the line."""
    try:
        yield
    except Exception as error:
        trace, line = error.__traceback__, None
        while trace is not None:
            if trace.tb_frame.f_code is fn.__code__:
                line = trace.tb_lineno
            trace = trace.tb_next
        reason = str(error) if isinstance(error, CellError) else f"{type(error).__name__}: {error}"
        if isinstance(error, RecursionError):
            reason = "a function that it calls calls itself, deeper than Python goes; write the repetition as a loop"
        raise CellError(_located(fn, reason, line)) from (None if isinstance(error, CellError) else error)


def _located(fn: Callable[..., Any], reason: str, line: int | None) -> str:
    code = fn.__code__
    line = line or code.co_firstlineno
    source = linecache.getline(code.co_filename, line).strip()
    shown = f" `{source}`" if source else ""
    return f"cell {fn.__name__}, {code.co_filename}:{line}:{shown}: {reason}"


class _WidthError(CellError):
    line: int | None = None


def _widths(states: tuple[str, ...], results: tuple[Node, ...], lines: Mapping[Node, int]) -> dict[Node, str]:
    """The width of each node; walks up and down until the widths of states and outside inputs no longer change."""
    order = expr.postorder(results)
    ends = {make("state", (), (state,)): node for state, node in zip(states, results, strict=True)}
    leaves = [node for node in order if node.op in ("state", "outside")]
    known: dict[Node, str] = {}
    for _ in range(len(leaves) + len(states) + 1):
        widths = _widths_downwards(order, _widths_upwards(order, known, lines), lines)
        found = {leaf: width for leaf in leaves if (width := widths.get(ends.get(leaf, leaf), widths.get(leaf)))}
        found |= {end: widths[leaf] for leaf, end in ends.items() if leaf in widths and end not in widths}
        if found == known:
            break
        known = found
    by_operand: dict[str, str] = {}
    for node in order:
        if node.op == "product" and node.data[0] != "W":
            namespace, width = node.data[0], widths.get(node.args[0], "hidden")
            if by_operand.setdefault(namespace, width) != width:
                raise _refusal_of_widths(
                    f"{namespace} multiplies values of two widths; use another namespace", node, lines
                )
    return widths


def _widths_upwards(order: list[Node], known: dict[Node, str], lines: Mapping[Node, int]) -> dict[Node, str]:
    """From arguments to what is computed from them; constants, and what depends on them alone, have any width."""
    widths: dict[Node, str] = {}
    for node in order:
        if node.op == "product":
            widths[node] = "projected" if node.data[0] == "P" else "hidden"
        elif node.op in ("parameter", "input"):
            widths[node] = "hidden"
        elif node in known:
            widths[node] = known[node]
        elif node.op in expr.OPS:
            seen = {widths[arg] for arg in node.args if arg in widths}
            if len(seen) > 1:
                raise _refusal_of_widths(
                    "a projected value (P @ ...) meets one of the hidden size unit by unit; their widths differ",
                    node,
                    lines,
                )
            if seen:
                widths[node] = seen.pop()
    return widths


def _widths_downwards(order: list[Node], widths: dict[Node, str], lines: Mapping[Node, int]) -> dict[Node, str]:
    """To what has no width yet, such as an outside input, from what it is used with."""
    wanted = dict(widths)
    varies = {node for node in order if node.op in ("state", "outside")}
    for node in order:
        if node.op in expr.OPS and any(arg in varies for arg in node.args):
            varies.add(node)
    for node in reversed(order):
        if node.op in expr.OPS and node in wanted:
            for arg in node.args:
                if arg in varies and arg not in widths and wanted.setdefault(arg, wanted[node]) != wanted[node]:
                    raise _refusal_of_widths(
                        "one value meets both a projected value (P @ ...) and one of the hidden size; give an outside "
                        "input twice, under two names",
                        node,
                        lines,
                    )
    return wanted


def _refusal_of_widths(reason: str, node: Node, lines: Mapping[Node, int]) -> _WidthError:
    error = _WidthError(reason)
    error.line = lines.get(node)
    return error
