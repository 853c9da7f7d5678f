"""Reach: how much of the loss's gradient is left k steps before, and of an input's influence k steps after.

Bengio, Simard & Frasconi 1994 (IEEE Trans. Neural Networks 5) and Pascanu, Mikolov & Bengio 2013
(arXiv:1211.5063) bound what is measured here: the product of step Jacobians that carries dL/dh_T back to
dL/dh_{T-k}.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from throughtime.engine.recurrence import Record, recording
from throughtime.errors import ThroughtimeError
from throughtime.insight.rehearsal import (
    Place,
    Progress,
    Rehearsal,
    first_to_last,
    gradients,
    in_step_order,
    lengths_of,
    rehearse,
    said_rows,
)

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
    return _gradients_by_lag(records, loss, [_ends(record) for record in records])


def _gradients_by_lag(records: Sequence[Record], loss: Tensor, times: Sequence[Tensor]) -> list[NDArray[np.float64]]:
    """|dL/dh_{t-k}| by lag k and row, [T, B] for each record; `times` [B] are the t of each record's rows."""
    states = [state for record in records for step in record.states for state in step]
    found_by_state = iter(gradients(loss, states))
    found = []
    for record, at in zip(records, times, strict=True):
        by_step = [torch.cat([next(found_by_state) for _ in step], dim=1) for step in record.states]  # [B, widths] each
        norms = _norms(torch.stack(in_step_order(record, by_step)))  # [T, B]
        found.append(_by_lag(record, norms, at))
    return found


def _ends(record: Record) -> Tensor:
    """The last computed step of each row [B]; the first step of the sequence where time runs backwards."""
    lengths = lengths_of(record)
    return torch.zeros_like(lengths) if record.reverse else lengths - 1


def norms_from_ends(record: Record, gradients: Tensor) -> NDArray[np.float64]:
    """The norms of vectors [T, B, width], one for each step and row, by lag from each row's end: [T, B], NaN beyond."""
    return _by_lag(record, _norms(gradients), _ends(record))


def _by_lag(record: Record, norms: Tensor, times: Tensor) -> NDArray[np.float64]:
    """Norms by step and row, [T, B], as norms by lag before each row's time, [T, B]: NaN before a row's first step.

    A norm that is NaN itself becomes infinite, so that it is not taken for a lag that is not there.
    """
    norms, lengths = norms.cpu().nan_to_num(math.inf, math.inf), lengths_of(record)
    lags = torch.arange(len(norms)).unsqueeze(1)  # [T, 1]
    steps = times + lags if record.reverse else times - lags
    there = (times >= 0) & (steps >= 0) & (steps < lengths)
    by_lag = norms.gather(0, steps.clamp(0, max(0, len(norms) - 1)))
    return by_lag.masked_fill(~there, math.nan).numpy()


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
    def longest(self) -> int:
        """The longest lag that any row has."""
        return int(np.flatnonzero(self.rows).max(initial=0))

    def at(self, lag: int) -> float:
        """The share at a lag: 0 where nothing arrives in any row, NaN where no row has such a lag."""
        if lag >= len(self.share) or self.rows[lag] == 0:
            return math.nan
        return 0.0 if self.zeros[lag] == self.rows[lag] else float(self.share[lag])

    def lost_at(self, threshold: float) -> int | None:
        """The first lag from which on the share is under the threshold; None where it never is to the end."""
        above = [lag for lag in range(self.longest + 1) if not self.at(lag) < threshold]
        first = above[-1] + 1 if above else 0
        return first if first <= self.longest else None

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


THRESHOLD = 1e-3
"""Below this share of what it was, a gradient counts as not arriving."""

TIMES, FEWEST_TIMES, MOST_PASSED = 8, 2, 4000
"""At how many steps of each row losses and states are looked at unless something else is asked for: 8, or in long
sequences fewer, so that the ways back, that many times the sequence, come to no more than 4000 steps."""

PROBES = 8
"""How many random directions stand for a state's numbers. A single norm is then right within about a quarter, and the
geometric mean over many rows and times about 6 % low at most, where all directions but one have faded."""


