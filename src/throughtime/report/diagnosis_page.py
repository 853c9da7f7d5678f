"""A diagnosis as a page: its verdict and remedies, then a chapter for each thing seen, in tables and pictures."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from throughtime.insight.diagnosis import Diagnosis, Seen, distance
from throughtime.insight.dynamics import Dynamics
from throughtime.insight.pairs import Pairs
from throughtime.insight.reach import LayerReach, Reach
from throughtime.insight.rehearsal import Place
from throughtime.report import drawing
from throughtime.report.drawing import Line
from throughtime.report.page import Chapter, Page, Picture, Table
from throughtime.report.verdict import (
    SUPERSCRIPT,
    amount,
    findings,
    headline,
    listing,
    place_name,
    remedies,
    shares_by_lag,
)

MOST = 6
"""Pictures of one kind; what is left out is said."""

MOST_LAYERS = 4
"""Layers and directions whose dynamics are drawn; what is left out is said."""

MOST_POINTS = 3
"""Fixed and slow points in one picture, the slowest ones; what is left out is said."""


def page(diagnosis: Diagnosis, *, title: str, facts: Mapping[str, str], notices: Sequence[str] = ()) -> Page:
    """The whole report. `facts` say how it was made; what was measured on is added to them."""
    return Page(
        title=title,
        verdict=headline(diagnosis),
        findings=findings(diagnosis),
        remedies=remedies(diagnosis),
        chapters=chapters(diagnosis),
        facts={**facts, "measured": _measured(diagnosis)},
        notices=notices,
    )


def chapters(diagnosis: Diagnosis) -> list[Chapter]:
    """Reach, pairs of times, dynamics, gates and training: those that there is something to show of."""
    found = [_reach(diagnosis), _pairs(diagnosis), _dynamics(diagnosis), _gates(diagnosis), _training(diagnosis)]
    return [chapter for chapter in found if chapter.pictures or chapter.table]


def _measured(diagnosis: Diagnosis) -> str:
    return "; ".join(dict.fromkeys(found.measured for found in diagnosis.now.reach)) + "; in float64, without dropout"


NAMES = {"weight_ih": "W, times the input", "weight_hh": "U, times the state", "weight_hr": "P, the projection"}

SHORT = 3
"""Steps that count as near in the description of a picture."""


# Reach


def _reach(diagnosis: Diagnosis) -> Chapter:
    backward = _lines(diagnosis, lambda found: found.gradient)
    forward = _lines(diagnosis, lambda found: found.inputs)
    limits = drawing.common_limits([*backward, *forward])
    needed = {} if diagnosis.needs is None else {"needed": diagnosis.needs}
    now = diagnosis.now
    lost = now.farthest.threshold
    pictures = [
        Picture(
            "Backward: the gradient on its way back",
            drawing.reach(
                backward, needed, xlabel="steps back from the loss", ylabel="gradient left", lost=lost, limits=limits
            ),
            "Norm of dL/dh, k steps before the loss, as a share of that at the loss: geometric mean over sequences and"
            " times. A straight line loses the same share at every step; in the grey, under "
            f"{amount(lost)}, next to nothing arrives. The longest lags rest on few sequences.",
            "Gradient left by steps back, on a logarithmic axis: "
            + listing([f"{found.gradient.pace} in {place_name(found.place, diagnosis)}" for found in now.reach]),
        ),
        Picture(
            "Forward: an input on its way on",
            drawing.reach(
                forward, needed, xlabel="steps after the input", ylabel="influence left", lost=lost, limits=limits
            ),
            "Norm of dh/dx for the input k steps ago, as a share of that of the input just read: the same product of"
            " Jacobians from the other end, on the same axes.",
            "Influence of an input left by steps since, on a logarithmic axis: "
            + listing([f"{found.inputs.pace} in {place_name(found.place, diagnosis)}" for found in now.reach]),
        ),
    ]
    if diagnosis.trials and diagnosis.before is not None:
        pictures.append(_trials(diagnosis, diagnosis.before, needed))
    return Chapter("How far it reaches", table=_table(diagnosis), pictures=pictures)


def _lines(diagnosis: Diagnosis, of: Callable[[LayerReach], Reach]) -> list[Line]:
    """Each place's line, with the untrained network's beside it where there are both."""
    early = {} if diagnosis.before is None or diagnosis.after is None else _by_place(diagnosis.before)
    lines = []
    for found in diagnosis.now.reach:
        before = early.get(found.place)
        name = _line_name(diagnosis, found.place)
        lines.append(Line(name, of(found).share, None if before is None else of(before).share))
    return lines


def _line_name(diagnosis: Diagnosis, place: Place) -> str:
    """What tells a line from the others: the place where there are several, else the stage."""
    if len(diagnosis.now.reach) > 1:
        return place_name(place, diagnosis)
    return "before training" if diagnosis.after is None else "after training"


def _by_place(seen: Seen) -> dict[Place, LayerReach]:
    return {found.place: found for found in seen.reach}


def _trials(diagnosis: Diagnosis, before: Seen, needed: Mapping[str, int]) -> Picture:
    best = sorted(diagnosis.trials, key=lambda trial: distance(trial.farthest), reverse=True)
    drawn = best[: len(drawing.COLOURS) - 1]
    shown = {"as it was": before.farthest, **{trial.name: trial.farthest for trial in drawn}}
    left_out = [trial.name for trial in best if trial not in drawn]
    return Picture(
        "Before training: what would change it",
        drawing.reach(
            [Line(name, found.gradient.share) for name, found in shown.items()],
            needed,
            xlabel="steps back from the loss",
            ylabel="gradient left",
            lost=before.farthest.threshold,
        ),
        "The untrained network, and the same with one thing changed, each measured on these sequences. Reach before"
        " training is where learning starts from, not where it ends."
        + (f" Not drawn, for they reach least: {listing(left_out)}." if left_out else ""),
        "Gradient left by steps back: " + listing([f"{found.gradient.pace} {name}" for name, found in shown.items()]),
    )


def _table(diagnosis: Diagnosis) -> Table:
    stages = {"untrained": diagnosis.before, "trained": diagnosis.after}
    rows = []
    for place in (found.place for found in diagnosis.now.reach):
        for stage, seen in stages.items():
            found = None if seen is None else _by_place(seen).get(place)
            if found is not None:
                rows.append(_row(_row_name(diagnosis, place, stage), found))
    needs = diagnosis.needs
    left = "left at the end" if needs is None else f"left over {needs}"
    return Table(
        ("", "gradient", left, f"under {amount(diagnosis.now.farthest.threshold)} after", "input's influence"),
        tuple(rows),
        "Steps in which the loss's gradient halves or doubles going back; what is left of it over the steps that are"
        " needed; the steps after which next to nothing is left; steps in which an input's influence halves.",
    )


def _row_name(diagnosis: Diagnosis, place: Place, stage: str) -> str:
    """What tells a row from the others: the place where there are several, the stage where there are two."""
    several, both = len(diagnosis.now.reach) > 1, diagnosis.before is not None and diagnosis.after is not None
    if not several:
        return stage
    return f"{place_name(place, diagnosis)}, {stage}" if both else place_name(place, diagnosis)


def _row(name: str, found: LayerReach) -> tuple[str, ...]:
    last = len(found.gradient.share) - 1
    left = found.gradient.at(last) if found.needs is None else found.at_needs
    return (
        name,
        _pace(found.gradient),
        "–" if math.isnan(left) else amount(left),
        "never" if found.lost_at is None else f"{found.lost_at}",
        _pace(found.inputs),
    )


def _pace(found: Reach) -> str:
    if math.isnan(found.half_life):
        return "–"
    if found.hardly_changes:
        return "lasts"
    return f"{'halves' if found.half_life > 0 else 'doubles'} in {abs(found.half_life):.3g}"


# Pairs


def _pairs(diagnosis: Diagnosis) -> Chapter:
    shown = [found for found in diagnosis.now.pairs if not found.scalar][:MOST]
    pictures = [_heat_map(diagnosis, found) for found in shown]
    pictures += [_uses(diagnosis, found) for found in diagnosis.now.pairs[:MOST]]
    words = [diagnosis.asked] if diagnosis.asked and shown else []
    if (left_out := len(diagnosis.now.pairs) - MOST) > 0:
        words.append(f"The first {MOST} layers and directions are drawn, {left_out} left out.")
    return Chapter("Which step hears which", words, pictures=pictures)


def _heat_map(diagnosis: Diagnosis, found: Pairs) -> Picture:
    triangle = "upper" if found.place.reverse else "lower"
    return Picture(
        f"Loss against state{_of_place(diagnosis, found.place)}",
        drawing.pairs(_relative(_square(found)), "share of what the own step gets"),
        "The terms of the double sum of back-propagation through time: the norm of dL/dh for the loss at step i and the"
        " state at step k, as a share of that at step i itself, in powers of ten, over all sequences together, so that"
        " the steepest weigh most. The longer a row stays dark, the farther that loss reaches; grey is exactly zero."
        + (" Through a layer that reads the other way, a loss reaches later states too." if _both_sides(found) else "")
        + (f" {found.width} losses share a row." if found.width > 1 else ""),
        f"Heat map, a {triangle} triangle: gradient of the loss at step i (down) at the state at step k (across);"
        f" {_diagonal(found)}",
    )


def _square(found: Pairs) -> np.ndarray:
    """The norms [T, T], a row for every step, NaN where there is none."""
    steps = found.norms.shape[1]
    rows = np.full((steps, steps), math.nan)
    for first, norms in zip(found.losses, found.norms, strict=True):
        rows[first : first + found.width] = norms
    beyond = np.subtract.outer(np.arange(steps), np.arange(steps)) * (-1 if found.place.reverse else 1) < 0
    return np.where(beyond & (rows == 0), math.nan, rows)


def _both_sides(found: Pairs) -> bool:
    """Whether a loss also reaches states after it, as it does through a layer above that reads the other way."""
    square = _square(found)
    beyond = np.tril(square, -1) if found.place.reverse else np.triu(square, 1)
    return bool((np.nan_to_num(beyond) > 0).any())


def _relative(square: np.ndarray) -> np.ndarray:
    """Each loss's norms as shares of that at its own step; a loss that reaches nothing keeps its zeros."""
    own = np.diag(square)[:, None]
    return np.divide(square, own, out=square.copy(), where=own > 0)


