"""Torch's recurrent modules as equations: which `Cell` computes a step of each, with its biases and without."""

from __future__ import annotations

from dataclasses import replace

from throughtime.equations import catalogue, expr
from throughtime.equations.cell import NAMESPACES, Cell


def _without_biases(cell: Cell) -> Cell:
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


_EQUATIONS: dict[tuple[str, bool], Cell] = {
    ("RNN_TANH", False): catalogue.Elman,
    ("RNN_RELU", False): catalogue.Elman(activation=expr.relu),
    ("GRU", False): catalogue.GRU,
    ("LSTM", False): catalogue.LSTM,
    ("LSTM", True): catalogue.ProjectedLSTM,
}

CELLS: dict[tuple[str, bool, bool], Cell] = {
    (mode, projected, bias): (cell if bias else _without_biases(cell)).settled()
    for (mode, projected), cell in _EQUATIONS.items()
    for bias in (True, False)
}
"""By torch's mode, whether there is a projection, whether there are biases: all made at once, so that a tracer finds
them (it looks through no cache)."""
