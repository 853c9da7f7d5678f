"""Baselines: each is the textbook's, learnt from the training part and scored on the test part."""

import numpy as np
import pytest
from as_typed import encode

from throughtime.data.sequences import PER_SEQUENCE, PER_STEP, Columns, Sequences
from throughtime.tasks.encoding import Encoded

COLUMNS = Columns("id", "y", part="part")


def task(
    labels: list[str] | list[list[str]],
    test: list[bool],
    numbers: list[list[float]] | None = None,
    words: list[str] | None = None,
) -> Encoded:
    """A task whose sequences are given by one number each step, and one word each step."""
    lengths = [len(each) for each in numbers] if numbers else [len(each.split()) for each in words or []]
    sequences = Sequences(
        name="made",
        source="made.csv",
        columns=COLUMNS,
        features=("a",) if numbers else (),
        ids=tuple(map(str, range(len(labels)))),
        steps=tuple(np.array(each)[:, None] for each in numbers)
        if numbers
        else tuple(np.empty((length, 0)) for length in lengths),
        labels=tuple(each if isinstance(each, str) else tuple(each) for each in labels),  # type: ignore[arg-type]
        parts=tuple("test" if each else "train" for each in test),
        role=PER_SEQUENCE if isinstance(labels[0], str) else PER_STEP,
        symbols=tuple(tuple((word,) for word in each.split()) for each in words) if words else (),
        symbol_columns=("word",) if words else (),
    )
    return encode(sequences)


def scores(encoded: Encoded) -> dict[str, float]:
    return {baseline.name: baseline.score for baseline in encoded.task.baselines(encoded)}


def test_the_majority_is_that_of_the_training_part() -> None:
    encoded = task([*"uuvvv", *"uuuv"], [False] * 5 + [True] * 4, numbers=[[0.0, 1.0]] * 9)
    assert scores(encoded)["always 'v'"] == 0.25


def test_the_nearest_neighbour_is_nearest_by_the_mean_over_a_sequences_own_steps() -> None:
    numbers = [[1.0, 3.0], [9.0], [2.2, 2.4, 2.0], [3.0, 20.0], [5.6]]
    encoded = task([*"uvuvu"], [False, False, True, True, True], numbers=numbers)
    # means: 2 (u), 9 (v) against 2.2 (u), 11.5 (v), 5.6 (nearer to 9, but a u)
    assert scores(encoded) == {"always 'u'": 2 / 3, "1-nearest neighbour on means": pytest.approx(2 / 3)}


def test_naive_bayes_is_the_textbooks_and_does_not_see_unknown_words() -> None:
    # Manning, Raghavan and Schuetze 2008, example 13.1: the worked example, whose answer is yes.
    words = ["Chinese Beijing Chinese", "Chinese Chinese Shanghai", "Chinese Macao", "Tokyo Japan Chinese"]
    asked = ["Chinese Chinese Chinese Tokyo Japan Osaka", "Tokyo Japan Osaka"]
    encoded = task(["yes", "yes", "yes", "no", "yes", "no"], [False] * 4 + [True] * 2, words=[*words, *asked])
    found = scores(encoded)["naive Bayes on 'word'"]
    # yes: 3/4 (3/7)^3 1/14 1/14 = .0003, no: 1/4 (2/9)^3 2/9 2/9 = .0001; of the second: .0038 and .0123
    assert found == 1.0


def test_numbers_and_words_have_a_baseline_each() -> None:
    encoded = task(
        [*"uvuv"], [False, False, True, True], numbers=[[0.0], [1.0], [0.1], [0.9]], words=["a", "b", "b", "a"]
    )
    assert scores(encoded) == {"always 'u'": 0.5, "1-nearest neighbour on means": 1.0, "naive Bayes on 'word'": 0.0}


def test_to_tag_a_word_gets_its_commonest_label_and_an_unknown_one_the_commonest_of_all() -> None:
    labels = [["D", "N", "V", "N"], ["N", "N"], ["D", "V", "N"]]
    words = ["the dog runs run", "run dog", "the run cat"]
    found = scores(task(labels, [False, False, True], words=words))
    assert found == {"always 'N'": pytest.approx(1 / 3), "most frequent label of each 'word'": pytest.approx(2 / 3)}


def test_to_tag_numbers_a_step_gets_the_label_whose_mean_is_nearest() -> None:
    labels = [["u", "u", "v"], ["v", "u"]]
    found = scores(task(labels, [False, True], numbers=[[0.0, 2.0, 10.0], [6.0, 5.0]]))
    assert found == {"always 'u'": 0.5, "nearest mean of a label's steps": 1.0}
