"""The record of `real_data.py` as tables, the bar of every row with what it was met by, and a plot.

python benchmarks/real_data_report.py benchmarks/results/real_data.json      # draw and print it again
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from record import save

THEIRS, OURS = "torch.nn", "throughtime"
CELLS = {"elman": "Elman", "gru": "GRU", "lstm": "LSTM"}
COLOUR = "#0072B2"
LEAST_ERROR = 1e-4
"""The unit of the plot where torch.nn's standard error is less, or nothing: a hundredth of a point."""


@dataclass(frozen=True)
class Row:
    """One cell on one data set, in both libraries."""

    problem: str
    cell: str
    theirs: dict[str, Any]
    ours: dict[str, Any]

    @property
    def bar(self) -> float:
        """The lowest mean that is not below torch.nn's by more than one of its standard errors."""
        return mean(self.theirs) - standard_error(self.theirs["scores"])

    @property
    def holds(self) -> bool:
        """Whether throughtime's mean is there."""
        return mean(self.ours) >= self.bar

    @property
    def differences(self) -> list[float]:
        """throughtime's score less torch.nn's, by seed."""
        return [ours - theirs for theirs, ours in zip(self.theirs["scores"], self.ours["scores"], strict=True)]

    @property
    def times(self) -> float:
        """torch.nn's seconds per epoch over throughtime's."""
        return seconds(self.theirs) / seconds(self.ours)

    def line(self) -> str:
        """A line of the table."""
        scores = [with_error(side["scores"]) for side in (self.theirs, self.ours)]
        paces = [f"{seconds(side):.4f}" for side in (self.theirs, self.ours)]
        met = f"{self.bar:.4f}: {'pass' if self.holds else 'MISS'}"
        cells = [self.problem, CELLS[self.cell], *scores, met, with_error(self.differences, "+"), *paces]
        return f"| {' | '.join(cells)} | {self.times:.2f}x |"


def mean(side: dict[str, Any]) -> float:
    """Test score over the seeds."""
    return statistics.fmean(side["scores"])


def standard_error(scores: Sequence[float]) -> float:
    """Of the mean."""
    return statistics.stdev(scores) / math.sqrt(len(scores))


def with_error(values: Sequence[float], sign: str = "") -> str:
    """The mean and its standard error."""
    return f"{statistics.fmean(values):{sign}.4f} ± {standard_error(values):.4f}"


def seconds(side: dict[str, Any]) -> float:
    """Median over the seeds of a run's median seconds per epoch, first epochs left out."""
    return statistics.median(side["seconds_per_epoch"])