@dataclass(frozen=True, eq=False)
class LayerReach:
    """How far a loss reaches back, and an input forward, through one direction of one layer. Made by `reach`.

    `gradient` is the norm of dL/dh_{t-k} by lag k, as a share of that at lag 0; `inputs` is the Frobenius norm of
    dh_t/dx_{t-k}, x being the layer's own input, as a share of that at lag 0. In both, `share` [lags] is the geometric
    mean over rows and times, `rows` [lags] counts the (row, time) pairs that have such a lag, and `zeros` [lags] those
    where nothing at all arrives, which are not in the mean. All states of a cell count as one vector.

    `needs` is the lag that the task needs, None where it is not known; `threshold` the share under which a gradient
    counts as lost; `measured` says in words what was measured and what was left out. `read_at_end` is false where the
    loss is one number and does not come in at the direction's last step, so that lags from there mean little.
    """

    place: Place
    cell: str
    gradient: Reach
    inputs: Reach
    needs: int | None
    threshold: float
    measured: str
    read_at_end: bool = True

    @property
    def half_life(self) -> float:
        """Steps in which the loss's gradient halves; see `Reach.half_life`."""
        return self.gradient.half_life

    @property
    def lost_at(self) -> int | None:
        """The first lag at which the gradient's share is under the threshold and stays there; None if there is none."""
        return self.gradient.lost_at(self.threshold)

    @property
    def inputs_lost_at(self) -> int | None:
        """The same for the input's influence on the state."""
        return self.inputs.lost_at(self.threshold)

    @property
    def at_needs(self) -> float:
        """The gradient's share at the lag the task needs, 0 where nothing arrives in any row; NaN if not known."""
        return math.nan if self.needs is None else self.gradient.at(self.needs)

    @property
    def verdict(self) -> str:
        """In plain words: "halves every 2.2 steps; the first and the last of your 80 steps do not reach each other"."""
        if not self.read_at_end:
            return "the loss does not read this direction at its end, so how far it reaches back cannot be told"
        if not self.gradient.at(0) > 0:
            return "no gradient arrives from this loss"
        return "; ".join([self.gradient.pace, self._against_needs, *self._cut_off])

    @property
    def _against_needs(self) -> str:
        last = self.gradient.longest
        if self.needs is None:
            if self.lost_at is not None:
                return f"less than {self.threshold:.2g} of it is left from {self.lost_at} steps back on"
            return f"{_share(self.gradient.at(last))} of it is left {last} steps back, the longest way there is"
        share = self.at_needs
        if self.needs == last:
            pair, between = "the first and the last", f"between the last and the first of your {self.needs + 1} steps"
            apart = f"{pair} of your {self.needs + 1} steps"
        else:
            apart, between = f"steps that lie {self.needs} apart", f"over the {self.needs} steps that are needed"
        if math.isnan(share):
            return f"whether it goes back the {self.needs} steps that are needed cannot be told from these sequences"
        if share < self.threshold:
            return f"{apart} do not reach each other"
        if share > 10:
            return f"it grows {share:.2g}-fold {between}"
        return f"{_share(share)} of it is left {between}"

    @property
    def _cut_off(self) -> list[str]:
        """Where part of the rows gets nothing at all, which a mean over the others would not show."""
        lag = self.gradient.longest if self.needs is None else self.needs
        if lag >= len(self.gradient.share) or not 0 < self.gradient.zeros[lag] < self.gradient.rows[lag]:
            return []
        return [f"in {_share(self.gradient.zeros[lag] / self.gradient.rows[lag])} of the cases nothing arrives at all"]


def _share(share: float) -> str:
    return f"{100 * share:.2g}%" if share < 0.995 else f"{100 * share:.0f}%"


