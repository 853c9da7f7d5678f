"""What a comparison says: its table, its findings in words, and the page that shows them."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Sequence
from enum import Enum
from importlib.metadata import version

import numpy as np
import torch

from throughtime.insight.reach import Reach
from throughtime.report import drawing
from throughtime.report.page import Chapter, Page, Picture, Table
from throughtime.runs.compare import CellResult, Comparison, Interval
from throughtime.tasks.encoding import Encoded
from throughtime.training.recipe import Recipe


class Told(Enum):
    """What the numbers answer."""

    YES = "yes"
    NO = "no"
    OPEN = "cannot be told"
    NOT_ASKED = "not asked"


def page(comparison: Comparison, command: str) -> Page:
    """The report of a comparison that `command` made."""
    return Page(
        title=f"throughtime compare: {comparison.data.name}",
        verdict=headline(comparison),
        findings=findings(comparison),
        chapters=[
            Chapter("In numbers", table=table(comparison)),
            Chapter("In pictures", pictures=pictures(comparison)),
        ],
        facts=facts(comparison, command),
        notices=comparison.data.notices,
    )


def headline(comparison: Comparison) -> str:
    """Who learns it best, in one line."""
    level, best, name = comparison.level, comparison.best, comparison.data.name
    right = _reached(comparison, best.score.estimate)
    if not comparison.learnt:
        return f"No cell learns {name} better than a constant answer: {best.name} comes to {right}"
    if len(comparison.cells) == 1:
        return f"{best.name} learns {name}: {right}"
    if comparison.seeds == 1:
        return f"{best.name} leads on {name}, {right}; one seed cannot tell whether that holds"
    if len(level) == 1:
        return f"{best.name} learns {name} best: {right}"
    worst = min(cell.score.estimate for cell in level)
    epochs = {cell: cell.epochs_to(comparison.slowest.loss) for cell in level}
    quickest = [cell.name for cell in level if epochs[cell] == min(epochs.values())]
    first = "" if len(quickest) == len(level) else f"; {_listing(quickest)} in the fewest epochs"
    names, scores = _listing([cell.name for cell in level]), f"{comparison.data.task.shown(worst)} to {right}{first}"
    if all(Interval.between(best.scores, cell.scores).high <= comparison.data.task.almost for cell in level):
        return f"{names} learn {name} almost equally well: {scores}"
    return f"{names} cannot be told apart on {name} over {comparison.seeds} seeds: {scores}"


def findings(comparison: Comparison) -> list[str]:
    """What lies behind the headline, a paragraph each: reach, pace, baselines, cost; last, the lecture's claim."""
    several = len(comparison.cells) > 1
    pace = [_pace(comparison)] if several and comparison.learnt else []
    cost = [_cost(comparison)] if several else []
    return [_reach(comparison), *pace, _baselines(comparison), *cost, claim(comparison)]


def table(comparison: Comparison) -> Table:
    """One row for each cell, and one for each baseline."""
    task = comparison.data.task
    rows = [
        (
            cell.name,
            str(cell.hidden_size),
            f"{cell.parameters:,}",
            _seconds(cell.seconds_per_epoch),
            task.shown(cell.score.estimate, cell.score.half),
            _half_life(cell.reach_after),
        )
        for cell in comparison.cells
    ]
    simple = [(base.name, "–", "–", "–", task.shown(base.score), "–") for base in comparison.baselines]
    return Table(
        header=("cell", "units", "parameters", "seconds per epoch", f"test {task.metric}", "gradient's half-life"),
        rows=(*rows, *simple),
        note="Seconds per epoch: the median, first epochs left out."
        f" Test {task.metric}: share of test {_counted(comparison)} {task.measure}, mean and 95% interval over"
        f" n = {comparison.seeds} seeds (Student's t)."
        " Half-life: steps in which the trained network's gradient halves, going back.",
        baselines=len(simple),
    )


