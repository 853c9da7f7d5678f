"""Torch's recurrent modules as equations: which `Cell` computes a step of each, with its biases and without."""

from __future__ import annotations

from throughtime.equations import catalogue, expr
from throughtime.equations.cell import Cell

_EQUATIONS: dict[tuple[str, bool], Cell] = {
    ("RNN_TANH", False): catalogue.Elman,
    ("RNN_RELU", False): catalogue.Elman(activation=expr.relu),
    ("GRU", False): catalogue.GRU,
    ("LSTM", False): catalogue.LSTM,
    ("LSTM", True): catalogue.ProjectedLSTM,
}

CELLS: dict[tuple[str, bool, bool], Cell] = {
    (mode, projected, bias): (cell if bias else catalogue.without_biases(cell)).settled()
    for (mode, projected), cell in _EQUATIONS.items()
    for bias in (True, False)
}
"""By torch's mode, whether there is a projection, whether there are biases: all made at once, so that a tracer finds
them (it looks through no cache)."""
