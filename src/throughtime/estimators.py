"""scikit-learn's manners for sequences: estimators to fit, search over, put into pipelines and clone."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.metrics import accuracy_score
from sklearn.model_selection import train_test_split
from sklearn.utils import assert_all_finite, check_array, check_consistent_length, check_random_state, column_or_1d
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from throughtime.data.arrays import Given, is_list_of_sequences, read_list, read_padded, read_recording
from throughtime.data.sequences import Columns, Sequences
from throughtime.equations.cell import Cell
from throughtime.equations.lookup import find
from throughtime.errors import DataError, ThroughtimeError
from throughtime.tasks.classify import Classify
from throughtime.tasks.encoding import Encoder
from throughtime.tasks.model import Architecture, build, outputs
from throughtime.tasks.tag import Tag
from throughtime.tasks.task import Task
from throughtime.training.loop import train
from throughtime.training.recipe import Recipe

Labels = NDArray[Any]


class _SequenceEstimator(BaseEstimator):
    """What both estimators share: the hyperparameters, and the way from labelled sequences to a trained network."""

    _task: Task
    _table = False  # whether it was fitted on a table, whose width every other then has
    _ragged = False  # whether it was fitted on padded sequences with lengths

    def __init__(
        self,
        cell: str | Cell = "gru",
        *,
        hidden_size: int = 32,
        num_layers: int = 1,
        bidirectional: bool = False,
        dropout: float = 0.0,
        embedding_size: int = 32,
        epochs: int = 60,
        batch_size: int = 32,
        learning_rate: float = 5e-3,
        weight_decay: float = 0.0,
        clip: float | Literal["auto"] | None = "auto",
        patience: int | None = None,
        validation_fraction: float = 0.15,
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.cell = cell
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.bidirectional = bidirectional
        self.dropout = dropout
        self.embedding_size = embedding_size
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.clip = clip
        self.patience = patience
        self.validation_fraction = validation_fraction
        self.random_state = random_state

    def _train(self, given: Given, labels: list[NDArray[np.int64]] | NDArray[np.int64]) -> None:
        """Fit scaler and vocabularies on the training sequences alone, then the network; labels count from 0."""
        recipe = Recipe(
            epochs=self.epochs,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            clip=self.clip,
            patience=self.patience,
        )
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        sequences = _sequences(given, self._task, labels)
        for_training, for_validation = self._held_out(labels, seed)
        self.encoder_ = Encoder.fit(self._task, sequences, for_training)
        architecture = Architecture.fitting(
            self.encoder_,
            hidden_size=_plain(self.hidden_size),
            num_layers=_plain(self.num_layers),
            bidirectional=_plain(self.bidirectional),
            dropout=_plain(self.dropout),
            embedding_size=_plain(self.embedding_size),
        )
        cell = self.cell if isinstance(self.cell, Cell) else find(self.cell)
        self.model_ = build(cell, architecture, seed=seed)
        part = self.encoder_.part(sequences, for_training)
        validation = self.encoder_.part(sequences, for_validation) if len(for_validation) else None
        self.loss_curve_ = [each.loss for each in train(self.model_, part, recipe, seed=seed, validation=validation)]

    def _held_out(self, labels: Any, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Places of the sequences to train on and to validate on; where each has one label, both have the same mix."""
        everything = np.arange(len(labels))
        if self.patience is None:
            return everything, everything[:0]
        if not 0 < self.validation_fraction < 1:
            raise ThroughtimeError(f"validation_fraction is {self.validation_fraction}; give a share between 0 and 1")
        stratify = None if self._task.by_step else labels
        kept, held = train_test_split(
            everything, test_size=self.validation_fraction, random_state=seed, stratify=stratify
        )
        only_held = _among(labels, held) - _among(labels, kept)
        if only_held:
            raise DataError(
                f"label {self.classes_[min(only_held)]!r} is only in sequences that were kept apart for patience; lower"
                " validation_fraction, take another random_state, or train without patience"
            )
        return np.sort(kept), np.sort(held)

    def _probabilities(self, given: Given) -> Any:
        """[sequences, classes], or by step a [length, classes] for each sequence; float64 that adds up to 1."""
        if (given.features, given.symbol_columns) != (self.encoder_.features, self.encoder_.symbol_columns):
            raise DataError(
                f"X has {_columns(given.features, given.symbol_columns)}, but {type(self).__name__} was fitted on"
                f" {_columns(self.encoder_.features, self.encoder_.symbol_columns)}; give the same"
            )
        part = self.encoder_.part(_sequences(given, self._task, ()), None, labelled=False)
        shares = [_normalised(output.softmax(-1)) for output in outputs(self.model_, part)]
        return shares if self._task.by_step else np.stack(shares)


