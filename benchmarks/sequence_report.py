"""The record of `sequences.py` as a table of bars, a table of all cases, and plots.

python benchmarks/sequence_report.py benchmarks/results/sequences.json      # draw and print it again
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from record import save
from speed_report import CELLS, MARKS, Bar, _threads

FITTED_FROM = 3000
"""The fewest steps of a run whose memory counts for the exponent: in shorter ones what does not grow weighs most."""

OURS, PEERS = "#0072B2", ("#E69F00", "#CC79A7")


class Findings:
    """The record's cases by section, and the ratios made of them; None for what was not measured."""

    def __init__(self, record: Mapping[str, Any]) -> None:
        self.record = record
        self.cases: list[dict[str, Any]] = record["cases"]

    def case(self, section: str, **names: Any) -> dict[str, Any] | None:
        """The case of a section that these names describe."""
        for case in self.cases:
            if case["section"] == section and all(case[name] == value for name, value in names.items()):
                return case
        return None

    def median(self, section: str, what: str, **names: Any) -> float | None:
        """The seconds of what was timed in a case."""
        case = self.case(section, **names)
        return None if case is None or what not in case["seconds"] else case["seconds"][what]["median"]

    def ragged(self, cell: str, way: str) -> float | None:
        """How many times as long another way takes for a ragged batch."""
        return _over(self.median("ragged", way, cell=cell, way=way), self._ours(cell))

    def _ours(self, cell: str) -> float | None:
        return self.median("ragged", "throughtime", cell=cell, way="throughtime")

    def share(self, cell: str, rows: int) -> float | None:
        """What a ragged batch costs beside a full one, over its share of real steps."""
        case = self.case("shares", cell=cell, rows=rows)
        return None if case is None else within(case, "ragged", "full") / case["share"]

    def resets(self, cell: str) -> float | None:
        """What resets cost."""
        case = self.case("resets", cell=cell)
        return None if case is None else within(case, "resets", "none")

    def episodes(self, layout: str) -> float | None:
        """How many times as long the loop takes."""
        case = self.case("episodes", layout=layout)
        return None if case is None else within(case, "loop", "throughtime")

    def per_step(self, steps: int, segments: str = "auto") -> float | None:
        """Seconds a step of a training run."""
        return _over(self.median("length", segments, steps=steps), float(steps))

    def recomputation(self) -> float | None:
        """What segments cost in time, where the run without them can be had: the longest such run."""
        cases = [c for c in self.cases if c["section"] == "length" and "none" in c["seconds"] and c["steps"] > 100]
        return within(max(cases, key=lambda c: int(c["steps"])), "auto", "none") if cases else None

    def flatness(self) -> float | None:
        """The dearest step among all lengths over the cheapest, the recomputation taken off."""
        again = self.recomputation()
        if again is None:
            return None
        shortest = min((c["steps"] for c in self.cases if c["section"] == "length"), default=0)
        times = []
        for case in self.cases:
            if case["section"] == "length":
                seconds = case["seconds"]["auto"]["median"] / case["steps"]
                times.append(seconds if case["steps"] == shortest else seconds / again)
        return max(times) / min(times)

    def memory(self, cell: str, segments: str) -> dict[int, float]:
        """MB by steps."""
        wanted = ("memory", cell, segments)
        cases = [c for c in self.cases if (c["section"], c.get("cell"), c.get("segments")) == wanted]
        return {c["steps"]: c["bytes"] / 1e6 for c in cases}

    def exponent(self, cell: str) -> float | None:
        """The fitted power of the number of steps with which memory grows under segments."""
        found = {steps: size for steps, size in self.memory(cell, "auto").items() if steps >= FITTED_FROM}
        if len(found) < 3:
            return None
        slope, _ = np.polyfit(np.log(list(found)), np.log(list(found.values())), 1)
        return float(slope)


def within(case: Mapping[str, Any], above: str, below: str) -> float:
    """The ratio of two medians of one case."""
    return float(case["seconds"][above]["median"] / case["seconds"][below]["median"])


def _over(above: float | None, below: float | None) -> float | None:
    return None if above is None or below is None else above / below


