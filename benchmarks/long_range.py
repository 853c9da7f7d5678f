"""Where long dependencies break a cell: adding, copying and temporal order, success against length beside the reach.

    python benchmarks/long_range.py
    python benchmarks/long_range.py --tasks adding --nets gru lstm --lengths 1000 2000 --updates 20000

The first line is the committed run, on one thread; the second one long run. For each task, network and length the
reach is measured before training, then the network trains on fresh sequences, the same number of updates for all,
until it has solved the task or has used them up. One that has missed two lengths in a row is not trained on longer
ones, which would only fail slowly; `--all` trains it all the same. Writes JSON, Markdown, PNG and SVG, each complete
or not at all.
"""

from __future__ import annotations

import argparse
import math
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from long_range_report import as_markdown, write
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor
from torch.nn import functional

import throughtime as tt
from throughtime.insight.reach import THRESHOLD, reach
from throughtime.nn.initialise import chrono_, identity_, orthogonal_

LENGTHS = (10, 20, 50, 100, 200, 500)
CARRIED = (1000, 2000, 5000)
"""Lengths at which a network that has learnt temporal order is tested without further training."""

CHECK_EVERY = 50
PROBE_ROWS = 16


# ---------------------------------------------------------------------------------------------------------------------
# The tasks


@dataclass(frozen=True)
class Batch:
    """x [T, B, features] and what is asked at the last `len(targets)` steps: [A, B] numbers or classes."""

    x: Tensor
    targets: Tensor


