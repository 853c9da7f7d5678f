"""`throughtime compare`."""

from __future__ import annotations

import shlex
import sys
import textwrap
from pathlib import Path
from typing import Annotated, Literal

import typer

from throughtime.cli.options import DATA_HELP, TASK_HELP, TaskName, columns_of, listed, takes_columns
from throughtime.cli.screen import epochs_trained, print_table
from throughtime.errors import ThroughtimeError
from throughtime.tasks.table import DEFAULT, TASKS, read


@takes_columns()
def compare(
    data: Annotated[str, typer.Argument(help=DATA_HELP)],
    columns: dict[str, str],
    task: Annotated[TaskName, typer.Option(help=TASK_HELP)] = DEFAULT,
    test_fraction: Annotated[float, typer.Option(help="Share of the sequences for the test.")] = 0.25,
    cells: Annotated[str, typer.Option(help="Cells, comma-separated; module:name for your own.")] = "elman,gru,lstm",
    hidden: Annotated[int, typer.Option(min=1, help="Units of each network; see --match.")] = 100,
    match: Annotated[
        Literal["hidden", "params"],
        typer.Option(help="Equal units; or equal parameters, with --hidden the units of the cell that has the most."),
    ] = "hidden",
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training part.")] = 60,
    seeds: Annotated[int, typer.Option(min=1, help="How often each cell is trained, with seeds 0, 1, ...")] = 3,
    learning_rate: Annotated[float, typer.Option(help="AdamW's.")] = 2e-3,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences in a mini-batch.")] = 32,
    clip: Annotated[str, typer.Option(help="Largest norm of the gradients: a number, auto or none.")] = "auto",
    threads: Annotated[int, typer.Option(min=1, help="Threads to compute with.")] = 1,
    out: Annotated[Path | None, typer.Option(help="Report to write; a new throughtime-DATA.html if not given.")] = None,
) -> None:
    """Train cells on DATA, each on the same budget, and report their accuracy, size, speed and reach."""
    from throughtime.report.page import render, save, unused_path
    from throughtime.runs import findings
    from throughtime.runs.compare import compare as run
    from throughtime.tasks.encoding import encode
    from throughtime.training.recipe import Recipe

    recipe = Recipe(epochs, batch_size, learning_rate, _clip(clip), patience=None)
    wanted = TASKS[task]
    sequences = read(data, columns_of(columns), task=wanted)
    path = unused_path(out, f"throughtime-{sequences.name}.html")
    encoded = encode(wanted, sequences, test_fraction=test_fraction)
    names = listed(cells)
    with epochs_trained(len(names) * seeds * epochs) as on_epoch:
        comparison = run(
            encoded,
            cells=names,
            hidden_size=hidden,
            match=match,
            recipe=recipe,
            seeds=seeds,
            threads=threads,
            on_epoch=on_epoch,
        )
    print_table(findings.table(comparison))
    for paragraph in (findings.headline(comparison) + ".", *findings.findings(comparison)):
        typer.echo(textwrap.fill(paragraph, width=100) + "\n")
    for notice in encoded.notices:
        typer.echo(f"Note: {notice}.")
    save(render(findings.page(comparison, shlex.join(["throughtime", *sys.argv[1:]]))), path)
    typer.echo(f"Report: {path}")


def _clip(typed: str) -> float | Literal["auto"] | None:
    if typed in ("auto", "none"):
        return "auto" if typed == "auto" else None
    try:
        return float(typed)
    except ValueError:
        raise ThroughtimeError(f"--clip is {typed!r}; give a number, auto or none") from None
