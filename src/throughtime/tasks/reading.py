"""Long tables, one row a step, read as labelled sequences; or refused, with the place and the way out."""

from __future__ import annotations

import csv
import difflib
import gzip
import io
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import numpy as np

from throughtime.errors import DataError

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Columns:
    """Which column of a long table plays which role.

    `features=None` takes every column without another role. Without `time`, a sequence's steps are in the
    order of the file. `group` names what must not be split between training and test (a patient, a
    machine); `part` names a column that says `train` or `test` and so fixes the split.
    """

    sequence_id: str
    target: str
    time: str | None = None
    features: tuple[str, ...] | None = None
    group: str | None = None
    part: str | None = None

    def roles(self) -> dict[str, str]:
        """The role of each column that has one of its own: `{"utterance": "sequence id", ...}`."""
        named = {
            "sequence id": self.sequence_id,
            "time": self.time,
            "target": self.target,
            "group": self.group,
            "part": self.part,
        }
        taken: dict[str, str] = {}
        for role, column in named.items():
            if column is None:
                continue
            if column in taken:
                raise DataError(f"column {column!r} is named both as {taken[column]} and as {role}: name two columns")
            taken[column] = role
        for column in self.features or ():
            if column in taken:
                raise DataError(f"column {column!r} is the {taken[column]} and cannot be a feature too: leave it out")
        return taken


