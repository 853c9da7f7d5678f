"""Dropout between layers whose masks are drawn by counter: seed, layer, step, row and unit decide, and nothing else.

Whether rows are sorted, a sequence is split, or a run is resumed changes no mask. Each (seed, layer, step, row) begins
a SplitMix64 sequence (Steele, Lea & Flood 2014, OOPSLA, figure 12) of 64 bits for every two units.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from throughtime.errors import ShapeError
from throughtime.nn.layout import Layout, shape_text

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_FIRST, _SECOND = 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64

_CHUNK = 1 << 16
"""How many 64-bit draws are made at a time: few enough for the second caches, enough for all threads."""


class Masks(NamedTuple):
    """Which dropout masks a forward run uses, where a caller wants to say so: `layer(x, masks=Masks(seed))`.

    seed: a 64-bit integer, or a tensor of one. first_step: which step of its sequence a row's first step here is, one
    number for all rows or one for each: a sequence that is run in parts keeps its masks if each part says where it
    begins. rows: a number for each row, its identity from batch to batch, or one for all, which gives all rows the same
    masks; None for 0 to B - 1.
    """

    seed: int | Tensor
    first_step: int | Sequence[int] | Tensor = 0
    rows: Sequence[int] | Tensor | None = None


def keys(masks: Masks | None, layout: Layout, device: torch.device) -> Tensor:
    """A 64-bit key for each step and row in the engine's order, [T, B]; without masks, of a seed drawn from torch's.

    Raises ShapeError for masks that do not fit the rows.
    """
    if masks is None:
        masks = Masks(torch.randint(-(2**63), 2**63 - 1, (), device=device))
    seed = _whole_numbers("seed", masks.seed, (), device)
    first = _whole_numbers("first_step", masks.first_step, (layout.rows,), device)
    rows = torch.arange(layout.rows, device=device)
    if masks.rows is not None:
        rows = _whole_numbers("rows", masks.rows, (layout.rows,), device)
    steps = torch.arange(layout.steps, device=device).unsqueeze(-1)
    key = _drawn(_drawn(seed, rows), steps + first)
    return layout.rows_in(key, 1)


def _whole_numbers(name: str, value: Any, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """One whole number, or one for each row, as int64."""
    try:
        found = torch.as_tensor(value, device=device)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ShapeError(f"{name} of the dropout masks cannot be read ({error}); give 64-bit integers") from error
    if found.dtype.is_floating_point or found.dtype == torch.bool:
        raise ShapeError(f"{name} of the dropout masks holds {found.dtype}; give integers")
    if tuple(found.shape) not in ((), shape):
        wanted = f"one integer or {shape_text(('B',), shape)}" if shape else "one integer"
        raise ShapeError(f"{name} of the dropout masks has shape {list(found.shape)}; give {wanted}")
    return found.to(torch.int64)


def drop(x: Tensor, probability: float, key: Tensor, depth: int) -> Tensor:
    """x [T, B, units] with each unit zero with this probability and the others scaled by 1 / (1 - probability)."""
    if probability >= 1:
        return x * 0.0
    steps, rows, units = x.shape
    of_layer = _drawn(key, torch.tensor(depth, device=x.device))
    at_once = max(1, 2 * _CHUNK // max(1, rows * units))
    if torch.compiler.is_compiling() or steps <= at_once:
        return x * _noise(of_layer, units, probability, x.dtype)
    noise = torch.cat([_noise(part, units, probability, x.dtype) for part in of_layer.split(at_once)])
    return x * noise


def dropped(outputs: Tensor, probability: float, masks: Masks | None, depth: int) -> Tensor:
    """Outputs [T, B, units] of a layer, dropped as layer number `depth` would drop its input; without masks, at random.

    For what comes after the last layer, whose own masks end at `num_layers - 1`.
    """
    return drop(outputs, probability, keys(masks, Layout(*outputs.shape[:2]), outputs.device), depth)


def _noise(key: Tensor, units: int, probability: float, dtype: torch.dtype) -> Tensor:
    """For keys [T, B], what each unit is multiplied by: [T, B, units]."""
    bits = _drawn(key.unsqueeze(-1), torch.arange((units + 1) // 2, device=key.device)).view(torch.int32)
    kept = bits[..., :units] >= round(probability * 2**32) - 2**31
    return kept.to(dtype).mul_(1 / (1 - probability))


def _drawn(key: Tensor, number: Tensor) -> Tensor:
    """The 64 bits that SplitMix64 gives as number `number`, from 0, when it starts from `key`."""
    z = key + (number + 1) * _GOLDEN
    z ^= (z >> 30).bitwise_and_(2**34 - 1)
    z *= _FIRST
    z ^= (z >> 27).bitwise_and_(2**37 - 1)
    z *= _SECOND
    z ^= (z >> 31).bitwise_and_(2**33 - 1)
    return z