@dataclass(frozen=True)
class Task:
    """A task of any length: its sequences, what counts as solved, and the lag from what is needed to the answer.

    `error` is the figure that is reported: mean squared error, or the share of wrong answers; `chance` is that of the
    best answer without memory, and at or below `solved` the task is solved.
    """

    name: str
    features: int
    answers: int
    outputs: int
    chance: float
    solved: float
    draw: Callable[[int, int, torch.Generator], Batch]
    needs: Callable[[int], int]
    source: str

    def losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The loss of each row [B], from [A, B, outputs] and [A, B]."""
        if self.outputs == 1:
            return (logits[..., 0] - targets).square().mean(0)
        return (
            functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
            .view(targets.shape)
            .mean(0)
        )

    def error(self, logits: Tensor, targets: Tensor) -> float:
        """What is reported, over all rows and answers."""
        if self.outputs == 1:
            return float((logits[..., 0] - targets).square().mean())
        return float((logits.argmax(-1) != targets).double().mean())


def adding(length: int, rows: int, generator: torch.Generator) -> Batch:
    """Add the two marked numbers, one in each half of the sequence; all numbers are uniform in [0, 1]."""
    values = torch.rand(length, rows, generator=generator)
    half = length // 2
    first = torch.randint(0, half, (rows,), generator=generator)
    second = torch.randint(half, length, (rows,), generator=generator)
    marks = torch.zeros(length, rows)
    places = torch.arange(rows)
    marks[first, places] = marks[second, places] = 1.0
    return Batch(torch.stack([values, marks], -1), (values * marks).sum(0, keepdim=True))


ITEMS, KINDS = 5, 4


def copying(length: int, rows: int, generator: torch.Generator) -> Batch:
    """Repeat the first five symbols after `length` blanks, when the mark comes; x is one-hot over kinds, blank, mark.

    The sequence is `length` + 10 steps long; each symbol lies `length` + 5 steps before its answer.
    """
    symbols = torch.randint(0, KINDS, (ITEMS, rows), generator=generator)
    blank, mark = KINDS, KINDS + 1
    steps = torch.full((length + 2 * ITEMS, rows), blank)
    steps[:ITEMS] = symbols
    steps[length + ITEMS] = mark
    return Batch(functional.one_hot(steps, KINDS + 2).float(), symbols)


def temporal_order(length: int, rows: int, generator: torch.Generator) -> Batch:
    """Which of two symbols came first and which second, among four others, a start and an end: four classes."""
    steps = torch.randint(2, 6, (length, rows), generator=generator)
    tenth = length // 10
    places = torch.arange(rows)
    order = torch.randint(0, 2, (2, rows), generator=generator)
    steps[torch.randint(tenth, 2 * tenth + 1, (rows,), generator=generator), places] = order[0]
    steps[torch.randint(4 * tenth, 5 * tenth + 1, (rows,), generator=generator), places] = order[1]
    steps[0], steps[-1] = 6, 7
    return Batch(functional.one_hot(steps, 8).float(), (2 * order[0] + order[1])[None])


TASKS = {
    "adding": Task(
        name="adding",
        features=2,
        answers=1,
        outputs=1,
        chance=1 / 6,
        solved=0.01,
        draw=adding,
        needs=lambda length: length - 1 - length // 4,
        source="Hochreiter & Schmidhuber 1997; as in Arjovsky et al. 2016, with a mark in each half",
    ),
    "copying": Task(
        name="copying",
        features=KINDS + 2,
        answers=ITEMS,
        outputs=KINDS,
        chance=1 - 1 / KINDS,
        solved=0.01,
        draw=copying,
        needs=lambda length: length + ITEMS,
        source="Hochreiter & Schmidhuber 1997, Arjovsky et al. 2016; smaller: 5 symbols of 4 kinds instead of 10 of 8",
    ),
    "order": Task(
        name="order",
        features=8,
        answers=1,
        outputs=4,
        chance=0.75,
        solved=0.01,
        draw=temporal_order,
        needs=lambda length: length - 1 - (3 * (length // 10)) // 2,
        source="Hochreiter & Schmidhuber 1997, task 6a, with two symbols",
    ),
}


# ---------------------------------------------------------------------------------------------------------------------
# The networks


@dataclass(frozen=True)
class Net:
    """A cell and how it begins: `begin` changes the fresh layer in place, told the lag that the task needs.

    Learning rates are the better of 1e-3 and 5e-3 in trials at 10 and 50 steps with seed 0, which is not used here.
    """

    name: str
    cell: tt.Cell
    begin: Callable[[tt.nn.Recurrent, int, torch.Generator], object] = lambda layer, needs, generator: None
    clip: float | None = None
    learning_rate: float = 5e-3


def _identity(layer: tt.nn.Recurrent, needs: int, generator: torch.Generator) -> None:
    """Le, Jaitly & Hinton 2015: the identity, and biases of zero."""
    identity_(layer)
    with torch.no_grad():
        layer.get_parameter("bias_ih_l0").zero_()
        layer.get_parameter("bias_hh_l0").zero_()


NETS = {
    net.name: net
    for net in (
        Net("elman", tt.Elman),
        Net(
            "elman orthogonal",
            tt.Elman,
            lambda layer, needs, generator: orthogonal_(layer, generator=generator),
            clip=1.0,
            learning_rate=1e-3,
        ),
        Net("elman identity", tt.Elman(activation=tt.relu), _identity, clip=1.0, learning_rate=1e-3),
        Net("gru", tt.GRU),
        Net("gru chrono", tt.GRU, lambda layer, needs, generator: chrono_(layer, needs + 1, generator=generator)),
        Net("lstm", tt.LSTM),
        Net("lstm chrono", tt.LSTM, lambda layer, needs, generator: chrono_(layer, needs + 1, generator=generator)),
    )
}


class Network(torch.nn.Module):
    """A recurrent layer and a read-out of its last steps."""

    def __init__(self, net: Net, task: Task, needs: int, units: int, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.recurrent = tt.nn.Recurrent(net.cell, task.features, units)
            self.readout = torch.nn.Linear(units, task.outputs)
            net.begin(self.recurrent, needs, torch.Generator().manual_seed(seed))
        self.answers = task.answers

    def forward(self, x: Tensor) -> Tensor:
        """x [T, B, features] to [A, B, outputs]."""
        outputs, _ = self.recurrent(x)
        logits: Tensor = self.readout(outputs[-self.answers :])
        return logits


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


@dataclass(frozen=True)
class Setting:
    """What is the same for all: units, rows in a batch, the most updates, sequences to test on."""

    units: int = 64
    rows: int = 32
    updates: int = 2000
    test_rows: int = 1000


@dataclass(frozen=True)
class Result:
    """One network on one task at one length.

    `share` is the share of the gradient that is left at the lag `needs` before training, `half_life` its fitted
    half-life, `share_after` the share once training has ended (NaN where it diverged or was not trained); `error` is on
    test sequences after `updates` updates, and `carried` at other lengths without training.
    `trained` is False where two shorter lengths in a row had been missed, so that only the reach was measured;
    `diverged` says that the loss became infinite or NaN, or the gradient, and training ended there.
    """

    task: str
    net: str
    length: int
    seed: int
    needs: int
    share: float
    half_life: float
    share_after: float
    error: float
    solved: bool
    updates: int
    seconds: float
    trained: bool
    diverged: bool
    carried: dict[str, float]


def measure(
    task: Task, net: Net, length: int, setting: Setting, seed: int, trains: bool = True
) -> Iterator[float | Result]:
    """The reach, then training if it trains; yields the share of the updates done, and the result at the end."""
    started = time.perf_counter()
    needs = task.needs(length)
    model = Network(net, task, needs, setting.units, seed)
    share, half_life = measured(model, task, length, needs)
    train = torch.Generator().manual_seed(1000 + seed)
    held_out = torch.Generator().manual_seed(2000 + seed)
    check, confirm = (task.draw(length, rows, held_out) for rows in (4 * setting.rows, setting.test_rows))
    optimiser = torch.optim.Adam(model.parameters(), lr=net.learning_rate)
    done, diverged = 0, False
    while trains and done < setting.updates:
        diverged = not update(model, task, optimiser, task.draw(length, setting.rows, train), net.clip)
        done += 1
        if diverged:
            break
        if done % CHECK_EVERY == 0:
            if all(test(model, task, unseen) <= task.solved / 2 for unseen in (check, confirm)):
                break
            yield done / setting.updates
    final = torch.Generator().manual_seed(3000 + seed)
    whole = trains and not diverged
    error = test(model, task, task.draw(length, setting.test_rows, final)) if whole else math.nan
    solved = error <= task.solved
    carried = {}
    if solved and task.name == "order":
        for further in CARRIED:
            carried[str(further)] = test(model, task, task.draw(further, setting.test_rows // 10, final))
    yield Result(
        task=task.name,
        net=net.name,
        length=length,
        seed=seed,
        needs=needs,
        share=share,
        half_life=half_life,
        share_after=measured(model, task, length, needs)[0] if whole else math.nan,
        error=error,
        solved=solved,
        updates=done,
        seconds=time.perf_counter() - started,
        trained=trains,
        diverged=diverged,
        carried=carried,
    )


def measured(model: Network, task: Task, length: int, needs: int) -> tuple[float, float]:
    """The share of the gradient left at the lag that is needed, and its half-life, for the network as it is."""
    batch = task.draw(length, PROBE_ROWS, torch.Generator().manual_seed(0))
    (found,) = reach(model, batch.x, lambda logits: task.losses(logits, batch.targets), needs, times=1, probes=1)
    return found.at_needs, found.half_life


def update(model: Network, task: Task, optimiser: torch.optim.Optimizer, batch: Batch, clip: float | None) -> bool:
    """One step of the optimiser; False, with nothing changed, where the gradient is not finite."""
    loss = task.losses(model(batch.x), batch.targets).mean()
    optimiser.zero_grad()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), math.inf if clip is None else clip)
    if not math.isfinite(float(norm)):
        return False
    optimiser.step()
    return True


@torch.no_grad()
def test(model: Network, task: Task, batch: Batch) -> float:
    """The error on a batch."""
    return task.error(model(batch.x), batch.targets)


def run(
    tasks: Sequence[str], nets: Sequence[str], lengths: Sequence[int], setting: Setting, seeds: int, everything: bool
) -> list[Result]:
    """All of them, shorter lengths first, with progress on the terminal."""
    jobs = [(t, n, length, s) for s in range(1, seeds + 1) for length in sorted(lengths) for t in tasks for n in nets]
    found: list[Result] = []
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f}%"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task("", total=len(jobs))
        for number, (task, net, length, seed) in enumerate(jobs):
            progress.update(bar, description=f"{task}, {length} steps, {net}", completed=number)
            before = [r.solved for r in found if (r.task, r.net, r.seed) == (task, net, seed)]
            trains = everything or before[-2:] != [False, False]
            for step in measure(TASKS[task], NETS[net], length, setting, seed, trains):
                if isinstance(step, Result):
                    found.append(step)
                else:
                    progress.update(bar, completed=number + step)
        progress.update(bar, completed=len(jobs))
    return found


def plain(result: Result) -> dict[str, Any]:
    """A result as JSON can hold it: what is infinite or NaN becomes null."""
    fields = asdict(result)
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in fields.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS))
    parser.add_argument("--lengths", nargs="+", type=int, default=list(LENGTHS))
    parser.add_argument("--updates", type=int, default=Setting.updates)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--all", action="store_true", help="train also where two shorter lengths were missed")
    parser.add_argument("--quick", action="store_true", help="a few updates at two lengths, to see that it runs")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder to write to")
    options = parser.parse_args(arguments)
    if min(options.lengths) < 10:
        parser.error("the shortest length is 10 steps")
    setting = Setting(updates=options.updates)
    if options.quick:
        options.lengths, setting = [10, 20], Setting(units=16, rows=8, updates=CHECK_EVERY, test_rows=100)
    torch.set_num_threads(1)
    started, worked = time.perf_counter(), time.process_time()
    results = run(options.tasks, options.nets, options.lengths, setting, options.seeds, options.all)
    record: dict[str, Any] = {
        "setting": {
            **asdict(setting),
            **{"seeds": options.seeds, "quick": options.quick, "threshold": THRESHOLD, "threads": 1},
            "minutes": (time.perf_counter() - started) / 60,
            "processor_minutes": (time.process_time() - worked) / 60,
            **{"torch": torch.__version__, "python": platform.python_version(), "processor": platform.machine()},
        },
        "tasks": {
            name: {"chance": TASKS[name].chance, "solved": TASKS[name].solved, "source": TASKS[name].source}
            for name in options.tasks
        },
        "nets": {
            name: {"cell": net.cell.name, "learning_rate": net.learning_rate, "clip": net.clip}
            for name, net in NETS.items()
            if name in options.nets
        },
        "results": [plain(result) for result in results],
    }
    print(as_markdown(record))
    write(record, options.out)


if __name__ == "__main__":
    main()
