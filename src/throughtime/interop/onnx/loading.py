"""`load`: the RNN, GRU and LSTM nodes of an ONNX model as layers, with their weights."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from throughtime.engine.problem import Problem
from throughtime.equations import expr
from throughtime.equations.cell import Cell
from throughtime.equations.standard import GRU, LSTM, ONNX_GATES, ONNX_PEEPHOLES, OWN_GATES, RNN, Unit
from throughtime.errors import InteropError, ThroughtimeError
from throughtime.nn.layout import State, reset_backwards
from throughtime.nn.recurrent import Call, Recurrent, Run
from throughtime.nn.stream import Stream

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from onnx import ModelProto, NodeProto

    Source = str | os.PathLike[str] | ModelProto | NodeProto


class Reversed(Recurrent):
    """A `Recurrent` of one direction that reads every sequence from its true end to its beginning."""

    reverse = True

    def _forward(self, call: Call, run: Run) -> tuple[Tensor | PackedSequence, State]:
        def backwards(problem: Problem) -> tuple[Tensor, tuple[Tensor, ...]]:
            reset = problem.reset
            shifted = reset if reset is None else reset_backwards(reset, problem.lengths)
            return run(replace(problem, reverse=True, reset=shifted))

        return super()._forward(call, backwards)

    def stream(self, batch_size: int | None = None, *, h_0: State | None = None) -> Stream:
        """Refused: it begins at the end of a sequence."""
        raise ThroughtimeError("a layer that reads from the end has no step to stream; run it on whole sequences")


def load(source: Source, weights: Mapping[str, NDArray[Any]] | None = None) -> dict[str, Recurrent]:
    """The recurrent nodes of an ONNX file, model or node as layers, by the node's name (or its first output's).

    Weights are what stands in the model; `weights` gives those that do not, by the name that the node calls them. The
    layers take what the nodes take: x [T, B, I], or [B, T, I] where layout is 1; sequence_lens as `lengths=`;
    initial_h and initial_c [directions, B, hidden_size] as h_0 (always with the direction first). Without them a layer
    begins at the initial states that stand in the model, at zero if none do. A node whose direction is reverse
    becomes a layer that reads from the end.

    Raises InteropError, naming the node and the attribute or input, for a file that is not ONNX, for weights that are
    not to be had or of another shape, and for what a layer cannot say.
    """
    from onnx import NodeProto

    given = dict(weights or {})
    if isinstance(source, NodeProto):
        if source.op_type not in ONNX_GATES:
            raise InteropError(f"node {source.name!r} is {source.op_type}, which is no recurrent layer")
        nodes = [source]
    else:
        model = _read(source)
        given = {**_constants(model), **given}
        nodes = [node for node in _nodes(model.graph) if node.op_type in ONNX_GATES and node.domain in ("", "ai.onnx")]
        if not nodes:
            raise InteropError(f"{_said(source)}: has no RNN, GRU or LSTM node")
    layers: dict[str, Recurrent] = {}
    for node in nodes:
        name = node.name or next(output for output in node.output if output)
        if name in layers:
            raise InteropError(f"{_said(source)}: has two nodes called {name!r}; give them names of their own")
        layers[name] = _Reading(node, name, given).layer()
    return layers


def _said(source: Any) -> str:
    return os.fspath(source) if isinstance(source, str | os.PathLike) else "the model"


def _read(source: Any) -> ModelProto:
    import onnx

    if isinstance(source, onnx.ModelProto):
        return source
    path = os.fspath(source)
    try:
        model = onnx.load(path)
        onnx.checker.check_model(model)
    except OSError as error:
        raise InteropError(f"{path}: cannot be read ({error.strerror or error}); see whether it is there") from error
    except Exception as error:  # protobuf's DecodeError and the checker's derive from Exception alone
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InteropError(f"{path}: is not an ONNX file, or a damaged one ({reason})") from error
    return model


def _nodes(graph: Any) -> Iterator[NodeProto]:
    """The nodes of a graph and of the graphs inside it."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inside in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from _nodes(inside)


