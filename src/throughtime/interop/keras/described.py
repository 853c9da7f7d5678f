"""What a Keras layer says of itself, checked: the same for a live layer and for one in a file.

A `Description` is one recurrence, a `Part` one entry of a model (a recurrence, or a Bidirectional's two).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from throughtime.equations import catalogue
from throughtime.equations.catalogue import without_biases
from throughtime.equations.cell import Cell
from throughtime.errors import InteropError
from throughtime.interop.keras.activations import ACTIVATIONS, ALIASES, BEYOND, hard_sigmoid_of_keras_2
from throughtime.interop.keras.stack import MERGES, Merge

Array = np.ndarray[Any, Any]

GATES = {"SimpleRNN": ("",), "GRU": ("z", "r", "n"), "LSTM": ("i", "f", "g", "o")}
"""Our names of the gates of each kind of layer, in the order in which Keras stacks their columns."""

ATTRIBUTES = (
    *("units", "activation", "recurrent_activation", "use_bias", "reset_after", "return_sequences", "go_backwards"),
    *("stateful", "trainable", "dropout", "recurrent_dropout", "time_major"),
    *("kernel_regularizer", "recurrent_regularizer", "bias_regularizer", "activity_regularizer"),
    *("kernel_constraint", "recurrent_constraint", "bias_constraint"),
)
"""What of a recurrent layer's configuration is looked at."""


@dataclass(frozen=True)
class Description:
    """One Keras recurrence: `place` names it in messages; `version` is the Keras that wrote it, by its first number."""

    place: str
    kind: str
    units: int
    activation: str
    gate: str
    use_bias: bool
    reset_after: bool
    go_backwards: bool
    return_sequences: bool
    version: int = 3

    @property
    def cell(self) -> Cell:
        """The equations of a step, a cell of the catalogue where activations are the usual ones."""
        return cell_of(self.kind, self.activation, self.gate, self.use_bias, self.reset_after, self.version)

    def shapes(self, inputs: int | str = "inputs") -> dict[str, tuple[int | str, ...]]:
        """The weights of such a layer, in Keras's order, with their shapes."""
        columns = len(GATES[self.kind]) * self.units
        shapes: dict[str, tuple[int | str, ...]] = {
            "kernel": (inputs, columns),
            "recurrent_kernel": (self.units, columns),
        }
        if self.use_bias:
            shapes["bias"] = (2, columns) if self.kind == "GRU" and self.reset_after else (columns,)
        return shapes

    def check(self, weights: Mapping[str, Array]) -> None:
        """Raise InteropError, naming the weight, where one has a shape or type that such a layer has not."""
        shapes = self.shapes()
        if set(weights) != set(shapes):
            raise InteropError(f"{self.place}: its weights are {_listed(weights)}, and it must have {_listed(shapes)}")
        for name, shape in shapes.items():
            found = weights[name]
            fits = len(found.shape) == len(shape) and all(
                size >= 1 if wanted == "inputs" else size == wanted
                for size, wanted in zip(found.shape, shape, strict=True)
            )
            if not fits:
                wanted_shape = f"[{', '.join(map(str, shape))}]"
                raise InteropError(
                    f"{self.place}: {name} has shape {list(found.shape)}, and a {self.kind} with units={self.units} "
                    f"has {wanted_shape}"
                )
            if found.dtype not in (np.float32, np.float64):
                raise InteropError(
                    f"{self.place}: {name} holds {found.dtype}; float32 and float64 are read, so cast the Keras model"
                )
        if len({found.dtype for found in weights.values()}) > 1:
            raise InteropError(f"{self.place}: its weights are of different types; cast the Keras model to one")


@dataclass(frozen=True)
class Part:
    """One recurrent entry of a Keras model, with its weights by Keras's names; `backward` for a Bidirectional."""

    name: str
    forward: Description
    weights: Mapping[str, Array]
    backward: Description | None = None
    backward_weights: Mapping[str, Array] | None = None
    merge: Merge = "concat"

    @property
    def directions(self) -> Iterator[tuple[Description, Mapping[str, Array]]]:
        """Each direction with its weights."""
        yield self.forward, self.weights
        if self.backward is not None and self.backward_weights is not None:
            yield self.backward, self.backward_weights


def describe(place: str, kind: str, config: Mapping[str, Any], version: int = 3) -> Description:
    """A recurrent layer's configuration, checked; a UserWarning names what acts in training or is not carried.

    Raises InteropError, naming place and attribute, for what our layers cannot say.
    """
    units = config.get("units")
    if isinstance(units, bool) or not isinstance(units, int) or units < 1:
        raise InteropError(f"{place}: units is {units!r}; it must be a whole number from 1")
    if _flag(place, config, "time_major", False):
        raise InteropError(f"{place}: time_major=True lays its input out as Keras 3 does not; save it with Keras 3")
    _warn_of_what_is_left(place, config)
    return Description(
        place=place,
        kind=kind,
        units=units,
        activation=_activation(place, "activation", config.get("activation", "tanh")),
        gate=_activation(place, "recurrent_activation", config.get("recurrent_activation", "sigmoid")),
        use_bias=_flag(place, config, "use_bias", True),
        reset_after=_flag(place, config, "reset_after", version >= 3),
        go_backwards=_flag(place, config, "go_backwards", False),
        return_sequences=_flag(place, config, "return_sequences", False),
        version=version,
    )


