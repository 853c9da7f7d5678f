"""A diagnosis in words: the headline, what it rests on, and the remedies that the numbers ask for, no others."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from statistics import median
from typing import TYPE_CHECKING

import numpy as np

from throughtime.insight.diagnosis import Diagnosis, Seen, Trial
from throughtime.insight.gates import Gate, Memory
from throughtime.insight.pairs import Pairs
from throughtime.insight.reach import LayerReach
from throughtime.insight.rehearsal import Place
from throughtime.report.page import Remedy

if TYPE_CHECKING:
    from numpy.typing import NDArray

EXPLODED = 1e3
"""A gradient that grows by more than this on its way back has exploded, as one under a thousandth has vanished."""

GROWN = 10.0
"""Growth from which clipping is worth its line."""

BETTER = 10.0
"""How many times more of the gradient a remedy has to leave, or at how many times the lag it has to lose it."""

MOST_TRIED = 4
"""So many of what was tried are named as remedies, those that help most; where none is enough, only the best."""

SATURATED = 0.5
"""A gate with more than this share of its activations at its ends hardly moves, and passes hardly any gradient."""

SPARE = 4
"""Truncation costs nothing to speak of where the sequences are this many times as long as the gradient lasts."""

SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def headline(diagnosis: Diagnosis) -> str:
    """The verdict in one sentence: whether the gradient arrives, before training and after."""
    cell, found = diagnosis.cell, diagnosis.now.farthest
    if _untold(found):
        return f"Whether {cell} reaches back {_steps(found.needs or 0)} cannot be told: no sequence here is so long"
    before = None if diagnosis.before is None else diagnosis.before.farthest
    if before is None or diagnosis.after is None:
        untrained = " before it has seen data" if diagnosis.after is None else ""
        if vanishes(found):
            return f"{cell} vanishes{untrained}: {_fading(found)}"
        if explodes(found):
            return f"{cell} explodes{untrained}: {_growing(found)}"
        return f"{cell} {'begins with reach' if untrained else 'reaches'}: {_reaching(found)}"
    if explodes(found):
        early = " before it has seen data, and still does" if explodes(before) else " once trained"
        return f"{cell} explodes{early}: {_growing(found)}"
    if vanishes(before) and vanishes(found):
        return f"{cell} vanishes before it has seen data, and training has not mended it: {_fading(found)}"
    if vanishes(before):
        return f"{cell} vanishes before it has seen data; trained, {_reaching(found)}"
    if vanishes(found):
        return f"Training has cost {cell} its reach: {_fading(found)}"
    return f"{cell} reaches: {_reaching(found)}"


def findings(diagnosis: Diagnosis) -> list[str]:
    """What lies behind the headline, a paragraph each: backward, forward, transients, gates, pairs, training."""
    said = [_backward(diagnosis), _forward(diagnosis.now), _long_run(diagnosis), _gates(diagnosis)]
    return [words for words in (*said, _uses(diagnosis), _training(diagnosis)) if words]


def remedies(diagnosis: Diagnosis) -> list[Remedy]:
    """What to do, the most useful first; nothing where the numbers ask for nothing."""
    stages = [seen for seen in (diagnosis.before, diagnosis.after) if seen is not None]
    named = list(_tried(diagnosis)) if any(ask_for_remedies(seen) for seen in stages) else []
    return [*named, *_clipping(diagnosis), *_truncation(diagnosis), *_saturation(diagnosis)]


def ask_for_remedies(seen: Seen) -> bool:
    """Whether the numbers ask for another beginning or cell: it explodes, or loses what is known to be needed."""
    found = seen.farthest
    return explodes(found) or (found.needs is not None and vanishes(found))


def vanishes(found: LayerReach) -> bool:
    """Whether the gradient is lost before the lag that is needed, or before the sequences end where none is known."""
    if found.needs is None:
        return found.lost_at is not None
    return found.at_needs < found.threshold or (found.lost_at is not None and found.lost_at <= found.needs)


def _untold(found: LayerReach) -> bool:
    """Whether the lag that is needed is longer than any sequence, and nothing shorter settles it."""
    return found.needs is not None and math.isnan(found.at_needs) and not vanishes(found) and not explodes(found)


def explodes(found: LayerReach) -> bool:
    """Whether the gradient grows a thousandfold on its way back."""
    return growth(found) > EXPLODED


def growth(found: LayerReach) -> float:
    """How many times its first size the gradient has at most, over the lags that are needed."""
    share = found.gradient.share[: None if found.needs is None else found.needs + 1]
    return float(np.nanmax(share, initial=1.0))


def amount(share: float) -> str:
    """A share in words: "12%", "0.3%", "10⁻³¹", "1.8 times", "nothing"."""
    if share == 0:
        return "nothing"
    if share < 5e-5 or share >= 1e4:
        power = f"10{str(round(math.log10(share))).translate(SUPERSCRIPT)}"
        return power if share < 1 else f"{power} times"
    if share >= 1.5:
        return f"{share:.3g} times"
    return f"{100 * share:.0f}%" if share >= 0.1 else f"{100 * share:.2g}%"


def listing(texts: Sequence[str]) -> str:
    """ "a, b and c"."""
    return " and ".join([", ".join(texts[:-1]), texts[-1]] if len(texts) > 1 else texts)


def _fading(found: LayerReach) -> str:
    pace = f"its gradient {found.gradient.pace}" if found.half_life > 0 else "its gradient fades"
    under = f"is under {amount(found.threshold)} after {_steps(found.lost_at or 0)}"
    if found.needs is None:
        return f"{pace} and {under}; whether that is far enough, the task decides"
    if math.isnan(found.at_needs):
        return f"{pace} and {under}, of {found.needs} that are needed"
    return f"{pace}, and {_steps(found.needs)} are needed"


def _growing(found: LayerReach) -> str:
    where = int(np.nanargmax(found.gradient.share[: None if found.needs is None else found.needs + 1]))
    pace = f"{found.gradient.pace} and is" if found.half_life < 0 else "is"
    return f"its gradient {pace} {amount(growth(found))} what it was, {_steps(where)} back"


def _reaching(found: LayerReach) -> str:
    if found.needs is None:
        last = len(found.gradient.share) - 1
        return (
            f"{amount(found.gradient.at(last))} of the gradient is left over {_steps(last)}, the longest way there is"
        )
    return f"{amount(found.at_needs)} of the gradient is left over the {_steps(found.needs)} that are needed"


def _backward(diagnosis: Diagnosis) -> str:
    """Each layer's and direction's verdict, and what it was before training."""
    found = diagnosis.now.farthest
    several = len(diagnosis.now.reach) > 1
    where = f"farthest in {place_name(found.place, diagnosis)}, " if several else ""
    said = f"Backward, {where}the loss's gradient {found.verdict}."
    if diagnosis.before is not None and diagnosis.after is not None:
        early = next((one for one in diagnosis.before.reach if one.place == found.place), diagnosis.before.farthest)
        said += f" Before training: {early.gradient.pace}."
    if found.needs is None:
        said += " How far back the task reaches is not known (--needs), so nothing was tried to reach farther."
    return said


def _forward(seen: Seen) -> str:
    """The same product of Jacobians the other way: what the first step still says at the last."""
    found = max(seen.reach, key=lambda one: (one.inputs.half_life > 0, one.inputs.half_life))
    pace, lost = found.inputs.pace, found.inputs_lost_at
    said = f"Forward, what a step's input does to the state {pace}"
    if lost is not None:
        return f"{said}, and is under {amount(found.threshold)} of that {_steps(lost)} later."
    last = len(found.inputs.share) - 1
    return f"{said}: {amount(found.inputs.at(last))} of it is left after {_steps(last)}."


def _long_run(diagnosis: Diagnosis) -> str:
    """The largest exponent, and how far a change grows first: from the lag-k norms, which no spectral radius bounds."""
    seen = diagnosis.now
    if not seen.dynamics:
        return ""
    place, found = max(seen.dynamics, key=lambda one: float(one[1].exponents[0]))
    largest = float(found.exponents[0])
    trend = "fade" if largest < 0 else "grow" if largest > 0 else "stay"
    said = f"Along these sequences, small changes of the state {trend}:"
    said += f" the largest Lyapunov exponent is {largest:+.3g} nats a step"
    said += f" ({place_name(place, diagnosis)})." if len(seen.dynamics) > 1 else "."
    peak = int(np.nanargmax(found.log_singular_values[:, 0]))
    top = float(found.log_singular_values[peak, 0])
    if largest < 0 and top > math.log(2):
        said += f" On the way they can first grow, {amount(math.exp(top))} over {_steps(int(found.lags[peak]))}."
    return said


def _gates(diagnosis: Diagnosis) -> str:
    seen, said = diagnosis.now, []
    if memories := [(one.place, memory) for one in seen.gates for memory in one.memories]:
        place, longest = max(memories, key=lambda one: _endless(one[1].overall))
        where = f" in {place_name(place, diagnosis)}" if len(seen.gates) > 1 else ""
        kept = f"the direct path of {longest.state} ({longest.kept}) keeps a state {_kept(longest)}{where}"
        said.append(kept[0].upper() + kept[1:] + _enough(longest, diagnosis.needs) + ".")
    elif seen.gates:
        said.append(
            f"{diagnosis.cell} has no direct path from one state to the next: all memory goes through a matrix."
        )
    if stuck := _most_saturated(seen):
        place, gate = stuck
        said.append(f"{_gate_name(place, gate, diagnosis)} is at its ends {amount(gate.saturated)} of the time.")
    if dead := sum(len(one.dead) for one in seen.gates):
        said.append(f"{dead} of {sum(one.units for one in seen.gates)} units never change.")
    return " ".join(said)


def _kept(memory: Memory) -> str:
    return "for ever" if _endless(memory.overall) == math.inf else f"for {memory.overall:.3g} steps"


def _enough(memory: Memory, needs: int | None) -> str:
    if needs is None or not needs:
        return ""
    share = float(np.mean([_endless(steps) >= needs for steps in memory.steps]))
    return f", and {amount(share) if share else 'none'} of its units for the {_steps(needs)} that are needed"


def _endless(steps: float) -> float:
    """Memory in steps, infinite also where the state grows."""
    return math.inf if steps < 0 else steps


def _most_saturated(seen: Seen) -> tuple[Place, Gate] | None:
    every = [(one.place, gate) for one in seen.gates for gate in one.gates]
    worst = max(every, key=lambda one: one[1].saturated, default=None)
    return worst if worst is not None and worst[1].saturated > SATURATED else None


def _gate_name(place: Place, gate: Gate, diagnosis: Diagnosis) -> str:
    where = f" of {place_name(place, diagnosis)}" if len(diagnosis.now.gates) > 1 else ""
    return f"{gate.name}{where}"


def _uses(diagnosis: Diagnosis) -> str:
    """How near to the loss the recurrent weights' gradient comes from."""
    for found in diagnosis.now.pairs:
        by_lag = shares_by_lag(found).get("weight_hh")
        if by_lag is None or not by_lag.any():
            continue
        summed = by_lag.cumsum()
        near = int(np.flatnonzero(np.abs(summed - 1) > 0.1).max(initial=-1)) + 1
        where = f" of {place_name(found.place, diagnosis)}" if len(diagnosis.now.pairs) > 1 else ""
        return (
            f"Of the gradient of the recurrent weights{where}, {amount(float(summed[near]))} comes from their use"
            f" at most {_steps(near)} before a loss."
        )
    return ""


