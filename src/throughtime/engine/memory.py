"""Memory for a run: one arena of scratch that is used again, and large tensors whose pages are used again.

Fresh pages cost more than the arithmetic on them. Blocks go back to a pool when the run, or the last tensor on them, is
gone; the pool keeps a few, and never holds what someone still sees.
"""

from __future__ import annotations

import ctypes
import math
import os
import threading
import weakref
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

KEPT_BYTES = 1 << 29
"""The most memory that the pool keeps for later."""

_PAGE = 1 << 16


class Pool:
    """Blocks of memory by size, the ones not in use."""

    def __init__(self) -> None:
        self.lock = threading.RLock()  # a collected tensor gives its block back wherever the collector runs, here too
        self.blocks: dict[int, list[np.ndarray]] = {}
        self.kept = 0

    def take(self, size: int) -> np.ndarray:
        """A block of at least so many bytes; what is in it is left over from before."""
        size = -(-size // _PAGE) * _PAGE
        with self.lock:
            blocks = self.blocks.get(size)
            if blocks:
                self.kept -= size
                return blocks.pop()
        return np.empty(size + 64, dtype=np.uint8)

    def give(self, block: np.ndarray) -> None:
        """Put a block back; the oldest are let go when too much is kept."""
        size = block.nbytes - 64
        with self.lock:
            if self.kept + size <= KEPT_BYTES:
                self.blocks.setdefault(size, []).append(block)
                self.kept += size


_pool = Pool()


def _forget() -> None:
    """A forked child starts with a pool of its own, whose lock nobody holds."""
    global _pool
    _pool = Pool()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def _start(block: np.ndarray) -> int:
    address = int(block.ctypes.data)
    return address + (-address) % 64


class Arena:
    """Scratch for one run, carved from blocks of the pool, aligned to cache lines."""

    BLOCK = 1 << 20

    def __init__(self) -> None:
        self.blocks: list[np.ndarray] = []
        self.size = 0  # bytes of all its blocks
        self.place = self.end = 0

    def bytes(self, size: int) -> int:
        """The address of so many bytes; they hold anything."""
        size = -(-size // 64) * 64
        if self.place + size > self.end:
            block = _pool.take(max(size, self.BLOCK))
            self.blocks.append(block)
            self.size += block.nbytes
            self.place = _start(block)
            self.end = self.place + block.nbytes - 64
        address = self.place
        self.place += size
        return address

    def zeros(self, size: int) -> int:
        """The address of so many zero bytes."""
        address = self.bytes(size)
        ctypes.memset(address, 0, size)
        return address

    def integers(self, values: Sequence[int]) -> int:
        """The address of 64-bit integers."""
        address = self.bytes(8 * len(values))
        ctypes.memmove(address, (ctypes.c_int64 * len(values))(*values), 8 * len(values))
        return address

    def view(self, address: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Scratch as a tensor; it must not outlive the arena."""
        count = math.prod(shape)
        kind = ctypes.c_float if dtype == torch.float32 else ctypes.c_double
        return torch.frombuffer((kind * count).from_address(address), dtype=dtype).view(tuple(shape))

    def release(self) -> None:
        """Give every block back."""
        for block in self.blocks:
            _pool.give(block)
        self.blocks, self.size = [], 0


def tensor(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor on memory of the pool, which takes it back when the tensor's storage is gone."""
    item = 4 if dtype == torch.float32 else 8
    count = math.prod(shape)
    block = _pool.take(count * item)
    offset = _start(block) - int(block.ctypes.data)
    array = block[offset : offset + count * item].view(np.float32 if item == 4 else np.float64).reshape(shape)
    weakref.finalize(array, _give_back, block)
    return torch.from_numpy(array)


def result(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor for the caller: on memory of the pool if it is large, for a block is never smaller than its page."""
    item = 4 if dtype == torch.float32 else 8
    return tensor(shape, dtype) if math.prod(shape) * item >= 4 * _PAGE else torch.empty(tuple(shape), dtype=dtype)


def _give_back(block: np.ndarray) -> None:
    """To this process's pool: a forked child frees what its parent took, and must not ask for the parent's lock."""
    _pool.give(block)
