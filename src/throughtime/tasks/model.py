"""The network of every task: embedded symbols beside numbers, a recurrent layer, an answer at the end or each step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from throughtime.data.encoding import Batch, Encoder, Part
from throughtime.data.sequences import Task
from throughtime.equations.cell import Cell
from throughtime.errors import CellError, DataError, ShapeError
from throughtime.nn import LastStep, PerStep, Recurrent
from throughtime.nn.layout import State
from throughtime.nn.stream import Stream

PREDICT_STEPS = 500_000
"""Steps, padding included, that `predict` runs at once: a bound on memory, and of no influence on the answers."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a network. `vocabularies` holds the size of each symbol column's vocabulary, unknown included.

    `dropout` acts in training on the outputs of every layer, the last one too. `proj_size` is for cells that project.
    """

    task: Task
    features: int
    vocabularies: tuple[int, ...]
    classes: int
    hidden_size: int
    num_layers: int = 1
    bidirectional: bool = False
    dropout: float = 0.0
    embedding_size: int = 32
    proj_size: int = 0

    def __post_init__(self) -> None:
        if self.task not in get_args(Task):
            raise ShapeError(f"task is {self.task!r}; it is 'classify' or 'tag'")
        least = {"features": 0, "classes": 1, "hidden_size": 1, "num_layers": 1, "embedding_size": 1, "proj_size": 0}
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
    def fitting(cls, encoder: Encoder, *, hidden_size: int, **others: Any) -> Shape:
        """The shape for what `encoder` gives; `others` are the remaining fields by name."""
        return cls(
            task=encoder.task,
            features=len(encoder.features),
            vocabularies=tuple(len(vocabulary) for vocabulary in encoder.vocabularies),
            classes=len(encoder.classes),
            hidden_size=hidden_size,
            **others,
        )

    @property
    def input_size(self) -> int:
        """What the recurrent layer reads at each step: the numbers, then every embedding."""
        return self.features + len(self.vocabularies) * self.embedding_size

    def to_json(self) -> dict[str, Any]:
        """The sizes as data for JSON."""
        return {**asdict(self), "vocabularies": list(self.vocabularies)}

    @classmethod
    def from_json(cls, data: object, source: str = "the shape") -> Shape:
        """What `to_json` gave. Raises `DataError`, naming `source`, for anything else."""
        names = {field.name for field in fields(cls)}
        if not isinstance(data, dict) or set(data) != names or not isinstance(data["vocabularies"], list):
            raise DataError(f"{source}: is not a network's sizes ({', '.join(sorted(names))}); take a whole copy")
        try:
            return cls(**{**data, "vocabularies": tuple(data["vocabularies"])})
        except ShapeError as error:
            raise DataError(f"{source}: {error}") from error


class SequenceModel(nn.Module):
    """Numbers and embedded symbols -> `Recurrent` -> one answer at the end (classify) or at each step (tag).

    The embedding of index 0, the unknown symbol, is zero and is not trained: training never sees it, so anything else
    would be noise. Raises CellError for a cell with outside inputs, which no file gives, and ShapeError for sizes that
    make no network.
    """

    def __init__(self, cell: Cell, shape: Shape) -> None:
        super().__init__()
        if cell.outside:
            raise CellError(
                f"{cell.name} wants the outside input {cell.outside[0]!r}, which a data file does not give; take a cell"
                " of x and its states alone"
            )
        self.shape = shape
        size = shape.embedding_size
        self.embeddings = nn.ModuleList(nn.Embedding(count, size, padding_idx=0) for count in shape.vocabularies)
        self.recurrent = Recurrent(
            cell,
            shape.input_size,
            shape.hidden_size,
            num_layers=shape.num_layers,
            bidirectional=shape.bidirectional,
            dropout=shape.dropout if shape.num_layers > 1 else 0.0,
            proj_size=shape.proj_size,
        )
        directions = 2 if shape.bidirectional else 1
        width = cell.sizes(shape.hidden_size, shape.proj_size)[cell.output] * directions
        self.readout: LastStep | PerStep = (
            LastStep(width, shape.classes, bidirectional=shape.bidirectional)
            if shape.task == "classify"
            else PerStep(width, shape.classes)
        )

    def forward(self, batch: Batch) -> Tensor:
        """Logits of ragged sequences: [B, classes] to classify, [T, B, classes] to tag (the bias past an end)."""
        return self.run(batch)[0]

    def run(self, batch: Batch, h_0: tuple[Tensor, ...] | None = None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Logits as `forward` has them, and every state at the sequences' ends: [layers * directions, B, width] each.

        `h_0` are states to begin with, those at the end of an earlier run, say; zeros if not given.
        """
        outputs, ends = self.recurrent(self.inputs(batch.x, batch.symbols), h_0, lengths=batch.lengths)  # [T, B, width]
        outputs = functional.dropout(outputs, self.shape.dropout, self.training)
        if isinstance(self.readout, LastStep):
            logits: Tensor = self.readout(outputs, batch.lengths)
        else:
            logits = self.readout(outputs)
        return logits, ends if isinstance(ends, tuple) else (ends,)

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

    After each step it gives what the sequence would get if it ended there (classify), or what that step gets (tag).
    The recurrent layer's weights are a copy, taken when the stream was made.
    """

    def __init__(self, model: SequenceModel, layer: Stream) -> None:
        self.model = model
        self.layer = layer

    @torch.no_grad()
    def step(self, x: Tensor, symbols: Tensor) -> Tensor:
        """Take one step: x [B, features] and symbols [B, columns] to logits [B, classes]; or all without B."""
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


def build(cell: Cell, shape: Shape, *, seed: int) -> SequenceModel:
    """A new network; its weights are decided by `seed` alone, and torch's random numbers are left as they were."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SequenceModel(cell, shape)


