"""A recurrent layer as ONNX nodes: the standard's operator where it has the cell, else a Scan over its equations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from throughtime.equations.cell import Cell
from throughtime.equations.standard import Standard, standard
from throughtime.interop.onnx.graph import Graph
from throughtime.interop.onnx.steps import Weights, of_input, step
from throughtime.nn.recurrent import Layer

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Ends:
    """Where sequences end, as ONNX values: `lengths` [B] int64, and `inside` [T, B, 1], which steps are real."""

    def __init__(self, graph: Graph, x: str, lengths: str) -> None:
        """`x` is [T, B, ...]; `lengths` is [B] or [1], and what is negative stands for all steps there are."""
        steps, rows = graph.size(x, 0), graph.size(x, 1)
        given = graph.op("Where", graph.op("Less", lengths, graph.sizes(0)), steps, lengths)
        self.lengths = graph.op("Expand", given, rows, stem="lengths_of_rows")
        self.native = graph.op("Cast", self.lengths, to=_int32())
        zero, one = (graph.array(np.array(n), "sizes", np.int64) for n in (0, 1))
        count = graph.op("Range", zero, graph.op("Squeeze", steps), one)
        times = graph.op("Unsqueeze", count, graph.sizes(1, 2))
        self.inside = graph.op("Less", times, graph.op("Unsqueeze", self.lengths, graph.sizes(1)), stem="inside")
        nothing = graph.op("Equal", self.lengths, graph.sizes(0))
        self.empty = graph.op("Unsqueeze", nothing, graph.sizes(0, 2), stem="empty")  # [1, B, 1]


def weights_of(layer: Layer, depth: int, suffix: str) -> Weights:
    """The tensors of one direction of one layer."""
    return Weights(layer.cell, tuple(_array(tensor) for tensor in layer._parameters_of(depth, suffix)))


def stacked(known: Standard, weights: Weights) -> dict[str, NDArray[Any]]:
    """The operator's W, R, B and P of one direction, without their first dimension."""
    found: dict[str, NDArray[Any]] = {}
    for name, blocks in known.blocks(weights.cell).items():
        parts = [weights.block(kind, gate) for kind, gate in blocks]
        like = next(part for part in parts if part is not None)
        found[name] = np.concatenate([np.zeros_like(like) if part is None else part for part in parts])
    return found


def initial_of(layer: Layer) -> list[NDArray[Any]]:
    """Where each state begins if nothing else is said: [layers * directions, 1, width]."""
    dtype = next((p.dtype for p in layer.parameters()), torch.float32)
    row = torch.zeros(1, 1, 1, dtype=dtype)
    with torch.no_grad():
        each = [layer._initial_of(depth, suffix, row) for depth, suffix in _places(layer)]
    return [np.stack([_array(state) for state in states]) for states in zip(*each, strict=True)]


def expanded(graph: Graph, state: str, rows: str) -> str:
    """A state [layers * directions, 1 or B, width] for every row."""
    places, width = graph.size(state, 0), graph.size(state, 2)
    return graph.op("Expand", state, graph.op("Concat", places, rows, width, axis=0))


def over_time(
    graph: Graph,
    layer: Layer,
    x: str,
    ends: Ends | None,
    states: Sequence[str],
    outside: Mapping[str, str],
) -> tuple[str, list[str]]:
    """x [T, B, I] and the states [layers * D, B, width] to the outputs [T, B, D * width] and the last states.

    What the outputs hold past an end is not said.
    """
    known = standard(layer.cell) if graph.dtype == np.float32 else None  # ONNX Runtime has the operators for it alone
    lasts: list[list[str]] = []
    directions = len(_suffixes(layer))
    for depth in range(layer.num_layers):
        if known is None:
            shown, last = _scans(graph, layer, depth, x, ends, states, outside)
        else:
            some = graph.sizes(depth * directions), graph.sizes((depth + 1) * directions), graph.sizes(0)
            begin = [graph.op("Slice", state, *some) for state in states]
            shown, last = _native(graph, layer, known, depth, x, ends, begin)
        x = shown
        lasts.append(last)
    if len(lasts) == 1:
        return x, lasts[0]
    return x, [graph.op("Concat", *each, axis=0) for each in zip(*lasts, strict=True)]


def one_step(
    graph: Graph, layer: Layer, x: str, states: Sequence[str], outside: Mapping[str, str]
) -> tuple[str, list[str]]:
    """x [B, I] and the states [layers, B, width] to the output [B, width] and the next states."""
    after: list[list[str]] = []
    for depth in range(layer.num_layers):
        weights = weights_of(layer, depth, "")
        begin = _at(graph, states, depth)
        now = step(graph, weights, x, begin, outside, of_input(graph, weights, x))
        x = now[layer.cell.output]
        after.append([graph.op("Unsqueeze", state, graph.sizes(0)) for state in now])
    return x, [graph.op("Concat", *each, axis=0) for each in zip(*after, strict=True)]


