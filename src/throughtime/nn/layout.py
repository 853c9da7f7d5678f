"""The caller's layout and the engine's: time first or batch first, padded or packed, rows in any order of length.

The engine wants time first and rows by falling length. What stands here moves tensors there and back, and reads and
refuses `lengths=` and `reset=`.
"""

from __future__ import annotations

import operator
import reprlib
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from throughtime.engine import memory, recurrence
from throughtime.equations.cell import Cell
from throughtime.errors import ShapeError

Lengths = int | Sequence[int] | np.ndarray[Any, Any] | Tensor
"""The steps of each sequence, as callers may give them."""

NUMBERS = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})
"""The formats that layers, streams and read-outs compute in."""

State = Tensor | tuple[Tensor, ...]
"""What a layer takes and gives as its state: a tensor, or for a cell with several states a tuple in their order."""


@dataclass(frozen=True)
class Layout:
    """How the caller's sequences stand: T steps of B rows.

    `order[i]` is the caller's row that the engine sees as row i and `back` undoes it, both None where rows stay;
    `lengths` is in the engine's order, None for T each; `packed` is the input if it came packed.
    """

    steps: int
    rows: int
    batch_first: bool = False
    batched: bool = True
    lengths: tuple[int, ...] | None = None
    order: Tensor | None = None
    back: Tensor | None = None
    packed: PackedSequence | None = None

    @property
    def step_shape(self) -> tuple[int, ...]:
        """The leading dimensions of a per-step tensor of the caller: (T, B), (B, T), or (T,) without a batch."""
        if not self.batched:
            return (self.steps,)
        return (self.rows, self.steps) if self.batch_first else (self.steps, self.rows)

    @property
    def step_names(self) -> tuple[str, ...]:
        """`step_shape` in letters, for messages."""
        if not self.batched:
            return ("T",)
        return ("B", "T") if self.batch_first else ("T", "B")

    def steps_in(self, tensor: Tensor) -> Tensor:
        """A per-step tensor of the caller's as the engine's [T, B, ...]."""
        if not self.batched:
            return tensor.unsqueeze(1)
        return self.rows_in(tensor.transpose(0, 1) if self.batch_first else tensor, 1)

    def rows_in(self, tensor: Tensor, dim: int) -> Tensor:
        """The rows, along `dim`, in the engine's order."""
        return tensor if self.order is None else _permuted(tensor, dim, self.order, self.back)

    def rows_out(self, tensor: Tensor, dim: int) -> Tensor:
        """The rows, along `dim`, in the caller's order."""
        return tensor if self.back is None else _permuted(tensor, dim, self.back, self.order)

    def outputs_out(self, output: Tensor) -> Tensor | PackedSequence:
        """The engine's outputs [T, B, features] as the caller gave the input: padded, packed or without a batch."""
        if self.packed is not None:
            return _pack_like(self.packed, output if self.order is not None else self._sorted(output))
        output = self.rows_out(output, 1)
        if not self.batched:
            return output.squeeze(1)
        return output.transpose(0, 1) if self.batch_first else output

    def states_in(self, states: State) -> tuple[Tensor, ...]:
        """The caller's states as the engine's, [layers * D, B, width] each."""
        several = (states,) if isinstance(states, Tensor) else states
        return tuple(self.rows_in(state if self.batched else state.unsqueeze(1), 1) for state in several)

    def states_out(self, states: tuple[Tensor, ...]) -> State:
        """The engine's states [layers * D, B, width] as the caller's, without B where the input had none."""
        several = tuple(self.rows_out(state, 1) if self.batched else state.squeeze(1) for state in states)
        return several[0] if len(several) == 1 else several

    def _sorted(self, output: Tensor) -> Tensor:
        assert self.packed is not None
        order = self.packed.sorted_indices
        return output if order is None else output.index_select(1, order)


