"""Recurrent layers for any cell: stacked, in both directions, over sequences of any lengths, with resets.

`Layer` holds the one walk over layers and directions; `Recurrent` is the layer for any cell; `drop_in` has torch's own.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from throughtime.engine import operator as _operator  # noqa: F401 - registers what compiled programs call
from throughtime.engine import recurrence
from throughtime.engine.precision import is_autocast, no_autocast
from throughtime.engine.problem import Problem
from throughtime.equations.cell import Cell
from throughtime.errors import CellError, ShapeError, ThroughtimeError
from throughtime.nn import scripting
from throughtime.nn.cells import StepModule
from throughtime.nn.dropout import Masks, drop, keys
from throughtime.nn.layout import (
    Layout,
    Lengths,
    State,
    arrange,
    check_numbers,
    check_outside,
    read_reset,
    reset_backwards,
    shape_text,
)
from throughtime.nn.stream import Stream

Run = Callable[[Problem], tuple[Tensor, tuple[Tensor, ...]]]


class Call(NamedTuple):
    """What a caller hands to a layer's forward, as it came."""

    x: Tensor | PackedSequence
    h_0: State | None = None
    lengths: Lengths | None = None
    reset: Tensor | None = None
    outside: Mapping[str, Tensor] | None = None
    masks: Masks | None = None


