"""Elman against GRU against LSTM on one's own data: score, size, speed and reach, in numbers."""

from __future__ import annotations

import copy
import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from statistics import fmean, median, stdev, variance
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from throughtime.data.batches import Part
from throughtime.equations.catalogue import CELLS
from throughtime.equations.cell import Cell
from throughtime.equations.lookup import find
from throughtime.errors import ThroughtimeError
from throughtime.insight.reach import Reach, gradient_norms
from throughtime.tasks.encoding import Encoded
from throughtime.tasks.model import Architecture, SequenceModel, build
from throughtime.tasks.task import Baseline, Score
from throughtime.training.evaluation import evaluate
from throughtime.training.loop import on_threads, train
from throughtime.training.recipe import Recipe

if TYPE_CHECKING:
    from numpy.typing import NDArray


def _projects(cell: Cell) -> bool:
    return any(parameter.namespace == "P" for parameter in cell.parameters)


COMPARABLE = [name for name, cell in CELLS.items() if not _projects(cell)]
"""Cells of the catalogue that need a number of units and no other size."""

CONFIDENCE = 0.95

REACH_STEPS = 50_000
"""Steps of training sequences, padding included, that reach is measured on: a bound on the recording's memory."""

Match = Literal["hidden", "params"]


@dataclass(frozen=True)
class Interval:
    """An estimate and half the width of its 95 % confidence interval, by Student's t over `n` runs of other seeds.

    `half` is NaN where there is but one run.
    """

    estimate: float
    half: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        """The mean of independent values."""
        n = len(values)
        half = _quantile(n - 1) * stdev(values) / math.sqrt(n) if n > 1 else math.nan
        return cls(fmean(values), half, n)

    @classmethod
    def between(cls, first: Sequence[float], second: Sequence[float]) -> Interval:
        """The mean of the first less that of the second, with degrees of freedom after Welch 1947 (Biometrika 34)."""
        n = min(len(first), len(second))
        estimate = fmean(first) - fmean(second)
        if n < 2:
            return cls(estimate, math.nan, n)
        errors = [variance(values) / len(values) for values in (first, second)]
        if sum(errors) == 0:
            return cls(estimate, 0.0, n)
        parts = (error**2 / (len(values) - 1) for error, values in zip(errors, (first, second), strict=True))
        return cls(estimate, _quantile(sum(errors) ** 2 / sum(parts)) * math.sqrt(sum(errors)), n)

    @property
    def low(self) -> float:
        """The lower end."""
        return self.estimate - self.half

    @property
    def high(self) -> float:
        """The upper end."""
        return self.estimate + self.half

    def excludes(self, value: float) -> bool:
        """Whether the value lies outside; never so for a single run."""
        return not self.low <= value <= self.high and not math.isnan(self.half)


def _quantile(degrees: float) -> float:
    """Student's t for a two-sided interval."""
    from scipy.special import stdtrit

    return float(stdtrit(degrees, (1 + CONFIDENCE) / 2))


@dataclass(frozen=True, eq=False)
class SeedResult:
    """One cell trained with one seed: loss and seconds by epoch, its gradients by lag and row.

    `tested` is its score on the test part after the last epoch.
    """

    losses: tuple[float, ...]
    seconds: tuple[float, ...]
    updates: int
    tested: Score
    norms_before: NDArray[np.float64]
    norms_after: NDArray[np.float64]

    @property
    def seconds_per_epoch(self) -> float:
        """Median of all epochs but the first, where memory is claimed and kernels are made ready; NaN for one epoch."""
        return median(self.seconds[1:]) if len(self.seconds) > 1 else math.nan


