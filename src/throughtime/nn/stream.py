"""Streams: a layer that is given one step at a time and keeps its state in between."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from throughtime.engine import recurrence
from throughtime.engine.border import Unaddressable, written_down
from throughtime.engine.precision import no_autocast
from throughtime.engine.problem import Problem
from throughtime.engine.targets.target import Stepper
from throughtime.equations.cell import Cell
from throughtime.errors import ShapeError, ThroughtimeError
from throughtime.nn.layout import State, check_numbers, check_outside, read_mask, shape_text

if TYPE_CHECKING:
    from throughtime.nn.recurrent import Layer


class Stream:
    """A unidirectional layer, one step at a time; `layer.stream(batch_size)` makes one.

    `step(x_t)` takes [B, I] (or [I], for a stream made without `batch_size`) and returns the output [B, width] (or
    [width]) at a cost that does not depend on how many steps went before. Outputs and states are the same bits as
    those of the layer run over the whole sequence (cpu target), or the same numbers to rounding (other targets).

    The weights are a snapshot: they are copied and packed when the stream is made, and what is written to the layer's
    parameters afterwards is not seen until `refresh()`. A stream is for inference: it computes no gradients, applies no
    dropout, and serves one caller at a time. Its state is plain tensors (`state`, `state_dict`).

    A stream of a bfloat16 or float16 layer carries its states in float32 (cpu target). `state_dict` holds them so,
    and what loads it goes on with the same bits; `state` is rounded to the layer's dtype, as h_n is.
    """

    def __init__(self, layer: Layer, batch_size: int | None = None, *, h_0: State | None = None) -> None:
        if isinstance(batch_size, bool) or not (batch_size is None or (isinstance(batch_size, int) and batch_size > 0)):
            raise ShapeError(
                f"batch_size is {batch_size!r}; it must be a whole number from 1, or None for one sequence without a "
                "batch dimension"
            )
        self.layer = layer
        self.batch_size = batch_size
        snapshot = _Snapshot.of(layer)
        self._take(snapshot, snapshot.steps(self._rows, batch_size is not None))
        self._steps.write([value.expand(-1, self._rows, -1) for value in snapshot.start])
        if h_0 is not None:
            self.state = h_0

    def _take(self, snapshot: _Snapshot, steps: Stepper) -> None:
        """Run on these weights from now on."""
        self._snapshot, self._steps = snapshot, steps
        rows = () if self.batch_size is None else (self.batch_size,)
        self._shape = torch.Size((*rows, snapshot.inputs[0]))
        self._dtype = snapshot.dtype
        self._is_plain = not snapshot.cell.outside and not isinstance(steps, _ByRun)
        self._is_batched = self.batch_size is not None

    @property
    def _rows(self) -> int:
        return self.batch_size or 1

    def _beside(self, batch_size: int | None, states: Sequence[Tensor]) -> Stream:
        """Another stream on the same snapshot, with states [layers, B, width]."""
        other = object.__new__(Stream)
        other.layer, other.batch_size = self.layer, batch_size
        other._take(self._snapshot, self._steps.beside(self._snapshot.layers(other._rows), batch_size is not None))
        other._steps.write(states)
        return other

    # steps

    def step(
        self, x_t: Tensor, *, reset: Tensor | bool | None = None, outside: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Take one step and return the output [B, width], or [width] without a batch.

        x_t: [B, I], or [I]. reset: booleans [B] (one truth value without a batch); before the step these rows return to
        the layer's initial state, zero or learnt, whatever state was given. outside: the cell's outside inputs of this
        step by name, [B, 1 or H] each (no B without a batch).

        Raises ShapeError for what does not fit, and ThroughtimeError where a gradient would be wanted; the state is
        then as it was.
        """
        try:
            plain = (
                reset is None
                and outside is None
                and self._is_plain
                and x_t.__class__ is Tensor
                and x_t.shape == self._shape
                and x_t.dtype is self._dtype
                and x_t.is_cpu
                and not x_t.requires_grad
                and x_t.is_contiguous()
            )
        except (RuntimeError, NotImplementedError):  # nested and sparse tensors have no shape or no strides to tell
            plain = False
        if plain:
            try:
                return self._steps.step(x_t)
            except Unaddressable:
                pass  # lazy, perhaps: below it is written down
        self._check("x_t", x_t, ("B", "I"), self._shape)
        around = self._read_outside({} if outside is None else outside)
        mask = None if reset is None else self._read_reset(reset)
        steps = x_t.detach().contiguous().view(self._rows, -1)
        try:
            steps, around = written_down(steps), tuple(written_down(value) for value in around)
            return self._steps.step_with(steps, around, None if mask is None else written_down(mask))
        except (Unaddressable, RuntimeError) as error:
            raise ThroughtimeError(
                f"x_t, or what comes beside it, has no memory of its own ({str(error).splitlines()[0]}); is a "
                "torch.func transform or a mode at work? Step a stream outside it, on plain tensors"
            ) from error

    def _check(
        self,
        name: str,
        tensor: Any,
        letters: tuple[str, ...],
        shape: Sequence[object],
        also: torch.dtype | None = None,
    ) -> None:
        """Refuse what cannot be read as a tensor of this shape; a size may be a text such as `1 or 4`.

        Its dtype is the layer's, or `also`.
        """
        check_numbers(name, tensor)
        fits = len(tensor.shape) == len(shape) and all(
            str(size) in str(wanted).split(" or ") for size, wanted in zip(tensor.shape, shape, strict=True)
        )
        if not fits:
            letters = letters if self._is_batched else tuple(letter for letter in letters if letter != "B")
            raise ShapeError(
                f"{name} has shape {list(tensor.shape)}; this stream takes {shape_text(letters, shape)} at each step"
            )
        carried = also is not None and tensor.dtype == also
        if (tensor.dtype != self._dtype and not carried) or tensor.device != self._snapshot.device:
            raise ShapeError(
                f"{name} is {tensor.dtype} on {tensor.device}, and the stream's layer {self._dtype} on "
                f"{self._snapshot.device}; convert it with .to(...), or the layer before it is streamed"
            )
        if tensor.requires_grad and torch.is_grad_enabled():
            raise ThroughtimeError(
                f"{name} requires a gradient, and a stream computes none; step under torch.no_grad(), or train with "
                "the layer itself: layer(x, h_0)"
            )

    def _read_outside(self, given: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """The outside inputs of a step in the cell's order, [B, 1 or H] each."""
        cell, size = self._snapshot.cell, self._snapshot.hidden_size
        check_outside(cell, given)
        rows = (self._rows,) if self._is_batched else ()
        for name in cell.outside:
            self._check(f"the outside input {name}", given[name], ("B", "1 or H"), (*rows, f"1 or {size}"))
        return tuple(given[name].detach().view(self._rows, -1) for name in cell.outside)

    def _read_reset(self, reset: Any) -> Tensor:
        """Which rows return to their initial states, [B]."""
        mask = read_mask(reset, self._snapshot.device, "row")
        shape = (self._rows,) if self._is_batched else ()
        if tuple(mask.shape) != shape:
            wanted = shape_text(("B",), shape) if shape else "one truth value"
            raise ShapeError(f"reset= has shape {list(mask.shape)}; this stream takes {wanted} at each step")
        return mask.reshape(self._rows).contiguous()

    # the state

    @property
    def state(self) -> State:
        """The state after the last step, as the layer's h_0 and h_n: [layers, B, width] (no B without a batch).

        A tuple of such for a cell with several states. Reading gives copies; what is assigned is copied. Rows can be
        put in another order, or doubled, by assigning `state[:, rows]`.
        """
        shown = tuple(state.to(self._dtype) for state in self._carried())
        return shown if len(shown) > 1 else shown[0]

    @state.setter
    def state(self, value: State) -> None:
        self._steps.write(self._read_state(value))

    def _carried(self) -> tuple[Tensor, ...]:
        """Copies of the states as they are carried, [layers, B, width] each (no B without a batch)."""
        states = self._steps.read()
        return states if self._is_batched else tuple(state.squeeze(1) for state in states)

    def _read_state(self, value: State) -> list[Tensor]:
        """The caller's state as [layers, B, width] for each state. Raises ShapeError for what does not fit."""
        cell, depth = self._snapshot.cell, len(self._snapshot.parameters)
        given = tuple(value) if isinstance(value, tuple | list) else (value,)
        if len(given) != len(cell.states):
            wanted = "one tensor" if len(cell.states) == 1 else f"{len(cell.states)} tensors ({', '.join(cell.states)})"
            raise ShapeError(f"the state is {len(given)} value(s); {cell.name} wants {wanted}")
        rows = (self._rows,) if self._is_batched else ()
        letters = ("layers", "B", "width")
        carried = self._steps.read()[0].dtype
        with torch.no_grad():
            for name, size, tensor in zip(cell.states, self._snapshot.sizes, given, strict=True):
                self._check(f"the state {name}", tensor, letters, (depth, *rows, size), also=carried)
        return [tensor.detach().reshape(depth, self._rows, -1) for tensor in given]

    def state_dict(self) -> dict[str, Tensor]:
        """The state by name, [layers, B, width] each (no B without a batch): plain tensors, copied.

        In the precision in which the states are carried: float32 for a bfloat16 or float16 layer on the CPU target.
        """
        return dict(zip(self._snapshot.cell.states, self._carried(), strict=True))

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` gave. Raises ShapeError for what does not fit, and changes nothing then."""
        names = self._snapshot.cell.states
        if set(state) != set(names):
            raise ShapeError(
                f"the saved state holds {', '.join(sorted(state)) or 'nothing'}, and {self._snapshot.cell.name} has "
                f"{', '.join(names)}; load what this cell's stream saved"
            )
        self.state = tuple(state[name] for name in names)

    # several streams

    def copy(self) -> Stream:
        """Another stream in the same state, on the same packed weights."""
        return self._beside(self.batch_size, self._steps.read())

    __copy__ = copy

    def __deepcopy__(self, memo: dict[int, Any]) -> Stream:
        return self.copy()

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise ThroughtimeError(
            "a stream holds addresses of this process and cannot be pickled; save stream.state_dict() and the layer, "
            "and load them into layer.stream(...)"
        )

    @classmethod
    def stack(cls, streams: Sequence[Stream]) -> Stream:
        """The streams as the rows of one, in their order; each stays as it is. They must have the same weights.

        Raises ThroughtimeError for none, or for streams on other weights.
        """
        if not streams:
            raise ThroughtimeError("there are no streams to stack; give at least one")
        first = streams[0]
        for number, other in enumerate(streams):
            if not first._snapshot.equals(other._snapshot):
                raise ThroughtimeError(
                    f"stream {number} has other weights than stream 0; stack streams of one layer, made by copy() or "
                    "refreshed after the last change of its weights"
                )
        states = [torch.cat(parts, 1) for parts in zip(*(s._steps.read() for s in streams), strict=True)]
        return first._beside(sum(stream._rows for stream in streams), states)

    def rows(self, indices: int | Sequence[int] | Tensor) -> Stream:
        """A stream of some rows, in this order and as often as they are named; for one number, without a batch.

        Raises ShapeError for rows that are not there.
        """
        alone = isinstance(indices, int)
        taken = torch.as_tensor([indices] if alone else indices)
        if taken.dtype.is_floating_point or taken.dtype == torch.bool or taken.dim() != 1 or not len(taken):
            raise ShapeError(f"rows are named by whole numbers, one after the other, and at least one; got {indices!r}")
        if not bool(((taken >= 0) & (taken < self._rows)).all()):
            raise ShapeError(f"rows {taken.tolist()} are not all there; this stream has rows 0 to {self._rows - 1}")
        places = taken.to(self._snapshot.device, torch.int64)
        states = [state.index_select(1, places) for state in self._steps.read()]
        return self._beside(None if alone else len(taken), states)

    # weights

    def refresh(self) -> None:
        """Take the layer's weights, and its learnt initial states, as they are now; the state stays.

        Raises ThroughtimeError if the layer has become another one in sizes, dtype or device.
        """
        snapshot = _Snapshot.of(self.layer)
        if not self._snapshot.has_kind_of(snapshot):
            raise ThroughtimeError(
                "the layer has changed its sizes, dtype or device since the stream was made; make a new one with "
                "layer.stream(...)"
            )
        steps = snapshot.steps(self._rows, self._is_batched)
        steps.write(self._steps.read())
        self._take(snapshot, steps)

    def __repr__(self) -> str:
        rows = "no batch" if self.batch_size is None else f"batch_size={self.batch_size}"
        return f"Stream({self.layer!r}, {rows})"


# ---------------------------------------------------------------------------------------------------------------------
# The weights at one time


@dataclass(frozen=True, eq=False)
class _Snapshot:
    """A layer's weights and initial states as they were: copies, a tuple for each depth."""

    cell: Cell
    hidden_size: int
    sizes: tuple[int, ...]
    inputs: tuple[int, ...]
    parameters: tuple[tuple[Tensor, ...], ...]
    initial: tuple[tuple[Tensor, ...], ...]
    dtype: torch.dtype
    device: torch.device
    target: str | None

    @classmethod
    def of(cls, layer: Layer) -> _Snapshot:
        """The layer's now. Raises ThroughtimeError for a layer that cannot be streamed."""
        if layer.bidirectional:
            raise ThroughtimeError(
                "a bidirectional layer has to read a sequence to its end before it gives its first output, so it has "
                "no step to stream; make the layer with bidirectional=False"
            )
        if layer.training and layer.dropout > 0 and layer.num_layers > 1:
            raise ThroughtimeError(
                f"the layer is in training, with dropout={layer.dropout}, and a stream applies none; call layer.eval() "
                "before layer.stream()"
            )
        kind = next(chain(layer.parameters(), layer.buffers()), torch.empty(0))
        sizes = layer.cell.sizes(layer.hidden_size, layer.proj_size)
        inputs = (layer.input_size, *[sizes[layer.cell.output]] * (layer.num_layers - 1))
        with torch.inference_mode(False), torch.no_grad():
            like = [kind.new_zeros(1, 1, count) for count in inputs]
            depths = range(layer.num_layers)
            return cls(
                layer.cell,
                layer.hidden_size,
                sizes,
                inputs,
                tuple(tuple(p.detach().clone() for p in layer._parameters_of(depth, "")) for depth in depths),
                tuple(tuple(v.detach().clone() for v in layer._initial_of(d, "", x)) for d, x in enumerate(like)),
                kind.dtype,
                kind.device,
                layer.target,
            )

    @property
    def start(self) -> list[Tensor]:
        """Where each state begins without h_0: [layers, 1, width] each."""
        return [torch.stack(values) for values in zip(*self.initial, strict=True)]

    def layers(self, rows: int) -> list[Problem]:
        """A problem of one step of so many rows for each layer; x and outside inputs stand for their shapes alone."""
        nothing = torch.zeros((), dtype=self.dtype, device=self.device)
        outside = [nothing.expand(1, rows, 1)] * len(self.cell.per_step)
        outside += [nothing.expand(rows, 1)] * len(self.cell.per_sequence)
        return [
            Problem(
                cell=self.cell,
                x=nothing.expand(1, rows, count),
                states=tuple(nothing.expand(rows, size) for size in self.sizes),
                parameters=parameters,
                outside=tuple(outside),
                initial=tuple(value.expand(rows, -1) for value in initial),
            )
            for count, parameters, initial in zip(self.inputs, self.parameters, self.initial, strict=True)
        ]

    def steps(self, rows: int, batched: bool) -> Stepper:
        """What takes steps of so many rows with these weights, on the target that the engine picks."""
        layers = self.layers(rows)
        return recurrence.stepper(layers, batched, self.target) or _ByRun(layers, batched, self.target)

    def has_kind_of(self, other: _Snapshot) -> bool:
        """Whether steps, states and inputs of one fit the other."""
        own, theirs = (
            (s.cell.hash, s.sizes, s.inputs, s.dtype, s.device, [[p.shape for p in ps] for ps in s.parameters])
            for s in (self, other)
        )
        return own == theirs

    def equals(self, other: _Snapshot) -> bool:
        """Whether both are the same weights on the same target."""
        if self is other:
            return True
        if not self.has_kind_of(other) or self.target != other.target:
            return False
        own, theirs = ([t for ts in (*s.parameters, *s.initial) for t in ts] for s in (self, other))
        return all(torch.equal(a, b) for a, b in zip(own, theirs, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# What takes the steps


class _ByRun:
    """Steps on a target that prepares nothing ahead: each is a run over a sequence of one step."""

    def __init__(self, layers: Sequence[Problem], batched: bool, target: str | None) -> None:
        self.layers, self.batched, self.target = layers, batched, target
        self.states = [layer.states for layer in layers]

    def beside(self, layers: Sequence[Problem], batched: bool) -> _ByRun:
        return _ByRun(layers, batched, self.target)

    def step(self, x: Tensor) -> Tensor:
        return self.step_with(x, (), None)

    def step_with(self, x: Tensor, outside: Sequence[Tensor], reset: Tensor | None) -> Tensor:
        per_step = len(self.layers[0].cell.per_step)
        around = tuple(value.unsqueeze(0) if i < per_step else value for i, value in enumerate(outside))
        states = []
        with torch.no_grad(), no_autocast(x.device.type):
            for layer, before in zip(self.layers, self.states, strict=True):
                problem = replace(
                    layer,
                    x=x.unsqueeze(0),
                    states=before,
                    outside=around,
                    initial=() if reset is None else layer.initial,
                    reset=None if reset is None else reset.unsqueeze(0),
                )
                output, after = recurrence.run(problem, self.target)
                x = output[0]
                states.append(after)
        self.states = states
        return (x if self.batched else x[0]).clone()  # on some targets the output and the state are one tensor

    def read(self) -> tuple[Tensor, ...]:
        return tuple(torch.stack(states) for states in zip(*self.states, strict=True))

    def write(self, states: Sequence[Tensor]) -> None:
        self.states = [tuple(state[depth].clone() for state in states) for depth in range(len(self.layers))]