def shares_by_lag(found: Pairs) -> dict[str, NDArray[np.float64]]:
    """By weight matrix, the share of its gradient that its use k steps before the loss carried, [T]; {} of one loss."""
    if found.scalar or found.width > 1:
        return {}
    steps = np.arange(found.norms.shape[1])
    lags = np.abs(found.losses[:, None] - steps[None, :])
    return {name: np.bincount(lags.ravel(), shares.ravel()).astype(float) for name, shares in found.shares.items()}


def _training(diagnosis: Diagnosis) -> str:
    training = diagnosis.history
    if training is None or not np.isfinite(training.norms).any():
        return ""
    norms = training.norms[np.isfinite(training.norms)]
    said = f"In training, the median norm of the gradients went from {norms[0]:.3g} to {norms[-1]:.3g}"
    rates = training.clip_rates[np.isfinite(training.clip_rates)]
    if rates.any():
        return f"{said}; {amount(float(rates.mean()))} of the updates were clipped."
    return f"{said}; no update was clipped."


def _tried(diagnosis: Diagnosis) -> Iterator[Remedy]:
    """What was measured to help, the most helpful first."""
    if diagnosis.before is None:
        return
    before = diagnosis.before.farthest
    helpful = [trial for trial in diagnosis.trials if _helps(trial.farthest, before)]
    helpful.sort(key=lambda trial: _rank(trial.farthest), reverse=True)
    enough = [trial for trial in helpful if not vanishes(trial.farthest)]
    for trial in enough[:MOST_TRIED] or helpful[:1]:
        yield Remedy(trial.title, _why(trial, before), trial.call)


