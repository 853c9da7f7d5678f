"""What the long-range benchmark found, as Markdown and one picture; numbers come from its JSON alone.

    python benchmarks/long_range_report.py benchmarks/results/long_range.json

prints and draws again what a JSON file records.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from record import save

TITLES = {"adding": "Adding", "copying": "Copying", "order": "Temporal order"}
ERRORS = {"adding": "mean squared error", "copying": "share of wrong symbols", "order": "share of wrong answers"}
ANCHORS = (
    "Adding at 600 steps, mean squared error: LSTM .164, GRU 5.3e-5, RNN .177, beside about .1767 for a constant "
    "answer, after far more training (Bai, Kolter & Koltun 2018, arXiv:1803.01271).",
    "Temporal order: 50 tanh units with clipping and a regulariser that keeps gradients from vanishing, trained on "
    "50 to 200 steps at once, are exact up to 5000 (Pascanu, Mikolov & Bengio 2013, arXiv:1211.5063).",
)
FAINTEST = 1e-12
Record = Mapping[str, Any]


class Findings:
    """One record's results, by task, network and length, seeds together."""

    def __init__(self, record: Record) -> None:
        self.results: list[dict[str, Any]] = record["results"]
        self.tasks, self.nets = list(record["tasks"]), list(record["nets"])
        self.lengths = sorted({result["length"] for result in self.results})
        self.threshold: float = record["setting"]["threshold"]

    def of(self, task: str, net: str, length: int) -> list[dict[str, Any]]:
        """The results of all seeds."""
        wanted = (task, net, length)
        return [result for result in self.results if (result["task"], result["net"], result["length"]) == wanted]

    def longest(self, task: str, net: str, holds: Callable[[dict[str, Any]], bool]) -> int | None:
        """The longest length up to which it holds for every seed at every length; None if not at the shortest."""
        found = None
        for length in self.lengths:
            results = self.of(task, net, length)
            if not results or not all(map(holds, results)):
                break
            found = length
        return found

    def reached(self, result: dict[str, Any]) -> bool:
        """Whether the gradient reached the lag that was needed, before training."""
        return bool(result["share"] >= self.threshold)

    def agreement(self, tasks: Iterable[str], nets: Iterable[str]) -> dict[str, Any]:
        """How often the reach before training said what training found, and how well it ranks the runs.

        `ranking` is the chance that of a solved and an unsolved run the solved one reached further (the area under the
        ROC curve), NaN where all or none were solved.
        """
        from sklearn.metrics import roc_auc_score

        wanted = {(task, net) for task in tasks for net in nets}
        chosen = [r for r in self.results if (r["task"], r["net"]) in wanted and r["trained"]]
        solved = [result["solved"] for result in chosen]
        counts = {
            (reached, done): sum(self.reached(r) == reached and r["solved"] == done for r in chosen)
            for reached in (True, False)
            for done in (True, False)
        }
        ranked = float(roc_auc_score(solved, [r["share"] for r in chosen])) if len(set(solved)) == 2 else math.nan
        return {"counts": counts, "runs": len(chosen), "ranking": ranked}


def as_markdown(record: Record) -> str:
    """Where each breaks, what the reach said before, every figure, the published ones, and the setting."""
    found = Findings(record)
    lines = ["# Long dependencies: success against length, and the reach before training", ""]
    lines += [*_breaks(found), "", *_agreements(found), ""]
    for task in found.tasks:
        lines += [*_task(found, record, task), ""]
    lines += [*_carried(found), "Published, for comparison:", "", *(f"- {anchor}" for anchor in ANCHORS), ""]
    return "\n".join([*lines, _setting(record), ""])


def _breaks(found: Findings) -> list[str]:
    """For each network and task the longest length solved, and the longest that the gradient had reached."""
    lines = [
        "The longest of the lengths up to which each network solved the task, every shorter one too; in brackets the "
        f"longest at which, before training, at least {found.threshold:g} of the gradient reached the step it had to.",
        "",
        "| network | " + " | ".join(TITLES[task] for task in found.tasks) + " |",
        "|---" * (1 + len(found.tasks)) + "|",
    ]
    for net in found.nets:
        fields = []
        for task in found.tasks:
            solved = found.longest(task, net, lambda result: bool(result["solved"]))
            fields.append(f"{solved or 'none'} ({found.longest(task, net, found.reached) or 'none'})")
        lines.append(f"| {net} | " + " | ".join(fields) + " |")
    return lines


