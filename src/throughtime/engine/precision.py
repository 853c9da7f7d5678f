"""Autocast, asked in a way that every device answers: some, such as meta, have none."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def is_autocast(device_type: str) -> bool:
    """Whether autocast is on for this type of device."""
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def no_autocast(device_type: str) -> AbstractContextManager[object]:
    """Inside, nothing on this type of device is cast by autocast."""
    return torch.autocast(device_type, enabled=False) if is_autocast(device_type) else nullcontext()
