"""The terminal: each command reads its arguments, calls the task and prints what comes back."""

from __future__ import annotations

import shlex
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from throughtime.errors import ThroughtimeError

if TYPE_CHECKING:
    from throughtime.insight.report import Table

FOR_TASKS = ("pandas", "pyarrow", "sklearn", "matplotlib", "jinja2")
"""Packages that the tasks need and the library does not."""

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Recurrent networks, written as equations, trained through time, seen through time.",
)


def main() -> None:
    """Run a command; what the library refuses is one line on stderr and exit status 2."""
    try:
        app()
    except ThroughtimeError as error:
        _refuse(str(error))
    except ModuleNotFoundError as error:
        if error.name not in FOR_TASKS:
            raise
        _refuse(f"this command needs {error.name}; pip install 'throughtime[tasks]'")


def _refuse(problem: str) -> NoReturn:
    typer.echo(f"throughtime: {problem}", err=True)
    sys.exit(2)


@app.callback()
def _commands() -> None:
    """Commands keep their names even while there is only one."""


@app.command()
def compare(
    data: Annotated[str, typer.Argument(help="vowels, or a CSV or Parquet file with one row a step.")],
    sequence_id: Annotated[str | None, typer.Option(help="Column that tells the sequences apart.")] = None,
    time: Annotated[str | None, typer.Option(help="Column that orders a sequence's steps: numbers or dates.")] = None,
    target: Annotated[str | None, typer.Option(help="Column with the class, one for each sequence.")] = None,
    features: Annotated[str, typer.Option(help="Feature columns, comma-separated; all others if not given.")] = "",
    group: Annotated[str | None, typer.Option(help="Column that the split keeps whole: a patient, a machine.")] = None,
    part: Annotated[str | None, typer.Option(help="Column that says train or test: a split of your own.")] = None,
    test_fraction: Annotated[float, typer.Option(help="Share of the sequences for the test.")] = 0.25,
    cells: Annotated[str, typer.Option(help="Cells to compare, comma-separated.")] = "elman,gru,lstm",
    hidden: Annotated[int, typer.Option(min=1, help="Units of each network.")] = 100,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training part.")] = 60,
    seeds: Annotated[int, typer.Option(min=1, help="How often each cell is trained, with seeds 0, 1, ...")] = 3,
    learning_rate: Annotated[float, typer.Option(help="Adam's learning rate.")] = 2e-3,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences in a mini-batch.")] = 32,
    clip: Annotated[float | None, typer.Option(help="Largest norm of the gradients; no clipping if not given.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads to compute with.")] = 1,
    out: Annotated[Path | None, typer.Option(help="Report to write; a new throughtime-DATA.html if not given.")] = None,
) -> None:
    """Train cells on DATA and report their accuracy, size and speed, and how far their gradient reaches."""
    from throughtime.insight.report import render, save, unused_path
    from throughtime.tasks import findings
    from throughtime.tasks.compare import compare as run
    from throughtime.tasks.encoding import encode
    from throughtime.tasks.reading import read
    from throughtime.tasks.training import Recipe

    recipe = Recipe(epochs, batch_size, learning_rate, clip)
    sequences = read(
        data,
        sequence_id=sequence_id,
        time=time,
        target=target,
        features=_listed(features),
        group=group,
        part=part,
    )
    path = unused_path(out, f"throughtime-{sequences.name}.html")
    task = encode(sequences, test_fraction=test_fraction)
    names = _listed(cells)
    with _progress(len(names) * seeds * epochs) as on_epoch:
        comparison = run(
            task,
            cells=names,
            hidden_size=hidden,
            recipe=recipe,
            seeds=seeds,
            threads=threads,
            on_epoch=on_epoch,
        )
    _print_table(findings.table(comparison))
    for paragraph in (findings.headline(comparison) + ".", *findings.findings(comparison)):
        typer.echo(textwrap.fill(paragraph, width=100) + "\n")
    for notice in task.notices:
        typer.echo(f"Note: {notice}.")
    save(render(findings.page(comparison, shlex.join(["throughtime", *sys.argv[1:]]))), path)
    typer.echo(f"Report: {path}")


@app.command()
def show(
    cell: Annotated[str, typer.Argument(help="elman, gru, lstm, ..., or module:name for a cell of your own.")],
    latex: Annotated[bool, typer.Option("--latex", help="Print LaTeX instead of text.")] = False,
    input_size: Annotated[int, typer.Option("--input", min=1, help="Inputs, for the parameter count.")] = 12,
    hidden_size: Annotated[int, typer.Option("--hidden", min=1, help="Units, for the parameter count.")] = 100,
    proj_size: Annotated[int, typer.Option("--proj", min=0, help="Projected units, where CELL projects.")] = 0,
    target: Annotated[str, typer.Option(help="Print instead the kernels that a target generates: cpu.")] = "",
    assembly: Annotated[bool, typer.Option("--assembly", help="With --target: assembly, not LLVM IR.")] = False,
) -> None:
    """Print CELL's equations, its adjoints through time, its step Jacobian and its parameters; or its kernels."""
    from throughtime.equations.latex import written
    from throughtime.equations.lookup import find

    if target:
        from throughtime.engine.recurrence import listing

        typer.echo(listing(find(cell), target, assembly=assembly), nl=False)
        return
    sizes = {"input_size": input_size, "hidden_size": hidden_size, "proj_size": proj_size}
    typer.echo(written(find(cell), latex=latex, **sizes), nl=False)


def _listed(names: str) -> list[str]:
    return [name.strip() for name in names.split(",") if name.strip()]


@contextmanager
def _progress(epochs: int) -> Iterator[Callable[[str, int], None]]:
    """A bar on stderr that moves on with each epoch trained."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    told, left = TextColumn("{task.description}"), TimeRemainingColumn()
    screen = Console(stderr=True)
    quiet = not screen.is_terminal
    with Progress(
        told, BarColumn(), MofNCompleteColumn(), left, console=screen, transient=True, disable=quiet
    ) as progress:
        bar = progress.add_task("training", total=epochs)
        yield lambda cell, seed: progress.update(bar, advance=1, description=f"{cell}, seed {seed}")


def _print_table(table: Table) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table as Drawn

    drawn = Drawn(*table.header, box=box.SIMPLE_HEAD, header_style="")
    for column in drawn.columns[1:]:
        column.justify = "right"
    for row in table.rows:
        drawn.add_row(*row)
    Console(highlight=False).print(drawn)


if __name__ == "__main__":
    main()
