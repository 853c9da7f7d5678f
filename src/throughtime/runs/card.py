"""What a finished run says of itself: the model card and the report, from the same numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from throughtime.equations.cell import Cell
from throughtime.report.page import Chapter, Page, Picture, Table, render
from throughtime.runs.configuration import Config
from throughtime.tasks.encoding import Encoded
from throughtime.tasks.task import Score, Task
from throughtime.training.recipe import ENOUGH, HOW

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Story:
    """What there is to tell: how the model was made, what it is, and the lines of its metrics."""

    config: Config
    encoded: Encoded
    cell: Cell
    score: Score
    metrics: tuple[dict[str, Any], ...]
    name: str

    @property
    def epochs(self) -> tuple[dict[str, Any], ...]:
        """The lines of the epochs."""
        return self.metrics[:-1]

    @property
    def result(self) -> dict[str, Any]:
        """The line of the test part."""
        return self.metrics[-1]

    @property
    def task(self) -> Task:
        """What it learnt."""
        return self.encoded.task

    @property
    def counted(self) -> str:
        """What a score is of: "test sequences right"."""
        return f"test {self.task.words.unit} {self.task.measure}"

    @property
    def verdict(self) -> str:
        """The score and the best of the baselines, in a sentence without its full stop."""
        result = self.result
        task = self.task
        best = max(result["baselines"], key=lambda row: task.rank(row["score"]))
        beside = f"beside {task.shown(best['score'])} for {best['name']}, which needs no network"
        return (
            f"{self.cell.name} gets {task.shown(result['score'])} of {result['count']:,} test {task.words.unit}"
            f" {task.measure}, {beside}"
        )

    @property
    def scores(self) -> list[tuple[str, float]]:
        """Every row of the table: the baselines, then the network."""
        rows = [(row["name"], row["score"]) for row in self.result["baselines"]]
        network = self.config.network
        size = f"{network.hidden_size} units" + (f" x {network.num_layers} layers" if network.num_layers > 1 else "")
        return [*rows, (f"{self.cell.name}, {size}", self.result["score"])]

    @property
    def uncertainty(self) -> str:
        """How far chance alone may move the score."""
        return self.task.caution(self.result["score"], self.result["count"])

    @property
    def clipping(self) -> str:
        """Where gradients were clipped, and how that was found."""
        clip, threshold = self.config.training.clip, self.result["clip"]
        if clip is None:
            return "not clipped"
        if clip != "auto":
            return f"clipped at {clip:g}, as the configuration says"
        if threshold is None:
            return f"not clipped: there were fewer than {ENOUGH} updates to take a threshold from"
        return f"clipped at {threshold:.3g} in the end, {HOW}"

    @property
    def stopping(self) -> str:
        """Which epoch the weights are of, and why."""
        result, config = self.result, self.config
        if self.encoded.validation is None:
            return f"the weights are those after {result['epochs']} epochs; no validation part was kept out"
        if config.training.patience is None:
            return f"the weights are those after {result['epochs']} epochs; the validation part was only watched"
        if not any(line["best"] for line in self.epochs):
            return f"the weights are those after {result['epochs']} epochs; no loss on the validation part was finite"
        ended = "all were trained" if result["epochs"] == config.training.epochs else "then patience was over"
        return (
            f"the weights are those of epoch {result['weights_of_epoch']} of {result['epochs']}, of the lowest loss"
            f" on the validation part ({ended})"
        )

    @property
    def facts(self) -> dict[str, str]:
        """How it was made, term by term."""
        encoded, config = self.encoded, self.config
        sizes = [("training", encoded.train), ("validation", encoded.validation), ("test", encoded.test)]
        return {
            "data": encoded.source,
            "split": encoded.split,
            "sequences": ", ".join(f"{len(part):,} for {name}" for name, part in sizes if part is not None),
            "training": (
                f"AdamW, learning rate {config.training.learning_rate:g}, {config.training.batch_size} sequences a"
                f" batch; {self.stopping}"
            ),
            "gradients": self.clipping,
            "parameters": f"{self.result['parameters']:,}",
            "seeds": f"{config.seed} for the weights and the order, {config.data.split_seed} for the split",
        }


def readme(story: Story) -> str:
    """The model card, in Markdown."""
    encoded = story.encoded
    scores = "\n".join(f"| {name} | {story.task.shown(score)} |" for name, score in story.scores)
    facts = "\n".join(f"- **{term}**: {words}" for term, words in story.facts.items())
    notices = "".join(f"- {notice}.\n" for notice in encoded.notices)
    columns = ", ".join(f"`{name}`" for name in (*encoded.encoder.features, *encoded.encoder.symbol_columns))
    streamed = (
        ""
        if story.config.network.bidirectional
        else f"throughtime stream {story.name}                 # step by step, one JSON line in, one out\n"
    )
    return f"""# {story.name}

