"""Files read whole: refused where they would not fit into memory, before that, and where text is not UTF-8."""

from __future__ import annotations

import codecs
import gzip
import io
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from throughtime.errors import DataError

SAMPLE = 1 << 20
PIECE = 1 << 26

BYTES_PER_CELL = 48
"""Memory that one number or symbol takes at the worst moment, beside twice the file itself; measured, rounded up."""


def require(path: Path) -> None:
    """Refuse a path where there is no file to read."""
    if path.is_dir():
        raise DataError(f"{path}: is a directory; name the data file in it")
    if not path.exists():
        raise DataError(f"{path}: no such file; give the path of a data file")


def kind(path: Path) -> str:
    """The suffix that says how a file is written, in small letters and without `.gz`: `.csv` for `a.CSV.gz`."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def read_bytes(path: Path, separators: bytes) -> bytes:
    """The whole file, unpacked if its name ends in `.gz`.

    `separators` are the bytes that stand between cells; how often they come in the first MiB tells how much memory the
    whole will take. Raises `DataError` for a file that cannot be read, and for one that needs more memory than is
    free (unless the system cannot tell), before it has taken as much.
    """
    require(path)
    packed = path.suffix.lower() == ".gz"
    try:
        with gzip.open(path) if packed else path.open("rb") as stream:
            pieces = [stream.read(SAMPLE)]
            density = sum(pieces[0].count(separator) for separator in separators) / max(1, len(pieces[0]))
            size = len(pieces[0]) if packed else max(len(pieces[0]), path.stat().st_size)
            check_fits(path, size, size * density)
            while piece := stream.read(PIECE):
                pieces.append(piece)
                size = sum(map(len, pieces))
                check_fits(path, size, size * density)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({first_line(error)}); give a whole file") from error
    return b"".join(pieces)


def check_fits(path: Path, size: float, cells: float) -> None:
    """Refuse a file of this many bytes and cells where twice its bytes and its cells are more than is free."""
    free = available_memory()
    needed = 2 * size + BYTES_PER_CELL * cells
    if free is not None and needed > free:
        raise DataError(
            f"{path}: holds {_gigabytes(size)}, which would take about {_gigabytes(needed)} of memory, and"
            f" {_gigabytes(free)} is free; keep the columns and sequences that matter, or train on a part of it"
        )


def check_text(data: bytes, path: Path) -> None:
    """Raise `DataError`, naming the line, where bytes are not UTF-8 text; a byte order mark is none of it."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        for start in range(0, len(data), PIECE):
            decoder.decode(
                data[start : start + PIECE]
            )  # in pieces: as text, the whole might take four times the memory
        decoder.decode(b"", final=True)
        is_text = b"\0" not in data
    except UnicodeDecodeError:
        is_text = False
    if not is_text:
        for number, line in enumerate(io.BytesIO(data), 1):
            decode(line, path, number)


def decode(line: bytes, path: Path, number: int) -> str:
    """One line of a file as text. Raises `DataError` where it is not UTF-8."""
    try:
        text = line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}, line {number}: not UTF-8 text; save the file as text in UTF-8") from error
    if "\0" in text:
        refuse_line(path, number, "not text; save the file as text in UTF-8")
    return text


def read_lines(path: Path, separators: bytes) -> Iterator[tuple[int, str]]:
    """The lines of a text file that are not blank, with their numbers from 1; ends of line left out."""
    for number, line in enumerate(io.BytesIO(read_bytes(path, separators)), 1):
        text = decode(line, path, number).removesuffix("\n").removesuffix("\r")
        if text.strip(" \r"):
            yield number, text


def available_memory() -> int | None:
    """Bytes that may be claimed now: what the system has free, or what a control group leaves if that is less.

    None where the system cannot tell.
    """
    told = [number for number in (_system_memory(), _group_memory()) if number is not None]
    return min(told, default=None)


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its name."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def refuse_line(path: Path, line: int, problem: str) -> NoReturn:
    """Refuse what stands in this line."""
    raise DataError(f"{path}, line {line}: {problem}")


def _system_memory() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def _group_memory(folder: Path = Path("/sys/fs/cgroup")) -> int | None:
    """What a control group (version 2) still allows; files that it merely holds in cache count as free."""
    try:
        limit = (folder / "memory.max").read_text(encoding="ascii").strip()
        used = int((folder / "memory.current").read_text(encoding="ascii"))
        entries = (line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
        cached = int(dict(entries).get("inactive_file", 0))
    except (OSError, ValueError):
        return None
    return None if limit == "max" else max(0, int(limit) - used + cached)


def _gigabytes(size: float) -> str:
    for unit, worth in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= worth:
            return f"{size / worth:.1f} {unit}"
    return f"{size:.0f} bytes"
