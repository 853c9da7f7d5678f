"""From a configuration to a finished run: read, encode, build, train, evaluate, keep."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import platform
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from throughtime.data import packaged
from throughtime.data.packaged import SHIPPED
from throughtime.equations.catalogue import CELLS
from throughtime.equations.cell import Cell
from throughtime.equations.lookup import find
from throughtime.errors import CellError, DataError, ThroughtimeError
from throughtime.insight.watch import Watch
from throughtime.runs import card, folder
from throughtime.runs.configuration import CELL_FILE, Config
from throughtime.runs.folder import FinishedRun, UnfinishedRun
from throughtime.tasks.encoding import Encoded, encode
from throughtime.tasks.model import SequenceModel, build
from throughtime.tasks.table import TASKS, read
from throughtime.tasks.task import Score
from throughtime.training.evaluation import evaluate
from throughtime.training.loop import Epoch, Progress, Snapshot, on_threads, train
from throughtime.training.recipe import HOW


@dataclass(frozen=True)
class Notice:
    """Something that the person who waits should know, in plain words."""

    text: str


Event = Progress | Epoch | Notice
"""What `fit` tells while it works."""


def fit(config: Config, *, resume: bool = False, on_event: Callable[[Event], None] | None = None) -> FinishedRun:
    """Train what `config` describes and make the folder `config.run` of it; returns that run, read back and verified.

    Nothing is chosen by looking at the test part. `on_event` is called with a `Progress` after every update, an `Epoch`
    after every epoch and a `Notice` where there is something to say. With `resume`, a run that was broken off goes on
    from its last checkpoint and ends with the same bits as if it had not been; one that is finished is returned as it
    is; where there is neither, a new one begins. Raises ThroughtimeError for a run that cannot be made, before anything
    is read, and DataError for data that cannot be learnt from; neither leaves anything behind.
    """
    if config.run is None:
        raise ThroughtimeError("a run needs a folder of its own; name it (run, or --run)")
    say = on_event or (lambda event: None)
    cell = cell_of(config.network.cell)
    if resume and (config.run / folder.CONFIG).is_file():
        _check_same(_settled(config), cell, config.run)
        with suppress(OSError):  # of a process that was killed in the end; nobody reads it any more
            (config.run / folder.LOCK).unlink()
        say(Notice(f"{config.run} is finished already; there is nothing to go on with"))
        return folder.load(config.run)
    with _opened(config.run, resume, say) as run, on_threads(config.threads):
        if run.is_complete:
            _check_same(_settled(config), cell, run.partial)
            run.put_in_place()
        else:
            _make(run, config, cell, say)
    return folder.load(config.run)


def cell_of(name: str) -> Cell:
    """The cell that `name` says: a built-in one, `module:name`, or the path of a saved cell's JSON."""
    if not name.endswith(".json"):
        return find(name)
    try:
        return Cell.from_json(Path(name).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise CellError(f"{name}: cannot be read ({reason}); give the path of a saved cell") from error
    except CellError as error:
        raise CellError(f"{name}: {error}; save the cell again with Cell.to_json") from error


def _opened(path: Path, resume: bool, say: Callable[[Event], None]) -> UnfinishedRun:
    if not resume:
        return UnfinishedRun.create(path)
    if folder.partial_of(path).is_dir():
        return UnfinishedRun.resume(path)
    say(Notice(f"{folder.partial_of(path)} does not exist, so there is nothing to go on with: the run begins anew"))
    return UnfinishedRun.create(path)


def _make(run: UnfinishedRun, config: Config, cell: Cell, say: Callable[[Event], None]) -> None:
    """All that lies between an empty folder, or one that was broken off, and a finished one."""
    task = TASKS[config.data.task]
    sequences = read(config.data.file, config.data.columns, task=task)
    config = _with_sum(_settled(config))
    if (run.partial / folder.CONFIG).exists():
        _check_same(config, cell, run.partial)
    else:
        run.write(CELL_FILE, cell.to_json().encode())
        run.write(folder.CONFIG, config.to_toml().encode())
    data = config.data
    encoded = encode(task, sequences, **data.shares, seed=data.split_seed)
    for notice in encoded.notices:
        say(Notice(notice))
    model = build(cell, folder.architecture_of(config, encoded.encoder), seed=config.seed)
    _train(run, config, encoded, model, say)
    score = evaluate(model, encoded.test, encoded.encoder.codec)
    result = _result(config, encoded, model, run.lines(), score)
    if not math.isfinite(result["loss"]):
        say(
            Notice("the loss on the test part is not finite: a sequence there drives the states out of float32's range")
        )
    run.record(result)
    story = card.Story(config, encoded, cell, score, run.lines(), run.path.name)
    run.finish(
        {
            folder.WEIGHTS: folder.weights_of(model),
            folder.ENCODER: folder.as_json(encoded.encoder.to_json()),
            folder.ENVIRONMENT: folder.as_json(environment(config.threads)),
            folder.CARD: card.readme(story).encode(),
            folder.REPORT: card.report(story).encode(),
        }
    )


def _settled(config: Config) -> Config:
    """The configuration as the run keeps it, wherever it is read: no path in it depends on a folder."""
    data, network = config.data, config.network
    file = data.file if data.file in SHIPPED else str(Path(data.file).resolve())
    return dataclasses.replace(
        config,
        data=dataclasses.replace(data, file=file),
        network=dataclasses.replace(network, cell=network.cell if network.cell in CELLS else CELL_FILE),
        run=None,
    )


def _with_sum(config: Config) -> Config:
    """The configuration with the data's content fixed; a sum that it has already must be that of this content."""
    data = config.data
    sha256 = sum_of(data.file)
    if data.sha256 not in (None, sha256):
        raise DataError(
            f"{data.file}: its content is not what the configuration was written for; take the file of then, or leave"
            " sha256 out of [data] to train on this one"
        )
    return dataclasses.replace(config, data=dataclasses.replace(data, sha256=sha256))


def sum_of(name: str) -> str:
    """SHA-256 of the data of this name: a file, or a data set that ships here."""
    file: Any = packaged.file_of(name) if name in SHIPPED else Path(name)
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _check_same(config: Config, cell: Cell, place: Path) -> None:
    """Refuse to go on with a run that another configuration began; a content that is not known is not compared."""
    stored = Config.from_toml((place / folder.CONFIG).read_text(encoding="utf-8"), str(place / folder.CONFIG))
    if config.data.sha256 is None:
        stored = dataclasses.replace(stored, data=dataclasses.replace(stored.data, sha256=None))
    found = config.difference(stored)
    if config.data.sha256 != stored.data.sha256:
        found = f"the content of {config.data.file} has changed"
    elif found is None and cell_of(str(place / CELL_FILE)).hash != cell.hash:
        found = "the cell's equations have changed"
    if found is not None:
        raise ThroughtimeError(
            f"{place}: was begun with another configuration: {found}; go back to that, or make a new run"
        )


def _train(
    run: UnfinishedRun, config: Config, encoded: Encoded, model: SequenceModel, say: Callable[[Event], None]
) -> None:
    """Train from the last checkpoint on, if there is one."""
    start = run.last_checkpoint()
    if start is not None:
        say(Notice(f"going on in epoch {start.record['epoch'] + 1}, from the last checkpoint"))
    for epoch in train(
        model,
        encoded.train,
        config.training,
        seed=config.seed,
        validation=encoded.validation,
        codec=encoded.encoder.codec,
        checkpoint=_Checkpoints(run, config.checkpoint_seconds),
        resume_from=start,
        on_update=say,
        watch=Watch(model, per_step=encoded.task.by_step),
    ):
        run.record({"kind": "epoch", **dataclasses.asdict(epoch)})
        for warning in (warning for seen in epoch.watched for warning in seen["warnings"]):
            say(Notice(warning))
        say(epoch)


class _Checkpoints:
    """Writes a checkpoint whenever one is offered and the last is old enough."""

    def __init__(self, run: UnfinishedRun, seconds: float) -> None:
        self.run, self.seconds, self.last = run, seconds, time.monotonic()

    def __call__(self, snapshot: Callable[[], Snapshot]) -> None:
        if time.monotonic() - self.last >= self.seconds:
            self.run.checkpoint(snapshot())
            self.last = time.monotonic()


def _result(
    config: Config, encoded: Encoded, model: SequenceModel, epochs: tuple[dict[str, Any], ...], score: Score
) -> dict[str, Any]:
    """The last line of the metrics: what the test part says, beside what needs no network."""
    best = [line["number"] for line in epochs if line["best"]]
    return {
        "kind": "test",
        "loss": score.loss,
        "score": score.headline,
        "count": score.count,
        "baselines": [dataclasses.asdict(baseline) for baseline in encoded.task.baselines(encoded)],
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "epochs": len(epochs),
        "weights_of_epoch": best[-1] if best else len(epochs),
        "clip": epochs[-1]["threshold"],
        "clip_from": HOW if config.training.clip == "auto" else "the configuration",
    }


def environment(threads: int) -> dict[str, Any]:
    """What the numbers were computed with: versions, the machine, the day."""
    packages = ("throughtime", "torch", "numpy", "llvmlite", "safetensors", "scikit-learn", "pandas", "pyarrow")
    return {
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in packages},
        "system": platform.platform(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": threads,
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
