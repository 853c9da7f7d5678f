"""Keras says with a mask which steps count; ours say it with lengths."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from throughtime.errors import ShapeError


def mask_lengths(mask: Any) -> Tensor:
    """The `lengths=` of a Keras mask [B, T], True where a step counts: an integer for each row, [B].

    It takes whatever torch.as_tensor does, such as what `Embedding.compute_mask` or `Masking.compute_mask` returns.

    Raises ShapeError, naming row and step, for a row that has a step left out before one that counts (our layers read
    each sequence from its first step to its end), and for what is not [B, T] of booleans.
    """
    try:
        known = torch.as_tensor(mask)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ShapeError(f"the mask is {type(mask).__name__}, which holds no truth values ({error})") from error
    if known.dtype != torch.bool or known.dim() != 2:
        raise ShapeError(
            f"the mask holds {known.dtype} of shape {list(known.shape)}; it must be [B, T] of booleans, True where a "
            "step counts"
        )
    lengths = known.sum(1)
    inside = torch.arange(known.shape[1], device=known.device) < lengths[:, None]
    if not torch.equal(known, inside):
        row = int((known != inside).any(1).nonzero()[0])
        counted = known[row].nonzero().flatten()
        hole = int((~known[row]).nonzero()[0])
        after = int(counted[counted > hole][0])
        where = "begins with padding" if hole == 0 else f"leaves out step {hole}"
        way_out = "pad at the end (padding='post')" if hole == 0 else "move the steps that count together"
        raise ShapeError(
            f"row {row} of the mask {where} and counts step {after}, which lengths cannot say; {way_out}, for a "
            "sequence is read from its first step to its end"
        )
    return lengths