def _diagonal(found: Pairs) -> str:
    """How the norms fade away from the diagonal, for those who cannot see it."""
    square = _square(found)
    middle = len(square) // 2
    way = square[middle, middle:] if found.place.reverse else square[middle, middle::-1]
    far = int(np.flatnonzero(way > 0).max(initial=0))
    if not way[0] > 0:
        return "the middle row is empty"
    return (
        f"in the row of step {middle + 1}, {amount(way[far] / way[0])} of what the state at that step gets is left"
        f" {_steps(far)} away"
    )


def _uses(diagnosis: Diagnosis, found: Pairs) -> Picture:
    by_lag = shares_by_lag(found)
    uses = {NAMES.get(name, name): shares for name, shares in (by_lag or found.by_use).items()}
    ways = "steps between a loss and the use of the weight" if by_lag else "step at which the weight was used"
    ends = {name: shares[: SHORT + 1].sum() if by_lag else shares[-SHORT - 1 :].sum() for name, shares in uses.items()}
    near = f"up to {SHORT} steps before a loss" if by_lag else f"the last {SHORT + 1} steps"
    return Picture(
        f"What taught the weights{_of_place(diagnosis, found.place)}",
        drawing.shares(uses, ways, first=0 if by_lag else 1),
        "Share of the weights' whole gradient, dL/dW and dL/dU, that was carried by their use"
        f" {'so many steps before a loss' if by_lag else 'at each step'}. Shares have signs: one use can pull against"
        " the others; all of a weight's add up to 100%.",
        "Share of the gradient: "
        + listing([f"{100 * share:.0f}% of {name} from {near}" for name, share in ends.items()]),
    )


