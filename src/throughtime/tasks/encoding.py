"""From labelled sequences to the parts that a network learns from and is tested on, and what made them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from torch import Tensor

from throughtime.data import splitting
from throughtime.data.batches import Part
from throughtime.data.encoding import InputEncoder, Stored
from throughtime.data.sequences import Sequences
from throughtime.errors import DataError
from throughtime.tasks.table import TASKS, choices
from throughtime.tasks.task import Codec, Task


@dataclass(frozen=True, eq=False)
class Encoder:
    """What turns sequences into tensors, fitted on the training part alone: the inputs, and the targets of a task."""

    task: Task
    inputs: InputEncoder
    codec: Codec

    @classmethod
    def fit(cls, task: Task, sequences: Sequences, indices: Iterable[int] | Tensor | None = None) -> Encoder:
        """Fit on the sequences at these places, all if not given.

        Raises `DataError` for labels that nothing can be learnt from, such as a single one.
        """
        rows = _listed(range(len(sequences)) if indices is None else indices)
        inputs = InputEncoder.fit(sequences, rows)
        return cls(task, inputs, task.codec(sequences, rows, inputs))

    @property
    def features(self) -> tuple[str, ...]:
        """The columns of numbers."""
        return self.inputs.features

    @property
    def symbol_columns(self) -> tuple[str, ...]:
        """The columns of symbols."""
        return self.inputs.symbol_columns

    @property
    def vocabularies(self) -> tuple[tuple[str, ...], ...]:
        """The symbols of each of those columns, unknown first."""
        return self.inputs.vocabularies

    def part(
        self, sequences: Sequences, indices: Iterable[int] | Tensor | None = None, *, labelled: bool = True
    ) -> Part:
        """The sequences at these places, all if not given, as tensors; a symbol never seen in training is 0.

        Columns are found by name, in any order. `labelled=False` leaves labels out. Raises `DataError` for a column
        that is missing or that training did not have, targets of another role, a label that was not in training, and
        numbers that float32 cannot hold.
        """
        if sequences.role != self.task.role:
            raise DataError(
                f"{sequences.source}: was read with {sequences.role.words}, and this model is to {self.task.name}, with"
                f" {self.task.role.words}; read it so"
            )
        rows = _listed(range(len(sequences)) if indices is None else indices)
        steps, symbols = self.inputs.sequences(sequences, rows)
        targets = self.codec.targets(sequences, rows) if labelled else self.codec.no_targets()
        return Part(steps, targets, symbols)

    def step(self, values: Mapping[str, Any] | Sequence[Any]) -> tuple[Tensor, Tensor]:
        """One step of a stream as tensors; see `InputEncoder.step`."""
        return self.inputs.step(values)

    def notices(self, part: Part, where: str) -> tuple[str, ...]:
        """What to say of symbols in `part` that training did not have; `where` names it: "the test part"."""
        return self.inputs.unknown(part.symbols, where)

    def to_json(self) -> dict[str, Any]:
        """The encoder as data for JSON; numbers as hexadecimal text, so that `from_json` gives the same bits."""
        return {"format": 1, "task": self.task.name, **self.inputs.to_json(), **self.codec.to_json()}

    @classmethod
    def from_json(cls, data: object, source: str = "the encoder") -> Encoder:
        """The encoder that `to_json` gave. Raises `DataError`, naming `source` and the entry, for anything else."""
        stored = Stored(data, source)
        name = stored.entry("task")
        if not isinstance(name, str) or name not in TASKS:
            stored.refuse("task", f"is {name!r}, which this version does not know: it has {choices()}")
        task = TASKS[name]
        return cls(task, InputEncoder.from_json(stored), task.codec_from_json(stored))


@dataclass(frozen=True)
class Encoded:
    """A data set ready for a network; `split` says in words how it was divided.

    `encoder` made the parts; `validation` is there if a share of the training part was kept out for it.
    """

    name: str
    source: str
    split: str
    train: Part
    test: Part
    notices: tuple[str, ...]
    encoder: Encoder
    validation: Part | None = None

    @property
    def task(self) -> Task:
        """What is learnt from it."""
        return self.encoder.task


def encode(
    task: Task,
    sequences: Sequences,
    *,
    test_fraction: float = 0.25,
    validation_fraction: float = 0.0,
    seed: int = 0,
) -> Encoded:
    """Split, then scale and number. Nothing of the test or validation part reaches the scaler or the vocabularies.

    `validation_fraction` is the share of what the test leaves; see `splitting.split`. Raises `DataError` where a label
    lacks sequences for one of the parts, or a feature's range exceeds float32's.
    """
    strata = task.strata(sequences)  # refuses before a split that could only refuse for a lesser reason
    shares = {"test_fraction": test_fraction, "validation_fraction": validation_fraction}
    indices = splitting.split(sequences, strata, **shares, seed=seed)
    encoder = Encoder.fit(task, sequences, indices.train)
    parts = {name: encoder.part(sequences, rows) for name, rows in indices._asdict().items() if len(rows)}
    unknown = [encoder.notices(parts[name], f"the {name} part") for name in parts if name != "train"]
    return Encoded(
        name=sequences.name,
        source=sequences.source,
        split=splitting.in_words(sequences, strata, **shares, seed=seed),
        train=parts["train"],
        test=parts["test"],
        notices=(*sequences.notices, *encoder.inputs.constant(), *chain.from_iterable(unknown)),
        encoder=encoder,
        validation=parts.get("validation"),
    )


def _listed(indices: Iterable[int] | Tensor) -> list[int]:
    return [int(i) for i in indices]
