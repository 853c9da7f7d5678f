"""Options that several commands share, made from what they are options of."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from throughtime.data.formats import FORMATS, SUFFIXES
from throughtime.data.packaged import SHIPPED
from throughtime.data.sequences import Columns
from throughtime.tasks.table import TASKS

if TYPE_CHECKING:
    TaskName = str
    FormatName = str
else:  # typer reads the choices from these
    TaskName = Literal[tuple(TASKS)]
    FormatName = Literal[tuple(suffix.removeprefix(".") for suffix in SUFFIXES)]

DATA_HELP = f"{', '.join(SHIPPED)}, or a file: {' '.join(suffix for each in FORMATS for suffix in each.suffixes)}"

TASK_HELP = "; ".join(f"{name}: {task.words.help}" for name, task in TASKS.items()) + "."

LISTS = {each.name for each in fields(Columns) if isinstance(each.default, tuple)}
"""Options of `Columns` that hold several names."""

Command = Callable[..., None]


def listed(names: str) -> list[str]:
    """Names as they are typed, with commas between them."""
    return [name.strip() for name in names.split(",") if name.strip()]


def takes_columns(option: Callable[..., Any] = typer.Option, *, renamed: bool = False) -> Callable[[Command], Command]:
    """In place of the command's parameter `columns`, an option for each field of `Columns`; it is given by name.

    What is not typed is left out of the dictionary that the command gets. `option` makes typer's options. With
    `renamed`, only those that may be called otherwise in a file to predict on.
    """
    chosen = [each for each in fields(Columns) if each.metadata["renamed"] or not renamed]

    def decorate(command: Command) -> Command:
        signature = inspect.signature(command, eval_str=True)

        @functools.wraps(command)
        def wrapped(**typed: Any) -> None:
            given = {each.name: typed.pop(each.name) for each in chosen}
            command(columns={name: value for name, value in given.items() if value is not None}, **typed)

        parameters: list[inspect.Parameter] = []
        for parameter in signature.parameters.values():
            own = [parameter]
            if parameter.name == "columns":
                own = [
                    parameter.replace(
                        name=each.name,
                        annotation=Annotated[str | None, option(help=_help(each.metadata["help"], renamed))],
                        default=None,
                    )
                    for each in chosen
                ]
            parameters += own
        del wrapped.__wrapped__  # typer would look for the signature there
        wrapped.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        wrapped.__annotations__ = {each.name: each.annotation for each in parameters}
        return wrapped

    return decorate


def _help(words: str, renamed: bool) -> str:
    return f"{words.removesuffix('.')}, if not named as in the training." if renamed else words


def columns_of(typed: dict[str, str]) -> Columns:
    """The columns that were typed; lists have commas in them."""
    values: dict[str, Any] = {
        each.name: tuple(listed(typed[each.name])) if each.name in LISTS else typed[each.name]
        for each in fields(Columns)
        if each.name in typed
    }
    return Columns(**values)
