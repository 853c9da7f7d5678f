"""What watching a training costs: updates with `Watch` beside updates without, in turns, on one thread.

Each round trains the same network for one period of the watch (50 updates, one of them looked into) without it and
with it, in processor time, so that other work on the machine counts little. Writes results/watching.json and
results/watching.md; about a minute.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

import throughtime as tt
from throughtime.insight.watch import EVERY, Watch
from throughtime.runs.fit import environment

RESULTS = Path(__file__).parent / "results"
ROUNDS = 15
SHAPES = {
    "Elman, 15 steps, 12 inputs, 64 units": (tt.Elman, 15, 12, 64),
    "GRU, 28 steps, 12 inputs, 100 units": (tt.GRU, 28, 12, 100),
    "LSTM, 100 steps, 3 inputs, 128 units": (tt.LSTM, 100, 3, 128),
}
ROWS, CLASSES = 32, 9


class Classifier(nn.Module):
    """A recurrent layer and a read-out of its last step."""

    def __init__(self, cell: tt.Cell, inputs: int, units: int) -> None:
        super().__init__()
        self.recurrent = tt.nn.Recurrent(cell, inputs, units)
        self.readout = tt.nn.LastStep(units, CLASSES)

    def forward(self, x: Tensor, lengths: list[int]) -> Tensor:
        logits: Tensor = self.readout(self.recurrent(x, lengths=lengths)[0], lengths)
        return logits


def period(model: Classifier, update: Callable[[], Tensor], watched: bool) -> float:
    """Processor seconds of one period of the watch."""
    with Watch(model) if watched else nullcontext() as watch:
        started = time.process_time()
        for _ in range(EVERY):
            norm = update()
            if watch is not None:
                watch.observe(norm, threshold=1.0)
        return time.process_time() - started


def measured(cell: tt.Cell, steps: int, inputs: int, units: int) -> dict[str, list[float]]:
    """Seconds of every period, with the watch and without."""
    torch.manual_seed(0)
    model = Classifier(cell, inputs, units)
    optimiser = torch.optim.AdamW(model.parameters(), fused=True)
    x, classes = torch.randn(steps, ROWS, inputs), torch.randint(CLASSES, (ROWS,))
    lengths = [steps - row % (steps // 2) for row in range(ROWS)]

    def update() -> Tensor:
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(x, lengths), classes).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        return norm

    for watched in (False, True):
        period(model, update, watched)
    seconds: dict[str, list[float]] = {"without": [], "with": []}
    for number in range(ROUNDS):
        for name in sorted(seconds, reverse=bool(number % 2)):
            seconds[name].append(period(model, update, name == "with"))
    return seconds


def main() -> None:
    """Measure every shape, and write the table."""
    torch.set_num_threads(1)
    found = {name: measured(*shape) for name, shape in SHAPES.items()}
    lines = [
        "# What watching a training costs",
        "",
        f"Processor time of {EVERY} updates of {ROWS} ragged sequences on one thread, one of the updates looked into:",
        f"the median of {ROUNDS} rounds in turns. `python benchmarks/watching.py`",
        "",
        "| network | without | watched | more |",
        "|---|---|---|---|",
    ]
    for name, seconds in found.items():
        without, watched = median(seconds["without"]), median(seconds["with"])
        lines.append(
            f"| {name} | {1000 * without:.0f} ms | {1000 * watched:.0f} ms | {100 * (watched / without - 1):+.1f}% |"
        )
    RESULTS.mkdir(exist_ok=True)
    record = {"environment": environment(threads=1), "seconds": found}
    (RESULTS / "watching.json").write_text(json.dumps(record, indent=1) + "\n")
    (RESULTS / "watching.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
