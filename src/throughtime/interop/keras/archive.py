"""`.keras` archives: a zip whose members are read into memory by their names, and nothing is unpacked."""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from throughtime.errors import InteropError
from throughtime.interop.keras.texts import as_json

EXPANSION = 20
"""How many times its stored size a member may have; Keras stores them as they are."""


def is_archive(content: bytes) -> bool:
    """Whether the file begins as a zip does."""
    return content[:4] in (b"PK\x03\x04", b"PK\x05\x06")


class Archive:
    """An opened `.keras` file. Raises InteropError, naming file and member, for what is damaged or missing."""

    def __init__(self, file: Path, content: bytes) -> None:
        self.file = file
        try:
            self._zip = zipfile.ZipFile(io.BytesIO(content))
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
            raise InteropError(f"{file} is a damaged zip ({error}); save the model again") from error

    def config(self) -> Mapping[str, Any]:
        """config.json, with the version of Keras from metadata.json if that is there."""
        found = dict(as_json(f"{self.file}: config.json", lambda: self._member("config.json")))
        if "metadata.json" in self._zip.namelist():
            metadata = as_json(f"{self.file}: metadata.json", lambda: self._member("metadata.json"))
            found["keras_version"] = metadata.get("keras_version")
        return found

    @property
    def weights_place(self) -> str:
        """How messages name the weights."""
        return f"{self.file}: model.weights.h5"

    def weights(self) -> bytes:
        """model.weights.h5, as it stands."""
        if "model.weights.npz" in self._zip.namelist():
            raise InteropError(f"{self.file} keeps its weights as .npz, which can hold pickled objects; save it as h5")
        return self._member("model.weights.h5")

    def _member(self, name: str) -> bytes:
        try:
            entry = self._zip.getinfo(name)
        except KeyError:
            raise InteropError(f"{self.file} has no {name}; it is a zip, but no Keras model") from None
        if entry.file_size > EXPANSION * max(entry.compress_size, 1 << 16):
            raise InteropError(
                f"{self.file}: {name} claims {entry.file_size} bytes and stores {entry.compress_size}; it is not read"
            )
        try:
            return self._zip.read(entry)
        except (zipfile.BadZipFile, zlib.error, OSError, EOFError, RuntimeError, NotImplementedError) as error:
            raise InteropError(f"{self.file}: {name} is damaged ({error}); save the model again") from error