{story.verdict}.

| | {story.counted} |
|---|---|
{scores}

{story.uncertainty}

## What it does

It reads {columns} at every step and says {story.task.says(encoded.encoder.codec)}.

```
throughtime predict {story.name} DATA           # the same columns as in training
throughtime evaluate {story.name} DATA          # its score on labelled data
{streamed}throughtime fit --config {story.name}/config.toml --run NEW   # the same training again, to the bit
```

```python
from pathlib import Path
from throughtime.runs.folder import load

run = load(Path("{story.name}"))   # verifies every file; executes none
run.model, run.encoder
```

## How it was made

{facts}

`config.toml` holds every option, `cell.json` the equations, `environment.json` versions and machine, `metrics.jsonl`
every epoch, `report.html` the curves, and `manifest.json` a SHA-256 of each file.

## Limits

- The score holds for data like that of the test part, split as said above; nothing was tuned on it.
- It knows no answer but those above, and gives one to whatever it is shown; its probabilities are not calibrated.
- Numbers are scaled by the training part's mean and deviation; far outside of its range it has learnt nothing.
{notices}"""


def report(story: Story) -> str:
    """The report, one HTML page."""
    rows = tuple((name, story.task.shown(score)) for name, score in story.scores)
    page = Page(
        title=story.name,
        verdict=story.verdict,
        findings=[
            story.uncertainty,
            f"{story.stopping[0].upper()}{story.stopping[1:]}.",
            f"Gradients: {story.clipping}.",
        ],
        chapters=[
            Chapter("In numbers", table=Table(("", story.counted), rows)),
            Chapter("In pictures", pictures=_pictures(story)),
        ],
        facts=story.facts,
        notices=story.encoded.notices,
    )
    return render(page)


def _pictures(story: Story) -> list[Picture]:
    from throughtime.report import drawing

    losses = {"training": _series(story, "loss")}
    scores = {}
    if story.encoded.validation is not None:
        losses["validation"] = _series(story, "validation_loss")
        scores["validation"] = 100 * _series(story, "score")
    norms = {"median norm": _series(story, "norm")}
    clipped = story.result["clip"] is not None
    if clipped:
        norms["clipped above"] = _series(story, "threshold")
    words = story.task.words
    pictures = [
        Picture(
            "Loss",
            drawing.training(losses, f"loss per {words.each}, nats", log=False),
            f"Mean cross entropy of a {words.each}, over each epoch.",
            f"Curves of the loss by epoch, ending at {losses['training'][-1]:.3g} on the training part.",
        ),
        Picture(
            "Gradients",
            drawing.training(norms, "norm of all gradients", log=True),
            f"Median over the updates of each epoch; gradients are {story.clipping}.",
            "A curve of the gradients' norm by epoch"
            + (", and one of the norm above which they were clipped." if clipped else "."),
        ),
    ]
    if scores:
        pictures.append(
            Picture(
                "Score",
                drawing.training(scores, f"{words.unit} {story.task.measure}, %", log=False),
                f"Share of the validation part's {words.unit} that are {story.task.measure}.",
                f"A curve of the validation score by epoch, at best {scores['validation'].max():.1f} per cent.",
            )
        )
    pictures += story.score.pictures(
        "Confusions",
        f"True class against said class on the test part, in per cent of the true class's {words.unit}.",
        "A table of squares, true class down, said class across, the darker the more.",
    )
    return pictures


def _series(story: Story, name: str) -> NDArray[np.float64]:
    """What the metrics say of each epoch, [epochs]; NaN where they say nothing."""
    return np.array([np.nan if line[name] is None else line[name] for line in story.epochs], dtype=np.float64)