def _agreements(found: Findings) -> list[str]:
    """Whether the reach before training predicted what was solved: in all, by task, and by kind of network."""
    kinds = {
        "Elman networks": [net for net in found.nets if net.startswith("elman")],
        "GRU and LSTM as they begin": [net for net in found.nets if net in ("gru", "lstm")],
        "GRU and LSTM, chrono": [net for net in found.nets if net.endswith("chrono")],
    }
    groups = {"all": (found.tasks, found.nets)}
    groups |= {TITLES[task]: ([task], found.nets) for task in found.tasks}
    groups |= {kind: (found.tasks, nets) for kind, nets in kinds.items() if nets}
    lines = [
        f"Did the reach predict it? Reached means a share of at least {found.threshold:g}; ranking is the chance that "
        "of a solved and an unsolved run the solved one reached further (.5 is none).",
        "",
        "| runs | how many | reached, solved | reached, not solved | not reached, solved | not reached, not solved "
        "| ranking |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, (tasks, nets) in groups.items():
        told = found.agreement(tasks, nets)
        counts = [told["counts"][key] for key in ((True, True), (True, False), (False, True), (False, False))]
        shown = "-" if math.isnan(told["ranking"]) else f"{told['ranking']:.2f}"
        lines.append(f"| {name} | {told['runs']} | " + " | ".join(map(str, counts)) + f" | {shown} |")
    return lines


def _task(found: Findings, record: Record, task: str) -> list[str]:
    about = record["tasks"][task]
    lines = [
        f"## {TITLES[task]}",
        "",
        f"{about['source']}. {ERRORS[task].capitalize()}: {about['chance']:.4g} without memory, solved at "
        f"{about['solved']:g}. In each field: the updates to a solution, or the error after all of them in bold; then "
        "the share of the gradient that reached the step it had to before training, and after. Not trained: two "
        "shorter lengths in a row were missed.",
        "",
        "| network | " + " | ".join(f"{length} steps" for length in found.lengths) + " |",
        "|---" * (1 + len(found.lengths)) + "|",
    ]
    for net in found.nets:
        fields = [_field(found.of(task, net, length)) for length in found.lengths]
        lines.append(f"| {net} | " + " | ".join(fields) + " |")
    return lines


def _field(results: Sequence[dict[str, Any]]) -> str:
    return "<br>".join(_run(result) for result in results) or "-"


def _run(result: dict[str, Any]) -> str:
    shares = f"{_share(result['share'])}, {_share(result['share_after'])}"
    if not result["trained"]:
        return f"not trained; {_share(result['share'])}"
    if result["diverged"]:
        return f"**diverged** at {result['updates']}; {shares}"
    return f"{result['updates']}; {shares}" if result["solved"] else f"**{result['error']:.3f}**; {shares}"


def _share(share: float | None) -> str:
    if share is None:
        return "-"
    return f"{share:.2f}" if 0.01 <= share < 100 else f"{share:.0e}"


def _carried(found: Findings) -> list[str]:
    """Temporal order, tested at lengths on which the network was never trained."""
    best: dict[str, dict[str, Any]] = {}
    for result in found.results:
        if result["carried"] and result["length"] >= best.get(result["net"], result)["length"]:
            best[result["net"]] = result
    if not best:
        return []
    lengths = list(next(iter(best.values()))["carried"])
    lines = [
        "## Temporal order, carried to lengths never trained on",
        "",
        "Share of wrong answers (0.75 without memory) of the network trained at the longest length that it solved.",
        "",
        "| network | trained at | " + " | ".join(f"{length} steps" for length in lengths) + " |",
        "|---" * (2 + len(lengths)) + "|",
    ]
    for net, result in best.items():
        errors = " | ".join(f"{result['carried'][length]:.2f}" for length in lengths)
        lines.append(f"| {net} | {result['length']} | {errors} |")
    return [*lines, ""]


def _setting(record: Record) -> str:
    setting = record["setting"]
    rates = "; ".join(
        f"{name} {net['learning_rate']:g}" + (f", clipped at norm {net['clip']:g}" if net["clip"] else "")
        for name, net in record["nets"].items()
    )
    return (
        f"Setting: {setting['units']} units, Adam, at most {setting['updates']} updates on batches of "
        f"{setting['rows']} fresh sequences, tested on {setting['test_rows']}; {setting['seeds']} seed(s), "
        f"{setting['threads']} thread; {setting['processor_minutes']:.0f} minutes of processor time. "
        f"Learning rates: {rates}. "
        f"Torch {setting['torch']}, Python {setting['python']}, {setting['processor']}."
    )


# ---------------------------------------------------------------------------------------------------------------------
# The picture


def draw(record: Record) -> Any:
    """One panel per task: the reach before training as colour, what training found as marks; and a summary below."""
    from matplotlib.figure import Figure

    found = Findings(record)
    figure = Figure(figsize=(12, 7.6), layout="constrained")
    grid = figure.add_gridspec(2, max(len(found.tasks), 2), height_ratios=[3, 2])
    image: Any = None
    for place, task in enumerate(found.tasks):
        axes = figure.add_subplot(grid[0, place])
        image = _panel(axes, found, task)
        if place:
            axes.set_yticklabels([])
    bar = figure.colorbar(image, ax=figure.axes, pad=0.01)
    bar.set_label("share of the gradient at the lag\nthat is needed, before training")
    bar.set_ticks(POWERS, labels=_powers())
    bar.ax.axhline(math.log10(found.threshold), color="white", linewidth=2)
    _summary(figure.add_subplot(grid[1, :]), found)
    figure.suptitle(
        "Where each network breaks (circle: solved, cross: not, no mark: not tried), on the reach it had before",
        fontsize=13,
    )
    return figure


POWERS = [-12, -9, -6, -3, 0]


def _powers() -> list[str]:
    return [("≤ " if power == POWERS[0] else "") + f"$10^{{{power}}}$" for power in POWERS]


def _panel(axes: Any, found: Findings, task: str) -> Any:
    shares = np.full((len(found.nets), len(found.lengths)), np.nan)
    for row, net in enumerate(found.nets):
        for column, length in enumerate(found.lengths):
            results = found.of(task, net, length)
            if not results:
                continue
            logs = [math.log10(max(result["share"], FAINTEST)) for result in results]
            shares[row, column] = statistics.fmean(logs)
            trained = [result for result in results if result["trained"]]
            if trained:
                _mark(axes, column, row, sum(result["solved"] for result in trained), len(trained))
    image = axes.imshow(shares, cmap="cividis", vmin=-12, vmax=0, aspect="auto")
    axes.set_xticks(range(len(found.lengths)), [str(length) for length in found.lengths])
    axes.set_yticks(range(len(found.nets)), found.nets)
    axes.set_xlabel("steps")
    axes.set_title(TITLES[task], fontsize=11, loc="left")
    for edge in range(1, len(found.nets)):
        axes.axhline(edge - 0.5, color="white", linewidth=1)
    for edge in range(1, len(found.lengths)):
        axes.axvline(edge - 0.5, color="white", linewidth=1)
    return image


def _mark(axes: Any, column: int, row: int, solved: int, runs: int) -> None:
    """A full circle where all seeds solved it, a cross where none did, their number between; readable on any colour."""
    if solved == runs:
        axes.plot(column, row, "o", markersize=11, markerfacecolor="white", markeredgecolor="black")
    elif solved == 0:
        axes.plot(column, row, "x", markersize=11, markeredgewidth=4.5, color="black")
        axes.plot(column, row, "x", markersize=10, markeredgewidth=2, color="white")
    else:
        boxed = {"boxstyle": "round", "facecolor": "white", "edgecolor": "black"}
        axes.text(column, row, f"{solved}/{runs}", ha="center", va="center", fontsize=8, bbox=boxed)


def _summary(axes: Any, found: Findings) -> None:
    """How many runs were solved by the power of ten of their reach, all tasks together."""
    lowest, highest = POWERS[0], 1
    places = np.arange(lowest, highest) + 0.5
    base = np.zeros(len(places))
    for (family, outcome), (colour, hatch) in KINDS.items():
        heights = np.zeros(len(places))
        for result in filter(lambda result: result["trained"], found.results):
            if result["net"].startswith("elman") == (family == "Elman") and result["solved"] == (outcome == "solved"):
                power = math.floor(math.log10(max(result["share"], FAINTEST)))
                heights[min(power, highest - 1) - lowest] += 1
        label = f"{family}, {outcome}"
        axes.bar(places, heights, 0.84, base, label=label, color=colour, edgecolor="white", linewidth=0.6, hatch=hatch)
        base += heights
    axes.axvline(math.log10(found.threshold), color="black", linestyle="--", linewidth=1)
    axes.text(math.log10(found.threshold) + 0.08, base.max() * 1.08, "reached", fontsize=9, va="center")
    axes.set_ylim(0, base.max() * 1.15)
    axes.set_xlim(lowest, highest)
    axes.set_xticks(POWERS, _powers())
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("share of the gradient at the lag that is needed, before training")
    axes.set_ylabel("runs")
    axes.set_title("All training runs by that reach", fontsize=11, loc="left")
    axes.legend(frameon=False, ncols=2, fontsize=9, loc="upper center")
    axes.spines[["top", "right"]].set_visible(False)


KINDS = {
    ("gated", "solved"): ("#0072B2", None),
    ("gated", "not"): ("#56B4E9", "////"),
    ("Elman", "solved"): ("#D55E00", None),
    ("Elman", "not"): ("#E69F00", "////"),
}
"""Colour and hatching by family and outcome; the colours are Okabe and Ito's, for every kind of sight."""


def write(record: Record, folder: Path) -> None:
    """JSON, Markdown, PNG and SVG, each whole or not at all."""
    save(folder / "long_range", record, as_markdown(record), draw(record))


def main() -> None:
    """Print and draw again what a JSON file records."""
    path = Path(sys.argv[1])
    record = json.loads(path.read_text(encoding="utf-8"))
    print(as_markdown(record))
    write(record, path.parent)


if __name__ == "__main__":
    main()