class _Permutation(torch.autograd.Function):
    """Rows in another order, each once: its adjoint selects too, where torch's would add row to row."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, dim: int, order: Tensor, back: Tensor) -> Tensor:
        ctx.dim = dim
        ctx.save_for_backward(back)
        return _selected(tensor, dim, order)

    @staticmethod
    def backward(ctx: Any, adjoint: Tensor) -> tuple[Tensor, None, None, None]:
        (back,) = ctx.saved_tensors
        return _selected(adjoint, ctx.dim, back), None, None, None


def _selected(tensor: Tensor, dim: int, order: Tensor) -> Tensor:
    """`tensor.index_select(dim, order)`. Rows of steps are copied as rows of a matrix, which torch does on all threads,
    and to memory that is used again: of long batches the copies were a third of the time."""
    plain = (
        torch.compiler.is_compiling()  # first, for a size that is compared is a size that is fixed
        or dim != 1
        or tensor.dim() != 3
        or tensor.device.type != "cpu"
        or tensor.dtype not in (torch.float32, torch.float64)
        or not tensor.is_contiguous()
        or len(order) != tensor.shape[1]
        or tensor.numel() == 0
        or (torch.is_grad_enabled() and tensor.requires_grad)
    )
    if plain or _is_transformed(tensor):
        return tensor.index_select(dim, order)
    steps, rows, width = tensor.shape
    index = (torch.arange(0, steps * rows, rows).unsqueeze(1) + order).flatten()
    copied = memory.result(tensor.shape, tensor.dtype)
    torch.index_select(tensor.view(-1, width), 0, index, out=copied.view(-1, width))
    return copied


def _is_transformed(tensor: Tensor) -> bool:
    """Whether a transform of torch's is at work, which must see every operation."""
    functorch = torch._C._functorch
    inside = functorch.maybe_current_level() is not None or forward_ad._current_level >= 0
    return inside or functorch.is_batchedtensor(tensor) or functorch.is_legacy_batchedtensor(tensor)


def _permuted(tensor: Tensor, dim: int, order: Tensor, back: Tensor | None) -> Tensor:
    """The rows, along `dim`, in an order that `back` undoes."""
    own = back is not None and tensor.requires_grad and not torch.compiler.is_compiling()
    if not own or _is_transformed(tensor):
        return _selected(tensor, dim, order)
    permuted: Tensor = _Permutation.apply(tensor, dim, order, back)
    return permuted


def arrange(x: Tensor | PackedSequence, lengths: Lengths | None, batch_first: bool) -> tuple[Layout, Tensor]:
    """The layout of an input [T, B, I], [B, T, I] (batch first), [T, I] or packed, and the engine's [T, B, I]."""
    if isinstance(x, PackedSequence):
        if lengths is not None:
            raise ShapeError(
                "lengths= came together with a PackedSequence, which carries its own; leave lengths= out, or give the "
                "padded tensor"
            )
        return _arrange_packed(x, batch_first)
    batched = x.dim() == 3
    first = batch_first and batched
    steps = x.shape[1] if first else x.shape[0]
    rows = 1 if not batched else x.shape[0] if first else x.shape[1]
    if lengths is not None and torch.compiler.is_compiling():
        layout = _by_falling_length_in_graph(Layout(steps, rows, batch_first, batched), lengths, x.device)
        return layout, layout.steps_in(x)
    counts = None if lengths is None else read_lengths(lengths, steps, rows)
    if counts is None or all(count == steps for count in counts):
        layout = Layout(steps, rows, batch_first, batched)
    else:
        layout = _by_falling_length(Layout(steps, rows, batch_first, batched, counts), x.device)
    return layout, layout.steps_in(x)


def _by_falling_length(layout: Layout, device: torch.device) -> Layout:
    """The same layout with rows sorted, if they need it; a recording keeps the caller's, for the reference can."""
    counts = layout.lengths or ()
    order = sorted(range(layout.rows), key=lambda row: -counts[row])
    if order == list(range(layout.rows)) or recurrence.is_recording():
        return layout
    taken = torch.tensor(order, device=device)
    return Layout(
        layout.steps,
        layout.rows,
        layout.batch_first,
        layout.batched,
        tuple(counts[row] for row in order),
        taken,
        taken.argsort(),
    )


