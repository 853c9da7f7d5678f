"""Keras as tests compare with it: on its torch back end, so that autograd gives gradients, with random weights."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

os.environ["KERAS_BACKEND"] = "torch"  # read once, as Keras is imported
os.environ.setdefault("KERAS_HOME", tempfile.gettempdir())  # where it would write its own configuration

import keras

FEATURES = 3
LENGTHS = [5, 2, 4, 1]
OUR_BLOCKS = {1: [0], 3: [1, 0, 2], 4: [0, 1, 2, 3]}
"""Keras's blocks z, r, h and i, f, c, o by their place among ours, by how many there are."""


def randomised(layer: Any, features: int = FEATURES) -> Any:
    """The layer, built for so many features, with every weight drawn anew: Keras's own biases begin at 0 and 1."""
    if not layer.built:
        layer.build((None, None, features))
    generator = torch.Generator().manual_seed(3)
    for variable in layer.weights:
        variable.value.data.copy_(torch.randn(tuple(variable.shape), generator=generator) * 0.4)
    return layer


def sequential(*stacked: Any) -> Any:
    """A Sequential of these layers over FEATURES inputs, its weights drawn anew."""
    return randomised(keras.Sequential([keras.Input((None, FEATURES)), *stacked]))


def inputs() -> tuple[Tensor, Tensor]:
    """x [B, T, I], and the mask of LENGTHS [B, T]."""
    x = torch.randn(len(LENGTHS), max(LENGTHS), FEATURES, generator=torch.Generator().manual_seed(5))
    return x.requires_grad_(), torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]


def in_keras_layout(named: Mapping[str, Tensor], depth: int = 0, suffix: str = "", *, one_bias: bool) -> list[Tensor]:
    """Our weights of one direction, or their gradients, as Keras has them: kernel, recurrent kernel, bias if any.

    The gradient of Keras's one bias is that of either of ours.
    """
    found = []
    for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        if (tensor := named.get(f"{name}_l{depth}{suffix}")) is not None:
            units = named[f"weight_hh_l{depth}{suffix}"].shape[1]
            blocks = tensor.split(units)
            ordered = torch.cat([blocks[place] for place in OUR_BLOCKS[len(blocks)]])
            found.append(ordered.T if ordered.dim() == 2 else ordered)
    if len(found) == 4:
        found[2:] = [found[2] if one_bias else torch.stack(found[2:])]
    return found


def weighted(tensors: Sequence[Tensor]) -> Tensor:
    """A loss that sees every entry of every tensor."""
    generator = torch.Generator().manual_seed(7)
    terms = [(t * torch.randn(t.shape, generator=generator, dtype=t.dtype)).sum() for t in tensors]
    return torch.stack(terms).sum()


def values(layer: Any) -> list[Tensor]:
    """The weights of a Keras layer as the torch parameters that they are."""
    return [variable.value for variable in layer.trainable_weights]
