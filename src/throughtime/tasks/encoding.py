"""From labelled sequences to tensors: split by sequence, scaled by the training part, classes numbered."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from throughtime.errors import DataError
from throughtime.tasks.reading import Sequences

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Part:
    """The training or the test part: a [length, features] tensor per sequence; classes [sequences]."""

    steps: tuple[Tensor, ...]
    classes: Tensor

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def lengths(self) -> Tensor:
        """Steps in each sequence: [sequences], int64."""
        return torch.tensor([len(steps) for steps in self.steps])


@dataclass(frozen=True)
class Encoded:
    """A classification task ready for a network; `vocabulary[i]` is the label of class i, `split` is in words."""

    name: str
    source: str
    split: str
    features: tuple[str, ...]
    vocabulary: tuple[str, ...]
    train: Part
    test: Part
    notices: tuple[str, ...]


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


def encode(sequences: Sequences, *, test_fraction: float = 0.25, seed: int = 0) -> Encoded:
    """Split, scale and number the classes. Nothing of the test part reaches the scaler or the vocabulary.

    Raises `DataError` where a class lacks sequences for one of the parts, or a feature's range exceeds
    float32's.
    """
    train, test = split(sequences, test_fraction=test_fraction, seed=seed)
    scaler = Scaler.fit([sequences.steps[i] for i in train])
    vocabulary = tuple(sorted({sequences.labels[i] for i in train}, key=_by_number_then_text))
    return Encoded(
        name=sequences.name,
        source=sequences.source,
        split=_split_in_words(sequences, test_fraction, seed),
        features=sequences.features,
        vocabulary=vocabulary,
        train=_part(sequences, train, scaler, vocabulary),
        test=_part(sequences, test, scaler, vocabulary),
        notices=(*sequences.notices, *_constant_notices(sequences, scaler)),
    )


def split(
    sequences: Sequences, *, test_fraction: float = 0.25, seed: int = 0
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices of the training and of the test sequences; whole sequences, every class in both parts.

    A `part` column decides alone. Otherwise each class gives `test_fraction` of its sequences, rounded, and
    at least one, to the test part. With a `group` column, whole groups go to one side, and the share is met
    as closely as `1 / round(1 / test_fraction)` and the groups' sizes allow.
    """
    if sequences.parts is not None:
        train, test = _split_as_published(sequences)
    else:
        if not 0 < test_fraction <= 0.5:
            raise DataError(f"the test fraction is {test_fraction}; give a number above 0 and up to 0.5")
        by_group = sequences.groups is not None
        train, test = (_split_by_group if by_group else _split_by_class)(sequences, test_fraction, seed)
    _check_classes(sequences, train, test)
    return train, test


def _split_in_words(sequences: Sequences, test_fraction: float, seed: int) -> str:
    columns = sequences.columns
    if columns.part is not None:
        return f"as the column {columns.part!r} says"
    whole = "sequences" if columns.group is None else f"groups of one {columns.group!r}"
    return f"by whole {whole}, {test_fraction:.0%} of each class for the test, drawn with seed {seed}"


def _split_as_published(sequences: Sequences) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    parts = np.array(sequences.parts)
    unknown = np.flatnonzero(~np.isin(parts, ["train", "test"]))
    if unknown.size:
        i = int(unknown[0])
        raise DataError(
            f"{sequences.source}, column {sequences.columns.part!r}: {str(parts[i])!r} in sequence"
            f" {sequences.ids[i]!r}; write 'train' or 'test'"
        )
    return np.flatnonzero(parts == "train"), np.flatnonzero(parts == "test")


def _split_by_class(
    sequences: Sequences, test_fraction: float, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    from sklearn.model_selection import train_test_split

    labels = np.array(sequences.labels)
    train, test = [], []
    for label, count in sorted(Counter(sequences.labels).items()):
        if count < 2:
            _refuse_small_class(sequences, label, "has one sequence")
        size = max(1, round(test_fraction * count))
        for_train, for_test = train_test_split(np.flatnonzero(labels == label), test_size=size, random_state=seed)
        train.append(for_train)
        test.append(for_test)
    return np.sort(np.concatenate(train)), np.sort(np.concatenate(test))


def _split_by_group(
    sequences: Sequences, test_fraction: float, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    from sklearn.model_selection import StratifiedGroupKFold

    labels, groups = np.array(sequences.labels), np.array(sequences.groups)
    for label in np.unique(labels):
        if len(np.unique(groups[labels == label])) < 2:
            column = sequences.columns.group
            _refuse_small_class(sequences, str(label), f"comes from one {column!r}")
    folds = min(round(1 / test_fraction), min(Counter(sequences.labels).values()), len(np.unique(groups)))
    candidates = StratifiedGroupKFold(n_splits=folds, shuffle=True, random_state=seed).split(labels, labels, groups)
    for train, test in candidates:
        if len(np.unique(labels[test])) == len(np.unique(labels[train])):
            return train, test
    raise DataError(
        f"{sequences.source}: no split by {sequences.columns.group!r} with a test fraction of {test_fraction}"
        " puts every class on both sides; raise the fraction, or add groups to the rarest classes"
    )


def _check_classes(sequences: Sequences, train: NDArray[np.int64], test: NDArray[np.int64]) -> None:
    in_train = {sequences.labels[i] for i in train}
    in_test = {sequences.labels[i] for i in test}
    for label in sorted(in_train ^ in_test):
        lacking = "test" if label in in_train else "training"
        _refuse_small_class(sequences, label, f"has no sequence in the {lacking} part")


def _refuse_small_class(sequences: Sequences, label: str, problem: str) -> None:
    raise DataError(
        f"{sequences.source}, column {sequences.columns.target!r}: class {label!r} {problem}, so it cannot be"
        " both learnt and tested; add sequences of that class or remove it"
    )


def _part(sequences: Sequences, indices: NDArray[np.int64], scaler: Scaler, vocabulary: tuple[str, ...]) -> Part:
    number = {label: i for i, label in enumerate(vocabulary)}
    steps = tuple(scaler(sequences.steps[i]) for i in indices)
    fitted = torch.from_numpy(np.isfinite(scaler.scale))
    for i, scaled in zip(indices, steps, strict=True):
        bad = ~(scaled.isfinite().all(dim=0) & fitted)
        if bad.any():
            column = sequences.features[int(bad.nonzero()[0])]
            raise DataError(
                f"{sequences.source}, column {column!r}: its range is too wide for float32 (seen in sequence"
                f" {sequences.ids[i]!r}); rescale the column, for instance by its logarithm"
            )
    return Part(steps, torch.tensor([number[sequences.labels[i]] for i in indices]))


def _constant_notices(sequences: Sequences, scaler: Scaler) -> tuple[str, ...]:
    return tuple(
        f"column {sequences.features[i]!r} is {scaler.mean[i]:g} all through the training part: it teaches nothing"
        for i in np.flatnonzero(scaler.constant)
    )


def _by_number_then_text(label: str) -> tuple[float, str]:
    try:
        return float(label), label
    except ValueError:
        return float("inf"), label