def _by_falling_length_in_graph(layout: Layout, lengths: Any, device: torch.device) -> Layout:
    """Rows sorted by tensor operations, for a program that takes new lengths at each run; the operator checks them."""
    counts = torch.as_tensor(lengths, device=device)
    if counts.dtype.is_floating_point or counts.dtype == torch.bool or counts.shape != (layout.rows,):
        raise ShapeError(
            f"lengths= is {counts.dtype} of shape {list(counts.shape)}; a compiled program takes one integer for each "
            f"of the {_counted(layout.rows, 'sequence', 'sequences')}"
        )
    ordered, order = counts.sort(descending=True)  # a stable sort has no ONNX translation
    kept = replace(layout, order=order, back=order.argsort())
    return replace(kept, lengths=ordered)  # type: ignore[arg-type]


def _arrange_packed(packed: PackedSequence, batch_first: bool) -> tuple[Layout, Tensor]:
    """Packed rows are sorted already; only a recording wants them in the caller's order."""
    as_caller = recurrence.is_recording()
    shown = packed if as_caller else PackedSequence(packed.data, packed.batch_sizes)
    x, counts = pad_packed_sequence(shown)
    steps, rows = x.shape[:2]
    lengths = tuple(counts.tolist())
    layout = Layout(
        steps,
        rows,
        batch_first,
        lengths=None if min(lengths) == steps else lengths,
        order=None if as_caller else packed.sorted_indices,
        back=None if as_caller else packed.unsorted_indices,
        packed=packed,
    )
    return layout, x


def _pack_like(packed: PackedSequence, output: Tensor) -> PackedSequence:
    """Outputs [T, B, features] in the packed order, packed as the input was."""
    sizes = packed.batch_sizes
    counts = (sizes[None, :] > torch.arange(output.shape[1])[:, None]).sum(1)
    data = pack_padded_sequence(output, counts).data
    return PackedSequence(data, sizes, packed.sorted_indices, packed.unsorted_indices)


def check_dense(name: str, value: Any) -> None:
    """Raise ShapeError for what is no tensor, or a sparse, nested or mkldnn one, before anyone asks its shape."""
    if not isinstance(value, Tensor):
        raise ShapeError(f"{name} is {type(value).__name__}, and must be a Tensor (use torch.as_tensor)")
    if value.is_nested:
        raise ShapeError(
            f"{name} is a nested tensor; give the padded one, .to_padded_tensor(0.0), and the steps of each sequence "
            "as lengths="
        )
    if value.layout is not torch.strided:
        raise ShapeError(f"{name} is a tensor laid out as {value.layout}; give a dense one, with .to_dense()")


def check_numbers(name: str, value: Any) -> None:
    """Raise ShapeError for what is no dense tensor of floating-point numbers."""
    check_dense(name, value)
    if value.dtype not in NUMBERS:
        raise ShapeError(
            f"{name} is {value.dtype}; it must hold floating-point numbers, as of float32 or float64 (use .float() for "
            "integers and booleans; complex numbers are given as two features)"
        )


