"""Real data: throughtime beside plain torch.nn, the same models, first weights, batches and recipe, over ten seeds.

    python benchmarks/real_data.py --threads 1            # about twenty minutes on a quiet machine
    python benchmarks/real_data.py --choose PLAID         # how the recipes were chosen: on a validation part

`packaged_data.py` says what must be installed for the data. Both sides go through the library's own reading, scaling,
training loop and scoring; the plain side's network holds nothing but torch.nn. Nothing is chosen by the test part.
A row that misses its bar stays missed, and is run once more with twice as many other seeds: trainings that amplify
rounding end anywhere among each other, and so miss by chance now and then; a fault would miss again.
Writes `real_data.json`, `.md`, `.png` and `.svg`, each complete or not at all.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import packaged_data
import real_data_report
import torch
from record import processor
from rich.console import Console
from rich.progress import Progress, TaskID
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from throughtime.data.batches import Batch, Part
from throughtime.data.sequences import Sequences
from throughtime.equations.catalogue import CELLS
from throughtime.nn import Masks
from throughtime.tasks.encoding import Encoded, encode
from throughtime.tasks.model import Architecture, SequenceModel, build
from throughtime.tasks.table import TASKS, read
from throughtime.training.evaluation import evaluate
from throughtime.training.loop import train
from throughtime.training.recipe import Recipe

HERE = Path(__file__).parent
TORCH: dict[str, Callable[..., nn.RNNBase]] = {"elman": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}
RECIPE = Recipe(epochs=60, batch_size=32, learning_rate=2e-3, patience=None)
FEW = replace(RECIPE, epochs=100, batch_size=16)
"""For a few dozen sequences, which give few updates an epoch."""
LEARNING_RATES = (1e-3, 2e-3, 5e-3, 1e-2)
CHOOSING_SEEDS = (100, 101, 102)


@dataclass(frozen=True)
class Problem:
    """A data set, the networks tried on it and how they are trained."""

    name: str
    read: Callable[[], Sequences]
    files: Callable[[], tuple[Path, ...]] = tuple
    cells: tuple[str, ...] = ("elman", "gru", "lstm")
    hidden_size: int = 64
    bidirectional: bool = False
    recipe: Recipe = RECIPE
    note: str = ""


def published(data: packaged_data.Published, **options: Any) -> dict[str, Any]:
    """What a `Problem` needs to read a data set of the archive."""
    return {
        "read": lambda: packaged_data.read_published(data, **options),
        "files": lambda: (data.file("train"), data.file("test")),
    }


def stress_file() -> Path:
    return packaged_data.shipped(*packaged_data.STRESS_FILE)


PROBLEMS = {
    problem.name: problem
    for problem in (
        Problem("JapaneseVowels", lambda: read("vowels", task=TASKS["classify"]), hidden_size=100),
        Problem(
            "JapaneseVowels, both directions",
            lambda: read("vowels", task=TASKS["classify"]),
            cells=("lstm",),
            hidden_size=100,
            bidirectional=True,
        ),
        Problem("ItalyPowerDemand", recipe=FEW, **published(packaged_data.ITALY_POWER_DEMAND)),
        Problem("BasicMotions", recipe=replace(FEW, learning_rate=1e-2), **published(packaged_data.BASIC_MOTIONS)),
        Problem(
            "PLAID",
            recipe=replace(RECIPE, learning_rate=5e-3),
            note="The currents' inverse hyperbolic sine; 25 values, five cycles of the mains, make a step",
            **published(packaged_data.PLAID, frame=25, curb=True),
        ),
        Problem(
            "CMUdict stress",
            lambda: packaged_data.read_stress(stress_file().read_text(encoding="utf-8"), keep=0.05),
            files=lambda: (stress_file(),),
            bidirectional=True,
            recipe=replace(RECIPE, epochs=10, batch_size=64, learning_rate=1e-2),
            note="Five words in a hundred, and the part of each, by its SHA-256",
        ),
    )
}


class Plain(SequenceModel):
    """The network of `SequenceModel` in torch.nn alone: the computation, not the class, is what is replaced.

    Ragged batches go to torch in the quicker of the two ways that are right: padded where the layer reads forwards
    only, since what lies past an end then touches nothing before it; packed where it also reads backwards.
    """

    def __init__(self, cell: str, shape: Architecture) -> None:
        nn.Module.__init__(self)
        self.architecture, self.by_step = shape, shape.task.by_step
        size = shape.embedding_size
        self.embeddings = nn.ModuleList(nn.Embedding(count, size, padding_idx=0) for count in shape.vocabularies)
        self.layer = TORCH[cell](shape.input_size, shape.hidden_size, bidirectional=shape.bidirectional)
        self.linear = nn.Linear(shape.hidden_size * (2 if shape.bidirectional else 1), shape.answers)

    def forward(self, batch: Batch, masks: Masks | None = None) -> Tensor:
        """Logits [B, classes] to classify, [T, B, classes] to tag."""
        embedded = [embedding(batch.symbols[..., i]) for i, embedding in enumerate(self.embeddings)]
        x = torch.cat([batch.x, *embedded], -1)
        ragged = int(batch.lengths.min()) < len(x)
        if self.architecture.bidirectional and ragged:
            packed, state = self.layer(pack_padded_sequence(x, batch.lengths, enforce_sorted=False))
            output, _ = pad_packed_sequence(packed)
        else:
            output, state = self.layer(x)
        if self.by_step:
            return self.linear(output)
        if ragged and not self.architecture.bidirectional:
            return self.linear(output[batch.lengths - 1, torch.arange(len(batch.lengths))])
        h_n = state[0] if isinstance(state, tuple) else state
        return self.linear(torch.cat(list(h_n), -1))


def twins(cell: str, shape: Architecture, seed: int) -> dict[str, SequenceModel]:
    """Both networks, beginning with the weights that torch.nn draws."""
    torch.manual_seed(seed)
    plain, ours = Plain(cell, shape), build(CELLS[cell], shape, seed=seed)
    renamed = {"layer": "recurrent", "linear": "readout.linear", "embeddings": "embeddings"}
    weights = {}
    for name, tensor in plain.state_dict().items():
        first, _, rest = name.partition(".")
        weights[f"{renamed[first]}.{rest}"] = tensor
    ours.load_state_dict(weights)
    return {"torch.nn": plain, "throughtime": ours}


@dataclass
class Score:
    """One cell of one library on one data set: test score and seconds by seed."""

    problem: str
    cell: str
    library: str
    scores: list[float] = field(default_factory=list)
    seconds_per_epoch: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def measure(
    problem: Problem, data: Encoded, seeds: Sequence[int], on_run: Callable[[str], None] = lambda words: None
) -> list[Score]:
    """Both libraries in turn, seed by seed, so that whatever else the machine does falls on both."""
    shape = shape_of(problem, data)
    found: dict[tuple[str, str], Score] = {}
    for seed in seeds:
        for cell in problem.cells:
            models = list(twins(cell, shape, seed).items())
            for library, model in models if seed % 2 == 0 else reversed(models):
                score = found.setdefault((cell, library), Score(problem.name, cell, library))
                epochs = [epoch.seconds for epoch in train(model, data.train, problem.recipe, seed=seed)]
                score.scores.append(evaluate(model, data.test).headline)
                score.seconds.append(sum(epochs))
                score.seconds_per_epoch.append(statistics.median(epochs[1:] or [math.nan]))
                on_run(f"{problem.name}, {cell}, {library}, seed {seed}")
    return list(found.values())


def shape_of(problem: Problem, data: Encoded) -> Architecture:
    return Architecture.fitting(data.encoder, hidden_size=problem.hidden_size, bidirectional=problem.bidirectional)


def describe(problem: Problem, data: Encoded) -> dict[str, Any]:
    """What the results rest on."""
    lengths = torch.cat([data.train.lengths, data.test.lengths])
    return {
        "source": data.source,
        "files": {path.name: packaged_data.digest(path) for path in problem.files()},
        "split": data.split,
        "train": len(data.train),
        "test": len(data.test),
        "steps": [int(lengths.min()), int(lengths.max())],
        "features": len(data.encoder.features),
        "classes": list(data.encoder.codec.to_json()["classes"]),
        "task": data.task.name,
        "units": problem.hidden_size,
        "bidirectional": problem.bidirectional,
        "recipe": asdict(problem.recipe),
        "note": problem.note,
        "baselines": {base.name: base.score for base in [*data.task.baselines(data), *nearest_series(data)]},
    }


def nearest_series(data: Encoded) -> Iterator[Any]:
    """1-nearest-neighbour by the Euclidean distance of whole series, where all are of one length and all numbers."""
    from sklearn.neighbors import KNeighborsClassifier

    from throughtime.tasks.task import Baseline

    lengths = {len(steps) for steps in (*data.train.steps, *data.test.steps)}
    if not data.task.by_step and not data.train.symbols and len(lengths) == 1:
        train_x, test_x = (torch.stack(part.steps).flatten(1).numpy() for part in (data.train, data.test))
        nearest = KNeighborsClassifier(n_neighbors=1).fit(train_x, torch.as_tensor(data.train.targets).numpy())
        yield Baseline(
            "1-nearest neighbour, whole series",
            float(nearest.score(test_x, torch.as_tensor(data.test.targets).numpy())),
        )


def choose(problem: Problem, screen: Console) -> None:
    """Print the validation score of each learning rate, over seeds that are not used again.

    It is throughtime's network that is tried, as the quicker one: the twins differ by rounding alone.
    """
    data = validating(problem.read())
    for rate in LEARNING_RATES:
        recipe = replace(problem.recipe, learning_rate=rate)
        scores = {
            cell: statistics.fmean(
                validation_score(twins(cell, shape_of(problem, data), seed)["throughtime"], data, recipe, seed)
                for seed in CHOOSING_SEEDS
            )
            for cell in problem.cells
        }
        by_cell = ", ".join(f"{cell} {score:.4f}" for cell, score in scores.items())
        screen.print(
            f"{problem.name}, learning rate {rate:g}: {statistics.fmean(scores.values()):.4f} ({by_cell})",
            soft_wrap=True,
        )


def validation_score(model: SequenceModel, data: Encoded, recipe: Recipe, seed: int) -> float:
    for _ in train(model, data.train, recipe, seed=seed):
        pass
    return evaluate(model, data.test).headline


def encoded(sequences: Sequences, **options: Any) -> Encoded:
    """The sequences for the task whose labels they have."""
    return encode(TASKS["tag" if sequences.role.by_step else "classify"], sequences, **options)


def validating(sequences: Sequences) -> Encoded:
    """The training part alone, a quarter of it in the place of the test part, which is not even encoded."""
    parts = sequences.parts or ()
    kept = [place for place, part in enumerate(parts) if part == "train"]
    rows = {name: getattr(sequences, name) for name in ("ids", "steps", "labels", "groups", "symbols")}
    chosen: dict[str, Any] = {name: tuple(values[i] for i in kept) for name, values in rows.items() if values}
    return encoded(replace(sequences, parts=None, **chosen), test_fraction=0.25, seed=CHOOSING_SEEDS[0])


def quick(data: Encoded) -> Encoded:
    """The first, the last and some sequences between, of each part."""

    def some(part: Part) -> Part:
        return part.subset(torch.linspace(0, len(part) - 1, min(len(part), 60)).long())

    return replace(data, train=some(data.train), test=some(data.test))


def setting_of(options: argparse.Namespace, begun: datetime) -> dict[str, Any]:
    return {
        "date": begun.isoformat(timespec="seconds"),
        "minutes": round((datetime.now(UTC) - begun).total_seconds() / 60, 1),
        "seeds": options.seeds,
        "threads": options.threads,
        "quick": options.quick,
        "processor": processor(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[2], 1),  # of the last fifteen minutes, about what this takes
        "system": platform.system(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "throughtime": version("throughtime"),
        },
    }


def read_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=tuple(PROBLEMS), default=list(PROBLEMS))
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="two seeds, two epochs, few sequences")
    parser.add_argument("--choose", choices=tuple(PROBLEMS), help="compare learning rates on a validation part")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder to write to")
    options = parser.parse_args(arguments)
    if options.seeds < 2:
        parser.error("--seeds must be at least 2, for a standard error")
    return options


def told(progress: Progress, runs: TaskID, words: str) -> None:
    progress.update(runs, advance=1, description=words)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    options, begun = read_options(arguments), datetime.now(UTC)
    screen = Console(stderr=True, highlight=False)
    torch.set_num_threads(options.threads)
    if options.choose:
        choose(PROBLEMS[options.choose], screen)
        return
    seeds = 2 if options.quick else options.seeds
    found: list[Score] = []
    again: list[Score] = []
    described: dict[str, Any] = {}
    with Progress(console=screen) as progress:
        runs = progress.add_task("reading", total=sum(2 * seeds * len(PROBLEMS[name].cells) for name in options.data))
        for name in options.data:
            problem, data = PROBLEMS[name], encoded(PROBLEMS[name].read())
            if options.quick:
                problem, data = replace(problem, recipe=replace(problem.recipe, epochs=2)), quick(data)
            described[name] = describe(problem, data)
            tell = partial(told, progress, runs)
            scores = measure(problem, data, range(seeds), tell)
            for score in scores:
                screen.print(f"{score.problem}, {score.cell}, {score.library}: {statistics.fmean(score.scores):.4f}")
            found += scores
            if missed := tuple(row.cell for row in real_data_report.rows(map(asdict, scores)) if not row.holds):
                progress.update(runs, total=(progress.tasks[0].total or 0) + 4 * seeds * len(missed))
                again += measure(replace(problem, cells=missed), data, range(seeds, 3 * seeds), tell)
    record = {
        "setting": setting_of(options, begun) | {"seeds": seeds},
        "problems": described,
        "scores": [asdict(score) for score in found],
        "again": [asdict(score) for score in again],
    }
    print(real_data_report.as_markdown(record))
    real_data_report.write(record, options.out)


if __name__ == "__main__":
    main()
