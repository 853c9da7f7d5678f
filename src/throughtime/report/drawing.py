"""The pictures, each an SVG of its own: numbers in, a text out. Told apart with any colour vision, and in print."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe & Ito's palette without its yellow, told apart with any colour vision; a marker each says the same again."""

MARKERS = ("o", "s", "^", "D", "v", "P", "X")

STYLE = {
    "axes.edgecolor": "#555555",
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.constrained_layout.use": True,
    "font.size": 11,
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "svg.fonttype": "none",
    "svg.hashsalt": "throughtime",
}
FAINTEST = 1e-12
"""Below this a share of a gradient is nothing to train on, and a picture of it would hide the rest."""

BEFORE: dict[str, Any] = {"linestyle": "--", "linewidth": 1.2}
"""How a network before its training is drawn."""

MOST_LOG = 300.0
"""Natural logarithms beyond this are drawn at it: the range of floats ends at 709."""

WIDTH, HEIGHT = 5.2, 3.7  # inches, at 72 units of the SVG each: readable at the width of a telephone


@dataclass(frozen=True)
class Line:
    """One network's values by lag, [lags]; and before training, where that is known."""

    name: str
    values: NDArray[np.float64]
    before: NDArray[np.float64] | None = None


def accuracy(
    accuracies: Mapping[str, Sequence[float]], baseline: float, *, called: str, counted: str = "sequences"
) -> str:
    """Accuracy by cell, one dot a seed and a bar at the mean; a line at the baseline, by what it is `called`."""
    with _axes() as (axes, svg):
        for place, values in enumerate(accuracies.values()):
            offsets = np.linspace(-0.12, 0.12, len(values)) if len(values) > 1 else np.zeros(1)
            colour, marker = COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)]
            percent = 100 * np.asarray(values)
            axes.hlines(percent.mean(), place - 0.25, place + 0.25, color=colour, linewidth=2.5)
            axes.plot(place + offsets, percent, marker, color=colour, markersize=7, alpha=0.75, linestyle="none")
        axes.set_xticks(range(len(accuracies)), list(accuracies))
        axes.set_xlim(-0.5, len(accuracies) - 0.5)
        axes.set_ylabel(f"test {counted} right, %")
        axes.grid(axis="x", visible=False)
        lowest = 100 * min(min(values) for values in accuracies.values())
        highest = 100 * max(max(values) for values in accuracies.values())
        if 100 * baseline > lowest - 15:
            free = "top" if 100 * baseline < lowest else "bottom"  # the side without marks
            lowest, highest = min(lowest, 100 * baseline), max(highest, 100 * baseline)
            axes.axhline(100 * baseline, color="#555555", linestyle=":")
            right: Any = ("axes fraction", "data")
            axes.annotate(called, (1, 100 * baseline), xycoords=right, ha="right", va=free, fontsize=9)
        # Ten points at least, so that differences of a few sequences look as small as they are.
        top = min(highest + 1, 100.5)
        axes.set_ylim(min(lowest - 1, top - 10), top)
    return svg.getvalue()


def curves(curves: Mapping[str, NDArray[np.float64]], ylabel: str, *, log: bool) -> str:
    """Curves by epoch, [seeds, epochs] for each cell: every seed faint, their mean bold."""
    with _axes() as (axes, svg):
        for place, (name, seeds) in enumerate(curves.items()):
            colour, epochs = COLOURS[place % len(COLOURS)], np.arange(1, seeds.shape[1] + 1)
            axes.plot(epochs, seeds.T, color=colour, linewidth=0.8, alpha=0.35)
            axes.plot(epochs, seeds.mean(axis=0), color=colour, label=name, **_marks(place, len(epochs)))
        axes.set_xlabel("epoch")
        _whole_ticks(axes)
        axes.set_ylabel(ylabel)
        if log:
            _log_scale(axes)
        axes.legend()
    return svg.getvalue()


def reach(
    lines: Sequence[Line],
    needed: Mapping[str, int],
    *,
    xlabel: str,
    ylabel: str,
    lost: float | None = None,
    limits: tuple[float, float] | None = None,
) -> str:
    """Share left by lag, before training (dashed) and after; `needed` marks lags by name, `lost` the share of nothing.

    `limits` are the ends of a logarithmic vertical axis, so that pictures can stand side by side (`common_limits`).
    """
    shown = _shown_lags(_shares(lines))
    with _axes() as (axes, svg):
        for place, line in enumerate(lines):
            colour = COLOURS[place % len(COLOURS)]
            if line.before is not None:
                axes.plot(line.before, color=colour, **BEFORE)
            axes.plot(line.values, color=colour, label=line.name, **_marks(place, shown + 1))
        if limits is None:
            _log_scale(axes)
        else:
            axes.set_yscale("log")
            axes.set_ylim(limits)
        _whole_ticks(axes)
        axes.set_xlim(-0.04 * shown, 1.04 * shown)
        _mark_lags(axes, needed, shown)
        if lost is not None and axes.get_ylim()[0] < lost:
            axes.axhspan(axes.get_ylim()[0], lost, color="#888888", alpha=0.12, linewidth=0)
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        _legend(axes, lines)
    return svg.getvalue()


