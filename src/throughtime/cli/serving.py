"""`throughtime evaluate`, `predict` and `stream`: a finished run in use."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from throughtime.cli.options import FormatName, takes_columns
from throughtime.cli.screen import print_table, say, standard_output, waiting

if TYPE_CHECKING:
    from throughtime.runs.serve import Scored

RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished run.", show_default=False)]
Format = Annotated[
    FormatName,
    typer.Option("--format", help="Of standard input, where DATA is -.", show_default=True),
]


@takes_columns(renamed=True)
def evaluate(
    run: RunFolder,
    data: Annotated[str, typer.Argument(help="A labelled file like the one of the training; - is standard input.")],
    columns: dict[str, str],
    kind: Format = "jsonl",
    out: Annotated[Path | None, typer.Option(help="JSON file to write, with the confusions too.")] = None,
) -> None:
    """Score the model of RUN on labelled DATA, class by class."""
    from throughtime.runs import serve as serving
    from throughtime.runs.folder import load

    if out is not None:
        serving.refuse_output(out, (".json",))
    with waiting(f"scoring {data}"):
        found = serving.evaluate(load(run), data, kind=f".{kind}", columns=columns)
    for notice in found.notices:
        say(notice)
    if out is not None:
        record = json.dumps(found.record(), indent=1, ensure_ascii=False, allow_nan=False)
        serving.write_new(out, f"{record}\n".encode())
    _print(found)


@takes_columns(renamed=True)
def predict(
    run: RunFolder,
    columns: dict[str, str],
    data: Annotated[str, typer.Argument(help="A file like the one of the training; labels are not looked at.")] = "-",
    kind: Format = "jsonl",
    out: Annotated[Path | None, typer.Option(help="File to write: .jsonl, .csv or .parquet.")] = None,
) -> None:
    """Write what the model of RUN says of each sequence in DATA: labels and probabilities.

    Without --out the answers go to standard output as JSON lines; without DATA it reads standard input.
    """
    from throughtime.runs import serve as serving
    from throughtime.runs.folder import load

    if out is not None:
        serving.refuse_output(out)
    with waiting(f"answering {data}"):
        loaded = load(run)
        sequences = serving.read_for(loaded, data, labelled=False, kind=f".{kind}", columns=columns)
        answers = serving.predict(loaded, sequences)
    for notice in answers.notices:
        say(notice)
    if out is None:
        with standard_output() as stdout:
            stdout.write(serving.as_jsonl(answers))
    else:
        serving.write(answers, out)
        typer.echo(f"{out}: answers to {len(answers.ids):,} sequences")


def stream(
    run: RunFolder,
    most: Annotated[int | None, typer.Option("--max-ids", min=1, help="Sequences to keep the state of.")] = None,
    when_full: Annotated[
        Literal["refuse", "forget"],
        typer.Option(help="Beyond --max-ids: refuse a new id, or forget the one that was silent for longest."),
    ] = "refuse",
) -> None:
    """Answer JSON lines one by one: a step of a sequence in, what the model says so far out.

    In: {"id": "a", "x": [0.5, 1.2]}, or "x" as an object with the columns' names. {"id": "a", "end": true} ends a
    sequence. A line that cannot be answered gets a line with its error, and changes nothing.
    """
    from throughtime.runs.folder import load
    from throughtime.runs.streaming import Streams, serve

    loaded = load(run)
    streams = Streams(loaded.model, loaded.encoder, most=most, when_full=when_full)
    each = f"{streams.state_bytes:,} bytes each"
    if most is None:
        say(f"the state of every id is kept until it ends, {each}; --max-ids sets a bound")
    else:
        then = "a new one is refused" if when_full == "refuse" else "the one silent for longest is forgotten"
        say(f"at most {most:,} states are kept, one for an id, {each}; beyond that {then}")
    with standard_output() as stdout:
        serve(streams, sys.stdin.buffer, stdout)


def _print(found: Scored) -> None:
    print_table(found.score.table())
    typer.echo(found.score.sentence())