def _of_place(diagnosis: Diagnosis, place: Place) -> str:
    return f": {place_name(place, diagnosis)}" if len(diagnosis.now.reach) > 1 else ""


# Dynamics


def _dynamics(diagnosis: Diagnosis) -> Chapter:
    shown = diagnosis.now.dynamics[:MOST_LAYERS]
    pictures = [_singular_values(diagnosis, place, found) for place, found in shown]
    if diagnosis.now.dynamics:
        pictures += [_exponents(diagnosis), *_eigenvalues(diagnosis)]
    words = []
    if (left_out := len(diagnosis.now.dynamics) - len(shown)) > 0:
        words.append(f"Singular values of the first {len(shown)} layers and directions are drawn, {left_out} left out.")
    return Chapter("One step, over and over", words, pictures=pictures)


def _singular_values(diagnosis: Diagnosis, place: Place, found: Dynamics) -> Picture:
    top = found.log_singular_values[:, 0]
    peak = int(np.nanargmax(top))
    said = (
        f"The largest is {_exp(top[peak])} over {_steps(found.lags[peak])} and {_exp(top[-1])} over {found.lags[-1]}."
    )
    return Picture(
        f"Singular values of k steps{_of_place(diagnosis, place)}",
        drawing.singular_values(found.lags, found.log_singular_values),
        "How much k steps stretch (above 1) or shrink a small change of the state, by its direction: the Jacobian over"
        f" the last k steps, geometric means over {found.rows} sequences. {said} The spectral radius of one step tells"
        " none of this: it does not bound what happens on the way.",
        f"Singular values by lag on a logarithmic axis. {said}",
    )


