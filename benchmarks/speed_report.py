"""The record of `speed.py` as a table, the bars with what they were met by, and a plot.

python benchmarks/speed_report.py benchmarks/results/speed-2-threads.json      # draw and print it again
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from problems import MODES, SHAPES, Shape, flops
from record import save

OURS = "throughtime"
NAMES = {"throughtime": "throughtime", "torch": "torch.nn", "onnxruntime": "ONNX Runtime", "jax": "JAX"}
CELLS = {"elman": "Elman", "gru": "GRU", "gru-reset-before": "GRU, reset before", "lstm": "LSTM"}
HEADINGS = {
    "inference": "Inference",
    "training": "Training: forward, and backward to x and all weights",
    "step": "A whole training step: with a linear read-out, the squared error and Adam",
}
BARS_THREADS = 2
MISSING = "–"


@dataclass(frozen=True)
class Bar:
    """A figure that was asked for: at least `bound`, or at most where `below`; None was not measured."""

    what: str
    bound: float
    found: float | None
    below: bool = False
    unit: str = "x"
    where: str = ""

    @property
    def verdict(self) -> str:
        """Pass, MISS, or that it was not measured."""
        if self.found is None:
            return "not measured"
        met = self.found <= self.bound if self.below else self.found >= self.bound
        return "pass" if met else "MISS"

    def row(self) -> str:
        """A line of the table of bars."""
        asked = f"{'at most' if self.below else 'at least'} {_with_unit(self.bound, self.unit)}"
        found = MISSING if self.found is None else _with_unit(self.found, self.unit)
        return f"| {self.what} | {asked} | {found}{self.where} | {self.verdict} |"


def _with_unit(value: float, unit: str) -> str:
    return f"{value:.0%}" if unit == "%" else f"{value:.3g} {unit}" if unit == "s" else f"{value:.2f}{unit}"


class Findings:
    """The record's medians by shape, cell, mode and peer, and the ratios made of them."""

    def __init__(self, record: Mapping[str, Any]) -> None:
        self.record = record
        self.threads: int = record["setting"]["threads"]
        self.peak: float = record["peak"][str(self.threads)]
        self.shapes = [Shape.parse(text) for text in record["setting"]["shapes"]]
        self.cells: list[str] = record["setting"]["cells"]
        self.peers: list[str] = record["setting"]["peers"]

    @cached_property
    def _medians(self) -> dict[tuple[str, ...], float]:
        return {(t["shape"], t["cell"], t["mode"], t["peer"]): t["median"] for t in self.record["times"]}

    def median(self, shape: Shape, cell: str, mode: str, peer: str) -> float | None:
        """Seconds, or None where the peer was not measured."""
        return self._medians.get((str(shape), cell, mode, peer))

    def fastest(self, shape: Shape, cell: str, mode: str) -> str | None:
        """The fastest of the peers, ourselves left out."""
        times = {peer: self.median(shape, cell, mode, peer) for peer in self.peers if peer != OURS}
        known = {peer: time for peer, time in times.items() if time is not None}
        return min(known, key=known.__getitem__, default=None)

    def ratio(self, shape: Shape, cell: str, mode: str, peer: str | None) -> float | None:
        """How many times as long a peer takes as we do."""
        ours = self.median(shape, cell, mode, OURS)
        theirs = None if peer is None else self.median(shape, cell, mode, peer)
        return None if ours is None or theirs is None else theirs / ours

    def share(self, shape: Shape, cell: str, mode: str) -> float | None:
        """The useful operations per second over the machine's peak."""
        ours = self.median(shape, cell, mode, OURS)
        return None if ours is None else flops(cell, shape, mode) / ours / self.peak

    def against_torch(self, cell: str, mode: str) -> dict[Shape, float]:
        """Ratios by shape."""
        return _known((shape, self.ratio(shape, cell, mode, "torch")) for shape in self.shapes)

    def against_fastest(self, cell: str, mode: str) -> dict[Shape, float]:
        """Ratios by shape."""
        return _known((s, self.ratio(s, cell, mode, self.fastest(s, cell, mode))) for s in self.shapes)


def _known(pairs: Iterable[tuple[Shape, float | None]]) -> dict[Shape, float]:
    return {shape: value for shape, value in pairs if value is not None}


# ---------------------------------------------------------------------------------------------------------------------
# The bars


def bars(found: Findings) -> list[Bar]:
    """What the engine is asked for, each beside what was found."""
    return [*_against_torch(found), *_against_fastest(found), *_shares(found), *_first(found.record["first"])]


def _against_torch(found: Findings) -> list[Bar]:
    rows = []
    for cell, mean, least in (("gru", 4.5, 2.3), ("elman", 4.5, 2.3), ("lstm", 1.6, 0.95)):
        ratios = found.against_torch(cell, "training")
        name = f"training, {CELLS[cell]}, against torch.nn"
        rows += [Bar(f"{name}: geometric mean", mean, _mean(ratios.values())), _least(f"{name}: least", least, ratios)]
    return rows


