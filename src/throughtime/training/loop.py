"""One readable training loop: batches of like length, AdamW, clipping, early stopping; it can go on from anywhere."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from throughtime.data.batches import Batch, Part
from throughtime.errors import ThroughtimeError
from throughtime.insight.watch import Watch
from throughtime.nn.clipping import suggest_clip
from throughtime.nn.dropout import Masks
from throughtime.tasks.model import SequenceModel
from throughtime.tasks.table import TASKS
from throughtime.tasks.task import Codec, Score
from throughtime.training.evaluation import evaluate
from throughtime.training.recipe import ENOUGH, QUANTILE, SEEN, Recipe

JITTER = 0.2
"""Sequences are sorted by their length times 1 plus or minus up to this much: alike in a batch, new in every epoch."""


@dataclass(frozen=True)
class Epoch:
    """What one pass over the training part gave.

    `loss` is the mean over the terms, sequences or steps, as they were trained on, `seconds` the time of that alone,
    and `steps_per_second` counts real time steps. `score` is the headline on the validation part and
    `validation_loss` the mean loss there; None without one. `norm` is the median norm of the gradients, `threshold`
    where they are clipped by now (None: nowhere) and `clip_rate` the share of the updates that it changed. `watched`
    holds what a `Watch` said of some updates (`insight.watch`).
    """

    loss: float
    seconds: float
    number: int
    updates: int
    learning_rate: float
    steps_per_second: float
    norm: float
    threshold: float | None
    clip_rate: float
    score: float | None = None
    validation_loss: float | None = None
    best: bool = False
    watched: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Progress:
    """Where the training is after an update: `done` of 1, and the mean loss and time steps a second of this epoch."""

    epoch: int
    epochs: int
    done: float
    loss: float
    steps_per_second: float


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A training between two updates: tensors, and a record of plain values that JSON can hold."""

    tensors: dict[str, Tensor]
    record: dict[str, Any]


class Chunk(NamedTuple):
    """What one forward and backward pass sees: sequences, and of those the steps from `start` up to `stop`."""

    rows: Tensor
    start: int
    stop: int


@dataclass
class Tally:
    """What an epoch has summed up so far."""

    loss: float = 0.0
    count: int = 0
    steps: int = 0
    clipped: int = 0
    seconds: float = 0.0
    learning_rate: float = 0.0
    norms: list[float] = field(default_factory=list)
    watched: list[dict[str, Any]] = field(default_factory=list)


def train(
    model: SequenceModel,
    part: Part,
    recipe: Recipe,
    *,
    seed: int,
    validation: Part | None = None,
    codec: Codec | None = None,
    checkpoint: Callable[[Callable[[], Snapshot]], None] | None = None,
    resume_from: Snapshot | None = None,
    on_update: Callable[[Progress], None] | None = None,
    watch: Watch | None = None,
) -> Iterator[Epoch]:
    """Train in place, yielding after every epoch; what the caller does in between is not timed.

    `seed` alone decides the order of the batches and dropout, and the caller's random numbers are left alone. After
    every update, and after every epoch once the caller has taken it, `checkpoint` is offered a function that takes a
    `Snapshot`; a training that is given one as `resume_from` goes on from there to the same bits. With `validation` and
    `recipe.patience` the model ends with the weights of its best epoch. A `watch` on the model looks into some updates
    and changes none; what it says stands in the epoch.

    `codec` gives the validation score the terms of the labels.

    Raises ThroughtimeError where the loss or a gradient is not finite, before any weight is touched by it, and for a
    `recipe.truncate` that the model cannot follow.
    """
    training = Training(model, part, recipe, seed, validation, watch, codec)
    if resume_from is not None:
        training.restore(resume_from)
    with watch or nullcontext():
        while not training.finished:
            for window in training.windows():
                training.update(window)
                if on_update is not None:
                    on_update(training.progress)
                if checkpoint is not None:
                    checkpoint(training.snapshot)
            yield training.end_epoch()
            if checkpoint is not None:
                checkpoint(training.snapshot)
    training.restore_best()


