"""A finished run in use: scored on labelled files, and answering for files."""

from __future__ import annotations

import csv
import errno
import io
import json
import math
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from throughtime.data import splitting
from throughtime.data.encoding import Encoder
from throughtime.data.files import kind as kind_of
from throughtime.data.packaged import SHIPPED
from throughtime.data.reading import FORMATS as READ_AS
from throughtime.data.reading import read
from throughtime.data.sequences import Sequences
from throughtime.errors import DataError, ThroughtimeError
from throughtime.runs.configuration import Data
from throughtime.runs.fit import sum_of
from throughtime.runs.folder import LoadedRun
from throughtime.tasks.model import probabilities
from throughtime.training.loop import evaluate as measure

if TYPE_CHECKING:
    from numpy.typing import NDArray

STDIN = "-"
"""What stands for standard input in place of a file's name."""


@dataclass(frozen=True, eq=False)
class Predictions:
    """What a model says of sequences: `probabilities` are [classes] each, or [length, classes] to tag.

    `notices` are things that a reader of the answers should know.
    """

    task: str
    ids: tuple[str, ...]
    classes: tuple[str, ...]
    probabilities: tuple[NDArray[np.float32], ...]
    notices: tuple[str, ...] = ()

    def labels(self, index: int) -> list[str]:
        """The most likely label of one sequence, or of each of its steps."""
        return [self.classes[i] for i in np.atleast_2d(self.probabilities[index]).argmax(axis=1)]

    def rows(self) -> Iterator[dict[str, Any]]:
        """As a table: a row a sequence, or a row a step, with a column for the probability of each class."""
        for index, name in enumerate(self.ids):
            labels, shares = self.labels(index), np.atleast_2d(self.probabilities[index])
            for step, (label, row) in enumerate(zip(labels, shares.tolist(), strict=True), start=1):
                place = {"step": step} if self.task == "tag" else {}
                by_class = {f"p({each})": share for each, share in zip(self.classes, row, strict=True)}
                yield {"id": name, **place, "label": label, **by_class}

    def records(self) -> Iterator[dict[str, Any]]:
        """As JSON lines: an object a sequence; to tag, it holds lists with an entry for each step."""
        for index, name in enumerate(self.ids):
            labels, shares = self.labels(index), self.probabilities[index].T.tolist()
            answer = {"labels": labels} if self.task == "tag" else {"label": labels[0]}
            yield {"id": name, **answer, "probabilities": dict(zip(self.classes, shares, strict=True))}


@dataclass(frozen=True, eq=False)
class Evaluation:
    """How right a model is about labelled sequences: `counts` are by true class and said class, [classes, classes].

    They count sequences, or steps to tag; `log_loss` is the mean of -ln p of the right class, in nats.
    """

    task: str
    source: str
    classes: tuple[str, ...]
    counts: NDArray[np.int64]
    log_loss: float
    notices: tuple[str, ...]

    @property
    def total(self) -> int:
        """Sequences, or steps, that were looked at."""
        return int(self.counts.sum())

    @property
    def accuracy(self) -> float:
        """The share that is right."""
        return float(np.trace(self.counts) / self.total)

    @property
    def commonest(self) -> tuple[str, float]:
        """The commonest class of this file and its share: no constant answer is right more often."""
        shares = self.counts.sum(axis=1) / self.total
        return self.classes[int(shares.argmax())], float(shares.max())

    def by_class(self) -> Iterator[tuple[str, int, float, float]]:
        """Each class, how often it occurs, its recall and its precision; NaN where there is nothing to divide by."""
        right, true, said = np.diag(self.counts), self.counts.sum(axis=1), self.counts.sum(axis=0)
        with np.errstate(invalid="ignore"):
            recall, precision = right / true, right / said
        yield from zip(self.classes, true.tolist(), recall.tolist(), precision.tolist(), strict=True)

    def record(self) -> dict[str, Any]:
        """As data for JSON; what cannot be divided is null."""
        classes = {
            name: {"count": count, "recall": _number_or_none(recall), "precision": _number_or_none(precision)}
            for name, count, recall, precision in self.by_class()
        }
        return {
            "data": self.source,
            "task": self.task,
            "count": self.total,
            "accuracy": self.accuracy,
            "log_loss": self.log_loss,
            "commonest": dict(zip(("label", "share"), self.commonest, strict=True)),
            "classes": classes,
            "confusion": self.counts.tolist(),
        }


