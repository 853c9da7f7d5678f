"""A finished run as an ONNX file: scaler, embeddings, layers and read-out in one graph, its words in the metadata.

The file needs neither throughtime nor torch: `examples/without_torch.py` answers with NumPy and ONNX Runtime alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from throughtime.data.batches import Batch
from throughtime.interop.onnx.check import Case, check, new_file, other_sizes
from throughtime.interop.onnx.exporting import evaluating, refuse_step, states_in, states_out, write
from throughtime.interop.onnx.graph import Graph
from throughtime.interop.onnx.layers import Ends, expanded, initial_of, one_step, over_time
from throughtime.nn.readout import LastStep
from throughtime.runs.folder import FinishedRun
from throughtime.tasks.encoding import Encoder
from throughtime.tasks.model import SequenceModel

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from onnx import ModelProto

Form = Literal["onnx", "onnx-step"]
"""The whole sequence, or one step with every state in and out."""


def export(run: FinishedRun, path: Path, form: Form = "onnx") -> None:
    """Write the run's model as an ONNX file: the whole file or none, and never over another.

    Inputs of "onnx" are `x` [T, B, features] float64 as they are measured, `symbols` [T, B, symbol columns] int64 as
    places in the vocabularies (0 for what is not in them), and `lengths` [B] int64, which may be left out where all
    have T steps; outputs `logits` and `probabilities`, [B, classes] to classify, [T, B, classes] to tag. "onnx-step"
    takes `x` [B, features], `symbols` [B, symbol columns] and `<state>_0` [layers, B, width], which may be left out
    before the first step; it gives logits and probabilities [B, classes], and `<state>_n`, the next `<state>_0`.
    The metadata holds task, form, features, symbol_columns, vocabularies and classes as JSON.

    Before the file gets its name it is run in ONNX Runtime at three batch sizes and numbers of steps. Raises
    InteropError where it answers otherwise than the run's model, where the name is taken, and for a step of a model
    that reads both ways.
    """
    step = form == "onnx-step"
    with new_file(path, overwrite=False) as partial, evaluating(run.model):
        write(_model(run.model, run.encoder, step), partial)
        check(partial, path, _cases(run.model, run.encoder, step))


def _model(model: SequenceModel, encoder: Encoder, step: bool) -> ModelProto:
    graph = Graph(np.float32)
    leading = ("batch",) if step else ("steps", "batch")
    inputs = _read(graph, model, encoder, leading)
    layer = model.recurrent
    if step:
        refuse_step(layer)
        shown, after = one_step(graph, layer, inputs, states_in(graph, layer, graph.size(inputs, 0)), {})
    else:
        ends = Ends(graph, inputs, graph.input("lengths", ("batch",), np.int64, default=np.array([-1])))
        rows = graph.size(inputs, 1)
        begin = [expanded(graph, graph.array(each, "begin"), rows) for each in initial_of(layer)]
        shown, after = over_time(graph, layer, inputs, ends, begin, {})
        if isinstance(model.readout, LastStep):
            shown = _last(graph, model, after[layer.cell.output])
        else:
            shown = graph.op("Where", ends.inside, shown, graph.number(0.0))
    linear = model.readout.linear
    product = graph.op("MatMul", shown, graph.array(_array(linear.weight.T), "readout"))
    logits = graph.op("Add", product, graph.array(_array(linear.bias), "readout_bias"))
    per_step = not step and not isinstance(model.readout, LastStep)
    shape = (*(leading if per_step else ("batch",)), model.architecture.answers)
    graph.output("logits", logits, shape)
    graph.output("probabilities", graph.op("Softmax", logits, axis=-1), shape)
    if step:
        states_out(graph, layer, after)
    words = {
        "task": encoder.task.name,
        "form": "step" if step else "sequence",
        "features": encoder.features,
        "symbol_columns": encoder.symbol_columns,
        "vocabularies": encoder.vocabularies,
        **encoder.codec.to_json(),
        "cell": json.loads(layer.cell.json),
    }
    return graph.model("run", {f"throughtime.{name}": json.dumps(value) for name, value in words.items()})


def _read(graph: Graph, model: SequenceModel, encoder: Encoder, leading: tuple[str, ...]) -> str:
    """Inputs as they are measured, to what the layer reads: scaled as the encoder does, in float64, and embedded."""
    parts = []
    if count := len(encoder.features):
        x = graph.input("x", (*leading, count), np.float64)
        mean, scale = (
            graph.array(v, "scaler", np.float64) for v in (encoder.inputs.scaler.mean, encoder.inputs.scaler.scale)
        )
        scaled = graph.op("Div", graph.op("Sub", x, mean), scale)
        parts.append(graph.op("CastLike", scaled, graph.number(0.0)))
    if columns := len(encoder.symbol_columns):
        symbols = graph.input("symbols", (*leading, columns), np.int64)
        for column, embedding in enumerate(model.embeddings):
            assert isinstance(embedding, torch.nn.Embedding)
            place = graph.array(np.array(column), "column", np.int64)
            table = graph.array(_array(embedding.weight), f"embedding_{column}")
            parts.append(graph.op("Gather", table, graph.op("Gather", symbols, place, axis=-1), axis=0))
    return parts[0] if len(parts) == 1 else graph.op("Concat", *parts, axis=-1)


def _last(graph: Graph, model: SequenceModel, states: str) -> str:
    """What the read-out of a sequence reads, [B, D * width]: the last layer's states at the end of each direction.

    Forwards that is the output at the true last step, backwards the one at step 0, and zero for an empty sequence.
    """
    directions = 2 if model.architecture.bidirectional else 1
    last = [graph.array(np.array(place), "place", np.int64) for place in range(-directions, 0)]
    parts = [graph.op("Gather", states, place, axis=0) for place in last]
    return parts[0] if len(parts) == 1 else graph.op("Concat", *parts, axis=-1)


def _cases(model: SequenceModel, encoder: Encoder, step: bool) -> Iterator[Case]:
    """Sequences drawn around the training's mean, any symbol among them, and what the run's model says of them."""
    draw, scaler = np.random.default_rng(0), encoder.inputs.scaler
    for rows, most in other_sizes():
        steps = 1 if step else most
        x = encoder.inputs.scaler.mean + encoder.inputs.scaler.scale * draw.normal(
            size=(steps, rows, len(encoder.features))
        )
        tops = [len(vocabulary) for vocabulary in encoder.vocabularies]
        symbols = draw.integers(0, np.array(tops, np.int64), (steps, rows, len(tops)))
        ragged = draw.integers(1, steps + 1, rows)
        scaled = torch.stack([scaler(x[:, row]) for row in range(rows)], 1)  # [T, B, features]
        begin = [draw.normal(size=(len(each), rows, each.shape[2])) for each in initial_of(model.recurrent)]
        h_0 = tuple(torch.from_numpy(each.astype(np.float32)) for each in begin)
        names = [f"{state}_0" for state in model.recurrent.cell.states]
        states = {name: each.numpy() for name, each in zip(names, h_0, strict=True)}
        given = {"x": x, "symbols": symbols}
        given = {name: value[0] if step else value for name, value in given.items() if value.shape[-1]}
        batch = Batch(scaled, torch.from_numpy(symbols), torch.full((rows,), steps), torch.zeros(0))
        if step:
            yield Case(f"batch {rows}", {**given, **states}, _answer(model, batch, h_0, step))
            yield Case(f"batch {rows}, before the first step", given, _answer(model, batch, None, step))
            continue
        where = f"batch {rows}, {steps} steps"
        yield Case(where, given, _answer(model, batch, None, step))
        cut = Batch(batch.x, batch.symbols, torch.from_numpy(ragged), batch.targets)
        where = f"{where}, lengths {ragged.tolist()}"
        yield Case(where, {**given, "lengths": ragged}, _answer(model, cut, None, step))


def _answer(model: SequenceModel, batch: Batch, h_0: tuple[Tensor, ...] | None, step: bool) -> dict[str, NDArray[Any]]:
    logits, ends = model.run(batch, h_0)
    logits = logits[0] if step and logits.dim() == 3 else logits
    found = {"logits": _array(logits), "probabilities": _array(logits.softmax(-1))}
    if step:
        found |= {f"{state}_n": _array(end) for state, end in zip(model.recurrent.cell.states, ends, strict=True)}
    return found


def _array(tensor: Tensor) -> NDArray[Any]:
    return tensor.detach().cpu().numpy()
