"""From parts of a Keras model to our layers: gates in our order, matrices transposed, biases where they belong."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

import numpy as np
import torch

from throughtime.errors import InteropError
from throughtime.interop.keras.described import GATES, Array, Description, Part
from throughtime.interop.keras.stack import Stack
from throughtime.nn.recurrent import Layer, Recurrent


def as_layer(part: Part) -> Recurrent | Stack:
    """One Keras layer: a `Recurrent`, or a `Stack` of one where a Bidirectional does not concatenate."""
    if part.merge != "concat":
        return as_stack([part])
    return _recurrent([part])


def as_stack(parts: Sequence[Part], mask_value: float | None = None) -> Stack:
    """A row of Keras layers; those that are alike become one `Recurrent` of several layers."""
    for part, following in pairwise(parts):
        if not part.forward.return_sequences:
            raise InteropError(
                f"{part.forward.place}: return_sequences=False, and a recurrent layer follows ({following.name!r}), "
                "which reads sequences"
            )
        if part.merge is None:
            raise InteropError(f"{part.forward.place}: merge_mode=None gives two outputs, and a layer follows")
    groups = list(_alike(parts))
    layers = [_recurrent(group) for group in groups]
    merges = [group[-1].merge for group in groups]
    return Stack(layers, merges, return_sequences=parts[-1].forward.return_sequences, mask_value=mask_value)


def _alike(parts: Sequence[Part]) -> Iterator[list[Part]]:
    """Neighbours that one `Recurrent` can hold: the same cell, width, directions and type, concatenated on the way."""
    group: list[Part] = []
    for part in parts:
        if group and (group[-1].merge != "concat" or _kind(group[-1]) != _kind(part)):
            yield group
            group = []
        group.append(part)
    yield group


def _kind(part: Part) -> tuple[object, ...]:
    return part.forward.cell, part.forward.units, part.backward is None, part.weights["kernel"].dtype


def _recurrent(parts: Sequence[Part]) -> Recurrent:
    first = parts[0]
    layer = Recurrent(
        first.forward.cell,
        first.weights["kernel"].shape[0],
        first.forward.units,
        num_layers=len(parts),
        bidirectional=first.backward is not None,
        batch_first=True,
        dtype=torch.float64 if first.weights["kernel"].dtype == np.float64 else torch.float32,
    )
    for depth, part in enumerate(parts):
        for suffix, (description, weights) in zip(("", "_reverse"), part.directions, strict=False):
            _fill(layer, depth, suffix, description, weights)
    return layer


@torch.no_grad()
def _fill(layer: Recurrent, depth: int, suffix: str, description: Description, weights: Mapping[str, Array]) -> None:
    """Write one direction's weights. Keras has one bias where ours have two, but for a GRU that resets after."""
    blocks = len(GATES[description.kind])
    bias = weights.get("bias")
    split = bias is not None and bias.ndim == 2
    given = {
        "W": weights["kernel"].T,
        "U": weights["recurrent_kernel"].T,
        "b": bias[0] if bias is not None and split else bias,
        "c": bias[1] if bias is not None and split else None,
    }
    for parameter, tensor in zip(layer.cell.parameters, layer._parameters_of(depth, suffix), strict=True):
        array = given["c" if parameter.namespace == "d" else parameter.namespace]
        if array is None:
            tensor.zero_()
            continue
        rows = np.split(array, blocks)
        ordered = np.concatenate([rows[GATES[description.kind].index(gate)] for gate in parameter.gates])
        if ordered.shape != tuple(tensor.shape):
            raise InteropError(
                f"{description.place}: its kernel takes {weights['kernel'].shape[0]} features, and the layer before "
                f"gives {tensor.shape[1]}"
            )
        tensor.copy_(torch.from_numpy(ordered))


def as_keras_weights(layer: Layer, depth: int, suffix: str, kind: str, reset_after: bool) -> list[Array]:
    """One direction's weights in Keras's order: kernel [inputs, columns], recurrent_kernel, bias if it has one."""
    given: dict[str, list[Array]] = {}
    for parameter, tensor in zip(layer.cell.parameters, layer._parameters_of(depth, suffix), strict=True):
        rows = np.split(tensor.detach().cpu().numpy(), len(parameter.gates))
        given[parameter.namespace] = [rows[parameter.gates.index(gate)] for gate in GATES[kind]]
    joined = {namespace: np.concatenate(rows) for namespace, rows in given.items()}
    weights = [joined["W"].T, joined["U"].T]
    if "b" in joined:
        second = joined["d" if kind == "LSTM" else "c"]
        weights.append(np.stack([joined["b"], second]) if reset_after and kind == "GRU" else joined["b"] + second)
    return [np.ascontiguousarray(array) for array in weights]
