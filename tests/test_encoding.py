"""Splits, scalers and classes: whole sequences on one side, and nothing of the test part in what is fitted."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from throughtime.errors import DataError
from throughtime.tasks.encoding import Scaler, encode, split
from throughtime.tasks.reading import Columns, Sequences

COLUMNS = Columns(sequence_id="id", time="t", target="y", group="g", part="p")


def labelled(labels: str, *, groups: str | None = None, parts: tuple[str, ...] | None = None) -> Sequences:
    rng = np.random.default_rng(0)
    return Sequences(
        name="table",
        source="table.csv",
        columns=COLUMNS,
        features=("a", "b"),
        ids=tuple(str(i) for i in range(len(labels))),
        steps=tuple(rng.normal(size=(int(rng.integers(1, 5)), 2)) for _ in labels),
        labels=tuple(labels),
        groups=tuple(groups) if groups else None,
        parts=parts,
    )


@settings(deadline=None)
@given(
    counts=st.lists(st.integers(2, 30), min_size=2, max_size=5),
    fraction=st.floats(0.05, 0.5),
    seed=st.integers(0, 100),
)
def test_each_class_gives_its_share_of_whole_sequences_to_each_part(
    counts: list[int], fraction: float, seed: int
) -> None:
    sequences = labelled("".join(label * count for label, count in zip("abcde", counts, strict=False)))
    train, test = split(sequences, test_fraction=fraction, seed=seed)
    assert sorted([*train, *test]) == list(range(len(sequences.labels)))
    labels = np.array(sequences.labels)
    for label, count in zip("abcde", counts, strict=False):
        assert (labels[test] == label).sum() == max(1, round(fraction * count))
        assert (labels[train] == label).any()


def test_the_split_is_decided_by_its_seed() -> None:
    sequences = labelled("ab" * 20)
    chosen = [tuple(split(sequences, seed=seed)[1]) for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2]


@settings(deadline=None)
@given(seed=st.integers(0, 20), fraction=st.sampled_from([0.2, 0.25, 0.5]))
def test_a_group_is_never_on_both_sides(seed: int, fraction: float) -> None:
    sequences = labelled("ab" * 24, groups="ppqqrrssttuuvvww" * 3)
    train, test = split(sequences, test_fraction=fraction, seed=seed)
    groups = np.array(sequences.groups)
    assert not set(groups[train]) & set(groups[test])
    assert len(test) == round(fraction * 48) or fraction == 0.2
    assert set(np.array(sequences.labels)[test]) == {"a", "b"}


def test_a_published_split_is_kept() -> None:
    parts = ("train", "test", "train", "test", "train")
    train, test = split(labelled("aabba", parts=parts))
    assert (train.tolist(), test.tolist()) == ([0, 2, 4], [1, 3])


@pytest.mark.parametrize(
    ("sequences", "expected"),
    [
        (labelled("aaab"), "table.csv, column 'y': class 'b' has one sequence"),
        (labelled("aabb", groups="pqrr"), "class 'b' comes from one 'g'"),
        (labelled("aabb", parts=("train", "test", "train", "train")), "'b' has no sequence in the test part"),
        (labelled("aabb", parts=("train", "test", "test", "test")), "'b' has no sequence in the training part"),
        (labelled("aabb", parts=("train", "test", "dev", "test")), "column 'p': 'dev' in sequence '2'"),
        (labelled("aabb", groups="pqpq"), None),
    ],
)
def test_a_class_that_cannot_be_both_learnt_and_tested_is_refused(sequences: Sequences, expected: str | None) -> None:
    if expected is None:
        split(sequences, test_fraction=0.5)
        return
    with pytest.raises(DataError) as refusal:
        split(sequences)
    assert expected in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("fraction", [0, -1, 0.6, float("nan")])
def test_a_test_fraction_out_of_range_is_refused(fraction: float) -> None:
    with pytest.raises(DataError, match="test fraction"):
        split(labelled("aabb"), test_fraction=fraction)


def test_what_is_learnt_from_the_data_does_not_depend_on_the_test_part() -> None:
    parts = ("train", "train", "test", "test") * 4
    sequences = labelled("abab" * 4, parts=parts)
    shifted = replace(
        sequences,
        steps=tuple(
            steps * 100 + 7 if part == "test" else steps for steps, part in zip(sequences.steps, parts, strict=True)
        ),
    )
    plain, other = encode(sequences), encode(shifted)
    torch.testing.assert_close(plain.train.steps, other.train.steps, rtol=0, atol=0)
    rows = torch.cat(plain.train.steps)
    torch.testing.assert_close(rows.mean(dim=0), torch.zeros(2), atol=1e-6, rtol=0)
    torch.testing.assert_close(rows.std(dim=0, correction=0), torch.ones(2))


def test_a_constant_column_becomes_zero_and_is_said() -> None:
    sequences = labelled("abab" * 4)
    constant = replace(
        sequences, steps=tuple(np.column_stack([np.full(len(s), 0.1), s[:, 1]]) for s in sequences.steps)
    )
    encoded = encode(constant)
    assert not torch.cat(encoded.train.steps + encoded.test.steps)[:, 0].any()
    assert encoded.notices == ("column 'a' is 0.1 all through the training part: it teaches nothing",)


def test_classes_are_numbered_by_value_and_labels_found_again() -> None:
    labels = ("10", "9", "b", "2") * 3
    sequences = replace(labelled("abcd" * 3), labels=labels)
    train, _ = split(sequences)
    encoded = encode(sequences)
    assert encoded.vocabulary == ("2", "9", "10", "b")
    assert [encoded.vocabulary[i] for i in encoded.train.classes] == [labels[i] for i in train]


@pytest.mark.parametrize("part", ["train", "test"])
def test_a_range_beyond_float32_is_refused(part: str) -> None:
    sequences = labelled("ababab", parts=("train", "train", "test", "test", part, "train"))
    huge = replace(sequences, steps=(*sequences.steps[:4], np.array([[1e300, 0.0]]), sequences.steps[5]))
    with pytest.raises(DataError, match="column 'a': its range is too wide"):
        encode(huge)


def test_the_scaler_is_the_textbook_one() -> None:
    scaler = Scaler.fit([np.array([[1.0, 4.0]]), np.array([[3.0, 4.0]])])
    torch.testing.assert_close(scaler(np.array([[3.0, 5.0]])), torch.tensor([[1.0, 1.0]]))
