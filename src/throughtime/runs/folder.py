"""The run folder: checkpoints while it is made, a name once it is whole, and a reader that trusts no file in it."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from throughtime.equations.cell import Cell
from throughtime.errors import CellError, DataError, ThroughtimeError
from throughtime.runs.configuration import CELL_FILE, Config
from throughtime.tasks.encoding import Encoder
from throughtime.tasks.model import Architecture, SequenceModel
from throughtime.training.loop import Snapshot
from throughtime.training.recipe import Recipe

FORMAT = "throughtime-run-1"
WEIGHTS, ENCODER, CONFIG, METRICS = "weights.safetensors", "encoder.json", "config.toml", "metrics.jsonl"
ENVIRONMENT, CARD, REPORT = "environment.json", "README.md", "report.html"
FILES = (WEIGHTS, CELL_FILE, ENCODER, CONFIG, METRICS, ENVIRONMENT, CARD, REPORT)
"""What a finished run holds, beside the manifest that has a sum for each of them."""

MANIFEST, CHECKPOINT, LOCK = "manifest.json", "checkpoint.safetensors", "lock"


@dataclass(frozen=True, eq=False)
class FinishedRun:
    """A finished run, read and verified: the trained model, ready to use, and all that it came from."""

    path: Path
    model: SequenceModel
    encoder: Encoder
    configuration: Config
    metrics: tuple[dict[str, Any], ...]

    @property
    def recipe(self) -> Recipe:
        """How it was trained."""
        return self.configuration.training

    @property
    def epochs(self) -> tuple[dict[str, Any], ...]:
        """What each epoch gave: the fields of `training.Epoch`."""
        return tuple(line for line in self.metrics if line.get("kind") == "epoch")

    @property
    def result(self) -> dict[str, Any]:
        """What the test part said in the end: score, loss, count, baselines."""
        return next(line for line in reversed(self.metrics) if line.get("kind") == "test")


class UnfinishedRun:
    """A run that is being made: the folder `RUN.partial/`, this process's own, until `finish` names it `RUN`.

    `create` begins one and `resume` goes on with one that was broken off; both refuse, before anything is read or
    trained, what could not be finished: a name that is taken, a folder that cannot be written, another process at work.
    Leaving the context lets go of it, and removes what `create` made if it holds nothing worth going on from.
    """

    def __init__(self, path: Path, lock: int, *, new: bool, made: Sequence[Path] = ()) -> None:
        self.path, self.partial, self._lock, self._new = path, partial_of(path), lock, new
        self._made = made  # the folders above, the innermost first, that were not there before

    @classmethod
    def create(cls, path: Path) -> UnfinishedRun:
        """Begin a new run, in folders that are made if need be.

        Raises ThroughtimeError where the name is taken or the folder cannot be written.
        """
        _refuse_taken(path)
        partial = partial_of(path)
        made = [folder for folder in partial.parents if not folder.exists()]
        try:
            partial.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ThroughtimeError(
                f"{partial.parent}: cannot be made ({error.strerror}); choose a place that can be written"
            ) from error
        try:
            partial.mkdir()
        except FileExistsError:
            raise ThroughtimeError(
                f"{partial}: an unfinished run of this name; go on with it (--resume), remove it, or take another name"
            ) from None
        except OSError as error:
            raise ThroughtimeError(
                f"{partial}: cannot be made ({error.strerror}); choose a place that can be written"
            ) from error
        run = cls(path, _locked(partial), new=True, made=made)
        run._append_metrics(b"")
        return run

    @classmethod
    def resume(cls, path: Path) -> UnfinishedRun:
        """Take up the run that was broken off, a little before where it stopped: see `last_checkpoint`."""
        _refuse_taken(path)
        partial = partial_of(path)
        if not partial.is_dir():
            raise ThroughtimeError(f"{partial}: there is no unfinished run; begin it without --resume")
        run = cls(path, _locked(partial), new=False)
        for left in partial.glob(".*.part"):
            left.unlink()
        run._append_metrics(b"")
        return run

    def __enter__(self) -> UnfinishedRun:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        worthless = self._new and not (self.partial / CHECKPOINT).exists() and not self.is_complete
        if worthless and self.partial.is_dir():
            for file in (*(self.partial / name for name in (*FILES, LOCK)), *self.partial.glob(".*.part")):
                file.unlink(missing_ok=True)
            self.partial.rmdir()
            with suppress(OSError):  # of a folder that somebody has put something into
                for folder in self._made:
                    folder.rmdir()
        os.close(self._lock)

    @property
    def is_complete(self) -> bool:
        """Whether everything is written, and only the name is missing."""
        return (self.partial / MANIFEST).exists()

    def write(self, name: str, content: bytes) -> None:
        """Write a file whole or not at all, and on the disk when this returns. Raises ThroughtimeError if it cannot."""
        try:
            _write_atomically(self.partial / name, content)
        except OSError as error:
            raise self._unwritten(name, error) from error

    def record(self, line: dict[str, Any]) -> None:
        """Add a line to the metrics; JSON has no number that is not finite, so such a one becomes null."""
        line = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in line.items()
        }
        self._append_metrics(json.dumps(line, allow_nan=False).encode() + b"\n")

    def lines(self) -> tuple[dict[str, Any], ...]:
        """The metrics so far. Raises ThroughtimeError where someone has damaged them."""
        metrics = self.partial / METRICS
        try:
            return tuple(json.loads(line) for line in metrics.read_bytes().splitlines())
        except ValueError as error:
            raise self._damaged(metrics, _one_line(error)) from error

    def checkpoint(self, snapshot: Snapshot) -> None:
        """Keep where the training is, in place of the checkpoint before; that one stays if this cannot be written."""
        from safetensors.torch import save

        length = self._append_metrics(b"")
        # One entry: safetensors would write several in an order that changes from process to process.
        metadata = {"record": json.dumps({"metrics_bytes": length, **snapshot.record}, allow_nan=False)}
        self.write(CHECKPOINT, save({name: tensor.contiguous() for name, tensor in snapshot.tensors.items()}, metadata))

    def last_checkpoint(self) -> Snapshot | None:
        """The last checkpoint, None before the first; the metrics are cut back to what they were when it was written.

        Raises ThroughtimeError for a checkpoint, or metrics, that someone has damaged.
        """
        from safetensors import SafetensorError, safe_open

        file, metrics = self.partial / CHECKPOINT, self.partial / METRICS
        if not file.exists():
            os.truncate(metrics, 0)
            return None
        try:
            with safe_open(file, framework="pt") as stored:
                tensors = {name: stored.get_tensor(name).clone() for name in stored.keys()}  # noqa: SIM118 - no mapping
                record = json.loads(stored.metadata()["record"])
            length = record.pop("metrics_bytes")
        except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise self._damaged(file, _one_line(error)) from error
        if metrics.stat().st_size < length:
            raise self._damaged(metrics, f"shorter than when {CHECKPOINT} was written")
        os.truncate(metrics, length)
        return Snapshot(tensors, record)

    def finish(self, files: dict[str, bytes]) -> None:
        """Write the files, sum up all of them in the manifest, and give the folder its name.

        Raises ThroughtimeError where that name has been taken meanwhile, or the disk is full; what is there can then be
        finished by `resume`.
        """
        for name, content in files.items():
            self.write(name, content)
        sums = {name: _sums((self.partial / name).read_bytes()) for name in FILES}
        self.write(MANIFEST, as_json({"format": FORMAT, "files": sums}))
        self.put_in_place()

    def put_in_place(self) -> None:
        """Give the complete folder its name."""
        _refuse_taken(self.path)
        (self.partial / CHECKPOINT).unlink(missing_ok=True)
        _to_disk(self.partial)
        try:
            os.rename(self.partial, self.path)
        except OSError as error:
            raise ThroughtimeError(
                f"{self.path}: the finished run cannot take this name ({error.strerror}); it is whole in"
                f" {self.partial}: clear the name and start again with --resume"
            ) from error
        (self.path / LOCK).unlink()
        _to_disk(self.path)
        _to_disk(self.path.parent)

    def _append_metrics(self, content: bytes) -> int:
        """Add to the metrics, on the disk when this returns, and return how long they are."""
        try:
            with (self.partial / METRICS).open("ab") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
                return file.tell()
        except OSError as error:
            raise self._unwritten(METRICS, error) from error

    def _damaged(self, file: Path, problem: str) -> ThroughtimeError:
        return ThroughtimeError(f"{file}: damaged ({problem}); remove {self.partial} and train anew")

    def _unwritten(self, name: str, error: OSError) -> ThroughtimeError:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        cause, out = ("the disk is full", "make room") if full else (error.strerror, "mend that")
        kept = (self.partial / CHECKPOINT).exists()
        again = "start again with --resume: the checkpoint before is whole" if kept else "start again"
        return ThroughtimeError(f"{self.partial / name}: cannot be written, {cause}; {out} and {again}")


def partial_of(path: Path) -> Path:
    """The folder in which the run of this path is made."""
    if path.name in ("", "..") or path.name.endswith(".partial"):
        raise ThroughtimeError(f"{path}: no name for a run; give the folder to make, without .partial")
    return path.with_name(f"{path.name}.partial")


def configuration_of(path: Path, options: Mapping[str, Any] | None = None) -> Config:
    """The resolved configuration of a run, finished or not, with options in place of its own."""
    places = [folder / CONFIG for folder in (path, partial_of(path))]
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        raise ThroughtimeError(f"{path}: there is no run here, finished or not; give the folder of one")
    return Config.resolve({**(options or {}), "run": path}, file)


def load(path: Path) -> FinishedRun:
    """Read a finished run: every file against the manifest's sum, then every value against what a run may hold.

    Nothing in the folder is executed, imported or unpickled. Raises DataError naming the file that is missing,
    truncated, damaged, or not what a run's file is.
    """
    contents = _verified(path)
    config = Config.resolve({"run": path}, path / CONFIG)
    try:
        cell = Cell.from_json(_text(contents[CELL_FILE], path / CELL_FILE))
    except CellError as error:
        raise _unfit(path / CELL_FILE, str(error)) from error
    encoder = Encoder.from_json(_json(contents[ENCODER], path / ENCODER), str(path / ENCODER))
    model = _model(cell, architecture_of(config, encoder), contents[WEIGHTS], path / WEIGHTS)
    lines = _text(contents[METRICS], path / METRICS).splitlines()
    metrics = tuple(_json(line.encode(), path / METRICS) for line in lines)
    if not any(line.get("kind") == "test" for line in metrics):
        raise _unfit(path / METRICS, "has no result of the test part")
    return FinishedRun(path, model, encoder, config, metrics)


def architecture_of(config: Config, encoder: Encoder) -> Architecture:
    """The sizes of the model, from the configuration and from what the training part held."""
    sizes = {name: size for name, size in vars(config.network).items() if name != "cell"}
    return Architecture.fitting(encoder, **sizes)


def weights_of(model: SequenceModel) -> bytes:
    """The model's weights as safetensors."""
    from safetensors.torch import save

    return save({name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()})


