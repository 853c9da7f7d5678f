"""The engine's speed beside its peers, and beside the machine's own peak.

    python benchmarks/speed.py                                     # everything, on two threads
    python benchmarks/speed.py --shapes 100,32,64,128 --cells gru --quick

One process for each shape and peer, the peers in turn, round after round, so that whatever else the machine does falls
on all of them; medians over the runs of all rounds. Writes JSON, a Markdown table and a plot (PNG and SVG).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import speed_report
from problems import GATES, SHAPES, Shape
from record import processor
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

HERE = Path(__file__).parent
PEERS = ("throughtime", "torch", "onnxruntime", "jax")
RUNS = 15
"""The fewest runs behind a median, over all rounds."""

SECONDS = 0.12
"""How long quick calls are repeated in a round."""


@dataclass
class Tally:
    """What the processes reported so far."""

    seconds: dict[tuple[str, str, str, str], list[list[float]]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    peaks: list[dict[str, float]] = field(default_factory=list)
    first: dict[str, list[float]] = field(default_factory=dict)

    def add(self, shape: Shape, peer: str, report: dict[str, Any]) -> None:
        """One process's runs of one round."""
        self.versions |= report["versions"]
        for cell, modes in report["seconds"].items():
            for mode, seconds in modes.items():
                self.seconds.setdefault((str(shape), cell, mode, peer), []).append(seconds)

    def times(self) -> list[dict[str, Any]]:
        """Medians over all runs, and each round's own."""
        return [
            {
                **dict(zip(("shape", "cell", "mode", "peer"), key, strict=True)),
                "median": statistics.median(second for seconds in rounds for second in seconds),
                "rounds": [statistics.median(seconds) for seconds in rounds],
                "runs": sum(map(len, rounds)),
            }
            for key, rounds in self.seconds.items()
        ]


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All rounds; the record that is written, and that the table and the plot are made from."""
    tally = Tally()
    begun = datetime.now(UTC)
    firsts = [] if options.quick else ["first call", "own cell"]
    total = options.rounds * (1 + len(options.shapes) * len(options.peers) + len(firsts))
    with _progress(total) as progress, tempfile.TemporaryDirectory() as folder:
        for number in range(1, options.rounds + 1):
            _round(options, tally, Path(folder), firsts, progress, f"round {number}")
    return {
        "setting": _setting(options, tally, begun),
        "peak": {count: max(peak[count] for peak in tally.peaks) for count in tally.peaks[0]},
        "first": {name: statistics.median(values) for name, values in tally.first.items()},
        "times": tally.times(),
    }


def _round(
    options: argparse.Namespace, tally: Tally, folder: Path, firsts: Sequence[str], progress: Progress, name: str
) -> None:
    with _shown(progress, f"{name}: the machine's peak"):
        counts = sorted({1, options.threads})
        tally.peaks.append(process("peak.py", {"threads": counts, "seconds": 0.02 if options.quick else 0.1}, 0))
    for shape in options.shapes:
        for peer in options.peers:
            with _shown(progress, f"{name}: {peer} on {shape}"):
                tally.add(shape, peer, _run_peer(options, shape, peer, folder))
    for what in firsts:
        with _shown(progress, f"{name}: {what}"):
            for key, value in FIRSTS[what](options.threads).items():
                tally.first.setdefault(key, []).append(value)


def _run_peer(options: argparse.Namespace, shape: Shape, peer: str, folder: Path) -> dict[str, Any]:
    spec = {
        "peer": peer,
        "shape": str(shape),
        "cells": options.cells,
        "threads": options.threads,
        "runs": 2 if options.quick else -(-RUNS // options.rounds),
        "seconds": 0.0 if options.quick else SECONDS,
        "folder": str(folder),
    }
    # what JAX has compiled in one round serves the next: compiling is not timed, and takes most of its process's time
    kept = {
        "JAX_COMPILATION_CACHE_DIR": str(folder / "jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PLATFORMS": "cpu",
    }
    return process("peers.py", spec, options.threads, kept)


def _first_call(threads: int) -> dict[str, float]:
    """The first call's seconds in a process whose cache is empty, and then in one that finds it filled."""
    with tempfile.TemporaryDirectory() as cache:
        spec, place = {"what": "first", "threads": threads}, {"THROUGHTIME_CACHE": cache}
        cold, warm = (process("first_call.py", spec, threads, place)["seconds"] for _ in range(2))
    return {"cold": cold, "warm": warm}


def _own_cell(threads: int) -> dict[str, float]:
    """A GRU of one's own over the built-in one."""
    found = process("first_call.py", {"what": "own cell", "threads": threads}, threads)
    return {"own cell": found["own"] / found["built-in"]}


FIRSTS = {"first call": _first_call, "own cell": _own_cell}


def process(script: str, spec: dict[str, Any], threads: int, more: dict[str, str] | None = None) -> Any:
    """What a fresh process prints as its last line, read as JSON. Raises SystemExit with its words if it fails."""
    environment = os.environ | (more or {})
    if threads:
        environment |= {"OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, str(HERE / script), json.dumps(spec)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{script} failed on {json.dumps(spec)}:\n{done.stderr.strip()}")
    return json.loads(done.stdout.splitlines()[-1])


@contextmanager
def _progress(total: int) -> Iterator[Progress]:
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns) as progress:
        progress.add_task("", total=total)
        yield progress


@contextmanager
def _shown(progress: Progress, what: str) -> Iterator[None]:
    task = progress.task_ids[0]
    progress.update(task, description=what)
    yield
    progress.advance(task)


def _setting(options: argparse.Namespace, tally: Tally, begun: datetime) -> dict[str, Any]:
    return {
        "date": begun.isoformat(timespec="seconds"),
        "minutes": round((datetime.now(UTC) - begun).total_seconds() / 60, 1),
        "threads": options.threads,
        "rounds": options.rounds,
        "quick": options.quick,
        "peers": options.peers,
        "cells": options.cells,
        "shapes": [str(shape) for shape in options.shapes],
        "processor": processor(),
        "cores": os.cpu_count(),
        "system": platform.system(),
        "versions": {"python": platform.python_version(), **tally.versions},
    }


def read_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, choices=(1, 2), default=2)
    parser.add_argument("--shapes", type=Shape.parse, nargs="+", default=SHAPES, metavar="T,B,I,H")
    parser.add_argument("--cells", nargs="+", choices=tuple(GATES), default=list(GATES))
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one round of two runs, to see that it works")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder to write to")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    missing = [peer for peer in options.peers if find_spec(peer) is None]
    if missing:
        parser.error(f"{', '.join(missing)} not installed; pip install '.[bench]', or leave out with --peers")
    # throughtime always runs, and first: the others' numbers are held against its own
    options.peers = sorted({"throughtime", *options.peers}, key=PEERS.index)
    options.rounds = 1 if options.quick else options.rounds
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    options = read_options(arguments)
    record = measure(options)
    print(speed_report.as_markdown(record))
    speed_report.write(record, options.out)


if __name__ == "__main__":
    main()