def _constants(model: ModelProto) -> dict[str, NDArray[Any]]:
    """What stands in the model by name: initialisers, and the outputs of Constant nodes."""
    from onnx import numpy_helper

    found = {each.name: numpy_helper.to_array(each) for each in model.graph.initializer}
    for node in _nodes(model.graph):
        if node.op_type == "Constant":
            for attribute in node.attribute:
                if attribute.name == "value":
                    found[node.output[0]] = numpy_helper.to_array(attribute.t)
        elif node.op_type == "Identity" and node.input[0] in found:
            found[node.output[0]] = found[node.input[0]]
    return found


INPUTS = {
    "RNN": ("X", "W", "R", "B", "sequence_lens", "initial_h"),
    "GRU": ("X", "W", "R", "B", "sequence_lens", "initial_h"),
    "LSTM": ("X", "W", "R", "B", "sequence_lens", "initial_h", "initial_c", "P"),
}
"""The inputs of the standard's operators, in order."""

KNOWN = {
    *("activation_alpha", "activation_beta", "activations", "clip", "direction", "hidden_size", "layout"),
    *("linear_before_reset", "input_forget", "output_sequence"),
}

DEFAULTS = {"RNN": ("Tanh",), "GRU": ("Sigmoid", "Tanh"), "LSTM": ("Sigmoid", "Tanh", "Tanh")}