def predict(run: LoadedRun, sequences: Sequences) -> Predictions:
    """What the run's model says of every sequence. Raises DataError for columns that are not those of its training."""
    part = run.encoder.part(sequences, labelled=False)
    answers = tuple(each.numpy() for each in probabilities(run.model, part))
    _refuse_overflow(answers, sequences.ids, sequences.source)
    notices = (*sequences.notices, *run.encoder.notices(part, sequences.source))
    return Predictions(run.encoder.task, sequences.ids, run.encoder.classes, answers, notices)


def evaluate(
    run: LoadedRun, data: str, *, kind: str = ".jsonl", columns: Mapping[str, str] | None = None
) -> Evaluation:
    """Score the run's model on labelled data, which is read as `read_for` says.

    If it is the data that the run was made from, its test part alone counts, and a notice says so. Raises DataError
    for a label or a column that training did not have.
    """
    split = run.configuration.data
    is_known = (data in SHIPPED or Path(data).is_file()) and sum_of(data) == split.sha256
    sequences = read_for(run, data, labelled=True, splitting=is_known, kind=kind, columns=columns)
    rows, told = None, []
    if is_known:
        shares = {"test_fraction": split.test_fraction, "validation_fraction": split.validation_fraction}
        rows = splitting.split(sequences, **shares, seed=split.split_seed).test
        told = [f"the run was made from this: only its test part counts, {len(rows):,} of {len(sequences):,} sequences"]
    part = run.encoder.part(sequences, rows)
    answers = tuple(each.numpy() for each in probabilities(run.model, part))
    _refuse_overflow(answers, sequences.ids if rows is None else [sequences.ids[i] for i in rows], sequences.source)
    targets = part.targets if isinstance(part.targets, tuple) else part.targets[:, None]
    true = np.concatenate([each.numpy() for each in targets])
    said = np.concatenate([np.atleast_2d(each).argmax(axis=1) for each in answers])
    counts = np.zeros((len(run.encoder.classes),) * 2, dtype=np.int64)
    np.add.at(counts, (true, said), 1)
    notices = (*told, *sequences.notices, *run.encoder.notices(part, sequences.source))
    loss = measure(run.model, part).loss
    return Evaluation(run.encoder.task, sequences.source, run.encoder.classes, counts, loss, notices)


def _refuse_overflow(answers: Iterable[NDArray[np.float32]], ids: Iterable[str], source: str) -> None:
    """NaN comes from numbers that overflow inside the network: it has no most likely class."""
    for name, shares in zip(ids, answers, strict=True):
        if not np.isfinite(shares).all():
            raise DataError(
                f"{source}: the model's answer to sequence {name!r} is not a number; see whether its values"
                " are far from those of the training data"
            )


# Files and standard input and output


def read_for(
    run: LoadedRun,
    data: str,
    *,
    labelled: bool,
    splitting: bool = False,
    kind: str = ".jsonl",
    columns: Mapping[str, str] | None = None,
) -> Sequences:
    """Read DATA for the run: a data set that ships here, a file, or "-" for standard input in the format of `kind`.

    A file in the format of the training's has the same columns, but for those that `columns` names by their role
    (sequence_id, time, target). In another format the features' and symbols' names are those of the training; in JSON
    lines, which name none, they come in the training's order, and a notice says so. With `splitting`, the group and the
    part that decided the run's own split are read too.
    """
    if data != STDIN:
        return _read(run, data, labelled, splitting, columns or {})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"input{kind}"
        path.write_bytes(sys.stdin.buffer.read())
        try:
            sequences = _read(run, str(path), labelled, splitting, columns or {})
        except DataError as error:
            raise DataError(str(error).replace(str(path), "standard input")) from error
    return replace(sequences, source="standard input")


