"""The terminal: each command reads its arguments, calls the task and prints what comes back."""

from __future__ import annotations

import sys
from typing import NoReturn

import typer

from throughtime.cli import comparing, diagnosing, exporting, fitting, serving, showing
from throughtime.errors import ThroughtimeError

FOR_TASKS = ("pandas", "pyarrow", "sklearn", "matplotlib", "jinja2", "safetensors", "tomli_w")
"""Packages that the tasks need and the library does not."""

FOR_INTEROP = ("onnx", "onnxruntime", "onnxscript")
"""Packages that other libraries' files need."""

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Recurrent networks, written as equations, trained through time, seen through time.",
)
app.command()(comparing.compare)
app.command()(fitting.fit)
app.command()(serving.evaluate)
app.command()(serving.predict)
app.command()(serving.stream)
app.command()(exporting.export)
app.command()(diagnosing.diagnose)
app.command()(showing.show)


def main() -> None:
    """Run a command; what the library refuses is one line on stderr and exit status 2."""
    try:
        app()
    except ThroughtimeError as error:
        _refuse(str(error))
    except ModuleNotFoundError as error:
        extra = "tasks" if error.name in FOR_TASKS else "tasks,interop" if error.name in FOR_INTEROP else None
        if extra is None:
            raise
        _refuse(f"this command needs {error.name}; pip install 'throughtime[{extra}]'")


def _refuse(problem: str) -> NoReturn:
    typer.echo(f"throughtime: {problem}", err=True)
    sys.exit(2)
