"""Keras's weights in HDF5, read as plain arrays: no link to another file, no filter, nothing that is not numbers."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from throughtime.errors import InteropError
from throughtime.interop.keras.described import Array
from throughtime.interop.keras.texts import as_json


class Weights:
    """The weights in an HDF5 file's bytes; `place` names the file. A context manager, which closes it.

    Keras 3 keeps them by the layers' classes (`layers/lstm_1/cell/vars/0`), whole models of the older format by the
    layers' names, with the list of each one's weights as an attribute.
    """

    def __init__(self, place: str, content: bytes) -> None:
        try:
            import h5py
        except ModuleNotFoundError as error:
            raise InteropError(f"{place} needs h5py to be read; pip install 'throughtime[interop]'") from error
        self._h5py, self.place = h5py, place
        if not content.startswith(b"\x89HDF\r\n\x1a\n"):
            raise InteropError(f"{place} is neither a .keras archive nor HDF5")
        with self._damage(place):
            self._file = h5py.File(io.BytesIO(content), "r")

    def __enter__(self) -> Weights:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def config(self) -> Mapping[str, Any] | None:
        """The configuration of a whole model in HDF5; None where the file holds weights alone."""
        with self._damage(self.place):
            found = self._texts(self._file, "model_config")
        return as_json(f"{self.place}: model_config", lambda: found[0]) if found else None

    @property
    def version(self) -> str | None:
        """The version of Keras that wrote it, where it says so."""
        with self._damage(self.place):
            holders = [group for group in (self._file, self._older) if group is not None]
            found = [text for group in holders for text in self._texts(group, "keras_version")]
        return found[0] if found else None

    @property
    def _older(self) -> Any | None:
        """The group of a file in the older format that holds the layers by name."""
        if "layer_names" in self._file.attrs:
            return self._file
        return self._at(self._file, "model_weights") if "model_weights" in self._file else None

    def of_layer(
        self, place: str, name: str, group: str, side: str, shapes: Mapping[str, tuple[int | str, ...]]
    ) -> dict[str, Array]:
        """The weights of one recurrence by Keras's names; `side` is that of a Bidirectional, or nothing."""
        with self._damage(place):
            older = self._older
            if older is not None:
                return self._by_name(place, older, name, side, list(shapes))
            return self._by_class(place, name, group, side, list(shapes))

    def _by_class(self, place: str, name: str, group: str, side: str, wanted: list[str]) -> dict[str, Array]:
        path = f"layers/{group}"
        said = self._texts(self._at(self._file, f"{path}/vars"), "name")
        if said and said[0] != name:
            raise InteropError(
                f"{place}: {path} in {self.place} is of the layer {said[0]!r}; give the configuration of the same model"
            )
        holder = self._at(self._file, f"{path}/{side}/cell/vars" if side else f"{path}/cell/vars")
        if set(holder) != {str(number) for number in range(len(wanted))}:
            raise InteropError(f"{place}: it holds {len(holder)} weights, and the configuration asks for {len(wanted)}")
        return {weight: self._array(place, weight, holder, str(number)) for number, weight in enumerate(wanted)}

    def _by_name(self, place: str, older: Any, name: str, side: str, wanted: list[str]) -> dict[str, Array]:
        holder = self._at(older, name)
        listed = self._texts(holder, "weight_names")
        sides = 2 if side else 1
        if len(listed) != sides * len(wanted):
            raise InteropError(
                f"{place}: it holds {len(listed)} weights, and the configuration asks for {sides * len(wanted)}"
            )
        mine = listed[len(wanted) :] if side == "backward_layer" else listed[: len(wanted)]
        ends = [path.rpartition("/")[2].partition(":")[0] for path in mine]
        if ends != wanted:
            raise InteropError(f"{place}: its weights are {', '.join(ends)}, and it must have {', '.join(wanted)}")
        return {weight: self._array(place, weight, holder, path) for weight, path in zip(wanted, mine, strict=True)}

    def _at(self, holder: Any, path: str) -> Any:
        """What stands at a path, step by step: a soft link or one to another file is not followed."""
        for name in path.split("/"):
            link = holder.get(name, getlink=True) if isinstance(holder, self._h5py.Group) else None
            if link is None:
                raise InteropError(f"{self.place} has no {path}; is it of another model, or of an older Keras?")
            if not isinstance(link, self._h5py.HardLink):
                raise InteropError(f"{self.place}: {path} is a link to elsewhere, which is not followed")
            holder = holder[name]
        return holder

    def _texts(self, holder: Any, name: str) -> list[str]:
        """The texts of an attribute, none where it is missing. Its type is looked at before anything is read: HDF5
        itself crashes on a text whose type was damaged into a list."""
        if name not in holder.attrs:
            return []
        if not isinstance(holder.attrs.get_id(name).get_type(), self._h5py.h5t.TypeStringID):
            raise InteropError(f"{self.place}: the attribute {name} is not text")
        found = holder.attrs[name]
        several = found.ravel().tolist() if isinstance(found, np.ndarray) else [found]
        return [text.decode("utf-8", errors="replace") if isinstance(text, bytes) else str(text) for text in several]

    def _array(self, place: str, weight: str, holder: Any, path: str) -> Array:
        found = self._at(holder, path)
        if not isinstance(found, self._h5py.Dataset) or found.dtype.kind != "f":
            raise InteropError(f"{place}: {weight} is not an array of numbers")
        if found.external or found.is_virtual or found.id.get_create_plist().get_nfilters():
            raise InteropError(f"{place}: {weight} is filtered or stored elsewhere, which Keras does not do; not read")
        stored = found.id.get_storage_size()
        if stored < found.nbytes:
            raise InteropError(f"{place}: {weight} has shape {list(found.shape)}, but only {stored} bytes are there")
        array: Array = np.asarray(found[()])
        return array.astype(array.dtype.newbyteorder("="))

    @contextmanager
    def _damage(self, place: str) -> Iterator[None]:
        """Whatever h5py raises for a damaged file becomes one line."""
        try:
            yield
        except InteropError:
            raise
        except (OSError, RuntimeError, LookupError, ValueError, TypeError, OverflowError, MemoryError) as error:
            reason = " ".join(str(error).split())
            raise InteropError(f"{place} cannot be read as HDF5 ({type(error).__name__}: {reason})") from error