def claim(comparison: Comparison) -> str:
    """One sentence on what the lecture says of the GRU beside the LSTM, with this comparison's own numbers.

    Speed and quality are answered where their 95 % intervals lie on one side, and are open where they do not.
    """
    gru, lstm = comparison.cell("GRU"), comparison.cell("LSTM")
    what = f"The lecture's claim about the GRU beside the LSTM, put to {comparison.data.name},"
    if gru is None or lstm is None:
        return f"{what} wants both of them compared: fewer parameters, faster, almost the same quality."
    answers = {
        "fewer parameters": _fewer(comparison, gru, lstm),
        "faster": _faster(gru, lstm),
        "almost the same quality": _almost(comparison, gru, lstm),
    }
    verdicts = {verdict for verdict, _ in answers.values()}
    whole = "fails" if Told.NO in verdicts else "stays open" if Told.OPEN in verdicts else "holds"
    limited = " as far as asked" if Told.NOT_ASKED in verdicts else ""
    parts = [f"{part}, {verdict.value} ({numbers})" for part, (verdict, numbers) in answers.items()]
    return f"{what} {whole}{limited}: {'; '.join(parts)}."


def _fewer(comparison: Comparison, gru: CellResult, lstm: CellResult) -> tuple[Told, str]:
    counts = f"{gru.parameters:,} against {lstm.parameters:,}"
    if comparison.match == "params":
        return Told.NOT_ASKED, f"{counts}, made alike by {gru.hidden_size} units against {lstm.hidden_size}"
    return Told.YES if gru.parameters < lstm.parameters else Told.NO, counts


def _faster(gru: CellResult, lstm: CellResult) -> tuple[Told, str]:
    """By the logarithm of the seconds per epoch, so that twice as long and half as long weigh the same."""
    if math.isnan(gru.seconds_per_epoch):
        return Told.OPEN, "a run's first epoch is not timed, and there was no other"
    times = [[math.log(run.seconds_per_epoch) for run in cell.runs] for cell in (gru, lstm)]
    lead = Interval.between(*times)
    seconds = f"{_seconds(gru.seconds_per_epoch)} s an epoch against {_seconds(lstm.seconds_per_epoch)} s"
    if math.isnan(lead.half):
        return Told.OPEN, f"{seconds}, over one seed"
    ratio, low, high = (math.exp(value) for value in (lead.estimate, lead.low, lead.high))
    verdict = Told.OPEN if not lead.excludes(0) else Told.YES if ratio < 1 else Told.NO
    return verdict, f"{seconds}, {ratio:.2f} times as long, 95% interval {low:.2f} to {high:.2f}"


def _almost(comparison: Comparison, gru: CellResult, lstm: CellResult) -> tuple[Told, str]:
    lead, almost = Interval.between(gru.scores, lstm.scores), comparison.data.task.almost
    scores = f"{_reached(comparison, gru.score.estimate)} against {comparison.data.task.shown(lstm.score.estimate)}"
    if math.isnan(lead.half):
        return Told.OPEN, f"{scores}, over one seed"
    points = f"{100 * lead.estimate:+.1f} points, 95% interval {100 * lead.low:+.1f} to {100 * lead.high:+.1f}"
    said = f"{scores}, {points} over n = {lead.n} seeds each; up to {100 * almost:g} point below counts as almost"
    if not comparison.learnt:
        return Told.OPEN, f"{said}, but no cell beats a constant answer here"
    return Told.YES if lead.low >= -almost else Told.NO if lead.high < -almost else Told.OPEN, said


