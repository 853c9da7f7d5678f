"""Files and packaged data read as labelled sequences, each format in its own way; or refused, with the way out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from importlib import resources
from pathlib import Path

from throughtime.data import files
from throughtime.data.formats import FORMATS, format_of
from throughtime.data.formats.format import Asked, Format
from throughtime.data.packaged import SHIPPED, file_of
from throughtime.data.sequences import PER_SEQUENCE, Columns, Sequences, TargetRole
from throughtime.errors import DataError


def read(
    data: str,
    columns: Columns | None = None,
    *,
    role: TargetRole = PER_SEQUENCE,
    labelled: bool = True,
    splitting: bool = True,
    ways: Mapping[TargetRole, str] | None = None,
) -> Sequences:
    """Read a data set that ships here, by its name, or else a file, in the way that its suffix says (`FORMATS`).

    Tables need the names of their columns; other formats have defaults. The remaining options are those of
    `formats.format.Asked`. Options that a format does not have are refused, and so is a role that it cannot give a
    target.
    """
    asked = Asked(columns or Columns(), role, labelled, splitting, ways or {})
    if data in SHIPPED:
        if asked.columns.given:
            raise DataError(f"{data} ships here and its columns are known; leave the options that name columns out")
        return _read_shipped(data, asked)
    path = Path(data)
    return _format(path, asked).read(path, asked)


def _read_shipped(name: str, asked: Asked) -> Sequences:
    """A data set that comes with the package, with its credit for a source."""
    shipped = SHIPPED[name]
    if asked.role != PER_SEQUENCE:
        raise DataError(
            f"{name} has {PER_SEQUENCE.words}, and {asked.role.words} was asked for"
            f"{asked.way(PER_SEQUENCE)}; leave --task out"
        )
    with resources.as_file(file_of(name)) as path:
        found = _format(path, Asked()).read(path, replace(asked, columns=shipped.columns))
    return replace(found, name=name, source=shipped.credit)


def _format(path: Path, asked: Asked) -> Format:
    """How to read a file; refused where there is none, and where what is asked does not go with its format."""
    if not path.exists():
        raise DataError(f"{path}: no such file; give a data file, or a data set that ships here ({', '.join(SHIPPED)})")
    files.require(path)
    found = format_of(path)
    if found is None:
        *most, last = [f"{' or '.join(each.suffixes)} ({each.layout})" for each in FORMATS]
        raise DataError(f"{path}: its name does not say how to read it; end it in {', '.join(most)} or {last}")
    strange = sorted(set(asked.columns.given) - found.options)
    if strange:
        raise DataError(f"{path}: --{strange[0].replace('_', '-')} means nothing for {found.name}; leave it out")
    if asked.role not in found.roles:
        raise DataError(f"{path}: {found.why_not}{asked.way(found.roles[0])}")
    return found