def _steps(count: int) -> str:
    return f"{count} step{'' if count == 1 else 's'}"


def _exp(log: float) -> str:
    """exp(log) in words, also beyond the range of floats."""
    if -7 < log < 9:
        return f"{math.exp(log):.2g}" if log < 4 else f"{math.exp(log):.0f}"
    return f"10{str(round(log / math.log(10))).translate(SUPERSCRIPT)}" if math.isfinite(log) else "0"


def _exponents(diagnosis: Diagnosis) -> Picture:
    early = {} if diagnosis.before is None or diagnosis.after is None else dict(diagnosis.before.dynamics)
    lines = []
    for place, found in diagnosis.now.dynamics:
        before = early.get(place)
        name = _line_name(diagnosis, place)
        lines.append(Line(name, found.exponents, None if before is None else before.exponents))
    found = diagnosis.now.dynamics[0][1]
    return Picture(
        "Lyapunov exponents",
        drawing.exponents(lines),
        f"How fast small changes grow (above 0) or fade, in nats a step, in the {len(found.exponents)} slowest-fading"
        f" directions: means over {found.steps} steps of {found.rows} sequences. An exponent of -0.1 halves in 6.9"
        " steps.",
        "Lyapunov spectrum; the largest: " + listing([f"{float(line.values[0]):.3g} {line.name}" for line in lines]),
    )


def _eigenvalues(diagnosis: Diagnosis) -> Iterator[Picture]:
    for place, found in diagnosis.now.dynamics[:MOST_LAYERS]:
        if not found.fixed_points:
            continue
        points = {}
        for number, point in enumerate(found.fixed_points[:MOST_POINTS], start=1):
            kind = f"fixed, {point.kind}" if point.is_fixed else f"slow, {point.kind}"
            points[f"point {number}: {kind}"] = point.eigenvalues
        more = len(found.fixed_points) - len(points)
        left_out = f" {more} faster point{'s were' if more > 1 else ' was'} found and not drawn." if more else ""
        yield Picture(
            f"Where it would rest{_of_place(diagnosis, place)}",
            drawing.eigenvalues(points),
            "Eigenvalues of the step Jacobian at the states that a constant mean input leaves where they are (fixed) or"
            " nearly (slow). Inside the circle a direction fades, outside it grows, away from the axis it turns."
            + left_out,
            "Eigenvalues in the complex plane with the unit circle: "
            + listing([f"largest modulus {np.abs(values).max():.3g} at {name}" for name, values in points.items()]),
        )