def pictures(comparison: Comparison) -> list[Picture]:
    """Accuracy, learning curves, reach, and what the best cell takes for what."""
    cells, best = comparison.cells, comparison.best
    median, longest = comparison.lags
    return [
        Picture(
            "Reach: the gradient on its way back",
            drawing.reach(
                [drawing.Line(cell.name, cell.reach_after.share, cell.reach_before.share) for cell in cells],
                {"median": median, "longest": longest} if longest > median else {"median": median},
                xlabel="steps before the end of the sequence",
                ylabel="gradient left",
            ),
            "How much of the loss's gradient is left at the state k steps before the end, as a share of that at the"
            " last step: geometric mean over training sequences and seeds. A straight line halves at a steady pace;"
            " the longest lags rest on few sequences.",
            "Gradient left by steps before the end, on a logarithmic axis. Trained, it "
            + _each(comparison, lambda cell: cell.reach_after.pace),
        ),
        Picture(
            "How fast it is learnt",
            drawing.curves(
                {cell.name: np.array([run.losses for run in cell.runs]) for cell in cells},
                f"training loss per {comparison.data.task.words.each}",
                log=True,
            ),
            "Cross entropy in nats, averaged over each epoch. Faint: every seed; bold: their mean.",
            "Training loss by epoch. At the end: " + _each(comparison, lambda cell: f"{cell.loss:.2g}"),
        ),
        Picture(
            "How well it is learnt",
            drawing.accuracy(
                {cell.name: cell.scores for cell in cells},
                comparison.baseline.score,
                called=comparison.baseline.name,
                counted=_counted(comparison),
            ),
            f"Test {comparison.data.task.metric} after the last epoch: every seed a mark, their mean a bar. One of the"
            f" {comparison.counted:,} test {_counted(comparison)} is {_percent(1 / comparison.counted)}.",
            f"Test {comparison.data.task.metric} by cell: "
            + _each(comparison, lambda cell: comparison.data.task.shown(cell.score.estimate)),
        ),
        *best.tested.pictures(
            f"What {best.name} takes for what",
            f"Test {_counted(comparison)} in per cent of their true class (row), over all seeds.",
            f"Confusion matrix of {best.name}, which gets {_reached(comparison, best.score.estimate)}",
        ),
    ]


def facts(comparison: Comparison, command: str) -> dict[str, str]:
    """How it was run: enough to run it again."""
    data, recipe = comparison.data, comparison.recipe
    lengths = torch.cat([data.train.lengths, data.test.lengths])
    shortest, longest = int(lengths.min()), int(lengths.max())
    steps = f"{longest}" if shortest == longest else f"{shortest} to {longest}"
    return {
        "command": command,
        "data": f"{data.source}: {len(data.train)} training and {len(data.test)} test sequences of {steps} steps,"
        f" {_inputs(data)}, {data.encoder.codec.summary}",
        "split": data.split
        + "; features scaled by the mean and deviation of the training part" * bool(data.encoder.features),
        "networks": _networks(comparison),
        "training": f"{_recipe(recipe)}; the same for every cell: {comparison.updates:,} updates",
        "seeds": f"0 to {comparison.seeds - 1}, for weights and order; the same test part throughout, used for"
        " nothing but these figures",
        "versions": f"throughtime {version('throughtime')}, torch {torch.__version__}, NumPy {np.__version__},"
        f" Python {platform.python_version()}; threads: {comparison.threads}",
    }


def _inputs(data: Encoded) -> str:
    numbers = [f"{len(data.encoder.features)} features"] if data.encoder.features else []
    symbols = [
        f"{len(vocabulary)} symbols in {column!r}"
        for column, vocabulary in zip(data.encoder.symbol_columns, data.encoder.vocabularies, strict=True)
    ]
    return ", ".join(numbers + symbols)


def _recipe(recipe: Recipe) -> str:
    if recipe.clip is None:
        clip = "no clipping"
    elif recipe.clip == "auto":
        clip = "gradient norms clipped at twice the 90th percentile of their own network's"
    else:
        clip = f"gradient norms clipped at {recipe.clip:g}"
    decay = "no" if recipe.decay == "none" else recipe.decay
    accumulated = f" of {recipe.accumulate} batches each" if recipe.accumulate > 1 else ""
    return (
        f"AdamW, learning rate {recipe.learning_rate:g} with {recipe.warmup:.0%} of warm-up and {decay} decay,"
        f" weight decay {recipe.weight_decay:g}, {recipe.epochs} epochs, batches of {recipe.batch_size}{accumulated},"
        f" {clip}, no early stopping"
    )


