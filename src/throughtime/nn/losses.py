"""The loss of every answer by itself, over sequences of any lengths: which sequence and which step each term is of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from throughtime.errors import ShapeError, ThroughtimeError
from throughtime.nn.layout import Lengths, read_lengths, within

NOTHING = -(2**63)
"""What cross_entropy is to leave out: a class that there never is."""


@dataclass(frozen=True, eq=False)
class Losses:
    """The terms of a loss, and of each the row of the batch and the step that it is of: `rows`, `steps` [terms] int64.

    Whoever wants one number takes `total` and divides by what it wants a mean over; whoever asks where the loss comes
    from, or where its gradient goes, takes the terms one by one, as `values`. `computed` is what gives both, for
    torch's "sum" costs less than its "none" and an addition.
    """

    computed: Callable[[Literal["none", "sum"]], Tensor]
    rows: Tensor
    steps: Tensor

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def values(self) -> Tensor:
        """Every term: [terms]."""
        return self.computed("none")

    def total(self) -> Tensor:
        """The sum of all terms."""
        return self.computed("sum")

    def by_row(self, rows: int) -> Tensor:
        """The sum over each row's terms: [rows]; 0 where a row has none."""
        return self.values.new_zeros(rows).index_add(0, self.rows.to(self.values.device), self.values)

    def by_step(self, steps: int, rows: int) -> Tensor:
        """Each term in its place: [steps, rows]; 0 where there is none."""
        places = self.steps.to(self.values.device), self.rows.to(self.values.device)
        return self.values.new_zeros(steps, rows).index_put(places, self.values, accumulate=True)

    def at(self, steps: Tensor) -> Tensor:
        """The terms that are of these steps, [rows], each in its own row: the last ones, say."""
        return self.values[(self.steps == steps[self.rows]).to(self.values.device)]


def class_losses(logits: Tensor, targets: Tensor, lengths: Lengths | None = None) -> Losses:
    """-ln p of the right class, in nats, for each row's answer or for each of its real steps.

    logits [B, C] with targets [B]: one answer a row, a term of its last step. logits [T, B, C] with targets [T, B]: a
    term for each step up to the row's length; with targets [B] each row is asked the same at every step. Targets are
    whole numbers from 0 to C - 1. Raises ShapeError for shapes, types and classes that do not fit.
    """
    if logits.dim() == 2:
        _check_shapes(logits, targets, logits.shape[:1], multi_label=False)
        ends = torch.as_tensor(lengths if lengths is not None else [1] * len(logits), dtype=torch.int64, device="cpu")
        return Losses(partial(_of_classes, logits, targets), torch.arange(len(logits)), ends - 1)
    if logits.dim() == 3 and targets.dim() == 1:
        targets = targets.expand(len(logits), -1)
    _check_targets(logits, targets, multi_label=False)
    real = _real(lengths, *logits.shape[:2])
    rows = max(1, logits.shape[1])
    picked = partial(_of_classes, _picked(logits, real), _picked(targets, real))
    return Losses(picked, real % rows, real // rows)


def ragged_loss(
    logits: Tensor,
    targets: Tensor,
    lengths: Lengths | None = None,
    *,
    normalise: Literal["sequences", "steps"] = "sequences",
    multi_label: bool = False,
    batch_first: bool = False,
) -> Tensor:
    """The negative log-likelihood of per-step targets, over sequences of any lengths.

    logits [T, B, C] (or [B, T, C]). targets: classes [T, B], integers, under softmax; with `multi_label`, 0 to 1 for
    each label, [T, B, C], under sigmoid, where a step's loss is the sum over its labels. What lies past an end is never
    read, and its gradient is zero.

    normalise="sequences": summed over a sequence's steps, averaged over the B sequences (those of length 0 count);
    "steps": averaged over all real steps. Raises ShapeError for shapes and types that do not fit, and where there is
    nothing to average over.
    """
    if normalise not in ("sequences", "steps"):
        raise ThroughtimeError(f'normalise is {normalise!r}; it is "sequences" or "steps"')
    _check_targets(logits, targets, multi_label)
    if batch_first:
        logits, targets = logits.transpose(0, 1), targets.transpose(0, 1)
    real = _real(lengths, *logits.shape[:2])
    number = logits.shape[1] if normalise == "sequences" else len(real)
    if number == 0:
        raise ShapeError(f"there are no {normalise} to average the loss over; leave out batches without any")
    logits, targets = _picked(logits, real), _picked(targets, real)
    if multi_label:
        total = functional.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype), reduction="sum")
    else:
        total = _of_classes(logits, targets, "sum")
    return total / number


def _real(lengths: Lengths | None, steps: int, rows: int) -> Tensor:
    """The places of all real steps among steps * rows, step by step: [real steps]."""
    if lengths is None:
        return torch.arange(steps * rows)
    counts = read_lengths(lengths, steps, rows)
    if sum(counts) == steps * rows:
        return torch.arange(steps * rows)
    ends = lengths if isinstance(lengths, Tensor) and lengths.device.type == "cpu" else counts
    return within(ends, steps, torch.device("cpu")).flatten().nonzero().squeeze(1)


def _picked(values: Tensor, real: Tensor) -> Tensor:
    """Of [T, B, ...] what stands at these places, one under another: [real steps, ...]."""
    flat = values.flatten(0, 1)
    return flat if len(real) == len(flat) else flat.index_select(0, real.to(values.device))


def _of_classes(logits: Tensor, targets: Tensor, reduction: Literal["none", "sum"]) -> Tensor:
    """-ln p of each class, [n], or their sum. Nothing is left out; torch would leave out -100 without a word."""
    try:
        return functional.cross_entropy(logits, targets.long(), reduction=reduction, ignore_index=NOTHING)
    except (IndexError, RuntimeError) as error:
        wrong = targets[(targets < 0) | (targets >= logits.shape[1])]
        if wrong.numel() == 0:
            raise
        raise ShapeError(
            f"targets hold {wrong[0].item()} at a step that counts, but the classes are 0 to {logits.shape[1] - 1}; "
            "shorten lengths= if it is padding"
        ) from error


def _check_targets(logits: Tensor, targets: Tensor, multi_label: bool) -> None:
    if logits.dim() != 3:
        raise ShapeError(
            f"logits have shape {list(logits.shape)}; they must be [T, B, C], or [B, T, C] with batch_first"
        )
    _check_shapes(logits, targets, logits.shape if multi_label else logits.shape[:2], multi_label)


def _check_shapes(logits: Tensor, targets: Tensor, wanted: torch.Size, multi_label: bool) -> None:
    if targets.shape != wanted:
        kind = "a number for each label" if multi_label else "a class for each step"
        raise ShapeError(
            f"targets have shape {list(targets.shape)}; beside these logits they are {list(wanted)}, {kind}"
        )
    if not multi_label and (targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool):
        raise ShapeError(
            f"targets are {targets.dtype}; classes are integers (use .long()); for several labels a step say "
            "multi_label=True"
        )
