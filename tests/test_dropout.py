"""Dropout by counter: masks that sorting, splitting, segments and resuming cannot change, and their statistics."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from agreement import assert_agree, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence

import throughtime as tt
from throughtime.engine.targets.cpu import backward_setting
from throughtime.nn.dropout import Masks, drop, keys
from throughtime.nn.layout import Layout

I, H, T, B = 3, 8, 12, 5


def layer_of(cell: tt.Cell = tt.GRU, **options: Any) -> tt.nn.Recurrent:
    return tt.nn.Recurrent(cell, I, H, **{"num_layers": 3, "dropout": 0.4, **options})


def noise_of(seed: int, probability: float, steps: int, rows: int, units: int, depth: int = 1) -> Tensor:
    """What ones become, [T, B, units]."""
    key = keys(Masks(seed), Layout(steps, rows), torch.device("cpu"))
    return drop(torch.ones(steps, rows, units), probability, key, depth)


# ---------------------------------------------------------------------------------------------------------------------
# The generator


def split_mix(state: int, count: int) -> list[int]:
    """SplitMix64 in plain integers, from the paper: a golden-ratio counter, mixed by variant 13."""
    drawn = []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        z = state
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        drawn.append(z ^ (z >> 31))
    return drawn


def test_it_is_split_mix_64() -> None:
    """Against the reference implementation's first outputs from state 1234567, and the plain integers above."""
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    assert split_mix(1234567, 5) == known
    row, step, depth = 4, 9, 2
    key = split_mix(split_mix(split_mix(77, row + 1)[-1], step + 1)[-1], depth + 1)[-1]
    halves = [half for z in split_mix(key, 5) for half in (z % 2**32, z >> 32)]
    signed = np.array(halves, np.uint32).view(np.int32)
    kept = signed >= round(0.3 * 2**32) - 2**31
    found = noise_of(77, 0.3, step + 1, row + 1, 10, depth)[step, row]
    assert torch.equal(found, torch.tensor(kept / 0.7, dtype=torch.float32))


@pytest.mark.parametrize("probability", [0.05, 0.5, 0.9])
def test_the_share_of_zeros_and_the_mean_are_right_along_every_axis(probability: float) -> None:
    """Within five standard errors, in all and for each step, row and unit."""
    noise = torch.stack([noise_of(3, probability, 40, 30, 51, depth) for depth in (1, 2)])
    dropped = (noise == 0).double()
    for axes in ((0, 1, 2, 3), (1, 2, 3), (0, 2, 3), (0, 1, 3), (0, 1, 2)):
        share = dropped.mean(axes)
        error = math.sqrt(probability * (1 - probability) / (dropped.numel() / share.numel()))
        assert (share - probability).abs().max() < 5 * error, axes
    assert set(noise.unique().tolist()) == {0.0, torch.tensor(1 / (1 - probability)).item()}


def test_neighbours_are_uncorrelated() -> None:
    """Between depths, seeds, and neighbouring steps, rows and units: correlations within five standard errors of 0."""
    first = (noise_of(0, 0.5, 64, 32, 64) > 0).double() * 2 - 1
    pairs = {
        "step": (first[1:], first[:-1]),
        "row": (first[:, 1:], first[:, :-1]),
        "unit": (first[..., 1:], first[..., :-1]),
        "next pair of units": (first[..., 2:], first[..., :-2]),
        "depth": (first, (noise_of(0, 0.5, 64, 32, 64, 2) > 0).double() * 2 - 1),
        "seed": (first, (noise_of(1, 0.5, 64, 32, 64) > 0).double() * 2 - 1),
        "step for row": (first[:32, :32], first[:32, :32].transpose(0, 1)),
    }
    for name, (a, b) in pairs.items():
        same = (a * b)[torch.ones_like(a).bool() if name != "step for row" else ~torch.eye(32).bool()]
        assert same.mean().abs() < 5 / math.sqrt(same.numel() / (2 if name == "step for row" else 1)), name


def test_long_runs_are_drawn_in_parts_with_the_same_masks() -> None:
    """More than is drawn at a time: the first steps are those of a short run."""
    same_bits(noise_of(5, 0.2, 400, 64, 33)[:3], noise_of(5, 0.2, 3, 64, 33))


# ---------------------------------------------------------------------------------------------------------------------
# What cannot change a mask


