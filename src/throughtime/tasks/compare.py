"""Elman against GRU against LSTM on one's own data: accuracy, size, speed and reach, in numbers."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from statistics import mean, median, stdev
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from throughtime.equations.catalogue import CELLS
from throughtime.errors import ThroughtimeError
from throughtime.insight.reach import Reach, gradient_norms
from throughtime.tasks.encoding import Encoded, Part
from throughtime.tasks.training import Recipe, SequenceClassifier, build, pad, predict, train

if TYPE_CHECKING:
    from numpy.typing import NDArray

COMPARABLE = {name: cell for name, cell in CELLS.items() if all(part.namespace != "P" for part in cell.parameters)}
"""Cells that need a number of units and no other size."""

REACH_STEPS = 50_000
"""Steps of training sequences, padding included, that reach is measured on: a bound on the recording's memory."""


@dataclass(frozen=True, eq=False)
class Run:
    """One cell trained once: its curves by epoch, what it says of the test part, and its gradients by lag and row."""

    losses: tuple[float, ...]
    accuracies: tuple[float, ...]
    seconds: tuple[float, ...]
    predictions: Tensor
    norms_before: NDArray[np.float64]
    norms_after: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class CellResult:
    """One cell, trained once for each seed."""

    name: str
    parameters: int
    runs: tuple[Run, ...]

    @property
    def accuracies(self) -> tuple[float, ...]:
        """Test accuracy after the last epoch, by seed."""
        return tuple(run.accuracies[-1] for run in self.runs)

    @property
    def accuracy(self) -> float:
        """Mean test accuracy over the seeds."""
        return mean(self.accuracies)

    @property
    def spread(self) -> float:
        """Standard deviation of the test accuracy over the seeds; NaN for a single seed."""
        return stdev(self.accuracies) if len(self.runs) > 1 else math.nan

    @property
    def losses(self) -> NDArray[np.float64]:
        """Mean training loss of each epoch, over the seeds: [epochs]."""
        return np.mean([run.losses for run in self.runs], axis=0)

    @property
    def loss(self) -> float:
        """Mean training loss of the last epoch, over the seeds."""
        return float(self.losses[-1])

    def epochs_to(self, loss: float) -> int:
        """Epochs until the mean training loss is as low as this; all of them if it never is."""
        return int(np.argmax(self.losses <= loss)) + 1 if self.loss <= loss else len(self.losses)

    @property
    def seconds_per_epoch(self) -> float:
        """Median over all epochs but the first of each run, in which memory is claimed and kernels are made ready."""
        return median(seconds for run in self.runs for seconds in run.seconds[1:] or run.seconds)

    @cached_property
    def reach_before(self) -> Reach:
        """Reach of the untrained network, over all seeds."""
        return Reach.of(np.concatenate([run.norms_before for run in self.runs], axis=1))

    @cached_property
    def reach_after(self) -> Reach:
        """Reach of the trained network, over all seeds."""
        return Reach.of(np.concatenate([run.norms_after for run in self.runs], axis=1))


@dataclass(frozen=True, eq=False)
class Comparison:
    """Cells side by side on one data set."""

    task: Encoded
    hidden_size: int
    recipe: Recipe
    cells: tuple[CellResult, ...]
    threads: int = 1

    @property
    def seeds(self) -> int:
        """How many times each cell was trained."""
        return len(self.cells[0].runs)

    @property
    def best(self) -> CellResult:
        """The cell with the highest mean test accuracy."""
        return max(self.cells, key=lambda cell: cell.accuracy)

    @property
    def slowest(self) -> CellResult:
        """The cell with the highest training loss in the end."""
        return max(self.cells, key=lambda cell: cell.loss)

    @property
    def level(self) -> tuple[CellResult, ...]:
        """The cells that the best one does not beat by more than two standard errors over the seeds."""
        return tuple(cell for cell in self.cells if not self._beaten(cell))

    def _beaten(self, cell: CellResult) -> bool:
        lead = self.best.accuracy - cell.accuracy
        return self.seeds > 1 and lead > 2 * math.sqrt((self.best.spread**2 + cell.spread**2) / self.seeds)

    @property
    def baseline(self) -> tuple[str, float]:
        """The commonest class of the test part and its share: no constant answer can do better."""
        commonest, count = Counter(self.task.test.classes.tolist()).most_common(1)[0]
        return self.task.vocabulary[commonest], count / len(self.task.test)

    @property
    def learnt(self) -> bool:
        """Whether the best cell beats the best constant answer by two standard errors of a test part of this size."""
        _, share = self.baseline
        return self.best.accuracy - share > 2 * math.sqrt(share * (1 - share) / len(self.task.test))

    @property
    def lags(self) -> tuple[int, int]:
        """Steps from the end of a training sequence back to its first: of the median one and of the longest."""
        lengths = self.task.train.lengths
        return int(lengths.median()) - 1, int(lengths.max()) - 1

    def confusion(self, cell: CellResult) -> NDArray[np.int64]:
        """Test sequences by true class and said class, summed over the seeds: [classes, classes]."""
        counts = np.zeros((len(self.task.vocabulary),) * 2, dtype=np.int64)
        for run in cell.runs:
            np.add.at(counts, (self.task.test.classes.numpy(), run.predictions.numpy()), 1)
        return counts


