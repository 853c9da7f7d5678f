"""What no network should lose to: answers that look at no order of steps, fitted on the training part alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from throughtime.data.batches import Part
from throughtime.data.encoding import Encoded

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Baseline:
    """A simple answer and its score: the share of the test part's sequences, or steps to tag, that it gets right."""

    name: str
    score: float


def baselines(encoded: Encoded) -> list[Baseline]:
    """The baselines that fit the task and its columns, fitted on the training part and scored on the test part.

    To classify: always the training part's commonest class; for numbers, the class of the nearest training sequence by
    the mean of each feature over its steps (1-nearest neighbour, Euclidean, features scaled); for symbols, multinomial
    naive Bayes on their counts, with one added to each (Manning, Raghavan and Schuetze 2008, chapter 13).

    To tag: always the commonest label; for each symbol column, the label that its symbol had most often, or the
    commonest of all for an unknown symbol; for numbers, the label whose mean over the training steps is nearest.
    Ties go to the class that comes first.
    """
    found = _of_sequences(encoded) if encoded.task == "classify" else _of_steps(encoded)
    return [Baseline(name, score) for name, score in found]


def _of_sequences(encoded: Encoded) -> list[tuple[str, float]]:
    from sklearn.naive_bayes import MultinomialNB
    from sklearn.neighbors import KNeighborsClassifier

    train, test = encoded.train, encoded.test
    learnt, asked = train.classes.numpy(), test.classes.numpy()
    found = [_majority(encoded, learnt, asked)]
    if encoded.features:
        nearest = KNeighborsClassifier(n_neighbors=1)
        found.append(("1-nearest neighbour on means", _score(nearest, _means(train), learnt, _means(test), asked)))
    if encoded.encoder.symbol_columns:
        sizes = [len(vocabulary) for vocabulary in encoded.encoder.vocabularies]
        bayes = MultinomialNB()
        name = "naive Bayes on " + _listing(encoded.encoder.symbol_columns)
        found.append((name, _score(bayes, _counts(train, sizes), learnt, _counts(test, sizes), asked)))
    return found


def _of_steps(encoded: Encoded) -> list[tuple[str, float]]:
    from sklearn.neighbors import NearestCentroid

    train, test = encoded.train, encoded.test
    learnt, asked = torch.cat(tuple(train.targets)).numpy(), torch.cat(tuple(test.targets)).numpy()
    found = [_majority(encoded, learnt, asked)]
    for column, name in enumerate(encoded.encoder.symbol_columns):
        table = _commonest_by_symbol(_column(train, column), learnt, len(encoded.encoder.vocabularies[column]))
        answers = table[_column(test, column)]
        found.append((f"most frequent label of each {name!r}", float((answers == asked).mean())))
    if encoded.features:
        means = NearestCentroid()
        x, y = torch.cat(train.steps).numpy(), torch.cat(test.steps).numpy()
        found.append(("nearest mean of a label's steps", _score(means, x, learnt, y, asked)))
    return found


def _majority(encoded: Encoded, learnt: NDArray[np.int64], asked: NDArray[np.int64]) -> tuple[str, float]:
    commonest = int(np.bincount(learnt).argmax())
    return f"always {encoded.vocabulary[commonest]!r}", float((asked == commonest).mean())


def _score(model: Any, x: NDArray[Any], learnt: NDArray[np.int64], y: NDArray[Any], asked: NDArray[np.int64]) -> float:
    return float((model.fit(x, learnt).predict(y) == asked).mean())


def _means(part: Part) -> NDArray[np.float32]:
    """The mean of each feature over the steps: [sequences, features]."""
    return torch.stack([steps.mean(dim=0) for steps in part.steps]).numpy()


def _counts(part: Part, sizes: Sequence[int]) -> Any:
    """How often each known symbol of each column comes: a sparse [sequences, all vocabularies together]."""
    from scipy.sparse import csr_array

    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    rows, columns = [], []
    for row, symbols in enumerate(part.symbols):
        known = (symbols > 0).numpy()
        columns.append((symbols.numpy() + starts)[known])
        rows.append(np.full(int(known.sum()), row))
    places = np.concatenate(rows), np.concatenate(columns)
    return csr_array((np.ones(len(places[0])), places), shape=(len(part), sum(sizes)))


def _column(part: Part, column: int) -> NDArray[np.int64]:
    return torch.cat([symbols[:, column] for symbols in part.symbols]).numpy()


def _commonest_by_symbol(symbols: NDArray[np.int64], labels: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """For each symbol the label that it has most often: [size]; for the unknown one, the commonest of all."""
    counts = np.zeros((size, int(labels.max()) + 1), dtype=np.int64)
    np.add.at(counts, (symbols, labels), 1)
    counts[0] = counts.sum(axis=0)
    return counts.argmax(axis=1)


def _listing(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names)
