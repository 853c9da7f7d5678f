"""What a network reads, as tensors: numbers scaled and symbols numbered, by the training part alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from throughtime.data.sequences import Sequences
from throughtime.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray

UNKNOWN = ""
"""What index 0 of every vocabulary stands for: a symbol never seen in training. No symbol read is empty."""


@dataclass(frozen=True)
class Scaler:
    """Moves and scales each feature to mean 0 and standard deviation 1 over the steps that it was fitted on.

    `mean` and `scale` are [features]; a feature that is constant there has scale 1, and so
    becomes 0; so has one whose deviation is too small for float64.
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
            deviation = rows.std(axis=0)
            scale = np.where(constant | (deviation == 0), 1.0, deviation)
        return cls(mean=mean, scale=scale, constant=constant)

    def __call__(self, steps: NDArray[np.float64]) -> Tensor:
        """Scale one sequence, [length, features], to float32."""
        with np.errstate(over="ignore", invalid="ignore"):
            scaled = ((steps - self.mean) / self.scale).astype(np.float32)
        return torch.from_numpy(scaled)


@dataclass(frozen=True, eq=False)
class InputEncoder:
    """What turns the inputs of sequences into tensors, fitted on the training part alone.

    `features` and `symbol_columns` name the columns it wants; `vocabularies` has one for each symbol column,
    `vocabulary[i]` being the symbol of index i and `vocabulary[0]` the empty text, for whatever was not seen in
    training.
    """

    features: tuple[str, ...]
    scaler: Scaler
    symbol_columns: tuple[str, ...]
    vocabularies: tuple[tuple[str, ...], ...]

    @classmethod
    def fit(cls, sequences: Sequences, rows: Sequence[int]) -> InputEncoder:
        """Fit on the sequences at these places: every symbol there gets a number."""
        return cls(
            features=sequences.features,
            scaler=Scaler.fit([sequences.steps[i] for i in rows]),
            symbol_columns=sequences.symbol_columns,
            vocabularies=tuple(
                (UNKNOWN, *sorted({step[column] for i in rows for step in sequences.symbols[i]}))
                for column in range(len(sequences.symbol_columns))
            ),
        )

    def sequences(self, sequences: Sequences, rows: Sequence[int]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Numbers, [length, features] each, and symbols, [length, symbol columns] each or none, of these sequences.

        Columns are found by name, in any order; a symbol never seen in training is 0. Raises `DataError` for a column
        that is missing or that training did not have, and for numbers that float32 cannot hold.
        """
        columns = _places(sequences, "feature", self.features, sequences.features)
        symbol_columns = _places(sequences, "symbol", self.symbol_columns, sequences.symbol_columns)
        steps = tuple(self.scaler(sequences.steps[i][:, columns]) for i in rows)
        self._check_range(sequences, rows, steps)
        symbols = self._symbols([sequences.symbols[i] for i in rows], symbol_columns) if symbol_columns else ()
        return steps, symbols

    def step(self, values: Mapping[str, Any] | Sequence[Any]) -> tuple[Tensor, Tensor]:
        """One step of a stream as tensors: numbers [features] float32 and symbols [symbol columns] int64.

        `values` are by column name, or in the order of `features` and then `symbol_columns`. Raises `DataError`
        naming the column for one that is missing or not known, and for a value of the wrong kind.
        """
        names = (*self.features, *self.symbol_columns)
        if isinstance(values, Mapping):
            strange = next((name for name in values if name not in names), None)
            if strange is not None:
                raise DataError(f"column {strange!r} was not in training; leave it out (known: {quoted(names)})")
            missing = next((name for name in names if name not in values), None)
            if missing is not None:
                raise DataError(f"column {missing!r} is missing; a step has {quoted(names)}")
            cells = [values[name] for name in names]
        else:
            cells = [values] if isinstance(values, str) else list(values)
            if len(cells) != len(names):
                raise DataError(f"{len(cells)} values where a step has {len(names)}: {quoted(names)}; give each one")
        count = len(self.features)
        numbers = [_finite(name, cell) for name, cell in zip(names[:count], cells[:count], strict=True)]
        scaled = self.scaler(np.array([numbers], dtype=np.float64).reshape(1, count))[0]
        self._check_step(scaled)
        symbols = [_symbol(name, cell) for name, cell in zip(names[count:], cells[count:], strict=True)]
        return scaled, self._symbols([(tuple(symbols),)], list(range(len(symbols))))[0][0]

    def unknown(self, symbols: Sequence[Tensor], where: str) -> tuple[str, ...]:
        """What to say of symbols that training did not have; `where` names them: "the test part"."""
        said = []
        for column, name in enumerate(self.symbol_columns):
            unknown = sum(int((each[:, column] == 0).sum()) for each in symbols)
            if unknown:
                said.append(
                    f"{unknown:,} of {sum(map(len, symbols)):,} symbols in column {name!r} of {where} are not in the"
                    " training part and are read as unknown"
                )
        return tuple(said)

    def constant(self) -> tuple[str, ...]:
        """What to say of features that never change in the training part."""
        return tuple(
            f"column {self.features[i]!r} is {self.scaler.mean[i]:g} all through the training part: it teaches nothing"
            for i in np.flatnonzero(self.scaler.constant)
        )

    def to_json(self) -> dict[str, Any]:
        """Entries for JSON; numbers as hexadecimal text, so that `from_json` gives the same bits."""
        return {
            "features": list(self.features),
            "mean": [float(value).hex() for value in self.scaler.mean],
            "scale": [float(value).hex() for value in self.scaler.scale],
            "constant": [bool(value) for value in self.scaler.constant],
            "symbol_columns": list(self.symbol_columns),
            "vocabularies": [list(vocabulary[1:]) for vocabulary in self.vocabularies],
        }

    @classmethod
    def from_json(cls, stored: Stored) -> InputEncoder:
        """The encoder of these entries. Raises `DataError`, naming the entry, for what `to_json` never gives."""
        features, symbol_columns = stored.texts("features"), stored.texts("symbol_columns")
        if set(features) & set(symbol_columns):
            stored.refuse("symbol_columns", "repeats a feature")
        count = len(features)
        scaler = Scaler(
            mean=np.array(stored.numbers("mean", count)),
            scale=np.array(stored.numbers("scale", count, positive=True)),
            constant=np.array(stored.truths("constant", count), dtype=bool),
        )
        return cls(features, scaler, symbol_columns, stored.vocabularies("vocabularies", len(symbol_columns)))

    @cached_property
    def _symbol_numbers(self) -> tuple[dict[str, int], ...]:
        return tuple({symbol: i for i, symbol in enumerate(vocabulary)} for vocabulary in self.vocabularies)

    def _check_range(self, sequences: Sequences, rows: Sequence[int], steps: tuple[Tensor, ...]) -> None:
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


def _places(sequences: Sequences, kind: str, wanted: Sequence[str], found: Sequence[str]) -> list[int]:
    """Where each wanted column is among those found."""
    missing = next((name for name in wanted if name not in found), None)
    if missing is not None:
        has = quoted(found) if found else "none"
        raise DataError(
            f"{sequences.source}: no {kind} column {missing!r}, which was in training; add it (the {kind} columns are"
            f" {has})"
        )
    strange = next((name for name in found if name not in wanted), None)
    if strange is not None:
        knew = quoted(wanted) if wanted else "none"
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
class Stored:
    """What a stranger's file may have made of an encoder's data: every entry is looked at before it is used."""

    data: object
    source: str

    def refuse(self, entry: str, problem: str) -> NoReturn:
        """Say which entry is wrong, and how."""
        raise DataError(f"{self.source}: {entry!r} {problem}; the file is damaged or not an encoder, take a whole copy")

    def entry(self, name: str) -> Any:
        """What stands under this name, in a format that this version reads."""
        if not isinstance(self.data, dict):
            raise DataError(f"{self.source}: is not an encoder's data; take a whole copy")
        if self.data.get("format") != 1:
            self.refuse("format", f"is {self.data.get('format')!r}, and this version reads 1")
        if name not in self.data:
            self.refuse(name, "is missing")
        return self.data[name]

    def _listed(self, name: str, kind: type, count: int | None = None) -> list[Any]:
        values = self.entry(name)
        if not isinstance(values, list) or any(type(value) is not kind for value in values):
            self.refuse(name, f"is not a list of {kind.__name__}")
        if count is not None and len(values) != count:
            self.refuse(name, f"has {len(values)} values where {count} belong")
        return values

    def texts(self, name: str) -> tuple[str, ...]:
        """Distinct texts, none of them empty."""
        return self._distinct(name, self._listed(name, str))

    def vocabularies(self, name: str, count: int) -> tuple[tuple[str, ...], ...]:
        """So many lists of distinct texts, each after the unknown symbol."""
        found = self._listed(name, list, count)
        if any(type(symbol) is not str for vocabulary in found for symbol in vocabulary):
            self.refuse(name, "holds what is not text")
        return tuple((UNKNOWN, *self._distinct(name, vocabulary)) for vocabulary in found)

    def numbers(self, name: str, count: int, *, positive: bool = False) -> list[float]:
        """So many finite numbers from hexadecimal text."""
        values = []
        for text in self._listed(name, str, count):
            try:
                value = float.fromhex(text)
            except (ValueError, OverflowError):
                self.refuse(name, f"holds {text!r}, not a hexadecimal number")
            if not math.isfinite(value) or (positive and value <= 0):
                self.refuse(name, f"holds {text!r}, out of its range")
            values.append(value)
        return values

    def truths(self, name: str, count: int) -> list[bool]:
        """So many truth values."""
        return self._listed(name, bool, count)

    def _distinct(self, name: str, texts: list[str]) -> tuple[str, ...]:
        if "" in texts or len(set(texts)) < len(texts):
            self.refuse(name, "has an empty text or one that is there twice")
        return tuple(texts)


def quoted(names: Sequence[str], most: int = 12) -> str:
    """Names as they are written in a refusal; of many, the first."""
    shown = ", ".join(repr(name) for name in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
