"""Long tables, one row a step: CSV and Parquet, a label for each sequence or for each row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from throughtime.data.formats.format import Asked, Format
from throughtime.data.sequences import Columns, Sequences, TargetRole
from throughtime.data.tables import Table, read_table
from throughtime.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray

UNORDERED = "no time column was named, so steps are in the order of the file's rows"


@dataclass(frozen=True)
class Rows:
    """Which sequence each row of a table is of, [rows], and the order [rows] that puts them together and in time."""

    ids: tuple[str, ...]
    sequence: NDArray[np.int64]
    order: NDArray[np.int64]

    @property
    def ends(self) -> NDArray[np.int64]:
        """Where each sequence ends once the rows are in order: [sequences]."""
        return np.cumsum(np.bincount(self.sequence))


def read_long_table(path: Path, asked: Asked) -> Sequences:
    """Read a long table, one row a step: Parquet (`.parquet`, `.pq`) or CSV (any other; `.gz` is gzip).

    Columns left out of `asked`, those of labels or of the split, are no features, whether the file has them or not.
    Raises `DataError`, in one line naming the file, the place and the way out, for anything that would otherwise have
    to be guessed: a missing column, an empty cell, text where numbers belong, two rows for one step, a class that
    changes within a sequence.
    """
    columns = asked.columns
    if not columns.sequence_id or (asked.labelled and not columns.target):
        label = "label of each row" if asked.role.by_step else "class"
        raise DataError(f"{path}: say which columns hold the sequence's id and the {label}: --sequence-id and --target")
    roles = columns.roles()
    table = read_table(path, texts=[column for column, role in roles.items() if role != "time"])
    wanted = columns.without(labels=not asked.labelled, splitting=not asked.splitting)
    left_out = set(roles) - set(wanted.roles())
    for column in (*wanted.roles(), *columns.features):
        table.require(column)
    sequence, ids = table.codes(columns.sequence_id)
    rows = Rows(tuple(ids), sequence, _order_in_time(table, wanted, sequence, ids))
    notices = () if wanted.time else (UNORDERED,)
    return replace(_assembled(table, wanted, rows, asked.role, left_out), notices=notices)


def _assembled(table: Table, columns: Columns, rows: Rows, role: TargetRole, left_out: set[str]) -> Sequences:
    """Sequences from the rows of a table; `left_out` are columns that are not to be features."""
    features = columns.features or table.features({*columns.roles(), *left_out}, optional=bool(columns.symbols))
    values = np.empty((len(table.frame), len(features)))
    for place, column in enumerate(features):
        values[:, place] = table.numbers(column)
    symbols = _texts_of_steps(table, columns.symbols, rows)
    return Sequences(
        name=Path(table.source).name.split(".")[0],
        source=table.source,
        columns=columns,
        features=features,
        ids=rows.ids,
        steps=tuple(np.split(values[rows.order], rows.ends[:-1])),
        labels=_labels(table, columns.target, rows, role),
        groups=_of_sequences(table, columns.group, rows),
        parts=_of_sequences(table, columns.part, rows),
        role=role,
        symbols=symbols if columns.symbols else (),
        symbol_columns=columns.symbols,
    )


def _labels(
    table: Table, target: str | None, rows: Rows, role: TargetRole
) -> tuple[str, ...] | tuple[tuple[str, ...], ...]:
    if target is None:
        return ()
    if not role.by_step:
        return _of_sequences(table, target, rows) or ()
    return tuple(tuple(label for (label,) in steps) for steps in _texts_of_steps(table, (target,), rows))


def _texts_of_steps(table: Table, columns: Sequence[str], rows: Rows) -> tuple[tuple[tuple[str, ...], ...], ...]:
    """For each sequence, length x columns of text; equal texts are one object."""
    if not columns:
        return ()
    read = []
    for column in columns:
        codes, texts = table.codes(column)
        read.append(np.array(texts, dtype=object)[codes[rows.order]].tolist())
    steps = list(zip(*read, strict=True))
    ends = rows.ends.tolist()
    return tuple(tuple(steps[start:end]) for start, end in zip([0, *ends[:-1]], ends, strict=True))


def _of_sequences(table: Table, column: str | None, rows: Rows) -> tuple[str, ...] | None:
    """One text per sequence; a sequence in which the column changes is refused."""
    if column is None:
        return None
    codes, texts = table.codes(column)
    _, first = np.unique(rows.sequence, return_index=True)
    changed = np.flatnonzero(codes != codes[first][rows.sequence])
    if changed.size:
        row = int(changed[0])
        before = int(first[rows.sequence[row]])
        table.refuse(
            f"{texts[codes[row]]!r}, but {texts[codes[before]]!r} at {table.place(before)} of the same sequence"
            f" {rows.ids[rows.sequence[row]]!r}; mend the cell, or give each sequence an id of its own",
            column=column,
            row=row,
        )
    return tuple(texts[code] for code in codes[first])


def _order_in_time(
    table: Table, columns: Columns, sequence: NDArray[np.int64], ids: Sequence[str]
) -> NDArray[np.int64]:
    """The order of rows by sequence and time; two rows for one step are refused."""
    if columns.time is None:
        return np.argsort(sequence, kind="stable")
    times = table.times(columns.time)
    order = np.lexsort((times, sequence))
    same = (np.diff(sequence[order]) == 0) & (times[order][1:] == times[order][:-1])
    if same.any():
        at = int(np.flatnonzero(same)[0])
        row, before = int(order[at + 1]), int(order[at])
        table.refuse(
            f"{str(table.frame[columns.time].iloc[row])!r} again in sequence {ids[sequence[row]]!r}, after"
            f" {table.place(before)}; keep one row for each step",
            column=columns.time,
            row=row,
        )
    return order


FORMAT = Format(
    name="a long table",
    suffixes=(".csv", ".parquet", ".pq"),
    layout="a row for each step",
    options=frozenset({"sequence_id", "target", "time", "features", "symbols", "group", "part"}),
    read=read_long_table,
)
