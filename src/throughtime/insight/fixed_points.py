"""Fixed and slow points of a step whose input stays the same, found from states that were seen. Numbers only.

Sussillo & Barak 2013, Opening the black box, Neural Computation 25.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from throughtime.insight.step_map import StepMap

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class FixedPoint:
    """A state that one step leaves where it is, or nearly, while the input stays the same.

    `state` [N], all states of the cell joined; `speed` is |F(h) - h|; `eigenvalues` [N] of the step Jacobian there,
    complex, largest modulus first; `starts` is how many of the states seen led to it; `is_fixed` is False for a slow
    point: a local minimum of the speed that is not zero, yet small beside the speed of the states seen.
    """

    state: NDArray[np.float64]
    speed: float
    eigenvalues: NDArray[np.complex128]
    starts: int
    is_fixed: bool

    @property
    def unstable(self) -> int:
        """How many directions lead away from it: eigenvalues outside the unit circle."""
        return int((np.abs(self.eigenvalues) > 1).sum())

    @property
    def kind(self) -> str:
        """In one word: "attracting", "saddle" or "repelling"."""
        if self.unstable == 0:
            return "attracting"
        return "repelling" if self.unstable == len(self.eigenvalues) else "saddle"


@dataclass(frozen=True, eq=False)
class Search:
    """What a search found: distinct points, slowest first, how many starts it had, and how many ended at neither.

    `median_speed` is that of the states seen (of a thousand of them at most), under the input that was held.
    """

    points: tuple[FixedPoint, ...]
    starts: int
    lost: int
    median_speed: float


@dataclass(frozen=True, eq=False)
class Held:
    """A step map with its input held: x [1, I] and outside inputs [1, 1 or H] each."""

    step: StepMap
    x: Tensor
    outside: tuple[Tensor, ...] = ()

    def residual(self, state: Tensor) -> Tensor:
        """F(h) - h, [n, N]."""
        return self.step.next(self.x.expand(len(state), -1), state, self._outside(len(state))) - state

    def jacobian(self, state: Tensor) -> Tensor:
        """dF/dh, [n, N, N]."""
        return self.step.jacobian(self.x.expand(len(state), -1), state, self._outside(len(state)))

    def _outside(self, count: int) -> list[Tensor]:
        return [value.expand(count, -1) for value in self.outside]


ITERATIONS = 200
FIXED = 1e-9
"""A speed below this, times one plus the norm of the state, is no movement but rounding."""

SAME = 1e-3
"""Two ends nearer than this share of the spread of the states seen are one point."""


def search(held: Held, seen: Tensor, starts: int, slow: float) -> Search:
    """The points that `starts` of the states seen [n, N], evenly spaced, lead to.

    A local minimum of the speed counts as a slow point if it is below `slow` of the median speed of the states seen.
    """
    sample = seen[_spaced(len(seen), SAMPLE)]
    median_speed = float(held.residual(sample).norm(dim=-1).median())
    places = _spaced(len(seen), starts)
    ends, settled = _slowest(held, seen[places])
    speeds = held.residual(ends).norm(dim=-1)
    is_fixed = speeds <= FIXED * (1 + ends.norm(dim=-1))
    kept = (is_fixed | (settled & (speeds < slow * median_speed))).nonzero()[:, 0].tolist()
    kept.sort(key=lambda place: float(speeds[place]))
    spread = float((sample - sample.mean(0)).norm(dim=-1).median())
    points = [
        FixedPoint(
            state=ends[first].numpy(),
            speed=float(speeds[first]),
            eigenvalues=_eigenvalues(held.jacobian(ends[first : first + 1])[0]),
            starts=members,
            is_fixed=bool(is_fixed[first]),
        )
        for first, members in _together(ends, kept, SAME * max(spread, FIXED))
    ]
    return Search(tuple(points), len(places), len(places) - len(kept), median_speed)


SAMPLE = 1000
"""States at most, evenly spaced, of which the median speed and the spread are taken."""


def _spaced(count: int, most: int) -> NDArray[np.int64]:
    """At most this many places among `count`, evenly spaced from the first to the last."""
    return np.unique(np.linspace(0, count - 1, min(most, count)).round().astype(np.int64))


def _slowest(held: Held, starts: Tensor) -> tuple[Tensor, Tensor]:
    """From each start [n, N] to a local minimum of |F(h) - h|^2, and whether it settled there.

    The method of Levenberg and Marquardt, each start with a damping of its own; it has settled once its last move, or
    what is left of the speed, is down to rounding.
    """
    state = starts.clone()
    residual = held.residual(state)
    damping = torch.full((len(state),), 1e-2, dtype=torch.float64)
    settled = torch.zeros(len(state), dtype=torch.bool)
    identity = torch.eye(state.shape[1], dtype=torch.float64)
    for _ in range(ITERATIONS):
        at = (~settled).nonzero()[:, 0]
        if not len(at):
            break
        slope = held.jacobian(state[at]) - identity
        downhill = -(slope.mT @ residual[at, :, None])
        curvature = slope.mT @ slope + damping[at, None, None] * identity
        move = torch.linalg.solve(curvature, downhill)[..., 0]
        tried = state[at] + move
        after = held.residual(tried)
        better = after.square().sum(-1) < residual[at].square().sum(-1)
        state[at] = torch.where(better[:, None], tried, state[at])
        residual[at] = torch.where(better[:, None], after, residual[at])
        damping[at] = torch.where(better, damping[at] / 5, damping[at] * 4).clamp(1e-10, 1e10)
        scale = 1 + state[at].norm(dim=-1)
        settled[at] = (move.norm(dim=-1) <= 1e-10 * scale) | (residual[at].norm(dim=-1) <= 1e-13 * scale)
    return state, settled


def _together(ends: Tensor, order: list[int], near: float) -> list[tuple[int, int]]:
    """Ends that are one point: the place of the first of each, in this order, and how many they are."""
    groups: dict[int, int] = {}
    for place in order:
        same = next((first for first in groups if float((ends[place] - ends[first]).norm()) <= near), place)
        groups[same] = groups.get(same, 0) + 1
    return list(groups.items())


def _eigenvalues(jacobian: Tensor) -> NDArray[np.complex128]:
    values = torch.linalg.eigvals(jacobian).numpy()
    ordered: NDArray[np.complex128] = values[np.argsort(-np.abs(values), kind="stable")]
    return ordered
