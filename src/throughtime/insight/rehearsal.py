"""One run of a model on a copy of it, watched: every recurrence on the reference loop, with all that it computed."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from throughtime.engine.recurrence import Record, recording
from throughtime.errors import ThroughtimeError
from throughtime.nn import upgrade
from throughtime.nn.recurrent import Layer

MOST_NUMBERS = 2**28
"""Numbers that a recording of one layer may hold (2 GiB in float64)."""


@dataclass(frozen=True)
class Place:
    """Where a recurrence stands in a model: the module's name ("" for the model itself), its layer, its direction.

    `layers` and `directions` are the module's own; `call` counts how often the module had run before.
    """

    module: str
    depth: int = 0
    reverse: bool = False
    layers: int = 1
    directions: int = 1
    call: int = 0

    def __str__(self) -> str:
        parts = [self.module or "the layer"]
        if self.layers > 1:
            parts.append(f"layer {self.depth}")
        if self.directions > 1:
            parts.append("backward" if self.reverse else "forward")
        if self.call:
            parts.append(f"call {self.call}")
        return ", ".join(parts)


@dataclass(frozen=True, eq=False)
class Rehearsal:
    """What a copy of a model returned, its loss (None if none was asked for), and the record of each recurrence.

    `places[i]` is where `records[i]` ran, in the order in which they ran.
    """

    model: nn.Module
    output: Any
    loss: Tensor | None
    places: tuple[Place, ...]
    records: tuple[Record, ...]


class Progress:
    """Counts passes, and tells whoever wants to know: `on_progress(done, all)`."""

    def __init__(self, total: int, on_progress: Callable[[int, int], None] | None) -> None:
        self.total, self.done, self.on_progress = total, 0, on_progress

    def advance(self) -> None:
        """One pass more is done."""
        self.done += 1
        if self.on_progress is not None:
            self.on_progress(self.done, self.total)


def rehearse(
    model: nn.Module,
    batch: Any,
    loss: Callable[[Any], Tensor] | None = None,
    *,
    dtype: torch.dtype | None = torch.float64,
    gradients: bool = True,
    values: bool = False,
    prepare: Callable[[nn.Module], None] | None = None,
) -> Rehearsal:
    """Run a copy of the model on a batch, torch's recurrent layers swapped for throughtime's, and keep what it did.

    `batch` is what the model's forward takes: a tuple or list of positional arguments, a dict of keywords, or one
    object (a named tuple or a PackedSequence counts as one). The copy and the batch's floating-point tensors are in
    `dtype` (None leaves them as they are), in the training or evaluation mode that the model is in. Neither the model
    nor torch's random number generators are changed. `prepare` is called with the copy before it runs.

    Raises ThroughtimeError for a model that cannot be copied, that runs no recurrent layer, or on a batch too large.
    """
    rehearsed = _copied(model)
    upgrade(rehearsed)
    if dtype is not None:
        rehearsed, batch = rehearsed.to(dtype), converted(batch, dtype)
    for parameter in _recurrent_parameters(rehearsed):
        parameter.requires_grad_()  # what is frozen in training can be looked at all the same
    if prepare is not None:
        prepare(rehearsed)
    places: list[Place] = []
    with (
        torch.random.fork_rng(_accelerators(rehearsed)),
        torch.set_grad_enabled(gradients),
        recording(values) as records,
        _placing(rehearsed, records, places),
    ):
        output = call(rehearsed, batch)
        found = None if loss is None else loss(output)
    if not records:
        raise ThroughtimeError(
            "the model ran no recurrent layer that can be looked into; those of throughtime.nn can, and torch.nn's "
            "RNN, LSTM and GRU (but no single-step cells such as GRUCell): use one of them"
        )
    return Rehearsal(rehearsed, output, found, tuple(places), tuple(records))


def call(model: nn.Module, batch: Any) -> Any:
    """The model's output for a batch: positional arguments, keywords, or one object."""
    if type(batch) in (tuple, list):
        return model(*batch)
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(batch)


