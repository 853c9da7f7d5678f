"""Sequences as tensors: the part of a data set that a network learns from or is tested on, and batches of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


@dataclass(frozen=True)
class Batch:
    """Sequences side by side, zero past each end; what `SequenceModel.forward` takes.

    x: [T, B, features] float32. symbols: [T, B, symbol columns] int64. lengths: [B] int64. targets: [B, ...] where
    each sequence has one, [T, B, ...] where each step has one; [0] where they are not known.
    """

    x: Tensor
    symbols: Tensor
    lengths: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.lengths)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Batch:
        """The same on another device, or with x in another floating dtype; lengths stay where they are."""
        return Batch(self.x.to(device, dtype), self.symbols.to(device), self.lengths, self.targets.to(device))


@dataclass(frozen=True)
class Part:
    """The training, validation or test part, one tensor per sequence.

    steps: [length, features] float32. targets: a tensor [sequences, ...] where each sequence has one; a tuple of
    tensors [length, ...] where each step has one; with nothing in it where they are not known. symbols: [length, symbol
    columns] int64, or none at all.
    """

    steps: tuple[Tensor, ...]
    targets: Tensor | tuple[Tensor, ...]
    symbols: tuple[Tensor, ...] = ()

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def labelled(self) -> bool:
        """Whether targets are known."""
        return len(self.targets) == len(self.steps)

    @property
    def lengths(self) -> Tensor:
        """Steps in each sequence: [sequences], int64."""
        return torch.tensor([len(steps) for steps in self.steps], dtype=torch.int64)

    def subset(self, indices: Iterable[int] | Tensor) -> Part:
        """The sequences at these places, in this order."""
        rows = _listed(indices)
        return Part(
            tuple(self.steps[i] for i in rows),
            self._targets_at(rows),
            tuple(self.symbols[i] for i in rows) if self.symbols else (),
        )

    def batch(self, indices: Iterable[int] | Tensor | None = None) -> Batch:
        """The sequences at these places (all, if not given) side by side."""
        rows = list(range(len(self))) if indices is None else _listed(indices)
        x = pad_sequence([self.steps[i] for i in rows])
        targets = self._targets_at(rows)
        return Batch(
            x=x,
            symbols=pad_sequence([self.symbols[i] for i in rows])
            if self.symbols
            else torch.zeros(*x.shape[:2], 0, dtype=torch.int64),
            lengths=torch.tensor([len(self.steps[i]) for i in rows], dtype=torch.int64),
            targets=targets if isinstance(targets, Tensor) else _padded(targets),
        )

    def _targets_at(self, rows: list[int]) -> Tensor | tuple[Tensor, ...]:
        if not self.labelled:
            return self.targets
        return tuple(self.targets[i] for i in rows) if isinstance(self.targets, tuple) else self.targets[rows]


def _padded(targets: tuple[Tensor, ...]) -> Tensor:
    return pad_sequence(list(targets)) if targets else torch.zeros(0, dtype=torch.int64)


def _listed(indices: Iterable[int] | Tensor) -> list[int]:
    return [int(i) for i in indices]
