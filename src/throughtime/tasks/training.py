"""One readable training loop: ragged mini-batches, Adam, cross entropy on the last step."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from throughtime.equations.cell import Cell
from throughtime.errors import ThroughtimeError
from throughtime.nn import LastStep, Recurrent
from throughtime.tasks.encoding import Part


class SequenceClassifier(nn.Module):
    """Reads a whole sequence, then says which of `classes` it is (the lecture's three sets of weights)."""

    def __init__(self, cell: Cell, input_size: int, hidden_size: int, classes: int) -> None:
        super().__init__()
        self.recurrent = Recurrent(cell, input_size, hidden_size)
        self.readout = LastStep(hidden_size, classes)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """Class scores (logits) [B, classes] of ragged sequences: x [T, B, features], lengths [B]."""
        outputs, _ = self.recurrent(x, lengths=lengths)  # [T, B, hidden_size]
        return self.readout(outputs, lengths)


@dataclass(frozen=True)
class Recipe:
    """How to train: `clip`, if given, bounds the norm of all gradients together. Refuses nonsense."""

    epochs: int = 60
    batch_size: int = 32
    learning_rate: float = 2e-3
    clip: float | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and not 0 < value < float("inf"):
                raise ThroughtimeError(f"the {name.replace('_', ' ')} is {value}; give a number above 0")


@dataclass(frozen=True)
class Epoch:
    """What one pass over the training part gave: the mean loss of its sequences, and how long it took."""

    loss: float
    seconds: float


def build(cell: Cell, part: Part, hidden_size: int, classes: int, *, seed: int) -> SequenceClassifier:
    """A new classifier for sequences like those of `part`; its weights are decided by `seed` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SequenceClassifier(cell, part.steps[0].shape[1], hidden_size, classes)


def train(model: SequenceClassifier, part: Part, recipe: Recipe, *, seed: int) -> Iterator[Epoch]:
    """Train in place, yielding after every epoch; what the caller does in between is not timed.

    The order of the sequences is decided by `seed` alone. Raises `ThroughtimeError` once the loss is not
    finite.
    """
    optimiser = torch.optim.Adam(model.parameters(), lr=recipe.learning_rate)
    shuffle = torch.Generator().manual_seed(seed)
    for number in range(1, recipe.epochs + 1):
        model.train()
        total, started = 0.0, time.perf_counter()
        for batch in torch.randperm(len(part), generator=shuffle).split(recipe.batch_size):
            x, lengths = pad([part.steps[i] for i in batch])
            loss = functional.cross_entropy(model(x, lengths), part.classes[batch])
            optimiser.zero_grad()
            loss.backward()
            if recipe.clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
            optimiser.step()
            total += loss.item() * len(batch)
        if not total < float("inf"):
            raise ThroughtimeError(
                f"the loss is not finite in epoch {number}; train with a lower learning rate than"
                f" {recipe.learning_rate:g}, or clip the gradients"
            )
        yield Epoch(loss=total / len(part), seconds=time.perf_counter() - started)


@torch.no_grad()
def predict(model: SequenceClassifier, part: Part, batch_size: int = 512) -> Tensor:
    """The most likely class of each sequence: [sequences], int64."""
    model.eval()
    batches = torch.arange(len(part)).split(batch_size)
    return torch.cat([model(*pad([part.steps[i] for i in batch])).argmax(dim=1) for batch in batches])


def pad(steps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Sequences of [length, features] as one tensor [T, B, features], zero past each end, and their lengths [B]."""
    return nn.utils.rnn.pad_sequence(list(steps)), torch.tensor([len(sequence) for sequence in steps])
