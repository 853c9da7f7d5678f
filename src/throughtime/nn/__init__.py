"""What people build with: recurrent layers for any cell and under torch's names, read-outs, a ragged loss."""

from throughtime.nn.drop_in import GRU, LSTM, RNN, upgrade
from throughtime.nn.dropout import Masks
from throughtime.nn.losses import Losses, class_losses, ragged_loss
from throughtime.nn.readout import LastStep, PerStep
from throughtime.nn.recurrent import Layer, Recurrent, explain
from throughtime.nn.stream import Stream
from throughtime.nn.windows import Window, Windows

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "LastStep",
    "Layer",
    "Losses",
    "Masks",
    "PerStep",
    "Recurrent",
    "Stream",
    "Window",
    "Windows",
    "class_losses",
    "explain",
    "ragged_loss",
    "upgrade",
]