# Gates


def _gates(diagnosis: Diagnosis) -> Chapter:
    seen, pictures = diagnosis.now, []
    bars = {
        f"{place_name(found.place, diagnosis)}, {gate.name}" if len(seen.gates) > 1 else gate.name: (
            float(gate.low.mean()),
            float(gate.high.mean()),
        )
        for found in seen.gates
        for gate in found.gates
    }
    if bars:
        pictures.append(
            Picture(
                "Gates at their ends",
                drawing.saturation(bars),
                "Share of units and steps at which a gate is within 0.05 of an end of its range. A sigmoid's low end is"
                " shut and its high end open; a tanh's are -1 and 1; a relu's low end is 0. At an end the slope is next"
                " to nothing.",
                "Saturation: "
                + listing([f"{name} low {amount(low)}, high {amount(high)}" for name, (low, high) in bars.items()]),
            )
        )
    if lines := _memories(diagnosis):
        pictures.append(
            Picture(
                "Memory of the units",
                drawing.memory(lines, diagnosis.needs),
                "Steps for which each unit holds what it has along its direct path, -1 / mean(ln kept), past every"
                " matrix; it halves in 0.69 times as many. Units that keep everything or nothing are off the axis.",
                "Memory in steps, sorted: "
                + listing([f"median {float(np.median(line.values)):.3g} of {line.name}" for line in lines]),
            )
        )
    dead = sum(len(found.dead) for found in seen.gates)
    words = [f"{dead} of {sum(found.units for found in seen.gates)} units have one value throughout."] if dead else []
    return Chapter("Gates and memory", words, pictures=pictures)


def _memories(diagnosis: Diagnosis) -> list[Line]:
    """The memory of each state's units, with the untrained network's beside it where there are both."""
    early = {}
    if diagnosis.before is not None and diagnosis.after is not None:
        early = {(found.place, one.state): one.steps for found in diagnosis.before.gates for one in found.memories}
    lines = []
    for found in diagnosis.now.gates:
        for one in found.memories:
            where = f"{place_name(found.place, diagnosis)}, " if len(diagnosis.now.gates) > 1 else ""
            lines.append(Line(f"{where}{one.state} by {one.kept}", one.steps, early.get((found.place, one.state))))
    return lines


# Training


def _training(diagnosis: Diagnosis) -> Chapter:
    training = diagnosis.history
    if training is None:
        return Chapter("In training")
    pictures = []
    if np.isfinite(training.losses).any():
        pictures.append(
            Picture(
                "Loss",
                drawing.training({"training": training.losses}, "loss", log=True),
                "Cross entropy in nats, averaged over each epoch.",
                f"Training loss by epoch: {training.losses[0]:.3g} in the first, {training.losses[-1]:.3g} in the last",
            )
        )
    if np.isfinite(training.norms).any():
        series = {"median norm": training.norms}
        if np.isfinite(training.thresholds).any():
            series["clipped above"] = training.thresholds
        pictures.append(
            Picture(
                "Norm of the gradients",
                drawing.training(series, "norm of all gradients", log=True),
                "Norm of all gradients together before clipping, the median of each epoch's updates. Such norms are"
                " sums over all lags: the nearest steps hide whether the far ones get anything.",
                f"Median gradient norm by epoch: {training.norms[0]:.3g} in the first, {training.norms[-1]:.3g} in the"
                " last",
            )
        )
    if np.isfinite(training.clip_rates).any() and np.nanmax(training.clip_rates) > 0:
        pictures.append(
            Picture(
                "Updates clipped",
                drawing.training({"clipped": 100 * training.clip_rates}, "updates clipped, %", log=False),
                "Share of each epoch's updates that clipping changed.",
                f"Share of updates clipped by epoch, {100 * float(np.nanmean(training.clip_rates)):.2g}% on average",
            )
        )
    return Chapter("In training", pictures=pictures)
