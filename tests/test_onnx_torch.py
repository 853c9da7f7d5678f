"""torch.onnx.export on models with our layers: the standard's operators or a scan, batch and time free.

Each export takes seconds, most of them torch's own, so there are few: each model holds several layers.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from blackboards import MinimalGated
from torch import Tensor, nn

import throughtime as tt
from throughtime.errors import InteropError
from throughtime.interop.onnx import export
from throughtime.interop.onnx.check import difference
from throughtime.interop.onnx.whole_models import quiet

SIZES = ((1, 7), (5, 1), (3, 11))
"""Batch sizes and numbers of steps other than the example's."""


def exported(model: nn.Module, args: tuple[Tensor, ...], shapes: Any, path: Path) -> onnx.ModelProto:
    """What a user types, but for torch's warnings about itself."""
    with quiet():
        torch.onnx.export(model, args, path, dynamo=True, dynamic_shapes=shapes, verbose=False, external_data=False)
    return onnx.load(path)


def assert_same(path: Path, model: nn.Module, *args: Tensor) -> None:
    session = onnxruntime.InferenceSession(path)
    given = {value.name: each.numpy() for value, each in zip(session.get_inputs(), args, strict=True)}
    with torch.no_grad():
        expected = model(*args)
    for number, (found, wanted) in enumerate(zip(session.run(None, given), expected, strict=True)):
        assert difference(found, wanted.numpy()) is None, f"output {number}: {difference(found, wanted.numpy())}"


def drawn(layer: nn.Module) -> Any:
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.6)
    return layer


class Tower(nn.Module):
    """Both of torch's gated layers in ours' place, bidirectional: what pytorch#189225 and #191855 got wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.below = drawn(tt.nn.GRU(3, 4, num_layers=2, bidirectional=True, batch_first=True))
        self.above = drawn(tt.nn.LSTM(8, 3))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        between, h_n = self.below(x)
        output, (h, c) = self.above(between.transpose(0, 1))
        return output, h_n, h, c


class Ragged(nn.Module):
    """Cells of one's own and the standard's, under lengths and resets, and what is said at each true end."""

    def __init__(self) -> None:
        super().__init__()
        self.own = drawn(tt.nn.Recurrent(MinimalGated, 3, 4, bidirectional=True))
        self.before = drawn(tt.nn.Recurrent(tt.GRUResetBefore, 8, 3, learn_initial=True))
        self.readout = tt.nn.LastStep(3, 2)

    def forward(self, x: Tensor, lengths: Tensor, reset: Tensor) -> tuple[Tensor, ...]:
        between, ends = self.own(x, lengths=lengths, reset=reset)
        output, last = self.before(between, lengths=lengths)
        return self.readout(output, lengths), output, ends, last


def test_gru_resets_after_the_product_and_neither_time_nor_batch_is_frozen(tmp_path: Path):
    """pytorch#189225: exported as reset-before; #191855, #41774: time frozen; onnxruntime#19270: batch frozen."""
    model = Tower().eval()
    example = torch.randn(2, 5, 3)
    file = exported(model, (example,), ({0: "batch", 1: "steps"},), tmp_path / "tower.onnx")
    assert Counter(node.op_type for node in file.graph.node if node.op_type in ("GRU", "LSTM")) == {"GRU": 4, "LSTM": 1}
    for node in file.graph.node:
        if node.op_type == "GRU":
            assert {a.name: a.i for a in node.attribute}["linear_before_reset"] == 1
    for batch, steps in SIZES:
        assert_same(tmp_path / "tower.onnx", model, torch.randn(batch, steps, 3))
    theirs = nn.GRU(3, 4, num_layers=2, bidirectional=True, batch_first=True)
    theirs.load_state_dict(model.below.state_dict())
    x = torch.randn(3, 11, 3)
    torch.testing.assert_close(model(x)[1], theirs(x)[1])


def test_cells_of_ones_own_lengths_and_resets_export(tmp_path: Path):
    model = Ragged().eval()
    shapes = ({0: "steps", 1: "batch"}, {0: "batch"}, {0: "steps", 1: "batch"})
    example = torch.randn(5, 2, 3), torch.tensor([5, 3]), torch.rand(5, 2) < 0.3
    file = exported(model, example, shapes, tmp_path / "ragged.onnx")
    found = Counter(node.op_type for node in file.graph.node)
    assert (found["Scan"], found["GRU"], found["Loop"]) == (2, 1, 0)
    for batch, steps in SIZES:
        lengths = torch.randint(0, steps + 1, (batch,))
        assert_same(
            tmp_path / "ragged.onnx", model, torch.randn(steps, batch, 3), lengths, torch.rand(steps, batch) < 0.3
        )


def test_an_exported_program_becomes_a_file_too(tmp_path: Path):
    """The operator is taken apart where torch asks for it, not where the layer is traced."""
    model = nn.ModuleList([drawn(tt.nn.Recurrent(tt.Elman, 3, 4))])[0].eval()
    dims = {0: torch.export.Dim("steps"), 1: torch.export.Dim("batch")}
    program = torch.export.export(model, (torch.randn(5, 2, 3),), dynamic_shapes=(dims,))
    with quiet():
        torch.onnx.export(program, (), tmp_path / "elman.onnx", verbose=False, external_data=False)
    for batch, steps in SIZES:
        assert_same(tmp_path / "elman.onnx", model, torch.randn(steps, batch, 3))


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layer = nn.Embedding(9, 3), drawn(tt.nn.GRU(3, 4, bidirectional=True))
        self.readout = nn.Linear(8, 2)

    def forward(self, words: Tensor) -> dict[str, Tensor]:
        output, h_n = self.layer(self.embed(words))
        return {"scores": self.readout(output), "last": h_n}


def test_a_whole_model_is_compared_before_it_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model, path = Words(), tmp_path / "words.onnx"
    example = (torch.randint(0, 9, (5, 2)),)
    shapes = ({0: "steps", 1: "batch"},)
    export(model, path, example, dynamic_shapes=shapes, metadata={"words": "nine"})
    assert model.training
    assert {prop.key: prop.value for prop in onnx.load(path).metadata_props}["words"] == "nine"
    assert_same(path, lambda words: tuple(model(words).values()), torch.randint(0, 9, (7, 3)))  # type: ignore[arg-type]
    with pytest.raises(InteropError, match=r"the model itself fails at others\[0\]"):
        export(model, tmp_path / "other.onnx", example, dynamic_shapes=shapes, others=[(torch.tensor([[9]]),)])
    assert [left.name for left in tmp_path.iterdir()] == ["words.onnx"]
