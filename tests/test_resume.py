"""A run that is killed with SIGKILL, anywhere, and started again with resume ends with the bits of one that was not."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from throughtime.errors import ThroughtimeError
from throughtime.runs import folder as runs
from throughtime.runs.configuration import Config
from throughtime.runs.fit import fit
from throughtime.runs.folder import UnfinishedRun

KILLS = 10
TIMED = {"seconds", "steps_per_second"}
CUT = (
    *("close", "fsync", "mkdir", "open", "rename", "replace", "truncate", "unlink"),
    *("Training.update", "Training.end_epoch", "Training.restore_best"),
)
"""What is counted to place a kill: calls to the disk, and the training's own stations."""

CHANGES = ("replace", "rename", "unlink")
"""The calls that change what another process sees of a folder."""


def data(folder: Path) -> Path:
    """Sequences of 3 to 8 steps; the class is the sign of the first step."""
    draw = np.random.default_rng(5)
    rows = ["id,label,x,y"]
    for number in range(40):
        first = draw.normal()
        for step in range(3 + number % 6):
            x = first if step == 0 else draw.normal()
            rows.append(f"s{number:02},{'ab'[first > 0]},{x:.4f},{draw.normal():.4f}")
    file = folder / "data.csv"
    file.write_text("\n".join(rows))
    return file


def config(folder: Path, name: str) -> Config:
    """Everything at once that a checkpoint must hold: dropout, accumulation, early stopping, a threshold to clip at."""
    (folder / name).mkdir(exist_ok=True)
    options = {
        **{"file": str(folder / "data.csv"), "sequence_id": "id", "target": "label", "run": folder / name / "RUN"},
        **{"hidden_size": 3, "num_layers": 2, "dropout": 0.3, "epochs": 8, "batch_size": 3, "accumulate": 2},
        **{"learning_rate": 0.3, "patience": 4, "validation_fraction": 0.2, "checkpoint_seconds": 0.0},
    }
    return Config.resolve(options)


def in_a_child(work: Callable[[], None]) -> int:
    """Do it in a forked process, and say what that ended with: 0, or 9 if it was killed."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    _, ended = os.waitpid(child, 0)
    return os.WTERMSIG(ended) if os.WIFSIGNALED(ended) else os.WEXITSTATUS(ended)


@contextmanager
def counted(at: Callable[[int], None], stations: tuple[str, ...] = CUT) -> Iterator[list[int]]:
    """Call `at` with the number of every station passed, just before what it stands for is done."""
    from throughtime.training.loop import Training

    passed = [0]
    patch = pytest.MonkeyPatch()

    def station(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def stop_and_do(*arguments: Any, **named: Any) -> Any:
            passed[0] += 1
            at(passed[0])
            return real(*arguments, **named)

        return stop_and_do

    for name in stations:
        owner, attribute = (Training, name.removeprefix("Training.")) if "." in name else (os, name)
        patch.setattr(owner, attribute, station(name, getattr(owner, attribute)))
    try:
        yield passed
    finally:
        patch.undo()


def killed_at(number: int) -> Callable[[int], None]:
    def stop(passed: int) -> None:
        if passed == number:
            os.kill(os.getpid(), signal.SIGKILL)

    return stop


def without_times(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name not in TIMED}


def essence(run: Path) -> dict[str, Any]:
    """Every file but the manifest (whose sums cover times), times left out."""
    kept: dict[str, Any] = {name: (run / name).read_bytes() for name in runs.FILES}
    kept["metrics.jsonl"] = [without_times(json.loads(line)) for line in kept["metrics.jsonl"].splitlines()]
    kept["environment.json"] = {**json.loads(kept["environment.json"]), "finished": None}
    return kept


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    data(folder)
    return folder


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> tuple[dict[str, Any], int]:
    """What the run holds that nobody broke off, and how many stations it passed."""
    with counted(lambda number: None) as passed:
        run = fit(config(folder, "undisturbed"))
    return essence(run.path), passed[0]


def test_ten_kills_at_random_moments_change_no_bit(folder: Path, undisturbed: tuple[dict[str, Any], int]):
    expected, stations = undisturbed
    moments = random.Random(11)
    kills, reached = 0, []
    while kills < KILLS:
        killed = config(folder, f"killed-{kills}")
        path = killed.run or Path()
        while not path.exists():
            # A short way each time, so that several kills fit in before the end.
            stop = killed_at(moments.randrange(2, stations // 6) if kills < KILLS else -1)

            def work(stop: Callable[[int], None] = stop, killed: Config = killed) -> None:
                with counted(stop):
                    fit(killed, resume=True)

            ended = in_a_child(work)
            assert ended in (0, signal.SIGKILL)
            if ended == signal.SIGKILL and runs.partial_of(path).exists():
                reached.append((runs.partial_of(path) / runs.METRICS).read_bytes().count(b"\n"))
            kills += ended == signal.SIGKILL
        assert not runs.partial_of(path).exists()
        assert essence(path) == expected
        runs.load(path)
    assert max(reached) > 2 > min(reached), "the epoch that is kept, and the first that clips, lie between the kills"


def test_a_kill_at_any_step_of_the_ending_leaves_what_can_be_finished(
    folder: Path, undisturbed: tuple[dict[str, Any], int]
):
    contents = {name: (folder / "undisturbed" / "RUN" / name).read_bytes() for name in runs.FILES}
    ending = folder / "ending"
    ending.mkdir()
    for number in range(1, 1000):
        path = ending / str(number)

        def work(path: Path = path, number: int = number) -> None:
            with UnfinishedRun.create(path) as run, counted(killed_at(number), CHANGES):
                run.finish(contents)

        ended = in_a_child(work)
        if not path.exists():
            with pytest.raises(ThroughtimeError, match="not finished"):
                runs.load(path)
            with UnfinishedRun.resume(path) as run:
                run.put_in_place() if run.is_complete else run.finish(contents)
        runs.load(path)
        assert {name: (path / name).read_bytes() for name in runs.FILES} == contents
        assert not runs.partial_of(path).exists()
        if ended == 0:
            break
        assert ended == signal.SIGKILL
    assert number > 2 * len(runs.FILES), "every file was cut off before and after it took its name"


def test_a_disk_that_fills_up_breaks_the_run_off_and_room_lets_it_go_on(
    folder: Path, undisturbed: tuple[dict[str, Any], int], monkeypatch: pytest.MonkeyPatch
):
    expected, _ = undisturbed
    full = config(folder, "full")
    assert full.run is not None
    replaced, real = iter(range(1000)), os.replace

    def until_it_is_full(*given: Any) -> None:
        if next(replaced) == 12:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(*given)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", until_it_is_full)
        with pytest.raises(ThroughtimeError, match="the disk is full; make room and start again with --resume"):
            fit(full)
    assert not full.run.exists()
    assert essence(fit(full, resume=True).path) == expected


def test_the_benchmark_names_what_differs(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    from resume import as_markdown

    task = {"task": "tag", "kills": 3, "runs": 2, "most": 2, "seconds": 1.0, "places": {"x": 3}, "differing": []}
    assert "not one bit of any file differs" in as_markdown({"tasks": [task]})
    spoilt = {**task, "differing": ["run 1: weights.safetensors"]}
    assert "1 files differ: ['tag, run 1: weights.safetensors']" in as_markdown({"tasks": [task, spoilt]})
