"""A run looked into: where the gradient of its network goes on its own data, before training and after."""

from __future__ import annotations

import dataclasses
import math
import shlex
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from throughtime.data.batches import Batch, Part
from throughtime.equations.catalogue import CELLS
from throughtime.errors import ThroughtimeError
from throughtime.insight.diagnosis import TIMES, Diagnosis, History, Other, Trial, look, try_remedies
from throughtime.insight.failure import first_failure
from throughtime.nn.clipping import suggest_clip
from throughtime.nn.initialise import chrono_
from throughtime.report.diagnosis_page import page
from throughtime.report.page import Page
from throughtime.report.verdict import ask_for_remedies
from throughtime.runs.folder import CONFIG, FinishedRun
from throughtime.runs.serve import read_for
from throughtime.tasks.encoding import Encoder, encode
from throughtime.tasks.model import SequenceModel, build
from throughtime.tasks.table import read
from throughtime.tasks.task import Task

MOST_STEPS = 10_000
"""Steps of the batch, padding included, unless the number of sequences is asked for."""

MOST_ROWS = 32
"""Sequences of the batch, unless their number is asked for."""

NORMS = 20
"""Mini-batches whose gradients' norms are looked at, before training and again after it."""

GATED = ("gru", "lstm")
"""Cells that are tried in the place of one whose gradient does not arrive."""

ASKED = (
    "The network answers once, at the end. For this picture the same read-out was asked after every step: the loss at"
    " step i is what the answer would have cost there."
)


@dataclasses.dataclass(frozen=True, eq=False)
class Examined:
    """A run's diagnosis, and in words what it was made on."""

    run: FinishedRun
    diagnosis: Diagnosis
    source: str
    command: str

    def page(self) -> Page:
        """The report."""
        return page(self.diagnosis, title=f"throughtime diagnose: {self.run.path.name}", facts=self._facts)

    @property
    def _facts(self) -> dict[str, str]:
        config, recipe = self.run.configuration, self.run.recipe
        network = config.network
        layers = f"{network.num_layers} layer{'s' if network.num_layers > 1 else ''} of {network.hidden_size} units"
        clip = "gradients not clipped" if recipe.clip is None else f"gradients clipped ({recipe.clip})"
        return {
            "command": self.command,
            "run": str(self.run.path),
            "data": self.source,
            "network": f"{self.diagnosis.cell}, {layers}{', both directions' if network.bidirectional else ''}",
            "training": f"{len(self.run.epochs)} epochs, learning rate {recipe.learning_rate:g}, batches of"
            f" {recipe.batch_size}, {clip}"
            + ("" if recipe.truncate is None else f", truncated after {recipe.truncate} steps"),
            "untrained": f"the same network as it was drawn with seed {config.seed}",
        }


def diagnose(
    run: FinishedRun,
    data: str | None = None,
    *,
    needs: int | None = None,
    rows: int | None = None,
    command: str = "",
    on_part: Callable[[str], None] = lambda part: None,
) -> Examined:
    """Look into a run on a batch of its training part, or of the sequences of `data`, a file like that one.

    `needs` is the lag in steps that the task needs: by default, from the first step to the last of the median sequence
    for a network that answers at the end, and not known for one that answers at every step. `rows` is the number of
    sequences, by default 32, fewer where they are long. `command` is quoted in the report; `on_part(name)` is called
    as the work goes on. Nothing is trained, and torch's random numbers are left alone.

    Raises ThroughtimeError for `needs` or `rows` below 1 and for data that does not fit.
    """
    for name, number in (("needs", needs), ("rows", rows)):
        if number is not None and number < 1:
            raise ThroughtimeError(f"{name} is {number}; give a whole number from 1")
    part, source = _part(run, data)
    chosen = _evenly(part, rows)
    batch = part.batch(chosen)
    task = run.model.task
    loss = losses_of(task, batch)
    if needs is None and not task.by_step:
        needs = max(1, int(batch.lengths.median()) - 1)
    on_part("numbers that are not finite")
    if (failure := first_failure(run.model, batch, loss)) is not None:
        raise ThroughtimeError(
            f"{source}: what the network computes is not finite: {failure}; give data like that of its training"
            " (--data), or train it again with smaller steps"
        )
    untrained = build(run.model.recurrent.cell, run.model.architecture, seed=run.configuration.seed).eval()
    before = look(
        untrained,
        batch,
        loss,
        needs=needs,
        with_pairs=False,  # none of the untrained network are shown
        on_part=lambda name: on_part(f"before training: {name}"),
    )
    after = look(
        run.model,
        batch,
        loss,
        needs=needs,
        asked=asked_at_every_step(run.model, batch),
        on_part=lambda name: on_part(f"after training: {name}"),
    )
    trials: list[Trial] = []
    if ask_for_remedies(before) or ask_for_remedies(after):
        trials = try_remedies(
            untrained,
            batch,
            loss,
            needs=needs,
            others=_gated(run, needs),
            times=TIMES if task.by_step else 1,
            on_part=lambda name: on_part(f"trying {name}"),
        )
    on_part("norms of gradients")
    norms = [*_norms(untrained, part, run), *_norms(run.model, part, run)]
    diagnosis = Diagnosis(
        cell=run.model.recurrent.cell.name,
        before=before,
        after=after,
        trials=trials,
        history=_history(run),
        norms=norms,
        clip=_suggested(norms),
        by_step=task.by_step,
        asked="" if task.by_step else ASKED,
        again=_again(run),
    )
    picked = f"{len(chosen)} of {len(part):,} sequences, evenly chosen, of {source}"
    return Examined(run, diagnosis, picked, command)


