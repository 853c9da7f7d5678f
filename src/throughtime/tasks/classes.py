"""Tasks whose every answer is one class: what they share, whether they answer once or at every step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from throughtime.data.batches import Batch, Part
from throughtime.data.encoding import InputEncoder, Stored, quoted
from throughtime.data.sequences import Sequences
from throughtime.equations.cell import Cell
from throughtime.errors import DataError
from throughtime.nn.losses import Losses, class_losses
from throughtime.report import drawing
from throughtime.report.page import Picture, Table
from throughtime.tasks.model import Architecture, SequenceModel
from throughtime.tasks.task import Answer, Codec, Score, Task

if TYPE_CHECKING:
    from numpy.typing import NDArray

MOST_DRAWN = 40
"""So many classes are listed on a card; the confusions of more are not drawn: squares would be too small to see."""


@dataclass(frozen=True, eq=False)
class ClassCodec(Codec):
    """Numbers for labels: `classes[i]` is the label of class i. By step, or one for a sequence."""

    classes: tuple[str, ...]
    by_step: bool

    @property
    def answers(self) -> int:
        """One logit for each class."""
        return len(self.classes)

    def targets(self, sequences: Sequences, rows: Sequence[int]) -> Tensor | tuple[Tensor, ...]:
        """[sequences] int64, or by step a [length] each."""
        require_labels(sequences)
        numbers = [self._numbers_of(sequences, i) for i in rows]
        if not self.by_step:
            return torch.tensor(numbers, dtype=torch.int64).flatten()
        return tuple(torch.tensor(each, dtype=torch.int64) for each in numbers)

    def no_targets(self) -> Tensor | tuple[Tensor, ...]:
        """None of them."""
        return () if self.by_step else torch.zeros(0, dtype=torch.int64)

    @property
    def summary(self) -> str:
        """How many classes there are."""
        return f"{len(self.classes)} classes"

    def to_json(self) -> dict[str, Any]:
        """The labels in order."""
        return {"classes": list(self.classes)}

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {label: i for i, label in enumerate(self.classes)}

    def _numbers_of(self, sequences: Sequences, index: int) -> list[int]:
        known, labels = self._numbers, sequences.labels_of(index)
        try:
            return [known[label] for label in labels]
        except KeyError:
            step = next(i for i, label in enumerate(labels) if label not in known)
            at = f", step {step + 1}" if self.by_step else ""
            raise DataError(
                f"{place(sequences)}: label {labels[step]!r} in sequence {sequences.ids[index]!r}{at} was not in"
                f" training, which had {quoted(self.classes)}; mend it, or train with sequences that have it"
            ) from None


@dataclass(frozen=True, eq=False)
class ClassAnswer(Answer):
    """The probability of each class: `shares` [classes], or [length, classes] by step."""

    classes: tuple[str, ...]
    shares: NDArray[np.float32]

    @property
    def is_finite(self) -> bool:
        """NaN has no most likely class."""
        return bool(np.isfinite(self.shares).all())

    @property
    def labels(self) -> list[str]:
        """The most likely label, or that of each step."""
        return [self.classes[i] for i in np.atleast_2d(self.shares).argmax(axis=1)]

    def record(self) -> dict[str, Any]:
        """`label` and `probabilities`; by step `labels`, and a list of probabilities for each class."""
        said: dict[str, Any] = {"labels": self.labels} if self.shares.ndim == 2 else {"label": self.labels[0]}
        return said | {"probabilities": dict(zip(self.classes, self.shares.T.tolist(), strict=True))}

    def rows(self) -> Iterator[dict[str, Any]]:
        """`label` and a column `p(class)` for each class; by step after a `step`, from 1."""
        for number, (label, row) in enumerate(zip(self.labels, np.atleast_2d(self.shares).tolist(), strict=True), 1):
            at = {"step": number} if self.shares.ndim == 2 else {}
            yield {**at, "label": label, **{f"p({each})": share for each, share in zip(self.classes, row, strict=True)}}


@dataclass(eq=False)
class ClassScore(Score):
    """Accuracy, recall and precision, and the mean of -ln p of the right class, in nats."""

    task: ClassTask
    codec: ClassCodec | None
    true: list[Tensor] = field(default_factory=list)
    said: list[Tensor] = field(default_factory=list)
    summed: float = 0.0

    @property
    def classes(self) -> tuple[str, ...]:
        """The labels; without a codec the numbers that have been seen."""
        if self.codec is not None:
            return self.codec.classes
        return tuple(map(str, range(1 + max(int(each.max()) for each in (*self.true, *self.said)))))

    @property
    def count(self) -> int:
        """Answers that were looked at."""
        return sum(map(len, self.true))

    @property
    def loss(self) -> float:
        """The mean of -ln p of the right class."""
        return self.summed / self.count

    @property
    def headline(self) -> float:
        """The share that is right."""
        return sum(int((true == said).sum()) for true, said in zip(self.true, self.said, strict=True)) / self.count

    @property
    def confusion(self) -> NDArray[np.int64]:
        """Answers by true class and said class: [classes, classes]."""
        counts = np.zeros((len(self.classes),) * 2, dtype=np.int64)
        for true, said in zip(self.true, self.said, strict=True):
            np.add.at(counts, (true.numpy(), said.numpy()), 1)
        return counts

    @property
    def commonest(self) -> tuple[str, float]:
        """The commonest class and its share: no constant answer is right more often."""
        shares = self.confusion.sum(axis=1) / self.count
        return self.classes[int(shares.argmax())], float(shares.max())

    def add(self, output: Tensor, batch: Batch) -> None:
        """Count what the model gave for a labelled batch."""
        losses = self.task.losses(output, batch)
        places = (losses.steps, losses.rows) if output.dim() == 3 else losses.rows
        self.summed += losses.total().item()
        self.said.append(output.argmax(-1).cpu()[places])
        self.true.append(batch.targets.cpu()[places])

    def merge(self, other: ClassScore) -> None:
        """Count what another score has counted, too."""
        self.true, self.said = self.true + other.true, self.said + other.said
        self.summed += other.summed

    def by_class(self) -> Iterator[tuple[str, int, float, float]]:
        """Each class, how often it occurs, its recall and its precision; NaN where there is nothing to divide by."""
        counts = self.confusion
        right, true, said = np.diag(counts), counts.sum(axis=1), counts.sum(axis=0)
        with np.errstate(invalid="ignore"):
            recall, precision = right / true, right / said
        yield from zip(self.classes, true.tolist(), recall.tolist(), precision.tolist(), strict=True)

    def record(self) -> dict[str, Any]:
        """As data for JSON; what cannot be divided is null."""
        classes = {
            name: {"count": count, "recall": _or_none(recall), "precision": _or_none(precision)}
            for name, count, recall, precision in self.by_class()
        }
        return {
            "count": self.count,
            "accuracy": self.headline,
            "log_loss": self.loss,
            "commonest": dict(zip(("label", "share"), self.commonest, strict=True)),
            "classes": classes,
            "confusion": self.confusion.tolist(),
        }

    def table(self) -> Table:
        """A row for each class."""
        rows = tuple(
            (name, f"{count:,}", _share(recall), _share(precision))
            for name, count, recall, precision in self.by_class()
        )
        return Table(("class", self.task.words.unit, "recall", "precision"), rows)

    def sentence(self) -> str:
        """Accuracy, the constant answer's, and the loss."""
        label, share = self.commonest
        return (
            f"{self.headline:.1%} of {self.count:,} {self.task.words.unit} right; the commonest class there, {label!r},"
            f" is {share:.1%}. Mean -ln p of the right class: {self.loss:.4g}."
        )

    def pictures(self, title: str, caption: str, description: str) -> list[Picture]:
        """The confusions."""
        if len(self.classes) > MOST_DRAWN:
            return []
        return [Picture(title, drawing.confusion(self.confusion, self.classes), caption, description)]