def converted(value: Any, dtype: torch.dtype) -> Any:
    """The same with every floating-point tensor in `dtype`, inside containers, dataclasses and packed sequences too."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, PackedSequence):
        return value.to(dtype) if value.data.is_floating_point() else value
    if isinstance(value, Mapping):
        return {key: converted(item, dtype) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*[converted(item, dtype) for item in value])
    if type(value) in (tuple, list):
        return type(value)(converted(item, dtype) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: converted(getattr(value, f.name), dtype) for f in dataclasses.fields(value) if f.init}
        return dataclasses.replace(value, **fields)
    return value


def gradients(loss: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The loss's gradient by each tensor, zeros where there is no way from it; the graph is kept for more."""
    wanted = [tensor for tensor in tensors if tensor.requires_grad]
    found = iter(torch.autograd.grad(loss, wanted, retain_graph=True, materialize_grads=True) if wanted else ())
    return [next(found) if tensor.requires_grad else torch.zeros_like(tensor) for tensor in tensors]


def lengths_of(record: Record) -> Tensor:
    """The steps of each row [B], int64."""
    problem = record.problem
    given = record.lengths
    return torch.full((problem.rows,), problem.steps) if given is None else torch.tensor(given, dtype=torch.int64)


def first_to_last(record: Record) -> int:
    """The lag from the first step to the last, in the row of median length."""
    return max(0, int(lengths_of(record).median()) - 1)


def in_step_order(record: Record, computed: Sequence[Any]) -> list[Any]:
    """What was computed step by step, from the layer's first step to its last."""
    return list(reversed(computed)) if record.reverse else list(computed)


def said_rows(record: Record) -> str:
    """How much was measured: "32 sequences of 80 steps", "32 sequences of 3 to 80 steps"."""
    lengths = lengths_of(record)
    rows = f"{len(lengths)} sequence{'' if len(lengths) == 1 else 's'}"
    shortest, longest = (int(lengths.min()), int(lengths.max())) if len(lengths) else (0, 0)
    return f"{rows} of {longest if shortest == longest else f'{shortest} to {longest}'} steps"


def _copied(model: nn.Module) -> nn.Module:
    original = getattr(model, "_orig_mod", model)  # what torch.compile wraps; a compiled program cannot be recorded
    try:
        return copy.deepcopy(original)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ThroughtimeError(
            f"the model cannot be copied ({type(error).__name__}: {reason}), and diagnostics never run on the model "
            "itself; take out what copy.deepcopy refuses, such as tensors computed with a gradient"
        ) from error


def _recurrent_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    for module in model.modules():
        if isinstance(module, Layer):
            yield from module.parameters()


def _accelerators(model: nn.Module) -> list[torch.device]:
    return list({tensor.device for tensor in model.parameters() if tensor.is_cuda})


@contextmanager
def _placing(model: nn.Module, records: list[Record], places: list[Place]) -> Iterator[None]:
    """Name each record by the module that was running, and refuse what would not fit before it runs."""
    began: list[int] = []
    calls: dict[str, int] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, Layer):
            handles.append(module.register_forward_pre_hook(_starts(name, began, records), with_kwargs=True))
            handles.append(module.register_forward_hook(_ends(name, began, calls, records, places)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _starts(name: str, began: list[int], records: list[Record]) -> Callable[..., None]:
    def start(module: Layer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = [*args, *kwargs.values()]
        if given:
            _check_size(name, module, given[0])
        began.append(len(records))

    return start


def _ends(
    name: str, began: list[int], calls: dict[str, int], records: list[Record], places: list[Place]
) -> Callable[..., None]:
    def end(module: Layer, *_: Any) -> None:
        directions = 2 if module.bidirectional else 1
        for number in range(len(records) - began.pop()):
            depth, reverse = divmod(number, directions)
            places.append(Place(name, depth, bool(reverse), module.num_layers, directions, calls.get(name, 0)))
        calls[name] = calls.get(name, 0) + 1

    return end


def _check_size(name: str, layer: Layer, x: Any) -> None:
    if isinstance(x, PackedSequence):
        steps, rows = len(x.batch_sizes), int(x.batch_sizes[0])
    elif isinstance(x, Tensor) and x.dim() in (2, 3):
        rows = 1 if x.dim() == 2 else x.shape[0 if layer.batch_first else 1]
        steps = x.shape[1 if layer.batch_first and x.dim() == 3 else 0]
    else:
        return  # the layer itself says best what is wrong
    width = len(layer.cell.nodes) * layer.hidden_size * layer.num_layers * (2 if layer.bidirectional else 1)
    fit = MOST_NUMBERS // max(1, steps * width)
    if rows > fit:
        advice = f"give {fit} sequences or fewer" if fit else "give shorter sequences"
        raise ThroughtimeError(
            f"recording {name or 'the layer'} over {rows} sequences of {steps} steps would keep "
            f"{rows * steps * width:.2g} numbers, and {MOST_NUMBERS:.2g} are the most; {advice}"
        )
