"""Recurrent nodes of ONNX models as layers: the standard's own cases, ONNX Runtime beside them, and what is refused."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper, numpy_helper

import throughtime as tt
from throughtime.errors import InteropError, ThroughtimeError
from throughtime.interop.onnx import export, load

ROWS, STEPS, INPUTS, UNITS = 3, 5, 2, 4
GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}


def cases_of_the_standard() -> Iterator[Any]:
    """Its cases for the three operators alone: importing all of them takes half a minute."""
    node = importlib.import_module("onnx.backend.test.case.node")
    for name in ("rnn", "gru", "lstm"):
        importlib.import_module(f"onnx.backend.test.case.node.{name}")
    for case in node._NodeTestCases:
        if case.model.graph.node[0].op_type in GATES:
            yield pytest.param(case, id=case.name)


CASES = list(cases_of_the_standard())


def test_the_standard_has_its_eighteen_cases():
    assert len(CASES) == 18


@pytest.mark.parametrize("case", CASES)
def test_the_standards_own_cases_reproduce(case: Any):
    node = case.model.graph.node[0]
    inputs, expected = case.data_sets[0]
    given = dict(zip((value.name for value in case.model.graph.input), inputs, strict=True))
    (layer,) = load(case.model, _weights(given)).values()
    batch_first = layer.batch_first
    begin = [torch.from_numpy(given[name]) for name in ("initial_h", "initial_c") if name in given]
    lengths = given.get("sequence_lens")
    h_0 = None if not begin else begin[0] if len(begin) == 1 else tuple(begin)
    output, last = layer(torch.from_numpy(given["X"]), h_0, lengths=lengths)
    ends = last if isinstance(last, tuple) else (last,)
    directions = 2 if layer.bidirectional else 1
    if batch_first:  # Y [B, T, D, H], states [B, D, H]
        shown = output.unflatten(-1, (directions, -1))
        ends = tuple(end.transpose(0, 1) for end in ends)
    else:  # Y [T, D, B, H]
        shown = output.unflatten(-1, (directions, -1)).transpose(1, 2)
    found = dict(zip(("Y", "Y_h", "Y_c"), (shown, *ends), strict=False))
    names = [name for name in node.output if name]
    for name, value in zip(names, expected, strict=False):
        np.testing.assert_allclose(found[name].detach().numpy(), value, rtol=1e-4, atol=1e-6)
    assert len(names) <= 3


def _weights(given: dict[str, Any]) -> dict[str, Any]:
    """What is the layer's own; lengths and initial states are given to it when it is called."""
    return {name: value for name, value in given.items() if name in "WRBP"}


