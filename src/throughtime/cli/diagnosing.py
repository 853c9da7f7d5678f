"""`throughtime diagnose`."""

from __future__ import annotations

import shlex
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from throughtime.cli.screen import print_table


def diagnose(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished run.")],
    data: Annotated[
        str | None, typer.Option(help="Another file to look at, labelled; the run's training part if not given.")
    ] = None,
    needs: Annotated[
        int | None, typer.Option(min=1, help="Steps that the task has to bridge; first to last where one answers last.")
    ] = None,
    rows: Annotated[
        int | None, typer.Option(min=1, help="Sequences to look at; 32, or fewer long ones, if not given.")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads to compute with.")] = 1,
    out: Annotated[Path | None, typer.Option(help="Report to write; a new RUN-diagnosis.html if not given.")] = None,
) -> None:
    """Show where the gradient of a run's network goes, before training and after, and what to do about it."""
    from throughtime.report.page import render, save, unused_path
    from throughtime.runs.diagnose import diagnose as look_into
    from throughtime.runs.folder import load
    from throughtime.training.loop import on_threads

    loaded = load(run)
    path = unused_path(out, f"{loaded.path.resolve().name}-diagnosis.html")
    command = shlex.join(["throughtime", *sys.argv[1:]])
    with on_threads(threads), _parts() as on_part:
        found = look_into(loaded, data, needs=needs, rows=rows, command=command, on_part=on_part)
        on_part("the pictures")
        page = found.page()
        save(render(page), path)
    for paragraph in (f"{page.verdict}.", *page.findings):
        typer.echo(textwrap.fill(paragraph, width=100) + "\n")
    for chapter in page.chapters[:1]:
        if chapter.table is not None:
            print_table(chapter.table)
    for number, remedy in enumerate(page.remedies, start=1):
        typer.echo(textwrap.fill(f"{number}. {remedy.name}. {remedy.why}", width=100))
        typer.echo(textwrap.indent(remedy.call, "     ") + "\n")
    typer.echo(f"Report: {path}")


@contextmanager
def _parts() -> Iterator[Callable[[str], None]]:
    """What is being looked at, on stderr."""
    from rich.console import Console

    with Console(stderr=True).status("reading") as status:
        yield status.update
