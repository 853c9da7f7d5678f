"""Exact back-propagation in bounded memory: segments of time change no bit, whatever they meet."""

from __future__ import annotations

import copy
import gc
from dataclasses import replace
from typing import Any

import pytest
import torch
from agreement import same_bits
from blackboards import MinimalGated, Peephole, random_problem
from test_cpu import adjoints, poison
from torch import Tensor

import throughtime
from throughtime.engine.problem import Problem
from throughtime.engine.targets.cpu import backward_setting, segments, sharing
from throughtime.engine.targets.cpu import target as cpu
from throughtime.engine.targets.cpu.setting import Settings
from throughtime.equations.catalogue import CELLS, GRU, LSTM
from throughtime.errors import ShapeError
from throughtime.nn import Recurrent

USED = {**CELLS, "minimal": MinimalGated, "peephole": Peephole}
LENGTHS = (23, 20, 11, 5, 3, 1, 0)
WAYS: dict[str, dict[str, Any]] = {
    "dense": {},
    "in reverse": {"reverse": True},
    "ragged": {"lengths": LENGTHS},
    "ragged, in reverse": {"lengths": LENGTHS, "reverse": True},
    "with resets": {"reset": True},
    "all at once": {"lengths": LENGTHS, "reverse": True, "reset": True},
}


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch):
    """Blocks of a few steps, so that a short run has many; scratch that was never written holds NaN."""
    monkeypatch.setattr(backward_setting, "RING_ROWS", 8)
    monkeypatch.setattr(backward_setting, "RING_BYTES", 4096)
    monkeypatch.setattr(cpu, "KEPT_BYTES", 0)
    monkeypatch.setattr(cpu, "settings", Settings())
    poison(monkeypatch)


def everything(problem: Problem) -> list[Tensor | None]:
    """Outputs, last states and every gradient of a run."""
    result = cpu.TARGET.forward(problem, True)
    d_output, d_states = adjoints(problem)
    gradients = cpu.TARGET.backward(problem, result, d_output, d_states, [True] * len(problem.tensors))
    return [result.output, *result.states, *gradients]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", USED)
def test_segments_change_no_bit(name: str, way: str):
    problem = random_problem(
        USED[name], steps=23, rows=7, input_size=5, hidden_size=19, dtype=torch.float32, **WAYS[way]
    )
    whole = everything(problem)
    block = backward_setting.block_steps(problem, sharing.sharing_of(problem, sharing.sizes_of(problem), 1, sums=True))
    assert 3 * block < problem.steps, "several segments, of one block and of two"
    for asked in (block, 2 * block, "auto", 100):
        for one, other in zip(whole, everything(replace(problem, segments=asked)), strict=True):
            if one is None or other is None:
                assert one is other
            else:
                same_bits(one, other, f"segments={asked}")


def test_two_threads_and_segments_change_no_bit(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sharing, "ALONE", 0)
    monkeypatch.setattr(sharing, "_sharings", {})
    before = torch.get_num_threads()
    problem = random_problem(LSTM, steps=19, rows=25, input_size=3, hidden_size=17, dtype=torch.float32)
    try:
        torch.set_num_threads(1)
        alone = everything(problem)
        torch.set_num_threads(2)
        together = everything(replace(problem, segments="auto"))
    finally:
        torch.set_num_threads(before)
    for one, other in zip(alone, together, strict=True):
        assert one is not None
        assert other is not None
        same_bits(one, other, "two threads")


def test_a_segment_is_a_whole_number_of_blocks():
    assert segments.length(None, 100, 8) == 100
    assert segments.length("auto", 100, 8) == 16
    assert segments.length("auto", 100_000, 48) == 336
    assert segments.length(24, 100, 8) == 24
    assert segments.length(200, 100, 8) == 100
    assert segments.ranges(10, 4) == [(0, 4), (4, 8), (8, 10)]


def test_what_is_rounded_is_said():
    with pytest.warns(UserWarning, match=r"segments=20 is not a whole number of the 8 steps"):
        assert segments.length(20, 100, 8, say=True) == 24


