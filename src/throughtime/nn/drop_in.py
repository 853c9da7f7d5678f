"""torch.nn's RNN, LSTM and GRU with only the computation replaced.

Constructor, initial values, state_dict, checks and messages are torch's own, for these are subclasses of its classes.
For the same reason `torch.compile` looks into them only with `torch._dynamo.config.allow_rnn = True`; `Recurrent`
needs no such leave.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from throughtime.engine import recurrence
from throughtime.engine.precision import is_autocast
from throughtime.equations.cell import Cell
from throughtime.errors import ThroughtimeError
from throughtime.nn import scripting
from throughtime.nn.dropout import Masks
from throughtime.nn.layout import Lengths, State
from throughtime.nn.recurrent import Call, Layer, Run
from throughtime.nn.torch_equations import CELLS


class _DropIn(Layer, torch.nn.RNNBase):
    """Stands before one of torch's classes in the order of inheritance, and takes its forward over."""

    @property
    def cell(self) -> Cell:
        """The equations of a step."""
        return CELLS[self.mode, self.proj_size > 0, self.bias]

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
        if scripting.is_tracing():
            self._update_flat_weights()
            return scripting.traced(self, call)
        run = partial(recurrence.run, asked=self.target)
        if not torch.compiler.is_compiling() and torch._C._dynamo.eval_frame.get_eval_frame_callback() is not None:
            return _untraced()(self, call, run)
        return self._forward(call, run)

    def _forward(self, call: Call, run: Run) -> tuple[Tensor | PackedSequence, State]:
        x, h_0 = call.x, call.h_0
        if not torch.compiler.is_compiling():  # a program takes parameters as arguments and must not store them
            self._update_flat_weights()
        if not self._is_regular(x, h_0):
            super().forward(x, h_0)
            raise ThroughtimeError(
                f"torch.nn.{type(self).__name__} takes this input and state, but throughtime's does not know their "
                f"kind ({_kind(x)}; {_kind(h_0)}); give plain tensors of the layer's dtype on the layer's device"
            )
        self._torch_checks(x, h_0)
        return self._compute(call, run)

    def _weights_of(self, depth: int, suffix: str) -> tuple[Tensor, ...]:
        """The tensors that torch's forward would use in this run, which `_update_flat_weights` has just read.

        A parametrized weight is computed anew whenever it is read, and may change with it (`spectral_norm` takes a step
        of its power iteration), so it is read as often as torch reads it.
        """
        if torch.compiler.is_compiling():
            return self._parameters_of(depth, suffix)
        names: list[str] = self._flat_weights_names
        weights: list[Any] = self._flat_weights
        return tuple(weights[names.index(f"{parameter.name}_l{depth}{suffix}")] for parameter in self.cell.parameters)

    def _is_regular(self, x: Any, h_0: Any) -> bool:
        """Whether torch's forward would come as far as its own check methods; if not, it says best what is wrong."""
        packed = isinstance(x, PackedSequence)
        steps = x.data if packed else x
        if not isinstance(steps, Tensor) or not _is_dense(steps) or not (packed or steps.dim() in (2, 3)):
            return False
        weight = self._weights_of(0, "")[0]
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
            and _is_dense(state)
            and state.dim() == (3 if packed else steps.dim())
            and state.device == steps.device
            and (state.dtype == steps.dtype or is_autocast(steps.device.type))
            for state in given
        )

    def _torch_checks(self, x: Tensor | PackedSequence, h_0: Any) -> None:
        """The checks that torch's forward makes once it has a batch, in its order."""
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


@cache
def _untraced() -> Callable[[_DropIn, Call, Run], tuple[Any, Any]]:
    """A layer's forward, hidden from `torch.compile`.

    It calls these layers without looking into them, but would trace the functions that the call leads to, one by one.
    """
    hidden: Callable[[_DropIn, Call, Run], tuple[Any, Any]] = torch.compiler.disable(_DropIn._forward)
    return hidden


class RNN(_DropIn, torch.nn.RNN):
    """torch.nn.RNN, computed by throughtime; takes `lengths=` and `reset=` too, and can be set `segments`."""


class LSTM(_DropIn, torch.nn.LSTM):
    """torch.nn.LSTM, computed by throughtime; takes `lengths=` and `reset=` too, and can be set `segments`."""


class GRU(_DropIn, torch.nn.GRU):
    """torch.nn.GRU, computed by throughtime; takes `lengths=` and `reset=` too, and can be set `segments`."""


def _is_dense(tensor: Tensor) -> bool:
    """Whether the tensor is neither sparse nor nested nor mkldnn's."""
    return tensor.layout is torch.strided and not tensor.is_nested


def _kind(value: Any) -> str:
    """What a value is, in words, for a message."""
    if isinstance(value, Tensor) and not _is_dense(value):
        return f"{value.dtype}, {'nested' if value.is_nested else value.layout}"
    if isinstance(value, Tensor):
        return f"{value.dtype} of shape {list(value.shape)} on {value.device}"
    return type(value).__name__
