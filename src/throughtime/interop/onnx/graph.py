"""An ONNX graph while it is written: nodes one after the other, the numbers in it, inputs and outputs by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from onnx import ModelProto, NodeProto, ValueInfoProto

OPSET, IR_VERSION = 18, 8
"""Of late 2022: old enough for the runtimes in use, and it has all that is written here."""

Dim = int | str
"""A size of a tensor: fixed, or free under a name."""


class Graph:
    """Nodes of one graph, or of a body inside it; a body shares the names and the constants of the graph around it."""

    def __init__(self, dtype: Any, around: Graph | None = None) -> None:
        self.dtype = np.dtype(dtype)
        self.nodes: list[NodeProto] = []
        self.inputs: list[ValueInfoProto] = []
        self.outputs: list[ValueInfoProto] = []
        self.constants: dict[str, NDArray[Any]] = {} if around is None else around.constants
        self._names: set[str] = set() if around is None else around._names

    def body(self) -> Graph:
        """An empty body for a node of this graph."""
        return Graph(self.dtype, self)

    def name(self, stem: str) -> str:
        """A name that nothing has yet: the stem itself, or the stem and a number."""
        name, number = stem, 1
        while name in self._names:
            number += 1
            name = f"{stem}_{number}"
        self._names.add(name)
        return name

    def input(self, name: str, shape: Sequence[Dim], dtype: Any = None, default: NDArray[Any] | None = None) -> str:
        """An input of the graph; with a `default`, whoever runs the model may leave it out."""
        self.inputs.append(_value(name, shape, self.dtype if dtype is None else dtype))
        self._names.add(name)
        if default is not None:
            self.constants[name] = default
        return name

    def output(self, name: str, value: str, shape: Sequence[Dim], dtype: Any = None) -> None:
        """Show a value as an output of the graph."""
        self.outputs.append(
            _value(self.op("Identity", value, stem=name), shape, self.dtype if dtype is None else dtype)
        )

    def op(self, kind: str, *inputs: str, stem: str = "", **attributes: Any) -> str:
        """A node with one output, whose name is returned."""
        return self.ops(kind, *inputs, stems=(stem or kind.lower(),), **attributes)[0]

    def ops(self, kind: str, *inputs: str, stems: Sequence[str], **attributes: Any) -> list[str]:
        """A node with several outputs; attributes that are None are left out."""
        from onnx import helper

        outputs = [self.name(stem) for stem in stems]
        given = {name: value for name, value in attributes.items() if value is not None}
        self.nodes.append(helper.make_node(kind, list(inputs), outputs, outputs[0], **given))
        return outputs

    def array(self, value: Any, stem: str = "constant", dtype: Any = None) -> str:
        """Numbers that stand in the model, in the graph's dtype if no other is given."""
        name = self.name(stem)
        self.constants[name] = np.array(value, self.dtype if dtype is None else dtype, order="C")
        return name

    def number(self, value: float) -> str:
        """One number, [] in the graph's dtype."""
        return self.array(np.array(value))

    def sizes(self, *values: int) -> str:
        """Whole numbers, [n] int64: a shape, axes, places."""
        return self.array(np.array(values), "sizes", np.int64)

    def size(self, value: str, axis: int) -> str:
        """One size of a tensor, [1] int64."""
        return self.op("Shape", value, start=axis, end=axis + 1)

    def proto(self, name: str) -> Any:
        """The graph as ONNX has it. A body holds no constants: they stand in the graph around it."""
        from onnx import helper, numpy_helper

        constants = [numpy_helper.from_array(value, each) for each, value in self.constants.items()]
        return helper.make_graph(self.nodes, name, self.inputs, self.outputs, constants)

    def body_proto(self, name: str) -> Any:
        """The body as ONNX has it."""
        from onnx import helper

        return helper.make_graph(self.nodes, name, self.inputs, self.outputs)

    def model(self, name: str, metadata: Mapping[str, str]) -> ModelProto:
        """The whole model."""
        from onnx import helper

        model = helper.make_model(
            self.proto(name),
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=IR_VERSION,
            producer_name="throughtime",
        )
        helper.set_model_props(model, dict(metadata))
        return model


def _value(name: str, shape: Sequence[Dim], dtype: Any) -> ValueInfoProto:
    from onnx import helper

    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), list(shape))