class Layer(scripting.Scriptable):
    """Base of the recurrent layers. A subclass checks its arguments and says where its tensors are."""

    input_size: int
    hidden_size: int
    proj_size: int
    num_layers: int
    bidirectional: bool
    batch_first: bool
    dropout: float
    target: str | None = None
    """The target of the engine that runs the layer; None lets the engine pick (see `throughtime.explain`)."""
    _segments: int | Literal["auto"] | None = None
    __jit_unused_properties__: list[str] = ["cell", "segments", "_directions", "all_weights"]  # noqa: RUF012 - torch's

    @property
    def cell(self) -> Cell:
        """The equations of a step."""
        raise NotImplementedError

    @property
    def segments(self) -> int | Literal["auto"] | None:
        """How much of a training run is kept for its backward run; it changes memory and time, and no bit (cpu target).

        None keeps every step. With a number only the states at every so many steps are kept, and what lies between is
        computed again for the backward run: exact back-propagation through time, unlike truncation. "auto" takes about
        the square root of the number of steps, and keeps everything where that is less than 4 MB. A number is rounded
        up to whole blocks of the engine's, with a warning. Other targets keep every step, and `explain` says so.
        Set it at any time; ShapeError for anything else.
        """
        return self._segments

    @segments.setter
    def segments(self, value: int | Literal["auto"] | None) -> None:
        whole = isinstance(value, int) and not isinstance(value, bool) and value > 0
        if not (value is None or value == "auto" or whole):
            raise ShapeError(f'segments is {value!r}; it must be a number of steps from 1, "auto", or None')
        self._segments = value

    def stream(self, batch_size: int | None = None, *, h_0: State | None = None) -> Stream:
        """The layer one step at a time: a `Stream` of `batch_size` rows (None: one, without a batch dimension).

        It begins in h_0, shaped as for `forward`, or where sequences begin without one. Its weights are a copy of the
        layer's, taken now, and it takes steps of their dtype and device: those of the parameters or, in a layer
        without any, those that it was made with (`dtype=`, `device=`) or moved to (`.double()`, `.to(...)`).
        Raises ThroughtimeError for a layer that has no step to stream: one that is bidirectional, or in training with
        dropout.
        """
        return Stream(self, batch_size, h_0=h_0)

    def _parameters_of(self, depth: int, suffix: str) -> tuple[Tensor, ...]:
        """The parameter tensors of one direction of one layer, in the order of `cell.parameters`."""
        return tuple(getattr(self, f"{parameter.name}_l{depth}{suffix}") for parameter in self.cell.parameters)

    def _weights_of(self, depth: int, suffix: str) -> tuple[Tensor, ...]:
        """`_parameters_of`, as a run uses them."""
        return self._parameters_of(depth, suffix)

    def _initial_of(self, depth: int, suffix: str, x: Tensor) -> tuple[Tensor, ...]:
        """Where each state begins, and what a reset returns it to: [B, width] for each state."""
        return tuple(x.new_zeros(x.shape[1], size) for size in self.cell.sizes(self.hidden_size, self.proj_size))

    def _learnt_of(self, depth: int, suffix: str) -> tuple[Tensor, ...]:
        """The learnt tensors [width] in which the states of one direction of one layer begin; none if at zero."""
        return ()

    def _scriptable_forward(self) -> Callable[..., Any]:
        return scripting.layer_forward(self)

    def _forward(self, call: Call, run: Run) -> tuple[Tensor | PackedSequence, State]:
        """Check the call in the subclass's own way, then `_compute` it."""
        raise NotImplementedError

    def _compute(self, call: Call, run: Run) -> tuple[Tensor | PackedSequence, State]:
        """From the caller's layout to the engine's, through the layers, and back. x and h_0 are known to be right."""
        layout, steps = arrange(call.x, call.lengths, self.batch_first)
        mask = None if call.reset is None else read_reset(call.reset, layout, steps.device)
        around = _outside_in(self.cell, {} if call.outside is None else call.outside, layout, steps, self.hidden_size)
        given = None if call.h_0 is None else layout.states_in(call.h_0)
        drops = self.training and self.dropout > 0 and self.num_layers > 1
        key = keys(call.masks, layout, steps.device) if drops else None
        kind = steps.device.type
        if not is_autocast(kind):
            output, states = self._walk(steps, given, layout.lengths, mask, around, key, run)
        else:
            # Autocast would round some products of a step and not others; the layer computes in its own dtype.
            dtype = next(self.parameters(), steps).dtype
            given = None if given is None else tuple(state.to(dtype) for state in given)
            around = tuple(value.to(dtype) for value in around)
            with no_autocast(kind):
                output, states = self._walk(steps.to(dtype), given, layout.lengths, mask, around, key, run)
        return layout.outputs_out(output), layout.states_out(states)

    def _walk(
        self,
        x: Tensor,
        given: tuple[Tensor, ...] | None,
        lengths: tuple[int, ...] | None,
        reset: Tensor | None,
        outside: tuple[Tensor, ...],
        key: Tensor | None,
        run: Run,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Through layers and directions: x [T, B, I] to [T, B, D * width] and, per state, [layers * D, B, width].

        `key` [T, B] decides the dropout masks; None for no dropout.
        """
        finals: list[tuple[Tensor, ...]] = []
        for depth in range(self.num_layers):
            if depth > 0 and key is not None:
                x = drop(x, self.dropout, key, depth)
            outputs = []
            for reverse in (False, True) if self.bidirectional else (False,):
                suffix = "_reverse" if reverse else ""
                parameters = self._weights_of(depth, suffix)
                initial = self._initial_of(depth, suffix, x)
                problem = Problem(
                    cell=self.cell,
                    x=x,
                    states=initial if given is None else tuple(state[len(finals)] for state in given),
                    parameters=parameters,
                    outside=outside,
                    initial=() if reset is None else initial,
                    lengths=lengths,
                    reset=reset_backwards(reset, lengths) if reverse and reset is not None else reset,
                    reverse=reverse,
                    segments=self._segments,
                )
                output, states = run(problem)
                outputs.append(output)
                finals.append(states)
            x = torch.cat(outputs, -1) if self.bidirectional else outputs[0]
        if len(finals) == 1:  # a view costs less than a copy, which short runs notice
            return x, tuple(state.unsqueeze(0) for state in finals[0])
        return x, tuple(torch.stack(state) for state in zip(*finals, strict=True))


class Recurrent(Layer):
    """A cell run over time: any number of layers, one direction or both, parameters named and drawn as torch's.

    `cell` is a `Cell`: a built-in one or a function under `@throughtime.cell`. Parameters are `weight_ih_l0`,
    `weight_hh_l0`, `bias_ih_l0`, `bias_hh_l0` (and `weight_hr_l0`, `weight_p_l0` where the cell has them), with
    `_reverse` for the backward direction, uniform in +-1/sqrt(hidden_size) and in torch's order: for one seed
    `Recurrent(GRU, ...)` and `torch.nn.GRU(...)` begin alike. `proj_size` is the width of a projected state.
    `learn_initial=True` adds `initial_<state>_l0` [width], zeros at first: where sequences begin without h_0, and where
    every reset returns. `dropout` acts on the outputs of every layer but the last, in training. `segments` bounds the
    memory of training over many steps (see the property). `target` names the engine's target to run on; None lets the
    engine pick (`throughtime.explain` tells). Under autocast it computes in its parameters' own dtype.

    Raises ThroughtimeError for sizes that make no layer.
    """

    def __init__(
        self,
        cell: Cell,
        input_size: int,
        hidden_size: int,
        *,
        num_layers: int = 1,
        bidirectional: bool = False,
        batch_first: bool = False,
        dropout: float = 0.0,
        proj_size: int = 0,
        learn_initial: bool = False,
        segments: int | Literal["auto"] | None = None,
        target: str | None = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_construction(cell, input_size, hidden_size, num_layers, dropout, proj_size)
        self._cell = cell.settled()
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.proj_size = proj_size
        self.num_layers = num_layers
        self.bidirectional = bidirectional
        self.batch_first = batch_first
        self.dropout = float(dropout)
        self.learn_initial = learn_initial
        self.segments = segments
        self.target = target
        width = cell.sizes(hidden_size, proj_size)[cell.output] * self._directions
        for depth in range(num_layers):
            columns = width if depth else input_size
            if cell.needs_equal_sizes and columns != hidden_size:
                raise ShapeError(
                    f"{cell.name} uses x unit by unit, so layer {depth} needs as many inputs as units, but it has "
                    f"{columns} inputs and {hidden_size} units; choose equal sizes, or put a Linear before the layer"
                )
            for suffix in ("", "_reverse")[: self._directions]:
                self._add_parameters(depth, suffix, columns, {"device": device, "dtype": dtype})
        if next(self.parameters(), None) is None:  # something that `.double()` and `.to(device)` move, for streams
            self.register_buffer("_kind", torch.empty(0, device=device, dtype=dtype), persistent=False)
        self.reset_parameters()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._cell.settled()

    def _add_parameters(self, depth: int, suffix: str, columns: int, kind: dict[str, Any]) -> None:
        for parameter in self.cell.parameters:
            shape = self.cell.shape(parameter, columns, self.hidden_size, self.proj_size)
            tensor = torch.nn.Parameter(torch.empty(shape, **kind))
            self.register_parameter(f"{parameter.name}_l{depth}{suffix}", tensor)
        if self.learn_initial:
            for state, size in zip(self.cell.states, self.cell.sizes(self.hidden_size, self.proj_size), strict=True):
                tensor = torch.nn.Parameter(torch.empty(size, **kind))
                self.register_parameter(f"initial_{state}_l{depth}{suffix}", tensor)

    def reset_parameters(self) -> None:
        """Draw the initial values anew: uniform in +-1/sqrt(hidden_size); learnt initial states are zero."""
        bound = 1 / math.sqrt(self.hidden_size)
        for name, tensor in self.named_parameters():
            if name.startswith("initial_"):
                torch.nn.init.zeros_(tensor)
            else:
                torch.nn.init.uniform_(tensor, -bound, bound)

    @property
    def cell(self) -> Cell:
        """The equations of a step."""
        return self._cell

    @property
    def _directions(self) -> int:
        return 2 if self.bidirectional else 1

    def _initial_of(self, depth: int, suffix: str, x: Tensor) -> tuple[Tensor, ...]:
        if not self.learn_initial:
            return super()._initial_of(depth, suffix, x)
        return tuple(value.expand(x.shape[1], -1) for value in self._learnt_of(depth, suffix))

    def _learnt_of(self, depth: int, suffix: str) -> tuple[Tensor, ...]:
        states = self.cell.states if self.learn_initial else ()
        return tuple(getattr(self, f"initial_{state}_l{depth}{suffix}") for state in states)

    def forward(
        self,
        x: Tensor | PackedSequence,
        h_0: State | None = None,
        *,
        lengths: Lengths | None = None,
        reset: Tensor | None = None,
        outside: Mapping[str, Tensor] | None = None,
        masks: Masks | None = None,
    ) -> tuple[Tensor | PackedSequence, State]:
        """Run over x and return (output, h_n).

        x is [T, B, I], [B, T, I] with `batch_first`, [T, I] for one sequence, or a PackedSequence, and the output is
        alike with D * width features, zero past each sequence's end. h_0 and h_n are [layers * D, B, width] (no B for
        one sequence), a tuple of such for a cell with several states; h_n is the state at each sequence's true end (for
        the backward direction, after its first step). Without h_0 states begin at zero, or at their learnt values.

        lengths: the steps of each sequence, integers in any container, 0 to T, in any order. The backward direction
        starts at each true end; nothing past an end is read.
        reset: [T, B], [B, T] or [T] booleans: before that step the state returns to where sequences begin without h_0.
        A run with resets is the run of each episode alone; backwards, an episode begins at its last step.
        outside: the cell's outside inputs by name: per step [T, B, 1 or H] (in the layout of x, padded where x is
        packed), per sequence [B, 1 or H]; every layer and direction sees them.
        masks: which dropout masks to use; without it, those of a seed drawn from torch's generator.

        Raises ShapeError for what does not fit.
        """
        call = Call(x, h_0, lengths, reset, outside, masks)
        if scripting.is_tracing():
            return scripting.traced(self, call)
        return self._forward(call, partial(recurrence.run, asked=self.target))

    def _forward(self, call: Call, run: Run) -> tuple[Tensor | PackedSequence, State]:
        self._check_input(call.x)
        if call.h_0 is not None:
            self._check_state(call.x, call.h_0)
        return self._compute(call, run)

    def _check_input(self, x: Tensor | PackedSequence) -> None:
        steps = x.data if isinstance(x, PackedSequence) else x
        if not isinstance(steps, Tensor):
            raise ShapeError(f"x is {type(x).__name__}; a layer takes a Tensor or a PackedSequence")
        check_numbers("x", steps)
        layout = "[B, T, I]" if self.batch_first else "[T, B, I]"
        if not isinstance(x, PackedSequence) and x.dim() not in (2, 3):
            raise ShapeError(f"x has {x.dim()} dimensions; it must be {layout}, or [T, I] for one sequence")
        if steps.shape[-1] != self.input_size:
            raise ShapeError(
                f"x has {steps.shape[-1]} features in its last dimension, and the layer was made for "
                f"input_size={self.input_size}; x is laid out {layout}"
            )
        self._check_kind("x", steps)

    def _check_state(self, x: Tensor | PackedSequence, h_0: State) -> None:
        states = self.cell.states
        given = tuple(h_0) if isinstance(h_0, tuple | list) else (h_0,)
        if len(given) != len(states):
            wanted = "one tensor" if len(states) == 1 else f"a tuple of {len(states)} tensors ({', '.join(states)})"
            found = f"{len(given)} values" if isinstance(h_0, tuple | list) else f"one {type(h_0).__name__}"
            raise ShapeError(f"h_0 is {found}; {self.cell.name} wants {wanted}")
        batch: tuple[int, ...]
        if isinstance(x, PackedSequence):
            batch = (int(x.batch_sizes[0]),)
        else:
            batch = (x.shape[0 if self.batch_first else 1],) if x.dim() == 3 else ()
        for state, size, tensor in zip(states, self.cell.sizes(self.hidden_size, self.proj_size), given, strict=True):
            wanted_shape = (self.num_layers * self._directions, *batch, size)
            check_numbers(f"the state {state} in h_0", tensor)
            if tuple(tensor.shape) != wanted_shape:
                found = f"shape {list(tensor.shape)}"
                names = "[layers * directions, B, width]" if batch else "[layers * directions, width]"
                raise ShapeError(f"the state {state} in h_0 has {found}; it must be {names} = {list(wanted_shape)}")
            self._check_kind(f"the state {state} in h_0", tensor)

    def _check_kind(self, name: str, tensor: Tensor) -> None:
        weight = next(self.parameters(), None)
        if weight is None:
            return
        if tensor.device != weight.device:
            raise ShapeError(
                f"{name} is on {tensor.device} and the layer on {weight.device}; move one of them with .to(device)"
            )
        if tensor.dtype != weight.dtype and not is_autocast(tensor.device.type):
            raise ShapeError(
                f"{name} is {tensor.dtype} and the layer's parameters are {weight.dtype}; convert one of them with "
                ".to(dtype)"
            )

    def extra_repr(self) -> str:
        """The cell, its sizes, and whatever differs from the defaults."""
        said = [self.cell.name, str(self.input_size), str(self.hidden_size)]
        defaults = {
            "num_layers": 1,
            "bidirectional": False,
            "batch_first": False,
            "dropout": 0.0,
            "proj_size": 0,
            "learn_initial": False,
            "segments": None,
            "target": None,
        }
        said += [f"{name}={getattr(self, name)!r}" for name, value in defaults.items() if getattr(self, name) != value]
        return ", ".join(said)


def explain(
    module: Layer | StepModule,
    x: Tensor | PackedSequence,
    h_0: State | None = None,
    *,
    lengths: Lengths | None = None,
    reset: Tensor | None = None,
    outside: Mapping[str, Tensor] | None = None,
) -> list[str]:
    """Which target of the engine would run each layer and direction on this input now, and why; nothing is computed.

    `module` is one of throughtime.nn's layers or single-step cells.
    """
    if isinstance(module, StepModule):
        return [module.explained(x, h_0)]
    if not isinstance(module, Layer):
        raise ThroughtimeError(
            f"explain takes one recurrent layer or cell of throughtime.nn, not {type(module).__name__}; for a whole "
            "model, call it for each"
        )
    lines: list[str] = []

    def ask(problem: Problem) -> tuple[Tensor, tuple[Tensor, ...]]:
        depth = len(lines) // (2 if module.bidirectional else 1)
        direction = "backward" if problem.reverse else "forward"
        lines.append(f"layer {depth}, {direction}: {recurrence.choose(problem, module.target)}")
        output = problem.x.new_empty(problem.steps, problem.rows, problem.sizes[problem.cell.output])
        return output, problem.states

    with torch.random.fork_rng([x.data.device] if x.is_cuda else []):  # dropout between layers would draw
        module._forward(Call(x, h_0, lengths, reset, outside), ask)
    return lines


def _check_construction(
    cell: Cell, input_size: int, hidden_size: int, num_layers: int, dropout: float, proj_size: int
) -> None:
    if not isinstance(cell, Cell):
        raise CellError(
            f"cell is {type(cell).__name__}, not a Cell; give throughtime.GRU, LSTM, Elman, or a function of equations "
            "under @throughtime.cell"
        )
    sizes = {"input_size": input_size, "hidden_size": hidden_size, "num_layers": num_layers}
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ShapeError(f"{name} is {size!r}; it must be a whole number from 1")
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout <= 1:
        raise ShapeError(f"dropout is {dropout!r}; it must be a probability between 0 and 1")
    if dropout and num_layers == 1:
        warnings.warn(
            "dropout acts on the outputs of every layer but the last, so with num_layers=1 it does nothing; leave it "
            "out, or use torch.nn.Dropout after the layer",
            stacklevel=3,
        )
    projected = any(parameter.namespace == "P" for parameter in cell.parameters)
    if projected and (isinstance(proj_size, bool) or not isinstance(proj_size, int) or proj_size < 1):
        raise ShapeError(f"{cell.name} projects its state; say to how many units with proj_size= (now {proj_size!r})")
    if not projected and proj_size:
        raise ShapeError(
            f"proj_size is {proj_size!r}, but {cell.name} has no projection; leave it out, or take a cell with "
            "P @ ..., such as throughtime.ProjectedLSTM"
        )


def _outside_in(
    cell: Cell, given: Mapping[str, Tensor], layout: Layout, x: Tensor, hidden_size: int
) -> tuple[Tensor, ...]:
    """The outside inputs in the engine's order and layout."""
    check_outside(cell, given)
    arranged = []
    for name in cell.outside:
        value, per_step = given[name], name in cell.per_step
        shape = layout.step_shape if per_step else (layout.rows,) if layout.batched else ()
        names = layout.step_names if per_step else ("B",) if layout.batched else ()
        if tuple(value.shape) not in ((*shape, 1), (*shape, hidden_size)):
            wanted = shape_text((*names, "1 or H"), (*shape, f"1 or {hidden_size}"))
            raise ShapeError(f"the outside input {name} has shape {list(value.shape)}; it must be {wanted}")
        if value.device != x.device or (value.dtype != x.dtype and not is_autocast(x.device.type)):
            raise ShapeError(
                f"the outside input {name} is {value.dtype} on {value.device}, and x is {x.dtype} on {x.device}; "
                "convert it with .to(x)"
            )
        if per_step:
            arranged.append(layout.steps_in(value))
        else:
            arranged.append(layout.rows_in(value if layout.batched else value.unsqueeze(0), 0))
    return tuple(arranged)