def common_limits(lines: Sequence[Line]) -> tuple[float, float]:
    """Ends of a logarithmic axis on which all of these can be seen; below FAINTEST nothing is shown."""
    values = np.concatenate([share[np.isfinite(share) & (share > 0)] for share in _shares(lines)])
    if not values.size:
        return FAINTEST, 2.0
    return max(FAINTEST, float(values.min()) / 2), max(2.0, 2 * float(values.max()))


def pairs(norms: NDArray[np.float64], label: str) -> str:
    """Loss at step i (down) against state at step k (across), [T, T], in shades of powers of ten.

    NaN, where the state comes after the loss or a step has no loss, stays white; an exact zero is grey.
    """
    from matplotlib import colormaps
    from matplotlib.colors import BoundaryNorm
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    alive = np.isfinite(norms) & (norms > 0)
    logs = np.log10(np.where(alive, norms, 1.0))
    highest = float(logs[alive].max()) if alive.any() else 0.0
    lowest = max(float(logs[alive].min()) if alive.any() else 0.0, highest + math.log10(FAINTEST))
    levels = MaxNLocator(nbins=8, steps=[1, 2, 5, 10]).tick_values(lowest, max(highest, lowest + 0.5))
    shades = colormaps["YlGnBu"].with_extremes(bad="white", under="#dddddd")
    shown = np.ma.masked_where(np.isnan(norms), np.where(alive, np.maximum(logs, levels[0]), levels[0] - 1))
    with _axes() as (axes, svg):
        steps = len(norms)
        image = axes.imshow(
            shown,
            cmap=shades,
            norm=BoundaryNorm(levels, shades.N),
            interpolation="none",
            extent=(0.5, steps + 0.5, steps + 0.5, 0.5),
        )
        axes.grid(visible=False)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1, prune="lower"))
        axes.set_xlabel("state at step k")
        axes.set_ylabel("loss at step i")
        power = FuncFormatter(lambda level, _: f"$10^{{{level:g}}}$" if level == round(level) else f"{10**level:.2g}")
        bar = axes.figure.colorbar(image, ax=axes, format=power, spacing="proportional")
        bar.set_label(label)
    return svg.getvalue()


def shares(terms: Mapping[str, NDArray[np.float64]], xlabel: str, *, first: int) -> str:
    """Signed shares of a weight's gradient by the step that used it, [T] for each weight; `first` numbers the steps."""
    with _axes() as (axes, svg):
        axes.axhline(0, color="#555555", linewidth=1)
        for place, (name, values) in enumerate(terms.items()):
            steps = np.arange(first, len(values) + first)
            colour = COLOURS[place % len(COLOURS)]
            axes.plot(steps, 100 * values, color=colour, label=name, **_marks(place, len(steps)))
        _whole_ticks(axes)
        axes.set_xlabel(xlabel)
        axes.set_ylabel("share of its gradient, %")
        axes.legend(fontsize=9)
    return svg.getvalue()


