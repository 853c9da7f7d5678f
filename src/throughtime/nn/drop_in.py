"""torch.nn's RNN, LSTM and GRU with only the computation replaced.

Constructor, initial values, state_dict, checks and messages are torch's own, for these are subclasses of its classes.
For the same reason `torch.compile` looks into them only with `torch._dynamo.config.allow_rnn = True`; `Recurrent`
needs no such leave.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from throughtime.engine import recurrence
from throughtime.equations import catalogue, expr
from throughtime.equations.cell import NAMESPACES, Cell
from throughtime.errors import ThroughtimeError
from throughtime.nn.dropout import Masks
from throughtime.nn.layout import Lengths, State
from throughtime.nn.recurrent import Call, Layer, Run


class _DropIn(Layer, torch.nn.RNNBase):
    """Stands before one of torch's classes in the order of inheritance, and takes its forward over."""

    @property
    def cell(self) -> Cell:
        """The equations of a step."""
        return _CELLS[self.mode, self.proj_size > 0, self.bias]

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Any = None,
        *,
        lengths: Lengths | None = None,
        reset: Tensor | None = None,
        masks: Masks | None = None,
    ) -> tuple[Any, Any]:
        """As torch's forward; `lengths=`, `reset=` and `masks=` as in `Recurrent.forward`.

        Raises what torch raises, and ShapeError for lengths, resets or masks that do not fit.
        """
        call = Call(input, hx, lengths, reset, masks=masks)
        return self._forward(call, partial(recurrence.run, target=self.target))

    def _forward(self, call: Call, run: Run) -> tuple[Tensor | PackedSequence, State]:
        x, h_0 = call.x, call.h_0
        if not self._is_regular(x, h_0):
            super().forward(x, h_0)
            raise ThroughtimeError(
                f"torch.nn.{type(self).__name__} takes this input and state, but throughtime's does not know their "
                f"kind ({_kind(x)}; {_kind(h_0)}); give plain tensors of the layer's dtype on the layer's device"
            )
        self._torch_checks(x, h_0)
        return self._compute(call, run)

    def _is_regular(self, x: Any, h_0: Any) -> bool:
        """Whether torch's forward would come as far as its own check methods; if not, it says best what is wrong."""
        packed = isinstance(x, PackedSequence)
        steps = x.data if packed else x
        if not isinstance(steps, Tensor) or not (packed or steps.dim() in (2, 3)):
            return False
        weight = self._parameters_of(0, "")[0]
        empty = not packed and steps.shape[1 if self.batch_first and steps.dim() == 3 else 0] == 0
        if empty or steps.device != weight.device:
            return False
        if h_0 is None:
            return True
        states = len(self.cell.states)
        if states > 1 and not (isinstance(h_0, tuple | list) and len(h_0) == states):
            return False
        given = (h_0,) if states == 1 else h_0
        return all(
            isinstance(state, Tensor)
            and state.dim() == (3 if packed else steps.dim())
            and state.device == steps.device
            and (state.dtype == steps.dtype or torch.is_autocast_enabled(steps.device.type))
            for state in given
        )

    def _torch_checks(self, x: Tensor | PackedSequence, h_0: Any) -> None:
        """The checks that torch's forward makes once it has a batch, in its order."""
        if not torch.compiler.is_compiling():  # a program takes parameters as arguments and must not store them
            self._update_flat_weights()
        if isinstance(x, PackedSequence):
            steps, batch_sizes = x.data, x.batch_sizes
            hidden = None if h_0 is None else self.permute_hidden(h_0, x.sorted_indices)
        else:
            steps, batch_sizes, hidden = x, None, h_0
            if x.dim() == 2:
                steps = x.unsqueeze(0 if self.batch_first else 1)
                if h_0 is not None:
                    hidden = h_0.unsqueeze(1) if isinstance(h_0, Tensor) else tuple(s.unsqueeze(1) for s in h_0)
        if hidden is None:
            self.check_input(steps, batch_sizes)
        else:
            self.check_forward_args(steps, hidden, batch_sizes)


class RNN(_DropIn, torch.nn.RNN):
    """torch.nn.RNN, computed by throughtime; takes `lengths=` and `reset=` too, and can be set `segments`."""


class LSTM(_DropIn, torch.nn.LSTM):
    """torch.nn.LSTM, computed by throughtime; takes `lengths=` and `reset=` too, and can be set `segments`."""


class GRU(_DropIn, torch.nn.GRU):
    """torch.nn.GRU, computed by throughtime; takes `lengths=` and `reset=` too, and can be set `segments`."""


Model = TypeVar("Model", bound=torch.nn.Module)


def upgrade(model: Model) -> Model:
    """Make every torch.nn.RNN, LSTM and GRU in a model throughtime's, in place, and return the model.

    Each module stays the same object: parameters, hooks, training flag, device and whoever refers to it are kept. A
    subclass of torch's classes may have a forward of its own; it is left as it is, with a warning that names it.
    """
    for name, module in model.named_modules():
        if type(module) in _DROP_INS:
            module.__class__ = _DROP_INS[type(module)]
        elif isinstance(module, torch.nn.RNNBase) and not isinstance(module, Layer):
            warnings.warn(
                f"{name or 'the model'} is left as it is: {type(module).__name__} is a subclass of torch's layers, "
                "which may compute something else; change its base class to throughtime.nn's if it does not",
                stacklevel=2,
            )
    return model


_DROP_INS: dict[type[torch.nn.Module], type[torch.nn.Module]] = {
    torch.nn.RNN: RNN,
    torch.nn.LSTM: LSTM,
    torch.nn.GRU: GRU,
}


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


_EQUATIONS: dict[tuple[str, bool], Cell] = {
    ("RNN_TANH", False): catalogue.Elman,
    ("RNN_RELU", False): catalogue.Elman(activation=expr.relu),
    ("GRU", False): catalogue.GRU,
    ("LSTM", False): catalogue.LSTM,
    ("LSTM", True): catalogue.ProjectedLSTM,
}

_CELLS: dict[tuple[str, bool, bool], Cell] = {
    (mode, projected, bias): (cell if bias else without_biases(cell)).settled()
    for (mode, projected), cell in _EQUATIONS.items()
    for bias in (True, False)
}
"""By torch's mode, whether there is a projection, whether there are biases: all made at once, so that a tracer finds
them (it looks through no cache)."""


def _kind(value: Any) -> str:
    """What a value is, in words, for a message."""
    if isinstance(value, Tensor):
        return f"{value.dtype} of shape {list(value.shape)} on {value.device}"
    return type(value).__name__
