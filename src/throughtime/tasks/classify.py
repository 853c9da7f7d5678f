"""One class for a whole sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from throughtime.data.batches import Part
from throughtime.data.sequences import PER_SEQUENCE, Sequences
from throughtime.data.splitting import Strata
from throughtime.tasks.classes import ClassCodec, ClassTask, fitted, majority
from throughtime.tasks.task import Baseline, Words

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from throughtime.tasks.encoding import Encoded


class Classify(ClassTask):
    """The network reads the whole sequence, then says of which class it is."""

    name = "classify"
    role = PER_SEQUENCE
    by_step = False
    words = Words(
        help="one answer at the end",
        unit="sequences",
        each="sequence",
        label="class",
        learner="classifier",
        answer="one of these for a whole sequence",
        read_out="at the last step",
        spans="needs",
    )

    def strata(self, sequences: Sequences) -> Strata:
        """Every class is learnt and tested, in equal shares."""
        self._labels(sequences, range(len(sequences)))
        return Strata(tuple({sequences.labels_of(i)[0]} for i in range(len(sequences))), each=True, noun="class")

    def caution(self, score: float, count: int) -> str:
        """By its standard error."""
        error = 100 * self.standard_error(score, count)
        return f"One standard error of a score on {count:,} sequences is {error:.1f} points."

    def baselines(self, encoded: Encoded) -> list[Baseline]:
        """Answers that look at no order of steps.

        Always the training part's commonest class; for numbers, the class of the nearest training sequence by the mean
        of each feature over its steps (1-nearest neighbour, Euclidean, features scaled); for symbols, multinomial naive
        Bayes on their counts, with one added to each (Manning, Raghavan and Schuetze 2008, chapter 13). Ties go to the
        class that comes first.
        """
        from sklearn.naive_bayes import MultinomialNB
        from sklearn.neighbors import KNeighborsClassifier

        train, test, inputs, codec = encoded.train, encoded.test, encoded.encoder.inputs, encoded.encoder.codec
        assert isinstance(codec, ClassCodec)
        learnt, asked = _classes(train), _classes(test)
        found = [majority(codec.classes, learnt, asked)]
        if inputs.features:
            nearest = KNeighborsClassifier(n_neighbors=1)
            found.append(("1-nearest neighbour on means", fitted(nearest, _means(train), learnt, _means(test), asked)))
        if inputs.symbol_columns:
            sizes = [len(vocabulary) for vocabulary in inputs.vocabularies]
            name = "naive Bayes on " + ", ".join(repr(column) for column in inputs.symbol_columns)
            score = fitted(MultinomialNB(), _counts(train, sizes), learnt, _counts(test, sizes), asked)
            found.append((name, score))
        return [Baseline(name, score) for name, score in found]


def _classes(part: Part) -> NDArray[np.int64]:
    assert isinstance(part.targets, Tensor)
    return part.targets.numpy()


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
