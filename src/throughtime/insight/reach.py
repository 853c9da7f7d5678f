"""Reach: how much of the loss's gradient is left at the states k steps before a sequence's end. Numbers only.

Bengio, Simard & Frasconi 1994 (IEEE Trans. Neural Networks 5) and Pascanu, Mikolov & Bengio 2013
(arXiv:1211.5063) bound what is measured here: the product of step Jacobians that carries dL/dh_T back to
dL/dh_{T-k}.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from throughtime.engine.recurrence import Record, recording

if TYPE_CHECKING:
    from numpy.typing import NDArray


HARDLY = 5
"""A half-life of more than this many times the longest lag seen is not worth a number."""


def gradient_norms(compute_loss: Callable[[], Tensor]) -> list[NDArray[np.float64]]:
    """The norm of dL/dh_{T-k} for every lag k and row, one [lags, rows] array for each recurrence that runs.

    All states of a cell count as one vector. T is a row's own last computed step, and lags before its first step are
    NaN. `compute_loss` runs the network and returns the sum (not the mean) of the rows' losses, read at their ends. In
    float32 what fades below 1e-38 is zero, so long sequences want a network in float64.
    """
    with torch.enable_grad(), recording() as records:
        loss = compute_loss()
    return [_norms_by_lag(record, loss) for record in records]


def _norms_by_lag(record: Record, loss: Tensor) -> NDArray[np.float64]:
    steps, parts = len(record.states), len(record.states[0])
    states = [state for step in record.states for state in step]
    gradients = torch.autograd.grad(loss, states, retain_graph=True, materialize_grads=True)
    by_state = [torch.stack(gradients[part::parts]) for part in range(parts)]  # [T, B, width] each
    norms = _norms(torch.cat(by_state, dim=2))  # [T, B]

    lengths = torch.full((norms.shape[1],), steps) if record.lengths is None else torch.tensor(record.lengths)
    last = torch.full_like(lengths, steps - 1) if record.reverse else lengths - 1
    lags = torch.arange(steps).unsqueeze(1)  # [T, 1]
    by_lag = norms.gather(0, (last - lags).clamp(min=0))
    return by_lag.masked_fill(lags >= lengths, math.nan).numpy()


def _norms(vectors: Tensor) -> Tensor:
    """Euclidean norms over the last dimension, also of vectors whose squares underflow.

    What is below the smallest normal number of its type has lost its digits, and would look like a gradient that has
    stopped fading: it counts as zero.
    """
    largest = vectors.abs().amax(dim=-1, keepdim=True)
    scale = torch.where(largest > 0, largest, torch.ones_like(largest))
    norms = (vectors / scale).norm(dim=-1) * scale.squeeze(-1)
    return norms.masked_fill(largest.squeeze(-1) < torch.finfo(vectors.dtype).tiny, 0.0).double()


@dataclass(frozen=True)
class Reach:
    """Reach by lag k, over all rows long enough to have it.

    `share` [lags] is the geometric mean of |dL/dh_{T-k}| / |dL/dh_T|; where the gradient is exactly zero a
    row counts in `zeros` [lags] and not in the mean. `rows` [lags] counts the rows of that length.
    """

    share: NDArray[np.float64]
    rows: NDArray[np.int64]
    zeros: NDArray[np.int64]

    @classmethod
    def of(cls, norms: NDArray[np.float64]) -> Reach:
        """Summarise gradient norms [lags, rows], NaN where a row has no such lag."""
        there = ~np.isnan(norms)
        alive = there & (norms > 0) & (norms[0] > 0)
        safe = np.where(alive, norms, 1.0)
        logs = np.where(alive, np.log(safe) - np.log(safe[0]), 0.0)
        count = alive.sum(axis=1)
        mean = np.divide(logs.sum(axis=1), count, out=np.full(len(norms), math.nan), where=count > 0)
        return cls(share=np.exp(mean), rows=there.sum(axis=1), zeros=(there & ~alive).sum(axis=1))

    @property
    def half_life(self) -> float:
        """Steps in which the share halves, fitted to its logarithm by least squares, each lag weighted by its rows.

        Negative where the share grows (its doubling time), infinite where it stays, NaN with fewer than two
        lags.
        """
        weights = np.where(np.isfinite(self.share), self.rows - self.zeros, 0).astype(float)
        lags = np.arange(len(weights), dtype=float)
        if (weights > 0).sum() < 2:
            return math.nan
        logs = np.where(weights > 0, np.log2(np.where(weights > 0, self.share, 1.0)), 0.0)
        lags -= np.average(lags, weights=weights)
        slope = np.sum(weights * lags * logs) / np.sum(weights * lags**2)
        return math.inf if slope == 0 else float(-1 / slope)

    @property
    def hardly_changes(self) -> bool:
        """Whether the share neither fades nor grows over the lags seen."""
        return abs(self.half_life) > HARDLY * len(self.share)

    @property
    def pace(self) -> str:
        """How the gradient changes on its way back, in plain words."""
        half_life = self.half_life
        if math.isnan(half_life):
            return "cannot be told"
        if self.hardly_changes:
            return "hardly changes"
        return f"{'halves' if half_life > 0 else 'doubles'} every {abs(half_life):.1f} steps"

    def verdict(self, needed: int) -> str:
        """The reach in plain words, against the steps that the sequences need: "halves every 2.2 steps; ..."."""
        return f"{self.pace}; your sequences need {needed}"