def listed(lengths: Lengths) -> list[Any]:
    """The entries of `lengths=`, whatever they are. Raises ShapeError for what holds none, or holds them unordered."""
    if isinstance(lengths, Tensor):
        check_dense("lengths=", lengths)
    kind = getattr(getattr(lengths, "dtype", None), "kind", "")
    if kind in ("m", "M"):  # times turn into plain integers, in whichever unit they are
        raise ShapeError(f"lengths= is an array of {lengths.dtype}; give one integer for each sequence")  # type: ignore[union-attr]
    try:
        values: Any = lengths.tolist() if hasattr(lengths, "tolist") else lengths
    except (RuntimeError, NotImplementedError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ShapeError(f"lengths= cannot be read ({reason}); give one integer for each sequence") from error
    if isinstance(values, int | float):
        return [values]
    if not isinstance(values, Iterable) or isinstance(values, str | bytes | bytearray | Mapping | Set):
        raise ShapeError(f"lengths= is {type(values).__name__}; give one integer for each sequence, in their order")
    return list(values)


def read_lengths(lengths: Lengths, steps: int, rows: int) -> tuple[int, ...]:
    """The steps of each row as plain numbers, from a list, an array or a tensor of any integer type on any device.

    Raises ShapeError, naming the row, for a wrong count, a number outside 0..T, or what is not an integer.
    """
    numbers = listed(lengths)
    if len(numbers) != rows:
        raise ShapeError(
            f"lengths= has {_counted(len(numbers), 'entry', 'entries')} and the batch "
            f"{_counted(rows, 'sequence', 'sequences')}; give one length for each, in the batch's order"
        )
    return tuple(_length(number, row, steps) for row, number in enumerate(numbers))


def _length(number: Any, row: int, steps: int) -> int:
    try:
        count = None if isinstance(number, bool) else operator.index(number)
    except TypeError:
        count = None
    if count is None:
        raise ShapeError(
            f"lengths[{row}] is {_shown(number)}; a length is an integer number of steps (use .long() or int())"
        )
    if not 0 <= count <= steps:
        raise ShapeError(
            f"lengths[{row}] is {_shown(count)}, but the input has {steps} steps; lengths lie between 0 and {steps}"
        )
    return count


def _shown(value: Any) -> str:
    """A value in one short line."""
    if isinstance(value, int) and value.bit_length() > 128:  # Python itself refuses to print thousands of digits
        return f"an integer of {value.bit_length()} bits"
    return " ".join(reprlib.repr(value).split())


def _counted(count: int, one: str, many: str) -> str:
    return f"{count} {one if count == 1 else many}"


def within(lengths: Sequence[int] | Tensor, steps: int, device: torch.device) -> Tensor:
    """[T, B] booleans: which steps belong to their sequence."""
    ends = torch.as_tensor(lengths, dtype=torch.int64, device=device)
    return torch.arange(steps, device=device)[:, None] < ends


def shape_text(names: Sequence[str], sizes: Sequence[object]) -> str:
    """A wanted shape in letters and numbers, such as `[T, B] = [7, 3]`."""
    return f"[{', '.join(names)}] = [{', '.join(map(str, sizes))}]"


def read_mask(reset: Any, device: torch.device, each: str) -> Tensor:
    """The caller's `reset=` as a dense tensor of booleans, one for each step or row. Raises ShapeError if none."""
    try:
        mask = torch.as_tensor(reset, device=device)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        reason = str(error).splitlines()[0]
        raise ShapeError(f"reset= cannot be read ({reason}); it says true or false for each {each}") from error
    check_dense("reset=", mask)
    if mask.dtype != torch.bool:
        raise ShapeError(f"reset= holds {mask.dtype}; it says true or false for each {each} (use reset.bool())")
    return mask


def check_outside(cell: Cell, given: Any) -> None:
    """Raise ShapeError if `outside=` does not give each outside input of the cell, by its name, as a tensor."""
    if not isinstance(given, Mapping):
        raise ShapeError(f"outside= is {type(given).__name__}; give the outside inputs by name, in a dict of tensors")
    if set(given) != set(cell.outside):
        needed, found = ", ".join(cell.outside) or "none", ", ".join(sorted(map(str, given))) or "nothing"
        raise ShapeError(f"the outside inputs of {cell.name}: {needed}; outside= holds {found}, give each by its name")
    for name in cell.outside:
        check_numbers(f"the outside input {name}", given[name])


def read_reset(reset: Tensor, layout: Layout, device: torch.device) -> Tensor:
    """The caller's mask as the engine's [T, B]. Raises ShapeError for another shape, or for what is not boolean."""
    mask = read_mask(reset, device, "step")
    if tuple(mask.shape) != layout.step_shape:
        raise ShapeError(
            f"reset= has shape {list(mask.shape)}; beside this input it must be "
            f"{shape_text(layout.step_names, layout.step_shape)}, one truth value for each step"
        )
    return layout.steps_in(mask)


def reset_backwards(reset: Tensor, lengths: Sequence[int] | None) -> Tensor:
    """The mask [T, B] as a run from the last step to the first needs it: an episode begins there at its last step.

    That is the step before the next episode's first. A sequence's own last step is no reset: its given state enters.
    """
    shifted = torch.cat([reset[1:], torch.zeros_like(reset[:1])])
    if lengths is None:
        return shifted
    last = torch.as_tensor(lengths, device=reset.device).sub(1).clamp(min=0)
    return shifted & within(last, reset.shape[0], reset.device)
