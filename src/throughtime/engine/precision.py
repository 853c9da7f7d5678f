"""Precision: the formats that are computed in float32, and autocast, asked in a way that every device answers."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)
"""Formats whose runs the `cpu` target computes in float32 and rounds once."""


def widened(tensor: Tensor) -> Tensor:
    """A tensor in half precision as float32, which is exact; any other as it is."""
    return tensor.float() if tensor.dtype in HALF else tensor


def is_autocast(device_type: str) -> bool:
    """Whether autocast is on for this type of device."""
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def no_autocast(device_type: str) -> AbstractContextManager[object]:
    """Inside, nothing on this type of device is cast by autocast."""
    return torch.autocast(device_type, enabled=False) if is_autocast(device_type) else nullcontext()
