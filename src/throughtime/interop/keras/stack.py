"""`Stack`: Keras models of several recurrent layers that no single layer of ours can say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from throughtime.errors import InteropError, ShapeError
from throughtime.interop.keras.masks import mask_lengths
from throughtime.nn.layout import Lengths, State
from throughtime.nn.recurrent import Recurrent

Merge = Literal["concat", "sum", "mul", "ave"] | None
"""How a Bidirectional puts its directions together; None keeps them apart."""

MERGES: tuple[Merge, ...] = ("concat", "sum", "mul", "ave", None)


class Stack(torch.nn.Module):
    """Recurrent layers in a row, as a Keras model has them: each of its own cell, width and way of merging directions.

    `layers` are batch-first `Recurrent` layers; `merges[k]` says how the directions of layer k meet ("concat" where it
    has one). With `return_sequences=False` the last layer shows its last output alone. With `mask_value`, a call
    without `lengths=` takes them from x as Keras's Masking does: steps whose features all equal it are left out.

    Raises InteropError for layers that do not follow on one another.
    """

    def __init__(
        self,
        layers: Sequence[Recurrent],
        merges: Sequence[Merge],
        *,
        return_sequences: bool = True,
        mask_value: float | None = None,
    ) -> None:
        super().__init__()
        _check(layers, merges)
        self.layers = torch.nn.ModuleList(layers)
        self.merges = tuple(merges)
        self.return_sequences = return_sequences
        self.mask_value = mask_value

    def forward(
        self, x: Tensor, h_0: Sequence[State] | None = None, *, lengths: Lengths | None = None
    ) -> tuple[Tensor | tuple[Tensor, Tensor], tuple[State, ...]]:
        """x [B, T, I] to what the Keras model returns, and the final states of each of `layers`.

        The output is [B, T, features], zero past each end; [B, features] without `return_sequences`; a pair of such,
        forward and backward, where the last merge is None. States are as `Recurrent` gives them, and h_0 is alike.

        Raises ShapeError for what does not fit.
        """
        if not isinstance(x, Tensor) or x.dim() != 3:
            raise ShapeError(f"x is {_shown(x)}; a Stack takes a tensor [B, T, I]")
        if h_0 is not None and len(h_0) != len(self.layers):
            raise ShapeError(f"h_0 has {len(h_0)} entries; a Stack of {len(self.layers)} layers takes one for each")
        if lengths is None and self.mask_value is not None:
            lengths = mask_lengths((x != self.mask_value).any(-1))
        states: list[State] = []
        output: Tensor | tuple[Tensor, Tensor] = x
        for place, (layer, merge) in enumerate(zip(self.layers, self.merges, strict=True)):
            assert isinstance(layer, Recurrent)
            steps, state = layer(output, None if h_0 is None else h_0[place], lengths=lengths)
            states.append(state)
            last = place == len(self.layers) - 1 and not self.return_sequences
            output = _merged(_last(layer, state) if last else steps, merge)
        return output, tuple(states)

    def extra_repr(self) -> str:
        """What differs from one layer after the other."""
        said = [f"merges={self.merges}"] if any(merge != "concat" for merge in self.merges) else []
        said += [] if self.return_sequences else ["return_sequences=False"]
        said += [] if self.mask_value is None else [f"mask_value={self.mask_value}"]
        return ", ".join(said)


def _last(layer: Recurrent, state: State) -> Tensor:
    """[B, features]: the output of each direction of the last layer after it has read everything."""
    shown = state if isinstance(state, Tensor) else state[layer.cell.output]
    return torch.cat([shown[-2], shown[-1]], -1) if layer.bidirectional else shown[-1]


def _merged(output: Tensor, merge: Merge) -> Tensor | tuple[Tensor, Tensor]:
    if merge == "concat":
        return output
    forward, backward = output.chunk(2, -1)
    match merge:
        case "sum":
            return forward + backward
        case "mul":
            return forward * backward
        case "ave":
            return (forward + backward) / 2
    return forward, backward


def _check(layers: Sequence[Recurrent], merges: Sequence[Merge]) -> None:
    if not layers or len(layers) != len(merges):
        raise InteropError(f"a Stack of {len(layers)} layers has {len(merges)} merges; give a merge for each layer")
    width: int | None = None
    for place, (layer, merge) in enumerate(zip(layers, merges, strict=True)):
        if not isinstance(layer, Recurrent) or not layer.batch_first:
            raise InteropError(f"layer {place} of a Stack must be a Recurrent with batch_first=True")
        if merge not in MERGES or (merge != "concat" and not layer.bidirectional):
            raise InteropError(
                f"merge {place} of a Stack is {merge!r}; it must be one of {', '.join(map(repr, MERGES))}, and "
                "'concat' for a layer of one direction"
            )
        if width is not None and layer.input_size != width:
            raise InteropError(f"layer {place} of a Stack takes {layer.input_size} features, and is given {width}")
        if merge is None and place < len(layers) - 1:
            raise InteropError(f"merge {place} of a Stack is None, which gives two outputs; only the last may be")
        sizes = layer.cell.sizes(layer.hidden_size, layer.proj_size)
        width = sizes[layer.cell.output] * (2 if layer.bidirectional and merge == "concat" else 1)


def _shown(value: object) -> str:
    return f"of shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
