"""Labelled sequences as every format gives them: numbers and symbols by step, labels, and where they came from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from throughtime.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray

Task = Literal["classify", "tag"]
"""One answer at the end of a sequence, or one at every step."""


@dataclass(frozen=True)
class Columns:
    """Which column of a file plays which role.

    `features=None` takes every column without another role. Without `time`, a sequence's steps are in the
    order of the file. `group` names what must not be split between training and test (a patient, a
    machine); `part` names a column that says `train`, `validation` or `test` and so fixes the split; `symbols` are
    read as text, one embedding each. `target` is None where labels are not read.
    """

    sequence_id: str
    target: str | None
    time: str | None = None
    features: tuple[str, ...] | None = None
    group: str | None = None
    part: str | None = None
    symbols: tuple[str, ...] = ()

    def roles(self) -> dict[str, str]:
        """The role of each column that has one of its own: `{"utterance": "sequence id", ...}`."""
        named = [
            ("sequence id", self.sequence_id),
            ("time", self.time),
            ("target", self.target),
            ("group", self.group),
            ("part", self.part),
            *(("symbol", column) for column in self.symbols),
        ]
        taken: dict[str, str] = {}
        for role, column in named:
            if column is None:
                continue
            if column in taken:
                raise DataError(f"column {column!r} is named both as {taken[column]} and as {role}: name two columns")
            taken[column] = role
        for column in self.features or ():
            if column in taken:
                raise DataError(f"column {column!r} is the {taken[column]} and cannot be a feature too: leave it out")
        return taken

    def without(self, *, labels: bool = False, splitting: bool = False) -> Columns:
        """The same columns without the target, and without the group and the part."""
        return replace(
            self,
            target=None if labels else self.target,
            group=None if splitting else self.group,
            part=None if splitting else self.part,
        )


@dataclass(frozen=True)
class Sequences:
    """Labelled sequences of different lengths.

    Those of a table are sorted by id, so that the order of its rows is immaterial; others are in the order of the
    file. Each of `steps` is [length, features] in float64 and in the order of time, with 0 columns where there are
    no numbers; each of `symbols` is length x symbol columns of text, and `symbols` is empty where there are none.
    `ids`, `groups` and `parts` have one text per sequence. `labels` has one text per sequence to classify, one per
    step to tag, and is empty where labels were not read. `notices` are things that a reader of the results should
    know, in plain words.
    """

    name: str
    source: str
    columns: Columns
    features: tuple[str, ...]
    ids: tuple[str, ...]
    steps: tuple[NDArray[np.float64], ...]
    labels: tuple[str, ...] | tuple[tuple[str, ...], ...]
    groups: tuple[str, ...] | None = None
    parts: tuple[str, ...] | None = None
    notices: tuple[str, ...] = ()
    task: Task = "classify"
    symbols: tuple[tuple[tuple[str, ...], ...], ...] = ()
    symbol_columns: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Steps in each sequence: [sequences]."""
        return np.array([len(steps) for steps in self.steps], dtype=np.int64)

    def labels_of(self, index: int) -> tuple[str, ...]:
        """The labels of one sequence: one to classify, one per step to tag."""
        labels = self.labels[index]
        return (labels,) if isinstance(labels, str) else labels