class SequenceClassifier(ClassifierMixin, _SequenceEstimator):
    """A recurrent network that reads a whole sequence, then says of which class it is.

    X is one of

    - a 2-D array or data frame [n, T]: one univariate sequence a row, a step a column;
    - a 3-D array [n, T, features]: padded sequences, with `lengths` [n] in every method if they are ragged;
    - a list with one array [length] or [length, features], data frame (a row a step; columns that hold no numbers are
      symbols) or list of words for each sequence.

    y is one label a sequence. A fit on a table takes tables of the same width from then on, as everywhere in
    scikit-learn; sequences of any other length are given as a list of arrays.

    Parameters are those of `throughtime.tasks.model.Architecture` and `throughtime.training.recipe.Recipe`; `cell` is a
    name such as "gru", "module:name" or a `Cell`. With `patience`, training ends after so many epochs without a lower
    loss on `validation_fraction` of the sequences, which are kept apart for that; without it, all are trained on.
    `random_state` decides all that is drawn.

    Attributes
    ----------
    classes_ : array [classes]
        The labels, sorted.
    model_ : throughtime.tasks.model.SequenceModel
        The trained network.
    encoder_ : throughtime.tasks.encoding.Encoder
        The scaler and the vocabularies, fitted on the training sequences.
    loss_curve_ : list of float
        The mean training loss of each epoch.
    n_features_in_ : int
        Columns of the table that it was fitted on; otherwise features of a step.
    feature_names_in_ : array of str
        Names of those columns, where a data frame was given.
    """

    _task = Classify()

    def fit(self, X: Any, y: ArrayLike, lengths: ArrayLike | None = None) -> SequenceClassifier:
        """Train on labelled sequences. Raises ThroughtimeError, or scikit-learn's own ValueError or TypeError."""
        given = self._read(X, lengths, fitting=True)
        labels = _one_each(self, X, y)
        check_classification_targets(labels)
        self.classes_, numbers = np.unique(labels, return_inverse=True)
        if len(self.classes_) < 2:
            raise DataError(f"y holds only one class, {labels[0]!r}: a {self._task.words.learner} needs two or more")
        self._train(given, numbers)
        return self

    def predict_proba(self, X: Any, lengths: ArrayLike | None = None) -> NDArray[np.float64]:
        """Probabilities [n, classes], in the order of `classes_`."""
        check_is_fitted(self)
        shares: NDArray[np.float64] = self._probabilities(self._read(X, lengths))
        return shares

    def predict(self, X: Any, lengths: ArrayLike | None = None) -> Labels:
        """The most likely label of each sequence: [n]."""
        check_is_fitted(self)
        labels: Labels = self.classes_[self.predict_proba(X, lengths).argmax(axis=1)]
        return labels

    def score(
        self, X: Any, y: ArrayLike, sample_weight: ArrayLike | None = None, lengths: ArrayLike | None = None
    ) -> float:
        """The share of sequences whose label is right."""
        return float(accuracy_score(y, self.predict(X, lengths), sample_weight=sample_weight))

    def _read(self, X: Any, lengths: Any, *, fitting: bool = False) -> Given:
        if is_list_of_sequences(X) or _is_padded(X):
            return _read_sequences(self, X, lengths, fitting)
        _refuse_several_rows(X)
        if lengths is not None:
            raise DataError("lengths belong to padded sequences [n, T, features]; X has no third axis")
        if fitting or self._table:
            table = validate_data(self, X, dtype=np.float64, reset=fitting)
        else:
            table = check_array(X, dtype=np.float64)
        if fitting:
            self._table, self._ragged = True, False
        return read_padded(table[:, :, None], None)


