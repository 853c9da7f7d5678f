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
from throughtime.equations import calculus, expr


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
    except OSError as error:
        if temporary is not None:
            with suppress(OSError):
                os.unlink(temporary)
        warnings.warn(
            f"compiled code could not be kept in {path.parent} ({error}); it will be compiled again", stacklevel=2
        )


@functools.cache
def directory() -> Path | None:
    """The private folder of this machine's compiled code, or None (with a warning) where there can be none."""
    asked = os.environ.get("THROUGHTIME_CACHE")
    root = Path(asked) if asked else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "throughtime"
    folder = root / _generation()
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        for place in (root, folder):
            state = place.stat()
            if hasattr(os, "getuid") and (state.st_uid != os.getuid() or stat.S_IMODE(state.st_mode) & 0o022):
                warnings.warn(
                    f"{place} can be written by others, so compiled code is not kept there; "
                    "make it private (chmod 700) or set THROUGHTIME_CACHE to a folder of your own",
                    stacklevel=2,
                )
                return None
    except OSError as error:
        warnings.warn(
            f"compiled code cannot be kept in {folder} ({error}), so it is compiled in every process; "
            "set THROUGHTIME_CACHE to a folder of your own",
            stacklevel=2,
        )
        return None
    return folder


def _generation() -> str:
    """The generators' source, the compiler and the machine, as one name."""
    digest = hashlib.sha256(llvm.fingerprint().encode())
    here = Path(__file__).parent
    for path in (*sorted(here.glob("*.py")), *(Path(str(module.__file__)) for module in (plan, calculus, expr))):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:32]


def _forget_lock() -> None:
    """In a forked child the lock may have been held by a thread that is gone."""
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_lock)
