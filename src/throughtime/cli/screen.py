"""What the commands share of the terminal: tables, bars of progress."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, BinaryIO

import typer

from throughtime.errors import ThroughtimeError

if TYPE_CHECKING:
    from throughtime.report.page import Table
    from throughtime.runs.fit import Event


@contextmanager
def epochs_trained(epochs: int) -> Iterator[Callable[[str, int], None]]:
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


@contextmanager
def training() -> Iterator[Callable[[Event], None]]:
    """A bar on stderr for what `runs.fit.fit` tells: loss, score, steps a second and time left; notices above."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from throughtime.runs.fit import Notice
    from throughtime.training.loop import Epoch

    told, numbers = TextColumn("{task.description}"), TextColumn("{task.fields[numbers]}")
    screen = Console(stderr=True)
    with Progress(
        told,
        BarColumn(),
        numbers,
        TimeRemainingColumn(),
        console=screen,
        transient=True,
        disable=not screen.is_terminal,
    ) as progress:
        bar = progress.add_task("reading the data", total=1.0, numbers="")
        score = ""

        def on_event(event: Event) -> None:
            nonlocal score
            if isinstance(event, Notice):
                say(event.text)
            elif isinstance(event, Epoch):
                score = "" if event.score is None else f"score {event.score:.1%}  "
            else:
                progress.update(
                    bar,
                    completed=event.done,
                    description=f"epoch {event.epoch}/{event.epochs}",
                    numbers=f"loss {event.loss:.4g}  {score}{event.steps_per_second:,.0f} steps/s",
                )

        yield on_event


@contextmanager
def waiting(doing: str) -> Iterator[None]:
    """A sign of life on stderr, where someone looks, while something goes on whose end cannot be foretold."""
    from rich.console import Console

    with Console(stderr=True).status(doing):
        yield


@contextmanager
def standard_output() -> Iterator[BinaryIO]:
    """Where answers go that have no file; a disk that is full is refused, a reader that has left is not an error."""
    try:
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
    except BrokenPipeError:
        raise  # typer ends quietly
    except OSError as error:
        raise ThroughtimeError(f"standard output: cannot be written ({error.strerror}); send it elsewhere") from error


def say(notice: str) -> None:
    """A line on stderr that the reader of the results should know."""
    typer.echo(f"Note: {notice}.", err=True)


def print_table(table: Table) -> None:
    """The table on stdout, its numbers to the right."""
    from rich import box
    from rich.console import Console
    from rich.table import Table as Drawn

    drawn = Drawn(*table.header, box=box.SIMPLE_HEAD, header_style="")
    for column in drawn.columns[1:]:
        column.justify = "right"
    for row in table.rows:
        drawn.add_row(*row)
    Console(highlight=False).print(drawn)
