"""Which sequences are learnt from, which decide when to stop, and which are kept for the test."""

from __future__ import annotations

from collections import Counter
from collections.abc import Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, NoReturn

import numpy as np

from throughtime.data.sequences import Sequences
from throughtime.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray

PARTS = ("train", "validation", "test")


class Split(NamedTuple):
    """Indices of the sequences of each part, ascending; `validation` may be empty."""

    train: NDArray[np.int64]
    validation: NDArray[np.int64]
    test: NDArray[np.int64]


@dataclass(frozen=True)
class Strata:
    """What a split balances: the labels that each sequence holds, and whether each of them must be in every part.

    With `each`, a sequence holds one label, and each label gives its share of sequences to each part. Without it, a
    sequence is shared out by the rarest of its labels, rare ones together, and one with a label that no sequence to
    learn from would have stays in the training part. `noun` is what a label is called: "class". A task without labels
    says `Strata(({""},) * n, ...)`: nothing is balanced then.
    """

    held: tuple[Set[str], ...]
    each: bool
    noun: str

    def of(self, among: NDArray[np.int64]) -> NDArray[np.str_]:
        """What each of these sequences is shared out by: its label, of several the one that fewest of them hold."""
        held = [self.held[i] for i in among]
        sequences_with = Counter(label for labels in held for label in labels)
        return np.array([min(labels, key=lambda label: (sequences_with[label], label)) for labels in held])


def split(
    sequences: Sequences,
    strata: Strata,
    *,
    test_fraction: float = 0.25,
    validation_fraction: float = 0.0,
    seed: int = 0,
) -> Split:
    """Draw whole sequences for each part; `validation_fraction` is the share of what the test leaves.

    A `part` column decides alone, but for a validation part where it names none. Otherwise, with `strata.each`, each
    label gives `test_fraction` of its sequences, rounded, and at least one, to the test part, and likewise to the
    validation part while one is left to learn from; `Strata` says what holds without it.

    With a `group` column, whole groups go to one side, and the share is met as closely as `1 / round(1 / fraction)`
    and the groups' sizes allow.

    Raises `DataError` for a fraction outside its range, and where a class lacks sequences or groups for a part.
    """
    _check_fraction("validation", validation_fraction, least=0.0)
    if sequences.parts is not None:
        train, validation, test = _as_published(sequences)
    else:
        _check_fraction("test", test_fraction, least=None)
        everything = np.arange(len(sequences), dtype=np.int64)
        train, test = _draw(sequences, strata, everything, test_fraction, seed, part="test")
        validation = everything[:0]
    if validation_fraction and not validation.size:
        train, validation = _draw(sequences, strata, train, validation_fraction, seed, part="validation")
    drawn = Split(train, validation, test)
    _check_labels(sequences, strata, drawn)
    return drawn


def in_words(
    sequences: Sequences,
    strata: Strata,
    *,
    test_fraction: float = 0.25,
    validation_fraction: float = 0.0,
    seed: int = 0,
) -> str:
    """How `split` with the same arguments divides, for a reader of the results."""
    columns = sequences.columns
    whole = "sequences" if sequences.groups is None else f"groups of one {columns.group!r}"
    each = f" of each {strata.noun}" if strata.each else ""
    rest = f"{validation_fraction:.0%}{each} of the rest for validation" if validation_fraction else ""
    if sequences.parts is not None:
        rest = "" if "validation" in sequences.parts else rest
        own = f"; by whole {whole}, {rest}, drawn with seed {seed}" if rest else ""
        return f"as the column {columns.part!r} says{own}"
    then = f", then {rest}" if rest else ""
    return f"by whole {whole}, {test_fraction:.0%}{each} for the test{then}, drawn with seed {seed}"


def _check_fraction(part: str, fraction: float, least: float | None) -> None:
    if not (0 < fraction <= 0.5 or fraction == least):
        lowest = "above 0 and up to" if least is None else "from 0 to"
        raise DataError(f"the {part} fraction is {fraction}; give a number {lowest} 0.5")


def _as_published(sequences: Sequences) -> Split:
    parts = np.array(sequences.parts)
    unknown = np.flatnonzero(~np.isin(parts, PARTS))
    where = f"{sequences.source}, column {sequences.columns.part!r}"
    if unknown.size:
        i = int(unknown[0])
        raise DataError(
            f"{where}: {str(parts[i])!r} in sequence {sequences.ids[i]!r}; write 'train', 'validation' or 'test'"
        )
    drawn = Split(*(np.flatnonzero(parts == name) for name in PARTS))
    if not drawn.train.size or not drawn.test.size:
        lacking = "test" if drawn.train.size else "train"
        raise DataError(f"{where}: marks no sequence {lacking!r}; mark some of every class so")
    if sequences.groups is not None:
        side = dict(zip(sequences.groups, sequences.parts or (), strict=True))
        torn = next((i for i, group in enumerate(sequences.groups) if side[group] != parts[i]), None)
        if torn is not None:
            group = sequences.groups[torn]
            raise DataError(
                f"{where}: the {sequences.columns.group!r} {group!r} is in {str(parts[torn])!r} and in {side[group]!r};"
                " mark the whole group alike, or leave the group out"
            )
    return drawn


