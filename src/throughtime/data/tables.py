"""Tables, one row a step, and their cells as numbers, texts and times; a refusal says where in the file."""

from __future__ import annotations

import csv
import difflib
import io
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import numpy as np

from throughtime.data import files
from throughtime.errors import DataError

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray


NO_TEXT = (bytes, list, dict, tuple, np.ndarray)
"""What a Parquet file may hold in a cell that has no one way to be text."""


@dataclass(frozen=True)
class Table:
    """A table and where it is from; `place` says where in the file a row is, such as "line 7"."""

    source: str
    frame: pd.DataFrame
    place: Callable[[int], str]

    @property
    def names(self) -> list[str]:
        """The names of all columns."""
        return [str(name) for name in self.frame.columns]

    def refuse(self, problem: str, *, column: str | None = None, row: int | None = None) -> NoReturn:
        """Raise `DataError` in one line: the file, the place, the column, the problem."""
        where = [self.source]
        if row is not None:
            where.append(self.place(row))
        if column is not None:
            where.append(f"column {column!r}")
        raise DataError(f"{', '.join(where)}: {problem}")

    def require(self, column: str) -> None:
        """Refuse the table if it lacks this column."""
        require_column(self.source, self.names, column)

    def codes(self, column: str) -> tuple[NDArray[np.int64], list[str]]:
        """The column as text, by number: of each row [rows], and the distinct texts in order. Refuses an empty cell."""
        import pandas as pd

        cells = self.frame[column]
        if cells.dtype == object:
            nested = next((row for row, cell in enumerate(cells) if isinstance(cell, NO_TEXT)), None)
            if nested is not None:
                kind = type(cells.iloc[nested]).__name__
                self.refuse(
                    f"holds {kind}, not text; write it as text, one cell for each row", column=column, row=nested
                )
        codes, texts = pd.factorize(cells.astype("str"), sort=True, use_na_sentinel=True)
        distinct = [str(text) for text in texts]
        empty = np.flatnonzero(cells.isna().to_numpy() | (codes == (distinct.index("") if "" in distinct else -1)))
        if empty.size:
            self.refuse("the cell is empty; fill it or remove the row", column=column, row=int(empty[0]))
        return codes.astype(np.int64), distinct

    def numbers(self, column: str) -> NDArray[np.float64]:
        """The column as float64, one per row; anything that is not a finite number is refused."""
        import pandas as pd

        cells = self.frame[column]
        textual = cells.dtype == object or isinstance(cells.dtype, pd.StringDtype)
        if not (pd.api.types.is_numeric_dtype(cells) or textual):
            self.refuse(f"holds {cells.dtype}, not numbers; leave it out (--features names the others)", column=column)
        values = pd.to_numeric(cells, errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)
        bad = np.flatnonzero(~np.isfinite(values))
        if bad.size:
            row = int(bad[0])
            self.refuse(_why_not_a_number(cells.iloc[row]), column=column, row=row)
        return values

    def times(self, column: str) -> NDArray[np.generic]:
        """The column as numbers, or as ISO 8601 dates and times: something that sorts."""
        import pandas as pd

        cells = self.frame[column]
        if pd.api.types.is_integer_dtype(cells) and not cells.isna().any():
            return cells.to_numpy()  # float64 would merge neighbouring nanoseconds
        if not pd.api.types.is_numeric_dtype(cells):
            dates = pd.to_datetime(cells, errors="coerce", format="ISO8601", utc=True)
            if dates.notna().any():
                if dates.isna().any():
                    row = int(np.flatnonzero(dates.isna())[0])
                    self.refuse(f"{str(cells.iloc[row])!r} is not a date or time; mend it", column=column, row=row)
                return dates.dt.tz_localize(None).to_numpy()
        return self.numbers(column)

    def features(self, taken: set[str], *, optional: bool) -> tuple[str, ...]:
        """The columns that have no other role; `optional` if there need not be any."""
        names = [name for name in self.names if name not in taken]
        if not names and not optional:
            self.refuse("no column is left for the features; one row a step needs at least one")
        unnamed = next((name for name in names if not name.strip() or name.startswith("Unnamed: ")), None)
        if unnamed is not None:
            # A row number saved along with the table tells the classes apart whenever the file is sorted.
            self.refuse("a column without a name, perhaps a row number; remove it, or name the features (--features)")
        return tuple(names)