def singular_values(lags: NDArray[np.int64], logs: NDArray[np.float64]) -> str:
    """The largest, the middle and the smallest singular value of the Jacobian over k steps; `logs` [lags, N] natural.

    NaN is what cannot be told from rounding. The unit line is where a change of the state keeps its size.
    """
    found = np.where(np.isfinite(logs), logs, math.nan)
    kinds = {"largest": found[:, 0], "median": found[:, found.shape[1] // 2], "smallest": found[:, -1]}
    with _axes() as (axes, svg):
        axes.axhline(1, color="#555555", linewidth=1)
        for place, (name, line) in enumerate(kinds.items()):
            values = np.exp(np.clip(line, -MOST_LOG, MOST_LOG))
            axes.plot(lags, values, color=COLOURS[place], label=name, marker=MARKERS[place], markersize=4)
        _log_scale(axes)
        _whole_ticks(axes)
        axes.set_xlabel("steps k")
        axes.set_ylabel("singular value over k steps")
        axes.legend(fontsize=9)
    return svg.getvalue()


def exponents(lines: Sequence[Line]) -> str:
    """Lyapunov exponents, nats a step, in descending order; above zero small changes grow. Untrained ones dashed."""
    with _axes() as (axes, svg):
        axes.axhline(0, color="#555555", linewidth=1)
        for place, line in enumerate(lines):
            colour = COLOURS[place % len(COLOURS)]
            for values, style in ((line.before, BEFORE), (line.values, {"label": line.name})):
                if values is not None:
                    ordered = np.sort(values[np.isfinite(values)])[::-1]
                    marks = _marks(place, len(ordered)) if style is not BEFORE else {}
                    axes.plot(np.arange(1, len(ordered) + 1), ordered, color=colour, **style, **marks)
        _whole_ticks(axes)
        axes.set_xlabel("direction in the state's space, fastest growing first")
        axes.set_ylabel("exponent, nats a step")
        _legend(axes, lines)
    return svg.getvalue()


def eigenvalues(points: Mapping[str, NDArray[np.complex128]]) -> str:
    """Eigenvalues in the complex plane with the unit circle, a marker of its own for each name."""
    from matplotlib.patches import Circle

    every = np.concatenate(list(points.values()))
    reach = max(1.15, 1.1 * float(np.abs(every).max(initial=0.0)))
    with _axes() as (axes, svg):
        axes.add_patch(Circle((0, 0), 1, facecolor="#f3f3f3", edgecolor="#555555"))
        for place, (name, values) in enumerate(points.items()):
            colour, marker = COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)]
            style: Any = {"color": colour, "markerfacecolor": "none", "linestyle": "none", "markersize": 5}
            axes.plot(values.real, values.imag, marker, label=name, **style)
        axes.set_xlim(-reach, reach)
        axes.set_ylim(-reach, reach)
        axes.set_aspect("equal")
        axes.set_xlabel("real part")
        axes.set_ylabel("imaginary part")
        axes.figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=9)
    return svg.getvalue()


def saturation(gates: Mapping[str, tuple[float, float]]) -> str:
    """Each gate's share of units and steps at its low and at its high end, as a bar from 0 to 100 %."""
    kinds = (("low end", COLOURS[1], "////"), ("in between", "#eeeeee", ""), ("high end", COLOURS[4], ""))
    names, values = list(gates), np.array(list(gates.values())).reshape(-1, 2)
    low, high = 100 * values[:, 0], 100 * values[:, 1]
    with _axes(height=max(1.8, 1.1 + 0.42 * len(names))) as (axes, svg):
        left = np.zeros(len(names))
        for (name, colour, hatch), width in zip(kinds, (low, 100 - low - high, high), strict=True):
            edge = "white" if hatch else "#777777"
            look: Any = {"color": colour, "hatch": hatch, "edgecolor": edge, "linewidth": 0.5}
            axes.barh(names, width, left=left, height=0.62, label=name, **look)
            left = left + width
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_xlim(0, 100)
        axes.set_xlabel("units and steps, %")
        axes.figure.legend(*axes.get_legend_handles_labels(), loc="outside upper right", ncols=3, fontsize=9)
    return svg.getvalue()


def memory(lines: Sequence[Line], needed: int | None) -> str:
    """How many steps each unit keeps what it holds, longest first, over the share of the units. Untrained ones dashed.

    What has no place on the axis, a unit that keeps everything or nothing, still counts in the share. `needed` steps
    are drawn as a line.
    """
    with _axes() as (axes, svg):
        for place, line in enumerate(lines):
            colour = COLOURS[place % len(COLOURS)]
            if line.before is not None:
                axes.plot(*_sorted_memory(line.before), color=colour, **BEFORE)
            share, steps = _sorted_memory(line.values)
            axes.plot(share, steps, color=colour, label=line.name, **_marks(place, len(share)))
        axes.set_yscale("log")
        axes.set_xlim(0, 100)
        if needed is not None and needed > 0:
            axes.axhline(needed, color="#555555", linestyle=":")
            right: Any = ("axes fraction", "data")
            axes.annotate(f"needed: {needed}", (1, needed), xycoords=right, ha="right", va="bottom", fontsize=9)
        axes.set_xlabel("units, longest memory first, %")
        axes.set_ylabel("memory, steps")
        _legend(axes, lines)
    return svg.getvalue()


