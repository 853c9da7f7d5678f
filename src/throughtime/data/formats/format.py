"""What a format of files is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from throughtime.data.sequences import PER_SEQUENCE, PER_STEP, Columns, Sequences, TargetRole


@dataclass(frozen=True)
class Asked:
    """What is asked of a file: its columns, and what its target belongs to.

    `labelled=False` reads no labels, so that a file to predict on need not have any; `splitting=False` leaves the group
    and the part out, for a model that is in use. `ways` says what to type for another role of the target, to be quoted
    where a file has that one: `{PER_STEP: "--task tag"}`.
    """

    columns: Columns = field(default_factory=Columns)
    role: TargetRole = PER_SEQUENCE
    labelled: bool = True
    splitting: bool = True
    ways: Mapping[TargetRole, str] = field(default_factory=dict)

    def way(self, role: TargetRole) -> str:
        """What to type for this role, in brackets and after a space; nothing where that is not known."""
        return f" ({self.ways[role]})" if role in self.ways else ""


def as_they_are(columns: Columns, width: int) -> Columns:
    """Most formats read another file with the very columns of the first."""
    return columns


@dataclass(frozen=True)
class Format:
    """A format of files: one file of this folder, and one row of `FORMATS`.

    `layout` says what one row or line holds. `options` are the fields of `Columns` that mean something here, all others
    are refused; `roles` the roles that a target can have, with the reason for others in `why_not`. `names_columns` says
    whether the file names its columns, or else numbers them. `again(columns, width)` are the columns of another file of
    the kind of one that was read with `columns`, for a model that reads `width` of them.
    """

    name: str
    suffixes: tuple[str, ...]
    layout: str
    options: frozenset[str]
    read: Callable[[Path, Asked], Sequences]
    roles: tuple[TargetRole, ...] = (PER_SEQUENCE, PER_STEP)
    why_not: str = ""
    names_columns: bool = True
    again: Callable[[Columns, int], Columns] = as_they_are
