"""One class for every step of a sequence."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from throughtime.data.batches import Part
from throughtime.data.sequences import PER_STEP, Sequences
from throughtime.data.splitting import Strata
from throughtime.tasks.classes import ClassCodec, ClassTask, fitted, majority
from throughtime.tasks.task import Baseline, Words

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from throughtime.tasks.encoding import Encoded


class Tag(ClassTask):
    """The network says at every step of which class that step is."""

    name = "tag"
    role = PER_STEP
    by_step = True
    words = Words(
        help="one at every step",
        unit="steps",
        each="step",
        label="label",
        learner="tagger",
        answer="one of these for every step",
        read_out="at every step",
        spans="spans",
    )

    def strata(self, sequences: Sequences) -> Strata:
        """By the rarest label that each sequence holds."""
        rows = range(len(sequences))
        self._labels(sequences, rows)
        return Strata(tuple(set(sequences.labels_of(i)) for i in rows), each=False, noun="label")

    def caution(self, score: float, count: int) -> str:
        """No standard error: steps are not independent."""
        return "Steps of one sequence resemble one another, so the score is less sure than their number suggests."

    def baselines(self, encoded: Encoded) -> list[Baseline]:
        """Answers that look at no other step.

        Always the commonest label; for each symbol column, the label that its symbol had most often, or the commonest
        of all for an unknown symbol; for numbers, the label whose mean over the training steps is nearest. Ties go to
        the class that comes first.
        """
        from sklearn.neighbors import NearestCentroid

        train, test, inputs, codec = encoded.train, encoded.test, encoded.encoder.inputs, encoded.encoder.codec
        assert isinstance(codec, ClassCodec)
        learnt, asked = _labels(train), _labels(test)
        found = [majority(codec.classes, learnt, asked)]
        for column, name in enumerate(inputs.symbol_columns):
            table = _commonest_by_symbol(_column(train, column), learnt, len(inputs.vocabularies[column]))
            answers = table[_column(test, column)]
            found.append((f"most frequent label of each {name!r}", float((answers == asked).mean())))
        if inputs.features:
            x, y = torch.cat(train.steps).numpy(), torch.cat(test.steps).numpy()
            found.append(("nearest mean of a label's steps", fitted(NearestCentroid(), x, learnt, y, asked)))
        return [Baseline(name, score) for name, score in found]


def _labels(part: Part) -> NDArray[np.int64]:
    """Of all steps, sequence after sequence."""
    return torch.cat(tuple(part.targets)).numpy()


def _column(part: Part, column: int) -> NDArray[np.int64]:
    return torch.cat([symbols[:, column] for symbols in part.symbols]).numpy()


def _commonest_by_symbol(symbols: NDArray[np.int64], labels: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """For each symbol the label that it has most often: [size]; for the unknown one, the commonest of all."""
    counts = np.zeros((size, int(labels.max()) + 1), dtype=np.int64)
    np.add.at(counts, (symbols, labels), 1)
    counts[0] = counts.sum(axis=0)
    return counts.argmax(axis=1)
