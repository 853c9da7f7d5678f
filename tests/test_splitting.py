"""Splits: whole sequences and groups on one side, every label learnt that is tested, shares as they were asked for."""

from itertools import pairwise

import numpy as np
import pytest
from as_typed import in_words, split
from hypothesis import given, settings
from hypothesis import strategies as st

from throughtime.data.sequences import PER_SEQUENCE, PER_STEP, Columns, Sequences
from throughtime.errors import DataError

COLUMNS = Columns(sequence_id="id", target="y", time="t", group="g", part="p")


def labelled(
    labels: str | list[str], *, groups: str | None = None, parts: tuple[str, ...] | None = None, tag: bool = False
) -> Sequences:
    """Sequences with these classes or, to tag, with a label for each letter."""
    return Sequences(
        name="table",
        source="table.csv",
        columns=COLUMNS,
        features=(),
        ids=tuple(f"s{i}" for i in range(len(labels))),
        steps=tuple(np.empty((len(each), 0)) for each in labels),
        labels=tuple(tuple(each) for each in labels) if tag else tuple(labels),
        groups=tuple(groups) if groups else None,
        parts=parts,
        role=PER_STEP if tag else PER_SEQUENCE,
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
    train, _, test = split(sequences, test_fraction=fraction, seed=seed)
    assert sorted([*train, *test]) == list(range(len(sequences.labels)))
    labels = np.array(sequences.labels)
    for label, count in zip("abcde", counts, strict=False):
        assert (labels[test] == label).sum() == max(1, round(fraction * count))
        assert (labels[train] == label).any()


def test_the_split_is_decided_by_its_seed() -> None:
    sequences = labelled("ab" * 20)
    chosen = [tuple(split(sequences, seed=seed).test) for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2]


@settings(deadline=None)
@given(seed=st.integers(0, 20), fraction=st.sampled_from([0.2, 0.25, 0.5]))
def test_a_group_is_never_on_both_sides(seed: int, fraction: float) -> None:
    sequences = labelled("ab" * 24, groups="ppqqrrssttuuvvww" * 3)
    train, _, test = split(sequences, test_fraction=fraction, seed=seed)
    groups = np.array(sequences.groups)
    assert not set(groups[train]) & set(groups[test])
    assert len(test) == round(fraction * 48) or fraction == 0.2
    assert set(np.array(sequences.labels)[test]) == {"a", "b"}


def test_a_published_split_is_kept() -> None:
    parts = ("train", "test", "train", "test", "train")
    train, _, test = split(labelled("aabba", parts=parts))
    assert (train.tolist(), test.tolist()) == ([0, 2, 4], [1, 3])


@pytest.mark.parametrize(
    ("sequences", "expected"),
    [
        (labelled("aaab"), "table.csv, column 'y': class 'b' has one sequence"),
        (labelled("aabb", groups="pqrr"), "class 'b' comes from one 'g'"),
        (labelled("aabb", parts=("train", "test", "train", "train")), "'b' has no sequence in the test part"),
        (labelled("aabb", parts=("train", "test", "test", "test")), "'b' has no sequence in the training part"),
        (labelled("aabb", parts=("train", "test", "dev", "test")), "column 'p': 'dev' in sequence 's2'"),
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


@settings(deadline=None)
@given(
    counts=st.lists(st.integers(2, 30), min_size=2, max_size=4),
    fractions=st.tuples(st.floats(0.05, 0.5), st.floats(0.05, 0.5)),
    seed=st.integers(0, 100),
)
def test_the_validation_part_is_cut_from_what_the_test_leaves(
    counts: list[int], fractions: tuple[float, float], seed: int
) -> None:
    sequences = labelled("".join(label * count for label, count in zip("abcd", counts, strict=False)) + "ab" * 3)
    shares = {"test_fraction": fractions[0], "validation_fraction": fractions[1]}
    drawn = split(sequences, **shares, seed=seed)
    assert sorted([*drawn.train, *drawn.validation, *drawn.test]) == list(range(len(sequences)))
    assert drawn.test.tolist() == split(sequences, test_fraction=fractions[0], seed=seed).test.tolist()
    labels = np.array(sequences.labels)
    for label in set(sequences.labels):
        rest = int((labels == label).sum() - (labels[drawn.test] == label).sum())
        held = int((labels[drawn.validation] == label).sum())
        assert held == min(rest - 1, max(1, round(fractions[1] * rest)))


def test_groups_are_whole_in_the_validation_part_too() -> None:
    sequences = labelled("ab" * 24, groups="ppqqrrssttuuvvww" * 3)
    parts = [set(np.array(sequences.groups)[part]) for part in split(sequences, validation_fraction=0.25)]
    assert all(parts)
    assert sum(map(len, parts)) == len(set.union(*parts)) == 8


def test_a_published_validation_part_is_kept_and_one_is_cut_where_there_is_none() -> None:
    drawn = split(labelled("abaab", parts=("train", "train", "validation", "test", "test")))
    assert [part.tolist() for part in drawn] == [[0, 1], [2], [3, 4]]
    sequences = labelled("aabb" * 5, parts=("train", "test", "train", "test") * 5)
    cut = split(sequences, validation_fraction=0.4)
    assert cut.test.tolist() == list(range(1, 20, 2))
    assert sorted(sequences.labels[i] for i in cut.validation) == ["a", "a", "b", "b"]
    with pytest.raises(DataError, match="'b' has no sequence in the training part"):
        split(labelled("aabaa", parts=("train", "test", "validation", "train", "test")))
    with pytest.raises(DataError, match="column 'p': marks no sequence 'test'"):
        split(labelled("ab", parts=("train", "train")))


def test_a_published_split_that_tears_a_group_is_refused() -> None:
    parts = ("train", "train", "test", "test")
    assert split(labelled("abab", groups="ppqq", parts=parts)).test.tolist() == [2, 3]
    with pytest.raises(DataError, match="column 'p': the 'g' 'q' is in 'train' and in 'test'; mark the whole group"):
        split(labelled("abab", groups="pqqr", parts=parts))


@pytest.mark.parametrize("fraction", [-0.1, 0.6, float("nan")])
def test_a_validation_fraction_out_of_range_is_refused(fraction: float) -> None:
    with pytest.raises(DataError, match="validation fraction"):
        split(labelled("aabb"), validation_fraction=fraction)


def test_too_few_sequences_for_a_validation_part_are_refused() -> None:
    with pytest.raises(DataError, match="no sequence is left for the validation part"):
        split(labelled("aabb"), validation_fraction=0.5)


@settings(deadline=None)
@given(
    sentences=st.lists(st.text("aaaabbbcde", min_size=1, max_size=6), min_size=12, max_size=60),
    fractions=st.tuples(st.sampled_from([0.2, 0.25, 0.5]), st.sampled_from([0.0, 0.25])),
    by_group=st.booleans(),
    seed=st.integers(0, 20),
)
def test_to_tag_every_label_that_is_tested_is_learnt(
    sentences: list[str], fractions: tuple[float, float], by_group: bool, seed: int
) -> None:
    common = ["abcde"] * 12 if by_group else ["ab"] * 12  # so that some sequence, or some group, can be spared
    groups = "".join("pqrstuvw"[i % 8] for i in range(len(sentences) + 12)) if by_group else None
    sequences = labelled(common + sentences, groups=groups, tag=True)
    drawn = split(sequences, test_fraction=fractions[0], validation_fraction=fractions[1], seed=seed)
    assert sorted([*drawn.train, *drawn.validation, *drawn.test]) == list(range(len(sequences)))
    learnt = {label for i in drawn.train for label in sequences.labels[i]}
    assert learnt == {label for labels in sequences.labels for label in labels}
    if by_group:
        sides = [set(np.array(sequences.groups)[part]) for part in drawn]
        assert all(not left & right for left, right in [*pairwise(sides), (sides[0], sides[2])])


def test_to_tag_a_group_with_a_label_of_its_own_is_learnt_whole() -> None:
    sequences = labelled(["ab", "ab", "ac", "ab", "ab", "ab"], groups="ppqqrr", tag=True)
    for seed in range(8):
        drawn = split(sequences, test_fraction=0.34, seed=seed)
        assert {2, 3} <= set(drawn.train)
    alone = labelled(["ab", "ac", "ad"], groups="pqr", tag=True)
    with pytest.raises(DataError, match="no sequence is left for the test part"):
        split(alone)


def test_to_tag_rare_labels_are_shared_out_as_the_sequences_are() -> None:
    sequences = labelled(["aaaa"] * 80 + ["aaba"] * 20, tag=True)
    for seed in range(5):
        test = split(sequences, test_fraction=0.25, seed=seed).test
        assert sum("b" in sequences.labels[i] for i in test) == 5
        assert len(test) == 25


def test_to_tag_the_share_holds_though_most_labels_are_rare() -> None:
    sequences = labelled(["ab"] * 50 + [f"a{label}" for label in "cdefghijklm" for _ in range(2)], tag=True)
    assert abs(len(split(sequences, test_fraction=0.25).test) - 18) <= 4


def test_to_tag_a_published_split_with_a_label_that_is_not_learnt_is_refused() -> None:
    with pytest.raises(DataError, match="column 'y': label 'c' has no sequence in the training part"):
        split(labelled(["ab", "bc"], parts=("train", "test"), tag=True))


def test_the_split_is_told_in_words() -> None:
    plain = labelled("aabb")
    assert in_words(plain, seed=3) == "by whole sequences, 25% of each class for the test, drawn with seed 3"
    assert "then 20% of each class of the rest for validation" in in_words(plain, validation_fraction=0.2)
    assert "25% for the test" in in_words(labelled(["ab"], tag=True))
    assert in_words(labelled("ab", groups="pq")).startswith("by whole groups of one 'g', 25%")
    published = labelled("ab", parts=("train", "test"))
    assert in_words(published) == "as the column 'p' says"
    assert in_words(published, validation_fraction=0.1).startswith("as the column 'p' says; by whole sequences, 10%")
    assert in_words(labelled("ab", parts=("train", "validation")), validation_fraction=0.1) == "as the column 'p' says"
