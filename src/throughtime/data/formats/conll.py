"""CoNLL columns: one token a line, its columns side by side, a blank line between sentences; a label for each token."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from throughtime.data import files
from throughtime.data.formats.format import Asked, Format
from throughtime.data.sequences import PER_STEP, Columns, Sequences
from throughtime.data.tables import read_number, require_column
from throughtime.errors import DataError


def read_conll(path: Path, asked: Asked) -> Sequences:
    """Read sentences; the file's columns are called "1", "2", ... as they stand, separated by tabs or spaces.

    The target is the last column if not named; every column that is neither it nor a feature is a symbol, unless
    `symbols` names those wanted. Where labels are not asked for, the file need not have a target. Sentences are called
    by the number of the line where they begin. Raises `DataError` with the line for ragged columns and empty cells.
    """
    labelled, features = asked.labelled, asked.columns.features
    ids: list[str] = []
    sentences: list[list[_Token]] = []
    reader = None
    last = 0
    for number, line in files.read_lines(path, b" \t\n"):
        if reader is None:
            reader = _Reader.of(path, number, line, asked.columns, labelled)
        if not sentences or number > last + 1:
            ids.append(str(number))
            sentences.append([])
        sentences[-1].append(reader.token(number, line))
        last = number
    if reader is None:
        raise DataError(f"{path}: is empty; one token a line is needed, and a blank line between sentences")
    return Sequences(
        name=path.name.split(".")[0],
        source=str(path),
        columns=reader.columns,
        features=features,
        ids=tuple(ids),
        steps=tuple(
            np.array([token.numbers for token in tokens], dtype=np.float64).reshape(len(tokens), len(features))
            for tokens in sentences
        ),
        labels=tuple(tuple(token.label for token in tokens) for tokens in sentences) if labelled else (),
        role=PER_STEP,
        symbols=tuple(tuple(token.symbols for token in tokens) for tokens in sentences)
        if reader.columns.symbols
        else (),
        symbol_columns=reader.columns.symbols,
    )


class _Token(NamedTuple):
    """What one line holds."""

    symbols: tuple[str, ...]
    label: str
    numbers: tuple[float, ...]


@dataclass
class _Reader:
    """How the lines of one file are divided, by its first; lines that come again are divided once."""

    path: Path
    first: int
    tabs: bool
    names: list[str]
    columns: Columns
    known: dict[str, _Token] = field(default_factory=dict)

    @classmethod
    def of(cls, path: Path, number: int, line: str, asked: Columns, labelled: bool) -> _Reader:
        tabs = "\t" in line
        names = [str(place + 1) for place in range(len(_divided(line, tabs)))]
        target = asked.target or (names[-1] if labelled else None)
        features = asked.features
        symbols = asked.symbols or tuple(name for name in names if name not in (target, *features))
        columns = Columns("sentence", target if labelled else None, features=features, symbols=symbols)
        for name in (*columns.roles(), *features):
            if name != columns.sequence_id:
                require_column(str(path), names, name)
        if not symbols and not features:
            raise DataError(
                f"{path}: has a single column; a token and its label stand side by side, separated by a tab or spaces"
            )
        return cls(path, number, tabs, names, columns)

    def token(self, number: int, line: str) -> _Token:
        """The line's token. Refuses one with more or fewer columns than the first, or with an empty cell."""
        found = self.known.get(line)
        if found is None:
            found = self.known[line] = self._read(number, line)
        return found

    def _read(self, number: int, line: str) -> _Token:
        cells = _divided(line, self.tabs)
        if len(cells) != len(self.names):
            comment = "comments are not read, remove them" if line.startswith("#") else "mend it"
            files.refuse_line(
                self.path,
                number,
                f"{_counted(len(cells))} where line {self.first} has {len(self.names)}, separated by"
                f" {'tabs' if self.tabs else 'spaces'}; {comment}",
            )
        row = dict(zip(self.names, cells, strict=True))
        for name in (*self.columns.symbols, *((self.columns.target,) if self.columns.target else ())):
            if not row[name]:
                raise DataError(f"{self.path}, line {number}, column {name!r}: the cell is empty; fill it")
        return _Token(
            symbols=tuple(row[name] for name in self.columns.symbols),
            label=row[self.columns.target] if self.columns.target else "",
            numbers=tuple(
                read_number(row[name], f"{self.path}, line {number}, column {name!r}") for name in self.columns.features
            ),
        )


def _divided(line: str, tabs: bool) -> list[str]:
    return line.split("\t") if tabs else [cell for cell in line.split(" ") if cell]


def _counted(columns: int) -> str:
    return "1 column" if columns == 1 else f"{columns} columns"


def _again(columns: Columns, width: int) -> Columns:
    """Where the next file has labels, they stand behind the columns that the model reads; it may have none."""
    return columns if columns.target or columns.symbols else replace(columns, target=str(width + 1))


FORMAT = Format(
    name="CoNLL columns",
    suffixes=(".conll",),
    layout="a token a line",
    options=frozenset({"target", "features", "symbols"}),
    read=read_conll,
    roles=(PER_STEP,),
    why_not="CoNLL columns have a label for each token; ask for one at every step",
    again=_again,
)
