"""`throughtime evaluate`, `predict` and `stream`: a finished run in use."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from throughtime.cli.screen import print_table, say, standard_output, waiting

if TYPE_CHECKING:
    from throughtime.runs.serve import Evaluation

RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished run.", show_default=False)]
Format = Annotated[
    Literal["jsonl", "csv", "parquet", "txt", "conll"],
    typer.Option("--format", help="Of standard input, where DATA is -.", show_default=True),
]


SequenceId = Annotated[str | None, typer.Option(help="Column of the ids, if not named as in the training.")]
Time = Annotated[str | None, typer.Option(help="Column that orders the steps, if not named as in the training.")]
Target = Annotated[str | None, typer.Option(help="Column with the label, if not named as in the training.")]


def evaluate(
    run: RunFolder,
    data: Annotated[str, typer.Argument(help="A labelled file like the one of the training; - is standard input.")],
    kind: Format = "jsonl",
    sequence_id: SequenceId = None,
    time: Time = None,
    target: Target = None,
    out: Annotated[Path | None, typer.Option(help="JSON file to write, with the confusions too.")] = None,
) -> None:
    """Score the model of RUN on labelled DATA, class by class."""
    from throughtime.runs import serve as serving
    from throughtime.runs.folder import load

    if out is not None:
        serving.refuse_output(out, (".json",))
    columns = _named(sequence_id=sequence_id, time=time, target=target)
    with waiting(f"scoring {data}"):
        found = serving.evaluate(load(run), data, kind=f".{kind}", columns=columns)
    for notice in found.notices:
        say(notice)
    if out is not None:
        record = json.dumps(found.record(), indent=1, ensure_ascii=False, allow_nan=False)
        serving.write_new(out, f"{record}\n".encode())
    _print(found)


def predict(
    run: RunFolder,
    data: Annotated[str, typer.Argument(help="A file like the one of the training; labels are not looked at.")] = "-",
    kind: Format = "jsonl",
    sequence_id: SequenceId = None,
    time: Time = None,
    target: Target = None,
    out: Annotated[Path | None, typer.Option(help="File to write: .jsonl, .csv or .parquet.")] = None,
) -> None:
    """Write what the model of RUN says of each sequence in DATA: labels and probabilities.

    Without --out the answers go to standard output as JSON lines; without DATA it reads standard input.
    """
    from throughtime.runs import serve as serving
    from throughtime.runs.folder import load

    if out is not None:
        serving.refuse_output(out)
    columns = _named(sequence_id=sequence_id, time=time, target=target)
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


def _named(**columns: str | None) -> dict[str, str]:
    return {role: column for role, column in columns.items() if column is not None}


def _print(found: Evaluation) -> None:
    from throughtime.report.page import Table

    rows = tuple(
        (name, f"{count:,}", _share(recall), _share(precision)) for name, count, recall, precision in found.by_class()
    )
    print_table(Table(("class", "steps" if found.task == "tag" else "sequences", "recall", "precision"), rows))
    unit = "steps" if found.task == "tag" else "sequences"
    label, share = found.commonest
    typer.echo(
        f"{found.accuracy:.1%} of {found.total:,} {unit} right; the commonest class there, {label!r}, is {share:.1%}."
        f" Mean -ln p of the right class: {found.log_loss:.4g}."
    )


def _share(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.1%}"