def check_direction(description: Description) -> None:
    """Raise InteropError for a layer that runs backwards on its own."""
    if description.go_backwards:
        raise InteropError(
            f"{description.place}: go_backwards=True outside a Bidirectional; set it to False, convert, and give the "
            "layer x.flip(1), whose outputs are then in Keras's order too"
        )


def check_pair(place: str, forward: Description, backward: Description, merge: Any) -> Merge:
    """Raise InteropError, naming the attribute, for a Bidirectional whose two directions no layer of ours can hold."""
    if merge not in MERGES:
        raise InteropError(f"{place}: merge_mode is {merge!r}; known are {', '.join(map(repr, MERGES))}")
    if forward.go_backwards or not backward.go_backwards:
        raise InteropError(f"{place}: its forward layer must have go_backwards=False and its backward layer True")
    for name in ("kind", "units", "activation", "gate", "use_bias", "reset_after", "return_sequences"):
        ahead, behind = getattr(forward, name), getattr(backward, name)
        if ahead != behind:
            said = {"kind": "class", "gate": "recurrent_activation"}.get(name, name)
            raise InteropError(
                f"{place}: {said} is {ahead!r} forward and {behind!r} backward, and both directions of a layer of ours "
                "have the same cell and width; convert forward_layer and backward_layer on their own"
            )
    known: Merge = merge
    return known


def cell_of(kind: str, activation: str, gate: str, use_bias: bool, reset_after: bool, version: int = 3) -> Cell:
    """The cell of a Keras layer with these activations, without biases where it has none."""
    functions = dict(ACTIVATIONS)
    if version < 3:
        functions["hard_sigmoid"] = hard_sigmoid_of_keras_2
    if kind == "SimpleRNN":
        found = catalogue.Elman
        constants = {} if activation == "tanh" else {"activation": functions[activation]}
    else:
        found = catalogue.LSTM if kind == "LSTM" else catalogue.GRU if reset_after else catalogue.GRUResetBefore
        usual = (activation, gate) == ("tanh", "sigmoid")
        constants = {} if usual else {"activation": functions[activation], "gate": functions[gate]}
    found = found(**constants) if constants else found
    return found if use_bias else without_biases(found)


def refuse_class(place: str, name: str, others: Sequence[str] = ()) -> InteropError:
    """The error for an entry of a model that is no recurrent layer, and the way to those that are."""
    way_out = f'; take a recurrent layer on its own with layer="{others[0]}"' if others else ""
    return InteropError(f"{place} is {name}, and SimpleRNN, GRU, LSTM and Bidirectional of them are read{way_out}")


def _activation(place: str, attribute: str, value: Any) -> str:
    name = "linear" if value is None else value
    if not isinstance(name, str):
        shown = name.get("class_name", "an object") if isinstance(name, Mapping) else repr(name)
        raise InteropError(
            f"{place}: {attribute} is {shown}, which is code or an object of its own, and nothing from a model is run; "
            "write the cell as equations under @throughtime.cell"
        )
    name = ALIASES.get(name, name)
    if name in BEYOND:
        raise InteropError(f"{place}: {attribute}={name!r} {BEYOND[name]}")
    if name not in ACTIVATIONS:
        raise InteropError(
            f"{place}: {attribute}={name!r} is not known; known are {', '.join(ACTIVATIONS)}; write the cell as "
            "equations under @throughtime.cell"
        )
    return name


def _flag(place: str, config: Mapping[str, Any], name: str, default: bool) -> bool:
    value = config.get(name, default)
    if not isinstance(value, bool):
        raise InteropError(f"{place}: {name} is {value!r}; it must be true or false")
    return value


def _warn_of_what_is_left(place: str, config: Mapping[str, Any]) -> None:
    left = [f"{name}={config[name]}" for name in ("dropout", "recurrent_dropout") if config.get(name)]
    left += [name for name in ATTRIBUTES if name.endswith(("_regularizer", "_constraint")) and config.get(name)]
    left += ["trainable=False"] if config.get("trainable") is False else []
    if left:
        warnings.warn(f"{place}: {', '.join(left)} act in training only and are not carried over", stacklevel=2)
    if config.get("stateful"):
        warnings.warn(
            f"{place}: stateful=True is not carried over; every call of ours begins at h_0, so give it the states that "
            "the last call returned",
            stacklevel=2,
        )
    policy = config.get("dtype")
    if isinstance(policy, Mapping) and isinstance(inner := policy.get("config"), Mapping):
        policy = inner.get("name")
    if isinstance(policy, str) and policy.startswith("mixed_"):
        warnings.warn(f"{place}: its dtype is {policy}; ours computes in the type of its weights", stacklevel=2)


def _listed(names: Mapping[str, Any]) -> str:
    return ", ".join(names) or "none"
