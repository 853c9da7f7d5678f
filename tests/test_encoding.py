"""Scalers, vocabularies and classes: fitted on the training part alone, written down to the bit, found again."""

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from as_typed import classes_of, encode, encoder_of, split, targets_of
from hypothesis import given
from hypothesis import strategies as st

from throughtime.data.batches import Part
from throughtime.data.encoding import UNKNOWN, Scaler
from throughtime.data.sequences import PER_SEQUENCE, PER_STEP, Columns, Sequences
from throughtime.errors import DataError
from throughtime.tasks.encoding import Encoder

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
    train = split(sequences).train
    encoded = encode(sequences)
    assert classes_of(encoded) == ("2", "9", "10", "b")
    assert [classes_of(encoded)[i] for i in targets_of(encoded.train)] == [labels[i] for i in train]


@pytest.mark.parametrize("part", ["train", "test"])
def test_a_range_beyond_float32_is_refused(part: str) -> None:
    sequences = labelled("ababab", parts=("train", "train", "test", "test", part, "train"))
    huge = replace(sequences, steps=(*sequences.steps[:4], np.array([[1e300, 0.0]]), sequences.steps[5]))
    with pytest.raises(DataError, match="column 'a': its range is too wide"):
        encode(huge)


def test_the_scaler_is_the_textbook_one() -> None:
    scaler = Scaler.fit([np.array([[1.0, 4.0]]), np.array([[3.0, 4.0]])])
    torch.testing.assert_close(scaler(np.array([[3.0, 5.0]])), torch.tensor([[1.0, 1.0]]))


# Symbols and steps


def tagged() -> Sequences:
    """Two sentences to learn from and one to test, with a number, a word and a part of speech for each step."""
    return Sequences(
        name="small",
        source="small.conll",
        columns=Columns("id", "y", part="p", symbols=("word", "pos")),
        features=("a",),
        ids=("1", "2", "3"),
        steps=tuple(np.arange(length, dtype=np.float64)[:, None] for length in (2, 1, 3)),
        labels=(("B", "O"), ("O",), ("O", "O", "B")),
        parts=("train", "train", "test"),
        role=PER_STEP,
        symbols=(
            (("the", "D"), ("dog", "N")),
            (("runs", "V"),),
            (("the", "D"), ("cat", "N"), ("slowly", "A")),
        ),
        symbol_columns=("word", "pos"),
    )


def test_every_symbol_of_the_training_part_has_a_number_and_all_others_are_unknown() -> None:
    encoded = encode(tagged())
    encoder = encoded.encoder
    assert encoder.vocabularies == ((UNKNOWN, "dog", "runs", "the"), (UNKNOWN, "D", "N", "V"))
    assert [symbols.tolist() for symbols in encoded.train.symbols] == [[[3, 1], [1, 2]], [[2, 3]]]
    assert [symbols.tolist() for symbols in encoded.test.symbols] == [[[3, 1], [0, 2], [0, 0]]]
    assert classes_of(encoded) == classes_of(encoder) == ("B", "O")
    assert isinstance(encoded.test.targets, tuple)
    assert encoded.test.targets[0].tolist() == [1, 1, 0]
    assert encoded.notices == (
        "2 of 3 symbols in column 'word' of the test part are not in the training part and are read as unknown",
        "1 of 3 symbols in column 'pos' of the test part are not in the training part and are read as unknown",
    )


def test_what_is_fitted_does_not_depend_on_the_validation_part() -> None:
    sequences = labelled("abab" * 8)
    encoded = encode(sequences, validation_fraction=0.25)
    assert encoded.validation is not None
    assert (len(encoded.train), len(encoded.validation), len(encoded.test)) == (18, 6, 8)
    chosen = split(sequences, validation_fraction=0.25)
    shifted = replace(
        sequences,
        steps=tuple(steps + 9 * (i in chosen.validation) for i, steps in enumerate(sequences.steps)),
    )
    torch.testing.assert_close(
        encode(shifted, validation_fraction=0.25).train.steps, encoded.train.steps, rtol=0, atol=0
    )
    assert encode(sequences).validation is None


