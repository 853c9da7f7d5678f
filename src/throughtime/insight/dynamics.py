"""A layer as a dynamical system: lag-k Jacobians, Lyapunov exponents, fixed and slow points. Numbers only.

All from the cell's own derived step Jacobian, so for a user's cell as for the built-in ones, and in float64 whatever
the layer's type. All states of a cell are one vector of N numbers. Nothing here changes the layer or draws a number.

Sources: Pascanu, Mikolov & Bengio 2013 (arXiv:1211.5063) for the product of Jacobians; Benettin, Galgani, Giorgilli &
Strelcyn 1980 (Meccanica 15) for the spectrum by QR, Vogt et al. 2022 (Frontiers in Applied Mathematics and Statistics
8) for its use on recurrent networks; Sussillo & Barak 2013 (Neural Computation 25) for fixed and slow points.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from throughtime.engine.problem import Problem
from throughtime.engine.targets import reference
from throughtime.errors import ShapeError, ThroughtimeError
from throughtime.insight.fixed_points import FixedPoint, Held, Search, search
from throughtime.insight.rehearsal import Progress
from throughtime.insight.step_map import StepMap
from throughtime.nn.layout import Lengths, State
from throughtime.nn.recurrent import Call, Layer

if TYPE_CHECKING:
    from numpy.typing import NDArray


# What is found


@dataclass(frozen=True, eq=False)
class Dynamics:
    """One direction of one layer, along the sequences it was shown.

    `layer` counts from 0; `backward` is the direction from the last step to the first; `cell` is the cell's name.

    `lags` [K], rising; `log_singular_values` [K, N], largest first: the natural logarithm of the singular values of
    dh_T/dh_{T-k}, means over the rows with at least k steps (T is a row's last step), of which there are
    `rows_of_lag` [K]; -inf where one is zero in a row, NaN where it lies below the rounding of the largest (2e-16 N
    of it) and cannot be told.

    `exponents` [E], nats per step, largest first: the Lyapunov spectrum over the steps seen, the mean over rows, each
    weighted by its steps; finite-time exponents, for `steps` steps in `rows` of the `rows_given` rows.

    `fixed_points`, slowest first, under `fixed_input` [I], the mean input seen; `starts` states began the search, and
    `lost` of them ended at neither a fixed nor a slow point.
    """

    layer: int
    backward: bool
    cell: str
    lags: NDArray[np.int64]
    log_singular_values: NDArray[np.float64]
    rows_of_lag: NDArray[np.int64]
    exponents: NDArray[np.float64]
    steps: int
    rows: int
    rows_given: int
    fixed_points: tuple[FixedPoint, ...]
    fixed_input: NDArray[np.float64]
    starts: int
    lost: int

    @property
    def singular_values(self) -> NDArray[np.float64]:
        """`log_singular_values` as plain numbers [K, N]; over hundreds of steps they can leave float64's range."""
        with np.errstate(over="ignore", under="ignore"):
            return np.exp(self.log_singular_values)

    @property
    def norms(self) -> NDArray[np.float64]:
        """The largest singular value by lag [K]: how much of a gradient can be left after k steps, at best."""
        return self.singular_values[:, 0]

    @property
    def half_life(self) -> float:
        """Steps in which what is remembered longest halves, ln 2 over minus the largest exponent.

        Negative where it grows (its doubling time), infinite at an exponent of zero, zero where all is forgotten at
        once.
        """
        largest = float(self.exponents[0])
        if largest == 0:
            return math.inf
        return -math.log(2) / largest

    def verdict(self, needed: int, *, trained: bool = True) -> str:
        """In plain words what is left of a gradient after `needed` steps, from the lag-k norm and never from a radius.

        The longest lag seen stands in where it is shorter than `needed`, and is then named. `trained=False` says that
        the layer has not been trained. Raises ThroughtimeError for `needed` below 1.
        """
        if needed < 1:
            raise ThroughtimeError(f"needed is {needed!r}; give the lag in steps that the task needs, from 1")
        place = max(int(np.searchsorted(self.lags, needed, side="right")) - 1, 0)
        lag, log_norm = int(self.lags[place]), float(self.log_singular_values[place, 0])
        before = "" if trained else " before it has seen data"
        over = f"over {lag} of the {needed} steps needed" if lag != needed else f"over the {lag} steps needed"
        if log_norm < math.log(VANISHED):
            return f"vanishes{before}: {over}, at most {_power(log_norm)} of a gradient is left"
        if log_norm > -math.log(VANISHED):
            return f"explodes{before}: {over}, a gradient can grow {_power(log_norm)} fold"
        if log_norm > 0:
            return f"carries{before}: {over}, a gradient can grow {_power(log_norm)} fold"
        said = f"carries{before}: {over}, up to {_power(log_norm)} of a gradient is left"
        peak = int(np.argmax(self.log_singular_values[: place + 1, 0]))
        highest = float(self.log_singular_values[peak, 0])
        return said + (f", after growing up to {_power(highest)} fold at lag {self.lags[peak]}" if highest > 0 else "")


VANISHED = 1e-3
"""A share of a gradient below this, or above its inverse, is called vanished or exploded."""


def _power(log_norm: float) -> str:
    """A number given by its natural logarithm, in three digits, also outside the range of floats."""
    if log_norm == -math.inf:
        return "nothing"
    exponent = log_norm / math.log(10)
    if -3 < exponent < 4:
        return f"{10**exponent:.3g}"
    return f"1e{round(exponent):+d}".replace("+", "")


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def dynamics(
    layer: Layer,
    x: Tensor | PackedSequence,
    h_0: State | None = None,
    *,
    lengths: Lengths | None = None,
    outside: Mapping[str, Tensor] | None = None,
    lags: Sequence[int] | None = None,
    exponents: int | None = 32,
    skip: int = 0,
    rows: int = 4,
    starts: int = 32,
    slow: float = 0.1,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Dynamics]:
    """Lag-k singular values, Lyapunov exponents and fixed points of each direction of each layer, on this input.

    x, h_0, lengths and outside are as in `Recurrent.forward`. Dropout between layers is off, as in evaluation. Singular
    values and exponents follow `rows` rows, evenly spaced over the batch from its longest row to its shortest; pass the
    batch's size for all of them. `lags` are the k of dh_T/dh_{T-k}, by default 1, 2, 3, 4, 6, 8, 12, ... and the two
    longest (from the first step to the last, and from h_0); longer ones than that are left out, as `Dynamics.lags`
    shows. `exponents` is how many, the largest first, None for all; the first `skip` steps of a row are left out of
    them, so that a transient can pass. `starts` states, evenly spaced over all rows and steps, begin the search for
    fixed points; 0 leaves it out. A local minimum of the speed counts as a slow point if it is below `slow` of the
    median speed of the states seen. Time is of order N^3 for each row and step; `on_progress(done, all)` is called
    after each of the three parts of each direction.

    Returns one `Dynamics` per layer and direction, in the order of the parameters. Raises ShapeError for an input that
    does not fit, ThroughtimeError for other arguments that make no sense or an input with no step in it.
    """
    if not isinstance(layer, Layer):
        raise ThroughtimeError(
            f"dynamics takes one recurrent layer of throughtime.nn, not {type(layer).__name__}; for torch's own call "
            "throughtime.upgrade first, for a model call it for each recurrent layer"
        )
    asked = _Asked(lags, exponents, skip, rows, starts, slow)
    found: list[Dynamics] = []
    directions = 2 if layer.bidirectional else 1
    passes = Progress(3 * layer.num_layers * directions, on_progress)

    def follow(problem: Problem) -> tuple[Tensor, tuple[Tensor, ...]]:
        exact = problem.with_tensors([t.detach().to("cpu", torch.float64) for t in problem.tensors])
        history: list[tuple[Tensor, ...]] = []
        result = reference.forward(exact, history)
        found.append(_of_direction(exact, history, asked, len(found) // directions, passes))
        return result.output, result.states

    with torch.no_grad(), _evaluating(layer):
        layer._forward(Call(x, h_0, lengths, None, outside), follow)
    return found


@dataclass(frozen=True, eq=False)
class _Asked:
    """What the caller of `dynamics` asked for, checked."""

    lags: Sequence[int] | None
    exponents: int | None
    skip: int
    rows: int
    starts: int
    slow: float

    def __post_init__(self) -> None:
        if self.lags is not None and (not len(self.lags) or min(self.lags) < 1):
            raise ThroughtimeError(f"lags are {self.lags!r}; give at least one, in steps from 1")
        least = {"exponents": (self.exponents, 1), "skip": (self.skip, 0), "rows": (self.rows, 1)}
        for name, (number, low) in {**least, "starts": (self.starts, 0)}.items():
            if number is not None and number < low:
                raise ThroughtimeError(f"{name} is {number!r}; give a whole number from {low}")
        if not self.slow > 0:
            raise ThroughtimeError(f"slow is {self.slow!r}; give a share of the speed seen, above 0")


@contextmanager
def _evaluating(layer: Layer) -> Iterator[None]:
    """Without dropout, which would draw random numbers; the layer is left as it was."""
    was = layer.training
    layer.training = False
    try:
        yield
    finally:
        layer.training = was


@dataclass(frozen=True, eq=False)
class _Path:
    """One row's way: x [L, I], outside inputs [L, 1 or H] each, states before each step [L, N] and after the last."""

    x: Tensor
    outside: tuple[Tensor, ...]
    before: Tensor
    last: Tensor


def _of_direction(
    problem: Problem, history: list[tuple[Tensor, ...]], asked: _Asked, depth: int, passes: Progress
) -> Dynamics:
    lengths = [problem.steps] * problem.rows if problem.lengths is None else list(problem.lengths)
    walked = [row for row in sorted(range(problem.rows), key=lambda row: -lengths[row]) if lengths[row] > 0]
    if not walked:
        raise ThroughtimeError("x has no step to follow; give at least one sequence of at least one step")
    step = StepMap(problem)
    joined = torch.stack([torch.cat(states, -1) for states in history])  # [T, B, N] in the order of computation
    if not joined.isfinite().all():
        raise ThroughtimeError(
            f"the states of layer {depth} become infinite or NaN on this input, so it has no dynamics to measure; "
            "insight.failure tells where that begins"
        )
    paths = {row: _path(problem, joined, row, lengths[row]) for row in walked}
    places = np.unique(np.linspace(0, len(walked) - 1, min(asked.rows, len(walked))).round().astype(int))
    chosen = [paths[walked[place]] for place in places]
    lags = _lags(asked, max(len(path.x) for path in chosen))
    log_values, counts = _singular_values(step, chosen, lags)
    passes.advance()
    spectrum = _spectrum(step, chosen, asked)
    passes.advance()
    x, outside = _mean_input(list(paths.values()))
    points = _search(Held(step, x, outside), list(paths.values()), asked)
    passes.advance()
    return Dynamics(
        layer=depth,
        backward=problem.reverse,
        cell=problem.cell.name,
        lags=np.array(lags),
        log_singular_values=log_values,
        rows_of_lag=counts,
        exponents=spectrum,
        steps=sum(max(len(path.x) - asked.skip, 0) for path in chosen),
        rows=len(chosen),
        rows_given=problem.rows,
        fixed_points=points.points,
        fixed_input=x[0].numpy(),
        starts=points.starts,
        lost=points.lost,
    )


def _path(problem: Problem, joined: Tensor, row: int, length: int) -> _Path:
    """A row's steps in the order of computation; past its end a row stands still in `joined`."""
    order = [t for t in problem.order() if t < length]
    skipped = problem.steps - length if problem.reverse else 0
    states = joined[skipped : skipped + length, row]
    first = torch.cat([state[row] for state in problem.states])
    per_step = len(problem.cell.per_step)
    outside = tuple(
        value[order, row] if place < per_step else value[row].expand(length, -1)
        for place, value in enumerate(problem.outside)
    )
    return _Path(problem.x[order, row], outside, torch.cat([first[None], states[:-1]]), states[-1])


def _mean_input(paths: list[_Path]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """x [1, I] and outside inputs [1, 1 or H], means over all steps of all rows."""
    outside = zip(*(path.outside for path in paths), strict=True)
    x = torch.cat([path.x for path in paths]).mean(0, keepdim=True)
    return x, tuple(torch.cat(values).mean(0, keepdim=True) for values in outside)


def _search(held: Held, paths: list[_Path], asked: _Asked) -> Search:
    if not asked.starts:
        return Search((), 0, 0, math.nan)
    seen = torch.cat([torch.cat([path.before[1:], path.last[None]]) for path in paths])  # [all steps, N]
    return search(held, seen, asked.starts, asked.slow)


def _lags(asked: _Asked, longest: int) -> list[int]:
    if asked.lags is not None:
        found = sorted({int(lag) for lag in asked.lags if lag <= longest})
        if not found:
            raise ThroughtimeError(f"the lags begin at {min(asked.lags)}, and the longest row has {longest} steps")
        return found
    doubling = (base << power for power in range(longest.bit_length()) for base in (2, 3))
    return sorted({1, max(longest - 1, 1), longest, *(lag for lag in doubling if lag <= longest)})


def _step_jacobians(step: StepMap, path: _Path, order: Iterable[int]) -> Iterator[Tensor]:
    """The Jacobians [N, N] of a row's steps, in any order."""
    for t in order:
        outside = [value[t : t + 1] for value in path.outside]
        yield step.jacobian(path.x[t : t + 1], path.before[t : t + 1], outside)[0]


# ---------------------------------------------------------------------------------------------------------------------
# Singular values of the lag-k Jacobian


def _singular_values(
    step: StepMap, paths: list[_Path], lags: list[int]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Logarithms [K, N], means over rows, and the number of rows [K]."""
    total = np.zeros((len(lags), step.size))
    counts = np.zeros(len(lags), dtype=np.int64)
    for path in paths:
        steps = range(len(path.x) - 1, len(path.x) - 1 - min(lags[-1], len(path.x)), -1)
        for place, logs in _log_singular_values(_step_jacobians(step, path, steps), lags):
            total[place] += logs
            counts[place] += 1
    return total / counts[:, None], counts


def _log_singular_values(jacobians: Iterable[Tensor], lags: list[int]) -> Iterator[tuple[int, NDArray[np.float64]]]:
    """For Jacobians from the last step backwards, the place of each lag and its logarithms [N], largest first.

    The product is scaled as it grows, so that it neither overflows nor fades to nothing.
    """
    product, log_scale = None, 0.0
    place = {lag: i for i, lag in enumerate(lags)}
    for lag, jacobian in enumerate(jacobians, start=1):
        product = jacobian if product is None else product @ jacobian
        largest = float(product.abs().max())
        if 0 < largest < math.inf:
            product = product / largest
            log_scale += math.log(largest)
        if lag in place:
            values = torch.linalg.svdvals(product).numpy() if math.isfinite(largest) else np.full(len(product), np.nan)
            with np.errstate(divide="ignore"):
                logs = np.log(values) + log_scale
            unresolved = (values < len(values) * np.finfo(float).eps * values[0]) & (lag > 1)
            yield place[lag], np.where(unresolved, np.nan, logs)


# ---------------------------------------------------------------------------------------------------------------------
# The Lyapunov spectrum


def lyapunov(
    jacobians: Iterable[Tensor | NDArray[np.float64]], *, count: int | None = None, skip: int = 0
) -> NDArray[np.float64]:
    """The Lyapunov spectrum [count], nats per step and largest first, of any map, from its step Jacobians [N, N].

    Benettin et al. 1980, with a QR decomposition at every step: Q_t R_t = J_t Q_{t-1}, and the exponents are the means
    of ln |diag R_t|. `count` is how many, None for all N. The first `skip` steps turn Q but are not in the mean. A
    direction that is lost altogether has exponent -inf.

    Raises ShapeError for matrices that are not square or of different sizes, ThroughtimeError where no step is left
    and for a count outside 1..N.
    """
    basis: Tensor | None = None
    total, steps = None, 0
    for given in jacobians:
        jacobian = torch.as_tensor(given, dtype=torch.float64)
        size = len(jacobian) if jacobian.dim() else 0
        if jacobian.shape != (size, size) or (basis is not None and len(basis) != size):
            wanted = f"[{len(basis)}, {len(basis)}] as the first" if basis is not None else "square, [N, N]"
            raise ShapeError(f"Jacobian {steps} has shape {list(jacobian.shape)}; it must be {wanted}")
        if basis is None:
            if count is not None and not 1 <= count <= size:
                raise ThroughtimeError(f"count is {count!r}; a map of {size} numbers has 1 to {size} exponents")
            basis = torch.eye(size, size if count is None else count, dtype=torch.float64)
            total = torch.zeros(basis.shape[1], dtype=torch.float64)
        basis, r = torch.linalg.qr(jacobian @ basis)
        if steps >= skip:
            total += r.diagonal().abs().log()
        steps += 1
    if total is None or steps <= skip:
        raise ThroughtimeError(f"there are {steps} steps and {skip} are skipped, so no exponent can be told; give more")
    return np.sort((total / (steps - skip)).numpy())[::-1].copy()


def _spectrum(step: StepMap, paths: list[_Path], asked: _Asked) -> NDArray[np.float64]:
    """The spectrum of each row with steps left after those to skip; their mean, weighted by those steps."""
    enough = [path for path in paths if len(path.x) > asked.skip]
    if not enough:
        longest = max(len(path.x) for path in paths)
        raise ThroughtimeError(f"skip is {asked.skip} and the longest row has {longest} steps; skip fewer")
    count = step.size if asked.exponents is None else min(asked.exponents, step.size)
    spectra = [
        lyapunov(_step_jacobians(step, path, range(len(path.x))), count=count, skip=asked.skip) for path in enough
    ]
    return np.average(spectra, axis=0, weights=[len(path.x) - asked.skip for path in enough])
