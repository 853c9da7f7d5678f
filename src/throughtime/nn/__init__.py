"""What people build with: recurrent layers for any cell and under torch's names, cells, read-outs, a ragged loss."""

from throughtime.nn.cells import GRUCell, LSTMCell, RNNCell
from throughtime.nn.drop_in import GRU, LSTM, RNN
from throughtime.nn.dropout import Masks
from throughtime.nn.losses import Losses, class_losses, ragged_loss
from throughtime.nn.readout import LastStep, PerStep
from throughtime.nn.recurrent import Layer, Recurrent, explain
from throughtime.nn.replacing import Upgrade, restore, upgrade
from throughtime.nn.stream import Stream
from throughtime.nn.windows import Window, Windows

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "GRUCell",
    "LSTMCell",
    "LastStep",
    "Layer",
    "Losses",
    "Masks",
    "PerStep",
    "RNNCell",
    "Recurrent",
    "Stream",
    "Upgrade",
    "Window",
    "Windows",
    "class_losses",
    "explain",
    "ragged_loss",
    "restore",
    "upgrade",
]
