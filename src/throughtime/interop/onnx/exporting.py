"""`export`: a layer straight from its equations, or a whole model through torch's exporter; checked, then named."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from throughtime.errors import InteropError
from throughtime.interop.onnx.check import Case, check, new_file, other_sizes
from throughtime.interop.onnx.graph import Graph
from throughtime.interop.onnx.layers import Ends, expanded, initial_of, one_step, over_time
from throughtime.nn.recurrent import Layer

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from onnx import ModelProto

DTYPES = {torch.float32: np.float32, torch.float64: np.float64}


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    args: tuple[Any, ...] | None = None,
    *,
    step: bool = False,
    dynamic_shapes: Any = None,
    others: Sequence[tuple[Any, ...]] | None = None,
    metadata: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a recurrent layer, or a model that holds some, as an ONNX file, and return its path.

    The file has the model as it is in evaluation: no dropout. Before it gets its name it is run in ONNX Runtime at
    three other batch sizes and numbers of steps and compared with the model.

    A layer of throughtime.nn needs no `args`. Its inputs are `x`, laid out as the layer's own ([T, B, I], or [B, T, I]
    with batch_first), and, each of which may be left out: `lengths` [B] int64 (negative: all T steps; more than T is
    the caller's mistake), `<state>_0` [layers * directions, B, width] for each state, and the outside inputs by name
    (not to be left out). Its outputs are `output`, zero past each end, and `<state>_n`. With `step`, the file has one
    step: `x` [B, I] and `<state>_0` [layers, B, width] to `output` [B, width] and `<state>_n`, which go in again as
    `<state>_0`. Any batch size and number of steps can be run.

    Any other model goes through torch.onnx.export with `args`, an example of its inputs, and `dynamic_shapes`, which
    torch.export describes; dimensions of one name have one size. It is compared at
    `others`, inputs of other sizes; without them the example is repeated and cut to three other sizes.

    `metadata` is kept in the file by name. Raises InteropError where the file exists (unless `overwrite`), cannot be
    written, or does not compute what the model does, and for a layer that has no step or another dtype than float32
    and float64.
    """
    target = Path(path)
    with new_file(target, overwrite) as partial, evaluating(model):
        if isinstance(model, Layer):
            if args is not None or dynamic_shapes is not None or others is not None:
                raise InteropError("a recurrent layer is exported from its equations; leave args= and the rest out")
            write(layer_model(model, step=step, metadata=metadata or {}), partial)
            check(partial, target, layer_cases(model, step=step))
        else:
            from throughtime.interop.onnx.whole_models import export_whole

            if step:
                raise InteropError("step=True is for a recurrent layer; a model has no step of its own")
            check(partial, target, export_whole(model, partial, args, dynamic_shapes, others, metadata or {}))
    return target


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation, and as it was afterwards, module by module."""
    were = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in were:
            module.training = training


def write(model: ModelProto, path: Path) -> None:
    """Check the model against the standard and write it. Raises InteropError for one of more than 2 GB."""
    import onnx

    try:
        onnx.checker.check_model(model, full_check=True)
        content = model.SerializeToString()
    except ValueError as error:  # protobuf's word for what it cannot hold
        raise InteropError(f"the model cannot be one ONNX file ({error}); a file holds 2 GB") from error
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def dtype_of(layer: Layer) -> Any:
    """The NumPy dtype of a layer. Raises InteropError for one that is not exported."""
    dtype = next((p.dtype for p in layer.parameters()), torch.float32)
    if dtype not in DTYPES:
        raise InteropError(f"the layer is {dtype}; a file has float32 or float64, convert it with .float()")
    return DTYPES[dtype]


def states_in(graph: Graph, layer: Layer, rows: str) -> list[str]:
    """Inputs `<state>_0`, which begin where the layer's states do if they are left out; with a row for each of B."""
    found = []
    for state, initial in zip(layer.cell.states, initial_of(layer), strict=True):
        shape = (initial.shape[0], f"batch_of_{state}_0", initial.shape[2])
        found.append(expanded(graph, graph.input(f"{state}_0", shape, default=initial), rows))
    return found


def states_out(graph: Graph, layer: Layer, states: Sequence[str]) -> None:
    """Outputs `<state>_n`."""
    for state, initial, value in zip(layer.cell.states, initial_of(layer), states, strict=True):
        graph.output(f"{state}_n", value, (initial.shape[0], "batch", initial.shape[2]))


