"""The formats of files: one file each, and one row of the table."""

from __future__ import annotations

from pathlib import Path

from throughtime.data import files
from throughtime.data.formats import conll, jsonl, long_tables, text_lines
from throughtime.data.formats.format import Format

FORMATS: tuple[Format, ...] = (long_tables.FORMAT, jsonl.FORMAT, text_lines.FORMAT, conll.FORMAT)

SUFFIXES: dict[str, Format] = {suffix: each for each in FORMATS for suffix in each.suffixes}
"""How a file is read, by its suffix; each may be followed by `.gz`, but for Parquet."""


def format_of(path: str | Path) -> Format | None:
    """The format that a file's name tells, if it tells one."""
    return SUFFIXES.get(files.kind(Path(path)))
