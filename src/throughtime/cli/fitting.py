"""`throughtime fit`."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from throughtime.cli.options import DATA_HELP, LISTS, TASK_HELP, TaskName, listed, takes_columns
from throughtime.cli.screen import print_table, say, training
from throughtime.errors import ThroughtimeError
from throughtime.tasks.table import DEFAULT

if TYPE_CHECKING:
    from throughtime.runs.configuration import Config
    from throughtime.runs.folder import FinishedRun

_data = partial(typer.Option, rich_help_panel="The data")
_network = partial(typer.Option, rich_help_panel="The network")
_training = partial(typer.Option, rich_help_panel="The training")
_run = partial(typer.Option, rich_help_panel="The run")

Decays = Literal["cosine", "linear", "none"]


# An option that is None was not typed: then the file of --config decides, and then what `runs.configuration` says. The
# defaults shown are those; the tests compare them.
@takes_columns(_data)
def fit(
    context: typer.Context,
    columns: dict[str, str],
    file: Annotated[str | None, typer.Argument(metavar="DATA", help=DATA_HELP)] = None,
    task: Annotated[TaskName | None, _data(help=TASK_HELP, show_default=DEFAULT)] = None,
    test_fraction: Annotated[float | None, _data(help="Share for the test.", show_default="0.25")] = None,
    validation_fraction: Annotated[
        float | None, _data(help="Share of the rest that decides when to stop.", show_default="0.15")
    ] = None,
    split_seed: Annotated[int | None, _data(help="Decides the split alone.", show_default="0")] = None,
    cell: Annotated[
        str | None, _network(help="gru, lstm, ...; module:name for your own; or a saved cell.json.", show_default="gru")
    ] = None,
    hidden_size: Annotated[int | None, _network("--hidden", "--hidden-size", help="Units.", show_default="100")] = None,
    num_layers: Annotated[int | None, _network("--layers", "--num-layers", help="Layers.", show_default="1")] = None,
    bidirectional: Annotated[
        bool | None, _network(help="Read both ways; such a model cannot stream.", show_default="no")
    ] = None,
    dropout: Annotated[float | None, _network(help="Share of outputs dropped in training.", show_default="0.0")] = None,
    embedding_size: Annotated[int | None, _network(help="Numbers that stand for a symbol.", show_default="32")] = None,
    proj_size: Annotated[int | None, _network(help="Projected units, where CELL projects.", show_default="0")] = None,
    epochs: Annotated[int | None, _training(help="Passes over the training part.", show_default="60")] = None,
    batch_size: Annotated[int | None, _training(help="Sequences in a batch.", show_default="32")] = None,
    accumulate: Annotated[int | None, _training(help="Batches in an update.", show_default="1")] = None,
    learning_rate: Annotated[float | None, _training(help="AdamW's.", show_default="0.002")] = None,
    weight_decay: Annotated[float | None, _training(help="AdamW's, on matrices.", show_default="0.01")] = None,
    warmup: Annotated[
        float | None, _training(help="Share of the training in which the rate rises.", show_default="0.05")
    ] = None,
    decay: Annotated[Decays | None, _training(help="How the rate falls after that.", show_default="cosine")] = None,
    clip: Annotated[
        str | None, _training(help="Largest norm of the gradients: a number, auto or none.", show_default="auto")
    ] = None,
    patience: Annotated[
        str | None,
        _training(help="Epochs without a lower validation loss before the end, or none.", show_default="15"),
    ] = None,
    truncate: Annotated[int | None, _training(help="Cut back-propagation into windows of so many steps.")] = None,
    seed: Annotated[int | None, _run(help="Decides weights, order and dropout.", show_default="0")] = None,
    threads: Annotated[int | None, _run(help="Threads to compute with.", show_default="1")] = None,
    checkpoint_seconds: Annotated[
        float | None, _run(help="Least time between checkpoints.", show_default="60.0")
    ] = None,
    run: Annotated[Path | None, _run(help="Folder to make; a new DATA-CELL if not given.")] = None,
    config: Annotated[Path | None, _run(help="TOML file with any of these; what is typed wins over it.")] = None,
    resume: Annotated[bool, _run("--resume", help="Go on with RUN.partial from its last checkpoint.")] = False,
) -> None:
    """Train a network on DATA and keep it in a run folder, with its score on sequences that it has never seen."""
    from throughtime.runs.configuration import Config
    from throughtime.runs.fit import fit as train
    from throughtime.runs.folder import configuration_of, partial_of

    options = _typed(context.params)
    if resume and run is None:
        raise ThroughtimeError("--resume goes on with a run that was broken off; name it (--run)")
    if file is None and config is None:
        if run is None or not resume:
            raise ThroughtimeError("there is no DATA; give a file, a data set that ships here (vowels), or --config")
        resolved = configuration_of(run, options)
    else:
        resolved = Config.resolve(options, config)
    if resolved.run is None:
        resolved = replace(resolved, run=_unused(resolved))
    for notice in resolved.overridden:
        say(notice)
    try:
        with training() as on_event:
            finished = train(resolved, resume=resume, on_event=on_event)
    except KeyboardInterrupt:
        if resolved.run is not None and partial_of(resolved.run).exists():
            say(f"broken off; `throughtime fit --resume --run {shlex.quote(str(resolved.run))}` goes on from here")
        raise
    _print(finished)


def _typed(params: Mapping[str, Any]) -> dict[str, Any]:
    """The options that were typed, as the configuration has them."""
    options = {name: value for name, value in params.items() if name not in ("config", "resume") and value is not None}
    for name in LISTS & set(options):
        options[name] = listed(options[name])
    for name in ("clip", "patience"):
        if name in options:
            options[name] = _number_or_word(options[name])
    return options


def _number_or_word(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _unused(config: Config) -> Path:
    """The first of DATA-CELL, DATA-CELL-2, ... that no run has, finished or not."""
    from throughtime.runs.folder import partial_of

    data, cell = config.data.file, config.network.cell
    name = f"{Path(data).name.split('.')[0]}-{Path(cell.split(':')[-1]).stem}"
    names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    return next(path for path in map(Path, names) if not (path.exists() or partial_of(path).exists()))


def _print(run: FinishedRun) -> None:
    """The score beside the baselines, and where the run is."""
    from throughtime.report.page import Table

    result = run.result
    task = run.encoder.task
    rows = [(baseline["name"], task.shown(baseline["score"])) for baseline in result["baselines"]]
    network = run.configuration.network
    rows.append((f"{run.model.recurrent.cell.name}, {network.hidden_size} units", task.shown(result["score"])))
    print_table(Table(("", f"{task.measure} of {result['count']:,} test {task.words.unit}"), tuple(rows)))
    typer.echo(f"Run: {run.path}, report: {run.path / 'report.html'}")