def layer_model(layer: Layer, *, step: bool, metadata: Mapping[str, str]) -> ModelProto:
    """A layer alone as an ONNX model."""
    graph = Graph(dtype_of(layer))
    cell = layer.cell
    width = cell.sizes(layer.hidden_size, layer.proj_size)[cell.output] * (2 if layer.bidirectional else 1)
    own = [f"{state}_{end}" for state in cell.states for end in "0n"]
    if taken := {"x", "lengths", "output", *own} & set(cell.outside):
        raise InteropError(f"{cell.name}: the outside input {min(taken)!r} has the name of another input; rename it")
    if step:
        refuse_step(layer)
        x = graph.input("x", ("batch", layer.input_size))
        outside = {name: graph.input(name, ("batch", f"width_of_{name}")) for name in cell.outside}
        output, after = one_step(graph, layer, x, states_in(graph, layer, graph.size(x, 0)), outside)
        graph.output("output", output, ("batch", width))
    else:
        places = ("batch", "steps") if layer.batch_first else ("steps", "batch")

        def time_first(value: str) -> str:
            return graph.op("Transpose", value, perm=[1, 0, 2]) if layer.batch_first else value

        x = time_first(graph.input("x", (*places, layer.input_size)))
        lengths = graph.input("lengths", ("batch_of_lengths",), np.int64, default=np.array([-1]))
        ends = Ends(graph, x, lengths)
        states = states_in(graph, layer, graph.size(x, 1))
        outside = {
            name: time_first(graph.input(name, (*places, f"width_of_{name}")))
            if name in cell.per_step
            else graph.input(name, ("batch", f"width_of_{name}"))
            for name in cell.outside
        }
        output, after = over_time(graph, layer, x, ends, states, outside)
        output = graph.op("Where", ends.inside, output, graph.number(0.0))
        graph.output("output", time_first(output), (*places, width))
    states_out(graph, layer, after)
    return graph.model(cell.name, {"throughtime.cell": cell.json, **metadata})


def refuse_step(layer: Layer) -> None:
    """Raises InteropError for a layer that cannot be run one step at a time."""
    if layer.bidirectional or getattr(layer, "reverse", False):
        raise InteropError("a layer that reads from the end has no step to export; export the whole sequence")


def layer_cases(layer: Layer, *, step: bool) -> Iterator[Case]:
    """Inputs drawn anew at three sizes, with everything given and with everything left out that can be."""
    draw = torch.Generator().manual_seed(0)
    weight = next(layer.parameters(), torch.zeros(()))
    wide = 1 if layer.cell.projects else layer.hidden_size  # what fits whatever width it meets

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=weight.dtype).to(weight.device)

    for batch, most in other_sizes():
        steps = 1 if step else most
        places = (batch, steps) if layer.batch_first else (steps, batch)
        x = drawn(*places, layer.input_size)
        begin = tuple(drawn(len(each), batch, each.shape[2]) for each in initial_of(layer))
        states = {f"{name}_0": value for name, value in zip(layer.cell.states, begin, strict=True)}
        outside = {
            name: drawn(*places, wide) if name in layer.cell.per_step else drawn(batch, 1)
            for name in layer.cell.outside
        }
        more: dict[str, Any] = {"outside": outside} if outside else {}
        h_0 = begin if len(begin) > 1 else begin[0]
        if step:
            axis = 1 if layer.batch_first else 0
            now = {
                name: value.squeeze(axis) if name in layer.cell.per_step else value for name, value in outside.items()
            }
            given = {"x": x.squeeze(axis), **now}
            for where, state, named in (("", h_0, states), (", from the initial state", None, {})):
                output, last = layer(x, state, **more)
                yield _case(layer, f"batch {batch}{where}", {**given, **named}, output.squeeze(axis), last)
            continue
        where = f"batch {batch}, {steps} steps"
        yield _case(layer, where, {"x": x, **outside}, *layer(x, **more))
        lengths = torch.randint(0, steps + 1, (batch,), generator=draw)
        given = {"x": x, "lengths": lengths, **states, **outside}
        yield _case(layer, f"{where}, lengths {lengths.tolist()}", given, *layer(x, h_0, lengths=lengths, **more))


def _case(layer: Layer, where: str, given: Mapping[str, Tensor], output: Tensor, last: Any) -> Case:
    ends = last if isinstance(last, tuple) else (last,)
    expected = {"output": output, **{f"{s}_n": end for s, end in zip(layer.cell.states, ends, strict=True)}}
    return Case(where, *({name: _array(value) for name, value in part.items()} for part in (given, expected)))


def _array(tensor: Tensor) -> NDArray[Any]:
    return tensor.detach().cpu().numpy()