def require_column(source: str, names: Sequence[str], column: str) -> None:
    """Refuse a file with columns of these names if it lacks this one."""
    if column in names:
        return
    near = difflib.get_close_matches(column, names, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise DataError(f"{source}: no column {column!r}; {hint}The columns are {_listing(names)}")


def read_number(cell: str, place: str) -> float:
    """The cell as a finite number; `place` is where a refusal says it stands."""
    try:
        value = float(cell) if "_" not in cell else math.nan
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise DataError(f"{place}: {_why_not_a_number(cell)}")
    return value


def read_table(path: Path, texts: Sequence[str]) -> Table:
    """Read Parquet (`.parquet`, `.pq`) or CSV (any other); of CSV, the columns `texts` stay the text they are."""
    if files.kind(path) in (".parquet", ".pq"):
        return _read_parquet(path)
    return _read_csv(path, texts)


def _read_parquet(path: Path) -> Table:
    import pyarrow
    from pyarrow import parquet

    files.require(path)
    try:
        file = parquet.ParquetFile(path)
        groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
        cells = file.metadata.num_rows * file.metadata.num_columns
        files.check_fits(path, sum(group.total_byte_size for group in groups), cells)
        # pandas would turn columns it once used as an index back into one, and they would be missing here.
        frame = file.read().to_pandas(ignore_metadata=True)
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path}: cannot be read as Parquet ({files.first_line(error)}); give a whole file") from error
    if frame.empty:
        raise DataError(f"{path}: has no rows; one row a step is needed")
    table = Table(str(path), frame, lambda row: f"row {row + 1}")
    _check_header(table, table.names)
    return table


def _read_csv(path: Path, texts: Sequence[str]) -> Table:
    import pandas as pd

    data = files.read_bytes(path, b",\n")
    files.check_text(data, path)
    header = _check_head(data, path)
    try:
        # Ids and labels stay the text they are: "1" is not "01", and "NA" may be a country.
        as_text = dict.fromkeys(texts, str)
        frame = pd.read_csv(io.BytesIO(data), dtype=as_text, keep_default_na=False, low_memory=False)
    except (pd.errors.ParserError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read as CSV ({files.first_line(error)}); mend that row") from error
    table = Table(str(path), frame, lambda row: f"line {_line_of_row(data, row)}")
    _check_header(table, header)
    return table


def _check_head(data: bytes, path: Path) -> list[str]:
    """The header's fields, after looking at the header and at the row that follows it."""
    records = _records(data, path)
    _, header = next(records, (0, []))
    if not header:
        raise DataError(f"{path}: is empty; a header and one row a step are needed")
    if len(header) == 1:
        _refuse_single_column(path, header[0])
    line, first = next(records, (0, []))
    if not first:
        raise DataError(f"{path}: has a header and no rows; one row a step is needed")
    if len(first) > len(header):
        # pandas would take the surplus for row names, and so shift every column.
        files.refuse_line(path, line, f"{len(first)} fields under a header of {len(header)}; mend either")
    return header


def _records(data: bytes, path: Path | str = "") -> Iterator[tuple[int, list[str]]]:
    """Each record that is not blank, with the number of the line where it begins."""
    reader = csv.reader(io.TextIOWrapper(io.BytesIO(data), encoding="utf-8-sig", newline=""))
    line = 1
    try:
        for fields in reader:
            if len(fields) > 1 or (fields and fields[0].strip()):
                yield line, fields
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}, line {line}: cannot be read as CSV ({error}); mend that row") from error


def _line_of_row(data: bytes, row: int) -> int:
    for index, (line, _) in enumerate(_records(data)):
        if index == row + 1:
            return line
    raise IndexError(row)


def _check_header(table: Table, header: Sequence[str]) -> None:
    repeated = next((name for name in header if list(header).count(name) > 1), None)
    if repeated is not None:
        table.refuse("two columns have this name; rename one", column=repeated)


def _refuse_single_column(path: Path, name: str) -> NoReturn:
    delimiter = next((mark for mark in ";\t|" if mark in name), None)
    if delimiter is None:
        raise DataError(f"{path}: has a single column, {name!r}; an id, a target and features are needed")
    shown = "tabs" if delimiter == "\t" else repr(delimiter)
    raise DataError(f"{path}: is separated by {shown}, which makes it a single column here; save it with commas")


def _why_not_a_number(cell: object) -> str:
    text = "" if cell is None else str(cell).strip()
    if text == "":
        return "the cell is empty; fill it or remove the row"
    if text.lower() in ("nan", "na", "n/a", "<na>", "null", "none"):
        return f"a missing value ({text}); fill it or remove the row"
    if text.lower().lstrip("+-") in ("inf", "infinity"):
        return f"an infinite value ({text}); replace it or remove the row"
    return (
        f"{text!r} is not a number; mend it, leave the column out (--features names the others), or read it as a symbol"
        " (--symbols)"
    )


def _listing(names: Sequence[str], most: int = 12) -> str:
    shown = ", ".join(repr(name) for name in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