def compare(
    task: Encoded,
    *,
    cells: Sequence[str] = ("elman", "gru", "lstm"),
    hidden_size: int = 100,
    recipe: Recipe | None = None,
    seeds: int = 3,
    threads: int = 1,
    on_epoch: Callable[[str, int], None] | None = None,
) -> Comparison:
    """Train every cell with the seeds 0, 1, ... and measure it; nothing is chosen by looking at the test part.

    `cells` are names of the catalogue; `on_epoch(cell, seed)` is called after each epoch. Small networks gain little
    from a second thread, and lose much where other work wants the same cores: hence one, unless `threads` says more.
    """
    recipe = recipe or Recipe()
    unknown = [cell for cell in cells if cell not in COMPARABLE]
    if unknown or not cells:
        problem = f"no cell is called {unknown[0]!r}" if unknown else "name a cell"
        raise ThroughtimeError(f"{problem}; the cells are {', '.join(COMPARABLE)}")
    results = []
    with _threads(threads):
        for cell in [COMPARABLE[name] for name in dict.fromkeys(cells)]:
            runs = []
            for seed in range(seeds):
                model = build(cell, task.train, hidden_size, len(task.vocabulary), seed=seed)
                runs.append(_run(model, task, recipe, seed, on_epoch and partial(on_epoch, cell.name, seed)))
            parameters = sum(parameter.numel() for parameter in model.parameters())
            results.append(CellResult(cell.name, parameters, tuple(runs)))
    return Comparison(task, hidden_size, recipe, tuple(results), threads)


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _run(
    model: SequenceClassifier, task: Encoded, recipe: Recipe, seed: int, on_epoch: Callable[[], None] | None
) -> Run:
    before = _reach_norms(model, task.train)
    losses, accuracies, seconds = [], [], []
    for epoch in train(model, task.train, recipe, seed=seed):
        predictions = predict(model, task.test)
        losses.append(epoch.loss)
        seconds.append(epoch.seconds)
        accuracies.append(float((predictions == task.test.classes).float().mean()))
        if on_epoch is not None:
            on_epoch()
    after = _reach_norms(model, task.train)
    return Run(tuple(losses), tuple(accuracies), tuple(seconds), predictions, before, after)


def _reach_norms(model: SequenceClassifier, part: Part) -> NDArray[np.float64]:
    """The gradient norms [lags, rows] on training sequences: the signal that training has to work with."""
    longest = int(part.lengths.max())
    rows = min(len(part), max(1, REACH_STEPS // longest))
    chosen = torch.linspace(0, len(part) - 1, rows).long()  # evenly, for sequences may be sorted by class
    x, lengths = pad([part.steps[i].double() for i in chosen])
    exact = copy.deepcopy(model).double()  # in float32, the gradient of a long sequence leaves the range too soon

    def summed_loss() -> Tensor:
        return functional.cross_entropy(exact(x, lengths), part.classes[chosen], reduction="sum")

    norms = gradient_norms(summed_loss)[0]
    beyond = np.full((longest - len(norms), norms.shape[1]), math.nan)
    return np.concatenate([norms, beyond])