def _part(run: FinishedRun, data: str | None) -> tuple[Part, str]:
    """The sequences to look at, and in words where they are from."""
    if data is not None:
        sequences = read_for(run, data, labelled=True)
        return run.encoder.part(sequences), sequences.source
    asked = run.configuration.data
    task = run.encoder.task
    sequences = read(asked.file, asked.columns, task=task)
    encoded = encode(task, sequences, **asked.shares, seed=asked.split_seed)
    _check_same(run.encoder, encoded.encoder, sequences.source)
    return encoded.train, f"the training part of {sequences.source}"


def _check_same(stored: Encoder, found: Encoder, source: str) -> None:
    if stored.to_json() != found.to_json():
        raise ThroughtimeError(
            f"{source}: is not what the run was trained on, for its columns, scales or labels are others; give a file"
            " to look at (--data), or the one of then"
        )


def _evenly(part: Part, rows: int | None) -> list[int]:
    """Places of so many sequences, from the shortest to the longest, for the data may be in order of class."""
    longest = max(1, int(part.lengths.max()))
    count = min(len(part), rows or min(MOST_ROWS, max(1, MOST_STEPS // longest)))
    order = part.lengths.argsort(stable=True)
    return sorted(order[torch.linspace(0, len(part) - 1, count).round().long()].tolist())


# Losses


def losses_of(task: Task, batch: Batch) -> Callable[[Tensor], Tensor]:
    """The loss of an output, as `insight` takes it: [T, B] for one that answers at every step, else [B]."""

    def loss(output: Tensor) -> Tensor:
        found = task.losses(output, batch)
        rows = len(batch)
        return found.by_step(len(batch.x), rows) if output.dim() == 3 else found.by_row(rows)

    return loss


def asked_at_every_step(model: SequenceModel, batch: Batch) -> tuple[nn.Module, Callable[[Any], Tensor]] | None:
    """The network asked at every step; None where it is so anyway, or reads both ways and answers from two ends."""
    if model.by_step or model.architecture.bidirectional:
        return None
    return model.asked_at_every_step().eval(), losses_of(model.task, batch)


# What else there is to know


def _again(run: FinishedRun) -> str:
    """The command that makes the run once more."""
    return f"throughtime fit --config {shlex.quote(str(run.path / CONFIG))}"


def _gated(run: FinishedRun, needs: int | None) -> list[Other]:
    """Gated cells in the place of the run's own, drawn with its seed; and again with memories of the length needed."""
    cell = run.model.recurrent.cell
    architecture = dataclasses.replace(run.model.architecture, proj_size=0)
    seed = run.configuration.seed
    found = []
    for name in GATED:
        other = CELLS[name]
        if other.hash == cell.hash:
            continue
        call = f"{_again(run)} --cell {name}"
        found.append(
            Other(f"A gated cell: {other.name}", other.name, call, build(other, architecture, seed=seed).eval())
        )
        if needs is not None and needs > 1:
            model = build(other, architecture, seed=seed).eval()
            chrono_(model.recurrent, needs + 1, generator=torch.Generator().manual_seed(seed))
            title = f"A gated cell with long memories: {other.name}, chrono initialisation"
            found.append(Other(title, f"{other.name}, chrono", _chrono_call(other.name, run, needs + 1), model))
    return found


def _chrono_call(cell: str, run: FinishedRun, longest: int) -> str:
    sizes_of = run.model.architecture
    sizes = f"{sizes_of.input_size}, {sizes_of.hidden_size}"
    sizes += f", num_layers={sizes_of.num_layers}" if sizes_of.num_layers > 1 else ""
    sizes += ", bidirectional=True" if sizes_of.bidirectional else ""
    return (
        f"import throughtime as tt\nfrom throughtime.nn.initialise import chrono_\n"
        f"layer = chrono_(tt.nn.Recurrent(tt.{cell}, {sizes}), longest={longest})"
    )


def _norms(model: SequenceModel, part: Part, run: FinishedRun) -> list[float]:
    """The norm of all gradients together, for some mini-batches of the size that training had."""
    size = run.recipe.batch_size
    order = torch.randperm(len(part), generator=torch.Generator().manual_seed(run.configuration.seed)).tolist()
    parameters = list(model.parameters())
    found = []
    for first in range(0, min(len(order), NORMS * size), size):
        batch = part.batch(order[first : first + size])
        losses = model.task.losses(model(batch), batch)
        gradients = torch.autograd.grad(losses.total() / len(losses), parameters, materialize_grads=True)
        found.append(float(torch.stack([gradient.double().norm() for gradient in gradients]).norm()))
    return found


def _suggested(norms: list[float]) -> float | None:
    """A threshold to clip at, None where the norms tell none."""
    finite = [norm for norm in norms if math.isfinite(norm)]
    return suggest_clip(finite) if any(finite) else None


def _history(run: FinishedRun) -> History:
    def column(name: str) -> Any:
        values = (epoch.get(name) for epoch in run.epochs)
        return np.array([math.nan if value is None else float(value) for value in values])

    return History(
        losses=column("loss"),
        norms=column("norm"),
        thresholds=column("threshold"),
        clip_rates=column("clip_rate"),
        truncate=run.recipe.truncate,
    )
