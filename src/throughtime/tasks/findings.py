"""What a comparison says: its table, its findings in words, and the page that shows them."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Sequence
from importlib.metadata import version

import numpy as np
import torch

from throughtime.insight import report
from throughtime.insight.reach import Reach
from throughtime.insight.report import Page, Picture, Table
from throughtime.tasks.compare import CellResult, Comparison


def page(comparison: Comparison, command: str) -> Page:
    """The report of a comparison that `command` made."""
    return Page(
        title=f"throughtime compare: {comparison.task.name}",
        verdict=headline(comparison),
        findings=findings(comparison),
        table=table(comparison),
        pictures=pictures(comparison),
        facts=facts(comparison, command),
        notices=comparison.task.notices,
    )


def headline(comparison: Comparison) -> str:
    """Who learns it best, in one line."""
    level, best, name = comparison.level, comparison.best, comparison.task.name
    right = f"{_percent(best.accuracy)} right"
    if not comparison.learnt:
        return f"No cell learns {name} better than a constant answer: {best.name} comes to {right}"
    if len(comparison.cells) == 1:
        return f"{best.name} learns {name}: {right}"
    if comparison.seeds == 1:
        return f"{best.name} leads on {name}, {right}; one seed cannot tell whether that holds"
    if len(level) == 1:
        return f"{best.name} learns {name} best: {right}"
    worst = min(cell.accuracy for cell in level)
    epochs = {cell: cell.epochs_to(comparison.slowest.loss) for cell in level}
    quickest = [cell.name for cell in level if epochs[cell] == min(epochs.values())]
    first = "" if len(quickest) == len(level) else f"; {_listing(quickest)} in the fewest epochs"
    return f"{_listing([cell.name for cell in level])} learn {name} equally well, {_percent(worst)} to {right}{first}"


def findings(comparison: Comparison) -> list[str]:
    """What lies behind the headline, a paragraph each: reach, pace and what reach explains of it, accuracy, cost."""
    several = len(comparison.cells) > 1
    pace = [_pace(comparison)] if several and comparison.learnt else []
    cost = [_cost(comparison)] if several else []
    return [_reach(comparison), *pace, _baseline(comparison), *cost]


def table(comparison: Comparison) -> Table:
    """One row for each cell, and one for the best constant answer."""
    label, share = comparison.baseline
    rows = [
        (
            cell.name,
            f"{cell.parameters:,}",
            f"{cell.seconds_per_epoch:.3f}",
            _accuracy(cell),
            _half_life(cell.reach_after),
        )
        for cell in comparison.cells
    ]
    return Table(
        header=("cell", "parameters", "seconds per epoch", "test accuracy", "gradient's half-life"),
        rows=(*rows, (f"always {label!r}", "0", "–", f"{100 * share:.1f}%", "–")),
        note="Seconds per epoch: the median, first epochs left out. Test accuracy: mean and standard deviation over"
        f" {comparison.seeds} seeds. Half-life: steps in which the trained network's gradient halves, going back.",
    )


def pictures(comparison: Comparison) -> list[Picture]:
    """Accuracy, learning curves, reach, and what the best cell takes for what."""
    cells, best = comparison.cells, comparison.best
    median, longest = comparison.lags
    return [
        Picture(
            "Reach: the gradient on its way back",
            report.draw_reach(
                {cell.name: (cell.reach_before, cell.reach_after) for cell in cells},
                {"median": median, "longest": longest} if longest > median else {"median": median},
            ),
            "How much of the loss's gradient is left at the state k steps before the end, as a share of that at the"
            " last step: geometric mean over training sequences and seeds. A straight line halves at a steady pace;"
            " the longest lags rest on few sequences.",
            "Gradient left by steps before the end, on a logarithmic axis. Trained, it "
            + _each(comparison, lambda cell: cell.reach_after.pace),
        ),
        Picture(
            "How fast it is learnt",
            report.draw_curves(
                {cell.name: np.array([run.losses for run in cell.runs]) for cell in cells},
                "training loss per sequence",
                log=True,
            ),
            "Cross entropy in nats, averaged over each epoch. Faint: every seed; bold: their mean.",
            "Training loss by epoch. At the end: " + _each(comparison, lambda cell: f"{cell.loss:.2g}"),
        ),
        Picture(
            "How well it is learnt",
            report.draw_accuracy({cell.name: cell.accuracies for cell in cells}, comparison.baseline[1]),
            f"Test accuracy after the last epoch: every seed a mark, their mean a bar. One of the"
            f" {len(comparison.task.test)} test sequences is {_percent(1 / len(comparison.task.test))}.",
            "Test accuracy by cell: " + _each(comparison, lambda cell: _percent(cell.accuracy)),
        ),
        Picture(
            f"What {best.name} takes for what",
            report.draw_confusion(comparison.confusion(best), comparison.task.vocabulary),
            "Test sequences in per cent of their true class (row), over all seeds.",
            f"Confusion matrix of {best.name}, which gets {_percent(best.accuracy)} right",
        ),
    ]


def facts(comparison: Comparison, command: str) -> dict[str, str]:
    """How it was run: enough to run it again."""
    task, recipe = comparison.task, comparison.recipe
    lengths = torch.cat([task.train.lengths, task.test.lengths])
    shortest, longest = int(lengths.min()), int(lengths.max())
    steps = f"{longest}" if shortest == longest else f"{shortest} to {longest}"
    return {
        "command": command,
        "data": f"{task.source}: {len(task.train)} training and {len(task.test)} test sequences of {steps} steps,"
        f" {len(task.features)} features, {len(task.vocabulary)} classes",
        "split": f"{task.split}; features scaled by the mean and deviation of the training part",
        "network": f"one layer of {comparison.hidden_size} units, read out at the last step",
        "training": f"Adam, learning rate {recipe.learning_rate:g}, {recipe.epochs} epochs, batches of"
        f" {recipe.batch_size}" + (f", gradient norm clipped at {recipe.clip:g}" if recipe.clip else ""),
        "seeds": f"0 to {comparison.seeds - 1}, for weights and order; the same test part throughout, used for"
        " nothing but these figures",
        "versions": f"throughtime {version('throughtime')}, torch {torch.__version__}, NumPy {np.__version__},"
        f" Python {platform.python_version()}; threads: {comparison.threads}",
    }


def _reach(comparison: Comparison) -> str:
    median, longest = comparison.lags
    fading = all(cell.reach_after.half_life > 0 and not cell.reach_after.hardly_changes for cell in comparison.cells)
    if fading:
        paces = "halves every " + _each(comparison, lambda cell: f"{cell.reach_after.half_life:.1f} steps")
    else:
        paces = _each(comparison, lambda cell: cell.reach_after.pace)
    shares = _each(comparison, lambda cell: _percent(_left(cell, median)))
    needs = f"needs {median} steps and the longest {longest}" if longest > median else f"needs {median} steps"
    return (
        f"On its way back from the last step, the gradient of the trained network {paces}. The median sequence {needs}:"
        f" the median sequence's first step gets {shares} of what its last step gets."
    )


def _pace(comparison: Comparison) -> str:
    """How soon each cell learns what the slowest one learns in the end, and whether reach goes with that."""
    slowest, median = comparison.slowest, comparison.lags[0]
    epochs = {cell: cell.epochs_to(slowest.loss) for cell in comparison.cells}
    sooner = _listing([f"{cell.name} has after {epochs[cell]}" for cell in comparison.cells if cell is not slowest])
    pace = f"The training loss that {slowest.name} ends with after {epochs[slowest]} epochs, {sooner}."
    farthest = max(comparison.cells, key=lambda cell: _left(cell, median))
    shortest = min(comparison.cells, key=lambda cell: _left(cell, median))
    ratio = _left(farthest, median) / _left(shortest, median) if _left(shortest, median) else math.inf
    if not 1.2 < ratio < math.inf:
        return pace
    times = f"that first step gets {ratio:.2g} times as large a share in {farthest.name} as in {shortest.name}"
    if epochs[farthest] >= epochs[shortest]:
        return f"{pace} Reach does not explain that: {times}."
    level = " In the end they are level: what tells these classes apart seems within the reach of each."
    return f"{pace} Reach goes with it: {times}.{level if len(comparison.level) == len(comparison.cells) else ''}"


def _baseline(comparison: Comparison) -> str:
    label, share = comparison.baseline
    constant = f"Always answering {label!r}, the commonest class of the test part, would get {_percent(share)} right."
    if comparison.seeds == 1 or len(comparison.cells) == 1 or not comparison.learnt:
        return constant
    return (
        f"{constant} Cells within two standard errors of the best, over {comparison.seeds} seeds, count as its equals."
    )


def _cost(comparison: Comparison) -> str:
    smallest = min(comparison.cells, key=lambda cell: cell.parameters)
    largest = max(comparison.cells, key=lambda cell: cell.parameters)
    size = largest.parameters / smallest.parameters
    pace = largest.seconds_per_epoch / smallest.seconds_per_epoch
    return (
        f"{largest.name} has {size:.1f} times the parameters of {smallest.name},"
        f" and an epoch of it takes {pace:.1f} times as long."
    )


def _left(cell: CellResult, lag: int) -> float:
    """What is left of the trained network's gradient at a lag; nothing where every row's is exactly zero."""
    share = float(cell.reach_after.share[lag])
    return 0.0 if math.isnan(share) else share


def _half_life(reach: Reach) -> str:
    if math.isnan(reach.half_life):
        return "–"
    if reach.hardly_changes:
        return "lasts"
    return f"{reach.half_life:.1f} steps" if reach.half_life > 0 else "grows"


def _accuracy(cell: CellResult) -> str:
    spread = "" if math.isnan(cell.spread) else f" ± {100 * cell.spread:.1f}"
    return f"{100 * cell.accuracy:.1f}{spread}%"


def _percent(share: float) -> str:
    if 0 < share < 1e-4:
        return "under 0.01%"
    return f"{100 * share:.1f}%" if share >= 0.1 else f"{100 * share:.2g}%"


def _each(comparison: Comparison, say: Callable[[CellResult], str]) -> str:
    """ "2.0 in Elman, 5.9 in GRU and 3.4 in LSTM"."""
    return _listing([f"{say(cell)} in {cell.name}" for cell in comparison.cells])


def _listing(texts: Sequence[str]) -> str:
    return " and ".join([", ".join(texts[:-1]), texts[-1]] if len(texts) > 1 else texts)
