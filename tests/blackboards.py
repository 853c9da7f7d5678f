"""Cells for tests: the catalogue, odd ones written as a user would, and random ones; and problems to run them on."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn
from torch import Tensor

from throughtime.engine.problem import Problem
from throughtime.equations import expr
from throughtime.equations.catalogue import CELLS, Elman
from throughtime.equations.cell import Cell, cell
from throughtime.equations.expr import (
    OPS,
    Node,
    apply,
    constant,
    exp,
    identity,
    log1p,
    make,
    maximum,
    minimum,
    relu,
    sigmoid,
    sign,
    softplus,
    sqrt,
    tanh,
    where,
)


@cell(states="h")
def MinimalGated(x, h, W, U, b):
    """Zhou et al. 2016: two gates, the second a product of something computed in the step."""
    f = sigmoid(W.f @ x + b.f + U.f @ h)
    n = tanh(W.n @ x + b.n + U.n @ (f * h))
    return (1 - f) * h + f * n


@cell(states="h c")
def Peephole(x, h, c, W, U, b, p):
    """Gers & Schmidhuber 2000: gates that see the cell state unit by unit."""
    i = sigmoid(W.i @ x + b.i + U.i @ h + p.i * c)
    f = sigmoid(W.f @ x + b.f + U.f @ h + p.f * c)
    g = tanh(W.g @ x + b.g + U.g @ h)
    c_next = f * c + i * g
    o = sigmoid(W.o @ x + b.o + U.o @ h + p.o * c_next)
    return o * tanh(c_next), c_next


@cell(states="h", per_step="gap mask", per_sequence="who")
def Decaying(x, h, gap, mask, who, W, U, b, p):
    """Outside inputs of both kinds; values that depend on a parameter or an outside input alone."""
    fade = exp(-softplus(p.a) * gap)
    old = fade * h
    new = tanh(W.a @ x + b.a + U.a @ old + who)
    return where(mask < 0.5, old, new)


@cell(states="h")
def Unitwise(x, h, W, U, b):
    """x used unit by unit, every extremum and kink, one gate without a name."""
    a = W @ x + b + U @ h
    bent = where(a < 0.1, -0.5 * a, maximum(a, x)) - minimum(abs(a), 0.7 * h) + 0.1 * sign(a)
    return 0.5 * bent / (1 + a**2) + relu(h) * sqrt(1 + a * a) / 4 - log1p(abs(h)) / 3


@cell(states="h g", output="g")
def Delay(x, h, g, W, U):
    """A shift register: one next state is another's last value, and the second is shown."""
    return tanh(W.a @ x + U.a @ h + U.b @ g), h


@cell(states="h g")
def Twins(x, h, g, W, U, b):
    """Both states become the same node; one block of U multiplies two operands."""
    n = tanh(W.n @ x + b.n + U.n @ h + U.n @ g)
    return n, n


@cell(states="h")
def LowRank(x, h, W, U, P, b):
    """A projection within the step, so that no state is projected."""
    return tanh(W.n @ x + b.n + U.n @ (P @ h))


@cell(states="h c", per_step="m")
def ScaledProjection(x, h, c, m, W, U, P, b):
    """An outside input beside a projected value."""
    c_next = tanh(W.n @ x + b.n + U.n @ h) + 0.5 * c
    return exp(-m * m) * (P @ c_next) + 0.5 * h, c_next


@cell(states="h s")
def Still(x, h, s, W, U, b):
    """A state that is a parameter's function, whatever came before."""
    return tanh(W.n @ x + U.n @ h + s), sigmoid(b.n)


@cell(states="h")
def Echo(x, h):
    """Nothing to learn."""
    return 0.9 * h + 0.1 * x


@cell(states="h", per_step="m")
def Follow(x, h, m, W):
    """A state that is an outside input's function alone."""
    return m * m


USERS = (MinimalGated, Peephole, Decaying, Unitwise, Delay, Twins, LowRank, ScaledProjection, Still, Echo, Follow)
ELMANS = {"elman-relu": Elman(activation=relu), "elman-identity": Elman(activation=identity)}
ODD: dict[str, Cell] = {one.name: one for one in USERS} | ELMANS
ALL: dict[str, Cell] = CELLS | ODD


def evaluate(node: Node, values: dict[Node, float]) -> float:
    """The node in Python floats, by the table's own column."""
    known: dict[Node, Any] = {**values}
    result = expr.fold([node], lambda leaf: leaf.data[0], lambda n, args: OPS[n.op].value(*args), known)[node]
    return float(result)


