"""The estimators keep scikit-learn's promises, and read arrays, lists, frames and words as the sequences they are."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn import config_context
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.metrics import log_loss
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

import throughtime as tt
from throughtime.data.arrays import sequences_of
from throughtime.errors import DataError, ThroughtimeError
from throughtime.estimators import SequenceClassifier, SequenceTagger

QUICK: dict[str, Any] = {"hidden_size": 8, "epochs": 8, "batch_size": 64, "learning_rate": 0.05}
SMALL: dict[str, Any] = {"hidden_size": 8, "epochs": 25, "batch_size": 16, "learning_rate": 0.03, "random_state": 0}

IN_CONTEXT = (
    "rows are the steps of one recording: an answer depends on the rows before it, so on their order and company"
)


def expected_failures(estimator: Any) -> dict[str, str]:
    if isinstance(estimator, SequenceClassifier):
        return {}
    return dict.fromkeys(("check_methods_sample_order_invariance", "check_methods_subset_invariance"), IN_CONTEXT)


@parametrize_with_checks(
    [SequenceClassifier(**QUICK), SequenceTagger(**QUICK)], expected_failed_checks=expected_failures, xfail_strict=True
)
def test_what_scikit_learn_expects_of_an_estimator(estimator: Any, check: Any) -> None:
    check(estimator)


@pytest.fixture(scope="module")
def ragged() -> tuple[list[np.ndarray], list[str]]:
    """Sequences of 2 to 8 steps and two features, named by the sign of the first step's first feature."""
    draw = np.random.default_rng(0)
    steps = [draw.normal(size=(draw.integers(2, 9), 2)) for _ in range(80)]
    return steps, ["up" if each[0, 0] > 0 else "down" for each in steps]


