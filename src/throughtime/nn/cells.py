"""torch.nn's RNNCell, LSTMCell and GRUCell with only the computation replaced: one step of a recurrence a call.

Constructor, initial values, state_dict, checks and messages are torch's own. So is the step itself where torch's
operations serve better: inside a compiled, exported or traced program, which then needs nothing of throughtime; while
states are recorded, for a step alone has no time to look through; and for tensors that the engine is not made for, such
as subclasses of Tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from throughtime.engine import recurrence
from throughtime.engine.precision import is_autocast, no_autocast
from throughtime.engine.problem import Problem
from throughtime.equations.cell import Cell
from throughtime.nn import scripting
from throughtime.nn.torch_equations import CELLS

Run = Callable[[Problem], tuple[Tensor, tuple[Tensor, ...]]]

_PLAIN = (Tensor, torch.nn.Parameter)


class StepModule(scripting.Scriptable, torch.nn.RNNCellBase):
    """Stands before one of torch's cells in the order of inheritance, and takes its forward over."""

    target: str | None = None
    """The target of the engine that runs the step; None lets the engine pick (see `throughtime.explain`)."""
    _gates: int
    _states: int = 1
    __jit_unused_properties__ = ("cell", "_mode")

    @property
    def cell(self) -> Cell:
        """The equations of the step."""
        return CELLS[str(self._mode), False, self.bias_ih is not None]

    @property
    def _mode(self) -> str | None:
        """torch's name of the equations, None for what it does not know."""
        raise NotImplementedError

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        """As torch's forward; raises what torch raises."""
        return self.step(input, hx, partial(recurrence.run, asked=self.target))

    def step(self, x: Tensor, hx: Any, run: Run) -> Any:
        """The next state, from x [B, I] or [I] and the state before [B, H] or [H], computed by `run` or by torch."""
        if torch.compiler.is_compiling() or recurrence.is_recording() or scripting.is_tracing():
            return super().forward(x, hx)
        weights: tuple[Any, ...] = (self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)
        if weights[2] is None and weights[3] is None:
            weights = weights[:2]
        cell = CELLS.get((str(self._mode), False, len(weights) == 4))
        states = self._fitting(x, hx, weights)
        if cell is None or states is None:
            return super().forward(x, hx)
        kind = x.device.type
        if not is_autocast(kind):
            return self._run(cell, x, states, weights, run)
        # Autocast would round some products of the step and not others; the cell computes in its own dtype.
        dtype = weights[0].dtype
        with no_autocast(kind):
            return self._run(cell, x.to(dtype), tuple(state.to(dtype) for state in states), weights, run)

    def _scriptable_forward(self) -> Callable[..., Any]:
        return scripting.step_forward(self)

    def explained(self, x: Any, hx: Any = None) -> str:
        """Which target of the engine would run the step now, and why. Raises what torch raises."""
        found: list[str] = []

        def ask(problem: Problem) -> tuple[Tensor, tuple[Tensor, ...]]:
            found.append(f"step: {recurrence.choose(problem, self.target)}")
            return problem.x, problem.states

        self.step(x, hx, ask)
        return found[0] if found else "step: torch's own operations: the tensors are not such as the engine takes"

    def _run(self, cell: Cell, x: Tensor, states: tuple[Tensor, ...], weights: tuple[Tensor, ...], run: Run) -> Any:
        """The step of what fits, as a recurrence over one step: x [1, B, I]."""
        if x.dim() == 2:
            _, after = run(Problem(cell, x.unsqueeze(0), states, weights))
        else:
            _, rows = run(Problem(cell, x[None, None], tuple(state.unsqueeze(0) for state in states), weights))
            after = tuple(state.squeeze(0) for state in rows)
        return after if self._states > 1 else after[0]

    def _fitting(self, x: Any, hx: Any, weights: tuple[Any, ...]) -> tuple[Tensor, ...] | None:
        """The states before the step, or None if anything is not as the engine wants it: torch then has the word."""
        if type(x) not in _PLAIN or x.dim() not in (1, 2) or x.shape[-1] != self.input_size or x.is_meta:
            return None
        units, rows = self.hidden_size, self._gates * self.hidden_size
        for tensor, shape in zip(weights, ((rows, self.input_size), (rows, units), (rows,), (rows,)), strict=False):
            fits = type(tensor) in _PLAIN and tensor.shape == shape and tensor.device == x.device
            if not fits or tensor.dtype != weights[0].dtype:
                return None
        if not weights[0].is_floating_point():
            return None
        shape = (*x.shape[:-1], units)
        if hx is None:
            states: tuple[Any, ...] = (x.new_zeros(shape),) * self._states
        elif self._states == 1:
            states = (hx,)
        elif isinstance(hx, tuple | list) and len(hx) == self._states:
            states = tuple(hx)
        else:
            return None
        if any(type(state) not in _PLAIN or state.shape != shape or state.device != x.device for state in states):
            return None
        dtype = weights[0].dtype
        if any(tensor.dtype != dtype for tensor in (x, *states)):
            casts = is_autocast(x.device.type)
            if not casts or not all(tensor.is_floating_point() for tensor in (x, *states)):
                return None
        return states


class RNNCell(StepModule, torch.nn.RNNCell):
    """torch.nn.RNNCell, computed by throughtime."""

    _gates = 1

    @property
    def _mode(self) -> str | None:
        return {"tanh": "RNN_TANH", "relu": "RNN_RELU"}.get(self.nonlinearity)


class LSTMCell(StepModule, torch.nn.LSTMCell):
    """torch.nn.LSTMCell, computed by throughtime."""

    _gates, _states = 4, 2

    @property
    def _mode(self) -> str:
        return "LSTM"


class GRUCell(StepModule, torch.nn.GRUCell):
    """torch.nn.GRUCell, computed by throughtime."""

    _gates = 3

    @property
    def _mode(self) -> str:
        return "GRU"
