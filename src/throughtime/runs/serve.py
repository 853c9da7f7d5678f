"""A finished run in use: scored on labelled files, and answering for files."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from throughtime.data import splitting
from throughtime.data.formats import format_of
from throughtime.data.formats.format import Format
from throughtime.data.packaged import SHIPPED
from throughtime.data.sequences import Columns, Sequences
from throughtime.errors import DataError, ThroughtimeError
from throughtime.runs.fit import sum_of
from throughtime.runs.folder import FinishedRun
from throughtime.tasks.encoding import Encoder
from throughtime.tasks.model import outputs, run_through
from throughtime.tasks.table import read
from throughtime.tasks.task import Answer, Score, Task

if TYPE_CHECKING:
    pass

STDIN = "-"
"""What stands for standard input in place of a file's name."""


@dataclass(frozen=True, eq=False)
class Predictions:
    """What a model says of sequences, an answer for each; `notices` are what a reader of them should know."""

    ids: tuple[str, ...]
    answers: tuple[Answer, ...]
    notices: tuple[str, ...] = ()

    def rows(self) -> Iterator[dict[str, Any]]:
        """As a table: a row a sequence, or a row a step."""
        for name, answer in zip(self.ids, self.answers, strict=True):
            yield from ({"id": name, **row} for row in answer.rows())

    def records(self) -> Iterator[dict[str, Any]]:
        """As JSON lines: an object a sequence; where each step is answered, it holds lists."""
        yield from ({"id": name, **answer.record()} for name, answer in zip(self.ids, self.answers, strict=True))


@dataclass(frozen=True, eq=False)
class Scored:
    """How well a model does on a file of labelled sequences."""

    task: Task
    source: str
    score: Score
    notices: tuple[str, ...]

    def record(self) -> dict[str, Any]:
        """As data for JSON."""
        return {"data": self.source, "task": self.task.name, **self.score.record()}


def predict(run: FinishedRun, sequences: Sequences) -> Predictions:
    """What the run's model says of every sequence. Raises DataError for columns that are not those of its training."""
    encoder = run.encoder
    part = encoder.part(sequences, labelled=False)
    answers = tuple(encoder.task.answer(output, encoder.codec) for output in outputs(run.model, part))
    _refuse_overflow([answer.is_finite for answer in answers], sequences.ids, sequences.source)
    return Predictions(sequences.ids, answers, (*sequences.notices, *encoder.notices(part, sequences.source)))


def evaluate(run: FinishedRun, data: str, *, kind: str = ".jsonl", columns: Mapping[str, str] | None = None) -> Scored:
    """Score the run's model on labelled data, which is read as `read_for` says.

    If it is the data that the run was made from, its test part alone counts, and a notice says so. Raises DataError
    for a label or a column that training did not have.
    """
    asked, encoder = run.configuration.data, run.encoder
    is_known = (data in SHIPPED or Path(data).is_file()) and sum_of(data) == asked.sha256
    sequences = read_for(run, data, labelled=True, splitting=is_known, kind=kind, columns=columns)
    rows, told = None, []
    if is_known:
        strata = encoder.task.strata(sequences)
        rows = splitting.split(sequences, strata, **asked.shares, seed=asked.split_seed).test
        told = [f"the run was made from this: only its test part counts, {len(rows):,} of {len(sequences):,} sequences"]
    part = encoder.part(sequences, rows)
    score = encoder.task.score(encoder.codec)
    ids = sequences.ids if rows is None else [sequences.ids[i] for i in rows]
    for places, batch, output in run_through(run.model, part):
        finite = [bool(each.isfinite().all()) for each in encoder.task.outputs(output, batch)]
        _refuse_overflow(finite, [ids[place] for place in places], sequences.source)
        score.add(output, batch)
    notices = (*told, *sequences.notices, *encoder.notices(part, sequences.source))
    return Scored(encoder.task, sequences.source, score, notices)


def _refuse_overflow(finite: Iterable[bool], ids: Iterable[str], source: str) -> None:
    """NaN comes from numbers that overflow inside the network: it says nothing."""
    for name, is_finite in zip(ids, finite, strict=True):
        if not is_finite:
            raise DataError(
                f"{source}: the model's answer to sequence {name!r} is not a number; see whether its values"
                " are far from those of the training data"
            )


# Files and standard input and output


def read_for(
    run: FinishedRun,
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


def _read(run: FinishedRun, data: str, labelled: bool, splitting: bool, typed: Mapping[str, str]) -> Sequences:
    asked = run.configuration.data
    packed = SHIPPED.get(asked.file)
    of_training = format_of(packed.file if packed else asked.file)
    found = format_of(data)
    named: dict[str, Any] = dict(typed)
    columns = Columns(**named)
    if data not in SHIPPED and found is not None and found is of_training:
        columns = replace(packed.columns if packed else asked.columns, **named)
        columns = found.again(columns, len(run.encoder.features) + len(run.encoder.symbol_columns))
    sequences = read(data, columns, task=run.encoder.task, labelled=labelled, splitting=splitting)
    if found is not None and not found.names_columns and found is not of_training:
        return _named_by_order(sequences, run.encoder, found)
    return sequences


def _named_by_order(sequences: Sequences, encoder: Encoder, kind: Format) -> Sequences:
    """Columns without names of their own under the training's, if there are as many."""
    wanted = encoder.features, encoder.symbol_columns
    found = sequences.features, sequences.symbol_columns
    if [*map(len, wanted)] != [*map(len, found)] or wanted == found:
        return sequences
    order = ", ".join(f"{name!r}" for name in (*encoder.features, *encoder.symbol_columns))
    told = f"{kind.name} name no columns, so they were read in the order of the training: {order}"
    return replace(sequences, features=wanted[0], symbol_columns=wanted[1], notices=(*sequences.notices, told))


WRITTEN = (".jsonl", ".csv", ".parquet")
"""Suffixes of files that answers can be written to."""


def refuse_output(path: Path, suffixes: Sequence[str] = WRITTEN) -> None:
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