def _against_fastest(found: Findings) -> list[Bar]:
    cells = ("gru", "elman", "lstm")
    training = {cell: found.against_fastest(cell, "training") for cell in cells}
    name = "against the fastest peer: geometric mean"
    together = _mean(value for ratios in training.values() for value in ratios.values())
    rows = [Bar(f"training, GRU, Elman and LSTM together, {name}", 1.9, together)]
    rows += [Bar(f"training, {CELLS[cell]}, {name}", 1.9, _mean(training[cell].values())) for cell in cells]
    for cell, mean in zip(cells, (1.6, 1.5, 1.1), strict=True):
        ratios = found.against_fastest(cell, "inference")
        rows.append(Bar(f"inference, {CELLS[cell]}, {name}", mean, _mean(ratios.values())))
    return rows


def _shares(found: Findings) -> list[Bar]:
    return [
        Bar(
            f"share of the fma peak, training, {CELLS[cell]}, ({shape})",
            least,
            found.share(shape, cell, "training"),
            unit="%",
        )
        for shape, least in ((Shape(100, 64, 256, 512), 0.80), (Shape(100, 32, 64, 128), 0.62))
        for cell in ("gru", "elman", "lstm")
    ]


def _first(first: Mapping[str, float]) -> list[Bar]:
    return [
        Bar(
            "a cell of one's own with the GRU's equations, time over the built-in's", 1.05, first.get("own cell"), True
        ),
        Bar("first call, cold cache", 5.0, first.get("cold"), True, "s"),
        Bar("first call, warm cache", 0.5, first.get("warm"), True, "s"),
    ]


def _mean(values: Iterable[float]) -> float | None:
    values = list(values)
    return statistics.geometric_mean(values) if values else None


def _least(what: str, bound: float, ratios: Mapping[Shape, float]) -> Bar:
    if not ratios:
        return Bar(what, bound, None)
    shape = min(ratios, key=ratios.__getitem__)
    return Bar(what, bound, ratios[shape], where=f" ({shape})")


# ---------------------------------------------------------------------------------------------------------------------
# Markdown


def as_markdown(record: Mapping[str, Any]) -> str:
    """The setting, the bars, and a table for each mode with every cell in it."""
    found = Findings(record)
    parts = [f"# Speed on {_threads(found.threads)}", _setting(found), _bars(found)]
    parts += [_table(found, mode) for mode in MODES]
    return "\n\n".join(parts) + "\n"


def _threads(count: int | str) -> str:
    return f"{count} thread{'' if int(count) == 1 else 's'}"


def _setting(found: Findings) -> str:
    setting = found.record["setting"]
    versions = ", ".join(f"{name} {value}" for name, value in setting["versions"].items())
    peaks = ", ".join(f"{rate / 1e9:.0f} GFLOP/s on {_threads(n)}" for n, rate in found.record["peak"].items())
    warning = " **Quick: too few runs to tell anything by.**" if setting["quick"] else ""
    return (
        f"{setting['processor']}, {setting['cores']} cores, {setting['system']}; {setting['date']}; {versions}. "
        f"Fused multiply-add peak in the same run: {peaks}. Rounds, the peers in turn: {setting['rounds']}; a fresh "
        "process for each shape and peer in each; medians, through the public layers, autograd's cost included. "
        f"{setting['minutes']} minutes.{warning}"
    )


def _bars(found: Findings) -> str:
    given = bars(found)
    missed = [bar for bar in given if bar.verdict == "MISS"]
    unknown = [bar for bar in given if bar.verdict == "not measured"]
    lines = ["## The bars", ""]
    if found.threads != BARS_THREADS:
        lines += [f"They are meant for {BARS_THREADS} threads; this is {found.threads}.", ""]
    if set(found.shapes) != set(SHAPES):
        lines += [f"They are meant for {len(SHAPES)} shapes; these are of {len(found.shapes)} chosen ones.", ""]
    if missing := [NAMES[peer] for peer in NAMES if peer not in found.peers]:
        lines += [f"The fastest peer may be one that was left out: {', '.join(missing)}.", ""]
    met = len(given) - len(missed) - len(unknown)
    lines += [f"{met} met, {len(missed)} missed, {len(unknown)} not measured.", ""]
    lines += ["| | asked | found | |", "|---|---|---|---|", *(bar.row() for bar in given)]
    return "\n".join(lines)


