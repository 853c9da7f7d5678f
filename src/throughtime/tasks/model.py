"""The network of every task: embedded symbols beside numbers, a recurrent layer, an answer at the end or each step."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from throughtime.data.batches import Batch, Part
from throughtime.equations.cell import Cell
from throughtime.errors import CellError, ShapeError, ThroughtimeError
from throughtime.nn import LastStep, PerStep, Recurrent
from throughtime.nn.dropout import Masks, dropped
from throughtime.nn.layout import State
from throughtime.nn.stream import Stream
from throughtime.tasks.task import Task

if TYPE_CHECKING:
    from throughtime.tasks.encoding import Encoder

PREDICT_STEPS = 500_000
"""Steps, padding included, that `outputs` runs at once: a bound on memory, and of no influence on the answers."""


@dataclass(frozen=True)
class Architecture:
    """What network: its task, and its sizes. `vocabularies` holds the size of each symbol column's, unknown included.

    `answers` are the numbers that it gives for one answer, one for each class, say. `dropout` acts in training on the
    outputs of every layer, the last one too. `proj_size` is for cells that project.
    """

    task: Task
    features: int
    vocabularies: tuple[int, ...]
    answers: int
    hidden_size: int
    num_layers: int = 1
    bidirectional: bool = False
    dropout: float = 0.0
    embedding_size: int = 32
    proj_size: int = 0

    def __post_init__(self) -> None:
        least = {"features": 0, "answers": 1, "hidden_size": 1, "num_layers": 1, "embedding_size": 1, "proj_size": 0}
        sizes = [*((name, getattr(self, name), low) for name, low in least.items())]
        for name, size, low in [*sizes, *(("vocabularies", size, 1) for size in self.vocabularies)]:
            if type(size) is not int or size < low:
                raise ShapeError(f"{name} is {size!r}; it must be a whole number from {low}")
        if type(self.bidirectional) is not bool:
            raise ShapeError(f"bidirectional is {self.bidirectional!r}; it must be true or false")
        if isinstance(self.dropout, bool) or not isinstance(self.dropout, int | float) or not 0 <= self.dropout < 1:
            raise ShapeError(f"dropout is {self.dropout!r}; it must be from 0 up to, but not, 1")
        if not self.features and not self.vocabularies:
            raise ShapeError("a network needs something to read; name feature or symbol columns")

    @classmethod
    def fitting(cls, encoder: Encoder, *, hidden_size: int, **others: Any) -> Architecture:
        """That for what `encoder` gives; `others` are the remaining fields by name."""
        return cls(
            task=encoder.task,
            features=len(encoder.features),
            vocabularies=tuple(len(vocabulary) for vocabulary in encoder.vocabularies),
            answers=encoder.codec.answers,
            hidden_size=hidden_size,
            **others,
        )

    @property
    def input_size(self) -> int:
        """What the recurrent layer reads at each step: the numbers, then every embedding."""
        return self.features + len(self.vocabularies) * self.embedding_size


class SequenceModel(nn.Module):
    """Numbers and embedded symbols -> `Recurrent` -> one answer at the end or at each step, as the task says.

    The embedding of index 0, the unknown symbol, is zero and is not trained: training never sees it, so anything else
    would be noise. Raises CellError for a cell with outside inputs, which no file gives, and ShapeError for sizes that
    make no network.
    """

    def __init__(self, cell: Cell, architecture: Architecture) -> None:
        super().__init__()
        if cell.outside:
            raise CellError(
                f"{cell.name} wants the outside input {cell.outside[0]!r}, which a data file does not give; take a cell"
                " of x and its states alone"
            )
        self.architecture = architecture
        self.by_step = architecture.task.by_step
        size = architecture.embedding_size
        self.embeddings = nn.ModuleList(nn.Embedding(count, size, padding_idx=0) for count in architecture.vocabularies)
        self.recurrent = Recurrent(
            cell,
            architecture.input_size,
            architecture.hidden_size,
            num_layers=architecture.num_layers,
            bidirectional=architecture.bidirectional,
            dropout=architecture.dropout if architecture.num_layers > 1 else 0.0,
            proj_size=architecture.proj_size,
        )
        directions = 2 if architecture.bidirectional else 1
        width = cell.sizes(architecture.hidden_size, architecture.proj_size)[cell.output] * directions
        self.readout: LastStep | PerStep = (
            PerStep(width, architecture.answers)
            if self.by_step
            else LastStep(width, architecture.answers, bidirectional=architecture.bidirectional)
        )

    @property
    def task(self) -> Task:
        """What it is for."""
        return self.architecture.task

    def asked_at_every_step(self) -> SequenceModel:
        """A copy with the same weights that answers at every step what this one would if the sequence ended there.

        Raises ThroughtimeError if it reads both ways and so answers from two ends.
        """
        if self.architecture.bidirectional and not self.by_step:
            raise ThroughtimeError("a model that reads both ways has no answer before the end; ask one that does not")
        asked = copy.deepcopy(self)
        with torch.device("meta"):  # draws no random numbers
            asked.readout = PerStep(self.readout.linear.in_features, self.architecture.answers)
        asked.readout.load_state_dict(self.readout.state_dict(), assign=True)
        asked.by_step = True
        return asked

    def forward(self, batch: Batch, masks: Masks | None = None) -> Tensor:
        """The answers to ragged sequences: [B, answers], or [T, B, answers] by step (past an end the bias)."""
        return self.run(batch, masks=masks)[0]

    def run(
        self, batch: Batch, h_0: tuple[Tensor, ...] | None = None, masks: Masks | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Answers as `forward` has them, and every state at the sequences' ends: [layers * directions, B, width] each.

        `h_0` are states to begin with, those at the end of an earlier run, say; zeros if not given.
        `masks` says which dropout masks to use in training; without it, those of a seed drawn from torch's generator.
        """
        drops = self.training and self.architecture.dropout > 0
        if drops and masks is None:
            masks = Masks(torch.randint(-(2**63), 2**63 - 1, ()))
        x = self.inputs(batch.x, batch.symbols)
        outputs, ends = self.recurrent(x, h_0, lengths=batch.lengths, masks=masks)  # [T, B, width]
        if drops:
            outputs = dropped(outputs, self.architecture.dropout, masks, self.architecture.num_layers)
        answers: Tensor = self.readout(outputs) if self.by_step else self.readout(outputs, batch.lengths)
        return answers, ends if isinstance(ends, tuple) else (ends,)

    def inputs(self, x: Tensor, symbols: Tensor) -> Tensor:
        """What the recurrent layer reads: x [..., features] and symbols [..., columns] to [..., input_size]."""
        if not self.embeddings:
            return x
        embedded = [embed(symbols[..., column]) for column, embed in enumerate(self.embeddings)]
        return torch.cat([x, *embedded], -1)

    def stream(self, batch_size: int | None = None) -> ModelStream:
        """The model one step at a time; see `ModelStream`. Raises ThroughtimeError if it reads both ways."""
        return ModelStream(self, self.recurrent.stream(batch_size))