def _read(run: LoadedRun, data: str, labelled: bool, splitting: bool, typed: Mapping[str, str]) -> Sequences:
    asked = run.configuration.data
    of_training: Any = SHIPPED.get(asked.file, asked)
    way, way_of_training = (READ_AS.get(kind_of(Path(file))) for file in (data, of_training.file))
    columns: dict[str, Any] = dict(typed)
    if data not in SHIPPED and way == way_of_training:
        columns = _columns(asked) | columns
        if way == "columns" and not columns["target"] and not columns["symbols"]:
            # Where the file has labels, they stand behind the columns that the model reads.
            columns["target"] = str(len(run.encoder.features) + len(run.encoder.symbol_columns) + 1)
    sequences = read(data, task=asked.task, **columns, labelled=labelled, splitting=splitting)
    if way == "lines" != way_of_training:
        return _named_by_order(sequences, run.encoder)
    return sequences


def _columns(asked: Data) -> dict[str, Any]:
    """The names that the training's file was read with, and how its lines were cut."""
    named: Any = SHIPPED[asked.file].columns if asked.file in SHIPPED else asked
    names = ("sequence_id", "target", "time", "symbols", "group", "part")
    return {**{name: getattr(named, name) for name in names}, "features": named.features or (), "text": asked.text}


def _named_by_order(sequences: Sequences, encoder: Encoder) -> Sequences:
    """Columns without names of their own under the training's, if there are as many."""
    wanted = encoder.features, encoder.symbol_columns
    found = sequences.features, sequences.symbol_columns
    if [*map(len, wanted)] != [*map(len, found)] or wanted == found:
        return sequences
    order = ", ".join(f"{name!r}" for name in (*encoder.features, *encoder.symbol_columns))
    told = f"JSON lines name no columns, so they were read in the order of the training: {order}"
    return replace(sequences, features=wanted[0], symbol_columns=wanted[1], notices=(*sequences.notices, told))


FORMATS = (".jsonl", ".csv", ".parquet")
"""Suffixes of files that answers can be written to."""


def refuse_output(path: Path, suffixes: Sequence[str] = FORMATS) -> None:
    """Refuse, before any work is done, a file that could not be written then."""
    if path.suffix not in suffixes:
        raise ThroughtimeError(f"{path}: the result is written as {' or '.join(suffixes)}; give it such a suffix")
    if os.path.lexists(path):
        raise ThroughtimeError(f"{path}: exists already, and nothing is ever replaced; choose another name")
    if not path.parent.is_dir():
        raise ThroughtimeError(f"{path.parent}: no such directory to write in; make it first")


def write(predictions: Predictions, path: Path) -> None:
    """Write answers in the format of the path's suffix: the whole file or none, and never over another.

    Raises ThroughtimeError where that cannot be.
    """
    refuse_output(path)
    content = {".jsonl": as_jsonl, ".csv": _as_csv, ".parquet": _as_parquet}[path.suffix](predictions)
    write_new(path, content)


def as_jsonl(predictions: Predictions) -> bytes:
    """One JSON object a sequence."""
    return b"".join(json.dumps(each, ensure_ascii=False).encode() + b"\n" for each in predictions.records())


def _as_csv(predictions: Predictions) -> bytes:
    text = io.StringIO(newline="")
    rows = list(predictions.rows())
    table = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    return text.getvalue().encode()


def _as_parquet(predictions: Predictions) -> bytes:
    import pyarrow
    from pyarrow import parquet

    sink = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(list(predictions.rows())), sink)
    return sink.getvalue()


def write_new(path: Path, content: bytes) -> None:
    """Make a file with this content: whole and on the disk when this returns, or not at all, and never over another."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with partial.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        _give_name(partial, path)
    except FileExistsError:
        raise ThroughtimeError(f"{path}: exists already, and nothing is ever replaced; choose another name") from None
    except OSError as error:
        raise ThroughtimeError(f"{path}: cannot be written ({error.strerror}); choose another place") from error
    finally:
        partial.unlink(missing_ok=True)


def _give_name(partial: Path, path: Path) -> None:
    """Rename, but fail where the name is taken."""
    try:
        os.link(partial, path)
    except FileExistsError:
        raise
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP):
            raise
        # A file system without hard links: the name is taken as an empty file first, which no other then can take.
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
        os.replace(partial, path)


def _number_or_none(value: float) -> float | None:
    return None if math.isnan(value) else value