def _helps(tried: LayerReach, before: LayerReach) -> bool:
    """Whether it leaves ten times as much, or grows a tenth as much, without vanishing or exploding the other way."""
    if explodes(tried):
        return False
    if explodes(before):
        return growth(tried) * BETTER < growth(before) and not vanishes(tried)
    if before.needs is not None and not math.isnan(before.at_needs):
        return tried.at_needs > BETTER * before.at_needs
    return before.lost_at is not None and (tried.lost_at is None or tried.lost_at > 2 * before.lost_at)


def _rank(found: LayerReach) -> tuple[float, float]:
    """By how near to its first size the gradient stays."""
    left = found.at_needs
    lost = math.inf if found.lost_at is None else float(found.lost_at)
    return (0.0 if math.isnan(left) else min(left, 1 / left) if left else 0.0, lost)


def _why(trial: Trial, before: LayerReach) -> str:
    after = trial.farthest
    measured = "Measured on these sequences before training: the gradient"
    then = f"{measured} {after.gradient.pace}, where this network's {before.gradient.pace}"
    if before.needs is None or math.isnan(before.at_needs):
        return f"{then}."
    left = f"{amount(after.at_needs)} instead of {amount(before.at_needs)}"
    enough = ", still too little" if vanishes(after) else ""
    return f"{then}; over the {_steps(before.needs)} needed, {left} of it is left{enough}."