def chunks(lengths: Tensor, recipe: Recipe, generator: torch.Generator) -> list[Chunk]:
    """One epoch's batches, cut into windows if the recipe truncates: each batch's lengths alike, the batches shuffled.

    `lengths` are [sequences]. All batches have the same size, give or take one sequence: a small one left over would
    hold the longest sequences in every epoch and count each of them for more.
    """
    number = -(-len(lengths) // recipe.batch_size)
    near = lengths * (1 + JITTER * (2 * torch.rand(len(lengths), generator=generator, dtype=torch.float64) - 1))
    batches = near.argsort().tensor_split(number)
    planned = []
    for place in torch.randperm(number, generator=generator).tolist():
        rows = batches[place]
        longest = int(lengths[rows].max())
        size = recipe.truncate or longest
        planned += [Chunk(rows, start, min(start + size, longest)) for start in range(0, longest, size)]
    return planned


@contextmanager
def on_threads(number: int) -> Iterator[None]:
    """Compute with so many threads; afterwards with as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Training:
    """A training under way: everything that decides what comes next."""

    def __init__(
        self,
        model: SequenceModel,
        part: Part,
        recipe: Recipe,
        seed: int,
        validation: Part | None = None,
        watch: Watch | None = None,
        codec: Codec | None = None,
    ) -> None:
        self.model, self.part, self.recipe, self.validation, self.watch = model, part, recipe, validation, watch
        self.codec = codec
        self.device = _device_of(model)
        self.lengths = part.lengths
        if recipe.truncate is not None:
            _check_truncation(model)
        matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
        vectors = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
        self.optimiser = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
            lr=recipe.learning_rate,
            fused=True,
        )
        self.epoch = 0  # of those that are complete
        self.position = 0  # chunks of the present epoch that are done
        self.order = torch.Generator().manual_seed(seed).get_state()  # as the present epoch began
        self.seed = seed
        self.carried: tuple[Tensor, ...] | None = None
        self.updates = 0
        self.norms: list[float] = []
        self.threshold = None if recipe.clip == "auto" else recipe.clip
        self.tally = Tally()
        self.best: dict[str, Any] | None = None
        self.best_weights: dict[str, Tensor] = {}
        self._planned: list[Chunk] = []
        self._next_order = self.order
        self._padded: tuple[Tensor, Batch] | None = None

    @property
    def finished(self) -> bool:
        """Whether all epochs are done, or so many without a lower loss that patience is over."""
        patience = self.recipe.patience
        tired = self.best is not None and patience is not None and self.epoch - self.best["epoch"] >= patience
        return tired or self.epoch >= self.recipe.epochs

    @property
    def progress(self) -> Progress:
        """Where the training is."""
        return Progress(
            epoch=self.epoch + 1,
            epochs=self.recipe.epochs,
            done=(self.epoch + self.position / len(self._planned)) / self.recipe.epochs,
            loss=self.tally.loss / self.tally.count,
            steps_per_second=self.tally.steps / self.tally.seconds,
        )

    def windows(self) -> Iterator[tuple[Chunk, ...]]:
        """What is left of the present epoch: for each update, the chunks whose gradients it sums."""
        generator = torch.Generator()
        generator.set_state(self.order)
        self._planned = chunks(self.lengths, self.recipe, generator)
        self._next_order = generator.get_state()
        size = self.recipe.accumulate
        for start in range(self.position, len(self._planned), size):
            yield tuple(self._planned[start : start + size])

    def update(self, window: tuple[Chunk, ...]) -> None:
        """One step of the optimiser on the mean loss over the window's chunks together."""
        started = time.perf_counter()
        self.model.train()
        rate = self.recipe.learning_rate_at(self._middle_of(window))
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.optimiser.zero_grad()
        # Losses are summed and divided by the count of the whole window, known before its first backward pass. Where
        # processes share the work, they add up this count and then the gradients, and nothing else.
        count, loss = sum(self._count(chunk) for chunk in window), 0.0
        for chunk in window:
            summed = self._summed_loss(chunk)
            (summed / count).backward()
            loss += summed.item()
        if not math.isfinite(loss):
            self._refuse(f"the loss is {loss}")
        self._clip()
        self.optimiser.step()
        self.position += len(window)
        self.tally.loss += loss
        self.tally.count += count
        self.tally.steps += sum(int(self._steps_of(chunk).sum()) for chunk in window)
        self.tally.learning_rate = rate
        self.tally.seconds += time.perf_counter() - started

    def end_epoch(self) -> Epoch:
        """Look at the validation part, keep the weights if they are the best so far, and turn to the next epoch."""
        validated = None if self.validation is None else evaluate(self.model, self.validation, self.codec)
        self.epoch += 1
        tally = self.tally
        found = Epoch(
            loss=tally.loss / tally.count,
            seconds=tally.seconds,
            number=self.epoch,
            updates=len(tally.norms),
            learning_rate=tally.learning_rate,
            steps_per_second=tally.steps / tally.seconds,
            norm=median(tally.norms),
            threshold=self.threshold,
            clip_rate=tally.clipped / len(tally.norms),
            score=None if validated is None else validated.headline,
            validation_loss=None if validated is None else validated.loss,
            best=validated is not None and self._keep_if_best(validated),
            watched=tuple(tally.watched),
        )
        self.position, self.tally, self.order = 0, Tally(), self._next_order
        self.carried = self._padded = None
        return found

    def restore_best(self) -> None:
        """Give the model the weights of its best epoch, if early stopping has kept any."""
        if self.best_weights:
            self.model.load_state_dict(self.best_weights)

    def snapshot(self) -> Snapshot:
        """All that decides how the training goes on, as copies."""
        tensors = {f"weights.{name}": tensor for name, tensor in self.model.state_dict().items()}
        tensors |= {f"best.{name}": tensor for name, tensor in self.best_weights.items()}
        tensors |= {f"carried.{number}": state for number, state in enumerate(self.carried or ())}
        tensors |= {"random.order": self.order}
        for number, state in self.optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{number}.{key}": value for key, value in state.items()}
        return Snapshot(
            {name: tensor.detach().clone() for name, tensor in tensors.items()},
            {
                "epoch": self.epoch,
                "position": self.position,
                "tally": dataclasses.asdict(self.tally),
                "updates": self.updates,
                "norms": list(self.norms),
                "threshold": self.threshold,
                "best": self.best,
                "watch": None if self.watch is None else self.watch.state(),
            },
        )

    def restore(self, snapshot: Snapshot) -> None:
        """Go on from where a snapshot was taken. Raises ThroughtimeError for one of another model or recipe."""
        tensors, record = snapshot.tensors, snapshot.record
        if "random.cpu" in tensors and self.model.architecture.dropout > 0:
            raise ThroughtimeError(
                "the checkpoint was written by version 0.1.0, whose dropout masks cannot be gone on with; train anew"
            )
        try:
            self.model.load_state_dict(_under("weights.", tensors))
            groups = self.optimiser.state_dict()["param_groups"]
            state: dict[int, dict[str, Tensor]] = {}
            for name, value in _under("optimiser.", tensors).items():
                number, _, key = name.partition(".")
                state.setdefault(int(number), {})[key] = value
            self.optimiser.load_state_dict({"state": state, "param_groups": groups})
            self.order = tensors["random.order"]
            self.best_weights = _under("best.", tensors)
            self.carried = tuple(state.to(self.device) for state in _under("carried.", tensors).values()) or None
            self.epoch, self.position, self.updates = record["epoch"], record["position"], record["updates"]
            self.norms, self.threshold = list(record["norms"]), record["threshold"]
            self.tally, self.best = Tally(**record["tally"]), record["best"]
            if self.watch is not None and record["watch"] is not None:
                self.watch.restore(record["watch"])
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise ThroughtimeError(
                f"the checkpoint is not one of this model and recipe ({type(error).__name__}: {reason}); train anew"
            ) from error

    def _middle_of(self, window: tuple[Chunk, ...]) -> float:
        """The share of the training that is done half-way through the window: neither the first update nor the last
        has a learning rate of zero."""
        return (self.epoch + (self.position + len(window) / 2) / len(self._planned)) / self.recipe.epochs

    def _steps_of(self, chunk: Chunk) -> Tensor:
        return (self.lengths[chunk.rows] - chunk.start).clamp(0, chunk.stop - chunk.start)

    def _count(self, chunk: Chunk) -> int:
        """What the chunk's loss is a sum over: its sequences, or its real steps."""
        return self.model.task.count(self.part, chunk.rows, self._steps_of(chunk))

    def _summed_loss(self, chunk: Chunk) -> Tensor:
        if self._padded is None or self._padded[0] is not chunk.rows:
            self._padded = chunk.rows, self.part.batch(chunk.rows).to(self.device)
        batch, masks = self._padded[1], self._masks(chunk)
        if self.recipe.truncate is None:
            return self.model.task.losses(self.model(batch, masks), batch).total()
        inside = _window(batch, chunk)
        output, states = self.model.run(inside, self.carried if chunk.start else None, masks)
        self.carried = tuple(state.detach() for state in states)
        return self.model.task.losses(output, inside).total()

    def _clip(self) -> None:
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        total = nn.utils.get_total_norm(gradients)
        norm = total.item()
        if not math.isfinite(norm):
            self._refuse(f"the norm of the gradients is {norm}")
        if self.watch is not None and (seen := self.watch.observe(norm, self.threshold)):
            self.tally.watched.append(seen)
        if self.threshold is not None and norm > self.threshold:
            nn.utils.clip_grads_with_norm_(self.model.parameters(), self.threshold, total)
            self.tally.clipped += 1
        self.tally.norms.append(norm)
        self.updates += 1
        if self.recipe.clip == "auto":
            self.norms = [*self.norms[1 - SEEN :], norm]
            if self.updates % ENOUGH == 0 and any(self.norms):
                self.threshold = suggest_clip((seen for seen in self.norms if seen > 0), QUANTILE)

    def _refuse(self, problem: str) -> None:
        clip = "" if self.recipe.clip else ", or clip the gradients"
        raise ThroughtimeError(
            f"{problem}, not finite in epoch {self.epoch + 1}, update {len(self.tally.norms) + 1}; train with a lower"
            f" learning rate than {self.recipe.learning_rate:g}{clip}"
        )

    def _keep_if_best(self, found: Score) -> bool:
        """Whether this epoch's weights beat all before: by loss, which says more of few sequences than the score."""
        lowest = math.inf if self.best is None else self.best["loss"]
        if self.recipe.patience is None or not found.loss < lowest:
            return False
        self.best = {"epoch": self.epoch, "loss": found.loss}
        self.best_weights = {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}
        return True

    def _masks(self, chunk: Chunk) -> Masks:
        """Dropout masks by seed and epoch, sequence and step: whatever the batches, the windows and the breaks."""
        (drawn,) = np.random.SeedSequence([self.seed, self.epoch]).generate_state(1, np.uint64).astype(np.int64)
        return Masks(int(drawn), chunk.start, chunk.rows)


def _window(batch: Batch, chunk: Chunk) -> Batch:
    """The batch's steps from the chunk's first to its last; sequences that have ended before have length 0."""
    steps = slice(chunk.start, chunk.stop)
    lengths = (batch.lengths - chunk.start).clamp(0, chunk.stop - chunk.start)
    return Batch(batch.x[steps], batch.symbols[steps], lengths, batch.targets[steps])


def _device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _check_truncation(model: SequenceModel) -> None:
    if not model.by_step:
        able = ", ".join(name for name, task in TASKS.items() if task.by_step)
        raise ThroughtimeError(
            f"truncate is for tasks that answer at every step ({able}): with one answer at the end, the windows before"
            " the last have no loss; leave it out"
        )
    if model.architecture.bidirectional:
        raise ThroughtimeError(
            "truncate and bidirectional exclude each other: the backward direction begins at the end; leave one out"
        )