def model_of(
    operator: str, *, directions: int = 1, peepholes: bool = False, missing: str = "", **attributes: Any
) -> onnx.ModelProto:
    """A node with drawn weights that stand in the model; x, lengths and states are fed."""
    draw, gates = np.random.default_rng(5), GATES[operator]
    shapes = {
        "W": (directions, gates * UNITS, INPUTS),
        "R": (directions, gates * UNITS, UNITS),
        "B": (directions, 2 * gates * UNITS),
        **({"P": (directions, 3 * UNITS)} if peepholes else {}),
    }
    weights = {name: draw.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    names = ["X", "W", "R", "B", "sequence_lens", "initial_h", *(["initial_c"] if operator == "LSTM" else [])]
    names += ["P"] if peepholes else []
    state = (directions, "batch", UNITS)
    inputs = [
        helper.make_tensor_value_info("X", 1, ("steps", "batch", INPUTS)),
        helper.make_tensor_value_info("sequence_lens", 6, ("batch",)),
        *(helper.make_tensor_value_info(name, 1, state) for name in names if name.startswith("initial")),
    ]
    outputs = [helper.make_tensor_value_info("Y", 1, ("steps", directions, "batch", UNITS))]
    outputs += [helper.make_tensor_value_info(f"Y_{letter}", 1, state) for letter in "hc"[: len(names) - 5]]
    outputs = outputs[: 3 if operator == "LSTM" else 2]
    direction = {1: "forward", 2: "bidirectional"}[directions]
    attributes = {"hidden_size": UNITS, "direction": direction, **attributes}
    node = helper.make_node(operator, names, [o.name for o in outputs], "cell", **attributes)
    constants = [numpy_helper.from_array(value, name) for name, value in weights.items() if name != missing]
    graph = helper.make_graph([node], "graph", inputs, outputs, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def assert_as_runtime(model: onnx.ModelProto) -> None:
    """The layer's outputs and last states are ONNX Runtime's, ragged, from given states."""
    (layer,) = load(model).values()
    session = onnxruntime.InferenceSession(model.SerializeToString())
    draw = np.random.default_rng(6)
    lengths = np.array([STEPS, 2, 3], np.int32)
    given = {"X": draw.normal(size=(STEPS, ROWS, INPUTS)).astype(np.float32), "sequence_lens": lengths}
    states = [i.name for i in session.get_inputs() if i.name.startswith("initial")]
    directions = 2 if layer.bidirectional else 1
    given |= {name: draw.normal(size=(directions, ROWS, UNITS)).astype(np.float32) for name in states}
    expected = session.run(None, given)
    begin = tuple(torch.from_numpy(given[name]) for name in states)
    output, last = layer(torch.from_numpy(given["X"]), begin if len(begin) > 1 else begin[0], lengths=lengths)
    ends = last if isinstance(last, tuple) else (last,)
    shown = output.unflatten(-1, (directions, -1)).transpose(1, 2)
    for found, wanted in zip((shown, *ends), expected, strict=True):
        np.testing.assert_allclose(found.detach().numpy(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "alpha", "beta"),
    [
        *((name, None, None) for name in ("Relu", "Tanh", "Sigmoid", "Softsign", "Softplus")),
        *((name, None, None) for name in ("LeakyRelu", "HardSigmoid", "Elu")),
        *((name, 0.3, None) for name in ("LeakyRelu", "Elu", "ThresholdedRelu")),
        *((name, 0.3, 0.6) for name in ("Affine", "ScaledTanh", "HardSigmoid")),
    ],
)
def test_every_activation_of_the_standard_is_as_in_onnx_runtime(name: str, alpha: float | None, beta: float | None):
    numbers = {"activation_alpha": alpha, "activation_beta": beta}
    given: dict[str, Any] = {kind: [value] for kind, value in numbers.items() if value is not None}
    assert_as_runtime(model_of("RNN", activations=[name], **given))


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize(
    ("operator", "options"),
    [
        ("RNN", {"clip": 0.4}),
        ("GRU", {"linear_before_reset": 1}),
        ("GRU", {"linear_before_reset": 0, "clip": 0.4}),
        ("LSTM", {"peepholes": True, "clip": 0.4}),
        ("LSTM", {"input_forget": 1}),
        (
            "LSTM",
            {"peepholes": True, "activations": ["HardSigmoid", "Softsign", "Elu"], "activation_alpha": [0.3, 0.7]},
        ),
    ],
)
def test_what_a_node_says_is_as_in_onnx_runtime(operator: str, options: dict[str, Any], direction: str):
    assert_as_runtime(model_of(operator, direction=direction, **options))


@pytest.mark.parametrize("operator", list(GATES))
def test_both_directions_are_as_in_onnx_runtime(operator: str):
    assert_as_runtime(model_of(operator, directions=2))


def test_what_was_exported_comes_back(tmp_path: Path):
    layer = tt.nn.Recurrent(tt.LSTM, 3, 4, num_layers=2, bidirectional=True)
    loaded = list(load(export(layer, tmp_path / "lstm.onnx")).values())
    assert [each.cell for each in loaded] == [tt.LSTM, tt.LSTM]
    x = torch.randn(6, 2, 3)
    between, _ = loaded[0](x)
    torch.testing.assert_close(loaded[1](between)[0], layer(x)[0])
    for name, tensor in loaded[0].state_dict().items():
        assert torch.equal(tensor, layer.state_dict()[name]), name


def test_a_reversed_layer_exports_and_comes_back(tmp_path: Path):
    (layer,) = load(model_of("GRU", direction="reverse")).values()
    (again,) = load(export(layer, tmp_path / "reverse.onnx")).values()
    x = torch.randn(6, 3, INPUTS)
    assert torch.equal(again(x, lengths=[6, 2, 0])[0], layer(x, lengths=[6, 2, 0])[0])
    with pytest.raises(ThroughtimeError, match="reads from the end"):
        layer.stream()
    with pytest.raises(InteropError, match="reads from the end"):
        export(layer, tmp_path / "step.onnx", step=True)


def test_a_reversed_layer_resets_where_a_bidirectional_one_does():
    (layer,) = load(model_of("GRU", direction="reverse")).values()
    both = tt.nn.Recurrent(layer.cell, INPUTS, UNITS, bidirectional=True)
    both.load_state_dict({f"{n}{s}": t for n, t in layer.state_dict().items() for s in ("", "_reverse")})
    x, reset = torch.randn(6, 3, INPUTS), torch.rand(6, 3) < 0.4
    found, _ = layer(x, lengths=[6, 2, 5], reset=reset)
    assert torch.equal(found, both(x, lengths=[6, 2, 5], reset=reset)[0][..., UNITS:])


def test_initial_states_that_stand_in_the_model_are_the_layers():
    model = model_of("LSTM")
    node = model.graph.node[0]
    begin = {"initial_h": [0.5, -1.0, 0.0, 2.0], "initial_c": [1.0, 0.25, -0.5, 0.0]}
    states = {name: np.tile(np.array(row, np.float32), (1, ROWS, 1)) for name, row in begin.items()}
    (layer,) = load(node, {i.name: numpy_helper.to_array(i) for i in model.graph.initializer} | states).values()
    x = torch.randn(STEPS, ROWS, INPUTS)
    given = tuple(torch.from_numpy(value) for value in states.values())
    torch.testing.assert_close(layer(x), layer(x, given))
    states["initial_h"][0, 1] += 1
    with pytest.raises(InteropError, match=r"node 'cell' .*initial_h has another row for each sequence"):
        load(node, {i.name: numpy_helper.to_array(i) for i in model.graph.initializer} | states)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"activations": ["Swish"]}, r"node 'cell' \(RNN\): attribute activations names 'Swish'; throughtime has Relu"),
        ({"activations": ["Tanh", "Tanh"]}, "attribute activations names 2; it must name 1"),
        ({"activations": ["Affine"]}, "attribute activation_alpha has no value for Affine"),
        ({"direction": "sideways"}, "attribute direction is 'sideways'"),
        ({"layout": 2}, "attribute layout is 2"),
        ({"hidden_size": 7}, "attribute hidden_size is 7, and R is for 4"),
        ({"clip": -1.0}, "attribute clip is -1.0; it must be above 0"),
        ({"zoneout": 0.1}, "attribute zoneout is not known"),
        ({"missing": "W"}, "input W .'W'. is computed or fed"),
    ],
)
def test_a_node_that_no_layer_is_names_its_attribute(change: dict[str, Any], said: str):
    with pytest.raises(InteropError, match=said):
        load(model_of("RNN", **change))