@dataclass(frozen=True, eq=False)
class CellResult:
    """One cell, trained once for each seed."""

    name: str
    hidden_size: int
    parameters: int
    runs: tuple[SeedResult, ...]

    @property
    def scores(self) -> tuple[float, ...]:
        """Test score after the last epoch, by seed."""
        return tuple(run.tested.headline for run in self.runs)

    @property
    def score(self) -> Interval:
        """Mean test score over the seeds."""
        return Interval.of(self.scores)

    @property
    def losses(self) -> NDArray[np.float64]:
        """Mean training loss of each epoch, over the seeds: [epochs]."""
        return np.mean([run.losses for run in self.runs], axis=0)

    @property
    def loss(self) -> float:
        """Mean training loss of the last epoch, over the seeds."""
        return float(self.losses[-1])

    @cached_property
    def tested(self) -> Score:
        """What all seeds together say of the test part."""
        first, *others = (run.tested for run in self.runs)
        together = copy.copy(first)
        for other in others:
            together.merge(other)
        return together

    def epochs_to(self, loss: float) -> int:
        """Epochs until the mean training loss is as low as this; all of them if it never is."""
        return int(np.argmax(self.losses <= loss)) + 1 if self.loss <= loss else len(self.losses)

    @property
    def seconds_per_epoch(self) -> float:
        """Median over the seeds; NaN where each run has but one epoch."""
        return median(run.seconds_per_epoch for run in self.runs)

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
    """Cells side by side on one data set; `match` says what was made equal, units or parameters."""

    data: Encoded
    hidden_size: int
    match: Match
    recipe: Recipe
    cells: tuple[CellResult, ...]
    baselines: tuple[Baseline, ...]
    threads: int = 1

    @property
    def seeds(self) -> int:
        """How many times each cell was trained."""
        return len(self.cells[0].runs)

    @property
    def updates(self) -> int:
        """How many steps of the optimiser each training took."""
        return self.cells[0].runs[0].updates

    @property
    def best(self) -> CellResult:
        """The cell with the best mean test score."""
        return max(self.cells, key=lambda cell: self.data.task.rank(cell.score.estimate))

    @property
    def slowest(self) -> CellResult:
        """The cell with the highest training loss in the end."""
        return max(self.cells, key=lambda cell: cell.loss)

    @property
    def level(self) -> tuple[CellResult, ...]:
        """The best cell, those whose difference to it has an interval that holds zero, and any that are as good.

        With few seeds a worse cell of a wide interval can be level, and then so is a better one of a narrow interval.
        """
        scores = {cell: self.data.task.rank(cell.score.estimate) for cell in self.cells}
        equals = [cell for cell in self.cells if not Interval.between(self.best.scores, cell.scores).excludes(0)]
        return tuple(cell for cell in self.cells if scores[cell] >= min(scores[equal] for equal in equals))

    @property
    def constant(self) -> Baseline:
        """The commonest class as the answer to everything."""
        return self.baselines[0]

    @property
    def baseline(self) -> Baseline:
        """The best of the baselines."""
        return max(self.baselines, key=lambda baseline: self.data.task.rank(baseline.score))

    @property
    def counted(self) -> int:
        """What the score counts in the test part: its sequences, or their steps."""
        return self.cells[0].runs[0].tested.count

    @property
    def learnt(self) -> bool:
        """Whether the best cell clearly beats a constant answer."""
        return self.beats(self.constant)

    def beats(self, baseline: Baseline) -> bool:
        """Whether the best cell is better by two standard errors of such a score in a test part of this size.

        That is, were all its answers independent: those at the steps of one sequence hardly are.
        """
        task = self.data.task
        lead = task.rank(self.best.score.estimate) - task.rank(baseline.score)
        return lead > 2 * task.standard_error(baseline.score, self.counted)

    @property
    def lags(self) -> tuple[int, int]:
        """Steps from the end of a training sequence back to its first: of the median one and of the longest."""
        lengths = self.data.train.lengths
        return int(lengths.median()) - 1, int(lengths.max()) - 1

    def cell(self, name: str) -> CellResult | None:
        """The result of the cell of this name, if it was compared."""
        return next((cell for cell in self.cells if cell.name == name), None)


def compare(
    data: Encoded,
    *,
    cells: Sequence[str] = ("elman", "gru", "lstm"),
    hidden_size: int = 100,
    match: Match = "hidden",
    recipe: Recipe | None = None,
    seeds: int = 3,
    threads: int = 1,
    on_epoch: Callable[[str, int], None] | None = None,
) -> Comparison:
    """Train every cell with the seeds 0, 1, ... and measure it; nothing is chosen by looking at the test part.

    All get the same recipe and all of its epochs (`recipe.patience` is left out: it would stop some cells before
    others), and with a seed the same batches in the same order. `match="hidden"` gives each cell `hidden_size` units;
    `match="params"` gives those to the cell that has the most parameters with them, and the others the units with which
    their parameters come closest to its. `cells` are names of the catalogue, or `module:name` for cells of one's own.
    `on_epoch(cell, seed)` is called after each epoch. Small networks gain little from a second thread, and lose much
    where other work wants the same cores: hence one, unless `threads` says more.

    Raises `ThroughtimeError` for a cell that is not known, and for two of one name.
    """
    recipe = replace(recipe or Recipe(), patience=None)
    chosen = _known(cells)
    architectures = matched(chosen, Architecture.fitting(data.encoder, hidden_size=hidden_size), match)
    runs: dict[str, list[SeedResult]] = {cell.name: [] for cell in chosen}
    with on_threads(threads):
        for seed in range(seeds):  # the outer loop, so that whatever else the machine does falls on all cells
            for cell, architecture in zip(chosen, architectures, strict=True):
                model = build(cell, architecture, seed=seed)
                runs[cell.name].append(
                    _trained(model, data, recipe, seed, on_epoch and partial(on_epoch, cell.name, seed))
                )
    results = tuple(
        CellResult(cell.name, architecture.hidden_size, parameters(cell, architecture), tuple(runs[cell.name]))
        for cell, architecture in zip(chosen, architectures, strict=True)
    )
    return Comparison(data, hidden_size, match, recipe, results, tuple(data.task.baselines(data)), threads)


