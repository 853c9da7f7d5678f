"""Keras's files as our layers, read without Keras and without running anything that stands in them.

Three kinds are read: `.keras` archives (config.json and model.weights.h5), whole models in HDF5 (`model.save("m.h5")`),
and weights alone in HDF5 (`model.save_weights`), which need the configuration beside them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from throughtime.errors import InteropError
from throughtime.interop.keras.archive import Archive, is_archive
from throughtime.interop.keras.building import as_layer, as_stack
from throughtime.interop.keras.described import (
    GATES,
    Array,
    Description,
    Part,
    check_direction,
    check_pair,
    describe,
    refuse_class,
)
from throughtime.interop.keras.hdf5 import Weights
from throughtime.interop.keras.stack import Stack
from throughtime.interop.keras.texts import as_json
from throughtime.nn.recurrent import Recurrent

RECURRENT = (*GATES, "Bidirectional")


def load(
    path: str | os.PathLike[str],
    *,
    config: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    layer: str | None = None,
) -> Recurrent | Stack:
    """The recurrent layers of a Keras file, as `from_keras` gives them for the live model.

    `path` is a `.keras` archive, a whole model in `.h5`, or weights alone (`.weights.h5`, or `.h5` of `save_weights`),
    which need `config`: a JSON file of what `model.to_json()` says, or that as a mapping. `layer` takes the one layer
    of that name. Keras need not be installed; h5py must be (`throughtime[interop]`). Nothing in the file is run: no
    Lambda, no custom class, no pickle, and no link to another file is followed.

    Raises InteropError, naming file, layer and attribute, for a file that is damaged or says what our layers cannot.
    """
    file = Path(path)
    try:
        content = file.read_bytes()
    except OSError as error:
        raise InteropError(f"{file} cannot be read: {error.strerror or error}") from error
    if is_archive(content):
        archive = Archive(file, content)
        found: Mapping[str, Any] | None = archive.config()
        weights = Weights(archive.weights_place, archive.weights())
    else:
        weights = Weights(str(file), content)
        found = weights.config()
    if found is not None and config is not None:
        raise InteropError(f"{file} holds its own configuration; leave config= out")
    if found is None and config is None:
        raise InteropError(f"{file} holds weights alone; give config=, a JSON file of what model.to_json() says")
    place = str(file) if found is not None or isinstance(config, Mapping) else f"{file} with {os.fspath(str(config))}"
    with weights:
        return _Reader(place, _read_config(config) if found is None else found, weights).read(layer)


@dataclass(frozen=True)
class _Entry:
    """A layer of a model's configuration: `group` is where a `.weights.h5` keeps its weights."""

    name: str
    kind: str
    config: Mapping[str, Any]
    group: str