def bars(found: Findings) -> list[Bar]:
    """What was asked for, each beside what was found."""
    rows = []
    for way, against, bounds in (
        ("packed", "torch.nn on PackedSequence", {"lstm": 50, "gru": 12}),
        ("padded", "torch.nn on the padded tensor", {"lstm": 1.5, "gru": 3}),
    ):
        for cell, bound in bounds.items():
            rows.append(Bar(f"ragged training, {CELLS[cell]}, against {against}", bound, found.ragged(cell, way)))
    for count, bound in ((32, 1.25), (128, 1.1)):
        for cell in ("gru", "lstm"):
            what = f"cost of a ragged batch over its share of real steps, B={count}, {CELLS[cell]}"
            rows.append(Bar(what, bound, found.share(cell, count), below=True))
    for cell in ("gru", "lstm"):
        rows.append(Bar(f"dense batch with resets over none, {CELLS[cell]}", 1.1, found.resets(cell), below=True))
    for layout, name in (("window", "a window of 8 rows that holds them"), ("rows", "64 padded rows")):
        rows.append(Bar(f"64 uneven episodes, GRU-256, as {name}, against the loop", 20, found.episodes(layout)))
    rows.append(Bar("time with segments over none", 1.4, found.recomputation(), below=True))
    rows.append(Bar("dearest step over the cheapest, T=100 to 100,000", 1.3, found.flatness(), below=True))
    for cell in ("gru", "lstm"):
        what = f"exponent of memory in T with segments, {CELLS[cell]}"
        rows.append(Bar(what, 0.55, found.exponent(cell), below=True, unit=""))
        longest = found.memory(cell, "auto").get(100_000)
        rows.append(Bar(f"T=100,000, H=128, B=4, {CELLS[cell]}", 250, longest, below=True, unit=" MB"))
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# The page


def as_markdown(record: Mapping[str, Any]) -> str:
    """The setting, the bars and every case."""
    found = Findings(record)
    table = ["| bar | asked | found | |", "|---|---|---|---|", *(bar.row() for bar in bars(found))]
    parts = [f"# Sequences as they come, {_threads(record['setting']['threads'])}", _setting(record["setting"])]
    if record["setting"]["quick"]:
        parts.append("**A quick run: small and few. Its figures say nothing.**")
    parts += ["## The bars", "\n".join(table), NOTES, "## Every case", _cases(found)]
    parts += [f"![{text}]({name})" for name, text in PICTURES.items()]
    return "\n\n".join(parts) + "\n"


NOTES = """Training is a forward run and the backward run to x and every weight. Ragged: T=1000, B=32, I=64, H=128,
lengths uniform from 1 to 1000; torch's padded tensor pays for padding and masks its output. Cost over share: I=64,
H=128, B x T = 32,000; full and ragged in turn. Resets: one step in fifty. Episodes: 64 of 4 to 128 steps, I=64; the
loop calls nn.GRUCell at every step and multiplies the state by nought where an episode begins, as recurrent-policy
libraries do. Steps: GRU, B=32, I=8, H=64; the recomputation is that of the longest run that was had both ways, and is
taken off where segments recompute. Memory: what the process needs at most beyond the input, the output and their
gradients; I=32; the exponent is fitted from 3,000 steps on. What took part in a ratio computed the same numbers, to
rounding."""

PICTURES = {
    "sequences.png": "Ragged batches and episodes, time a step against T, and memory against T",
}


def _setting(setting: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in setting["versions"].items())
    return (
        f"{setting['processor']}, {setting['cores']} cores, {setting['system']}; {versions}; {setting['date']}, "
        f"{setting['rounds']} round(s), {setting['minutes']} minutes. `python benchmarks/sequences.py`"
    )


def _cases(found: Findings) -> str:
    lines = ["| section | case | what | median | runs |", "|---|---|---|---|---|"]
    for case in found.cases:
        names = " ".join(f"{name}={case[name]}" for name in ("cell", "way", "rows", "layout", "steps") if name in case)
        names += f" segments={case['segments']}" if "segments" in case else ""
        for what, times in case["seconds"].items():
            shown = _seconds(times["median"])
            if "bytes" in case:
                shown = f"{case['bytes'] / 1e6:.1f} MB ({shown})"
            lines.append(f"| {case['section']} | {names} | {what} | {shown} | {times['runs']} |")
    return "\n".join(lines)


