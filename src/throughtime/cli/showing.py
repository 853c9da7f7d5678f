"""`throughtime show`."""

from __future__ import annotations

from typing import Annotated

import typer


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
