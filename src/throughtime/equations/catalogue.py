"""The built-in cells: equations and citations only.

Gates are written in torch's order, and the order of first use is the order of storage.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from throughtime.equations import expr
from throughtime.equations.cell import NAMESPACES, Cell, cell
from throughtime.equations.expr import Node, sigmoid, tanh


@cell(states="h")
def Elman(x, h, W, U, b, c, *, activation: Callable[..., Node] = tanh):
    """Elman 1990, Finding structure in time, Cognitive Science 14; the lecture's h_t = tanh(w h + u x + b_h)."""
    return activation(W @ x + b + U @ h + c)


@cell(states="h")
def GRU(x, h, W, U, b, c, *, activation: Callable[..., Node] = tanh, gate: Callable[..., Node] = sigmoid):
    """Cho et al. 2014, arXiv:1406.1078v1: the reset gate acts after the product, as in torch, cuDNN and the lecture."""
    r = gate(W.r @ x + b.r + U.r @ h + c.r)
    z = gate(W.z @ x + b.z + U.z @ h + c.z)
    n = activation(W.n @ x + b.n + r * (U.n @ h + c.n))
    return (1 - z) * n + z * h


@cell(states="h")
def GRUResetBefore(x, h, W, U, b, c, *, activation: Callable[..., Node] = tanh, gate: Callable[..., Node] = sigmoid):
    """Cho et al. 2014, arXiv:1406.1078v3: the reset gate acts before the product (ONNX linear_before_reset=0)."""
    r = gate(W.r @ x + b.r + U.r @ h + c.r)
    z = gate(W.z @ x + b.z + U.z @ h + c.z)
    n = activation(W.n @ x + b.n + U.n @ (r * h) + c.n)
    return (1 - z) * n + z * h


@cell(states="h c")
def LSTM(x, h, c, W, U, b, d, *, activation: Callable[..., Node] = tanh, gate: Callable[..., Node] = sigmoid):
    """Hochreiter & Schmidhuber 1997, Neural Computation 9; with the forget gate of Gers et al. 2000."""
    i = gate(W.i @ x + b.i + U.i @ h + d.i)
    f = gate(W.f @ x + b.f + U.f @ h + d.f)
    g = activation(W.g @ x + b.g + U.g @ h + d.g)
    o = gate(W.o @ x + b.o + U.o @ h + d.o)
    c_next = f * c + i * g
    return o * activation(c_next), c_next


@cell(states="h c")
def ProjectedLSTM(x, h, c, W, U, P, b, d):
    """Sak, Senior & Beaufays 2014, arXiv:1402.1128: the LSTM whose output is projected to fewer units."""
    i = sigmoid(W.i @ x + b.i + U.i @ h + d.i)
    f = sigmoid(W.f @ x + b.f + U.f @ h + d.f)
    g = tanh(W.g @ x + b.g + U.g @ h + d.g)
    o = sigmoid(W.o @ x + b.o + U.o @ h + d.o)
    c_next = f * c + i * g
    return P @ (o * tanh(c_next)), c_next


CELLS: dict[str, Cell] = {
    "elman": Elman,
    "gru": GRU,
    "gru-reset-before": GRUResetBefore,
    "lstm": LSTM,
    "lstm-projected": ProjectedLSTM,
}
"""The names that commands and configuration files know."""


def without_biases(cell: Cell) -> Cell:
    """The same equations with every bias 0; the rest of the library derives from them as from any others."""
    now: dict[expr.Node, expr.Node] = {}
    for node in cell.nodes:
        args = tuple(now[arg] for arg in node.args)
        if node.op == "parameter" and NAMESPACES[node.data[0]].startswith("bias"):
            now[node] = expr.constant(0.0)
        else:
            now[node] = expr.apply(node.op, *args) if node.op in expr.OPS else expr.make(node.op, args, node.data)
    names = {name: now[node] for name, node in cell.names.items()}
    return replace(
        cell, name=f"{cell.name}, no biases", next=tuple(now[n] for n in cell.next), names=names, retrace=None
    )
