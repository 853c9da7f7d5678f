"""Layers and runs as ONNX files: ONNX Runtime's numbers are ours at every size, and no file is left that is not."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from blackboards import ALL, random_cells
from hypothesis import given, settings

import throughtime as tt
from throughtime.equations.cell import Cell
from throughtime.equations.expr import relu, sigmoid, softplus
from throughtime.equations.standard import LSTM, standard
from throughtime.errors import InteropError
from throughtime.interop.onnx import export
from throughtime.interop.onnx import exporting as layers
from throughtime.interop.onnx.check import SHARE, Case, check, difference, other_sizes
from throughtime.interop.onnx.graph import Graph
from throughtime.interop.onnx.steps import _log1p, _sign
from throughtime.nn.recurrent import Layer
from throughtime.runs import export as exporting
from throughtime.runs import serve as serving
from throughtime.runs.configuration import Config
from throughtime.runs.fit import fit
from throughtime.runs.folder import FinishedRun

ROOT = Path(__file__).parent.parent


def run(path: Path, **given: Any) -> dict[str, np.ndarray[Any, Any]]:
    """What ONNX Runtime answers by name."""
    session = onnxruntime.InferenceSession(path)
    names = [output.name for output in session.get_outputs()]
    arrays = {
        name: np.asarray(value.detach() if isinstance(value, torch.Tensor) else value) for name, value in given.items()
    }
    return dict(zip(names, session.run(None, arrays), strict=True))


def operators(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def layer_of(cell: Cell, **options: Any) -> tt.nn.Recurrent:
    units = 4
    inputs, projected = units if cell.needs_equal_sizes else 3, 3 if cell.projects else 0
    layer = tt.nn.Recurrent(cell, inputs, units, proj_size=projected, **options)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.6)
    return layer


# Cells


@tt.cell(states="c h", output="h")
def Scrambled(x, c, h, W, U, b):
    """An LSTM as nobody else writes it: other names, other orders, fewer biases."""
    keep = tt.sigmoid(U.keep @ h + W.keep @ x + b.keep)
    write = tt.sigmoid(U.write @ h + W.write @ x)
    new = tt.tanh(W.new @ x + (U.new @ h + b.new))
    c_next = new * write + c * keep
    return c_next, tt.tanh(c_next) * tt.sigmoid(b.look + U.look @ h + W.look @ x)


@tt.cell(states="h")
def AlmostGRU(x, h, W, U, b, c):
    """A GRU but for the place of one bias."""
    r = tt.sigmoid(W.r @ x + b.r + U.r @ h + c.r)
    z = tt.sigmoid(W.z @ x + b.z + U.z @ h + c.z)
    n = tt.tanh(W.n @ x + r * (b.n + U.n @ h + c.n))
    return (1 - z) * n + z * h


def test_a_cell_is_known_by_its_graph():
    found = standard(Scrambled)
    assert found is not None
    assert found.operator == "LSTM"
    assert found.gates == {"i": "write", "o": "look", "f": "keep", "c": "new"}
    assert standard(AlmostGRU) is None
    assert standard(tt.Elman(activation=softplus)) is None
    assert standard(LSTM(f=relu, g=sigmoid)).activations == ("Relu", "Sigmoid", "Tanh")  # type: ignore[union-attr]
    known = {name: standard(cell) for name, cell in ALL.items()}
    assert {name: found.operator for name, found in known.items() if found} == {
        **{"elman": "RNN", "elman-relu": "RNN", "elman-identity": "RNN"},
        **{"gru": "GRU", "gru-reset-before": "GRU", "lstm": "LSTM", "Peephole": "LSTM"},
    }


def test_a_deep_chain_of_shared_values_is_not_written_out():
    @tt.cell(states="h")
    def chain(x, h, W, U):
        v = tt.tanh(W @ x + U @ h)
        for _ in range(60):
            v = v * v * 0.5
        return v

    assert standard(chain) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", list(ALL))
def test_every_cell_exports_whole_and_by_steps(name: str, dtype: torch.dtype, tmp_path: Path):
    """`export` itself compares three sizes, ragged and not, from given and from initial states."""
    layer = layer_of(ALL[name], dtype=dtype, learn_initial=True)
    whole = export(layer, tmp_path / "whole.onnx")
    native = standard(layer.cell)
    if native is not None and dtype == torch.float32:
        assert operators(whole)[native.operator] == 1
    else:
        assert operators(whole)["Scan"] == 1
    export(layer, tmp_path / "step.onnx", step=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step.onnx", "whole.onnx"]


@pytest.mark.parametrize(
    ("layer", "native"),
    [
        (tt.nn.GRU(3, 4, 2, bidirectional=True, batch_first=True), "GRU"),
        (tt.nn.LSTM(3, 4, 2, bias=False, bidirectional=True), "LSTM"),
        (tt.nn.LSTM(3, 4, proj_size=2), None),
        (tt.nn.RNN(3, 4, 3, nonlinearity="relu", batch_first=True), "RNN"),
        (layer_of(Scrambled, num_layers=2, bidirectional=True), "LSTM"),
        (layer_of(LSTM(coupled=True, peepholes=True), num_layers=2), "LSTM"),
        (layer_of(AlmostGRU, num_layers=2, bidirectional=True, batch_first=True), None),
    ],
    ids=lambda value: value.extra_repr() if isinstance(value, Layer) else str(value),
)
def test_layers_of_every_form_export(layer: Layer, native: str | None, tmp_path: Path):
    path = export(layer, tmp_path / "layer.onnx")
    assert native is None or operators(path)[native] == layer.num_layers
    if not layer.bidirectional:
        export(layer, tmp_path / "step.onnx", step=True)


@given(random_cells())
@settings(max_examples=15)
def test_random_cells_export(cell: Cell):
    """No file: a folder for each example would cost more than the export."""
    layer = layer_of(cell, dtype=torch.float64)
    with torch.no_grad():
        session = onnxruntime.InferenceSession(layers.layer_model(layer, step=False, metadata={}).SerializeToString())
        for case in layers.layer_cases(layer, step=False):
            found = session.run(list(case.expected), dict(case.given))
            for name, value in zip(case.expected, found, strict=True):
                assert difference(value, case.expected[name]) is None, f"{name} at {case.where}"


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_what_the_standard_lacks_is_exact_and_keeps_what_is_not_finite(dtype: Any):
    graph = Graph(dtype)
    a = graph.input("a", ("n",))
    graph.output("log1p", _log1p(graph, a), ("n",))
    graph.output("sign", _sign(graph, a), ("n",))
    session = onnxruntime.InferenceSession(graph.model("ops", {}).SerializeToString())
    tiny = [1e-3, 1e-7, 1e-12, -1e-7, 1e-300 if dtype == np.float64 else 1e-38]
    values = np.array([*tiny, 0.0, -0.0, 1.5, -0.75, -1.0, 1e30, np.inf, np.nan, -2.0], dtype)
    log1p, sign = session.run(None, {"a": values})
    with np.errstate(all="ignore"):
        np.testing.assert_allclose(log1p, np.log1p(values), rtol=4 * np.finfo(dtype).eps)
        np.testing.assert_array_equal(sign, np.sign(values))


def test_what_lies_past_an_end_is_not_read_and_the_output_is_zero_there(tmp_path: Path):
    for cell in (tt.GRU, AlmostGRU):
        layer = layer_of(cell, bidirectional=True)
        path = export(layer, tmp_path / f"{cell.name}.onnx")
        x, lengths = torch.randn(6, 3, 3), np.array([6, 0, 2])
        given = x.clone()
        given[2:, 2], given[:, 1] = torch.nan, torch.nan
        found = run(path, x=given, lengths=lengths)
        output, h_n = layer(x, lengths=lengths)
        assert difference(found["output"], output.detach().numpy()) is None
        assert difference(found["h_n"], h_n.detach().numpy()) is None
        assert not found["output"][2:, 2].any()


def test_a_step_fed_with_its_own_states_is_the_whole(tmp_path: Path):
    layer = layer_of(tt.LSTM, num_layers=2)
    path = export(layer, tmp_path / "step.onnx", step=True)
    x = torch.randn(7, 2, 3)
    states: dict[str, Any] = {}
    for t, expected in enumerate(layer(x)[0].detach().numpy()):
        found = run(path, x=x[t], **states)
        states = {"h_0": found["h_n"], "c_0": found["c_n"]}
        np.testing.assert_allclose(found["output"], expected, atol=1e-6)


def test_dropout_is_left_out_and_the_layer_is_as_it_was(tmp_path: Path):
    layer = tt.nn.GRU(3, 4, 2, dropout=0.5)
    path = export(layer, tmp_path / "gru.onnx")
    assert layer.training
    x = torch.randn(5, 2, 3)
    assert difference(run(path, x=x)["output"], layer.eval()(x)[0].detach().numpy()) is None


def test_the_cell_is_in_the_file_as_data(tmp_path: Path):
    path = export(layer_of(AlmostGRU), tmp_path / "cell.onnx", metadata={"made for": "a test"})
    props = {prop.key: prop.value for prop in onnx.load(path).metadata_props}
    assert Cell.from_json(props["throughtime.cell"]) == AlmostGRU
    assert props["made for"] == "a test"


# What is wrong


def test_a_difference_says_where_and_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    layer = layer_of(tt.GRU)
    right = layers.layer_model

    def other(*args: Any, **options: Any) -> onnx.ModelProto:
        model = right(*args, **options)
        (node,) = (node for node in model.graph.node if node.op_type == "GRU")
        (after,) = (attribute for attribute in node.attribute if attribute.name == "linear_before_reset")
        after.i = 0  # pytorch#189225
        return model

    monkeypatch.setattr(layers, "layer_model", other)
    said = r"gru\.onnx: not written, because its output 'output' differs .* at batch 1, 7 steps: by .* at \[\d, 0, \d\]"
    with pytest.raises(InteropError, match=said):
        export(layer, tmp_path / "gru.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_difference_beyond_rounding_is_seen():
    for name, share in SHARE.items():
        expected = np.array([1.0, np.nan, np.inf, -2.0], name)
        assert difference(expected.copy(), expected) is None
        assert difference(expected + np.array(share, name), expected) is None
        assert difference(expected + np.array(4 * share, name), expected) is not None
        assert difference(np.nan_to_num(expected), expected) is not None
    assert (
        difference(np.zeros(3, np.float32), np.zeros(2, np.float32)) == "float32 of shape [3], not float32 of shape [2]"
    )


def test_the_sizes_compared_are_others_than_the_examples():
    for batch, steps in ((0, 0), (1, 7), (3, 11), (5, 1)):
        sizes = other_sizes(batch, steps)
        assert len(sizes) == 3
        assert all(rows != batch and time != steps for rows, time in sizes)
        assert 1 in {rows for rows, _ in sizes} | {time for _, time in sizes}


def test_a_file_is_never_replaced_unasked(tmp_path: Path):
    layer, path = layer_of(tt.Elman), tmp_path / "layer.onnx"
    path.write_text("mine")
    with pytest.raises(InteropError, match=r"layer\.onnx: exists already"):
        export(layer, path)
    assert path.read_text() == "mine"
    export(layer, path, overwrite=True)
    assert onnx.load(path).producer_name == "throughtime"
    with pytest.raises(InteropError, match="no such directory"):
        export(layer, tmp_path / "nowhere" / "layer.onnx")


def test_what_has_no_file_is_refused(tmp_path: Path):
    path = tmp_path / "layer.onnx"
    with pytest.raises(InteropError, match="no step to export"):
        export(layer_of(tt.GRU, bidirectional=True), path, step=True)
    with pytest.raises(InteropError, match=r"the layer is torch\.bfloat16"):
        export(layer_of(tt.GRU).bfloat16(), path)
    with pytest.raises(InteropError, match="leave args= and the rest out"):
        export(layer_of(tt.GRU), path, (torch.randn(5, 2, 3),))
    with pytest.raises(InteropError, match="by an example: give args="):
        export(torch.nn.Sequential(torch.nn.Linear(2, 2)), path)
    assert list(tmp_path.iterdir()) == []


def test_what_onnx_runtime_cannot_load_is_refused(tmp_path: Path):
    (tmp_path / "odd").write_bytes(b"no model")
    with pytest.raises(InteropError, match=r"shown\.onnx: ONNX Runtime cannot load it"):
        check(tmp_path / "odd", Path("shown.onnx"), [Case("", {}, {})])


# Runs

SMALL: dict[str, Any] = {"hidden_size": 6, "epochs": 3, "batch_size": 8, "learning_rate": 0.03}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`up.jsonl`: numbers and symbols, with a label each; `tags.jsonl`: symbols, with a label a step."""
    folder = tmp_path_factory.mktemp("runs")
    draw = np.random.default_rng(3)
    up, tags = [], []
    for number in range(40):
        x = (draw.normal(size=(1 + number % 6, 2)) * [300, 0.01] + [1000, 0]).round(5)
        symbols = [[str(draw.choice(["a", "b", "c"]))] for _ in x]
        up.append({"x": x.tolist(), "symbols": symbols, "label": "up" if x[0, 0] > 1000 else "down"})
        tags.append({"symbols": symbols, "labels": ["N" if symbol == ["a"] else "V" for symbol in symbols]})
    for name, lines in (("up", up), ("tags", tags)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return folder


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[str, FinishedRun]:
    up = {"file": str(folder / "up.jsonl"), "run": folder / "up", "num_layers": 2, "cell": "lstm", **SMALL}
    tags = {"file": str(folder / "tags.jsonl"), "run": folder / "tags", "task": "tag", **SMALL}
    return {
        "up": fit(Config.resolve({**up, "bidirectional": True})),
        "streamed": fit(Config.resolve({**up, "run": folder / "streamed", "cell": "gru-reset-before"})),
        "tags": fit(Config.resolve({**tags, "cell": "elman"})),
    }


@pytest.mark.parametrize("name", ["up", "streamed", "tags"])
def test_a_run_answers_without_torch_as_it_does_with_it(
    name: str, runs: dict[str, FinishedRun], folder: Path, tmp_path: Path
):
    loaded = runs[name]
    data = folder / ("tags.jsonl" if name == "tags" else "up.jsonl")
    exporting.export(loaded, tmp_path / "model.onnx")
    example = ROOT / "examples/without_torch.py"
    blocked = (
        f"import sys, runpy\nsys.modules.update(torch=None, throughtime=None)\n"
        f"runpy.run_path({str(example)!r}, run_name='__main__')"
    )
    command = [sys.executable, "-c", blocked, str(tmp_path / "model.onnx"), str(data)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    expected = list(serving.predict(loaded, serving.read_for(loaded, str(data), labelled=False)).records())
    assert len(said) == len(expected) == 40
    key = "labels" if name == "tags" else "label"
    for line, record in zip(map(json.loads, said), expected, strict=True):
        assert (line["id"], line[key]) == (record["id"], record[key])
        for label, share in record["probabilities"].items():
            np.testing.assert_allclose(line["probabilities"][label], share, atol=1e-5)


def test_a_runs_step_is_its_stream(runs: dict[str, FinishedRun], tmp_path: Path):
    loaded = runs["streamed"]
    exporting.export(loaded, tmp_path / "step.onnx", "onnx-step")
    stream = loaded.model.stream(1)
    states: dict[str, Any] = {}
    for x, symbol in (([900.0, 0.01], "a"), ([1300.0, -0.02], "not seen"), ([1000.0, 0.0], "c")):
        place = loaded.encoder.vocabularies[0].index(symbol) if symbol in "abc" else 0
        found = run(tmp_path / "step.onnx", x=np.array([x]), symbols=np.array([[place]]), **states)
        states = {"h_0": found["h_n"]}
        numbers, symbols = loaded.encoder.step([*x, symbol])
        np.testing.assert_allclose(found["logits"], stream.step(numbers[None], symbols[None]), atol=1e-5)
    with pytest.raises(InteropError, match="reads from the end has no step"):
        exporting.export(runs["up"], tmp_path / "none.onnx", "onnx-step")
    assert [path.name for path in tmp_path.iterdir()] == ["step.onnx"]


def test_the_words_of_a_run_are_in_the_file(runs: dict[str, FinishedRun], tmp_path: Path):
    exporting.export(runs["up"], tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    words = {n: json.loads(t) for n, t in session.get_modelmeta().custom_metadata_map.items()}
    assert words["throughtime.classes"] == ["down", "up"]
    assert words["throughtime.vocabularies"] == [["", "a", "b", "c"]]
    assert words["throughtime.features"] == ["x1", "x2"]
    assert {value.name for value in session.get_inputs()} == {"x", "symbols"}


@pytest.mark.parametrize("form", ["onnx", "onnx-step"])
def test_the_command_writes_the_file_or_says_why_not(
    form: str,
    runs: dict[str, FinishedRun],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    from throughtime.cli import main

    def typed(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["throughtime", "export", *arguments, "--to", form])
        with pytest.raises(SystemExit) as end:
            main()
        captured = capsys.readouterr()
        return int(end.value.code or 0), captured.out, captured.err

    run_folder, out = str(runs["streamed"].path), str(tmp_path / "model.onnx")
    status, told, _ = typed(run_folder, "--out", out)
    assert status == 0
    assert told.startswith(f"{out}: {'one step' if form == 'onnx-step' else 'whole sequences'}")
    assert typed(run_folder, "--out", out)[0] == 2, "nothing is ever replaced"
    status, _, refused = typed(run_folder, "--out", str(tmp_path / "model.pt"))
    assert status == 2
    assert "is written as .onnx" in refused
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
