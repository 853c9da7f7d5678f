"""Our layers as Keras's, for what Keras can say."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch

from throughtime.equations import expr
from throughtime.equations.cell import Cell
from throughtime.errors import InteropError
from throughtime.interop.keras.activations import ACTIVATIONS, Activation
from throughtime.interop.keras.building import as_keras_weights
from throughtime.interop.keras.described import cell_of
from throughtime.interop.keras.stack import Merge, Stack
from throughtime.nn.recurrent import Layer


class _Said(NamedTuple):
    """How Keras says a cell."""

    kind: str
    activation: str
    gate: str
    use_bias: bool
    reset_after: bool


def to_keras(layer: Layer | Stack, *, return_sequences: bool | None = None, return_state: bool = False) -> Any:
    """A recurrent layer of ours as a live Keras layer, built, with a copy of its weights; batch first, as Keras is.

    A layer of one depth becomes a SimpleRNN, GRU or LSTM, or a Bidirectional of it; a deeper one or a `Stack` becomes
    a Sequential. `return_sequences` is as in Keras: by default True, and for a `Stack` what it has. `return_state` is
    for a single layer. Two biases that are only ever added become Keras's one, their sum (rounded once).

    Keras must be installed, with whichever back end. Dropout between layers is not carried, with a UserWarning. Raises
    InteropError, naming the cause, for a cell or an attribute that Keras cannot say.
    """
    parts = list(_parts(layer))
    whole = isinstance(layer, Stack) or len(parts) > 1
    if whole and return_state:
        raise InteropError("return_state=True: a Keras Sequential has one output; convert layer by layer to get states")
    sequences = layer.return_sequences if isinstance(layer, Stack) else True
    sequences = sequences if return_sequences is None else return_sequences
    try:
        import keras
    except ModuleNotFoundError as error:
        raise InteropError("to_keras needs Keras 3 with a back end; pip install keras") from error
    built = [
        _built(keras, *part, return_sequences=sequences or k < len(parts) - 1, return_state=return_state)
        for k, part in enumerate(parts)
    ]
    if not whole:
        return built[0]
    first: Any = layer.layers[0] if isinstance(layer, Stack) else layer
    entries = [keras.Input((None, first.input_size), dtype=_dtype(first))]
    if isinstance(layer, Stack) and layer.mask_value is not None:
        entries.append(keras.layers.Masking(layer.mask_value, dtype=_dtype(first)))
    return keras.Sequential([*entries, *built])


def _parts(layer: Layer | Stack) -> Iterator[tuple[Layer, int, Merge]]:
    """Every depth of every layer, with how its directions merge."""
    if isinstance(layer, Stack):
        for inner, merge in zip(layer.layers, layer.merges, strict=True):
            assert isinstance(inner, Layer)
            depths = list(_parts(inner))
            yield from depths[:-1]
            yield inner, len(depths) - 1, merge
        return
    if not isinstance(layer, Layer):
        raise InteropError(f"to_keras takes a recurrent layer or a Stack, not {type(layer).__name__}")
    if getattr(layer, "learn_initial", False):
        raise InteropError("learn_initial=True: Keras learns no initial states; set it to False")
    _dtype(layer)
    said_by_keras(layer.cell)
    if layer.dropout > 0 and layer.num_layers > 1:
        warnings.warn(
            f"dropout={layer.dropout} between layers acts in training only and is not carried over", stacklevel=4
        )
    for depth in range(layer.num_layers):
        yield layer, depth, "concat"


def said_by_keras(cell: Cell) -> _Said:
    """The Keras layer whose equations are the cell's. Raises InteropError where there is none."""
    operations = {node.op for node in cell.nodes}
    activations = [name for name, function in ACTIVATIONS.items() if _operations(function) <= operations]
    for said in _candidates(activations, len(cell.states)):
        if _cell(said) == cell:
            return said
    raise InteropError(
        f"{cell.name} is no cell of Keras's: its equations are not those of SimpleRNN, GRU or LSTM with any of its "
        "activations; write it as a Keras cell of your own and give that the weights"
    )


def _operations(activation: Activation) -> set[str]:
    argument = expr.make("input")
    return {node.op for node in expr.postorder([activation(argument)]) if node is not argument}


def _candidates(activations: list[str], states: int) -> Iterator[_Said]:
    """Every cell that Keras can say with these activations and so many states, the usual ones first."""
    for gate in sorted(activations, key=lambda name: name != "sigmoid"):
        for activation in activations:
            for use_bias in (True, False):
                if states == 2:
                    yield _Said("LSTM", activation, gate, use_bias, True)
                elif states == 1:
                    yield _Said("GRU", activation, gate, use_bias, True)
                    yield _Said("GRU", activation, gate, use_bias, False)
    if states == 1:
        for activation in activations:
            for use_bias in (True, False):
                yield _Said("SimpleRNN", activation, "sigmoid", use_bias, True)


@cache
def _cell(said: _Said) -> Cell:
    return cell_of(*said)


def _dtype(layer: Layer) -> str:
    dtype = layer._parameters_of(0, "")[0].dtype
    if dtype not in (torch.float32, torch.float64):
        raise InteropError(f"the layer's parameters are {dtype}; convert it with .float() or .double() first")
    return str(dtype).removeprefix("torch.")


def _built(keras: Any, layer: Layer, depth: int, merge: Merge, *, return_sequences: bool, return_state: bool) -> Any:
    said = said_by_keras(layer.cell)
    constants: dict[str, Any] = {"activation": said.activation, "use_bias": said.use_bias, "dtype": _dtype(layer)}
    if said.kind != "SimpleRNN":
        constants["recurrent_activation"] = said.gate
    if said.kind == "GRU":
        constants["reset_after"] = said.reset_after
    made = getattr(keras.layers, said.kind)(
        layer.hidden_size, return_sequences=return_sequences, return_state=return_state, **constants
    )
    weights = as_keras_weights(layer, depth, "", said.kind, said.reset_after)
    features = weights[0].shape[0]
    if layer.bidirectional:
        made = keras.layers.Bidirectional(made, merge_mode=merge, dtype=_dtype(layer))
        weights += as_keras_weights(layer, depth, "_reverse", said.kind, said.reset_after)
    made.build((None, None, features))
    made.set_weights([np.ascontiguousarray(array) for array in weights])
    return made