class ModelStream:
    """A model that is given one step at a time, as it is in use: no dropout, no gradients.

    After each step it gives what the sequence would get if it ended there, or what that step gets.
    The recurrent layer's weights are a copy, taken when the stream was made.
    """

    def __init__(self, model: SequenceModel, layer: Stream) -> None:
        self.model = model
        self.layer = layer

    @torch.no_grad()
    def step(self, x: Tensor, symbols: Tensor) -> Tensor:
        """Take one step: x [B, features] and symbols [B, columns] to answers [B, answers]; or all without B."""
        outputs = self.layer.step(self.model.inputs(x, symbols))
        logits: Tensor = self.model.readout.linear(outputs)
        return logits

    def copy(self) -> ModelStream:
        """Another stream in the same state."""
        return ModelStream(self.model, self.layer.copy())

    @property
    def state(self) -> State:
        """The recurrent layer's state, [layers, B, width] for each; see `throughtime.nn.Stream.state`."""
        return self.layer.state

    @state.setter
    def state(self, value: State) -> None:
        self.layer.state = value

    def state_dict(self) -> dict[str, Tensor]:
        """The state by name: plain tensors, copied."""
        return self.layer.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` gave. Raises ShapeError for what does not fit."""
        self.layer.load_state_dict(state)

    @classmethod
    def stack(cls, streams: Sequence[ModelStream]) -> ModelStream:
        """The streams of one model as the rows of one, in their order; each stays as it is."""
        return cls(streams[0].model, Stream.stack([stream.layer for stream in streams]))

    def rows(self, indices: int | Sequence[int] | Tensor) -> ModelStream:
        """A stream of some rows, in this order; for one number, without a batch."""
        return ModelStream(self.model, self.layer.rows(indices))


def build(cell: Cell, architecture: Architecture, *, seed: int) -> SequenceModel:
    """A new network; its weights are decided by `seed` alone, and torch's random numbers are left as they were."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return architecture.task.model(cell, architecture)


def outputs(model: SequenceModel, part: Part, batch_size: int = 512) -> list[Tensor]:
    """The output for each sequence, in the part's order, as the model is in use, not training.

    [answers] each, or [length, answers] by step.
    """
    found: list[Tensor] = [torch.empty(0)] * len(part)
    for rows, batch, output in run_through(model, part, batch_size):
        for row, own in zip(rows, model.task.outputs(output.cpu(), batch), strict=True):
            found[row] = own
    return found


def run_through(model: SequenceModel, part: Part, batch_size: int = 512) -> Iterator[tuple[list[int], Batch, Tensor]]:
    """All of a part in batches of like length: the places of the sequences, the batch, and the model's output.

    Nothing is dropped out; the model is then left in the mode that it was in.
    """
    device = next(model.parameters()).device
    for rows in bounded_batches(part.lengths, batch_size):
        batch = part.batch(rows).to(device)
        with _evaluating(model), torch.no_grad():
            output = model(batch)
        yield rows, batch, output


def bounded_batches(lengths: Tensor, batch_size: int) -> Iterator[list[int]]:
    """Places of sequences of like length, the longest first; `batch_size` at most, and few enough for memory."""
    order = lengths.argsort(descending=True, stable=True).tolist()
    while order:
        longest = max(1, int(lengths[order[0]]))
        count = max(1, min(batch_size, PREDICT_STEPS // longest))
        yield order[:count]
        order = order[count:]


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