def _clipping(diagnosis: Diagnosis) -> Iterator[Remedy]:
    """Clipping, where gradients grow on their way back or their norms jump, and are not clipped yet."""
    training, clip = diagnosis.history, diagnosis.clip
    grown = max(growth(one.farthest) for one in (diagnosis.before, diagnosis.after) if one is not None)
    jumps = _jumps(diagnosis)
    if clip is None or (grown < GROWN and jumps < GROWN):
        return
    if training is not None and np.isfinite(training.thresholds).any():
        return
    why = f"Going back, the gradient grows up to {amount(grown)}" if grown >= GROWN else ""
    if jumps >= GROWN:
        why += f"{' and the' if why else 'The'} largest norm seen is {amount(jumps)} the median one"
    yield Remedy(
        f"Clip the gradients at {clip:.2g}",
        f"{why}. {clip:.2g} is the 90th percentile of the norms seen: most updates stay as they are.",
        f"{diagnosis.again} --clip {clip:.2g}",
    )


def _jumps(diagnosis: Diagnosis) -> float:
    """How many times the median the largest norm seen is."""
    norms = [norm for norm in diagnosis.norms if math.isfinite(norm)]
    return max(norms) / median(norms) if norms and median(norms) > 0 else 1.0


def _truncation(diagnosis: Diagnosis) -> Iterator[Remedy]:
    """The window of truncated back-propagation: too short for the task, or spared where nothing lasts longer."""
    training, found = diagnosis.history, diagnosis.now.farthest
    window = training.truncate if training is not None else None
    if window is not None and diagnosis.needs is not None and window <= diagnosis.needs:
        yield Remedy(
            f"Truncate later than after {window} steps",
            f"Back-propagation is cut into windows of {_steps(window)}, and {_steps(diagnosis.needs)} are needed: no"
            " gradient can go that far, whatever the cell.",
            f"{diagnosis.again} --truncate {diagnosis.needs + 1}",
        )
    elif window is None and diagnosis.by_step and diagnosis.needs is None and found.lost_at is not None:
        longest = len(found.gradient.share)
        if longest > SPARE * found.lost_at:
            spared = 2 * found.lost_at
            yield Remedy(
                f"Truncate after {spared} steps, if memory is short",
                f"No gradient lasts longer than {_steps(found.lost_at)} of the {longest}: windows of twice that lose"
                " next to nothing of it, and store so much less. It does not make the network remember longer.",
                f"{diagnosis.again} --truncate {spared}",
            )


def _saturation(diagnosis: Diagnosis) -> Iterator[Remedy]:
    """Gates at their ends pass no gradient: smaller steps, and weights that are kept small."""
    stuck = _most_saturated(diagnosis.now)
    if stuck is None or diagnosis.after is None or not ask_for_remedies(diagnosis.now):
        return
    place, gate = stuck
    yield Remedy(
        "Smaller steps, and weights kept small",
        f"{_gate_name(place, gate, diagnosis)} is at its ends {amount(gate.saturated)} of the time, where its slope"
        " and so its gradient is next to nothing.",
        f"{diagnosis.again} --learning-rate 5e-4 --weight-decay 0.1",
    )


def _steps(count: int) -> str:
    return f"{count} step{'' if count == 1 else 's'}"


def place_name(place: Place, diagnosis: Diagnosis) -> str:
    """A place in a sentence, without the module's name where all are of one module: "layer 1, backward"."""
    alone = len({found.place.module for found in diagnosis.now.reach}) == 1
    if alone and (place.layers > 1 or place.directions > 1):
        return str(dataclasses.replace(place, module="")).removeprefix("the layer, ")
    return str(place)