@given(data=st.data())
@settings(max_examples=15)
def test_split_anywhere_is_the_whole_run(data: st.DataObject) -> None:
    """In training, with dropout: parts that say where they begin have the masks, and so the bits, of the whole."""
    torch.manual_seed(0)
    layer, x, seed = layer_of(), torch.randn(T, B, I), data.draw(st.integers(-(2**63), 2**63 - 1))
    cut = data.draw(st.integers(1, T - 1))
    whole, last = layer(x, masks=Masks(seed))
    first, state = layer(x[:cut], masks=Masks(seed))
    second, end = layer(x[cut:], state, masks=Masks(seed, first_step=cut))
    same_bits(torch.cat([first, second]).detach(), whole.detach())
    same_bits(end.detach(), last.detach())


@given(order=st.permutations(range(B)), lengths=st.lists(st.integers(0, T), min_size=B, max_size=B))
@settings(max_examples=15)
def test_rows_keep_their_masks_in_any_company_and_order(order: list[int], lengths: list[int]) -> None:
    """Rows of a ragged batch, which the engine sorts, in another order, by their own numbers; and each alone."""
    torch.manual_seed(0)
    layer, x = layer_of(tt.LSTM), torch.randn(T, B, I)
    whole = layer(x, lengths=lengths, masks=Masks(7))[0].detach()
    turned = layer(x[:, order], lengths=[lengths[i] for i in order], masks=Masks(7, rows=order))[0]
    same_bits(turned.detach(), whole[:, order])
    for row in range(B):
        alone = layer(x[: lengths[row], [row]], masks=Masks(7, rows=[row]))[0].detach()
        same_bits(alone, whole[: lengths[row], [row]])


def test_rows_may_begin_at_steps_of_their_own() -> None:
    layer, x = layer_of(), torch.randn(T, 2, I)
    whole = noise_of(7, 0.4, T, 2, H)
    first = torch.tensor([3, 5])
    key = keys(Masks(7, first), Layout(2, 2), torch.device("cpu"))
    found = drop(torch.ones(2, 2, H), 0.4, key, 1)
    for row in range(2):
        same_bits(found[:, row], whole[first[row] : first[row] + 2, row])
    assert layer(x, masks=Masks(7, first))[0].shape == (T, 2, H)


def test_packed_padded_and_batch_first_have_the_same_masks() -> None:
    layer, other = layer_of(), layer_of(batch_first=True)
    other.load_state_dict(layer.state_dict())
    sequences = [torch.randn(n, I) for n in (4, 9, 2, 9, 7)]
    packed = pack_sequence(sequences, enforce_sorted=False)
    x, lengths = pad_packed_sequence(packed)
    expected = layer(x, lengths=lengths, masks=Masks(1))[0]
    assert_agree(pad_packed_sequence(layer(packed, masks=Masks(1))[0])[0], expected)
    assert_agree(other(x.transpose(0, 1), lengths=lengths, masks=Masks(1))[0].transpose(0, 1), expected)


@pytest.mark.parametrize("target", ["reference", "stepwise"])
def test_every_target_has_the_same_masks(target: str) -> None:
    layer, x = layer_of(), torch.randn(T, B, I)
    expected = layer(x, lengths=[3, 12, 0, 7, 7], masks=Masks(1))[0]
    layer.target = target
    assert_agree(layer(x, lengths=[3, 12, 0, 7, 7], masks=Masks(1))[0], expected)


def test_segments_keep_the_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backward_setting, "RING_ROWS", 5)
    monkeypatch.setattr(backward_setting, "RING_BYTES", 1)
    layer, x = layer_of(), torch.randn(T, B, I)
    found = []
    for segments in (None, 4):
        layer.segments = segments
        output = layer(x, masks=Masks(1))[0]
        found.append([output.detach(), *torch.autograd.grad(output.square().sum(), list(layer.parameters()))])
    for actual, expected in zip(*found, strict=True):
        same_bits(actual, expected)


# ---------------------------------------------------------------------------------------------------------------------
# Seeds


def test_torchs_seed_governs_where_none_is_given() -> None:
    layer, x = layer_of(), torch.randn(T, B, I)
    torch.manual_seed(5)
    first, second = layer(x)[0], layer(x)[0]
    torch.manual_seed(5)
    same_bits(layer(x)[0].detach(), first.detach())
    assert not torch.equal(first, second)
    same_bits(layer(x)[0].detach(), second.detach())


