"""Kill a training with SIGKILL a hundred times at random moments, and see whether a single bit of it changes.

Two runs, one that classifies and one that tags, are trained undisturbed; then each is trained again and again in a
process that is killed after a random time and started anew with resume, until all kills are spent. Every run that
reaches its end is compared with the undisturbed one, file by file, times left out. The children are forked, so that no
kill is wasted on imports. Writes results/resume.json and results/resume.md; about five minutes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from throughtime.runs import folder as runs
from throughtime.runs.configuration import Config
from throughtime.runs.fit import environment, fit
from throughtime.training.recipe import Recipe

RESULTS = Path(__file__).parent / "results"
DONE = os.WEXITED | os.WNOHANG | os.WNOWAIT
TIMED = ("seconds", "steps_per_second")


def classify(folder: Path) -> dict[str, Any]:
    """Japanese Vowels with two layers, dropout and early stopping, batches accumulated."""
    network = {"cell": "lstm", "hidden_size": 24, "num_layers": 2, "dropout": 0.2}
    return {"file": "vowels", **network, "epochs": 12, "patience": 5, "accumulate": 2, "batch_size": 16}


def tag(folder: Path) -> dict[str, Any]:
    """Steps to tag with the sign of the step before, by truncated back-propagation with the state carried."""
    draw = np.random.default_rng(0)
    rows = ["id,t,label,x"]
    for number in range(120):
        x = draw.normal(size=20 + number % 31)
        rows += [f"{number},{t},{'ab'[int(x[t - 1] > 0 and t > 0)]},{x[t]:.4f}" for t in range(len(x))]
    (folder / "signs.csv").write_text("\n".join(rows) + "\n")
    columns = {"task": "tag", "sequence_id": "id", "time": "t", "target": "label"}
    return {
        "file": str(folder / "signs.csv"),
        **columns,
        "truncate": 8,
        "epochs": 10,
        "hidden_size": 24,
        "dropout": 0.2,
    }


TASKS = {"classify": classify, "tag": tag}


def essence(run: Path) -> dict[str, Any]:
    """What must not differ: every file but the manifest, whose sums cover times; times left out."""
    kept: dict[str, Any] = {name: (run / name).read_bytes() for name in runs.FILES}
    lines = [json.loads(line) for line in kept[runs.METRICS].splitlines()]
    kept[runs.METRICS] = [{name: value for name, value in line.items() if name not in TIMED} for line in lines]
    kept[runs.ENVIRONMENT] = {**json.loads(kept[runs.ENVIRONMENT]), "finished": None}
    return kept


def trained_in_a_child(config: Config, kill_after: float | None) -> bool:
    """Train, or go on training, in a process of its own; whether it was killed before it was done."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            fit(config, resume=True)
            status = 0
        finally:
            os._exit(status)
    end = None if kill_after is None else time.perf_counter() + kill_after
    while end is not None and time.perf_counter() < end and not os.waitid(os.P_PID, child, DONE):
        time.sleep(0.002)
    if end is not None:
        os.kill(child, signal.SIGKILL)  # of no effect on one that is done
    _, ended = os.waitpid(child, 0)
    if ended not in (0, signal.SIGKILL):
        raise SystemExit(f"a training ended with the status {ended}, neither killed nor done")
    return ended == signal.SIGKILL


def place(path: Path) -> str:
    """Where a kill hit, from what it left."""
    partial = runs.partial_of(path)
    if not partial.is_dir():
        return "done, before the process ended" if path.is_dir() else "before there was a folder"
    if (partial / runs.MANIFEST).exists():
        return "whole, before it took its name"
    if list(partial.glob(".*.part")):
        return "while a file was written"
    if not (partial / runs.CHECKPOINT).exists():
        return "before the first checkpoint"
    kinds = [json.loads(line)["kind"] for line in (partial / runs.METRICS).read_bytes().splitlines() if line]
    return "after training, before the files were whole" if "test" in kinds else "between two updates or in one"


