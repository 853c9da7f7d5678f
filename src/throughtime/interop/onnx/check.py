"""An exported file is run before it gets its name: ONNX Runtime's numbers beside the model's, or an error saying where.

The numbers may differ by rounding, which recurrences pass on from step to step: by `SHARE` of the largest entry.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from throughtime.errors import InteropError

if TYPE_CHECKING:
    from numpy.typing import NDArray

SHARE = {"float32": 1e-4, "float64": 1e-9}
"""How far two outputs may lie apart, as a share of the largest entry, or of 1 if that is more."""

SIZES = ((1, 7), (5, 1), (3, 11), (2, 13), (4, 17))
"""Batch sizes and numbers of steps to run at: three of them, each with two sizes that the file was not made with."""


@dataclass(frozen=True)
class Case:
    """What a file is given by name, what the model answers by name, and in words where that is."""

    where: str
    given: Mapping[str, NDArray[Any]]
    expected: Mapping[str, NDArray[Any]]


def other_sizes(batch: int = 0, steps: int = 0) -> list[tuple[int, int]]:
    """Three batch sizes and numbers of steps, none of them those of the example that the file was made with."""
    return [size for size in SIZES if size[0] != batch and size[1] != steps][:3]


def check(written: Path, shown: Path, cases: Iterable[Case]) -> None:
    """Run the file and compare. Raises InteropError, about a file called `shown`, if it fails or differs."""
    session = session_of(written, shown)
    names = [output.name for output in session.get_outputs()]
    for case in cases:
        try:
            found = dict(zip(names, session.run(None, dict(case.given)), strict=True))
        except Exception as error:  # its own kinds, which derive from RuntimeError, ValueError and Exception
            raise InteropError(f"{shown}: ONNX Runtime cannot run it at {case.where}: {_one_line(error)}") from error
        for name, expected in case.expected.items():
            if problem := difference(found[name], expected):
                raise InteropError(
                    f"{shown}: not written, because its output {name!r} differs from the model's at {case.where}: "
                    f"{problem}"
                )


def session_of(written: Path, shown: Path) -> Any:
    """The file in ONNX Runtime. Raises InteropError where it cannot be run there."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what is fatal; the rest comes as an exception
    try:
        return onnxruntime.InferenceSession(os.fspath(written), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise InteropError(f"{shown}: ONNX Runtime cannot load it: {_one_line(error)}") from error


def difference(found: NDArray[Any], expected: NDArray[Any]) -> str | None:
    """How two results differ by more than rounding, in words; None if they do not."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return f"{found.dtype} of shape {list(found.shape)}, not {expected.dtype} of shape {list(expected.shape)}"
    if not expected.size:
        return None
    if expected.dtype.kind != "f":
        apart = found != expected
        return f"{int(apart.sum())} of {apart.size} entries" if apart.any() else None
    finite = np.isfinite(expected)
    if not np.array_equal(found[~finite], expected[~finite], equal_nan=True) or not np.isfinite(found[finite]).all():
        return "other entries are not finite numbers"
    apart = np.where(finite, np.abs(np.where(finite, found, 0) - np.where(finite, expected, 0)), 0)
    allowed = SHARE[expected.dtype.name] * max(1.0, float(np.abs(expected[finite]).max(initial=0)))
    if apart.max() <= allowed:
        return None
    place = [int(i) for i in np.unravel_index(apart.argmax(), apart.shape)]
    return (
        f"by {apart.max():.3g} at {place}, where the model has {expected[tuple(place)]:.6g}; rounding explains "
        f"{allowed:.3g}"
    )


@contextmanager
def new_file(path: Path, overwrite: bool) -> Iterator[Path]:
    """A place to write: what is there when the block ends gets the name `path` at once, or is gone if it raised.

    Raises InteropError where the name is taken (unless `overwrite`) or nothing can be written.
    """
    if not overwrite and os.path.lexists(path):
        raise InteropError(f"{path}: exists already; choose another name, or say overwrite=True")
    if path.is_dir():
        raise InteropError(f"{path}: is a directory; give the name of a file")
    if not path.parent.is_dir():
        raise InteropError(f"{path.parent}: no such directory to write in; make it first")
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield partial
        if overwrite:
            os.replace(partial, path)
        else:
            _give_name(partial, path)
    except FileExistsError:
        raise InteropError(f"{path}: exists already; choose another name, or say overwrite=True") from None
    except OSError as error:
        raise InteropError(f"{path}: cannot be written ({error.strerror}); choose another place") from error
    finally:
        partial.unlink(missing_ok=True)


def _give_name(partial: Path, path: Path) -> None:
    """Rename, but raise FileExistsError where the name is taken."""
    try:
        os.link(partial, path)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP):
            raise
        # A file system without hard links: the name is taken as an empty file first, which no other then can take.
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
        os.replace(partial, path)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