def test_a_batch_is_padded_with_zeros_behind_each_end() -> None:
    train = encode(tagged()).train
    batch = train.batch()
    assert (batch.x.shape, batch.symbols.shape, batch.targets.shape) == ((2, 2, 1), (2, 2, 2), (2, 2))
    assert batch.lengths.tolist() == train.lengths.tolist() == [2, 1]
    assert not batch.x[1, 1].any()
    assert batch.symbols[:, 1].tolist() == [[2, 3], [0, 0]]
    assert batch.targets.tolist() == [[0, 1], [1, 0]]
    turned = train.batch(torch.tensor([1, 0]))
    assert torch.equal(turned.x, batch.x.flip(1))
    assert len(turned) == 2
    classified = Part((torch.ones(2, 1), torch.ones(1, 1)), torch.tensor([4, 5])).subset([1, 0, 1])
    assert targets_of(classified).tolist() == [5, 4, 5]
    assert classified.batch([2]).targets.tolist() == [5]
    assert classified.batch().symbols.shape == (2, 3, 0)


def test_columns_are_found_by_name_in_any_order() -> None:
    sequences = tagged()
    encoder = encoder_of(sequences)
    turned = replace(
        sequences,
        symbols=tuple(tuple(step[::-1] for step in steps) for steps in sequences.symbols),
        symbol_columns=("pos", "word"),
    )
    for left, right in zip(encoder.part(turned).symbols, encoder.part(sequences).symbols, strict=True):
        assert torch.equal(left, right)


MISFITS: dict[str, tuple[dict[str, Any], str]] = {
    "a feature too many": (
        {"features": ("a", "b"), "steps": tuple(np.zeros((n, 2)) for n in (2, 1, 3))},
        "small.conll, column 'b': was not in training; remove it (the feature columns there were 'a')",
    ),
    "a feature missing": (
        {"features": (), "steps": tuple(np.zeros((n, 0)) for n in (2, 1, 3))},
        "small.conll: no feature column 'a', which was in training; add it (the feature columns are none)",
    ),
    "another symbol column": ({"symbol_columns": ("word", "tag")}, "no symbol column 'pos', which was in training"),
    "another task": (
        {"role": PER_SEQUENCE, "labels": ("B", "O", "O")},
        "with one label for each sequence, and this model",
    ),
    "a new label": (
        {"labels": (("B", "O"), ("O",), ("O", "X", "B"))},
        "small.conll, column 'y': label 'X' in sequence '3', step 2 was not in training, which had 'B', 'O'; mend it",
    ),
    "no labels": ({"labels": ()}, "small.conll: was read without labels"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_a_file_that_does_not_fit_the_training_file_is_refused(case: str) -> None:
    change, expected = MISFITS[case]
    encoder = encoder_of(tagged())
    with pytest.raises(DataError) as refusal:
        encoder.part(replace(tagged(), **change))
    assert expected in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_without_labels_a_part_has_none() -> None:
    encoder = encoder_of(tagged())
    part = encoder.part(replace(tagged(), labels=()), labelled=False)
    assert (part.labelled, part.batch().targets.shape) == (False, (0,))
    with pytest.raises(DataError, match="was read without labels"):
        encoder_of(replace(tagged(), labels=()))


def test_a_single_class_is_refused_before_anything_is_split() -> None:
    with pytest.raises(DataError, match="column 'y': only one class, 'a': a classifier needs two or more"):
        encode(labelled("aaaa"))
    with pytest.raises(DataError, match="only one label, 'O': a tagger needs two or more"):
        encode(replace(tagged(), labels=(("O", "O"), ("O",), ("O", "O", "O"))))
    with pytest.raises(DataError, match="only one class, 'a'"):
        encoder_of(labelled("abab"), [0, 2])


def test_a_step_of_a_stream_is_encoded_as_the_file_would_be() -> None:
    sequences = tagged()
    encoder = encoder_of(sequences, [0, 1])
    part = encoder.part(sequences, [2])
    for t, (word, pos) in enumerate(sequences.symbols[2]):
        number = float(sequences.steps[2][t, 0])
        for values in ({"pos": pos, "a": number, "word": word}, [number, word, pos], (int(number), word, pos)):
            x, symbols = encoder.step(values)
            assert torch.equal(x, part.steps[0][t])
            assert torch.equal(symbols, part.symbols[0][t])


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1.0, "the"], "2 values where a step has 3: 'a', 'word', 'pos'; give each one"),
        ({"a": 1.0, "word": "the"}, "column 'pos' is missing; a step has 'a', 'word', 'pos'"),
        ({"a": 1, "word": "the", "pos": "D", "b": 1}, "column 'b' was not in training; leave it out"),
        ([math.nan, "the", "D"], "column 'a': nan is not a finite number"),
        ([10**400, "the", "D"], "is not a finite number"),
        ([None, "the", "D"], "column 'a': None is not a finite number"),
        (["1", "the", "D"], "column 'a': '1' is not a finite number"),
        ([1e300, "the", "D"], "column 'a': out of float32's range once scaled"),
        ([1, "the", 3], "column 'pos': 3 is not a symbol"),
        ([1, "", "D"], "column 'word': '' is not a symbol"),
        ("the", "1 values where a step has 3"),
    ],
)
def test_a_step_that_does_not_fit_is_refused(values: Any, expected: str) -> None:
    with pytest.raises(DataError) as refusal:
        encoder_of(tagged()).step(values)
    assert expected in str(refusal.value)