@dataclass(frozen=True)
class Sequences:
    """Labelled sequences of different lengths, sorted by id so that the order of a file's rows is immaterial.

    Each of `steps` is [length, features] in float64 and in the order of time; `ids`, `labels`, `groups` and
    `parts` have one text per sequence. `notices` are things that a reader of the results should know, in
    plain words.
    """

    name: str
    source: str
    columns: Columns
    features: tuple[str, ...]
    ids: tuple[str, ...]
    steps: tuple[NDArray[np.float64], ...]
    labels: tuple[str, ...]
    groups: tuple[str, ...] | None = None
    parts: tuple[str, ...] | None = None
    notices: tuple[str, ...] = ()

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Steps in each sequence: [sequences]."""
        return np.array([len(steps) for steps in self.steps], dtype=np.int64)


@dataclass(frozen=True)
class Shipped:
    """A data set that comes with the package; `data/ATTRIBUTION.md` says more about its source and licence."""

    file: str
    columns: Columns
    credit: str


SHIPPED = {
    "vowels": Shipped(
        "japanese_vowels.csv.gz",
        Columns(sequence_id="utterance", time="frame", target="speaker", part="part"),
        "Japanese Vowels (Kudo, Toyama and Shimbo 1999; UCI, doi:10.24432/C5NS47, CC BY 4.0)",
    )
}


def read(
    data: str,
    *,
    sequence_id: str | None = None,
    target: str | None = None,
    time: str | None = None,
    features: Sequence[str] = (),
    group: str | None = None,
    part: str | None = None,
) -> Sequences:
    """Read a data set that ships here, by its name, or else a file, by its path and the names of its columns."""
    if data in SHIPPED:
        if sequence_id or target or time or features or group or part:
            raise DataError(f"{data} ships here and its columns are known; leave the options that name columns out")
        return read_shipped(data)
    path = Path(data)
    _require_file(path)
    if not (sequence_id and target):
        raise DataError(f"{data}: say which columns hold the sequence's id and the class: --sequence-id and --target")
    return read_sequences(path, Columns(sequence_id, target, time, tuple(features) or None, group, part))


def read_shipped(name: str) -> Sequences:
    """Read a data set that comes with the package, with its credit for a source."""
    shipped = SHIPPED[name]
    with resources.as_file(resources.files("throughtime") / "data" / shipped.file) as path:
        return replace(read_sequences(path, shipped.columns), name=name, source=shipped.credit)


def read_sequences(path: str | Path, columns: Columns) -> Sequences:
    """Read a long table, one row a step: Parquet (`.parquet`, `.pq`) or CSV (any other; `.gz` is gzip).

    Raises `DataError`, in one line naming the file, the place and the way out, for anything that would
    otherwise have to be guessed: a missing column, an empty cell, text where numbers belong, two rows for
    one step, a target that changes within a sequence, one class only.
    """
    roles = columns.roles()
    table = _read_table(Path(path), texts=[column for column, role in roles.items() if role != "time"])
    for column in (*roles, *(columns.features or ())):
        table.require(column)
    features = columns.features or _infer_features(table, roles)

    ids = _texts(table, columns.sequence_id)
    order_of_ids, sequence = np.unique(ids, return_inverse=True)
    labels = _constant_texts(table, columns.target, ids, sequence)
    groups = columns.group and _constant_texts(table, columns.group, ids, sequence)
    parts = columns.part and _constant_texts(table, columns.part, ids, sequence)
    if len(set(labels)) == 1:
        table.refuse(f"only one class, {labels[0]!r}: a classifier needs two or more", column=columns.target)

    values = np.column_stack([_numbers(table, column) for column in features])
    order, notices = _order_in_time(table, columns, sequence, ids)
    ends = np.cumsum(np.bincount(sequence))[:-1]
    return Sequences(
        name=Path(path).name.split(".")[0],
        source=table.source,
        columns=columns,
        features=tuple(features),
        ids=tuple(order_of_ids.tolist()),
        steps=tuple(np.split(values[order], ends)),
        labels=labels,
        groups=groups or None,
        parts=parts or None,
        notices=notices,
    )


@dataclass(frozen=True)
class _Table:
    """A table with the means to say where in the file something is wrong; `text` is None for Parquet."""

    source: str
    frame: pd.DataFrame
    text: str | None = None

    def place(self, row: int) -> str:
        if self.text is None:
            return f"row {row + 1}"
        return f"line {_line_of_row(self.text, row)}"

    def refuse(self, problem: str, *, column: str | None = None, row: int | None = None) -> NoReturn:
        where = [self.source]
        if row is not None:
            where.append(self.place(row))
        if column is not None:
            where.append(f"column {column!r}")
        raise DataError(f"{', '.join(where)}: {problem}")

    def require(self, column: str) -> None:
        present = [str(name) for name in self.frame.columns]
        if column in present:
            return
        near = difflib.get_close_matches(column, present, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        self.refuse(f"no column {column!r}; {hint}The columns are {_listing(present)}")


def _require_file(path: Path) -> None:
    if path.is_dir():
        raise DataError(f"{path}: is a directory; name the CSV or Parquet file in it")
    if not path.exists():
        known = ", ".join(SHIPPED)
        raise DataError(f"{path}: no such file; give a CSV or Parquet file, or a data set that ships here ({known})")


def _read_table(path: Path, texts: Sequence[str]) -> _Table:
    _require_file(path)
    if path.suffix.lower() in (".parquet", ".pq"):
        return _read_parquet(path)
    return _read_csv(path, texts)


def _read_parquet(path: Path) -> _Table:
    import pyarrow
    from pyarrow import parquet

    try:
        # pandas would turn columns it once used as an index back into one, and they would be missing here.
        frame = parquet.ParquetFile(path).read().to_pandas(ignore_metadata=True)
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path}: cannot be read as Parquet ({_first_line(error)})") from error
    if frame.empty:
        raise DataError(f"{path}: has no rows; one row a step is needed")
    table = _Table(str(path), frame)
    _check_header(table, [str(name) for name in frame.columns])
    return table


def _read_csv(path: Path, texts: Sequence[str]) -> _Table:
    import pandas as pd

    source = str(path)
    text = _read_text(path)
    header = _check_shape(text, source)
    try:
        # Ids and labels stay the text they are: "1" is not "01", and "NA" may be a country.
        as_text = dict.fromkeys(texts, str)
        frame = pd.read_csv(io.StringIO(text), dtype=as_text, keep_default_na=False, low_memory=False)
    except (pd.errors.ParserError, csv.Error) as error:
        raise DataError(f"{source}: cannot be read as CSV ({_first_line(error)}); mend that row") from error
    table = _Table(source, frame, text)
    _check_header(table, header)
    return table


def _check_shape(text: str, source: str) -> list[str]:
    """The header's fields, after looking at the header and at the row that follows it."""
    records = _records(text, source)
    _, header = next(records, (0, []))
    if not header:
        raise DataError(f"{source}: is empty; a header and one row a step are needed")
    if len(header) == 1:
        _refuse_single_column(source, header[0])
    line, first = next(records, (0, []))
    if not first:
        raise DataError(f"{source}: has a header and no rows; one row a step is needed")
    if len(first) > len(header):
        # pandas would take the surplus for row names, and so shift every column.
        raise DataError(f"{source}, line {line}: {len(first)} fields under a header of {len(header)}; mend either")
    return header


def _read_text(path: Path) -> str:
    try:
        data = path.read_bytes()
        if path.suffix.lower() == ".gz":
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({_first_line(error)})") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}, line {line}: not UTF-8 text; save the table as CSV in UTF-8, or as Parquet"
        ) from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise DataError(f"{path}, line {line}: not text; save the table as CSV in UTF-8, or as Parquet")
    return text


def _records(text: str, source: str = "") -> Iterator[tuple[int, list[str]]]:
    """Each record that is not blank, with the number of the line where it begins."""
    reader = csv.reader(io.StringIO(text, newline=""))
    line = 1
    try:
        for fields in reader:
            if len(fields) > 1 or (fields and fields[0].strip()):
                yield line, fields
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{source}, line {line}: cannot be read as CSV ({error}); mend that row") from error


def _line_of_row(text: str, row: int) -> int:
    for index, (line, _) in enumerate(_records(text)):
        if index == row + 1:
            return line
    raise IndexError(row)


def _check_header(table: _Table, header: Sequence[str]) -> None:
    repeated = next((name for name in header if list(header).count(name) > 1), None)
    if repeated is not None:
        table.refuse("two columns have this name; rename one", column=repeated)


