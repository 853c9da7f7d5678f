"""What a Python program holds, read as sequences: arrays, lists of arrays, data frames, lists of words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from throughtime.errors import DataError

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

Symbols = tuple[tuple[str, ...], ...]
"""One sequence of symbols: length x columns of text."""


@dataclass(frozen=True, eq=False)
class Given:
    """Sequences as they were given: numbers [length, features] in float64, or symbols, or both side by side.

    `symbols` is () where there are none. `features` and `symbol_columns` name the columns: those of a data frame, else
    "0", "1", ...
    """

    steps: tuple[NDArray[np.float64], ...]
    symbols: tuple[Symbols, ...]
    features: tuple[str, ...]
    symbol_columns: tuple[str, ...]

    @property
    def lengths(self) -> tuple[int, ...]:
        """Steps in each sequence."""
        return tuple(len(steps) for steps in self.steps)


def is_list_of_sequences(x: object) -> bool:
    """Whether X holds one object per sequence, and is no table: a list or tuple, or an array of objects.

    A list of plain lists of numbers, all of one length, is the table that it would be as an array.
    """
    if hasattr(x, "dtype"):  # an array, or pandas' Series
        return x.ndim == 1 and x.dtype == object  # type: ignore[attr-defined]
    if not isinstance(x, list | tuple) or any(each is None or (np.isscalar(each) and each != str(each)) for each in x):
        return False
    return not x or not _is_table(x)


def _is_table(x: Sequence[Any]) -> bool:
    plain = all(isinstance(row, list | tuple) for row in x)
    return plain and len({len(row) for row in x}) == 1 and all(isinstance(v, int | float) for row in x for v in row)


def read_padded(x: NDArray[Any], lengths: Any) -> Given:
    """Padded sequences [n, T, features] and the length of each; without lengths all are T steps long.

    What lies past an end may be anything. Raises DataError for numbers that are not finite before it, and for lengths
    that do not fit.
    """
    count, longest, width = x.shape
    ends = [longest] * count if lengths is None else _whole_numbers(lengths)
    if len(ends) != count or not all(1 <= end <= longest for end in ends):
        raise DataError(
            f"lengths are {_shown(ends)}; beside X of shape {list(x.shape)} they are {count} whole numbers from 1 to"
            f" {longest}"
        )
    steps = tuple(_finite(_as_numbers(each[:end], i), i) for i, (each, end) in enumerate(zip(x, ends, strict=True)))
    return Given(steps, (), _numbered(width), ())


def read_recording(x: NDArray[np.float64], lengths: Any) -> Given:
    """Steps [steps, features] of sequences laid end to end, as long as `lengths` say; without them, one sequence.

    Raises DataError for lengths that do not add up to the steps.
    """
    bounds = np.cumsum([0, *([len(x)] if lengths is None else _whole_numbers(lengths))])
    if bounds[-1] != len(x) or any(end <= start for start, end in pairwise(bounds)):
        raise DataError(f"lengths add up to {bounds[-1]}, but X has {len(x)} rows, one a step; each is 1 or more")
    steps = tuple(x[start:end] for start, end in pairwise(bounds))
    return Given(steps, (), _numbered(x.shape[1]), ())


def read_list(x: Sequence[Any]) -> Given:
    """One object per sequence: an array [length] or [length, features], a data frame, or a list of words.

    Of a data frame, columns of numbers are features and all others are symbols; words may be tuples of words, one for
    each column. Raises DataError, with the sequence's place in the list, for whatever would have to be guessed.
    """
    x = list(x)
    if not x:
        raise DataError("X holds no sequences; give one or more")
    if isinstance(x[0], str):
        raise DataError("X[0] is a text, not a sequence of steps; split it, for instance into words: text.split()")
    if hasattr(x[0], "columns"):
        return _read_frames(x)
    if _first_symbol(x[0]) is not None:
        return _read_words(x)
    steps = [_finite(_as_numbers(each, i), i) for i, each in enumerate(x)]
    width = steps[0].shape[1]
    for i, each in enumerate(steps):
        if each.shape[1] != width:
            raise DataError(f"X[{i}] has {each.shape[1]} features a step, but X[0] has {width}; give all the same")
    return Given(tuple(steps), (), _numbered(width), ())


class LongTable(NamedTuple):
    """A long table as lists: a data frame of its steps, the label or labels, and the id, for each sequence."""

    x: list[pd.DataFrame]
    y: list[Any]
    ids: list[Any]


def sequences_of(
    frame: pd.DataFrame,
    *,
    sequence_id: str,
    time: str | None = None,
    target: str | None = None,
    by_step: bool = False,
) -> LongTable:
    """A long table, a row a step, as what the estimators take; scikit-learn then cannot split a sequence.

    Sequences are in the order of their ids, steps in that of `time` or else of the rows. All columns without a role are
    kept. y has the target of each sequence, or with `by_step` an array with that of each step; empty without `target`.
    Raises DataError for a column that is missing, an empty cell among ids, times and targets, two rows for one step,
    and, unless `by_step`, a target that changes within a sequence.
    """
    roles = [role for role in (sequence_id, time, target) if role is not None]
    for role in roles:
        if role not in frame.columns:
            raise DataError(f"the frame has no column {role!r}; its columns are {', '.join(map(str, frame.columns))}")
        if frame[role].isna().any():
            raise DataError(f"column {role!r} has an empty cell; fill it or remove the row")
    if time is not None:
        twice = frame.duplicated([sequence_id, time])
        if twice.any():
            name, step = frame.loc[twice, [sequence_id, time]].iloc[0]
            raise DataError(f"column {time!r}: {step!r} twice in sequence {name!r}; keep one row for each step")
        frame = frame.sort_values(time, kind="stable")
    pieces = [(name, rows) for name, rows in frame.groupby(sequence_id, sort=True, observed=True)]
    x = [rows.drop(columns=roles) for _, rows in pieces]
    return LongTable(x, _targets(pieces, target, by_step), [name for name, _ in pieces])


def _targets(pieces: list[tuple[Any, pd.DataFrame]], target: str | None, by_step: bool) -> list[Any]:
    if target is None:
        return []
    if by_step:
        return [rows[target].to_numpy() for _, rows in pieces]
    for name, rows in pieces:
        if rows[target].nunique() > 1:
            labels = " and ".join(repr(label) for label in rows[target].unique()[:2].tolist())
            raise DataError(f"column {target!r} is {labels} in sequence {name!r}; give one, or read all (by_step=True)")
    return [rows[target].iloc[0] for _, rows in pieces]


def _as_numbers(each: Any, place: int) -> NDArray[np.float64]:
    """One sequence as [length, features] in float64."""
    try:
        array = np.asarray(each)
        numbers = array.astype(np.float64) if array.dtype.kind in "biufO" else None
    except (ValueError, TypeError) as error:
        raise DataError(f"X[{place}] cannot be read as numbers ({error}); give an array [length, features]") from error
    if numbers is None:
        raise DataError(f"X[{place}] holds {array.dtype}, but X[0] holds numbers; give all the same")
    if numbers.ndim not in (1, 2) or not len(numbers):
        raise DataError(
            f"X[{place}] has shape {list(numbers.shape)}; a sequence is [length] or [length, features], one step or"
            " more long"
        )
    return numbers[:, None] if numbers.ndim == 1 else numbers


def _finite(steps: NDArray[np.float64], place: int) -> NDArray[np.float64]:
    bad = np.flatnonzero(~np.isfinite(steps).all(axis=1))
    if bad.size:
        raise DataError(
            f"X[{place}] holds NaN or an infinite value at step {bad[0]}; fill it, or, if it is padding, say where the"
            " sequence ends with lengths="
        )
    return steps


def _first_symbol(each: Any) -> str | None:
    """The first word of a sequence of words, or of one of tuples of words; None if it holds anything else."""
    first = each[0] if len(each) else None
    if isinstance(first, list | tuple | np.ndarray) and len(first):
        first = first[0]
    return first if isinstance(first, str) else None


def _read_words(x: Sequence[Any]) -> Given:
    symbols = tuple(tuple(_words_of(step) for step in each) for each in x)
    width = len(symbols[0][0])
    for i, each in enumerate(symbols):
        if not each or any(len(step) != width for step in each):
            raise DataError(
                f"X[{i}] is not a sequence of {'words' if width == 1 else f'{width} words a step'} as X[0] is, or has"
                " no steps; give all the same"
            )
    nothing = tuple(np.zeros((len(each), 0)) for each in symbols)
    return Given(nothing, symbols, (), _numbered(width))


def _words_of(step: Any) -> tuple[str, ...]:
    """A step's words; () if it is anything else."""
    if isinstance(step, str):
        return (step,)
    words = tuple(step) if isinstance(step, list | tuple | np.ndarray) else ()
    return words if all(isinstance(word, str) for word in words) else ()


