"""`throughtime export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from throughtime.cli.screen import waiting


def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished run.", show_default=False)],
    out: Annotated[Path, typer.Option(help="File to write: .onnx.", show_default=False)],
    to: Annotated[
        Literal["onnx", "onnx-step"],
        typer.Option("--to", help="The whole sequence, or one step with every state in and out."),
    ] = "onnx",
) -> None:
    """Write the model of RUN as a file that other runtimes read, with its scaler, vocabulary and classes.

    The file is run in ONNX Runtime and compared with the model before it gets its name.
    """
    from throughtime.runs import export as exporting
    from throughtime.runs import serve
    from throughtime.runs.folder import load

    serve.refuse_output(out, (".onnx",))
    with waiting(f"exporting {run}"):
        exporting.export(load(run), out, to)
    typer.echo(f"{out}: {'one step' if to == 'onnx-step' else 'whole sequences'}, as the model of {run} answers")