def _networks(comparison: Comparison) -> str:
    read_out = comparison.data.task.words.read_out
    if comparison.match == "hidden":
        return f"one layer of {comparison.hidden_size} units, read out {read_out}"
    units = _listing([f"{cell.hidden_size} ({cell.name}, {cell.parameters:,})" for cell in comparison.cells])
    return f"one layer, read out {read_out}, its units chosen to make the parameters alike: {units}"


def _reach(comparison: Comparison) -> str:
    median, longest = comparison.lags
    fading = all(cell.reach_after.half_life > 0 and not cell.reach_after.hardly_changes for cell in comparison.cells)
    if fading:
        paces = "halves every " + _each(comparison, lambda cell: f"{cell.reach_after.half_life:.1f} steps")
    else:
        paces = _each(comparison, lambda cell: cell.reach_after.pace)
    shares = _each(comparison, lambda cell: _percent(_left(cell, median)))
    verb = comparison.data.task.words.spans
    needs = f"{verb} {median} steps and the longest {longest}" if longest > median else f"{verb} {median} steps"
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


def _baselines(comparison: Comparison) -> str:
    task = comparison.data.task
    simple = _listing([f"{base.name} gets {task.shown(base.score)}" for base in comparison.baselines])
    without = f"Without any recurrence, {simple} {task.measure}."
    if comparison.learnt and not comparison.beats(comparison.baseline):
        without += (
            f" On {comparison.counted:,} test {_counted(comparison)} no cell is clearly better than the best of these,"
            " by two standard errors."
        )
    if comparison.seeds == 1 or len(comparison.cells) == 1 or not comparison.learnt:
        return without
    return (
        f"{without} A cell whose difference to the best has a 95% interval that holds zero, over n ="
        f" {comparison.seeds} seeds each (Student's t after Welch), counts as its equal; so does any that is better."
    )


def _cost(comparison: Comparison) -> str:
    smallest = min(comparison.cells, key=lambda cell: cell.parameters)
    largest = max(comparison.cells, key=lambda cell: cell.parameters)
    size = f"{largest.name} has {largest.parameters / smallest.parameters:.1f} times the parameters of {smallest.name}"
    if comparison.match == "params":
        size = f"Parameters are alike, {smallest.parameters:,} to {largest.parameters:,}"
    quickest = min(comparison.cells, key=lambda cell: cell.seconds_per_epoch)
    longest = max(comparison.cells, key=lambda cell: cell.seconds_per_epoch)
    if math.isnan(longest.seconds_per_epoch):
        return f"{size}; what an epoch costs is not known, for the first of a run is not timed."
    pace = longest.seconds_per_epoch / quickest.seconds_per_epoch
    return f"{size}; an epoch of {longest.name} takes {pace:.1f} times as long as one of {quickest.name}."


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


def _reached(comparison: Comparison, score: float) -> str:
    """ "93.8% right"."""
    return f"{comparison.data.task.shown(score)} {comparison.data.task.measure}"


def _seconds(seconds: float) -> str:
    return "–" if math.isnan(seconds) else f"{seconds:.3f}"


def _counted(comparison: Comparison) -> str:
    return comparison.data.task.words.unit


def _percent(share: float) -> str:
    if 0 < share < 1e-4:
        return "under 0.01%"
    return f"{100 * share:.1f}%" if share >= 0.1 else f"{100 * share:.2g}%"


def _each(comparison: Comparison, say: Callable[[CellResult], str]) -> str:
    """ "2.0 in Elman, 5.9 in GRU and 3.4 in LSTM"."""
    return _listing([f"{say(cell)} in {cell.name}" for cell in comparison.cells])


def _listing(texts: Sequence[str]) -> str:
    return " and ".join([", ".join(texts[:-1]), texts[-1]] if len(texts) > 1 else texts)
