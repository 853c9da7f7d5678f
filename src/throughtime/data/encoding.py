"""From labelled sequences to tensors and back: numbers scaled, symbols and labels numbered, by the training part."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Any, NoReturn, get_args

import numpy as np
import torch
from torch import Tensor

from throughtime.data import splitting
from throughtime.data.batches import Batch, Part
from throughtime.data.sequences import Sequences, Task
from throughtime.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["UNKNOWN", "Batch", "Encoded", "Encoder", "Part", "Scaler", "encode"]

UNKNOWN = ""
"""What index 0 of every vocabulary stands for: a symbol never seen in training. No symbol read is empty."""


@dataclass(frozen=True)
class Scaler:
    """Moves and scales each feature to mean 0 and standard deviation 1 over the steps that it was fitted on.

    `mean` and `scale` are [features]; a feature that is constant there has scale 1, and so becomes 0.
    """

    mean: NDArray[np.float64]
    scale: NDArray[np.float64]
    constant: NDArray[np.bool_]

    @classmethod
    def fit(cls, steps: Sequence[NDArray[np.float64]]) -> Scaler:
        """Fit on all steps of all sequences given, each [length, features]."""
        rows = np.concatenate(steps)
        constant = rows.min(axis=0) == rows.max(axis=0)
        with np.errstate(over="ignore", invalid="ignore"):
            mean = np.where(constant, rows[0], rows.mean(axis=0))
            scale = np.where(constant, 1.0, rows.std(axis=0))
        return cls(mean=mean, scale=scale, constant=constant)

    def __call__(self, steps: NDArray[np.float64]) -> Tensor:
        """Scale one sequence, [length, features], to float32."""
        with np.errstate(over="ignore", invalid="ignore"):
            scaled = ((steps - self.mean) / self.scale).astype(np.float32)
        return torch.from_numpy(scaled)


@dataclass(frozen=True, eq=False)
class Encoder:
    """What turns sequences into tensors, fitted on the training part alone.

    `features` and `symbol_columns` name the columns it wants; `vocabularies` has one for each symbol column,
    `vocabulary[i]` being the symbol of index i and `vocabulary[0]` the empty text, for whatever was not seen in
    training. `classes[i]` is the label of class i.
    """

    task: Task
    features: tuple[str, ...]
    scaler: Scaler
    symbol_columns: tuple[str, ...]
    vocabularies: tuple[tuple[str, ...], ...]
    classes: tuple[str, ...]

    @classmethod
    def fit(cls, sequences: Sequences, indices: Iterable[int] | Tensor | None = None) -> Encoder:
        """Fit on the sequences at these places, all if not given: every symbol and label there gets a number.

        Raises `DataError` where they have a single label.
        """
        rows = _listed(range(len(sequences)) if indices is None else indices)
        labels = _check_labels(sequences, rows)
        return cls(
            task=sequences.task,
            features=sequences.features,
            scaler=Scaler.fit([sequences.steps[i] for i in rows]),
            symbol_columns=sequences.symbol_columns,
            vocabularies=tuple(
                (UNKNOWN, *sorted({step[column] for i in rows for step in sequences.symbols[i]}))
                for column in range(len(sequences.symbol_columns))
            ),
            classes=tuple(sorted(labels, key=_by_number_then_text)),
        )

    def part(
        self, sequences: Sequences, indices: Iterable[int] | Tensor | None = None, *, labelled: bool = True
    ) -> Part:
        """The sequences at these places, all if not given, as tensors; a symbol never seen in training is 0.

        Columns are found by name, in any order. `labelled=False` leaves labels out. Raises `DataError` for a column
        that is missing or that training did not have, another task, a label that was not in training, and numbers
        that float32 cannot hold.
        """
        self._check_task(sequences)
        columns = _places(sequences, "feature", self.features, sequences.features)
        symbol_columns = _places(sequences, "symbol", self.symbol_columns, sequences.symbol_columns)
        rows = _listed(range(len(sequences)) if indices is None else indices)
        steps = tuple(self.scaler(sequences.steps[i][:, columns]) for i in rows)
        self._check_range(sequences, rows, steps)
        symbols = self._symbols([sequences.symbols[i] for i in rows], symbol_columns) if symbol_columns else ()
        if not labelled:
            return Part(steps, () if self.task == "tag" else torch.zeros(0, dtype=torch.int64), symbols)
        if not sequences.labels:
            raise DataError(f"{sequences.source}: was read without labels; read it with them, or predict")
        numbers = [self._classes(sequences, i) for i in rows]
        if self.task == "classify":
            return Part(steps, torch.tensor(numbers, dtype=torch.int64).flatten(), symbols)
        return Part(steps, tuple(torch.tensor(each, dtype=torch.int64) for each in numbers), symbols)

    def step(self, values: Mapping[str, Any] | Sequence[Any]) -> tuple[Tensor, Tensor]:
        """One step of a stream as tensors: numbers [features] float32 and symbols [symbol columns] int64.

        `values` are by column name, or in the order of `features` and then `symbol_columns`. Raises `DataError`
        naming the column for one that is missing or not known, and for a value of the wrong kind.
        """
        names = (*self.features, *self.symbol_columns)
        if isinstance(values, Mapping):
            strange = next((name for name in values if name not in names), None)
            if strange is not None:
                raise DataError(f"column {strange!r} was not in training; leave it out (known: {_quoted(names)})")
            missing = next((name for name in names if name not in values), None)
            if missing is not None:
                raise DataError(f"column {missing!r} is missing; a step has {_quoted(names)}")
            cells = [values[name] for name in names]
        else:
            cells = [values] if isinstance(values, str) else list(values)
            if len(cells) != len(names):
                raise DataError(f"{len(cells)} values where a step has {len(names)}: {_quoted(names)}; give each one")
        count = len(self.features)
        numbers = [_finite(name, cell) for name, cell in zip(names[:count], cells[:count], strict=True)]
        scaled = self.scaler(np.array([numbers], dtype=np.float64).reshape(1, count))[0]
        self._check_step(scaled)
        symbols = [_symbol(name, cell) for name, cell in zip(names[count:], cells[count:], strict=True)]
        return scaled, self._symbols([(tuple(symbols),)], list(range(len(symbols))))[0][0]

    def notices(self, part: Part, where: str) -> tuple[str, ...]:
        """What to say of symbols in `part` that training did not have; `where` names it: "the test part"."""
        said = []
        for column, name in enumerate(self.symbol_columns):
            unknown = sum(int((symbols[:, column] == 0).sum()) for symbols in part.symbols)
            if unknown:
                said.append(
                    f"{unknown:,} of {int(part.lengths.sum()):,} symbols in column {name!r} of {where} are not in the"
                    " training part and are read as unknown"
                )
        return tuple(said)

    def to_json(self) -> dict[str, Any]:
        """The encoder as data for JSON; numbers as hexadecimal text, so that `from_json` gives the same bits."""
        return {
            "format": 1,
            "task": self.task,
            "features": list(self.features),
            "mean": [float(value).hex() for value in self.scaler.mean],
            "scale": [float(value).hex() for value in self.scaler.scale],
            "constant": [bool(value) for value in self.scaler.constant],
            "symbol_columns": list(self.symbol_columns),
            "vocabularies": [list(vocabulary[1:]) for vocabulary in self.vocabularies],
            "classes": list(self.classes),
        }

    @classmethod
    def from_json(cls, data: object, source: str = "the encoder") -> Encoder:
        """The encoder that `to_json` gave. Raises `DataError`, naming `source` and the entry, for anything else."""
        stored = _Stored(data, source)
        features, symbol_columns = stored.texts("features"), stored.texts("symbol_columns")
        if set(features) & set(symbol_columns):
            stored.refuse("symbol_columns", "repeats a feature")
        count = len(features)
        scaler = Scaler(
            mean=np.array(stored.numbers("mean", count)),
            scale=np.array(stored.numbers("scale", count, positive=True)),
            constant=np.array(stored.truths("constant", count), dtype=bool),
        )
        classes = stored.texts("classes")
        if len(classes) < 2:
            stored.refuse("classes", "has fewer than two")
        vocabularies = stored.vocabularies("vocabularies", len(symbol_columns))
        return cls(stored.task(), features, scaler, symbol_columns, vocabularies, classes)

    @cached_property
    def _symbol_numbers(self) -> tuple[dict[str, int], ...]:
        return tuple({symbol: i for i, symbol in enumerate(vocabulary)} for vocabulary in self.vocabularies)

    @cached_property
    def _class_numbers(self) -> dict[str, int]:
        return {label: i for i, label in enumerate(self.classes)}

    def _check_task(self, sequences: Sequences) -> None:
        if sequences.task != self.task:
            raise DataError(f"{sequences.source}: read to {sequences.task}, and this model is to {self.task}")

    def _check_range(self, sequences: Sequences, rows: list[int], steps: tuple[Tensor, ...]) -> None:
        for i, scaled in zip(rows, steps, strict=True):
            column = self._beyond_range(scaled)
            if column is not None:
                raise DataError(
                    f"{sequences.source}, column {column!r}: its range is too wide for float32 (seen in sequence"
                    f" {sequences.ids[i]!r}); rescale the column, for instance by its logarithm"
                )

    def _check_step(self, scaled: Tensor) -> None:
        column = self._beyond_range(scaled[None])
        if column is not None:
            raise DataError(f"column {column!r}: out of float32's range once scaled; rescale the column")

    def _beyond_range(self, scaled: Tensor) -> str | None:
        """The first feature that float32 cannot hold in [length, features], if there is one."""
        fine = scaled.isfinite().all(dim=0) & torch.from_numpy(np.isfinite(self.scaler.scale))
        return None if bool(fine.all()) else self.features[int((~fine).nonzero()[0])]

    def _symbols(self, sequences: list[tuple[tuple[str, ...], ...]], columns: list[int]) -> tuple[Tensor, ...]:
        """Symbols as numbers: [length, symbol columns] for each sequence."""
        numbers = torch.empty(sum(map(len, sequences)), len(columns), dtype=torch.int64)
        for place, (column, known) in enumerate(zip(columns, self._symbol_numbers, strict=True)):
            numbers[:, place] = torch.tensor([known.get(step[column], 0) for steps in sequences for step in steps])
        return numbers.split([len(steps) for steps in sequences])

    def _classes(self, sequences: Sequences, index: int) -> list[int]:
        known, labels = self._class_numbers, sequences.labels_of(index)
        try:
            return [known[label] for label in labels]
        except KeyError:
            step = next(i for i, label in enumerate(labels) if label not in known)
            at = f", step {step + 1}" if self.task == "tag" else ""
            raise DataError(
                f"{_place(sequences, sequences.columns.target)}: label {labels[step]!r} in sequence"
                f" {sequences.ids[index]!r}{at} was not in training, which had {_quoted(self.classes)}; mend it, or"
                " train with sequences that have it"
            ) from None


@dataclass(frozen=True)
class Encoded:
    """A task ready for a network; `vocabulary[i]` is the label of class i, `split` is in words.

    `encoder` made the parts; `validation` is there if a share of the training part was kept out for it.
    """

    name: str
    source: str
    split: str
    features: tuple[str, ...]
    vocabulary: tuple[str, ...]
    train: Part
    test: Part
    notices: tuple[str, ...]
    encoder: Encoder
    validation: Part | None = None
    task: Task = "classify"


def encode(
    sequences: Sequences, *, test_fraction: float = 0.25, validation_fraction: float = 0.0, seed: int = 0
) -> Encoded:
    """Split, then scale and number. Nothing of the test or validation part reaches the scaler or the vocabularies.

    `validation_fraction` is the share of what the test leaves; see `splitting.split`. Raises `DataError` where a class
    lacks sequences for one of the parts, or a feature's range exceeds float32's.
    """
    _check_labels(sequences, range(len(sequences)))  # before a split that could only refuse for a lesser reason
    shares = {"test_fraction": test_fraction, "validation_fraction": validation_fraction}
    indices = splitting.split(sequences, **shares, seed=seed)
    encoder = Encoder.fit(sequences, indices.train)
    parts = {name: encoder.part(sequences, rows) for name, rows in indices._asdict().items() if len(rows)}
    unknown = [encoder.notices(parts[name], f"the {name} part") for name in parts if name != "train"]
    return Encoded(
        name=sequences.name,
        source=sequences.source,
        split=splitting.in_words(sequences, **shares, seed=seed),
        features=sequences.features,
        vocabulary=encoder.classes,
        train=parts["train"],
        test=parts["test"],
        notices=(*sequences.notices, *_constant_notices(encoder), *chain.from_iterable(unknown)),
        encoder=encoder,
        validation=parts.get("validation"),
        task=sequences.task,
    )


def _constant_notices(encoder: Encoder) -> tuple[str, ...]:
    scaler = encoder.scaler
    return tuple(
        f"column {encoder.features[i]!r} is {scaler.mean[i]:g} all through the training part: it teaches nothing"
        for i in np.flatnonzero(scaler.constant)
    )


def _check_labels(sequences: Sequences, rows: Iterable[int]) -> set[str]:
    """The labels of the sequences at these places, two or more."""
    if not sequences.labels:
        raise DataError(f"{sequences.source}: was read without labels; read it with them, or predict")
    labels = {label for i in rows for label in sequences.labels_of(i)}
    if len(labels) < 2:
        kind, name = ("class", "classifier") if sequences.task == "classify" else ("label", "tagger")
        only = ", ".join(repr(label) for label in labels) or "none"
        raise DataError(
            f"{_place(sequences, sequences.columns.target)}: only one {kind}, {only}: a {name} needs two or more"
        )
    return labels


def _places(sequences: Sequences, kind: str, wanted: Sequence[str], found: Sequence[str]) -> list[int]:
    """Where each wanted column is among those found."""
    missing = next((name for name in wanted if name not in found), None)
    if missing is not None:
        has = _quoted(found) if found else "none"
        raise DataError(
            f"{sequences.source}: no {kind} column {missing!r}, which was in training; add it (the {kind} columns are"
            f" {has})"
        )
    strange = next((name for name in found if name not in wanted), None)
    if strange is not None:
        knew = _quoted(wanted) if wanted else "none"
        raise DataError(
            f"{sequences.source}, column {strange!r}: was not in training; remove it (the {kind} columns there were"
            f" {knew})"
        )
    return [list(found).index(name) for name in wanted]


def _finite(name: str, cell: object) -> float:
    try:
        value = float(cell) if isinstance(cell, int | float | np.number | np.bool_) else math.nan
    except OverflowError:
        value = math.inf
    if not math.isfinite(value):
        raise DataError(f"column {name!r}: {cell!r} is not a finite number; give one")
    return value


def _symbol(name: str, cell: object) -> str:
    if not isinstance(cell, str) or not cell:
        raise DataError(f"column {name!r}: {cell!r} is not a symbol; give text that is not empty")
    return cell


@dataclass(frozen=True)
class _Stored:
    """What a stranger's file may have made of an encoder: every entry is looked at before it is used."""

    data: object
    source: str

    def refuse(self, entry: str, problem: str) -> NoReturn:
        raise DataError(f"{self.source}: {entry!r} {problem}; the file is damaged or not an encoder, take a whole copy")

    def entry(self, name: str) -> Any:
        if not isinstance(self.data, dict):
            raise DataError(f"{self.source}: is not an encoder's data; take a whole copy")
        if self.data.get("format") != 1:
            self.refuse("format", f"is {self.data.get('format')!r}, and this version reads 1")
        if name not in self.data:
            self.refuse(name, "is missing")
        return self.data[name]

    def task(self) -> Task:
        task = self.entry("task")
        if task not in get_args(Task):
            self.refuse("task", f"is {task!r}, neither 'classify' nor 'tag'")
        return task

    def listed(self, name: str, kind: type, count: int | None = None) -> list[Any]:
        values = self.entry(name)
        if not isinstance(values, list) or any(type(value) is not kind for value in values):
            self.refuse(name, f"is not a list of {kind.__name__}")
        if count is not None and len(values) != count:
            self.refuse(name, f"has {len(values)} values where {count} belong")
        return values

    def texts(self, name: str) -> tuple[str, ...]:
        return self._distinct(name, self.listed(name, str))

    def vocabularies(self, name: str, count: int) -> tuple[tuple[str, ...], ...]:
        found = self.listed(name, list, count)
        if any(type(symbol) is not str for vocabulary in found for symbol in vocabulary):
            self.refuse(name, "holds what is not text")
        return tuple((UNKNOWN, *self._distinct(name, vocabulary)) for vocabulary in found)

    def numbers(self, name: str, count: int, *, positive: bool = False) -> list[float]:
        values = []
        for text in self.listed(name, str, count):
            try:
                value = float.fromhex(text)
            except (ValueError, OverflowError):
                self.refuse(name, f"holds {text!r}, not a hexadecimal number")
            if not math.isfinite(value) or (positive and value <= 0):
                self.refuse(name, f"holds {text!r}, out of its range")
            values.append(value)
        return values

    def truths(self, name: str, count: int) -> list[bool]:
        return self.listed(name, bool, count)

    def _distinct(self, name: str, texts: list[str]) -> tuple[str, ...]:
        if "" in texts or len(set(texts)) < len(texts):
            self.refuse(name, "has an empty text or one that is there twice")
        return tuple(texts)


def _listed(indices: Iterable[int] | Tensor) -> list[int]:
    return [int(i) for i in indices]


def _place(sequences: Sequences, column: str | None) -> str:
    return sequences.source if column is None else f"{sequences.source}, column {column!r}"


def _quoted(names: Sequence[str], most: int = 12) -> str:
    shown = ", ".join(repr(name) for name in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def _by_number_then_text(label: str) -> tuple[float, str]:
    try:
        return float(label), label
    except ValueError:
        return float("inf"), label