def _seconds(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def joined(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """The new record with the cases of sections that it did not measure, if they come from the same kind of run."""
    same = all(old["setting"][name] == new["setting"][name] for name in ("quick", "threads", "processor", "versions"))
    if not same:
        return dict(new)
    kept = [case for case in old["cases"] if case["section"] not in new["setting"]["sections"]]
    sections = list(dict.fromkeys([*(case["section"] for case in kept), *new["setting"]["sections"]]))
    return {"setting": {**new["setting"], "sections": sections}, "cases": [*kept, *new["cases"]]}


# ---------------------------------------------------------------------------------------------------------------------
# The plots


def draw(record: Mapping[str, Any]) -> Any:
    """A figure of three panels: times as fast, time a step against T, memory against T."""
    from matplotlib.figure import Figure

    found = Findings(record)
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    _speeds(left, found)
    _steps(middle, found)
    _memory(right, found)
    return figure


def _speeds(axes: Any, found: Findings) -> None:
    names = {
        "GRU, packed": (found.ragged("gru", "packed"), 12),
        "LSTM, packed": (found.ragged("lstm", "packed"), 50),
        "GRU, padded": (found.ragged("gru", "padded"), 3),
        "LSTM, padded": (found.ragged("lstm", "padded"), 1.5),
        "episodes in\na window": (found.episodes("window"), 20),
        "episodes as\nrows": (found.episodes("rows"), 20),
    }
    shown = {name: (value, bound) for name, (value, bound) in names.items() if value is not None}
    axes.set_title("Times as fast as torch (line: asked)", fontsize=10, loc="left")
    if not shown:
        return
    places = list(range(len(shown)))[::-1]
    values = [value for value, _ in shown.values()]
    axes.barh(places, values, color=OURS, height=0.6)
    for place, (value, bound) in zip(places, shown.values(), strict=True):
        axes.plot([bound, bound], [place - 0.42, place + 0.42], color="black", linewidth=1.5)
        axes.text(max(value, bound) * 1.12, place, f"{value:.3g}x", va="center", fontsize=9)
    axes.set_xscale("log")
    axes.set_xlim(0.8, max([*values, *(bound for _, bound in shown.values())]) * 3)
    axes.set_yticks(places, list(shown), fontsize=9)


def _steps(axes: Any, found: Findings) -> None:
    axes.set_title("Training time a step, B=32, GRU-64", fontsize=10, loc="left")
    for segments, colour, marker in (("auto", OURS, "o"), ("none", PEERS[0], "s")):
        steps = sorted(c["steps"] for c in found.cases if c["section"] == "length" and segments in c["seconds"])
        times = [(found.per_step(count, segments) or 0.0) * 1e6 for count in steps]
        if steps:
            axes.plot(steps, times, marker=marker, color=colour, label=f"segments={_quoted(segments)}")
            axes.set_ylim(0, max(axes.get_ylim()[1], 1.5 * max(times)))
            axes.set_xscale("log")
            axes.legend(frameon=False, fontsize=9)
    axes.set_xlabel("T")
    axes.set_ylabel("microseconds")


def _memory(axes: Any, found: Findings) -> None:
    axes.set_title("Memory of a training run, B=4, H=128", fontsize=10, loc="left")
    for cell, line in (("gru", "-"), ("lstm", "--")):
        for segments, colour in (("none", PEERS[0]), ("auto", OURS)):
            sizes = found.memory(cell, segments)
            if not sizes:
                continue
            power = found.exponent(cell) if segments == "auto" else None
            fitted = "" if power is None else f", grows as T^{power:.2f}"
            label = f"{CELLS[cell]}, segments={_quoted(segments)}{fitted}"
            axes.plot(list(sizes), list(sizes.values()), line, marker=MARKS[cell][0], color=colour, label=label)
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.legend(frameon=False, fontsize=8, loc="upper left")
    low, high = axes.get_ylim()
    axes.set_ylim(low, high * 12)
    axes.set_xlabel("T")
    axes.set_ylabel("MB beyond input, output, gradients")


def _quoted(segments: str) -> str:
    return "None" if segments == "none" else f'"{segments}"'


def write(record: Mapping[str, Any], folder: Path) -> None:
    """JSON, Markdown, PNG and SVG, each whole or not at all."""
    save(folder / "sequences", record, as_markdown(record), draw(record))


def main(arguments: Sequence[str] | None = None) -> None:
    """Print and draw again what a JSON file records."""
    path = Path((arguments or sys.argv[1:])[0])
    record = json.loads(path.read_text(encoding="utf-8"))
    print(as_markdown(record))
    write(record, path.parent)


if __name__ == "__main__":
    main()
