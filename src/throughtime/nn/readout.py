"""From states to answers: read-outs per step and at the last step, and the loss over ragged sequences."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from throughtime.errors import ShapeError, ThroughtimeError
from throughtime.nn.layout import Lengths, read_lengths, within


class PerStep(torch.nn.Module):
    """y_t = g(x_t, h_t): an affine map of the state at every step and, with `input_size`, of the input beside it.

    It gives logits: softmax (one class) or sigmoid (several at once) belongs to the loss, see `ragged_loss`.
    `in_features` is the layer's output width, both directions together.
    """

    def __init__(self, in_features: int, out_features: int, *, input_size: int = 0, batch_first: bool = False) -> None:
        super().__init__()
        self.input_size = input_size
        self.batch_first = batch_first
        self.linear = torch.nn.Linear(in_features + input_size, out_features)

    def forward(self, outputs: Tensor, x: Tensor | None = None, *, lengths: Lengths | None = None) -> Tensor:
        """Outputs [T, B, F] (and x [T, B, I]) to logits [T, B, out]; batch first, or without B, if they are.

        Give `lengths` where x may hold anything past a sequence's end: there the logits become the bias alone.
        Raises ShapeError for an x that is missing, unwanted or of another size.
        """
        features = _features(outputs, x, self.input_size)
        if lengths is not None:
            _check_batched(outputs)
            steps = _time_first(features, self.batch_first)
            inside = within(read_lengths(lengths, *steps.shape[:2]), steps.shape[0], steps.device)
            features = torch.where(_time_first(inside, self.batch_first)[..., None], features, 0.0)
        logits: Tensor = self.linear(features)
        return logits


class LastStep(torch.nn.Module):
    """y = g(h_T): one answer for a whole sequence, from what the layer knows once it has read it all.

    With `bidirectional`, the first half of the features is read at the sequence's true last step and the second half at
    step 0, where the backward direction has read everything; with `input_size`, x is read at the true last step.
    A sequence of length 0 has features of zero: its answer is the bias alone. `in_features` is the layer's output
    width, both directions together. It gives logits, for torch's cross_entropy and the like.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        input_size: int = 0,
        bidirectional: bool = False,
        batch_first: bool = False,
    ) -> None:
        super().__init__()
        if bidirectional and in_features % 2:
            raise ShapeError(
                f"in_features is {in_features}, which two directions cannot share; give the width of the layer's output"
            )
        self.input_size = input_size
        self.bidirectional = bidirectional
        self.batch_first = batch_first
        self.linear = torch.nn.Linear(in_features + input_size, out_features)

    def forward(self, outputs: Tensor, lengths: Lengths | None = None, x: Tensor | None = None) -> Tensor:
        """Outputs [T, B, F] (and x [T, B, I]; or batch first) to logits [B, out].

        Raises ShapeError for lengths that do not fit, and for an x that is missing, unwanted or of another size.
        """
        features = _features(outputs, x, self.input_size)
        _check_batched(outputs)
        steps = _time_first(features, self.batch_first)
        count, rows = steps.shape[:2]
        if count == 0:
            return self._answer(steps.new_zeros(rows, steps.shape[2]))
        if lengths is None:
            return self._answer(self._read(steps, steps[-1]))
        if torch.compiler.is_compiling():  # a program takes new lengths at each run; the layer's operator checks them
            ends = torch.as_tensor(lengths, dtype=torch.int64, device=steps.device)
        else:
            ends = torch.tensor(read_lengths(lengths, count, rows), dtype=torch.int64, device=steps.device)
        last = steps[ends - 1, torch.arange(rows, device=steps.device)]  # of length 0: any step, left out below
        return self._answer(torch.where(ends[:, None] > 0, self._read(steps, last), 0.0))

    def _read(self, steps: Tensor, last: Tensor) -> Tensor:
        """The features at the last step, those of the backward direction at step 0."""
        if not self.bidirectional:
            return last
        width = steps.shape[2] - self.input_size
        return torch.cat([last[:, : width // 2], steps[0, :, width // 2 : width], last[:, width:]], -1)

    def _answer(self, features: Tensor) -> Tensor:
        logits: Tensor = self.linear(features)
        return logits


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
    logits, targets = _time_first(logits, batch_first), _time_first(targets, batch_first)
    steps, rows = logits.shape[:2]
    logits, targets = logits.flatten(0, 1), targets.flatten(0, 1)
    counts = (steps,) * rows if lengths is None else read_lengths(lengths, steps, rows)
    if sum(counts) < steps * rows:
        real = within(counts, steps, logits.device).flatten().nonzero().squeeze(1)
        logits, targets = logits.index_select(0, real), targets.index_select(0, real)
    number = rows if normalise == "sequences" else sum(counts)
    if number == 0:
        raise ShapeError(f"there are no {normalise} to average the loss over; leave out batches without any")
    if multi_label:
        total = functional.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype), reduction="sum")
    else:
        total = -_chosen(functional.log_softmax(logits, -1), targets).sum()
    return total / number


def _chosen(log_p: Tensor, targets: Tensor) -> Tensor:
    """log p of each step's class. Not torch's cross_entropy, which leaves out classes of -100 without a word."""
    try:
        return log_p.gather(1, targets.long()[:, None])
    except (IndexError, RuntimeError) as error:
        wrong = targets[(targets < 0) | (targets >= log_p.shape[1])]
        if wrong.numel() == 0:
            raise
        raise ShapeError(
            f"targets hold {wrong[0].item()} at a step that counts, but the classes are 0 to {log_p.shape[1] - 1}; "
            "shorten lengths= if it is padding"
        ) from error


def _check_targets(logits: Tensor, targets: Tensor, multi_label: bool) -> None:
    if logits.dim() != 3:
        raise ShapeError(
            f"logits have shape {list(logits.shape)}; they must be [T, B, C], or [B, T, C] with batch_first"
        )
    wanted = logits.shape if multi_label else logits.shape[:2]
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


def _features(outputs: Tensor, x: Tensor | None, input_size: int) -> Tensor:
    """The states' features, with the input beside them if the read-out sees it."""
    if not isinstance(outputs, Tensor):
        raise ShapeError(
            f"outputs are {type(outputs).__name__}; a read-out takes the padded tensor (pad_packed_sequence gives it)"
        )
    if (x is None) != (input_size == 0):
        raise ShapeError(
            "this read-out was made without input_size=, so it takes no x"
            if x is not None
            else f"this read-out sees the input (input_size={input_size}); give it x as well"
        )
    if x is None:
        return outputs
    if x.shape != (*outputs.shape[:-1], input_size):
        raise ShapeError(
            f"x has shape {list(x.shape)}; beside outputs of {list(outputs.shape)} it must be "
            f"{[*outputs.shape[:-1], input_size]}"
        )
    return torch.cat([outputs, x], -1)


def _check_batched(outputs: Tensor) -> None:
    if outputs.dim() != 3:
        raise ShapeError(
            f"outputs have shape {list(outputs.shape)}; they must have a batch: [T, B, F], or [B, T, F] with "
            "batch_first (use .unsqueeze)"
        )


def _time_first(tensor: Tensor, batch_first: bool) -> Tensor:
    return tensor.transpose(0, 1) if batch_first else tensor