def _known(names: Sequence[str]) -> list[Cell]:
    if not names:
        raise ThroughtimeError(f"name a cell; the cells are {', '.join(COMPARABLE)}")
    cells = [_find(name) for name in dict.fromkeys(names)]
    twice = [cell.name for place, cell in enumerate(cells) if cell.name in {other.name for other in cells[:place]}]
    if twice:
        raise ThroughtimeError(f"two of the cells are called {twice[0]}; rename one, so that they can be told apart")
    return cells


def _find(name: str) -> Cell:
    if ":" not in name and name not in COMPARABLE:
        known = f"{', '.join(COMPARABLE)}, or module:name for a cell of your own"
        raise ThroughtimeError(f"no cell is called {name!r}; the cells are {known}")
    cell = find(name)
    if _projects(cell):
        raise ThroughtimeError(f"{name!r} projects its state, to a size that compare does not ask for; leave it out")
    return cell


def matched(cells: Sequence[Cell], architecture: Architecture, match: Match) -> list[Architecture]:
    """The architecture of each cell's model: the one given, or with the units that make the parameters agree best."""
    if match == "hidden":
        return [architecture] * len(cells)
    if match != "params":
        raise ThroughtimeError(f"match is {match!r}; it is 'hidden' or 'params'")
    wanted = max(parameters(cell, architecture) for cell in cells)
    return [_closest(cell, architecture, wanted) for cell in cells]


def _closest(cell: Cell, architecture: Architecture, wanted: int) -> Architecture:
    """The architecture, from this one's units up, whose parameters come closest to the number wanted."""

    def count(hidden_size: int) -> int:
        return parameters(cell, replace(architecture, hidden_size=hidden_size))

    high = architecture.hidden_size
    while count(high) < wanted:
        high *= 2
    reached = bisect_left(range(high), wanted, lo=architecture.hidden_size, key=count)
    near = (max(reached - 1, architecture.hidden_size), reached)
    return replace(architecture, hidden_size=min(near, key=lambda hidden_size: abs(count(hidden_size) - wanted)))


def parameters(cell: Cell, architecture: Architecture) -> int:
    """How many numbers such a model learns, embeddings and read-out included."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in architecture.task.model(cell, architecture).parameters())


def _trained(
    model: SequenceModel, data: Encoded, recipe: Recipe, seed: int, on_epoch: Callable[[], None] | None
) -> SeedResult:
    before = _reach_norms(model, data.train)
    losses, seconds, updates = [], [], 0
    for epoch in train(model, data.train, recipe, seed=seed):
        losses.append(epoch.loss)
        seconds.append(epoch.seconds)
        updates += epoch.updates
        if on_epoch is not None:
            on_epoch()
    tested = evaluate(model, data.test, data.encoder.codec)
    return SeedResult(tuple(losses), tuple(seconds), updates, tested, before, _reach_norms(model, data.train))


def _reach_norms(model: SequenceModel, part: Part) -> NDArray[np.float64]:
    """The gradient norms [lags, rows] of the loss at the last steps of training sequences."""
    longest = int(part.lengths.max())
    rows = min(len(part), max(1, REACH_STEPS // longest))
    batch = part.batch(torch.linspace(0, len(part) - 1, rows).long()).to(
        dtype=torch.float64
    )  # evenly: sequences may be sorted by class
    exact = copy.deepcopy(model).double()  # in float32, the gradient of a long sequence leaves the range too soon

    def summed_loss() -> Tensor:
        return model.task.losses(exact(batch), batch).at(batch.lengths - 1).sum()

    norms = gradient_norms(summed_loss)[0]
    beyond = np.full((longest - len(norms), norms.shape[1]), math.nan)
    return np.concatenate([norms, beyond])