def layer_and_gradients(layer: Recurrent, x: Tensor, **call: Any) -> list[Tensor]:
    x = x.clone().requires_grad_()
    output, last = layer(x, **call)
    (output.square().sum() + last.sum()).backward()
    found = [output.detach(), x.grad, *(p.grad for p in layer.parameters())]
    layer.zero_grad(set_to_none=True)
    return [tensor for tensor in found if tensor is not None]


def test_a_layer_of_two_directions_and_depths_learns_the_same_bits():
    torch.manual_seed(0)
    layer = Recurrent(GRU, 4, 9, num_layers=2, bidirectional=True, learn_initial=True, batch_first=True)
    x = torch.randn(5, 30, 4)
    call = {"lengths": [30, 2, 17, 0, 29], "reset": torch.rand(5, 30) < 0.1}
    plain = layer_and_gradients(layer, x, **call)
    layer.segments = "auto"
    for one, other in zip(plain, layer_and_gradients(layer, x, **call), strict=True):
        same_bits(one, other, "auto")
    assert "segments='auto'" in repr(layer)


def test_a_copy_and_a_drop_in_have_them_too():
    layer = Recurrent(GRU, 3, 4, segments="auto")
    assert copy.deepcopy(layer).segments == "auto"
    drop_in = throughtime.upgrade(torch.nn.GRU(3, 4)).model
    assert drop_in.segments is None
    drop_in.segments = 64
    assert drop_in.segments == 64


@pytest.mark.parametrize("wrong", [0, -3, True, 2.5, "sqrt"])
def test_what_makes_no_segment_is_refused(wrong: Any):
    with pytest.raises(ShapeError, match=r"segments is .*; it must be a number of steps from 1"):
        Recurrent(GRU, 3, 4, segments=wrong)


def test_other_targets_say_that_they_keep_every_step():
    layer = Recurrent(GRU, 3, 4, segments="auto", target="stepwise")
    assert "keeps every step, whatever segments= says" in str(throughtime.explain(layer, torch.zeros(5, 2, 3)))


def test_compiled_and_eager_segments_agree():
    torch.manual_seed(0)
    layer = Recurrent(LSTM, 3, 5, segments="auto")
    program = torch.compile(lambda x: layer(x)[0], fullgraph=True, backend="aot_eager")
    x = torch.randn(40, 2, 3)
    eager, compiled = x.clone().requires_grad_(), x.clone().requires_grad_()
    layer(eager)[0].square().sum().backward()
    wanted = [p.grad.clone() for p in layer.parameters() if p.grad is not None]
    layer.zero_grad()
    program(compiled).square().sum().backward()
    for one, other in zip([eager.grad, *wanted], [compiled.grad, *(p.grad for p in layer.parameters())], strict=True):
        assert one is not None
        assert other is not None
        same_bits(one, other, "compiled")


def test_what_is_kept_grows_with_the_root_of_the_steps():
    """The tensors between forward and backward, and their count of numbers, for T and for 16 T."""
    kept = {}
    for steps in (64, 1024):
        problem = random_problem(LSTM, steps=steps, rows=2, input_size=3, hidden_size=16, dtype=torch.float32)
        result = cpu.TARGET.forward(replace(problem, segments="auto"), True)
        kept[steps] = sum(tensor.numel() for tensor in result.workspace)
    gc.collect()
    assert kept[64] > 0
    assert kept[1024] <= 4.5 * kept[64]


def test_what_is_little_is_kept_whole_where_the_engine_chooses(monkeypatch: pytest.MonkeyPatch):
    problem = random_problem(LSTM, steps=64, rows=2, input_size=3, hidden_size=16, dtype=torch.float32)
    monkeypatch.setattr(cpu, "KEPT_BYTES", 1 << 20)
    little = cpu.TARGET.forward(replace(problem, segments="auto"), True).workspace
    asked = cpu.TARGET.forward(replace(problem, segments=8), True).workspace
    assert little[0].shape[0] == 64
    assert asked[0].shape[0] < 64
