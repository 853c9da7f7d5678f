"""Recurrent networks, written as equations, trained through time, seen through time."""

from throughtime import nn
from throughtime.equations.catalogue import GRU, LSTM, Elman, GRUResetBefore, ProjectedLSTM
from throughtime.equations.cell import Cell, cell
from throughtime.equations.expr import (
    exp,
    identity,
    log,
    log1p,
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
from throughtime.errors import CellError, DataError, InteropError, ShapeError, TargetError, ThroughtimeError
from throughtime.nn import explain, restore, upgrade

__all__ = [
    "GRU",
    "LSTM",
    "Cell",
    "CellError",
    "DataError",
    "Elman",
    "GRUResetBefore",
    "InteropError",
    "ProjectedLSTM",
    "ShapeError",
    "TargetError",
    "ThroughtimeError",
    "cell",
    "exp",
    "explain",
    "identity",
    "log",
    "log1p",
    "maximum",
    "minimum",
    "nn",
    "relu",
    "restore",
    "sigmoid",
    "sign",
    "softplus",
    "sqrt",
    "tanh",
    "upgrade",
    "where",
]
