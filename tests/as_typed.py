"""Files read, and sequences encoded, as a command does it: a task by its name, columns as they are typed."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from throughtime.data import splitting
from throughtime.data.batches import Part
from throughtime.data.sequences import Columns, Sequences
from throughtime.tasks import encoding, table
from throughtime.tasks.classes import ClassCodec
from throughtime.tasks.encoding import Encoded, Encoder
from throughtime.tasks.model import SequenceModel, outputs
from throughtime.tasks.table import TASKS
from throughtime.tasks.task import Task

CLASSIFY, TAG = TASKS["classify"], TASKS["tag"]


def read(
    data: str, *, task: str = "classify", labelled: bool = True, splitting: bool = True, **columns: Any
) -> Sequences:
    """What `throughtime fit DATA --task task --column name` reads."""
    named: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in columns.items()
    }
    return table.read(data, Columns(**named), task=table.task_of(task), labelled=labelled, splitting=splitting)


def task_for(sequences: Sequences) -> Task:
    """The task whose labels these are."""
    return TAG if sequences.role.by_step else CLASSIFY


def encode(sequences: Sequences, **options: Any) -> Encoded:
    """The sequences encoded for the task whose labels these are."""
    return encoding.encode(task_for(sequences), sequences, **options)


def encoder_of(sequences: Sequences, rows: list[int] | None = None) -> Encoder:
    """The encoder of these sequences for the task whose labels they have."""
    return Encoder.fit(task_for(sequences), sequences, rows)


def split(sequences: Sequences, **options: Any) -> splitting.Split:
    """How these sequences are divided for that task."""
    return splitting.split(sequences, task_for(sequences).strata(sequences), **options)


def in_words(sequences: Sequences, **options: Any) -> str:
    """That division in words."""
    return splitting.in_words(sequences, task_for(sequences).strata(sequences), **options)


def classes_of(encoded: Encoded | Encoder) -> tuple[str, ...]:
    """The labels, in the order of their numbers."""
    codec = (encoded if isinstance(encoded, Encoder) else encoded.encoder).codec
    assert isinstance(codec, ClassCodec)
    return codec.classes


def targets_of(part: Part) -> Tensor:
    """The targets of a part whose sequences have one each."""
    assert isinstance(part.targets, Tensor)
    return part.targets


def probabilities(model: SequenceModel, part: Part, batch_size: int = 512) -> list[Tensor]:
    """The probability of each class, [classes] or [length, classes] for each sequence."""
    return [output.softmax(-1) for output in outputs(model, part, batch_size)]


def predict(model: SequenceModel, part: Part, batch_size: int = 512) -> list[Tensor]:
    """The most likely class of each sequence, [] or [length]."""
    return [output.argmax(-1) for output in outputs(model, part, batch_size)]
