"""Japanese Vowels: throughtime.nn beside plain torch.nn, the same model, seeds, batches and loop.

    python benchmarks/vowels_accuracy.py

One layer of 100 units, read at the last step, Adam 2e-3, 60 epochs of batches of 32. Writes one JSON and one Markdown
file of results, complete or not at all.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

import throughtime as tt
from throughtime.tasks.encoding import Encoded, encode
from throughtime.tasks.reading import read_shipped
from throughtime.tasks.training import Recipe, predict, train

UNITS = 100
Maker = Callable[[int, int], torch.nn.Module]
LAYERS: dict[str, dict[str, Maker]] = {
    "RNN": {"torch.nn": torch.nn.RNN, "throughtime.nn": tt.nn.RNN},
    "GRU": {"torch.nn": torch.nn.GRU, "throughtime.nn": tt.nn.GRU},
    "LSTM": {"torch.nn": torch.nn.LSTM, "throughtime.nn": tt.nn.LSTM},
}


class Classifier(torch.nn.Module):
    """A layer and a read-out of its last state; ragged batches go to each library in the way that it offers."""

    def __init__(self, layer: Maker, features: int, classes: int) -> None:
        super().__init__()
        self.layer = layer(features, UNITS)
        self.readout = torch.nn.Linear(UNITS, classes)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """x [T, B, features] to logits [B, classes]."""
        if isinstance(self.layer, tt.nn.Layer):
            _, state = self.layer(x, lengths=lengths)
        else:
            _, state = self.layer(pack_padded_sequence(x, lengths, enforce_sorted=False))
        h = state[0] if isinstance(state, tuple) else state
        logits: Tensor = self.readout(h[-1])
        return logits


@dataclass(frozen=True)
class Score:
    """One cell in one library: the test accuracy of each seed, and the seconds of training per epoch."""

    cell: str
    library: str
    accuracies: list[float]
    seconds_per_epoch: float

    @property
    def mean(self) -> float:
        return statistics.fmean(self.accuracies)

    @property
    def standard_error(self) -> float:
        """Of the mean; not a number for a single seed."""
        if len(self.accuracies) < 2:
            return math.nan
        return statistics.stdev(self.accuracies) / math.sqrt(len(self.accuracies))


def measure(data: Encoded, seeds: int, recipe: Recipe) -> list[Score]:
    """Both libraries seed by seed in turn, so that whatever else the machine does falls on both."""
    runs = [(cell, seed) for cell in LAYERS for seed in range(seeds)]
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for cell, seed in track(runs, description="training"):
        for library, layer in LAYERS[cell].items():
            found.setdefault((cell, library), []).append(run(layer, data, seed, recipe))
    return [
        Score(cell, library, [a for a, _ in results], statistics.median(s for _, s in results))
        for (cell, library), results in found.items()
    ]


def run(layer: Maker, data: Encoded, seed: int, recipe: Recipe) -> tuple[float, float]:
    """The test accuracy of one training run, and its seconds per epoch."""
    torch.manual_seed(seed)
    model: Any = Classifier(layer, len(data.features), len(data.vocabulary))
    epochs = list(train(model, data.train, recipe, seed=seed))
    right = predict(model, data.test) == data.test.classes
    return right.double().mean().item(), statistics.median(epoch.seconds for epoch in epochs)


def verdicts(scores: Sequence[Score]) -> dict[str, bool | None]:
    """For each cell, whether throughtime's mean is at least torch's less torch's standard error; None for one seed."""
    by_name = {(score.cell, score.library): score for score in scores}
    found: dict[str, bool | None] = {}
    for cell in LAYERS:
        theirs, ours = by_name[cell, "torch.nn"], by_name[cell, "throughtime.nn"]
        least = theirs.mean - theirs.standard_error
        found[cell] = None if math.isnan(least) else ours.mean >= least
    return found


def as_markdown(scores: Sequence[Score], setting: dict[str, Any]) -> str:
    """The table and, below it, what it was measured with."""
    lines = [
        "# Japanese Vowels, test accuracy",
        "",
        "| cell | library | mean | standard error | seconds per epoch |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {s.cell} | {s.library} | {s.mean:.4f} | {s.standard_error:.4f} | {s.seconds_per_epoch:.3f} |"
        for s in scores
    ]
    said = "; ".join(f"{name} {value}" for name, value in setting.items())
    words = {True: "yes", False: "no", None: "one seed cannot tell"}
    held = ", ".join(f"{cell}: {words[holds]}" for cell, holds in verdicts(scores).items())
    lines += ["", f"Not below torch.nn by more than one standard error: {held}.", "", f"Setting: {said}.", ""]
    return "\n".join(lines)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results", help="folder to write to")
    options = parser.parse_args()
    recipe = Recipe(epochs=options.epochs, batch_size=32, learning_rate=2e-3)
    data = encode(read_shipped("vowels"))
    scores = measure(data, options.seeds, recipe)
    setting = {
        "seeds": options.seeds,
        "units": UNITS,
        **{name: value for name, value in asdict(recipe).items() if value is not None},
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": platform.machine(),
    }
    text = as_markdown(scores, setting)
    print(text)
    record = {"setting": setting, "scores": [asdict(score) for score in scores], "holds": verdicts(scores)}
    write(options.results / "vowels_accuracy.json", json.dumps(record, indent=1) + "\n")
    write(options.results / "vowels_accuracy.md", text)


def write(path: Path, text: str) -> None:
    """The whole file or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(path.suffix + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


if __name__ == "__main__":
    main()
