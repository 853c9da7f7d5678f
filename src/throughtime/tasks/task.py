"""What a task is: all that anything else needs to know in order to read, train, score, serve and explain it.

A task is one file of this folder and one row of `table.TASKS`. Nothing else names it: reading asks for its `role`,
a split for its `strata`, the encoder for its `codec`, training and all diagnostics for its `losses`, serving for its
`answer`, every report for its `score` and its `words`.

One example, followed through. A tagger reads sentences, two words and one word long, labelled `D N` and `V`. Its codec
numbers the labels D, N, V, so that the targets are [0, 1] and [2]. On a batch of both the network gives logits
[T, B, C] = [2, 2, 3], of which one step is padding; `losses` has three terms, with rows 0, 1, 0 and steps 0, 0, 1.
Training divides their sum by `count` = 3. `outputs` gives [2, 3] and [1, 3], `answer` of the first the labels D N with
the probabilities of each, and `score` the share of three steps that are right.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

from torch import Tensor

from throughtime.data.batches import Batch, Part
from throughtime.data.encoding import InputEncoder, Stored
from throughtime.data.sequences import Sequences, TargetRole
from throughtime.data.splitting import Strata
from throughtime.equations.cell import Cell
from throughtime.nn.losses import Losses
from throughtime.report.page import Picture, Table

if TYPE_CHECKING:
    from throughtime.tasks.encoding import Encoded
    from throughtime.tasks.model import Architecture, SequenceModel


@dataclass(frozen=True)
class Words:
    """What cards, findings, help pages and errors call things.

    `help` is what the task is, for a help page. A score counts `unit`, each of them one `each`. A label is a `label`,
    and who learns them is a `learner`. `answer` is what it says, of the labels that stand after it; `read_out` where
    the network answers. `spans` is what the longest lag of a sequence is to the task: something that it "needs", or
    merely "spans".
    """

    help: str
    unit: str
    each: str
    label: str
    learner: str
    answer: str
    read_out: str
    spans: str


@dataclass(frozen=True)
class Baseline:
    """A simple answer, and its score on the test part."""

    name: str
    score: float


class Codec(ABC):
    """Labels to targets and back, fitted on the training part, and as data for JSON."""

    @property
    @abstractmethod
    def answers(self) -> int:
        """How many numbers the network gives for one answer."""

    @abstractmethod
    def targets(self, sequences: Sequences, rows: Sequence[int]) -> Tensor | tuple[Tensor, ...]:
        """The targets of the sequences at these places, as `Part.targets` holds them.

        Raises `DataError` for sequences without labels, and for a label that was not in training.
        """

    @abstractmethod
    def no_targets(self) -> Tensor | tuple[Tensor, ...]:
        """What `Part.targets` holds where they are not known."""

    @property
    @abstractmethod
    def summary(self) -> str:
        """What there is to tell apart: "9 classes"."""

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """Entries for JSON, beside those of the inputs."""


class Answer(ABC):
    """What a model says of one sequence, or of one step of a stream."""

    @property
    @abstractmethod
    def is_finite(self) -> bool:
        """False where numbers overflowed inside the network, so that it says nothing."""

    @abstractmethod
    def record(self) -> dict[str, Any]:
        """For JSON: lists where there is an answer for every step."""

    @abstractmethod
    def rows(self) -> Iterator[dict[str, Any]]:
        """For a table: one row, or one for every step."""


class Score(ABC):
    """How well a model does: filled batch by batch, joined with others, then read."""

    @property
    @abstractmethod
    def count(self) -> int:
        """What was counted: sequences, or steps."""

    @property
    @abstractmethod
    def loss(self) -> float:
        """The mean loss of what was counted."""

    @property
    @abstractmethod
    def headline(self) -> float:
        """The one number that people compare; `Task.more_is_better` says which way."""

    @abstractmethod
    def add(self, output: Tensor, batch: Batch) -> None:
        """Count what the model gave for a labelled batch."""

    @abstractmethod
    def merge(self, other: Self) -> None:
        """Count what another score has counted, too."""

    @abstractmethod
    def record(self) -> dict[str, Any]:
        """As data for JSON."""

    @abstractmethod
    def table(self) -> Table:
        """In detail."""

    @abstractmethod
    def sentence(self) -> str:
        """In words, with the full stop."""

    @abstractmethod
    def pictures(self, title: str, caption: str, description: str) -> list[Picture]:
        """Drawn, under this title; nothing where a drawing would show nothing."""


class Task(ABC):
    """What can be learnt from sequences."""

    name: ClassVar[str]
    role: ClassVar[TargetRole]
    """Where a file has its targets."""

    by_step: ClassVar[bool]
    """Whether the network answers at every step, and has a loss there; else it answers once it has read everything."""

    words: ClassVar[Words]
    more_is_better: ClassVar[bool] = True

    # What it learns from

    @abstractmethod
    def strata(self, sequences: Sequences) -> Strata:
        """What a split of these sequences balances. Raises `DataError` for labels that nothing can be learnt from."""

    @abstractmethod
    def codec(self, sequences: Sequences, rows: Sequence[int], inputs: InputEncoder) -> Codec:
        """Fitted on the sequences at these places; `inputs` has seen the same, for targets made of them.

        Raises `DataError` for labels that nothing can be learnt from.
        """

    @abstractmethod
    def codec_from_json(self, stored: Stored) -> Codec:
        """What `Codec.to_json` gave. Raises `DataError`, naming the entry, for anything else."""

    # The network

    @abstractmethod
    def model(self, cell: Cell, architecture: Architecture) -> SequenceModel:
        """A network with weights drawn from torch's random numbers."""

    @abstractmethod
    def losses(self, output: Tensor, batch: Batch) -> Losses:
        """Every term of the loss, with the row and the step that it is of. Raises `DataError` without targets.

        Training adds them up; early stopping, reach, pairs of times, the watch and comparisons read the same terms.
        """

    @abstractmethod
    def count(self, part: Part, rows: Tensor, lengths: Tensor) -> int:
        """How many terms the sequences at these places have, known before anything is computed.

        `rows` and `lengths` are [rows] int64; of each sequence so many steps are read, all or those of a window.
        """

    @abstractmethod
    def outputs(self, output: Tensor, batch: Batch) -> list[Tensor]:
        """The network's output for a batch, taken apart into that of each sequence."""

    # What it says and how good that is

    @abstractmethod
    def answer(self, output: Tensor, codec: Codec) -> Answer:
        """What predict and stream write of one sequence's output."""

    @abstractmethod
    def says(self, codec: Codec) -> str:
        """What it can answer, for a model card: "one of these for a whole sequence: `a`, `b`"."""

    @abstractmethod
    def score(self, codec: Codec | None = None) -> Score:
        """A score that has counted nothing yet; without a codec, in terms of the targets as the network has them."""

    @abstractmethod
    def baselines(self, encoded: Encoded) -> list[Baseline]:
        """Answers that need no network, fitted on the training part and scored on the test part; the constant first."""

    # A score in words

    metric: ClassVar[str]
    """What the headline is called: "accuracy"."""

    measure: ClassVar[str]
    """What it measures, as it stands after the number: "right"."""

    almost: ClassVar[float]
    """How far apart two scores may lie to be called almost the same; fixed before any data is seen."""

    @abstractmethod
    def shown(self, score: float, half: float = math.nan) -> str:
        """A headline score as it is printed, "81.2%"; with half the width of its interval, "81.2 ± 1.3%"."""

    @abstractmethod
    def standard_error(self, score: float, count: int) -> float:
        """How far chance alone may move a score over so many."""

    @abstractmethod
    def caution(self, score: float, count: int) -> str:
        """How sure such a score is, in a sentence."""

    def rank(self, score: float) -> float:
        """The score, or its negative where less is better: the higher, the better."""
        return score if self.more_is_better else -score