def _refuse_single_column(source: str, name: str) -> NoReturn:
    delimiter = next((mark for mark in ";\t|" if mark in name), None)
    if delimiter is None:
        raise DataError(f"{source}: has a single column, {name!r}; an id, a target and features are needed")
    shown = "tabs" if delimiter == "\t" else repr(delimiter)
    raise DataError(f"{source}: is separated by {shown}, which makes it a single column here; save it with commas")


def _infer_features(table: _Table, roles: dict[str, str]) -> list[str]:
    names = [str(name) for name in table.frame.columns if name not in roles]
    if not names:
        table.refuse("no column is left for the features; one row a step needs at least one")
    unnamed = next((name for name in names if not name.strip() or name.startswith("Unnamed: ")), None)
    if unnamed is not None:
        # A row number saved along with the table tells the classes apart whenever the file is sorted.
        table.refuse("a column without a name, perhaps a row number; remove it, or name the features (--features)")
    return names


def _texts(table: _Table, column: str) -> NDArray[np.str_]:
    """The column as text, one per row; an empty cell is refused."""
    cells = table.frame[column]
    texts = cells.astype("str").fillna("").to_numpy(dtype=object)
    empty = np.flatnonzero(cells.isna().to_numpy() | (texts == ""))
    if empty.size:
        table.refuse("the cell is empty; fill it or remove the row", column=column, row=int(empty[0]))
    return texts.astype(np.str_)


def _constant_texts(table: _Table, column: str, ids: NDArray[np.str_], sequence: NDArray[np.int64]) -> tuple[str, ...]:
    """One text per sequence; a sequence in which the column changes is refused."""
    texts = _texts(table, column)
    _, first = np.unique(sequence, return_index=True)
    changed = np.flatnonzero(texts != texts[first][sequence])
    if changed.size:
        row = int(changed[0])
        before = int(first[sequence[row]])
        table.refuse(
            f"{str(texts[row])!r}, but {str(texts[before])!r} at {table.place(before)} of the same sequence"
            f" {str(ids[row])!r}; mend the cell, or give each sequence an id of its own",
            column=column,
            row=row,
        )
    return tuple(texts[first].tolist())


def _numbers(table: _Table, column: str) -> NDArray[np.float64]:
    """The column as float64, one per row; anything that is not a finite number is refused."""
    import pandas as pd

    cells = table.frame[column]
    if not (pd.api.types.is_numeric_dtype(cells) or cells.dtype == object or isinstance(cells.dtype, pd.StringDtype)):
        table.refuse(f"holds {cells.dtype}, not numbers; leave it out (--features names the others)", column=column)
    values = pd.to_numeric(cells, errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)
    bad = np.flatnonzero(~np.isfinite(values))
    if bad.size:
        row = int(bad[0])
        table.refuse(_why_not_a_number(cells.iloc[row]), column=column, row=row)
    return values


def _why_not_a_number(cell: object) -> str:
    text = "" if cell is None else str(cell).strip()
    if text == "":
        return "the cell is empty; fill it or remove the row"
    if text.lower() in ("nan", "na", "n/a", "<na>", "null", "none"):
        return f"a missing value ({text}); fill it or remove the row"
    if text.lower().lstrip("+-") in ("inf", "infinity"):
        return f"an infinite value ({text}); replace it or remove the row"
    return f"{text!r} is not a number; mend it, or leave the column out (--features names the others)"


def _order_in_time(
    table: _Table, columns: Columns, sequence: NDArray[np.int64], ids: NDArray[np.str_]
) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """The order of rows by sequence and time, and what there is to say about it."""
    if columns.time is None:
        return np.argsort(sequence, kind="stable"), (
            "no time column was named, so steps are in the order of the file's rows",
        )
    times = _times(table, columns.time)
    order = np.lexsort((times, sequence))
    same = (np.diff(sequence[order]) == 0) & (times[order][1:] == times[order][:-1])
    if same.any():
        at = int(np.flatnonzero(same)[0])
        row, before = int(order[at + 1]), int(order[at])
        table.refuse(
            f"{str(table.frame[columns.time].iloc[row])!r} again in sequence {str(ids[row])!r}, after"
            f" {table.place(before)}; keep one row for each step",
            column=columns.time,
            row=row,
        )
    return order, ()


def _times(table: _Table, column: str) -> NDArray[np.generic]:
    """The column as numbers, or as ISO 8601 dates and times: something that sorts."""
    import pandas as pd

    cells = table.frame[column]
    if pd.api.types.is_integer_dtype(cells) and not cells.isna().any():
        return cells.to_numpy()  # float64 would merge neighbouring nanoseconds
    if not pd.api.types.is_numeric_dtype(cells):
        dates = pd.to_datetime(cells, errors="coerce", format="ISO8601", utc=True)
        if dates.notna().any():
            if dates.isna().any():
                row = int(np.flatnonzero(dates.isna())[0])
                table.refuse(f"{str(cells.iloc[row])!r} is not a date or time; mend it", column=column, row=row)
            return dates.dt.tz_localize(None).to_numpy()
    return _numbers(table, column)


def _listing(names: Sequence[str], most: int = 12) -> str:
    shown = ", ".join(repr(name) for name in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