def _table(found: Findings, mode: str) -> str:
    peers = [peer for peer in found.peers if _measured(found, mode, peer)]
    titles = ["cell", "T,B,I,H", *(f"{NAMES[p]}, ms" for p in peers)]
    titles += ["against torch.nn", "against the fastest peer", "share of peak"]
    lines = [f"## {HEADINGS[mode]}", "", "| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for cell in found.cells:
        lines += [_row(found, cell, shape, mode, peers) for shape in found.shapes]
        lines.append(_mean_row(found, cell, mode, len(peers)))
    notes = "Ratios are the peer's time over throughtime's; below one, in bold, throughtime loses."
    if "gru-reset-before" in found.cells and "torch" in peers:
        notes += " torch.nn has no reset-before GRU: its time there is that of a loop over torch operations."
    shares = [found.share(shape, cell, mode) or 0.0 for shape in found.shapes for cell in found.cells]
    if max(shares) > 1:
        notes += " **A share above 100% says that the machine was not quiet while its peak was measured.**"
    return "\n".join([*lines, "", notes])


def _measured(found: Findings, mode: str, peer: str) -> bool:
    return any(found.median(s, c, mode, peer) is not None for s in found.shapes for c in found.cells)


def _row(found: Findings, cell: str, shape: Shape, mode: str, peers: list[str]) -> str:
    times = [found.median(shape, cell, mode, peer) for peer in peers]
    fastest = found.fastest(shape, cell, mode)
    beside = f" ({NAMES[fastest]})" if fastest else ""
    share = found.share(shape, cell, mode)
    fields = [CELLS[cell], str(shape), *map(_milliseconds, times)]
    fields += [_ratio(found.ratio(shape, cell, mode, "torch"))]
    fields += [_ratio(found.ratio(shape, cell, mode, fastest)) + beside, MISSING if share is None else f"{share:.0%}"]
    return "| " + " | ".join(fields) + " |"


def _mean_row(found: Findings, cell: str, mode: str, peers: int) -> str:
    means = [_mean(ratios(cell, mode).values()) for ratios in (found.against_torch, found.against_fastest)]
    fields = [CELLS[cell], "geometric mean", *[""] * peers, *map(_ratio, means), ""]
    return "| " + " | ".join(fields) + " |"


def _milliseconds(seconds: float | None) -> str:
    if seconds is None:
        return MISSING
    return f"{seconds * 1e3:.0f}" if seconds >= 0.1 else f"{seconds * 1e3:.3g}"


def _ratio(value: float | None) -> str:
    if value is None:
        return MISSING
    return f"**{value:.2f}**" if value < 1 else f"{value:.2f}"


# ---------------------------------------------------------------------------------------------------------------------
# The plot and the files

MARKS = {
    "elman": ("o", "#0072B2"),
    "gru": ("s", "#E69F00"),
    "gru-reset-before": ("^", "#009E73"),
    "lstm": ("D", "#CC79A7"),
}
"""Shape and colour both tell the cells apart; the colours are Okabe and Ito's, for every kind of sight."""


def draw(record: Mapping[str, Any]) -> Any:
    """A figure: for each mode, shape and cell, the fastest peer's time over ours, on a logarithmic scale."""
    from matplotlib.figure import Figure

    found = Findings(record)
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    figure.suptitle(f"Time of the fastest peer over throughtime's, {_threads(found.threads)}")
    for axes, mode in zip(figure.subplots(2, 1, sharex=True), ("training", "inference"), strict=True):
        _panel(axes, found, mode)
    figure.axes[0].legend(ncols=len(found.cells), loc="upper left", frameon=False)
    figure.axes[-1].set_xlabel("T,B,I,H")
    return figure


def _panel(axes: Any, found: Findings, mode: str) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.axhline(1.0, color="black", linewidth=1)
    axes.grid(axis="y", color="0.9")
    for number in range(1, len(found.shapes)):
        axes.axvline(number - 0.5, color="0.9", linewidth=0.8)
    for place, cell in enumerate(found.cells):
        ratios = found.against_fastest(cell, mode)
        shift = (place - (len(found.cells) - 1) / 2) * 0.18
        marker, colour = MARKS[cell]
        places = [found.shapes.index(shape) + shift for shape in ratios]
        axes.plot(places, list(ratios.values()), marker, color=colour, label=CELLS[cell], markersize=8)
    low, high = axes.get_ylim()
    axes.set_xlim(-0.5, len(found.shapes) - 0.5)
    axes.set_ylim(
        min(low * 0.8, 0.7), max(high, 2.0) * 1.5
    )  # the line at one is in sight, and there is room for a legend
    axes.set_xticks(range(len(found.shapes)), [str(shape).replace(",", ", ") for shape in found.shapes], fontsize=8)
    axes.set_title(f"{mode} (above the line throughtime is faster)", fontsize=10, loc="left")
    axes.set_ylabel("times as fast")


def write(record: Mapping[str, Any], folder: Path) -> None:
    """JSON, Markdown, PNG and SVG, each whole or not at all."""
    name = f"speed-{_threads(record['setting']['threads']).replace(' ', '-')}"
    save(folder / name, record, as_markdown(record), draw(record))


def main() -> None:
    """Print and draw again what a JSON file records."""
    path = Path(sys.argv[1])
    record = json.loads(path.read_text(encoding="utf-8"))
    print(as_markdown(record))
    write(record, path.parent)


if __name__ == "__main__":
    main()
