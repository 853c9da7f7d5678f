"""From what is typed to a cell: a name of the catalogue, or `module:name` for a cell of one's own."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from throughtime.equations.catalogue import CELLS
from throughtime.equations.cell import Cell
from throughtime.errors import CellError


def find(name: str) -> Cell:
    """The cell of this name; `module:name` imports the module, from the current folder too.

    Raises CellError, with near names where there are any, for whatever does not lead to a cell.
    """
    if ":" in name:
        module_name, _, attribute = name.partition(":")
        return _of_module(_imported(module_name, name), attribute)
    if name in CELLS:
        return CELLS[name]
    known = f"{', '.join(CELLS)}, or module:name for a cell of your own"
    raise CellError(f"there is no cell {name!r}{_near(name, CELLS)}; the cells are {known}")


def _imported(module_name: str, asked: str) -> ModuleType:
    if not module_name or not all(part.isidentifier() for part in module_name.split(".")):
        raise CellError(f"{asked!r}: {module_name!r} is not the name of a module")
    if module_name.endswith(".py"):
        raise CellError(
            f"{asked!r} names a file; write the module, {asked.replace('.py:', ':')!r}, in the file's folder"
        )
    try:
        with _current_folder_on_path():
            return importlib.import_module(module_name)
    except CellError:
        raise
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise CellError(f"there is no module {module_name!r} in {Path.cwd()} or among the installed ones") from None
        raise CellError(f"module {module_name!r} cannot be imported: {error}") from error
    except Exception as error:
        reason = " ".join(str(error).split())
        raise CellError(f"module {module_name!r} cannot be imported: {type(error).__name__}: {reason}") from error


def _of_module(module: ModuleType, attribute: str) -> Cell:
    where = f"module {module.__name__!r}"
    cells = {name: value for name, value in vars(module).items() if isinstance(value, Cell)}
    listed = f"its cells are {', '.join(cells)}" if cells else "it defines no cell; put @cell(...) above a function"
    if not hasattr(module, attribute):
        raise CellError(f"{where} has no {attribute!r}{_near(attribute, cells)}; {listed}")
    found = getattr(module, attribute)
    if not isinstance(found, Cell):
        raise CellError(f"{attribute!r} of {where} is {_described(found)}, not a cell; {listed}")
    return found


def _described(value: object) -> str:
    if isinstance(value, type):
        return "a class"
    return "a plain function" if callable(value) else f"a value of type {type(value).__name__}"


def _near(name: str, known: dict[str, Cell]) -> str:
    lowered = {candidate.lower(): candidate for candidate in known}
    near = difflib.get_close_matches(name.lower(), lowered, n=2, cutoff=0.5)
    return f" (did you mean {' or '.join(repr(lowered[candidate]) for candidate in near)}?)" if near else ""


@contextmanager
def _current_folder_on_path() -> Iterator[None]:
    """A console script, unlike `python -m`, does not look for modules where it was called."""
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)