# JSON


@given(
    numbers=st.lists(st.floats(-1e30, 1e30, allow_subnormal=True), min_size=2, max_size=8),
    symbols=st.lists(st.text(min_size=1), min_size=1, max_size=5),
)
def test_an_encoder_goes_through_json_to_the_bit(numbers: list[float], symbols: list[str]) -> None:
    length = len(numbers)
    sequences = replace(
        tagged(),
        steps=(np.array(numbers)[:, None],) * 3,
        labels=(("B", "O") * length, ("O",) * length, ("B",) * length),
        symbols=(tuple((symbols[t % len(symbols)], "D") for t in range(length)),) * 3,
    )
    encoder = encoder_of(sequences)
    again = Encoder.from_json(json.loads(json.dumps(encoder.to_json())))
    for name in ("mean", "scale", "constant"):
        left, right = getattr(again.inputs.scaler, name), getattr(encoder.inputs.scaler, name)
        assert (left.tobytes(), left.dtype, left.shape) == (right.tobytes(), right.dtype, right.shape)
    for name in ("task", "features", "symbol_columns", "vocabularies"):
        assert getattr(again, name) == getattr(encoder, name)
    assert classes_of(again) == classes_of(encoder)


DAMAGED: dict[str, tuple[dict[str, Any], str]] = {
    "another format": ({"format": 2}, "'format' is 2, and this version reads 1"),
    "another task": ({"task": "guess"}, "'task' is 'guess'"),
    "features that are no list": ({"features": "a"}, "'features' is not a list of str"),
    "a feature twice": ({"features": ["a", "a"]}, "'features' has an empty text or one that is there twice"),
    "a feature that is a symbol too": ({"symbol_columns": ["a", "pos"]}, "'symbol_columns' repeats a feature"),
    "too few means": ({"mean": []}, "'mean' has 0 values where 1 belong"),
    "a mean in decimals": ({"mean": [1.5]}, "'mean' is not a list of str"),
    "a mean that is none": ({"mean": ["spam"]}, "'mean' holds 'spam', not a hexadecimal number"),
    "a mean that is too large": ({"mean": ["0x1p+99999"]}, "'mean' holds '0x1p+99999', not a hexadecimal number"),
    "an infinite mean": ({"mean": ["inf"]}, "'mean' holds 'inf', out of its range"),
    "a scale of zero": ({"scale": ["0x0p+0"]}, "'scale' holds '0x0p+0', out of its range"),
    "a scale that is not a number": ({"scale": ["nan"]}, "'scale' holds 'nan', out of its range"),
    "a truth of one": ({"constant": [1]}, "'constant' is not a list of bool"),
    "a vocabulary too few": ({"vocabularies": [["dog"]]}, "'vocabularies' has 1 values where 2 belong"),
    "a vocabulary that is text": ({"vocabularies": ["dog", "N"]}, "'vocabularies' is not a list of list"),
    "a vocabulary of numbers": ({"vocabularies": [[1], ["N"]]}, "'vocabularies' holds what is not text"),
    "a symbol twice": ({"vocabularies": [["a", "a"], ["N"]]}, "'vocabularies' has an empty text or one"),
    "an empty symbol": ({"vocabularies": [[""], ["N"]]}, "'vocabularies' has an empty text or one"),
    "one class": ({"classes": ["B"]}, "'classes' has fewer than two"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_encoder_is_refused_by_name(case: str) -> None:
    change, expected = DAMAGED[case]
    with pytest.raises(DataError) as refusal:
        Encoder.from_json({**encoder_of(tagged()).to_json(), **change}, "run/encoder.json")
    assert f"run/encoder.json: {expected}" in str(refusal.value)


def test_an_encoder_that_lacks_an_entry_or_is_none_is_refused() -> None:
    whole = encoder_of(tagged()).to_json()
    for name in whole:
        lacking = {key: value for key, value in whole.items() if key != name}
        with pytest.raises(DataError, match=f"'{name}' is"):
            Encoder.from_json(lacking)
    others: list[object] = [None, [], "encoder", 1]
    for nothing in others:
        with pytest.raises(DataError, match="is not an encoder's data"):
            Encoder.from_json(nothing)