class ClassTask(Task):
    """One class an answer, under softmax: the labels are numbered, the loss is the cross entropy."""

    metric = "accuracy"
    measure = "right"
    almost = 0.01

    def codec(self, sequences: Sequences, rows: Sequence[int], inputs: InputEncoder) -> Codec:
        """Every label of these sequences gets a number. Raises `DataError` where there is a single one."""
        labels = self._labels(sequences, rows)
        return ClassCodec(tuple(sorted(labels, key=_by_number_then_text)), self.by_step)

    def codec_from_json(self, stored: Stored) -> Codec:
        """The labels in order, two or more."""
        classes = stored.texts("classes")
        if len(classes) < 2:
            stored.refuse("classes", "has fewer than two")
        return ClassCodec(classes, self.by_step)

    def model(self, cell: Cell, architecture: Architecture) -> SequenceModel:
        """The shared encoder, with an affine map to a logit for each class."""
        return SequenceModel(cell, architecture)

    def losses(self, output: Tensor, batch: Batch) -> Losses:
        """-ln p of the right class: of each sequence, a term of its last step, or of each real step."""
        if len(batch.targets) == 0:
            raise DataError("the batch has no labels, so it has no loss; read the file with labels")
        return class_losses(output, batch.targets, batch.lengths)

    def count(self, part: Part, rows: Tensor, lengths: Tensor) -> int:
        """One term a step, or one a sequence."""
        return int(lengths.sum()) if self.by_step else len(rows)

    def outputs(self, output: Tensor, batch: Batch) -> list[Tensor]:
        """[length, classes] by step, else [classes]."""
        if not self.by_step:
            return list(output)
        return [output[:length, row] for row, length in enumerate(batch.lengths.tolist())]

    def answer(self, output: Tensor, codec: Codec) -> ClassAnswer:
        """The probability of each class."""
        assert isinstance(codec, ClassCodec)
        return ClassAnswer(codec.classes, output.softmax(-1).numpy())

    def says(self, codec: Codec) -> str:
        """Its labels, the first of them if there are many."""
        assert isinstance(codec, ClassCodec)
        listed, more = ", ".join(f"`{label}`" for label in codec.classes[:MOST_DRAWN]), len(codec.classes) - MOST_DRAWN
        return f"{self.words.answer}: {listed}" + (f" and {more} more" if more > 0 else "")

    def score(self, codec: Codec | None = None) -> ClassScore:
        """Accuracy."""
        assert codec is None or isinstance(codec, ClassCodec)
        return ClassScore(self, codec)

    def shown(self, score: float, half: float = math.nan) -> str:
        """In per cent."""
        within = "" if math.isnan(half) else f" ± {100 * half:.1f}"
        return f"{100 * score:.1f}{within}%"

    def standard_error(self, score: float, count: int) -> float:
        """As if all answers were independent: those at the steps of one sequence hardly are."""
        return math.sqrt(score * (1 - score) / count)

    def _labels(self, sequences: Sequences, rows: Sequence[int]) -> set[str]:
        """The labels of the sequences at these places, two or more."""
        require_labels(sequences)
        labels = {label for i in rows for label in sequences.labels_of(i)}
        if len(labels) < 2:
            only = ", ".join(repr(label) for label in labels) or "none"
            raise DataError(
                f"{place(sequences)}: only one {self.words.label}, {only}: a {self.words.learner} needs two or more"
            )
        return labels


def require_labels(sequences: Sequences) -> None:
    """Refuse sequences whose labels were not read."""
    if not sequences.labels:
        raise DataError(f"{sequences.source}: was read without labels; read it with them, or predict")


def place(sequences: Sequences) -> str:
    """Where their labels stand."""
    column = sequences.columns.target
    return sequences.source if column is None else f"{sequences.source}, column {column!r}"


def majority(classes: Sequence[str], learnt: NDArray[np.int64], asked: NDArray[np.int64]) -> tuple[str, float]:
    """Always the commonest class: what it is called, and the share that is right."""
    commonest = int(np.bincount(learnt).argmax())
    return f"always {classes[commonest]!r}", float((asked == commonest).mean())


def fitted(model: Any, x: NDArray[Any], learnt: NDArray[np.int64], y: NDArray[Any], asked: NDArray[np.int64]) -> float:
    """The share that a model of scikit-learn's gets right."""
    return float((model.fit(x, learnt).predict(y) == asked).mean())


def _share(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.1%}"


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value


def _by_number_then_text(label: str) -> tuple[float, str]:
    try:
        return float(label), label
    except ValueError:
        return float("inf"), label
