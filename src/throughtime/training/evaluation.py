"""How well a network does on sequences that it does not learn from."""

from __future__ import annotations

from throughtime.data.batches import Part
from throughtime.tasks.model import SequenceModel, run_through
from throughtime.tasks.task import Codec, Score


def evaluate(model: SequenceModel, part: Part, codec: Codec | None = None) -> Score:
    """The task's score of the model on a labelled part; `codec` gives the labels their names."""
    score = model.task.score(codec)
    for _, batch, output in run_through(model, part):
        score.add(output, batch)
    return score