def loss_sum(model: SequenceModel, batch: Batch) -> tuple[Tensor, int]:
    """The summed cross entropy of a batch in nats, and of how many: sequences to classify, real steps to tag.

    Divide by the count of everything that one update is made of: all batches that accumulate, all processes.
    """
    logits, targets = counted(model(batch), batch)
    return functional.cross_entropy(logits, targets, reduction="sum"), len(targets)


def counted(logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """What counts of a batch, one under another: logits [n, classes] and targets [n] of sequences or real steps."""
    if len(batch.targets) == 0:
        raise DataError("the batch has no labels, so it has no loss; read the file with labels")
    if logits.dim() == 2:
        return logits, batch.targets
    real = (torch.arange(len(logits))[:, None] < batch.lengths).to(logits.device)  # [T, B]
    return logits[real], batch.targets[real]


@torch.no_grad()
def predict(model: SequenceModel, part: Part, batch_size: int = 512) -> Tensor | list[Tensor]:
    """The most likely class: of each sequence, [sequences] int64; or of each step, a [length] for each sequence."""
    answers = [logits.argmax(-1) for logits in _logits(model, part, batch_size)]
    return torch.stack(answers) if model.shape.task == "classify" else answers


@torch.no_grad()
def probabilities(model: SequenceModel, part: Part, batch_size: int = 512) -> Tensor | list[Tensor]:
    """The probability of each class: [sequences, classes], or a [length, classes] for each sequence to tag."""
    answers = [logits.softmax(-1) for logits in _logits(model, part, batch_size)]
    return torch.stack(answers) if model.shape.task == "classify" else answers


def _logits(model: SequenceModel, part: Part, batch_size: int) -> list[Tensor]:
    """For each sequence, in the part's order, [classes] or [length, classes]; as the model is in use, not training."""
    found: list[Tensor] = [torch.empty(0)] * len(part)
    device = model.readout.linear.weight.device
    with _evaluating(model):
        for rows in bounded_batches(part.lengths, batch_size):
            logits = model(part.batch(rows).to(device)).cpu()
            for place, row in enumerate(rows):
                found[row] = logits[place] if model.shape.task == "classify" else logits[: len(part.steps[row]), place]
    return found


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
