"""Planning takes time in proportion to the cell, and a cell may be as long and as deep as anyone writes."""

# Cells are written as equations, without annotations.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from agreement import assert_agree, run_with_gradients, same_bits
from typer.testing import CliRunner

import throughtime as tt
from throughtime.cli import app
from throughtime.engine import plan as plans
from throughtime.engine.targets import TARGETS
from throughtime.equations import calculus, expr
from throughtime.equations.cell import Cell
from throughtime.errors import CellError, TargetError
from throughtime.interop import onnx


def chain(steps: int) -> Cell:
    """Each value depends on the one before, twice."""

    @tt.cell(states="h")
    def Chain(x, h, W, U, b):
        v = tt.tanh(W.n @ x + U.n @ h + b.n)
        for _ in range(steps):
            v = v * v * 0.5
        return tt.sigmoid(U.k @ v) * h + v

    return Chain


def costly_chain(steps: int) -> Cell:
    @tt.cell(states="h")
    def CostlyChain(x, h, W, U, b):
        v = tt.tanh(W.n @ x + U.n @ h + b.n)
        for _ in range(steps):
            v = tt.tanh(v)
        return tt.sigmoid(U.k @ v) * h + v

    return CostlyChain


def fan(steps: int) -> Cell:
    """One value feeds them all, before and after a product."""

    @tt.cell(states="h")
    def Fan(x, h, W, U, b):
        a = tt.tanh(W.n @ x + U.n @ h + b.n)
        v = U.k @ a
        for i in range(steps):
            v = v + a * (0.01 * i)
        return tt.tanh(v)

    return Fan


def products(steps: int) -> Cell:
    @tt.cell(states="h")
    def Products(x, h, W, U, b):
        v = tt.tanh(W.n @ x + U.n @ h + b.n)
        for i in range(steps):
            v = getattr(U, f"k{i}") @ (v * 0.5) + v
        return v

    return Products


def sums(steps: int) -> Cell:
    @tt.cell(states="h")
    def Sums(x, h, W, U, b):
        v = W.n @ x
        for i in range(steps):
            v = getattr(U, f"k{i}") @ h + v + getattr(b, f"k{i}")
        return tt.tanh(v)

    return Sums


def calls_made_by(work: Callable[[], object]) -> int:
    """How many functions are called, Python's and C's: the work, without a clock."""
    calls = 0

    def count(_frame: Any, event: str, _argument: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(before)
    return calls


PARTS: tuple[Callable[[Cell], object], ...] = (calculus.adjoint, calculus.saved, plans.forward, plans.backward)


@pytest.mark.parametrize("part", PARTS, ids=lambda part: f"{part.__module__.rsplit('.', 1)[-1]}.{part.__name__}")
@pytest.mark.parametrize("build", [chain, costly_chain, fan, products, sums])
def test_each_further_operation_costs_as_much_as_the_ones_before(build, part):
    few, more, many = (calls_made_by(partial(part, build(n))) for n in (16, 64, 500))
    early, late = (more - few) / 48, (many - more) / 436
    assert late < 1.2 * early, f"{early:.0f} calls an operation at first, {late:.0f} later"


def deep_chain() -> Cell:
    @tt.cell(states="h")
    def DeepChain(x, h, W, U, b):
        v = tt.tanh(W.n @ x + U.n @ h + b.n)
        for _ in range(1000):
            v = v * 0.999 + 0.0001
        return v

    return DeepChain


def wide_sum() -> Cell:
    @tt.cell(states="h")
    def WideSum(x, h, W, U, b):
        v = W.n @ x + U.n @ h + b.n
        total = v
        for k in range(1, 1001):
            total = total + v * (1 / (k * k))
        return tt.tanh(total)

    return WideSum


def shared_diamonds() -> Cell:
    """Written out as a tree it would have 2 to the 667th leaves."""

    @tt.cell(states="h")
    def SharedDiamonds(x, h, W, U, b):
        v = tt.tanh(W.n @ x + U.n @ h + b.n)
        for _ in range(667):
            v = v * (1.0 - 0.001 * v)
        return v

    return SharedDiamonds


LARGE = {cell.name: cell for cell in (deep_chain(), wide_sum(), shared_diamonds())}


@pytest.fixture(scope="module", params=LARGE)
def large(request) -> Cell:
    return LARGE[request.param]


def layer_of(cell: Cell, target: str, dtype: torch.dtype = torch.float64) -> tt.nn.Recurrent:
    torch.manual_seed(0)
    return tt.nn.Recurrent(cell, 3, 5, dtype=dtype, target=target)


def test_a_large_cell_has_two_thousand_operations(large):
    assert sum(node.op in expr.OPS for node in large.nodes) >= 2000


@pytest.mark.parametrize("target", TARGETS)
def test_a_large_cell_runs_forward_and_back_as_its_definition_does(large, target):
    x = torch.randn(4, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    if target == "native":
        with pytest.raises(TargetError, match="no fused operator"):
            layer_of(large, target)(x)
        return
    actual = run_with_gradients(layer_of(large, target), x)
    expected = run_with_gradients(layer_of(large, "reference"), x)
    assert all(gradient is not None and gradient.abs().max() > 1e-3 for gradient in expected[1].values())
    assert_agree(actual, expected)


def test_a_large_cell_streams_the_bits_of_its_run(large):
    layer = layer_of(large, "cpu")
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    with torch.no_grad():
        outputs, _ = layer(x)
    stream = layer.stream(batch_size=2)
    for t in range(4):
        same_bits(stream.step(x[t]), outputs[t])


def test_a_large_cell_is_kept_copied_and_sent_as_data(large):
    for again in (Cell.from_json(large.to_json()), pickle.loads(pickle.dumps(large)), copy.deepcopy(large)):
        assert again == large
        assert again.hash == large.hash
    assert len(repr(large)) < 1000


@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize("options", [[], ["--latex"]], ids=["text", "latex"])
def test_a_large_cell_prints(name, options, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "large_cells", sys.modules[__name__])
    monkeypatch.setattr(sys.modules[__name__], "shown", LARGE[name], raising=False)
    result = CliRunner().invoke(app, ["show", "large_cells:shown", *options])
    assert result.exit_code == 0, result.output
    assert "h" in result.output


def test_a_large_cell_exports(large, tmp_path: Path):
    onnx.export(layer_of(large, "reference", torch.float32), tmp_path / "large.onnx")


def test_equations_that_recur_too_deep_are_refused_where_they_stand():
    with pytest.raises(CellError, match=r"test_planning.py:\d+.*nested\(x\).*calls itself.*loop"):

        @tt.cell(states="h")
        def Endless(x, h):
            def nested(v):
                return tt.tanh(nested(v))

            return nested(x)


def test_equations_that_recur_within_pythons_limit_are_a_cell():
    def nested(v, depth):
        return v if depth == 0 else nested(v, depth - 1) * 0.999 + 0.001

    @tt.cell(states="h")
    def Nested(x, h):
        return nested(x + h, 500)

    assert sum(node.op in expr.OPS for node in Nested.nodes) == 1001