def rows(scores: Iterable[dict[str, Any]]) -> list[Row]:
    """In the order in which they were measured."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for score in scores:
        found.setdefault((score["problem"], score["cell"]), {})[score["library"]] = score
    return [Row(problem, cell, sides[THEIRS], sides[OURS]) for (problem, cell), sides in found.items()]


def as_markdown(record: dict[str, Any]) -> str:
    """All tables, and below them what they were measured with."""
    measured, setting = rows(record["scores"]), record["setting"]
    missed = [f"{row.problem}, {CELLS[row.cell]}" for row in measured if not row.holds]
    verdict = f"Missed by {'; '.join(missed)}." if missed else f"Met by all {len(measured)} rows."
    lines = [
        "# Real data, beside torch.nn",
        "",
        f"Test score, mean and standard error over {setting['seeds']} seeds: the share of test sequences right, for"
        " CMUdict of test phones. Both sides have the same first weights (torch.nn's own), batches and recipe."
        f" Asked: not below torch.nn by more than one of its standard errors. **{verdict}**",
        "",
        *_table(measured),
        "",
        "Seconds per epoch of training: median over epochs and seeds, first epochs left out; one loop for both.",
        "",
        *_again(record),
        "## Without a network",
        "",
        "| data | baseline | test score |",
        "|---|---|---|",
        *(
            f"| {name} | {baseline} | {score:.4f} |"
            for name, problem in record["problems"].items()
            for baseline, score in problem["baselines"].items()
        ),
        "",
        "## Data and recipes",
        "",
        "| data | training and test sequences | steps | classes | units | epochs | batch | learning rate |",
        "|---|---|---|---|---|---|---|---|",
        *(_recipe_line(name, problem) for name, problem in record["problems"].items()),
        "",
        "Learning rates: JapaneseVowels' was fixed before; the others have the best mean score over the cells on a"
        " quarter of the training part (`real_data.py --choose`), 0.002 where it is among the best. PLAID's steps were"
        " chosen there too. All else was fixed before.",
        "",
        *(f"- {name}: {problem['source']}{_noted(problem)}" for name, problem in record["problems"].items()),
        "",
        _setting(setting),
        "",
    ]
    return "\n".join(lines)


def _table(measured: Sequence[Row]) -> list[str]:
    return [
        "| data | cell | torch.nn | throughtime | asked | difference by seed | torch.nn, s/epoch | throughtime, s/epoch"
        " | times as fast |",
        "|---|---|---|---|---|---|---|---|---|",
        *(row.line() for row in measured),
    ]


def _again(record: dict[str, Any]) -> list[str]:
    """The missed rows with other seeds, judged by those alone."""
    if not record["again"]:
        return []
    return [
        f"## Missed rows, once more, with {len(record['again'][0]['scores'])} other seeds",
        "",
        "Where training amplifies rounding, both sides end anywhere among each other, and a mean over few seeds misses"
        " by chance now and then. These rows are judged by their own seeds alone.",
        "",
        *_table(rows(record["again"])),
        "",
    ]


def _recipe_line(name: str, problem: dict[str, Any]) -> str:
    recipe, (shortest, longest) = problem["recipe"], problem["steps"]
    steps = f"{longest}" if shortest == longest else f"{shortest} to {longest}"
    units = f"{problem['units']}{', both ways' if problem['bidirectional'] else ''}"
    told = [f"{problem['train']} and {problem['test']}", steps, str(len(problem["classes"])), units]
    numbers = [str(recipe["epochs"]), str(recipe["batch_size"]), f"{recipe['learning_rate']:g}"]
    return f"| {' | '.join([name, *told, *numbers])} |"


def _noted(problem: dict[str, Any]) -> str:
    return f". {problem['note']}" if problem["note"] else ""


def _setting(setting: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in setting["versions"].items())
    quick = " A quick run, on few sequences: these figures mean nothing." if setting["quick"] else ""
    busy = " The machine was busy with other work: compare the scores, not the seconds." * _busy(setting)
    threads = "1 thread" if setting["threads"] == 1 else f"{setting['threads']} threads"
    return (
        f"{setting['processor']}, {threads}, load {setting['load']:g} on {setting['cores']} cores, {setting['system']};"
        f" {setting['date']}, {setting['minutes']} minutes; {versions}. AdamW, warm-up and cosine decay as in `Recipe`;"
        f" every field is in the JSON file.{busy}{quick}"
    )


def _busy(setting: dict[str, Any]) -> bool:
    return bool(setting["load"] > setting["cores"])


def draw(record: dict[str, Any]) -> Any:
    """Left, how far throughtime's score is from torch.nn's; right, how many times as fast it is; a line a row."""
    from matplotlib.figure import Figure

    measured = rows(record["scores"])
    places = list(range(len(measured)))[::-1]
    figure = Figure(figsize=(9.5, 1.6 + 0.34 * len(measured)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    units = [max(standard_error(row.theirs["scores"]), LEAST_ERROR) for row in measured]
    left.axvspan(-1, 1, color="#dddddd", label=f"{THEIRS}, mean ± a standard error")
    left.errorbar(
        [(mean(row.ours) - mean(row.theirs)) / unit for row, unit in zip(measured, units, strict=True)],
        places,
        xerr=[standard_error(row.ours["scores"]) / unit for row, unit in zip(measured, units, strict=True)],
        fmt="o",
        color=COLOUR,
        markersize=5,
        capsize=3,
        label=f"{OURS}, mean ± a standard error",
    )
    left.axvline(0, color="#555555", linestyle=":")
    left.set_yticks(places, [f"{row.problem}  {CELLS[row.cell]}  {100 * mean(row.theirs):.1f}%" for row in measured])
    left.set_xlabel("from torch.nn's mean, in its standard errors")
    left.set_title("test score", fontsize=10, loc="left")
    figure.legend(fontsize=9, loc="outside upper left", ncols=2)
    right.barh(places, [row.times for row in measured], color=COLOUR, height=0.6)
    for place, row in zip(places, measured, strict=True):
        right.annotate(
            f"{row.times:.1f}x", (max(row.times, 1), place), (3, 0), textcoords="offset points", va="center", fontsize=9
        )
    right.axvline(1, color="#555555", linestyle=":")
    right.margins(x=0.15)
    right.set_xlabel("times as fast as torch.nn")
    right.set_title("an epoch of training", fontsize=10, loc="left")
    for axes in (left, right):
        axes.grid(axis="x", color="#e4e4e4")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def write(record: dict[str, Any], folder: Path) -> None:
    """The record, its tables and its plot; each file whole or not there."""
    save(folder / "real_data", record, as_markdown(record), draw(record), dpi=150)


if __name__ == "__main__":
    stored = Path(sys.argv[1])
    again = json.loads(stored.read_text(encoding="utf-8"))
    print(as_markdown(again))
    write(again, stored.parent)