@dataclass(frozen=True)
class _Reading:
    """One node while it becomes a layer."""

    node: NodeProto
    name: str
    given: Mapping[str, NDArray[Any]]

    def refuse(self, problem: str) -> NoReturn:
        raise InteropError(f"node {self.name!r} ({self.node.op_type}): {problem}")

    @property
    def operator(self) -> str:
        return self.node.op_type

    def attribute(self, name: str, default: Any) -> Any:
        from onnx import helper

        for attribute in self.node.attribute:
            if attribute.name == name:
                value = helper.get_attribute_value(attribute)
                if isinstance(value, bytes):
                    return value.decode()
                return [each.decode() if isinstance(each, bytes) else each for each in value] if _many(value) else value
        return default

    def called(self, name: str) -> str:
        """What the node calls an input of the standard's, empty if it leaves it out."""
        place = INPUTS[self.operator].index(name)
        return self.node.input[place] if place < len(self.node.input) else ""

    def tensor(self, name: str, shape: Sequence[int]) -> NDArray[Any] | None:
        """An input that stands in the model, of this shape (-1: any size); None if the node leaves it out."""
        called = self.called(name)
        if not called:
            return None
        if called not in self.given:
            self.refuse(f"input {name} ({called!r}) is computed or fed; give it as weights={{{called!r}: ...}}")
        value = np.asarray(self.given[called])
        if value.ndim != len(shape) or any(w not in (-1, got) for w, got in zip(shape, value.shape, strict=True)):
            wanted = ["any" if size == -1 else size for size in shape]
            self.refuse(f"input {name} ({called!r}) has shape {list(value.shape)}; it must be {wanted}")
        return value

    def layer(self) -> Recurrent:
        for attribute in self.node.attribute:
            if attribute.name not in KNOWN:
                self.refuse(f"attribute {attribute.name} is not known; throughtime reads {', '.join(sorted(KNOWN))}")
        direction = self.attribute("direction", "forward")
        if direction not in ("forward", "reverse", "bidirectional"):
            self.refuse(f"attribute direction is {direction!r}; it is forward, reverse or bidirectional")
        layout = self.attribute("layout", 0)
        if layout not in (0, 1):
            self.refuse(f"attribute layout is {layout!r}; it is 0 or 1")
        if self.called("sequence_lens") in self.given:
            self.refuse("input sequence_lens stands in the model; a layer takes lengths= where it is called instead")
        directions, gates = (2 if direction == "bidirectional" else 1), len(ONNX_GATES[self.operator])
        recurrent = self.tensor("R", (directions, -1, -1))
        if recurrent is None or recurrent.shape[1] != gates * recurrent.shape[2]:
            found = "missing" if recurrent is None else f"of shape {list(recurrent.shape)}"
            self.refuse(f"input R is {found}; it must be [{directions}, {gates} * hidden_size, hidden_size]")
        size = recurrent.shape[2]
        if (said := self.attribute("hidden_size", size)) != size:
            self.refuse(f"attribute hidden_size is {said}, and R is for {size}")
        weight = self.tensor("W", (directions, gates * size, -1))
        if weight is None:
            self.refuse("input W is missing")
        if weight.dtype not in (np.float32, np.float64):
            self.refuse(f"input W is {weight.dtype}; a layer is float32 or float64")
        stacks = {"W": weight, "R": recurrent}
        wanted = [("B", 2 * gates * size)] + ([("P", len(ONNX_PEEPHOLES) * size)] if self.operator == "LSTM" else [])
        for name, length in wanted:
            if (value := self.tensor(name, (directions, length))) is not None:
                stacks[name] = value
        initial = self.initial(directions, size, batch_first=bool(layout))
        layer = self.make(
            self.cell("B" in stacks, "P" in stacks, directions),
            weight.shape[2],
            size,
            direction,
            batch_first=bool(layout),
            learn_initial=initial is not None,
            dtype=torch.from_numpy(weight[:0].copy()).dtype,
        )
        self.fill(layer, stacks, initial)
        return layer

    def make(self, cell: Cell, input_size: int, size: int, direction: str, **options: Any) -> Recurrent:
        if direction == "reverse":
            return Reversed(cell, input_size, size, **options)
        return Recurrent(cell, input_size, size, bidirectional=direction == "bidirectional", **options)

    def fill(
        self, layer: Recurrent, stacks: Mapping[str, NDArray[Any]], initial: Sequence[NDArray[Any]] | None
    ) -> None:
        for number, suffix in enumerate(("", "_reverse")[: 2 if layer.bidirectional else 1]):
            one = {name: stack[number] for name, stack in stacks.items()}
            tensors = dict(zip((p.name for p in layer.cell.parameters), _parameters(layer.cell, one), strict=True))
            if initial is not None:
                starts = (each[number] for each in initial)
                tensors |= {f"initial_{state}": row for state, row in zip(layer.cell.states, starts, strict=True)}
            for name, value in tensors.items():
                with torch.no_grad():
                    getattr(layer, f"{name}_l0{suffix}").copy_(torch.from_numpy(np.array(value)))

    def initial(self, directions: int, size: int, batch_first: bool) -> list[NDArray[Any]] | None:
        """The initial states that stand in the model, [directions, H] each; None if none do, or they are zero."""
        found = []
        for name in ("initial_h", "initial_c")[: 2 if self.operator == "LSTM" else 1]:
            if self.called(name) not in self.given:  # left out, or fed when the layer is called
                found.append(np.zeros((directions, size)))
                continue
            shape = (-1, directions, size) if batch_first else (directions, -1, size)
            value = self.tensor(name, shape)
            assert value is not None
            value = value.swapaxes(0, 1) if batch_first else value
            if value.shape[1] and (value != value[:, :1]).any():
                self.refuse(f"input {name} has another row for each sequence; take it out, and give it as h_0")
            found.append(value[:, 0] if value.shape[1] else np.zeros((directions, size)))
        return found if any(value.any() for value in found) else None

    def cell(self, bias: bool, peepholes: bool, directions: int) -> Cell:
        units = self.units(directions)
        if self.operator == "RNN":
            return RNN(f=units[0], bias=bias)
        if self.operator == "GRU":
            after = self.attribute("linear_before_reset", 0)
            return GRU(f=units[0], g=units[1], bias=bias, reset_after=bool(after))
        coupled = bool(self.attribute("input_forget", 0))
        return LSTM(f=units[0], g=units[1], shown=units[2], bias=bias, peepholes=peepholes, coupled=coupled)

    def units(self, directions: int) -> list[Unit]:
        """The activations of the node, the same in both directions; clipped before them where it says so."""
        count = len(DEFAULTS[self.operator])
        names = self.attribute("activations", None) or list(DEFAULTS[self.operator]) * directions
        if len(names) != count * directions:
            self.refuse(f"attribute activations names {len(names)}; it must name {count * directions}")
        numbers = {kind: list(self.attribute(f"activation_{kind}", [])) for kind in ("alpha", "beta")}
        made, said = [], []
        for name in names:
            known = next((known for known in ACTIVATIONS if known.lower() == name.lower()), None)
            if known is None:
                self.refuse(f"attribute activations names {name!r}; throughtime has {', '.join(ACTIVATIONS)}")
            unit, wanted = ACTIVATIONS[known]
            values = []
            for kind, default in wanted.items():
                value = numbers[kind].pop(0) if numbers[kind] else default
                if value is None:
                    self.refuse(
                        f"attribute activation_{kind} has no value for {known}, for which runtimes take different ones"
                    )
                values.append(float(value))
            made.append(unit(*values))
            said.append((known, *values))
        if said[:count] * directions != said:
            self.refuse("attribute activations differs between the directions; a layer has one cell for both")
        clip = self.attribute("clip", None)
        if clip is None:
            return made[:count]
        if not clip > 0:
            self.refuse(f"attribute clip is {clip}; it must be above 0")
        first = [_clipped(unit, float(clip)) for unit in made[:count]]
        return [*first[:2], made[2]] if self.operator == "LSTM" else first