def reach(
    model: nn.Module,
    batch: Any,
    loss: Callable[[Any], Tensor],
    needs: int | None = None,
    *,
    times: int | None = None,
    probes: int = PROBES,
    threshold: float = THRESHOLD,
    seed: int = 0,
    dtype: torch.dtype | None = torch.float64,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[LayerReach]:
    """How far the loss's gradient reaches back, and the inputs forward, in every recurrent layer and direction.

    `batch` is what the model's forward takes: a tuple of positional arguments, a dict of keywords, or one object.
    `loss` is called with the model's output and returns either the losses of each step [T, B], whose gradients are then
    followed back from `times` steps of every row, evenly spread (by default 8, in long sequences fewer); or the losses
    of each row [B], or one number, the rows' sum or mean: then lags count from each row's end. Losses past a row's end
    are not used.

    `needs` is the lag that the task needs. By default that is from the first step to the last, where the loss is not
    given by step (of half of the rows, where their lengths differ), and unknown where it is. `threshold` is the share
    of the gradient that counts as lost.

    The inputs' influence is the Frobenius norm of dh_t/dx_{t-k}, x being the layer's own input and h all of a cell's
    states, at `times` steps t of every row; it is estimated from `probes` random orthogonal directions, drawn for each
    row and time from a generator of its own that begins at `seed`, and exact in a cell of no more numbers than that.

    In a layer of a bidirectional stack, only what lies before t in the direction's own order counts as a lag.
    The model runs on a copy and in `dtype`, for float32 loses what fades below 1e-38; it stays in training or
    evaluation mode. `on_progress(done, all)` is called after each pass back.

    Raises ThroughtimeError for a model without a recurrent layer, a batch too large, a loss of another shape, or
    gradients that are not finite.
    """
    for name, number in {"times": times, "probes": probes}.items():
        if number is not None and number < 1:
            raise ThroughtimeError(f"{name} is {number}; give a whole number from 1")
    run = rehearse(model, batch, loss, dtype=dtype)
    losses = checked_losses(run)
    per_step = losses.dim() == 2
    if times is None:
        longest = max(record.problem.steps for record in run.records)
        times = min(TIMES, max(FEWEST_TIMES, MOST_PASSED // longest))
    passes = Progress((times if per_step else 1) + times * len(run.records), on_progress)
    if per_step:
        backward, at_end = _of_loss(run.records, losses, times, passes), [True] * len(run.records)
    else:
        backward, at_end = _of_ends(run.records, losses, passes)
    inputs = _of_inputs(run.records, times, probes, seed, passes)
    for place, *norms in zip(run.places, backward, inputs, strict=True):
        if any(np.isinf(found).any() for found in norms):
            raise ThroughtimeError(
                f"{place}: a gradient is not finite, so how far it reaches cannot be told; first_failure(model, batch, "
                "loss) says where that begins"
            )
    return [
        LayerReach(
            place=place,
            cell=record.cell.name,
            gradient=Reach.of(gradient),
            inputs=Reach.of(influence),
            needs=first_to_last(record) if needs is None and not per_step else needs,
            threshold=threshold,
            measured=_said(record, per_step, times, probes),
            read_at_end=read,
        )
        for place, record, gradient, read, influence in zip(
            run.places, run.records, backward, at_end, inputs, strict=True
        )
    ]


def checked_losses(run: Rehearsal) -> Tensor:
    """The loss of a rehearsal, if it can be followed back. Raises ThroughtimeError if it cannot."""
    losses = run.loss
    if empty := [str(place) for place, record in zip(run.places, run.records, strict=True) if not record.states]:
        raise ThroughtimeError(f"{empty[0]} ran over no steps; give a batch of sequences that have some")
    if not isinstance(losses, Tensor) or losses.dim() > 2:
        found = f"a tensor of shape {list(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
        raise ThroughtimeError(
            f"the loss is {found}; return one number, the losses of each row [B] or of each step [T, B]"
        )
    for place, record in zip(run.places, run.records, strict=True):
        wanted = [record.problem.steps, record.problem.rows]
        if losses.dim() == 2 and list(losses.shape) != wanted:
            raise ThroughtimeError(
                f"the losses of each step have shape {list(losses.shape)}, and {place} ran {wanted} steps and rows; "
                "return [T, B], steps first, or one number for a model whose layers run at different paces"
            )
    if not losses.requires_grad:
        raise ThroughtimeError("the loss does not depend on anything that has a gradient; compute it from the output")
    return losses


def _of_ends(
    records: Sequence[Record], losses: Tensor, passes: Progress
) -> tuple[list[NDArray[np.float64]], list[bool]]:
    """|dL/dh_{T-k}| by lag, and whether it is at its end that the loss reads each recurrence."""
    loss, ends = losses.sum(), [_ends(record) for record in records]
    found = _gradients_by_lag(records, loss, ends)
    outputs = [record.output for record in records if record.output is not None]
    entering = [
        _by_lag(record, _norms(gradient), end)
        for record, gradient, end in zip(records, gradients(loss, outputs), ends, strict=True)
    ]
    passes.advance()
    return found, [_read_at_end(record, *norms) for record, *norms in zip(records, found, entering, strict=True)]


def _read_at_end(record: Record, total: NDArray[np.float64], entering: NDArray[np.float64]) -> bool:
    """Whether the loss comes in where lags begin to count, rather than (almost) all of it somewhere before.

    What comes in there is all of the gradient at lag 0. A bidirectional layer's backward direction, read where it has
    seen one step, passes for a gradient that explodes if nobody looks.
    """
    elsewhere = np.nan_to_num(entering[1:]).max(axis=0, initial=0.0)
    faint = 1e-3 if record.reverse else 0.0
    return bool(np.mean((elsewhere > 0) & ~(total[0] > faint * elsewhere)) < 0.5)


def _of_loss(records: Sequence[Record], losses: Tensor, times: int, passes: Progress) -> list[NDArray[np.float64]]:
    """|dL_t/dh_{t-k}| by lag, [lags, times * rows] for each record, at `times` steps t of each row."""
    found: list[list[NDArray[np.float64]]] = []
    lengths = lengths_of(records[0])
    rows = torch.arange(len(lengths), device=losses.device)
    for number in range(times):
        at = _spread(lengths, number, times)
        chosen = losses[at.clamp(min=0).to(losses.device), rows]
        loss = torch.where((at >= 0).to(losses.device), chosen, 0.0).sum()
        found.append(_gradients_by_lag(records, loss, [at] * len(records)))
        passes.advance()
    return [np.concatenate(parts, axis=1) for parts in zip(*found, strict=True)]


def _of_inputs(
    records: Sequence[Record], times: int, probes: int, seed: int, passes: Progress
) -> list[NDArray[np.float64]]:
    """|dh_t/dx_{t-k}| by lag, [lags, times * rows] for each record, at `times` steps t of each row."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for record in records:
        by_time, lengths = [], lengths_of(record)
        states = torch.stack(in_step_order(record, [torch.cat(step, dim=1) for step in record.states]))  # [T, B, N]
        for number in range(times):
            at = _spread(lengths, number, times)
            if record.reverse:
                at = torch.where(at < 0, at, lengths - 1 - at)
            picked = states[at.clamp(0, len(states) - 1).to(states.device), torch.arange(len(at), device=states.device)]
            directions = _directions(picked, probes, generator)  # [P, B, N]
            products = None
            if picked.requires_grad:
                (products,) = torch.autograd.grad(
                    picked, record.problem.x, directions, retain_graph=True, allow_unused=True, is_grads_batched=True
                )  # [P, T, B, I]
            if products is None:  # x does not come into these states
                products = torch.zeros_like(record.problem.x).expand(len(directions), *record.problem.x.shape)
            by_time.append(_by_lag(record, _norms(products.permute(1, 2, 0, 3).flatten(2)), at))
            passes.advance()
        found.append(np.concatenate(by_time, axis=1))
    return found


def _directions(states: Tensor, probes: int, generator: torch.Generator) -> Tensor:
    """Orthogonal directions [P, B, N] for states [B, N], as long as it takes for |V J|_F to be |J|_F on average."""
    rows, width = states.shape
    if width <= probes:
        return torch.eye(width).to(states)[:, None, :].expand(width, rows, width)
    drawn = torch.randn(rows, width, probes, generator=generator, dtype=torch.float64)
    return (torch.linalg.qr(drawn).Q * math.sqrt(width / probes)).permute(2, 0, 1).to(states)


def _spread(lengths: Tensor, number: int, times: int) -> Tensor:
    """The number-th of `times` steps spread evenly over each row from end to end; -1 where it is none of its own."""
    last = lengths - 1
    if times == 1:
        return last
    at = last * number // (times - 1)
    if number > 0:
        at = torch.where(at == last * (number - 1) // (times - 1), -1, at)
    return torch.where(lengths > 0, at, -1)


def _said(record: Record, per_step: bool, times: int, probes: int) -> str:
    steps = f"{times} step{'' if times == 1 else 's'} of each, evenly spread"
    loss = f"the losses at {steps}" if per_step else "the loss as one, lags counted from each end"
    width = sum(state.shape[1] for state in record.states[0]) if record.states else 0
    ways = "exactly" if width <= probes else f"by {probes} random directions of {width}"
    return f"{said_rows(record)}; {loss}; the inputs' influence at {steps}, {ways}"