def _sorted_memory(steps: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Share of the units, in per cent, and memory, longest first; what grows is never lost."""
    ordered = np.sort(np.where(steps < 0, math.inf, steps))[::-1]
    share = 100 * (np.arange(len(ordered)) + 0.5) / max(1, len(ordered))
    return share, np.where(np.isfinite(ordered) & (ordered > 0), ordered, math.nan)


def training(series: Mapping[str, NDArray[np.float64]], ylabel: str, *, log: bool, level: float | None = None) -> str:
    """What was watched in training, by epoch, [epochs] for each name; `level` is a threshold to draw across."""
    with _axes() as (axes, svg):
        for place, (name, values) in enumerate(series.items()):
            epochs = np.arange(1, len(values) + 1)
            axes.plot(epochs, values, color=COLOURS[place % len(COLOURS)], label=name, **_marks(place, len(epochs)))
        if level is not None:
            axes.axhline(level, color="#555555", linestyle=":", label=f"clipped at {level:.3g}")
        if log:
            _log_scale(axes)
        _whole_ticks(axes)
        axes.set_xlabel("epoch")
        axes.set_ylabel(ylabel)
        axes.legend(fontsize=9)
    return svg.getvalue()


def confusion(counts: NDArray[np.int64], labels: Sequence[str]) -> str:
    """True class against said class, in per cent of the true class."""
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    with _axes() as (axes, svg):
        axes.pcolormesh(share, cmap="Blues", vmin=0, vmax=1, edgecolors="white", linewidth=0.5)
        axes.invert_yaxis()
        axes.grid(visible=False)
        axes.set_aspect("equal")
        every = max(1, -(-len(labels) // 20))
        centres = np.arange(0, len(labels), every) + 0.5
        shown = [label if len(label) <= 12 else f"{label[:11]}…" for label in labels[::every]]
        axes.set_xticks(centres, shown, rotation=0 if max(map(len, shown)) <= 3 else 90)
        axes.set_yticks(centres, shown)
        axes.set_xlabel("said")
        axes.set_ylabel("true")
        if len(labels) <= 12:
            for (row, column), value in np.ndenumerate(share):
                if value > 0:
                    colour = "white" if value > 0.5 else "#222222"
                    text = f"{100 * value:.0f}" if value >= 0.005 else "<1"
                    axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", fontsize=9, color=colour)
    return svg.getvalue()


@contextmanager
def _axes(height: float = HEIGHT) -> Iterator[tuple[Axes, io.StringIO]]:
    """Axes to draw on; afterwards the text stream holds the picture. No global state of matplotlib is touched."""
    from matplotlib import style
    from matplotlib.figure import Figure

    svg = io.StringIO()
    with style.context(["default", STYLE]):
        figure = Figure(figsize=(WIDTH, height))
        yield figure.add_subplot(), svg
        figure.savefig(svg, format="svg", metadata={"Date": None})


def _shares(lines: Sequence[Line]) -> list[NDArray[np.float64]]:
    return [share for line in lines for share in (line.values, line.before) if share is not None]


def _shown_lags(shares: Sequence[NDArray[np.float64]]) -> int:
    """The longest lag to show: all of them, or a little more than those at which anything is left to see."""
    longest = max(len(share) for share in shares) - 1
    seen = max(int(np.flatnonzero(share >= FAINTEST).max(initial=1)) for share in shares)
    return max(1, min(longest, math.ceil(1.25 * seen)))


def _mark_lags(axes: Axes, needed: Mapping[str, int], shown: int) -> None:
    for words, lag in needed.items():
        if lag <= shown:
            axes.axvline(lag, color="#555555", linewidth=1, linestyle=":")
            _above(axes, words, lag, "center")
    if beyond := [f"{words} {lag}" for words, lag in needed.items() if lag > shown]:
        _above(axes, f"{', '.join(beyond)} →", 1.04 * shown, "right")


def _legend(axes: Axes, lines: Sequence[Line]) -> None:
    """The lines by name, and once for all what a dashed one is."""
    if any(line.before is not None for line in lines):
        axes.plot([], [], color="#555555", label="before training", **BEFORE)
    axes.legend(fontsize=9)


def _above(axes: Axes, words: str, place: float, alignment: str) -> None:
    where: Any = ("data", "axes fraction")
    axes.annotate(words, (place, 1.01), xycoords=where, ha=alignment, va="bottom", fontsize=9, color="#444444")


def _whole_ticks(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins="auto", integer=True, min_n_ticks=1))


def _log_scale(axes: Axes) -> None:
    """Make the vertical axis logarithmic where values span a decade; what is below FAINTEST is cut off."""
    values = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in axes.lines])
    values = values[np.isfinite(values) & (values > 0)]
    if values.size and values.max() > 10 * values.min():
        axes.set_yscale("log")
        axes.set_ylim(max(FAINTEST, values.min() / 2), 2 * values.max())


def _marks(place: int, points: int) -> dict[str, Any]:
    """A marker now and then along a line, at other places for each line."""
    every = max(1, points // 6)
    return {"marker": MARKERS[place % len(MARKERS)], "markersize": 5, "markevery": (place * every // 3, every)}
