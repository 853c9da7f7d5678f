"""One step of any cell as ONNX nodes, from its equations: the same walk as every target's, with another spelling."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from throughtime.engine.codegen import leaves, staged
from throughtime.equations.cell import NAMESPACES, Cell
from throughtime.equations.expr import OPS, Node
from throughtime.interop.onnx.graph import Graph

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Weights:
    """The tensors of a cell in one direction of one layer, in the order of its parameters."""

    cell: Cell
    tensors: tuple[NDArray[Any], ...]

    def block(self, name: str, gate: str) -> NDArray[Any] | None:
        """The rows of a parameter that belong to one gate, [rows, columns] or [rows]; None if there are none."""
        for parameter, tensor in zip(self.cell.parameters, self.tensors, strict=True):
            if parameter.name == name and gate in parameter.gates:
                return np.split(tensor, len(parameter.gates))[parameter.gates.index(gate)]
        return None

    def of(self, node: Node) -> NDArray[Any]:
        """The rows that a product or a parameter of the cell uses."""
        block = self.block(NAMESPACES[node.data[0]], node.data[1])
        assert block is not None, "the cell's parameters are those of its nodes"
        return block


def step(
    graph: Graph, weights: Weights, x: str, states: Sequence[str], outside: Mapping[str, str], known: Mapping[Node, str]
) -> list[str]:
    """Nodes for one step: x [B, I] and the states [B, width] to the next states [B, width].

    `outside` holds [B, 1 or H] for each outside input, `known` what has been computed already (see `of_input`).
    """
    cell = weights.cell
    values = dict(known)
    for leaf in leaves(cell):
        if leaf.op == "input":
            values[leaf] = x
        elif leaf.op == "state":
            values[leaf] = states[cell.states.index(leaf.data[0])]
        elif leaf.op == "outside":
            values[leaf] = outside[leaf.data[0]]
        else:
            values[leaf] = graph.array(weights.of(leaf), ".".join(filter(None, leaf.data)))
    for tape, products in staged(cell.next, values, lambda op: _spelling(graph, op)):
        values = tape.run(values, graph.number)
        values |= multiplied(graph, weights, products, values)
    full = _rows(cell)
    shapes = [graph.op("Shape", state) for state, node in zip(states, cell.next, strict=True) if node not in full]
    missing = iter(shapes)
    return [values[node] if node in full else graph.op("Expand", values[node], next(missing)) for node in cell.next]


def of_input(graph: Graph, weights: Weights, x: str) -> dict[Node, str]:
    """The products with x, which need no state: of all steps at once where x is [T, B, I]."""
    found = [product for product in weights.cell.products if product.args[0].op == "input"]
    return multiplied(graph, weights, found, {product.args[0]: x for product in found})


def multiplied(graph: Graph, weights: Weights, products: Sequence[Node], values: Mapping[Node, str]) -> dict[Node, str]:
    """The products, those of one matrix with one operand at once."""
    groups: dict[tuple[str, Node], list[Node]] = {}
    for product in products:
        groups.setdefault((product.data[0], product.args[0]), []).append(product)
    found: dict[Node, str] = {}
    for (namespace, operand), group in groups.items():
        blocks = [weights.of(product) for product in group]
        matrix = graph.array(np.concatenate(blocks).T, namespace)  # [columns, gates * rows]
        together = graph.op("MatMul", values[operand], matrix)
        if len(group) == 1:
            found[group[0]] = together
            continue
        sizes = graph.sizes(*(len(block) for block in blocks))
        stems = [f"{namespace}_{product.data[1]}" for product in group]
        found |= dict(zip(group, graph.ops("Split", together, sizes, stems=stems, axis=-1), strict=True))
    return found


def _spelling(graph: Graph, op: str) -> Callable[..., str]:
    if op in OWN:
        return lambda *args: OWN[op](graph, *args)
    return lambda *args: graph.op(OPS[op].onnx, *args)


def _sign(graph: Graph, a: str) -> str:
    return graph.op("Where", graph.op("IsNaN", a), a, graph.op("Sign", a))


def _log1p(graph: Graph, a: str) -> str:
    """The standard has no log1p. With u = 1 + a as it rounds, log(u) a / (u - 1) makes good for what was rounded."""
    u = graph.op("Add", graph.number(1.0), a)
    tiny, huge = (graph.op("Equal", u, other) for other in (graph.number(1.0), a))
    log = graph.op("Log", u)
    scaled = graph.op("Mul", log, graph.op("Div", a, graph.op("Sub", u, graph.number(1.0))))
    return graph.op("Where", tiny, a, graph.op("Where", huge, log, scaled))


OWN: dict[str, Callable[..., str]] = {"sign": _sign, "log1p": _log1p}
"""Operations that the standard lacks, or says too little about: what the sign of NaN is."""


def _rows(cell: Cell) -> set[Node]:
    """The nodes that have a value for every row and unit; a bias alone has none for a row, a mask may have one unit."""
    full: set[Node] = set()
    for node in cell.nodes:
        if node.op in ("product", "state", "input") or any(arg in full for arg in node.args):
            full.add(node)
    return full