def _many(value: Any) -> bool:
    return not isinstance(value, int | float | str | bytes) and hasattr(value, "__iter__")


def _clipped(unit: Unit, most: float) -> Unit:
    """What the standard calls clip: of the sums that gates and candidates are made of."""
    return lambda a: unit(expr.minimum(expr.maximum(a, -most), most))


def _parameters(own: Cell, given: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
    """The tensors of a cell of `equations.standard` in the order of its parameters, from W, R, B and P."""
    operator = next(
        name for name, letters in ONNX_GATES.items() if len(given["W"]) == len(letters) * given["R"].shape[1]
    )
    order, mine = ONNX_GATES[operator], {own_name: gate for gate, own_name in OWN_GATES[operator].items()}
    halves = np.split(given["B"], 2) if "B" in given else (None, None)
    stacks: dict[str, tuple[Any, tuple[str, ...]]] = {
        "weight_ih": (given["W"], order),
        "weight_hh": (given["R"], order),
        "bias_ih": (halves[0], order),
        "bias_hh": (halves[1], order),
        "weight_p": (given.get("P"), ONNX_PEEPHOLES),
    }
    found = []
    for parameter in own.parameters:
        stack, letters = stacks[parameter.name]
        blocks = dict(zip(letters, np.split(stack, len(letters)), strict=True))
        found.append(np.concatenate([blocks[mine[gate]] for gate in parameter.gates]))
    return found


def _affine(alpha: float, beta: float) -> Unit:
    return lambda a: alpha * a + beta


def _leaky(alpha: float) -> Unit:
    return lambda a: expr.where(expr.as_node(a) < 0.0, alpha * a, a)


def _thresholded(alpha: float) -> Unit:
    return lambda a: expr.where(expr.as_node(a) > alpha, a, 0.0)


def _scaled_tanh(alpha: float, beta: float) -> Unit:
    return lambda a: alpha * expr.tanh(beta * a)


def _hard_sigmoid(alpha: float, beta: float) -> Unit:
    return lambda a: expr.maximum(0.0, expr.minimum(1.0, alpha * a + beta))


def _elu(alpha: float) -> Unit:
    # below 0 alone, so that the other branch's exponential cannot overflow into a gradient
    return lambda a: expr.where(expr.as_node(a) < 0.0, alpha * (expr.exp(expr.minimum(a, 0.0)) - 1.0), a)


ACTIVATIONS: dict[str, tuple[Any, dict[str, float | None]]] = {
    "Relu": (lambda: expr.relu, {}),
    "Tanh": (lambda: expr.tanh, {}),
    "Sigmoid": (lambda: expr.sigmoid, {}),
    "Affine": (_affine, {"alpha": None, "beta": None}),
    "LeakyRelu": (_leaky, {"alpha": 0.01}),
    "ThresholdedRelu": (_thresholded, {"alpha": None}),
    "ScaledTanh": (_scaled_tanh, {"alpha": None, "beta": None}),
    "HardSigmoid": (_hard_sigmoid, {"alpha": 0.2, "beta": 0.5}),
    "Elu": (_elu, {"alpha": 1.0}),
    "Softsign": (lambda: lambda a: a / (1.0 + abs(a)), {}),
    "Softplus": (lambda: expr.softplus, {}),
}
"""The standard's activations: how one is made of its numbers, and what those are by default (None: must be given)."""