class SequenceTagger(_SequenceEstimator):
    """A recurrent network that gives every step of a sequence a label.

    X is one of

    - a 2-D array or data frame [steps, features]: one recording, a row a step; or several end to end, as long as
      `lengths` say in every method. y and all answers then have one entry a row;
    - a 3-D array [n, T, features]: padded sequences, with `lengths` [n] if they are ragged;
    - a list with one array [length] or [length, features], data frame (a row a step; columns that hold no numbers are
      symbols) or list of words (or of tuples of words) for each sequence.

    In the last two cases y is a list with an array of labels for each sequence (or an array [n, T]), and so are all
    answers. Parameters and attributes are those of `SequenceClassifier`, except that `n_features_in_` and
    `feature_names_in_` are always about the features of a step.
    """

    _task = Tag()

    def fit(self, X: Any, y: Any, lengths: ArrayLike | None = None) -> SequenceTagger:
        """Train on labelled steps. Raises ThroughtimeError, or scikit-learn's own ValueError or TypeError."""
        given = self._read(X, lengths, fitting=True)
        rows = self._labels_of_rows(X, y, given)
        check_classification_targets(rows)
        self.classes_, numbers = np.unique(rows, return_inverse=True)
        if len(self.classes_) < 2:
            raise DataError(f"y holds only one class, {rows[0]!r}: a {self._task.words.learner} needs two or more")
        self._train(given, np.split(numbers, np.cumsum(given.lengths)[:-1]))
        return self

    def predict_proba(self, X: Any, lengths: ArrayLike | None = None) -> Any:
        """Probabilities [steps, classes], for each sequence or for all rows of a recording."""
        check_is_fitted(self)
        each = self._probabilities(self._read(X, lengths))
        return each if _one_object_each(X) else np.concatenate(each)

    def predict(self, X: Any, lengths: ArrayLike | None = None) -> Any:
        """The most likely label of each step: [steps], for each sequence or for all rows of a recording."""
        check_is_fitted(self)
        answer = self.predict_proba(X, lengths)
        if _one_object_each(X):
            return [self.classes_[each.argmax(axis=1)] for each in answer]
        return self.classes_[answer.argmax(axis=1)]

    def score(self, X: Any, y: Any, lengths: ArrayLike | None = None) -> float:
        """The share of steps whose label is right, over all sequences."""
        said = self.predict(X, lengths)
        rows = self._labels_of_rows(X, y, self._read(X, lengths))
        return float(accuracy_score(rows, np.concatenate(said) if _one_object_each(X) else said))

    def _read(self, X: Any, lengths: Any, *, fitting: bool = False) -> Given:
        if _one_object_each(X):
            return _read_sequences(self, X, lengths, fitting)
        _refuse_several_rows(X)
        if fitting:
            self._ragged = False
        return read_recording(validate_data(self, X, dtype=np.float64, reset=fitting), lengths)

    def _labels_of_rows(self, X: Any, y: Any, given: Given) -> Labels:
        """One label a step, all sequences end to end; what is padding in y is left out."""
        if not _one_object_each(X):
            return _one_each(self, X, y)
        _require_labels(self, y)
        check_consistent_length(X, y)
        padded = isinstance(y, np.ndarray) and y.ndim == 2
        parts = [column_or_1d(each) for each in y]
        for i, (labels, length) in enumerate(zip(parts, given.lengths, strict=True)):
            if len(labels) != length and not (padded and len(labels) > length):
                raise DataError(f"y[{i}] has {len(labels)} labels, but X[{i}] has {length} steps; give one a step")
        return np.concatenate([labels[:length] for labels, length in zip(parts, given.lengths, strict=True)])


