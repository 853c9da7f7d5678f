"""Sequences as they come, measured: ragged, resetting, episodes, endless, streaming.

    python benchmarks/sequences.py                       # everything, on two threads: some eight minutes
    python benchmarks/sequences.py --only ragged memory  # some sections; --quick to see that it works

One process for each case, the cases in turn, round after round, as in `speed.py`; within a case, what is compared is
interleaved. Medians over the runs of all rounds. Writes JSON, a Markdown table of the bars and of all cases, and plots.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import sequence_report
from record import processor
from rich.progress import Progress
from speed import HERE, _progress, _shown, process

CELLS = ("gru", "lstm")
LENGTHS = (100, 1000, 10_000, 100_000)
MEMORY_LENGTHS = (1000, 3000, 10_000, 30_000, 100_000)

CASES: dict[str, list[dict[str, Any]]] = {
    "ragged": [{"cell": cell, "way": way} for cell in CELLS for way in ("throughtime", "padded", "packed")],
    "shares": [{"cell": cell, "rows": rows} for cell in CELLS for rows in (32, 128)],
    "resets": [{"cell": cell} for cell in CELLS],
    "episodes": [{"layout": layout} for layout in ("rows", "window")],
    "length": [{"cell": "gru", "steps": steps} for steps in LENGTHS],
    "memory": [
        {"cell": cell, "steps": steps, "segments": segments}
        for segments in ("auto", "none")
        for cell in CELLS
        for steps in MEMORY_LENGTHS
        if segments == "auto" or steps <= 30_000  # without segments 100,000 steps are more than this is about
    ],
    "streams": [{"cell": cell} for cell in ("elman", "gru", "lstm")],
    "dropout": [{}],
}

ONCE = ("memory",)
"""Sections that count bytes, which do not change from round to round."""

RUNS, SECONDS = 3, 0.4
"""The fewest runs of a call in a round, and how long quick calls are repeated."""


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All rounds of the chosen sections; the record that is written."""
    begun = datetime.now(UTC)
    cases = [(section, case) for section in options.only for case in _cases(section, options.quick)]
    rounds = {section: 1 if section in ONCE else options.rounds for section in options.only}
    found: dict[int, list[dict[str, Any]]] = {number: [] for number in range(len(cases))}
    with _progress(sum(rounds[section] for section, _ in cases)) as progress:
        for turn in range(options.rounds):
            for number, (section, case) in enumerate(cases):
                if turn < rounds[section]:
                    found[number].append(_run(options, section, case, progress, turn))
    records = [_record(section, case, found[number]) for number, (section, case) in enumerate(cases)]
    _compare(records)
    return {"setting": _setting(options, found[0][0]["versions"], begun), "cases": records}


def _cases(section: str, quick: bool) -> list[dict[str, Any]]:
    """A section's cases; in a quick run without the longest."""
    return [case for case in CASES[section] if not (quick and case.get("steps", 0) > 3000)]


def _run(
    options: argparse.Namespace, section: str, case: dict[str, Any], progress: Progress, turn: int
) -> dict[str, Any]:
    named = " ".join(str(value) for value in case.values())
    with _shown(progress, f"round {turn + 1}: {section} {named}"):
        spec = {"section": section, "threads": options.threads, "quick": options.quick, "runs": RUNS}
        report: dict[str, Any] = process("sequence_cases.py", {**spec, "seconds": SECONDS, **case}, options.threads)
        return report


def _record(section: str, case: dict[str, Any], reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A case with its medians over all runs, and each round's own."""
    times = {}
    for name in reports[0]["seconds"]:
        rounds = [report["seconds"][name] for report in reports]
        times[name] = {
            "median": statistics.median(second for seconds in rounds for second in seconds),
            "rounds": [statistics.median(seconds) for seconds in rounds],
            "runs": sum(map(len, rounds)),
        }
    rest = {name: value for name, value in reports[0].items() if name not in ("seconds", "versions")}
    return {"section": section, **case, "seconds": times, **rest}


def _compare(records: Sequence[dict[str, Any]]) -> None:
    """Hold the ways of computing a ragged batch against ours. Raises SystemExit where one computes something else."""
    ours = {r["cell"]: r["check"] for r in records if r["section"] == "ragged" and r["way"] == "throughtime"}
    for record in records:
        if record["section"] == "ragged" and record["check"]:
            for name, value in ours[record["cell"]].items():
                theirs = record["check"][name]
                if not abs(theirs - value) <= 1e-3 * abs(value):
                    raise SystemExit(f"{record['way']} {record['cell']}: {name} is {theirs}, and throughtime's {value}")


def _setting(options: argparse.Namespace, versions: dict[str, str], begun: datetime) -> dict[str, Any]:
    return {
        "date": begun.isoformat(timespec="seconds"),
        "minutes": round((datetime.now(UTC) - begun).total_seconds() / 60, 1),
        "threads": options.threads,
        "rounds": options.rounds,
        "quick": options.quick,
        "sections": options.only,
        "processor": processor(),
        "cores": os.cpu_count(),
        "system": platform.system(),
        "versions": {"python": platform.python_version(), **versions},
    }


def read_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=tuple(CASES), default=list(CASES), metavar="SECTION")
    parser.add_argument("--threads", type=int, choices=(1, 2), default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one round, small, to see that it works")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder to write to")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    options.only = [section for section in CASES if section in options.only]
    options.rounds = 1 if options.quick else options.rounds
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write. A run of some sections leaves the other sections' figures in the files as they are."""
    options = read_options(arguments)
    record = measure(options)
    kept = options.out / "sequences.json"
    if kept.exists() and len(options.only) < len(CASES):
        record = sequence_report.joined(json.loads(kept.read_text(encoding="utf-8")), record)
    print(sequence_report.as_markdown(record))
    sequence_report.write(record, options.out)


if __name__ == "__main__":
    main()