def test_one_draw_a_forward_and_none_without_dropout() -> None:
    x = torch.randn(T, B, I)
    for layer, draws in ((layer_of(), 1), (layer_of().eval(), 0), (layer_of(num_layers=2, dropout=0.0), 0)):
        torch.manual_seed(5)
        for _ in range(draws):
            torch.randint(-(2**63), 2**63 - 1, ())
        expected = torch.rand(1)
        torch.manual_seed(5)
        layer(x)
        assert torch.equal(torch.rand(1), expected)


def test_layers_directions_and_steps_differ() -> None:
    units = 32
    noise = torch.stack([noise_of(0, 0.5, T, 1, 2 * units, depth) for depth in (1, 2)])
    patterns = (noise > 0).view(-1, units).tolist()
    assert len(set(map(tuple, patterns))) == len(patterns) == 2 * T * 2


# ---------------------------------------------------------------------------------------------------------------------
# As dropout


def test_gradients_pass_where_units_stay_and_are_scaled_alike() -> None:
    layer = layer_of().double()
    x = torch.randn(4, 2, I, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: layer(x, masks=Masks(3))[0], (x,), fast_mode=True)


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_the_ends_of_the_scale(probability: float) -> None:
    x = torch.randn(T, B, I)
    layer = layer_of(dropout=probability)
    expected = layer_of(dropout=0.0)
    expected.load_state_dict(layer.state_dict())
    if probability == 0:
        same_bits(layer(x)[0].detach(), expected(x)[0].detach())
    else:
        torch.testing.assert_close(layer(x)[0], layer(torch.randn(T, B, I))[0])


def test_nan_in_a_dropped_unit_is_not_laundered() -> None:
    key = keys(Masks(0), Layout(T, B), torch.device("cpu"))
    for probability in (0.5, 1.0):
        assert drop(torch.full((T, B, H), torch.nan), probability, key, 1).isnan().all()


@pytest.mark.parametrize("make", [tt.nn.LSTM, tt.nn.GRU, tt.nn.RNN])
def test_drop_ins_take_masks_too(make: Any) -> None:
    layer = make(I, H, num_layers=2, dropout=0.5)
    twin = tt.nn.Recurrent(layer.cell, I, H, num_layers=2, dropout=0.5)
    twin.load_state_dict(layer.state_dict())
    x = torch.randn(T, B, I)
    same_bits(layer(x, masks=Masks(9))[0].detach(), twin(x, masks=Masks(9))[0].detach())
    assert not torch.equal(layer(x, masks=Masks(9))[0], layer(x, masks=Masks(10))[0])


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.parametrize("masks", [None, Masks(11, first_step=3, rows=torch.arange(B))], ids=["drawn", "given"])
def test_compiled_in_one_graph_has_the_same_masks(masks: Masks | None) -> None:
    torch._dynamo.reset()
    layer = layer_of(num_layers=2).double()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(T, B, I, dtype=torch.float64)
    lengths = None if masks is None else torch.tensor([3, 12, 1, 7, 7])
    with torch.no_grad():
        torch.manual_seed(4)
        expected = layer(x, lengths=lengths, masks=masks)
        torch.manual_seed(4)
        torch.testing.assert_close(compiled(x, lengths=lengths, masks=masks), expected)
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_exported_in_training_it_draws_anew_at_each_call() -> None:
    program = torch.export.export(layer_of(), (torch.randn(T, B, I),)).module()
    x = torch.randn(T, B, I)
    torch.manual_seed(1)
    first, second = program(x)[0], program(x)[0]
    torch.manual_seed(1)
    same_bits(program(x)[0].detach(), first.detach())
    assert not torch.equal(first, second)


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        (Masks(1.5), "seed of the dropout masks holds torch.float32; give integers"),  # type: ignore[arg-type]
        (Masks(2**64), "seed of the dropout masks cannot be read"),
        (Masks(torch.zeros(2, dtype=torch.int64)), r"seed of the dropout masks has shape \[2\]; give one integer"),
        (Masks(0, [1, 2]), r"first_step of the dropout masks has shape \[2\]; give one integer or \[B\] = \[5\]"),
        (Masks(0, 0, [1, 2, 3]), r"rows of the dropout masks has shape \[3\]; give one integer or \[B\] = \[5\]"),
        (Masks(0, 0, [True] * 5), "rows of the dropout masks holds torch.bool"),
        (Masks("x"), "seed of the dropout masks cannot be read"),  # type: ignore[arg-type]
    ],
)
def test_masks_that_do_not_fit_are_refused(masks: Masks, message: str) -> None:
    with pytest.raises(tt.ShapeError, match=message):
        layer_of()(torch.zeros(T, B, I), masks=masks)
