"""Compiled code: made when first needed, kept in the process and, privately, on disk.

An entry is named by a hash of everything that it depends on: the cell's graph, what is asked of it, the source of the
generators, the compiler's version and the machine. It is written under another name and renamed, so that a reader sees
a whole file or none, and it begins with its own digest, so that a damaged one is noticed and made again.
"""

from __future__ import annotations

import functools
import hashlib
import os
import stat
import tempfile
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

from throughtime.engine import plan
from throughtime.engine.targets.cpu import llvm
from throughtime.equations import calculus, expr

_addresses: dict[tuple[object, ...], int] = {}
_lock = threading.Lock()


def function(key: tuple[object, ...], name: str, write: Callable[[], str]) -> int:
    """The address of the function `name` of the LLVM IR that `write` gives; `key` says all that the IR depends on."""
    address = _addresses.get(key)
    if address is not None:
        return address
    with _lock:
        if key not in _addresses:
            _addresses[key] = llvm.load(_image(key, write), name)
        return _addresses[key]


def _image(key: tuple[object, ...], write: Callable[[], str]) -> bytes:
    folder = directory()
    path = folder / hashlib.sha256(repr(key).encode()).hexdigest() if folder else None
    if path is not None and (image := _read(path)) is not None:
        return image
    image = llvm.compiled(write())
    if path is not None:
        _write(path, image)
    return image


def _read(path: Path) -> bytes | None:
    try:
        content = path.read_bytes()
    except OSError:
        return None
    digest, image = content[:32], content[32:]
    return image if hashlib.sha256(image).digest() == digest else None


def _write(path: Path, image: bytes) -> None:
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(hashlib.sha256(image).digest() + image)
        os.replace(temporary, path)
    except OSError as error:
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