@pytest.fixture(scope="module")
def tagged() -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Univariate sequences; each step is named by the sign of the step before it."""
    draw = np.random.default_rng(0)
    steps = [draw.normal(size=draw.integers(2, 9)) for _ in range(80)]
    return steps, [np.where(np.r_[0.0, each[:-1]] > 0, "after up", "else") for each in steps]


def padded(steps: list[np.ndarray], fill: float = np.nan) -> tuple[np.ndarray, list[int]]:
    lengths = [len(each) for each in steps]
    x = np.full((len(steps), max(lengths), steps[0].shape[1]), fill)
    for row, each in zip(x, steps, strict=True):
        row[: len(each)] = each
    return x, lengths


def test_padded_sequences_with_lengths_are_those_in_a_list_whatever_the_padding_holds(ragged: Any) -> None:
    steps, labels = ragged
    x, lengths = padded(steps)
    listed = SequenceClassifier(**SMALL).fit(steps, labels)
    with_lengths = SequenceClassifier(**SMALL).fit(x, labels, lengths=lengths)
    assert np.array_equal(listed.predict_proba(steps), with_lengths.predict_proba(x, lengths=lengths))
    assert with_lengths.score(x, labels, lengths=lengths) == listed.score(steps, labels) > 0.9
    assert with_lengths.n_features_in_ == 2


def test_lengths_are_not_forgotten_between_fit_and_score(ragged: Any) -> None:
    steps, labels = ragged
    x, lengths = padded(steps, fill=0.0)
    model = SequenceClassifier(**SMALL).fit(x, labels, lengths=lengths)
    with pytest.raises(DataError, match="it was fitted with lengths"):
        model.score(x, labels)
    with config_context(enable_metadata_routing=True):
        asking = SequenceClassifier(**SMALL).set_fit_request(lengths=True).set_score_request(lengths=True)
        search = GridSearchCV(asking, {"hidden_size": [8]}, cv=2).fit(x, labels, lengths=np.array(lengths))
    by_list = GridSearchCV(SequenceClassifier(**SMALL), {"hidden_size": [8]}, cv=2).fit(steps, labels)
    assert search.best_score_ == by_list.best_score_


def test_a_table_is_univariate_sequences_one_a_row(ragged: Any) -> None:
    steps, labels = ragged
    table = np.stack([each[:2, 0] for each in steps])
    by_table = SequenceClassifier(**SMALL).fit(table, labels)
    by_list = SequenceClassifier(**SMALL).fit(list(table), labels)
    by_frame = SequenceClassifier(**SMALL).fit(pd.DataFrame(table, columns=["t0", "t1"]), labels)
    padded_array = SequenceClassifier(**SMALL).fit(table[:, :, None], labels)
    series = pd.Series(list(table), index=range(7, 7 + len(table)))
    assert np.array_equal(by_table.predict(series), by_table.predict(table))
    for other in (by_list, padded_array):
        assert np.array_equal(by_table.predict_proba(table), other.predict_proba(list(table)))
    assert (by_table.n_features_in_, by_list.n_features_in_) == (2, 1)
    assert by_frame.feature_names_in_.tolist() == ["t0", "t1"]
    longer = [np.array([1.0, 2.0, 3.0])]
    assert by_table.predict(longer).shape == (1,)
    with pytest.raises(ValueError, match="X has 3 features, but SequenceClassifier is expecting 2"):
        by_table.predict(np.zeros((1, 3)))


def test_frames_give_numbers_and_symbols_by_the_type_of_their_columns() -> None:
    draw = np.random.default_rng(0)
    frames = [pd.DataFrame({"pitch": draw.normal(size=3), "word": draw.choice(["a", "b"], 3)}) for _ in range(60)]
    labels = [frame["word"].iloc[0] for frame in frames]
    model = SequenceClassifier(**SMALL).fit(frames, labels)
    assert model.score(frames, labels) == 1
    assert (model.encoder_.features, model.encoder_.symbol_columns) == (("pitch",), ("word",))
    with pytest.raises(DataError, match=r"X has 1 features a step \(pitch\), but SequenceClassifier was fitted on"):
        model.predict([frame[["pitch"]] for frame in frames])


def test_words_are_tagged_by_what_came_before_them() -> None:
    draw = np.random.default_rng(0)
    words = [draw.choice(["to", "the", "run"], size=draw.integers(2, 7)).tolist() for _ in range(60)]
    tags = [["after " + before for before in ["nothing", *each[:-1]]] for each in words]
    model = SequenceTagger(**SMALL).fit(words, tags)
    assert model.score(words, tags) > 0.9
    assert [len(each) for each in model.predict(words)] == [len(each) for each in words]
    alone = model.predict_proba([words[0]])[0]
    assert np.allclose(alone, model.predict_proba(words)[0], atol=1e-6), "its company changes nothing"
    in_pairs = SequenceTagger(**SMALL).fit([[(w, w[0]) for w in each] for each in words], tags)
    assert in_pairs.n_features_in_ == 2


def test_one_recording_cut_by_lengths_is_the_list_of_its_pieces(tagged: Any) -> None:
    steps, labels = tagged
    lengths = [len(each) for each in steps]
    rows, names = np.concatenate(steps)[:, None], np.concatenate(labels)
    whole = SequenceTagger(**SMALL).fit(rows, names, lengths=lengths)
    pieces = SequenceTagger(**SMALL).fit(steps, labels)
    assert np.array_equal(whole.predict(rows, lengths=lengths), np.concatenate(pieces.predict(steps)))
    assert whole.score(rows, names, lengths=lengths) == pieces.score(steps, labels) > 0.9
    x, _ = padded([each[:, None] for each in steps])
    y = np.full(x.shape[:2], "padding", dtype=object)
    for row, each in zip(y, labels, strict=True):
        row[: len(each)] = each
    assert SequenceTagger(**SMALL).fit(x, y, lengths=lengths).score(x, y, lengths=lengths) == pieces.score(
        steps, labels
    )


def test_a_grid_search_over_ragged_lists_finds_the_network_that_can_learn(ragged: Any, tagged: Any) -> None:
    search = GridSearchCV(SequenceClassifier(**SMALL), {"epochs": [1, 25], "cell": ["gru", tt.LSTM]}, cv=2)
    search.fit(*ragged)
    assert search.best_params_["epochs"] == 25
    assert search.best_score_ > 0.8
    tagger = GridSearchCV(SequenceTagger(**SMALL), {"hidden_size": np.array([8])}, cv=2).fit(*tagged)
    assert tagger.best_score_ > 0.8


def test_pipelines_take_lists_and_tables(ragged: Any) -> None:
    steps, labels = ragged
    first = FunctionTransformer(lambda sequences: [each[:, :1] for each in sequences])
    assert cross_val_score(make_pipeline(first, SequenceClassifier(**SMALL)), steps, labels, cv=2).mean() > 0.8
    table = np.stack([each[:2, 0] for each in steps])
    assert make_pipeline(StandardScaler(), SequenceClassifier(**SMALL)).fit(table, labels).score(table, labels) > 0.9


def test_a_clone_has_the_parameters_and_the_cell_but_no_weights(ragged: Any) -> None:
    fitted = SequenceClassifier(tt.GRU, **SMALL).fit(*ragged)
    copy = clone(fitted)
    assert copy.get_params() == fitted.get_params()
    with pytest.raises(NotFittedError):
        copy.predict(ragged[0])
    copy.set_params(hidden_size=3).fit(*ragged)
    assert copy.model_.recurrent.hidden_size == 3
    assert fitted.model_.recurrent.hidden_size == 8


def test_the_random_state_decides_everything_that_is_drawn(ragged: Any) -> None:
    steps, labels = ragged
    same = [SequenceClassifier(**SMALL, dropout=0.5).fit(steps, labels).predict_proba(steps) for _ in range(2)]
    other = SequenceClassifier(**SMALL | {"random_state": 1}, dropout=0.5).fit(steps, labels).predict_proba(steps)
    assert np.array_equal(same[0], same[1])
    assert not np.array_equal(same[0], other)


def test_patience_stops_by_the_sequences_that_were_kept_apart(ragged: Any) -> None:
    steps, labels = ragged
    settings = SMALL | {"epochs": 200, "patience": 3}
    stopped = SequenceClassifier(**settings).fit(steps, labels)
    assert 3 < len(stopped.loss_curve_) < 200
    assert len(SequenceClassifier(**SMALL).fit(steps, labels).loss_curve_) == SMALL["epochs"]
    with pytest.raises(ThroughtimeError, match="validation_fraction is 2; give a share between 0 and 1"):
        SequenceClassifier(**settings, validation_fraction=2).fit(steps, labels)
    tags = [np.full(len(each), f"only {i}") for i, each in enumerate(steps)]
    with pytest.raises(DataError, match=r"label .*only .* is only in sequences that were kept apart for patience"):
        SequenceTagger(**settings).fit(steps, tags)


def test_probabilities_add_up_and_follow_the_order_of_the_classes(ragged: Any) -> None:
    steps, labels = ragged
    model = SequenceClassifier(**SMALL).fit(steps, labels)
    shares = model.predict_proba(steps)
    assert model.classes_.tolist() == ["down", "up"]
    assert np.allclose(shares.sum(axis=1), 1, rtol=0, atol=1e-15)
    assert log_loss(labels, shares) < 0.5
    assert model.predict(steps).tolist() == model.classes_[shares.argmax(axis=1)].tolist()


def test_a_long_table_becomes_a_list_that_no_split_can_cut() -> None:
    draw = np.random.default_rng(0)
    rows = [(i, t, 10 * (i % 2), draw.normal() + i % 2) for i in range(40) for t in range(2 + i % 3)]
    frame = pd.DataFrame(rows, columns=["id", "t", "label", "pitch"]).sample(frac=1, random_state=0)
    x, y, ids = sequences_of(frame, sequence_id="id", time="t", target="label")
    assert ids == list(range(40))
    assert y == [10 * (i % 2) for i in range(40)]
    assert [each.columns.tolist() for each in x] == [["pitch"]] * 40
    assert np.concatenate([each["pitch"] for each in x]).tolist() == [row[3] for row in rows]
    assert SequenceClassifier(**SMALL).fit(x, y).predict(x[:3]).dtype == np.int64
    x, y, _ = sequences_of(frame, sequence_id="id", time="t", target="label", by_step=True)
    assert SequenceTagger(**SMALL).fit(x, y).score(x, y) > 0.5
    assert sequences_of(frame, sequence_id="id").y == []
    for columns, change, expected in (
        ({"time": "when"}, {}, "no column 'when'"),
        ({"time": "t"}, {"t": 0}, "column 't': 0 twice in sequence"),
        ({"target": "t"}, {}, "column 't' is .* and .* in sequence 0; give one"),
        ({"target": "label"}, {"label": None}, "column 'label' has an empty cell"),
    ):
        with pytest.raises(DataError, match=expected):
            sequences_of(frame.assign(**change), sequence_id="id", **columns)  # type: ignore[arg-type]


def long_frame() -> pd.DataFrame:
    index = pd.MultiIndex.from_product([["a", "b"], [0, 1]], names=["id", "time"])
    return pd.DataFrame({"pitch": [1.0, 2.0, 3.0, 4.0]}, index=index)


@pytest.mark.parametrize(
    ("x", "y", "options", "expected"),
    [
        ([np.ones(3), np.array([1.0, np.nan])], [0, 1], {}, r"X\[1\] holds NaN or an infinite value at step 1"),
        ([np.ones(3), np.ones((3, 2))], [0, 1], {}, r"X\[1\] has 2 features a step, but X\[0\] has 1"),
        ([np.ones(3), np.ones(0)], [0, 1], {}, r"X\[1\] has shape \[0\]"),
        ([np.ones(3), ["a"]], [0, 1], {}, r"X\[1\] holds <U1, but X\[0\] holds numbers"),
        ([["a"], [1.0]], [0, 1], {}, r"X\[1\] is not a sequence of words as X\[0\] is"),
        (["a text", "another"], [0, 1], {}, r"split it, for instance into words"),
        ([], [], {}, "X holds no sequences|minimum of 1 is required"),
        (np.ones((2, 3, 1)), [0, 1], {"lengths": [3, 4]}, r"lengths are \[3, 4\]; beside X of shape \[2, 3, 1\]"),
        (np.ones((2, 3, 1)), [0, 1], {"lengths": [3, 2.5]}, "one whole number for each sequence"),
        ([np.ones(3), np.ones(2)], [0, 1], {"lengths": [3, 2]}, "in a list each sequence has its own"),
        (np.ones((2, 3)), [0, 1], {"lengths": [3, 2]}, "X has no third axis"),
        ([np.ones(3), np.ones(2)], [0, 0], {}, "only one class, .*0.*: a classifier needs two or more"),
        ([np.ones(3), np.ones(2)], [0, 1, 1], {}, "inconsistent numbers of samples"),
        ([np.ones(3), np.ones(2)], None, {}, "requires y to be passed"),
        (long_frame(), [0, 1], {}, "several rows a sequence"),
    ],
)
def test_what_is_no_sequence_is_refused_with_its_place(x: Any, y: Any, options: Any, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        SequenceClassifier(**SMALL).fit(x, y, **options)


@pytest.mark.parametrize(
    ("x", "y", "options", "expected"),
    [
        ([np.ones(3), np.ones(2)], [[0, 1, 0], [0]], {}, r"y\[1\] has 1 labels, but X\[1\] has 2 steps"),
        (np.ones((4, 1)), [0, 1, 0, 1], {"lengths": [3, 2]}, "lengths add up to 5, but X has 4 rows"),
        (np.ones((4, 1)), [0, 1, 0, 1], {"lengths": [4, 0]}, "each is 1 or more"),
        (np.ones((4, 1)), [0, 0, 0, 0], {}, "only one class"),
        ([np.ones(3), np.ones(2)], None, {}, "requires y to be passed"),
    ],
)
def test_labels_that_do_not_fit_the_steps_are_refused(x: Any, y: Any, options: Any, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        SequenceTagger(**SMALL).fit(x, y, **options)


def test_only_who_wants_the_estimators_loads_scikit_learn() -> None:
    program = "import sys, throughtime, throughtime.runs.serve, throughtime.cli; print('sklearn' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "False\n"