def _native(
    graph: Graph, layer: Layer, known: Standard, depth: int, x: str, ends: Ends | None, begin: Sequence[str]
) -> tuple[str, list[str]]:
    """An operator of the standard for one layer, both directions; `begin` are its states [D, B, H]."""
    found = [stacked(known, weights_of(layer, depth, suffix)) for suffix in _suffixes(layer)]
    tensors = {name: graph.array(np.stack([each[name] for each in found]), f"{name}_l{depth}") for name in found[0]}
    ordered = [begin[place] for place in known.states]
    inputs = [x, tensors["W"], tensors["R"], tensors.get("B", ""), "" if ends is None else ends.native, *ordered]
    if "P" in tensors:
        inputs.append(tensors["P"])
    stems = [f"Y_l{depth}", *(f"Y_{letter}_l{depth}" for letter in "hc"[: len(ordered)])]
    outputs, *last = graph.ops(
        known.operator,
        *inputs,
        stems=stems,
        hidden_size=layer.hidden_size,
        direction="bidirectional" if len(found) > 1 else "reverse" if _is_reversed(layer) else "forward",
        **known.attributes(len(found)),
    )
    if len(found) == 1:
        shown = graph.op("Squeeze", outputs, graph.sizes(1))
    else:
        shown = graph.op("Reshape", graph.op("Transpose", outputs, perm=[0, 2, 1, 3]), graph.sizes(0, 0, -1))
    if ends is not None:  # the state of an empty sequence is the one given; ONNX Runtime says zero
        pairs = zip(last, ordered, strict=True)
        last = [graph.op("Where", ends.empty, before, after) for after, before in pairs]
    back = [known.states.index(place) for place in range(len(known.states))]
    return shown, [last[place] for place in back]


def _scans(
    graph: Graph,
    layer: Layer,
    depth: int,
    x: str,
    ends: Ends | None,
    states: Sequence[str],
    outside: Mapping[str, str],
) -> tuple[str, list[str]]:
    """A Scan for each direction of one layer; `states` are those of all layers."""
    outputs: list[str] = []
    lasts: list[list[str]] = []
    suffixes = _suffixes(layer)
    for direction, suffix in enumerate(suffixes):
        begin = _at(graph, states, depth * len(suffixes) + direction)
        reverse = direction > 0 or _is_reversed(layer)
        output, *last = _scan(graph, weights_of(layer, depth, suffix), x, ends, begin, outside, reverse)
        outputs.append(output)
        lasts.append([graph.op("Unsqueeze", state, graph.sizes(0)) for state in last])
    if len(outputs) == 1:
        return outputs[0], lasts[0]
    finals = [graph.op("Concat", *each, axis=0) for each in zip(*lasts, strict=True)]
    return graph.op("Concat", *outputs, axis=-1), finals


def _scan(
    graph: Graph,
    weights: Weights,
    x: str,
    ends: Ends | None,
    begin: Sequence[str],
    outside: Mapping[str, str],
    reverse: bool,
) -> list[str]:
    """The outputs [T, B, width] and the last states [B, width] of one direction."""
    cell: Cell = weights.cell
    products = of_input(graph, weights, x)
    over: dict[str, str] = {}
    over |= {f"product_{number}": value for number, value in enumerate(products.values())}
    over |= {f"outside_{name}": outside[name] for name in cell.per_step}
    if cell.needs_equal_sizes or not over:  # a Scan without inputs would not know how many steps there are
        over["x"] = x
    if ends is not None:
        over["inside"] = ends.inside
    body = graph.body()
    before = [body.input(body.name(f"{s}_before"), ("batch", f"width_of_{s}")) for s in cell.states]
    at = {
        stem: body.input(body.name(f"{stem}_t"), ("batch", f"width_of_{stem}"), np.bool_ if stem == "inside" else None)
        for stem in over
    }
    around = {name: at.get(f"outside_{name}", outside[name]) for name in cell.outside}
    known = {node: at[f"product_{number}"] for number, node in enumerate(products)}
    now = step(body, weights, at.get("x", ""), before, around, known)
    shown = now[cell.output]
    if ends is not None:
        pairs = zip(now, before, strict=True)
        now = [body.op("Where", at["inside"], new, old) for new, old in pairs]
        shown = body.op("Where", at["inside"], shown, body.number(0.0))
    for state, value in zip(cell.states, now, strict=True):
        body.output(body.name(f"{state}_after"), value, ("batch", f"width_of_{state}"))
    body.output(body.name("shown"), shown, ("batch", f"width_of_{cell.states[cell.output]}"))
    *last, outputs = graph.ops(
        "Scan",
        *begin,
        *over.values(),
        stems=[*(f"{state}_last" for state in cell.states), "outputs"],
        body=body.body_proto(f"step_of_{cell.name}"),
        num_scan_inputs=len(over),
        scan_input_directions=[int(reverse)] * len(over),
        scan_output_directions=[int(reverse)],
    )
    return [outputs, *last]


def _at(graph: Graph, states: Sequence[str], place: int) -> list[str]:
    index = graph.array(np.array(place), "place", np.int64)
    return [graph.op("Gather", state, index, axis=0) for state in states]


def _is_reversed(layer: Layer) -> bool:
    return getattr(layer, "reverse", False)


def _suffixes(layer: Layer) -> tuple[str, ...]:
    return ("", "_reverse") if layer.bidirectional else ("",)


def _places(layer: Layer) -> list[tuple[int, str]]:
    return [(depth, suffix) for depth in range(layer.num_layers) for suffix in _suffixes(layer)]


def _array(tensor: torch.Tensor) -> NDArray[Any]:
    return tensor.detach().cpu().numpy()


def _int32() -> int:
    from onnx import TensorProto

    return int(TensorProto.INT32)
