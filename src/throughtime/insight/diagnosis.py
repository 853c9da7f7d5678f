"""A diagnosis: reach, pairs, dynamics and gates of a network, before training and after, and remedies tried on it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from throughtime.errors import CellError, ShapeError, ThroughtimeError
from throughtime.insight.dynamics import Dynamics, dynamics
from throughtime.insight.gates import Gates, gates
from throughtime.insight.pairs import Pairs, pairs
from throughtime.insight.reach import LayerReach, reach
from throughtime.insight.rehearsal import Place, rehearse
from throughtime.nn.initialise import chrono_, forget_bias_, identity_, orthogonal_
from throughtime.nn.recurrent import Layer

if TYPE_CHECKING:
    from numpy.typing import NDArray

Loss = Callable[[Any], Tensor]

TIMES, PROBES = 4, 4
"""Steps of each row, and random directions at each, from which reach is measured: each pair is a pass back."""

TERMS = 100
"""Losses that the pairs are taken of; those of longer sequences share terms."""

MOST_PRODUCTS = 2e10
"""Multiplications, N^3 a step, that the dynamics may cost; fewer rows are followed where it would be more."""


# What is seen


@dataclass(frozen=True, eq=False)
class Seen:
    """What one network shows on one batch. Made by `look`; `dynamics` has one entry a layer and direction."""

    reach: tuple[LayerReach, ...]
    gates: tuple[Gates, ...] = ()
    dynamics: tuple[tuple[Place, Dynamics], ...] = ()
    pairs: tuple[Pairs, ...] = ()

    @property
    def farthest(self) -> LayerReach:
        """The layer and direction in which most of the gradient is left: what one way carries need not go another."""
        return max(self.reach, key=distance)


@dataclass(frozen=True, eq=False)
class Trial:
    """The untrained network with one thing changed, measured on the same batch.

    `title` says in words what was changed, `name` in a word or two; `call` is the code that changes it.
    """

    title: str
    name: str
    call: str
    reach: tuple[LayerReach, ...]

    @property
    def farthest(self) -> LayerReach:
        """The layer and direction in which most of the gradient is left."""
        return max(self.reach, key=distance)


@dataclass(frozen=True, eq=False)
class History:
    """What the training wrote down, by epoch: arrays are [epochs], NaN where an epoch has none.

    `norms` are the median norms of all gradients together, `clip_rates` the share of updates that clipping changed and
    `thresholds` where it stood. `truncate` is the window of truncated back-propagation, None without.
    """

    losses: NDArray[np.float64]
    norms: NDArray[np.float64]
    thresholds: NDArray[np.float64]
    clip_rates: NDArray[np.float64]
    truncate: int | None = None


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """All that is known of a network: before training, after it, or both.

    `norms` are those of all gradients together on some mini-batches of the data, and `clip` a threshold suggested from
    them. `by_step` says whether there is a loss at every step; `asked` which losses the pairs are of, in words;
    `again` is the command that trains it once more, to which remedies add their options.
    """

    cell: str
    before: Seen | None = None
    after: Seen | None = None
    trials: Sequence[Trial] = ()
    history: History | None = None
    norms: Sequence[float] = ()
    clip: float | None = None
    by_step: bool = False
    asked: str = ""
    again: str = "throughtime fit DATA"

    def __post_init__(self) -> None:
        if self.before is None and self.after is None:
            raise ThroughtimeError("a diagnosis of nothing; give what was seen before training, after it, or both")

    @property
    def now(self) -> Seen:
        """The network as it is: trained, or untrained where there is nothing else."""
        return self.after or self.before  # type: ignore[return-value]  # __post_init__ sees to it

    @property
    def needs(self) -> int | None:
        """The lag that the task needs; None where it is not known."""
        return self.now.farthest.needs


def look(
    model: nn.Module,
    batch: Any,
    loss: Loss,
    *,
    needs: int | None = None,
    asked: tuple[nn.Module, Loss] | None = None,
    with_pairs: bool = True,
    on_part: Callable[[str], None] = lambda part: None,
) -> Seen:
    """Everything that can be seen of a model on a batch, in float64 and on copies of the model.

    `batch` and `loss` are as in `reach`. `asked`, if given, is a model around the same layers, and its loss by step,
    for the pairs of times of a network that answers once; `with_pairs=False` leaves the pairs out, which cost most.
    `on_part(name)` is called before each part.
    """
    on_part("reach")
    reaches = reach(model, batch, loss, needs, times=TIMES, probes=PROBES)
    on_part("gates")
    opened = gates(model, batch)
    couples: list[Pairs] = []
    if with_pairs:
        on_part("pairs of times")
        asked_model, asked_loss = asked or (model, loss)
        couples = pairs(asked_model, batch, asked_loss, terms=TERMS)
    on_part("dynamics")
    return Seen(tuple(reaches), tuple(opened), tuple(_dynamics(model, batch)), tuple(couples))


def _dynamics(model: nn.Module, batch: Any) -> Iterator[tuple[Place, Dynamics]]:
    """The dynamics of every layer that runs, each on the input it gets."""
    with torch.no_grad():
        seen = rehearse(model, batch, gradients=False)
    first = 0
    while first < len(seen.places):
        place = seen.places[first]
        places = seen.places[first : first + place.layers * place.directions]
        problems = [record.problem for record in seen.records[first : first + len(places)]]
        first += len(places)
        layer = seen.model.get_submodule(place.module)
        assert isinstance(layer, Layer)
        problem = problems[0]
        x = problem.x.transpose(0, 1) if layer.batch_first else problem.x
        states = tuple(torch.stack(state) for state in zip(*(each.states for each in problems), strict=True))
        width = sum(state.shape[-1] for state in states)
        rows = max(1, min(4, int(MOST_PRODUCTS / (width**3 * max(1, problem.steps) * len(places)))))
        h_0 = states[0] if len(states) == 1 else states
        outside = dict(zip(problem.cell.outside, problem.outside, strict=True)) or None
        yield from zip(
            places, dynamics(layer, x, h_0, lengths=problem.lengths, outside=outside, rows=rows), strict=True
        )


def try_remedies(
    model: nn.Module,
    batch: Any,
    loss: Loss,
    *,
    needs: int | None,
    others: Sequence[Other] = (),
    times: int = TIMES,
    on_part: Callable[[str], None] = lambda part: None,
) -> list[Trial]:
    """Measure the reach of an untrained model under each initialisation that its cells can have, on copies of it.

    `others` are further untrained models to measure on the same batch: gated cells, say. `times` is as in `reach`; a
    loss that is not given by step needs only one.
    """
    found = []
    for one in _initialisations(model, needs):
        changed = copy.deepcopy(model)
        try:
            for layer in _layers(changed):
                one.change(layer)
        except (CellError, ShapeError):  # this cell has no such gate, or no square matrix
            continue
        on_part(one.name)
        found.append(
            Trial(one.title, one.name, one.call, tuple(reach(changed, batch, loss, needs, times=times, probes=1)))
        )
    for other in others:
        on_part(other.name)
        found.append(
            Trial(
                other.title,
                other.name,
                other.call,
                tuple(reach(other.model, batch, loss, needs, times=times, probes=1)),
            )
        )
    return found


class Other(NamedTuple):
    """A model that could stand in an untrained model's place; see `Trial` for the words."""

    title: str
    name: str
    call: str
    model: nn.Module