def random_problem(
    cell: Cell,
    steps: int = 5,
    rows: int = 3,
    input_size: int = 4,
    hidden_size: int = 6,
    *,
    lengths: tuple[int, ...] | None = None,
    reset: bool = False,
    reverse: bool = False,
    wide_outside: bool = False,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Problem:
    """Tensors drawn for the cell, each with requires_grad; unit-wise use of x makes input_size the hidden size."""
    generator = torch.Generator().manual_seed(seed)
    proj_size = max(1, hidden_size - 2) if cell.projects else 0
    if cell.needs_equal_sizes:
        input_size = hidden_size

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    def weight(shape: tuple[int, ...]) -> Tensor:
        scale = 1 / max(1, shape[-1] if len(shape) > 1 else 2) ** 0.5
        return (draw(*shape) * scale).detach().requires_grad_()

    sizes = cell.sizes(hidden_size, proj_size)
    width = hidden_size if wide_outside and not cell.projects else 1
    mask = torch.rand(steps, rows, generator=generator) < 0.3 if reset else None
    return Problem(
        cell=cell,
        x=draw(steps, rows, input_size),
        states=tuple(draw(rows, size) for size in sizes),
        parameters=tuple(weight(cell.shape(p, input_size, hidden_size, proj_size)) for p in cell.parameters),
        outside=(
            *(draw(steps, rows, width) for _ in cell.per_step),
            *(draw(rows, width) for _ in cell.per_sequence),
        ),
        initial=tuple(draw(rows, size) for size in sizes) if reset else (),
        lengths=lengths,
        reset=mask,
        reverse=reverse,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Random cells


@st.composite
def graphs(
    draw: DrawFn, leaves: list[Node], size: int = 8, products: list[tuple[str, str]] | None = None
) -> list[Node]:
    """A pool of values, each made from earlier ones by a row of the table; tame, so that nothing overflows.

    `products` are blocks (namespace, gate) that may multiply a value.
    """
    pool = list(leaves)
    for _ in range(draw(st.integers(1, size))):
        a, b, c, d = (draw(st.sampled_from(pool)) for _ in range(4))
        kind = draw(st.sampled_from([*sorted(expr.OPS), *(["product"] * 4 if products else [])]))
        if kind == "product":
            pool.append(make("product", (_operand(a, pool),), draw(st.sampled_from(products or []))))
        else:
            pool.append(_tame(kind, a, b, c, d))
    return pool


def _operand(a: Node, pool: list[Node]) -> Node:
    """Something that a matrix may multiply: not x itself, and nothing that depends on neither x nor a state."""
    depends = any(node.op in ("input", "state") for node in expr.postorder([a]))
    return a if depends and a.op != "input" else next(n for n in pool if n.op == "state")


def _tame(kind: str, a: Node, b: Node, c: Node, d: Node) -> Node:
    row = expr.OPS[kind]
    if row.truth:
        return where(apply(kind, a, b), c, d)
    if kind == "where":
        return where(a < b, c, 0.5 * d)
    tamed = {
        "exp": lambda: exp(-abs(a)),
        "log": lambda: apply("log", 1.5 + a * a),
        "log1p": lambda: log1p(abs(a)),
        "sqrt": lambda: sqrt(0.5 + a * a),
        "div": lambda: a / (1 + b * b),
        "mul": lambda: a * tanh(b),
    }
    return tamed[kind]() if kind in tamed else apply(kind, *(a, b, c)[: row.arity])


@st.composite
def random_cells(draw: DrawFn) -> Cell:
    """A cell of one or two states, some gates, stages, outside inputs and perhaps a projection."""
    states = ("h", "g")[: draw(st.integers(1, 2))]
    projects = len(states) == 2 and draw(st.booleans())
    gates = ["a", "r", "z"][: draw(st.integers(1, 3))]
    per_step = ("m",) if draw(st.booleans()) else ()
    per_sequence = ("q",) if draw(st.booleans()) else ()
    x = make("input")
    values = [make("state", (), (state,)) for state in states]
    recurrent = make("product", (values[0],), ("U", gates[0]))
    free = [*values[1:], recurrent] if projects else [*values, recurrent]
    free += [make("product", (x,), ("W", gate)) for gate in gates]
    free += [make("parameter", (), (draw(st.sampled_from("bcp")), gate)) for gate in gates]
    free += [make("outside", (), (name,)) for name in per_step + per_sequence]
    free += [constant(draw(st.sampled_from([-1.5, 0.25, 2.0])))] + ([x] if draw(st.booleans()) else [])
    blocks = [] if projects else [("U", gate) for gate in gates]
    pool = draw(graphs(free, products=blocks))
    after = [_bounded(draw(st.sampled_from(["tanh", "leak", "gate"])), pool, value) for value in free[: len(states)]]
    if projects:
        after = [make("product", (_operand(after[0], values[1:]),), ("P", "")), after[1]]
    used = {node.data[1] for node in expr.postorder(after) if node.op in ("product", "parameter")}
    order = [gate for gate in [*gates, ""] if gate in used]
    outside = {node.data[0] for node in expr.postorder(after) if node.op == "outside"}
    return Cell(
        name="Random",
        states=states,
        next=tuple(after),
        gates=tuple(order),
        output=draw(st.integers(0, len(states) - 1)),
        per_step=tuple(name for name in per_step if name in outside),
        per_sequence=tuple(name for name in per_sequence if name in outside),
        names={"last": pool[-1]} if pool[-1].op in expr.OPS else {},
    )


def _bounded(kind: str, pool: list[Node], value: Node) -> Node:
    inside = pool[-1] + 0.5 * pool[len(pool) // 2]
    if kind == "tanh":
        return tanh(inside)
    gate = sigmoid(pool[-1])
    other = value if value.op == "state" else tanh(value)
    return 0.5 * other + 0.5 * tanh(inside) if kind == "leak" else (1 - gate) * tanh(inside) + gate * other