def _draw(
    sequences: Sequences, strata: Strata, among: NDArray[np.int64], fraction: float, seed: int, *, part: str
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The indices kept and those drawn from `among` for this part, both ascending."""
    by_group = sequences.groups is not None
    shared = strata.of(among)
    if strata.each and part == "test":
        _check_sizes(sequences, strata, shared)
    if not strata.each or (by_group and part == "validation"):
        shared = _merged(shared, least=round(1 / fraction))
    choices = (
        _choices_of_groups(np.array(sequences.groups)[among], shared, fraction, seed)
        if by_group
        else [_choose_sequences(shared, fraction, seed)]
    )
    sides = [(among[~chosen], among[chosen]) for chosen in choices]
    if by_group and strata.each:
        sides = [each for each in sides if _covers(strata, *each, part)]
    if not sides:
        _refuse_groups(sequences, strata, fraction, part)
    kept, drawn = sides[0] if strata.each else _best_taught(sequences, strata, sides)
    if not drawn.size:
        raise DataError(
            f"{sequences.source}: no sequence is left for the {part} part; add sequences, or raise the {part} fraction"
        )
    return kept, drawn


def _merged(strata: NDArray[np.str_], least: int) -> NDArray[np.str_]:
    """Strata of fewer than `least` members put together, and with the largest if still fewer."""
    counts = Counter(strata.tolist())
    small = np.array([counts[stratum] < least for stratum in strata.tolist()])
    large = [stratum for stratum in counts if counts[stratum] >= least]
    together = max(large, key=lambda stratum: (counts[stratum], stratum)) if large and small.sum() < least else ""
    return np.where(small, together, strata)


def _choose_sequences(strata: NDArray[np.str_], fraction: float, seed: int) -> NDArray[np.bool_]:
    from sklearn.model_selection import train_test_split

    chosen = np.zeros(len(strata), dtype=bool)
    for stratum, count in sorted(Counter(strata.tolist()).items()):
        size = min(count - 1, max(1, round(fraction * count)))
        if size:
            _, drawn = train_test_split(np.flatnonzero(strata == stratum), test_size=size, random_state=seed)
            chosen[drawn] = True
    return chosen


def _choices_of_groups(
    groups: NDArray[np.str_], strata: NDArray[np.str_], fraction: float, seed: int
) -> list[NDArray[np.bool_]]:
    """Every way that a grouped and stratified fold offers; none for a single group."""
    from sklearn.model_selection import StratifiedGroupKFold

    number = len(np.unique(groups))
    folds = min(round(1 / fraction), min(Counter(strata.tolist()).values()), number)
    if number < 2:
        return []
    divided = StratifiedGroupKFold(folds, shuffle=True, random_state=seed).split(strata, strata, groups)
    return [np.isin(np.arange(len(groups)), drawn) for _, drawn in divided]


def _covers(strata: Strata, kept: NDArray[np.int64], drawn: NDArray[np.int64], part: str) -> bool:
    learnt, tried = ({label for i in side for label in strata.held[i]} for side in (kept, drawn))
    return learnt == tried if part == "test" else tried <= learnt


def _best_taught(
    sequences: Sequences, strata: Strata, sides: list[tuple[NDArray[np.int64], NDArray[np.int64]]]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The choice that loses least when what teaches a label of its own is moved back; the first of several."""
    mended = [_keep_only_teachers(sequences, strata, kept, drawn) for kept, drawn in sides]
    moved = [len(drawn) - len(left) for (_, drawn), (_, left) in zip(sides, mended, strict=True)]
    best = min(range(len(sides)), key=lambda i: (not len(mended[i][1]), moved[i]))
    return mended[best]


def _keep_only_teachers(
    sequences: Sequences, strata: Strata, kept: NDArray[np.int64], drawn: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Move back whatever holds a label that nothing kept has; with its whole group, if there are groups."""
    units = np.array(sequences.ids if sequences.groups is None else sequences.groups)
    known = {label for i in kept for label in strata.held[i]}
    back: set[str] = set()
    for i in drawn:
        if units[i] not in back and not known.issuperset(strata.held[i]):
            back.add(units[i])
            known.update(label for j in drawn[units[drawn] == units[i]] for label in strata.held[j])
    moved = np.isin(units[drawn], list(back))
    return np.sort(np.concatenate([kept, drawn[moved]])), drawn[~moved]


def _check_sizes(sequences: Sequences, strata: Strata, labels: NDArray[np.str_]) -> None:
    """Refuse a class that has only one sequence, or only one group, when drawing for the test."""
    groups = None if sequences.groups is None else np.array(sequences.groups)
    for label in np.unique(labels):
        if groups is None and (labels == label).sum() < 2:
            _refuse_label(sequences, strata, str(label), "has one sequence")
        if groups is not None and len(np.unique(groups[labels == label])) < 2:
            _refuse_label(sequences, strata, str(label), f"comes from one {sequences.columns.group!r}")


def _check_labels(sequences: Sequences, strata: Strata, drawn: Split) -> None:
    in_train, in_validation, in_test = ({label for i in part for label in strata.held[i]} for part in drawn)
    for label in sorted((in_test | in_validation) - in_train):
        _refuse_label(sequences, strata, label, "has no sequence in the training part")
    if strata.each:
        for label in sorted(in_train - in_test):
            _refuse_label(sequences, strata, label, "has no sequence in the test part")


def _refuse_groups(sequences: Sequences, strata: Strata, fraction: float, part: str) -> NoReturn:
    both = f"every {strata.noun} on " + ("both sides" if part == "test" else "the training side")
    raise DataError(
        f"{sequences.source}: no split by {sequences.columns.group!r} with a {part} fraction of {fraction}"
        f" puts {both}; raise the fraction, or add groups to the rarest"
    )


def _refuse_label(sequences: Sequences, strata: Strata, label: str, problem: str) -> NoReturn:
    raise DataError(
        f"{sequences.source}, column {sequences.columns.target!r}: {strata.noun} {label!r} {problem}, so it cannot be"
        f" both learnt and tested; add sequences of that {strata.noun} or remove it"
    )