class _Reader:
    """One model's configuration with its weights, and the file they are of, for messages."""

    def __init__(self, place: str, model: Mapping[str, Any], weights: Weights) -> None:
        self.place, self.weights = place, weights
        self.kind = _kind(place, model)
        self.version = _version(model.get("keras_version") or weights.version)
        self.entries = self._entries(model)

    def _entries(self, model: Mapping[str, Any]) -> dict[str, _Entry]:
        config = model.get("config")
        listed = config.get("layers") if isinstance(config, Mapping) else config  # a list: Keras before 2.2
        if not isinstance(listed, list):
            raise InteropError(f"{self.place}: the configuration of {self.kind} lists no layers")
        entries: dict[str, _Entry] = {}
        counts: dict[str, int] = {}
        for number, item in enumerate(listed):
            kind = _kind(f"{self.place}, layer {number}", item)
            said = item.get("config")
            name = said.get("name") if isinstance(said, Mapping) else None
            if not isinstance(said, Mapping) or not isinstance(name, str) or name in entries:
                raise InteropError(f"{self.place}, layer {number} ({kind}) has no configuration with a name of its own")
            base = {"SimpleRNN": "simple_rnn"}.get(kind, kind.lower())
            place = counts.get(base, 0)
            counts[base] = place + 1
            entries[name] = _Entry(name, kind, said, f"{base}_{place}" if place else base)
        return entries

    def read(self, layer: str | None) -> Recurrent | Stack:
        names = [name for name, entry in self.entries.items() if entry.kind in RECURRENT]
        if layer is not None:
            if layer not in self.entries:
                listed = ", ".join(names) or "none"
                raise InteropError(f"{self.place} has no layer {layer!r}; its recurrent layers: {listed}")
            return as_layer(self._part(self.entries[layer], names))
        if self.kind != "Sequential":
            raise refuse_class(self.place, self.kind, names)
        entries = [entry for entry in self.entries.values() if entry.kind != "InputLayer"]
        mask_value: float | None = None
        if entries and entries[0].kind == "Masking":
            mask_value = self._mask_value(entries.pop(0))
        if not entries:
            raise InteropError(f"{self.place} holds no recurrent layer")
        return as_stack([self._part(entry, names) for entry in entries], mask_value)

    def _place_of(self, name: str) -> str:
        return f"{self.place}, layer {name!r}"

    def _mask_value(self, entry: _Entry) -> float:
        value = entry.config.get("mask_value")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InteropError(f"{self._place_of(entry.name)}: mask_value is {value!r}; it must be a number")
        return float(value)

    def _part(self, entry: _Entry, others: list[str]) -> Part:
        place = self._place_of(entry.name)
        if entry.kind in GATES:
            description = self._described(place, entry.kind, entry.config)
            check_direction(description)
            read = self.weights.of_layer(place, entry.name, entry.group, "", description.shapes())
            return Part(entry.name, description, _checked(description, read))
        if entry.kind != "Bidirectional":
            raise refuse_class(place, entry.kind, [name for name in others if name != entry.name])
        forward = self._side(place, entry.config, "layer")
        backward = self._side(place, entry.config, "backward_layer" if "backward_layer" in entry.config else "layer")
        if "backward_layer" not in entry.config:  # Keras before 2.4 wrote the forward layer alone
            backward = replace(backward, go_backwards=True)
        merge = check_pair(place, forward, backward, entry.config.get("merge_mode", "concat"))
        both = [
            _checked(side, self.weights.of_layer(place, entry.name, entry.group, which, side.shapes()))
            for which, side in (("forward_layer", forward), ("backward_layer", backward))
        ]
        return Part(entry.name, forward, both[0], backward, both[1], merge)

    def _side(self, place: str, config: Mapping[str, Any], attribute: str) -> Description:
        item = config.get(attribute)
        kind = _kind(f"{place}: {attribute}", item)
        if kind not in GATES:
            raise refuse_class(f"{place}: {attribute}", kind)
        said = item.get("config") if isinstance(item, Mapping) else None
        if not isinstance(said, Mapping):
            raise InteropError(f"{place}: {attribute} has no configuration")
        return self._described(f"{place}, {attribute}", kind, said)

    def _described(self, place: str, kind: str, config: Mapping[str, Any]) -> Description:
        return describe(place, kind, config, self.version)


def _checked(description: Description, weights: Mapping[str, Array]) -> Mapping[str, Array]:
    description.check(weights)
    return weights


def _kind(place: str, item: Any) -> str:
    """The class that an entry names, where it is Keras's own; of any other, its module with it."""
    name = item.get("class_name") if isinstance(item, Mapping) else None
    if not isinstance(name, str):
        raise InteropError(f"{place} is {type(item).__name__} and names no class; is this a Keras configuration?")
    module, registered = item.get("module"), item.get("registered_name")
    own = module is None or (isinstance(module, str) and module.partition(".")[0] == "keras")
    return name if own and registered in (None, name) else f"{module}.{name}"


def _version(value: Any) -> int:
    """The first number of a Keras version; without one the file is taken to be Keras 3's."""
    first = str(value).partition(".")[0]
    return int(first) if first.isdecimal() else 3


def _read_config(config: str | os.PathLike[str] | Mapping[str, Any] | None) -> Mapping[str, Any]:
    if isinstance(config, Mapping):
        return config
    assert config is not None
    file = Path(config)
    return as_json(str(file), lambda: file.read_bytes())
