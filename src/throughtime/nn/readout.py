"""From states to answers: read-outs per step and at the last step."""

from __future__ import annotations

import torch
from torch import Tensor

from throughtime.engine.precision import is_autocast
from throughtime.errors import ShapeError
from throughtime.nn.layout import Lengths, check_numbers, read_lengths, within


class PerStep(torch.nn.Module):
    """y_t = g(x_t, h_t): an affine map of the state at every step and, with `input_size`, of the input beside it.

    It gives logits: softmax (one class) or sigmoid (several at once) belongs to the loss, see `losses.ragged_loss`.
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
        features = _features(outputs, x, self.input_size, self.linear)
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
        features = _features(outputs, x, self.input_size, self.linear)
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


def _features(outputs: Tensor, x: Tensor | None, input_size: int, linear: torch.nn.Module) -> Tensor:
    """The states' features, with the input beside them if the read-out sees it."""
    if not isinstance(outputs, Tensor):
        raise ShapeError(
            f"outputs are {type(outputs).__name__}; a read-out takes the padded tensor (pad_packed_sequence gives it)"
        )
    _check_kind("outputs", outputs, linear)
    width = getattr(linear, "in_features", None)  # what stands in for the affine map may not say it
    if outputs.dim() < 1 or (width is not None and outputs.shape[-1] != width - input_size):
        raise ShapeError(
            f"outputs have shape {list(outputs.shape)}, and the read-out was made for "
            f"{'features' if width is None else f'{width - input_size} features'} in the last dimension"
        )
    if (x is None) != (input_size == 0):
        raise ShapeError(
            "this read-out was made without input_size=, so it takes no x"
            if x is not None
            else f"this read-out sees the input (input_size={input_size}); give it x as well"
        )
    if x is None:
        return outputs
    _check_kind("x", x, linear)
    if x.shape != (*outputs.shape[:-1], input_size):
        raise ShapeError(
            f"x has shape {list(x.shape)}; beside outputs of {list(outputs.shape)} it must be "
            f"{[*outputs.shape[:-1], input_size]}"
        )
    return torch.cat([outputs, x], -1)


def _check_kind(name: str, value: Tensor, linear: torch.nn.Module) -> None:
    """Refuse what is no dense tensor of the read-out's own dtype and device."""
    check_numbers(name, value)
    weight = next(linear.parameters(), None)
    if weight is None:  # as after dynamic quantization, which keeps its weights elsewhere
        return
    other_dtype = value.dtype != weight.dtype and not is_autocast(value.device.type)
    if value.device != weight.device or other_dtype:
        raise ShapeError(
            f"{name}: {value.dtype} on {value.device}, and the read-out's weights are {weight.dtype} on "
            f"{weight.device}; convert one of them with .to(...)"
        )


def _check_batched(outputs: Tensor) -> None:
    if outputs.dim() != 3:
        raise ShapeError(
            f"outputs have shape {list(outputs.shape)}; they must have a batch: [T, B, F], or [B, T, F] with "
            "batch_first (use .unsqueeze)"
        )


def _time_first(tensor: Tensor, batch_first: bool) -> Tensor:
    return tensor.transpose(0, 1) if batch_first else tensor