def _read_frames(x: Sequence[pd.DataFrame]) -> Given:
    from pandas.api.types import is_bool_dtype, is_numeric_dtype

    names = [str(name) for name in x[0].columns]
    numeric = [is_numeric_dtype(dtype) or is_bool_dtype(dtype) for dtype in x[0].dtypes]
    features = [name for name, number in zip(names, numeric, strict=True) if number]
    others = [name for name in names if name not in features]
    steps, symbols = [], []
    for i, frame in enumerate(x):
        if not hasattr(frame, "columns") or sorted(map(str, frame.columns)) != sorted(names):
            raise DataError(f"X[{i}] has not the columns of X[0], which are {', '.join(names)}; give all the same")
        frame = frame.rename(columns=str)
        if frame.isna().any(axis=None):
            raise DataError(f"X[{i}] has an empty cell; fill it or remove the step")
        steps.append(_finite(_as_numbers(frame[features].to_numpy(), i), i))
        symbols.append(tuple(map(tuple, frame[others].astype(str).to_numpy().tolist())))
    return Given(tuple(steps), tuple(symbols) if others else (), tuple(features), tuple(others))


def _whole_numbers(lengths: Any) -> list[int]:
    array = np.asarray(lengths)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise DataError(f"lengths are {_shown(lengths)}; give one whole number for each sequence")
    return [int(length) for length in array]


def _numbered(width: int) -> tuple[str, ...]:
    return tuple(str(column) for column in range(width))


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