def test_weights_of_another_shape_are_refused():
    model = model_of("GRU", missing="B")
    with pytest.raises(InteropError, match=r"node 'cell' \(GRU\): input B .* has shape \[1, 5\]; it must be \[1, 24\]"):
        load(model, {"B": np.zeros((1, 5), np.float32)})
    with pytest.raises(InteropError, match=r"input R is of shape \[1, 4, 4\]; it must be \[1, 3 \* hidden_size"):
        load(model, {"B": np.zeros((1, 24), np.float32), "R": np.zeros((1, 4, 4), np.float32)})


def test_files_that_are_not_onnx_are_refused(tmp_path: Path):
    for content in (b"", b"PK\x03\x04not a model", b"\x08" * 100):
        (tmp_path / "model.onnx").write_bytes(content)
        with pytest.raises(InteropError, match=r"model\.onnx: is not an ONNX file"):
            load(tmp_path / "model.onnx")
    with pytest.raises(InteropError, match=r"gone\.onnx: cannot be read"):
        load(tmp_path / "gone.onnx")
    whole = model_of("GRU").SerializeToString()
    (tmp_path / "model.onnx").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InteropError, match=r"model\.onnx: is not an ONNX file"):
        load(tmp_path / "model.onnx")


def test_a_model_without_recurrent_nodes_is_refused():
    value = helper.make_tensor_value_info("x", 1, (1,)), helper.make_tensor_value_info("y", 1, (1,))
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "graph", [value[0]], [value[1]])
    with pytest.raises(InteropError, match="has no RNN, GRU or LSTM node"):
        load(helper.make_model(graph))