def _plain(value: Any) -> Any:
    """A search hands over NumPy's numbers."""
    return value.item() if isinstance(value, np.generic) else value


def _among(labels: Any, places: NDArray[np.int64]) -> set[int]:
    """The labels of the sequences at these places."""
    return set(np.concatenate([np.atleast_1d(labels[i]) for i in places]).tolist())


def _normalised(shares: Tensor) -> NDArray[np.float64]:
    """In float64 and adding up to 1 in all its digits, as scikit-learn's scores ask of probabilities."""
    exact = shares.double()
    result: NDArray[np.float64] = (exact / exact.sum(-1, keepdim=True)).numpy()
    return result


def _is_padded(x: Any) -> bool:
    return getattr(x, "ndim", None) == 3


def _one_object_each(x: Any) -> bool:
    """Whether the sequences are told apart in X itself: answers then are a list with one array for each."""
    return _is_padded(x) or is_list_of_sequences(x)


def _read_sequences(estimator: _SequenceEstimator, x: Any, lengths: Any, fitting: bool) -> Given:
    """Padded sequences, or one object for each."""
    if _is_padded(x):
        if lengths is None and estimator._ragged and not fitting:
            # A search that slices what fit was given hands nothing to score: padding would be read as steps.
            raise DataError("it was fitted with lengths, so say where these sequences end too; give lengths")
        given = read_padded(np.asarray(x), lengths)
    elif lengths is not None:
        raise DataError("lengths belong to padded sequences [n, T, features]; in a list each sequence has its own")
    else:
        given = read_list(x)
    if fitting:
        estimator._table, estimator._ragged = False, lengths is not None
        estimator.n_features_in_ = len(given.features) + len(given.symbol_columns)
        estimator.__dict__.pop("feature_names_in_", None)  # of an earlier fit on a table
    return given


def _refuse_several_rows(x: Any) -> None:
    if getattr(getattr(x, "index", None), "nlevels", 1) > 1:
        raise DataError(
            "X is a long table, several rows a sequence, which scikit-learn would split between them; make it a list"
            " first: throughtime.data.arrays.sequences_of(X.reset_index(), sequence_id=...)"
        )


def _require_labels(estimator: _SequenceEstimator, y: Any) -> None:
    if y is None:
        raise DataError(
            f"{type(estimator).__name__} requires y to be passed, but the target y is None; give the labels"
        )


def _one_each(estimator: _SequenceEstimator, x: Any, y: Any) -> Labels:
    """y as [n], one label for each entry of X."""
    _require_labels(estimator, y)
    labels: Labels = column_or_1d(y, warn=True)
    assert_all_finite(labels, input_name="y")
    check_consistent_length(x, labels)
    return labels


def _sequences(given: Given, task: Task, labels: Any) -> Sequences:
    """As a file would have given them, the labels written as their numbers."""
    written: Any = tuple(tuple(map(str, each)) for each in labels) if task.by_step else tuple(map(str, labels))
    return Sequences(
        name="X",
        source="X",
        columns=Columns(sequence_id="index", target="y"),
        features=given.features,
        ids=tuple(map(str, range(len(given.steps)))),
        steps=given.steps,
        labels=written,
        role=task.role,
        symbols=given.symbols,
        symbol_columns=given.symbol_columns,
    )


def _columns(features: tuple[str, ...], symbols: tuple[str, ...]) -> str:
    numbers = f"{len(features)} features a step" if features else ""
    words = f"{len(symbols)} symbols a step" if symbols else ""
    named = [name for name in (*features, *symbols) if not name.isdigit()]
    return " and ".join(filter(None, (numbers, words))) + (f" ({', '.join(named)})" if named else "")
