"""Labelled sequences as every format gives them: numbers and symbols by step, labels, and where they came from."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from throughtime.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class TargetRole:
    """What a target belongs to: `per="sequence"` has one label for a whole sequence, `per="step"` one for every step.

    Every label is a class by now. A number, several labels at once or a sequence of its own will be another field here,
    for a reader has to know which; a task whose targets are in the inputs themselves, such as a forecast, reads none.
    """

    per: Literal["sequence", "step"]

    @property
    def by_step(self) -> bool:
        """Whether there is a target for every step."""
        return self.per == "step"

    @property
    def words(self) -> str:
        """What a file holds then."""
        return "a label for each step" if self.by_step else "one label for each sequence"


PER_SEQUENCE, PER_STEP = TargetRole("sequence"), TargetRole("step")


def _option(default: Any, help: str, *, renamed: bool = False) -> Any:
    """An option of reading; `renamed` if a file to predict on may call that column otherwise than the training's."""
    return field(default=default, metadata={"help": help, "renamed": renamed})


@dataclass(frozen=True)
class Columns:
    """How a file is to be read: which column plays which role.

    This is the one place where an option of reading is written: configurations, TOML files and the command line take
    names, defaults and help from here; what it means stands in the formats that know it (`formats`). `features=()`
    takes every column without another role. Without `time`, a sequence's steps are in the order of the file. `group`
    names what must not be split between training and test (a patient, a machine); `part` names a column that says
    `train`, `validation` or `test` and so fixes the split; `symbols` are read as text, one embedding each. `target` is
    None where labels are not read. `text` says what a step of a line of text is.
    """

    sequence_id: str | None = _option(None, "Column that tells the sequences apart.", renamed=True)
    target: str | None = _option(None, "Column with the label.", renamed=True)
    time: str | None = _option(None, "Column that orders a sequence's steps: numbers or dates.", renamed=True)
    features: tuple[str, ...] = _option((), "Columns of numbers, comma-separated; all others if not given.")
    group: str | None = _option(None, "Column that the split keeps whole: a patient, a machine.")
    part: str | None = _option(None, "Column that says train, validation or test: a split of your own.")
    symbols: tuple[str, ...] = _option((), "Columns of text to embed, comma-separated.")
    text: str | None = _option(None, "The steps of a line of text: words or letters.")

    @property
    def given(self) -> dict[str, Any]:
        """The options that were given, by name."""
        values = {each.name: getattr(self, each.name) for each in fields(Columns)}
        return {name: value for name, value in values.items() if value}

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
        for column in self.features:
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
    `ids`, `groups` and `parts` have one text per sequence. `labels` has one text per sequence, or one per step, as
    `role` says, and is empty where labels were not read. `notices` are things that a reader of the results should
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
    role: TargetRole = PER_SEQUENCE
    symbols: tuple[tuple[tuple[str, ...], ...], ...] = ()
    symbol_columns: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Steps in each sequence: [sequences]."""
        return np.array([len(steps) for steps in self.steps], dtype=np.int64)

    def labels_of(self, index: int) -> tuple[str, ...]:
        """The labels of one sequence: a single one, or one per step."""
        labels = self.labels[index]
        return (labels,) if isinstance(labels, str) else labels
