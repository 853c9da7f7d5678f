"""Walk an expression graph with a table of spellings: the same tape runs on whatever the spelling's functions take."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from throughtime.equations import expr
from throughtime.equations.cell import Cell
from throughtime.equations.expr import OPS, Node


class Tape:
    """The operations that lead from given nodes to wanted ones, in order, ready to be run many times.

    `spell(name of the op)` gives the function to call. `lift(number)` makes a constant.
    """

    def __init__(
        self, roots: Iterable[Node], given: Iterable[Node], spell: Callable[[str], Callable[..., Any]]
    ) -> None:
        known = set(given)
        self.roots = tuple(roots)
        self.constants: list[Node] = []
        self.operations: list[tuple[Node, Callable[..., Any], tuple[Node, ...]]] = []
        for node in expr.postorder(self.roots, stop=lambda n: n in known):
            if node in known:
                continue
            if node.op == "const":
                self.constants.append(node)
            elif node.op in OPS:
                self.operations.append((node, spell(node.op), node.args))
            else:
                raise KeyError(f"{node!r} was not given")

    def run(self, values: Mapping[Node, Any], lift: Callable[[float], Any]) -> dict[Node, Any]:
        """The value of every root and of everything on the way to it."""
        at = dict(values)
        for node in self.constants:
            at[node] = lift(node.data[0])
        for node, function, args in self.operations:
            at[node] = function(*[at[arg] for arg in args])
        return at


def torch_spelling(op: str) -> Callable[..., Tensor]:
    """The torch function of an op's row."""
    function: Callable[..., Tensor] = OWN.get(op) or getattr(torch, OPS[op].torch)
    return function


def _sign(a: Tensor) -> Tensor:
    return torch.where(a != a, a, torch.sign(a))


OWN: dict[str, Callable[..., Tensor]] = {"sign": _sign}
"""Where torch's own function would launder a NaN: its sign of NaN is 0."""


def leaves(cell: Cell) -> tuple[Node, ...]:
    """What a step is given: the input, states, vectors and outside inputs that the cell uses."""
    return tuple(n for n in cell.nodes if n.op in ("input", "state", "parameter", "outside"))


def staged(
    roots: Sequence[Node], given: Iterable[Node], spell: Callable[[str], Callable[..., Any]]
) -> list[tuple[Tape, tuple[Node, ...]]]:
    """Cut a graph where products stand: a tape that makes their operands, then the products themselves, and again.

    The last entry's products are empty; its tape makes the roots. `given` are known from the start.
    """
    known = set(given)
    level: dict[Node, int] = {}
    waiting: dict[int, list[Node]] = {}
    for node in expr.postorder(roots, stop=lambda n: n in known):
        if node in known:
            level[node] = 0
            continue
        deepest = max((level[arg] for arg in node.args), default=0)
        if node.op in ("product", "transposed"):
            waiting.setdefault(deepest, []).append(node)
            deepest += 1
        level[node] = deepest
    plan: list[tuple[Tape, tuple[Node, ...]]] = []
    for depth in sorted(waiting):
        products = tuple(waiting[depth])
        operands = tuple(dict.fromkeys(product.args[0] for product in products))
        tape = Tape(operands, known, spell)
        plan.append((tape, products))
        known |= {node for node, _, _ in tape.operations} | set(tape.constants) | set(operands) | set(products)
    plan.append((Tape(roots, known, spell), ()))
    return plan