class _Initialisation(NamedTuple):
    title: str
    name: str
    call: str
    change: Callable[[Layer], object]


def _initialisations(model: nn.Module, needs: int | None) -> Iterator[_Initialisation]:
    """The library's initialisations; random ones draw from generators of their own."""
    names = [name for name, module in model.named_modules() if isinstance(module, Layer)]

    def call(function: str, arguments: str = "") -> str:
        lines = [f"{function}({f'model.{name}' if name else 'model'}{arguments})" for name in names]
        return "\n".join([f"from throughtime.nn.initialise import {function}", *lines])

    drawn = torch.Generator()
    yield _Initialisation(
        "Orthogonal recurrent weights",
        "orthogonal",
        call("orthogonal_"),
        lambda layer: orthogonal_(layer, generator=drawn.manual_seed(0)),
    )
    yield _Initialisation("Identity recurrent weights", "identity", call("identity_"), identity_)
    yield _Initialisation("A forget bias of 1", "forget bias 1", call("forget_bias_", ", 1.0"), forget_bias_)
    if needs is not None and needs > 1:
        longest = needs + 1
        yield _Initialisation(
            f"Chrono initialisation for {longest} steps",
            f"chrono {longest}",
            call("chrono_", f", longest={longest}"),
            lambda layer: chrono_(layer, longest, generator=drawn.manual_seed(0)),
        )


def _layers(model: nn.Module) -> list[Layer]:
    return [module for module in model.modules() if isinstance(module, Layer)]


def distance(found: LayerReach) -> tuple[float, float]:
    """How far a gradient reaches, to compare: by what is left at the lag needed, or by the lag at which it is lost."""
    lost = math.inf if found.lost_at is None else float(found.lost_at)
    left = found.at_needs
    return (left, lost) if not math.isnan(left) else (lost, found.half_life if found.half_life > 0 else math.inf)