def measure(task: str, kills: int, seed: int, folder: Path, tell: Any) -> dict[str, Any]:
    """Spend the kills on runs of one task; how many ended, and what differed."""
    folder.mkdir()
    options = {**TASKS[task](folder), "checkpoint_seconds": 0.02}

    def config(name: str) -> Config:
        (folder / name).mkdir()
        return Config.resolve({**options, "run": folder / name / "RUN"})

    fit(dataclasses.replace(config("first"), training=Recipe(epochs=1)))  # what children would else import, each anew
    whole = config("undisturbed")
    started = time.perf_counter()
    trained_in_a_child(whole, None)
    seconds = time.perf_counter() - started
    expected = essence(folder / "undisturbed" / "RUN")
    moments = random.Random(seed)
    places: Counter[str] = Counter()
    spent, ended, differing = 0, 0, []
    most = 0
    while spent < kills:
        before = spent
        broken = config(f"broken-{ended}")
        path = folder / f"broken-{ended}" / "RUN"
        while True:
            # A third of a run is the longest that a process lives, so that most runs are killed several times.
            last = None if spent >= kills else moments.uniform(0, seconds / 3)
            if not trained_in_a_child(broken, last):
                break
            spent += 1
            places[place(path)] += 1
            tell()
        ended += 1
        most = max(most, spent - before)
        found = essence(path)
        runs.load(path)
        differing += [f"run {ended}: {name}" for name in expected if found[name] != expected[name]]
    return {
        "task": task,
        "kills": spent,
        "runs": ended,
        "most": most,
        "seconds": seconds,
        "places": dict(places.most_common()),
        "differing": differing,
    }


def as_markdown(record: dict[str, Any]) -> str:
    """The summary."""
    tasks = record["tasks"]
    places = sorted({name for task in tasks for name in task["places"]})
    differing = [f"{task['task']}, {name}" for task in tasks for name in task["differing"]]
    kills = sum(task["kills"] for task in tasks)
    verdict = "not one bit of any file differs" if not differing else f"{len(differing)} files differ: {differing}"
    header = "| | " + " | ".join(task["task"] for task in tasks) + " |\n|---|" + "---|" * len(tasks)

    def row(name: str, values: list[Any]) -> str:
        return f"| {name} | " + " | ".join(str(value) for value in values) + " |"

    rows = [
        row("kills", [task["kills"] for task in tasks]),
        row("runs brought to their end and compared", [task["runs"] for task in tasks]),
        row("most kills in one of them", [task["most"] for task in tasks]),
        row("files that differ from the undisturbed run's", [len(task["differing"]) for task in tasks]),
        row("seconds of the undisturbed run", [f"{task['seconds']:.1f}" for task in tasks]),
        *(row(f"killed {name}", [task["places"].get(name, 0) for task in tasks]) for name in places),
    ]
    return (
        f"# Killed {kills} times\n\nSIGKILL at random moments, then `resume`: {verdict} (times left out).\n\n{header}\n"
        + "\n".join(rows)
        + "\n\nA checkpoint was written every 0.02 seconds. `python benchmarks/resume.py` makes this page.\n"
    )


def main() -> None:
    from rich.console import Console
    from rich.progress import track

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=100, help="how many, over both tasks")
    parser.add_argument("--seed", type=int, default=0, help="decides the moments")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="throughtime-resume-"))
    bar = iter(track(range(arguments.kills), "killing", console=Console(stderr=True)))
    try:
        tasks = [
            measure(task, kills, arguments.seed + number, folder / task, lambda: next(bar, None))
            for number, (task, kills) in enumerate(
                {"classify": arguments.kills - arguments.kills // 2, "tag": arguments.kills // 2}.items()
            )
        ]
    finally:
        shutil.rmtree(folder)
    record = {"environment": environment(1), "seed": arguments.seed, "tasks": tasks}
    (arguments.out / "resume.json").write_text(json.dumps(record, indent=1) + "\n")
    (arguments.out / "resume.md").write_text(as_markdown(record))
    print(as_markdown(record))
    if any(task["differing"] for task in tasks):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
