"""Compiled code: made when first needed, kept in the process and, privately, on disk.

An entry is named by a hash of everything that it depends on: the cell's graph, what is asked of it, the source of the
generators, the compiler's version and the machine. It is written under another name and renamed, so that a reader sees
a whole file or none, and it begins with its own digest, so that a damaged one is noticed and made again.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import stat
import tempfile
import threading
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from throughtime.engine import plan
from throughtime.engine.targets.cpu import llvm
from throughtime.equations import calculus, cell, expr


@dataclass(frozen=True)
class Program:
    """A compiled function of a frame: its address, the fields that it must find set, and those that it sets itself."""

    address: int
    needs: frozenset[str]
    sets: frozenset[str]


@dataclass(frozen=True)
class Entry:
    """What is kept on disk: an object, and what `Program` says of its frame."""

    image: bytes
    needs: tuple[str, ...]
    sets: tuple[str, ...]


_programs: dict[tuple[object, ...], Program] = {}
_lock = threading.Lock()


def function(key: tuple[object, ...], name: str, write: Callable[[], str]) -> int:
    """The address of the function `name` of the LLVM IR that `write` gives; `key` says all that the IR depends on."""
    return program(key, name, lambda: llvm.Source(write())).address


def program(key: tuple[object, ...], name: str, write: Callable[[], llvm.Source]) -> Program:
    """The same for a function of a frame, with the fields that it reads and sets."""
    found = _programs.get(key)
    if found is not None:
        return found
    with _lock:
        if key not in _programs:
            entry = _entry(key, write)
            address = llvm.load(entry.image, name)
            _programs[key] = Program(address, frozenset(entry.needs), frozenset(entry.sets))
        return _programs[key]


def _entry(key: tuple[object, ...], write: Callable[[], llvm.Source]) -> Entry:
    folder = directory()
    path = folder / hashlib.sha256(repr(key).encode()).hexdigest() if folder else None
    if path is not None and (entry := _read(path)) is not None:
        return entry
    source = write()
    entry = Entry(llvm.compiled(source.text), source.needs, source.sets)
    if path is not None:
        _write(path, entry)
    return entry


def _read(path: Path) -> Entry | None:
    try:
        content = path.read_bytes()
    except OSError:
        return None
    digest, rest = content[:32], content[32:]
    if hashlib.sha256(rest).digest() != digest:
        return None
    length = int.from_bytes(rest[:8], "little")
    fields = json.loads(rest[8 : 8 + length])
    return Entry(rest[8 + length :], tuple(fields["needs"]), tuple(fields["sets"]))


def _write(path: Path, entry: Entry) -> None:
    fields = json.dumps({"needs": entry.needs, "sets": entry.sets}).encode()
    rest = len(fields).to_bytes(8, "little") + fields + entry.image
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(hashlib.sha256(rest).digest() + rest)
        os.replace(temporary, path)
        temporary = None
    except OSError as error:
        warnings.warn(
            f"compiled code could not be kept in {path.parent} ({_reason(error)}); it will be compiled again",
            stacklevel=2,
        )
    finally:
        if temporary is not None:
            with suppress(OSError):
                os.unlink(temporary)


@functools.cache
def directory() -> Path | None:
    """The private folder of this machine's compiled code, or None (with a warning) where there can be none.

    It is looked up once: a relative THROUGHTIME_CACHE is one below the folder that the process is in then.
    """
    place: Path | str = os.environ.get("THROUGHTIME_CACHE") or "the user's cache folder"
    try:
        place = _root().resolve()
        folder = place / generation()
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        reason = next((reason for part in (folder, *folder.parents) if (reason := _open_to_others(part, place))), None)
    except (OSError, RuntimeError) as error:  # pathlib raises the second for a home that it cannot find
        warnings.warn(
            f"compiled code cannot be kept in {place} ({_reason(error)}), so it is compiled in every process; "
            "set THROUGHTIME_CACHE to a folder of your own",
            stacklevel=2,
        )
        return None
    if reason:
        warnings.warn(
            f"{reason}, so compiled code is not kept there; "
            "make it private (chmod 700) or set THROUGHTIME_CACHE to a folder of your own",
            stacklevel=2,
        )
        return None
    return folder


def _root() -> Path:
    """The folder that is asked for, or `throughtime` in the user's cache folder; a relative one of XDG's is invalid."""
    asked, caches = os.environ.get("THROUGHTIME_CACHE"), os.environ.get("XDG_CACHE_HOME", "")
    if asked:
        return Path(asked).expanduser()
    return (Path(caches) if os.path.isabs(caches) else Path.home() / ".cache") / "throughtime"


def _open_to_others(part: Path, root: Path) -> str | None:
    """Why somebody else could put code into a folder: the root and what is in it must be the user's own.

    What the root lies in may be anybody's, as long as not everyone can put another folder in its place.
    """
    if not hasattr(os, "getuid"):
        return None
    state = part.stat()
    if not part.is_relative_to(root):
        shared = state.st_mode & stat.S_IWOTH and not state.st_mode & stat.S_ISVTX
        return f"{part}, in which {root} lies, can be written by others" if shared else None
    if state.st_uid != os.getuid():
        return f"{part} belongs to another user"
    return f"{part} can be written by others" if state.st_mode & 0o022 else None


def _reason(error: Exception) -> str:
    """An error without the names of files, which may be other ones each time: a warning is shown once for each text."""
    return getattr(error, "strerror", None) or str(error)


def sources() -> list[Path]:
    """The files that decide what a kernel does or how a frame is numbered."""
    modules = (plan, calculus, cell, expr)
    return [*sorted(Path(__file__).parent.glob("*.py")), *(Path(str(module.__file__)) for module in modules)]


def generation() -> str:
    """The generators' source, the compiler and the machine, as one name."""
    digest = hashlib.sha256(llvm.fingerprint().encode())
    for path in sources():
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)} ".encode() + content)
    return digest.hexdigest()[:32]


def _forget_lock() -> None:
    """In a forked child the lock may have been held by a thread that is gone."""
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_lock)
