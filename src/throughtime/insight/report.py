"""Numbers to one self-contained HTML page: nothing is fetched, nothing runs, and pictures are inline SVG."""

from __future__ import annotations

import io
import itertools
import math
import os
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from throughtime.errors import ThroughtimeError
from throughtime.insight.reach import Reach

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe & Ito's palette, told apart with any colour vision; a marker of its own says the same again."""

MARKERS = ("o", "s", "^", "D", "v", "P")

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

SIZE = (5.2, 3.7)  # inches, at 72 units of the SVG each: readable at the width of a telephone

SVG = "http://www.w3.org/2000/svg"
XLINK = "http://www.w3.org/1999/xlink"


@dataclass(frozen=True)
class Table:
    """A table of texts, right down to the digits shown, and a note that says what they are."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


@dataclass(frozen=True)
class Picture:
    """An inline SVG with a title, a caption below it and a description for those who cannot see it."""

    title: str
    svg: str
    caption: str
    description: str


@dataclass(frozen=True)
class Page:
    """A report: the verdict first, then what it rests on, the pictures, and how it was run."""

    title: str
    verdict: str
    findings: Sequence[str]
    table: Table
    pictures: Sequence[Picture]
    facts: Mapping[str, str]
    notices: Sequence[str] = ()


def render(page: Page) -> str:
    """The page as one HTML document."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("throughtime.insight"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    drawn = [
        (picture, Markup(_embed(picture.svg, f"picture{number}-", picture.description)))
        for number, picture in enumerate(page.pictures, start=1)
    ]
    return environment.get_template("page.html").render(page=page, drawn=drawn)


def save(html: str, path: Path) -> None:
    """Write the page whole or not at all: a reader never sees half of it, and a failure leaves nothing behind."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        partial.write_text(html, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise ThroughtimeError(f"{path}: cannot be written ({error.strerror}); choose another place") from error
    finally:
        partial.unlink(missing_ok=True)


def unused_path(asked: Path | None, default: str) -> Path:
    """Where a report may go without covering another: `asked`, or the first of default, default-2, ... that is free.

    Raises ThroughtimeError where `asked` exists, or its folder does not.
    """
    if asked is None:
        stem, suffix = os.path.splitext(default)
        names = itertools.chain([default], (f"{stem}-{number}{suffix}" for number in itertools.count(2)))
        return next(path for path in map(Path, names) if not path.exists())
    if asked.exists():
        raise ThroughtimeError(f"{asked}: exists already; choose another name for the report, or remove it first")
    if not asked.parent.is_dir():
        raise ThroughtimeError(f"{asked.parent}: no such directory to write the report in; make it first")
    return asked


def draw_accuracy(accuracies: Mapping[str, Sequence[float]], baseline: float) -> str:
    """Accuracy by cell, one dot a seed and a bar at the mean."""
    with _axes() as (axes, svg):
        for place, values in enumerate(accuracies.values()):
            offsets = np.linspace(-0.12, 0.12, len(values)) if len(values) > 1 else np.zeros(1)
            colour, marker = COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)]
            percent = 100 * np.asarray(values)
            axes.hlines(percent.mean(), place - 0.25, place + 0.25, color=colour, linewidth=2.5)
            axes.plot(place + offsets, percent, marker, color=colour, markersize=7, alpha=0.75, linestyle="none")
        axes.set_xticks(range(len(accuracies)), list(accuracies))
        axes.set_xlim(-0.5, len(accuracies) - 0.5)
        axes.set_ylabel("test sequences right, %")
        axes.grid(axis="x", visible=False)
        lowest = 100 * min(min(values) for values in accuracies.values())
        highest = 100 * max(max(values) for values in accuracies.values())
        if 100 * baseline > lowest - 15:
            lowest = min(lowest, 100 * baseline)
            axes.axhline(100 * baseline, color="#555555", linestyle=":")
            right: Any = ("axes fraction", "data")
            axes.annotate(
                "best constant answer", (1, 100 * baseline), xycoords=right, ha="right", va="bottom", fontsize=9
            )
        # Ten points at least, so that differences of a few sequences look as small as they are.
        top = min(highest + 1, 100.5)
        axes.set_ylim(min(lowest - 1, top - 10), top)
    return svg.getvalue()


def draw_curves(curves: Mapping[str, NDArray[np.float64]], ylabel: str, *, log: bool) -> str:
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


def draw_reach(reaches: Mapping[str, tuple[Reach, Reach]], needed: Mapping[str, int]) -> str:
    """Share of the gradient by lag for each cell, before training (dashed) and after; `needed` marks lags by name."""
    shown = _shown_lags([reach for pair in reaches.values() for reach in pair])
    with _axes() as (axes, svg):
        for place, (name, (before, after)) in enumerate(reaches.items()):
            colour = COLOURS[place % len(COLOURS)]
            axes.plot(before.share, color=colour, linestyle="--", linewidth=1.2, label=f"{name}, untrained")
            axes.plot(after.share, color=colour, label=f"{name}, trained", **_marks(place, shown + 1))
        _log_scale(axes)
        _whole_ticks(axes)
        axes.set_xlim(-0.04 * shown, 1.04 * shown)
        for words, lag in needed.items():
            if lag <= shown:
                axes.axvline(lag, color="#555555", linewidth=1, linestyle=":")
                _above(axes, words, lag, "center")
        if beyond := [f"{words} {lag}" for words, lag in needed.items() if lag > shown]:
            _above(axes, f"{', '.join(beyond)} →", 1.04 * shown, "right")
        axes.set_xlabel("steps before the end of the sequence")
        axes.set_ylabel("gradient left")
        axes.legend(fontsize=9)
    return svg.getvalue()


def draw_confusion(counts: NDArray[np.int64], labels: Sequence[str]) -> str:
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
def _axes() -> Iterator[tuple[Axes, io.StringIO]]:
    """Axes to draw on; afterwards the text stream holds the picture. No global state of matplotlib is touched."""
    from matplotlib import style
    from matplotlib.figure import Figure

    svg = io.StringIO()
    with style.context(["default", STYLE]):
        figure = Figure(figsize=SIZE)
        yield figure.add_subplot(), svg
        figure.savefig(svg, format="svg", metadata={"Date": None})


def _shown_lags(reaches: Sequence[Reach]) -> int:
    """The longest lag to show: all of them, or a little more than those at which anything is left to see."""
    longest = max(len(reach.share) for reach in reaches) - 1
    seen = max(int(np.flatnonzero(reach.share >= FAINTEST).max(initial=1)) for reach in reaches)
    return max(1, min(longest, math.ceil(1.25 * seen)))


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


def _embed(svg: str, prefix: str, description: str) -> str:
    """The SVG element for use inside HTML: as wide as its place, described, its ids unlike any other picture's."""
    ElementTree.register_namespace("", SVG)
    ElementTree.register_namespace("xlink", XLINK)
    root = ElementTree.fromstring(svg)
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.attrib |= {"role": "img", "aria-label": description}
    for child in [child for child in root if child.tag == f"{{{SVG}}}metadata"]:
        root.remove(child)
    for element in root.iter():
        for name, value in element.attrib.items():
            if name == "id":
                element.set(name, prefix + value)
            elif name == f"{{{XLINK}}}href":
                element.set(name, re.sub(r"^#", f"#{prefix}", value))
            elif "url(#" in value:
                element.set(name, value.replace("url(#", f"url(#{prefix}"))
    return ElementTree.tostring(root, encoding="unicode")
