"""Watching a training run: gradient norms by lag from the backward loop itself, sampled, and warnings in words."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from throughtime.engine import recurrence
from throughtime.engine.problem import Problem
from throughtime.engine.recurrence import Record
from throughtime.errors import ThroughtimeError
from throughtime.insight.reach import THRESHOLD, Reach, norms_from_ends
from throughtime.insight.rehearsal import Place, first_to_last
from throughtime.nn.clipping import suggest_clip
from throughtime.nn.recurrent import Layer

EVERY = 50
"""One update in so many is looked into, which keeps the whole under 3 % of the time of training."""

SEEN, ENOUGH = 1000, 20
"""How many norms of past updates are remembered, and how many make a usual norm."""

EXPLOSION = 100.0
"""A gradient so many times as large as usual, or as at the sequence's end, counts as exploding."""


@dataclass(frozen=True, eq=False)
class Sample:
    """The gradient by one recurrence's inputs in one update: its reach, and the lag that this batch needs.

    `reach` is that of dL/dx_{T-k}, x being the layer's input: what the backward loop hands down at each step. It goes
    back by the same product of Jacobians as dL/dh_{T-k}, with W^T at its end.
    """

    place: Place
    reach: Reach
    needs: int


class Watch:
    """Looks into one update in `every` of a model in training, and says in words what goes wrong.

    Use it as a context around the training loop, and tell it of every update::

        with Watch(model) as watch:
            for batch in batches:
                loss(model(batch)).backward()
                norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimiser.step()
                event = watch.observe(norm, threshold=1.0)

    `needs` is the lag that the task needs; None takes each batch's from the first step to the last (of half of its
    rows). With `per_step`, the loss is read at every step: then its gradient cannot fade from the end, so only
    explosions are told (see `reach` for the rest). Nothing that is computed changes: no number is drawn, and weights
    come out the same to the bit (cpu target). Of a layer that runs several times in an update the first run is looked
    into; what runs compiled is not seen.

    Raises ThroughtimeError for an `every` under 1.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        needs: int | None = None,
        per_step: bool = False,
        every: int = EVERY,
        threshold: float = THRESHOLD,
    ) -> None:
        if every < 1:
            raise ThroughtimeError(f"every is {every}; give a whole number from 1: an update in so many is looked into")
        self.model, self.needs, self.per_step, self.every, self.threshold = model, needs, per_step, every, threshold
        self.updates = 0
        self.norms: deque[float] = deque(maxlen=SEEN)
        self._usual = math.nan
        self._clipped: list[bool] = []
        self._samples: dict[int, Sample] = {}
        self._places: dict[int, Place] = {}
        self._warned: dict[str, int] = {}
        self._begun: set[int] = set()
        self._runs = 0
        self._entered = False
        self._handles: list[Any] = []
        self._inside = ExitStack()

    def __enter__(self) -> Watch:
        self._places, self._entered = _places(self.model), True
        for layer in self.model.modules():
            if isinstance(layer, Layer):
                self._handles.append(layer.register_forward_pre_hook(self._begins))
                self._handles.append(layer.register_forward_hook(self._ends, always_call=True))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._entered = [], False
        self._inside.close()

    def observe(self, norm: Tensor | float | None = None, threshold: float | None = None) -> dict[str, Any]:
        """Count an update; on one that was looked into, or that exploded, say what was seen, else {}.

        `norm` is that of all gradients together before clipping, `threshold` where they are clipped (None: nowhere).
        The record is plain values, ready for JSON: "update", "norm" and "clip_rate" (the share of updates clipped since
        the last record), "reach" by place ("half_life" in steps, negative where the gradient grows; "needs", and the
        gradient's share "at_needs"; "lost_at", the lag where the share falls under the threshold), and "warnings".
        What is not a finite number is None.
        """
        size = None if norm is None else float(norm)
        warnings = [] if size is None else list(self._about_norm(size, threshold))
        if size is not None:
            self.norms.append(size)
            self._clipped.append(threshold is not None and not size <= threshold)
        looked, samples = self._due, list(self._samples.values())
        if looked and not self._begun:
            warnings += self._once(
                "nothing",
                "no recurrent layer was seen: throughtime.upgrade(model) makes torch's visible, and what is compiled "
                "stays hidden",
            )
        self.updates += 1
        self._samples, self._begun, self._runs = {}, set(), 0
        if len(self.norms) >= ENOUGH and (self.updates % ENOUGH == 0 or math.isnan(self._usual)):
            self._usual = median(self.norms)
        if not looked and not warnings:
            return {}
        for sample in samples:
            warnings += self._about_reach(sample)
        clip_rate = sum(self._clipped) / len(self._clipped) if self._clipped else None
        self._clipped = []
        return {
            "update": self.updates,
            "norm": _finite(size),
            "clip_rate": clip_rate,
            "reach": {str(sample.place): self._told(sample) for sample in samples},
            "warnings": warnings,
        }

    @property
    def suggested_clip(self) -> float:
        """A norm to clip at, from the norms seen; see `suggest_clip`, which also says what it raises."""
        return suggest_clip(self.norms)

    def state(self) -> dict[str, Any]:
        """All that decides what is said next, as plain values ready for JSON, for a training that is to be resumed."""
        return {
            "updates": self.updates,
            "norms": [_finite(norm) for norm in self.norms],
            "usual": _finite(self._usual),
            "clipped": list(self._clipped),
            "warned": dict(self._warned),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state`, so that a resumed training says what an undisturbed one would."""
        self.updates, self._clipped, self._warned = state["updates"], list(state["clipped"]), dict(state["warned"])
        self.norms = deque((math.inf if norm is None else norm for norm in state["norms"]), maxlen=SEEN)
        self._usual = math.nan if state["usual"] is None else state["usual"]

    # -- what is seen -------------------------------------------------------------------------------------------------

    def _begins(self, layer: nn.Module, args: Any) -> None:
        """Look into a layer's first run of an update that is due."""
        wanted = layer.training and torch.is_grad_enabled() and not recurrence.is_recording()
        if wanted and self._due and id(layer) not in self._begun:
            self._begun.add(id(layer))
            self._inside.enter_context(recurrence.watched(self._look))

    def _ends(self, layer: nn.Module, args: Any, output: Any) -> None:
        self._inside.close()

    @property
    def _due(self) -> bool:
        return self._entered and self.updates % self.every == 0

    def _look(self, problem: Problem) -> Problem:
        """The problem on an input of its own, whose gradient is heard of when the backward loop has made it."""
        x = problem.x
        own = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
        number, self._runs = self._runs, self._runs + 1
        place = next((self._places[id(p)] for p in problem.parameters if id(p) in self._places), Place(f"run {number}"))
        own.register_hook(partial(self._heard, number, place, replace(problem, x=own.detach())))
        return replace(problem, x=own)

    def _heard(self, number: int, place: Place, problem: Problem, gradient: Tensor) -> None:
        record = Record(problem)
        needs = first_to_last(record) if self.needs is None else self.needs
        with np.errstate(invalid="ignore"):  # of a gradient that is not finite; its norm tells
            reach = Reach.of(norms_from_ends(record, gradient.detach()))
        self._samples[number] = Sample(place, reach, needs)

    def _told(self, sample: Sample) -> dict[str, float | int | None]:
        reach = sample.reach
        return {
            "half_life": _finite(reach.half_life),
            "needs": sample.needs,
            "at_needs": _finite(reach.at(sample.needs)),
            "lost_at": reach.lost_at(self.threshold),
        }

    # -- what is said -------------------------------------------------------------------------------------------------

    def _about_reach(self, sample: Sample) -> Iterator[str]:
        place, reach = sample.place, sample.reach
        share = reach.at(sample.needs)
        if share > EXPLOSION and not place.reverse:  # a backward direction may be read at its other end
            yield from self._once(
                f"grows {place}",
                f"{place}: the gradient {reach.pace} on its way back and is {share:.2g} times as large at lag "
                f"{sample.needs} as at the end; clip it, or begin with orthogonal weights",
            )
        elif share < self.threshold and not self.per_step and reach.at(0) > 0:
            yield from self._once(
                f"fades {place}",
                f"{place}: the gradient {reach.pace} on its way back, and steps that lie {sample.needs} apart do "
                "not reach each other; a gated cell, orthogonal weights or a chrono initialisation reach farther",
            )

    def _about_norm(self, norm: float, threshold: float | None) -> Iterator[str]:
        usual = self._usual
        if not math.isfinite(norm):
            yield from self._once(
                "odd", "the gradient is not finite; first_failure(model, batch, loss) tells where from"
            )
        elif norm > EXPLOSION * usual:
            advice = (
                f"clip it, at {self.suggested_clip:.2g} by what was seen" if threshold is None else "it was clipped"
            )
            yield from self._once(
                "norm", f"the gradient explodes: its norm is {norm:.2g}, and {usual:.2g} is usual; {advice}"
            )

    def _once(self, about: str, words: str) -> Iterator[str]:
        """The words, unless the same was said not long ago."""
        said = self._warned.get(about)
        if said is None or self.updates - said >= 20 * self.every:
            self._warned[about] = self.updates
            yield words


def _places(model: nn.Module) -> dict[int, Place]:
    """Where each parameter of a recurrent layer belongs, by the parameter's identity."""
    found: dict[int, Place] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, Layer):
            directions = 2 if layer.bidirectional else 1
            for depth in range(layer.num_layers):
                for reverse in range(directions):
                    place = Place(name, depth, bool(reverse), layer.num_layers, directions)
                    parameters = layer._parameters_of(depth, "_reverse" if reverse else "")
                    found |= {id(parameter): place for parameter in parameters}
    return found


def _finite(number: float | None) -> float | None:
    return number if number is not None and math.isfinite(number) else None