def _model(cell: Cell, architecture: Architecture, content: bytes, file: Path) -> SequenceModel:
    """The model with its weights; sizes that do not belong to the weights cost no memory before they are refused."""
    try:
        weights = _tensors(content)
        if architecture.num_layers > len(weights):
            raise ValueError(f"{len(weights)} tensors are too few for {architecture.num_layers} layers")
        wrong = next((name for name, tensor in weights.items() if tensor.dtype != torch.float32), None)
        if wrong is not None:
            raise ValueError(f"{wrong} is {weights[wrong].dtype}, not torch.float32")
        with torch.device("meta"):
            model = architecture.task.model(cell, architecture)
        model.load_state_dict(weights, assign=True)
    except (ValueError, RuntimeError, OverflowError) as error:
        raise _unfit(file, f"not the weights of this cell and configuration ({_one_line(error)})") from error
    return model.eval()


def _tensors(content: bytes) -> dict[str, Tensor]:
    """The tensors of a safetensors file, as copies. Raises ValueError for anything else."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return {name: tensor.clone() for name, tensor in load(content).items()}
    except SafetensorError as error:
        raise ValueError(str(error)) from error


def _verified(path: Path) -> dict[str, bytes]:
    """The content of every file of a finished run, each as the manifest says."""
    if not path.is_dir():
        partial = partial_of(path)
        if partial.is_dir():
            raise DataError(f"{partial}: this run is not finished; train it to its end (fit --resume)")
        raise DataError(f"{path}: there is no run here; give the folder of one")
    manifest = _json(_content(path / MANIFEST, None), path / MANIFEST)
    sums = manifest.get("files")
    if manifest.get("format") != FORMAT or not isinstance(sums, dict) or set(sums) != set(FILES):
        raise _unfit(path / MANIFEST, f"not the manifest of a run that this version reads ({FORMAT})")
    contents = {}
    for name in FILES:
        wanted = sums[name] if isinstance(sums[name], dict) else {}
        contents[name] = _content(path / name, wanted.get("bytes"))
        if _sums(contents[name]) != wanted:
            raise _unfit(path / name, f"damaged or changed, for its content is not what {MANIFEST} says")
    return contents


def _content(file: Path, size: Any) -> bytes:
    """What the file holds; its size is looked at before anything is read."""
    if not file.is_file():
        raise _unfit(file, "missing")
    found = file.stat().st_size
    if size is not None and found != size:
        how = "truncated" if isinstance(size, int) and found < size else "damaged"
        raise _unfit(file, f"{how}, {found} bytes where {MANIFEST} says {size!r}")
    try:
        return file.read_bytes()
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}); see to its permissions") from error


def _sums(content: bytes) -> dict[str, Any]:
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def as_json(record: Any) -> bytes:
    """A record as the text of a JSON file."""
    return (json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode()


def _json(content: bytes, file: Path) -> dict[str, Any]:
    try:
        record = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise _unfit(file, f"not JSON ({_one_line(error)})") from error
    if not isinstance(record, dict):
        raise _unfit(file, f"{type(record).__name__}, not a JSON object")
    return record


def _text(content: bytes, file: Path) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise _unfit(file, "not UTF-8 text") from error


def _unfit(file: Path, problem: str) -> DataError:
    return DataError(f"{file}: {problem}; get the run again from where it came")


def _locked(partial: Path) -> int:
    """A descriptor that holds the folder's lock for as long as this process lives, however it ends."""
    file = partial / LOCK
    try:
        lock = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise ThroughtimeError(
            f"{partial}: cannot be written ({error.strerror}); see to its permissions, or choose another place"
        ) from error
    problem = None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not (file.exists() and os.path.samestat(os.fstat(lock), file.stat())):
            problem = "another process has just finished this run; look at it"
    except BlockingIOError:
        problem = "another process is training this run; wait for it, or end it"
    except OSError as error:
        problem = f"cannot be locked ({error.strerror}); choose a place on a file system with locks"
    if problem is not None:
        os.close(lock)
        raise ThroughtimeError(f"{partial}: {problem}")
    return lock


def _refuse_taken(path: Path) -> None:
    if os.path.lexists(path):
        raise ThroughtimeError(f"{path}: exists already, and a run never replaces anything; choose another name")


def _write_atomically(file: Path, content: bytes) -> None:
    part = file.with_name(f".{file.name}.part")
    try:
        with part.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)
    _to_disk(file.parent)


def _to_disk(folder: Path) -> None:
    """Make what was renamed in a folder last through a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
