"""Live Keras layers and models, read by their attributes: Keras is not imported, its object is asked."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from throughtime.errors import InteropError
from throughtime.interop.keras.building import as_layer, as_stack
from throughtime.interop.keras.described import (
    ATTRIBUTES,
    GATES,
    Array,
    Description,
    Part,
    check_direction,
    check_pair,
    describe,
    refuse_class,
)
from throughtime.interop.keras.stack import Stack
from throughtime.nn.recurrent import Recurrent


def from_keras(model: Any, *, layer: str | None = None) -> Recurrent | Stack:
    """A live Keras 3 layer or model as ours, with a copy of its weights, batch first.

    A SimpleRNN, GRU, LSTM or a Bidirectional of one becomes a `Recurrent`, a Sequential of such a `Stack`, in which
    neighbours that are alike are one `Recurrent` of several layers. So does a Bidirectional that does not concatenate.
    `layer` takes the one layer of that name out of any model. Cells are the catalogue's, or its equations with other
    activations. Where Keras has one bias, `bias_ih` holds it and `bias_hh` is zero: the same function, with one
    parameter more than Keras trains.

    A `Recurrent` always returns (output [B, T, features], h_n): `return_sequences` and `return_state` choose among
    these, and a `Stack` returns what the model returns, and the states. With a mask, Keras repeats the output of the
    last step that counts at those left out (or, in a Bidirectional, gives zero); ours is zero there. States are equal.

    What acts in training only (dropout, regularisers, constraints) and `stateful` are not carried, with a UserWarning
    that names them. Raises InteropError, naming layer and attribute, for what our layers cannot say.
    """
    if isinstance(model, str | os.PathLike):
        raise InteropError(f"from_keras takes a live layer or model; interop.keras.load reads {os.fspath(model)}")
    kind = _class_of(model)
    if kind in (*GATES, "Bidirectional") and layer is None:
        return as_layer(_part(model))
    entries = {str(entry.name): entry for entry in getattr(model, "layers", []) if _class_of(entry) != "InputLayer"}
    names = [name for name, entry in entries.items() if _class_of(entry) in (*GATES, "Bidirectional")]
    if layer is not None:
        if layer not in entries:
            raise InteropError(f"the model has no layer {layer!r}; its recurrent layers: {', '.join(names) or 'none'}")
        return as_layer(_part(entries[layer], names))
    if kind != "Sequential":
        raise refuse_class(_place(model), kind, names)
    mask_value: float | None = None
    first = next(iter(entries.values()), None)
    if first is not None and _class_of(first) == "Masking":
        mask_value = _number(_place(first), first.mask_value)
        del entries[str(first.name)]
    if not entries:
        raise InteropError(f"{_place(model)} holds no recurrent layer")
    return as_stack([_part(entry, names) for entry in entries.values()], mask_value)


def _number(place: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InteropError(f"{place}: mask_value is {value!r}; it must be a number")
    return float(value)


def _class_of(entry: Any) -> str:
    """The name of a class of Keras's own; of any other, its module with it, so that it equals none of Keras's."""
    found = type(entry)
    own = found.__module__.partition(".")[0] == "keras"
    return found.__name__ if own else f"{found.__module__}.{found.__qualname__}"


def _place(entry: Any) -> str:
    return f"layer {getattr(entry, 'name', None)!r}"


def _part(entry: Any, others: list[str] | None = None) -> Part:
    """A recurrent entry of a live model; `others` are the names to offer where it is none."""
    kind, place = _class_of(entry), _place(entry)
    if kind in GATES:
        description = _description(entry, kind)
        check_direction(description)
        return Part(str(entry.name), description, _weights(entry, description))
    if kind != "Bidirectional":
        raise refuse_class(place, kind, [name for name in others or [] if name != getattr(entry, "name", None)])
    sides = entry.forward_layer, entry.backward_layer
    for side in sides:
        if _class_of(side) not in GATES:
            raise refuse_class(f"{place}: {_place(side)}", _class_of(side))
    forward, backward = (_description(side, _class_of(side)) for side in sides)
    merge = check_pair(place, forward, backward, entry.merge_mode)
    weights, backward_weights = _weights(sides[0], forward), _weights(sides[1], backward)
    return Part(str(entry.name), forward, weights, backward, backward_weights, merge)


def _description(entry: Any, kind: str) -> Description:
    config: dict[str, Any] = {name: getattr(entry, name) for name in ATTRIBUTES if hasattr(entry, name)}
    for name in ("activation", "recurrent_activation"):
        if name in config:
            config[name] = _activation_name(config[name])
    config["dtype"] = getattr(getattr(entry, "dtype_policy", None), "name", None)
    return describe(_place(entry), kind, config)


def _activation_name(function: Callable[..., Any] | None) -> Any:
    """The name of a function of Keras's own, as a configuration has it; any other function stays what it is."""
    module, name = getattr(function, "__module__", "") or "", getattr(function, "__name__", None)
    return name if module.partition(".")[0] == "keras" and name is not None else function


def _weights(entry: Any, description: Description) -> Mapping[str, Array]:
    cell = entry.cell
    if not entry.built or getattr(cell, "kernel", None) is None:
        raise InteropError(
            f"{description.place} has no weights yet; call it on some data, or build((None, None, features)), first"
        )
    found = {name: getattr(cell, name, None) for name in ("kernel", "recurrent_kernel", "bias")}
    weights = {name: _array(description.place, name, value) for name, value in found.items() if value is not None}
    description.check(weights)
    return weights


def _array(place: str, name: str, variable: Any) -> Array:
    """A Keras variable's value. Torch's is detached here: Keras's own way warns under NumPy 2."""
    value = getattr(variable, "value", variable)
    if not isinstance(value, torch.Tensor):
        return np.array(value)
    if value.dtype == torch.bfloat16:  # NumPy has no such type
        raise InteropError(f"{place}: {name} holds bfloat16; float32 and float64 are read, so cast the Keras model")
    return np.array(value.detach().cpu().numpy())
