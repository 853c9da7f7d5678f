"""Truncated BPTT: windows cover every stream once, states follow their streams, and a saved place is gone on from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from agreement import assert_agree, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import throughtime as tt
from throughtime.nn import Masks, Window, Windows

I, H = 3, 8
LENGTHS = (7, 0, 12, 5, 10)


def streams_of(lengths: tuple[int, ...] = LENGTHS) -> list[Tensor]:
    return [torch.randn(length, I) for length in lengths]


def layer_of(cell: tt.Cell = tt.LSTM, **options: Any) -> tt.nn.Recurrent:
    return tt.nn.Recurrent(cell, I, H, **{"num_layers": 2, **options})


def through(windows: Windows, run: Callable[[Window], tuple[Tensor, Any]]) -> list[Tensor]:
    """One epoch; what each stream's windows gave, one behind the other."""
    parts: list[list[Tensor]] = [[] for _ in windows.lengths]
    for window in windows:
        output, state = run(window)
        for place, (row, length) in enumerate(zip(window.rows.tolist(), window.lengths, strict=True)):
            parts[row].append(output[:length, place])
        windows.carry(window, state)
    return [torch.cat(part) if part else torch.empty(0) for part in parts]


# ---------------------------------------------------------------------------------------------------------------------
# What the windows are


@given(
    lengths=st.lists(st.integers(0, 20), min_size=1, max_size=6),
    steps=st.integers(1, 8),
    batch_size=st.none() | st.integers(1, 4),
    shuffle=st.booleans(),
)
def test_every_step_of_every_stream_comes_once_and_in_order(
    lengths: list[int], steps: int, batch_size: int | None, shuffle: bool
) -> None:
    windows = Windows(lengths, steps, batch_size=batch_size, shuffle=shuffle)
    values = [torch.arange(length) for length in lengths]
    nothing = torch.zeros(1, 1, 1)
    count = len(windows)
    for _epoch in range(2):
        found: list[list[int]] = [[] for _ in lengths]
        taken = 0
        for window in windows:
            taken += 1
            assert max(window.lengths) <= steps
            assert len(set(window.rows.tolist())) == len(window.rows) <= (batch_size or len(lengths))
            for place, (row, length) in enumerate(zip(window.rows.tolist(), window.lengths, strict=True)):
                assert window.first_step == len(found[row])
                found[row] += window.cut(values)[:length, place].tolist()
            windows.carry(window, nothing.expand(1, len(window.rows), 1))
        assert found == [value.tolist() for value in values]
        assert taken == count
    assert windows.epoch == (2 if count else 0)


def test_cut_pads_with_zeros_and_takes_one_tensor_or_several() -> None:
    values = streams_of()
    together = torch.nn.utils.rnn.pad_sequence(values) + 100  # nothing of what is past an end may be seen
    for row, value in enumerate(values):
        together[: len(value), row] = value
    windows = Windows(LENGTHS, 4, batch_size=3)
    for window in windows:
        part = window.cut(values)
        assert part.shape == (max(window.lengths), len(window.rows), I)
        assert torch.equal(part, window.cut(together))
        for place, length in enumerate(window.lengths):
            assert (part[length:, place] == 0).all()
        windows.carry(window, torch.zeros(1, len(window.rows), 1))


def test_shuffling_changes_the_company_from_window_to_window_by_the_seed_alone() -> None:
    def order(seed: int, epochs: int) -> list[list[int]]:
        windows = Windows([40] * 8, 10, batch_size=2, shuffle=True, seed=seed)
        found = []
        for _ in range(epochs):
            for window in windows:
                found.append(window.rows.tolist())
                windows.carry(window, torch.zeros(1, 2, 1))
        return found

    first = order(1, 2)
    assert order(1, 2) == first
    assert order(2, 2) != first
    assert first[:4] != first[4:8]
    assert first[:16] != first[16:]


# ---------------------------------------------------------------------------------------------------------------------
# States


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("cell", [tt.GRU, tt.LSTM])
def test_forward_the_windows_are_the_whole_streams_bit_for_bit(cell: tt.Cell, shuffle: bool) -> None:
    layer, values = layer_of(cell, learn_initial=True), streams_of()
    windows = Windows(LENGTHS, 4, batch_size=2, shuffle=shuffle)
    found = through(windows, lambda w: layer(w.cut(values), w.state, lengths=w.lengths))
    for value, output in zip(values, found, strict=True):
        if len(value):
            same_bits(output.detach(), layer(value[:, None])[0][:, 0].detach())


def test_with_dropout_too_where_the_masks_go_by_stream_and_step() -> None:
    layer, values = layer_of(tt.GRU, dropout=0.5), streams_of()
    windows = Windows(LENGTHS, 4, batch_size=2, shuffle=True)
    found = through(windows, lambda w: layer(w.cut(values), w.state, lengths=w.lengths, masks=w.masks(3)))
    for row, (value, output) in enumerate(zip(values, found, strict=True)):
        if len(value):
            same_bits(output.detach(), layer(value[:, None], masks=Masks(3, rows=[row]))[0][:, 0].detach())


def test_gradients_stop_at_the_edge_and_reach_learnt_initial_states_in_the_first_window() -> None:
    layer, values = layer_of(tt.GRU, learn_initial=True), streams_of((8, 8))
    expected = []
    x = torch.stack(values, 1)
    first, state = layer(x[:4])
    second, _ = layer(x[4:], state.detach())
    parameters = list(layer.parameters())
    for output in (first, second):
        expected.append(torch.autograd.grad(output.square().sum(), parameters, allow_unused=True))
    windows = Windows([8, 8], 4)
    found = []
    for window in windows:
        output, state = layer(window.cut(values), window.state, lengths=window.lengths)
        assert isinstance(state, Tensor)
        found.append(torch.autograd.grad(output.square().sum(), parameters, allow_unused=True))
        windows.carry(window, state)
    assert_agree(found, expected)
    assert all(gradient is not None and gradient.any() for gradient in found[0])


def test_carried_states_are_detached_and_their_own() -> None:
    layer = layer_of()
    windows = Windows([8, 8], 4)
    values = streams_of((8, 8))
    iterator = iter(windows)
    window = next(iterator)
    _, state = layer(window.cut(values))
    kept = tuple(s.detach().clone() for s in state)
    windows.carry(window, state)
    for s in state:
        s.data.fill_(torch.nan)
    following = next(iterator)
    assert isinstance(following.state, tuple)
    for s, expected in zip(following.state, kept, strict=True):
        same_bits(s, expected)
        assert not s.requires_grad


# ---------------------------------------------------------------------------------------------------------------------
# Saving


@given(stop=st.integers(0, 9))
@settings(max_examples=10)
def test_a_saved_place_is_gone_on_from(stop: int) -> None:
    torch.manual_seed(0)
    layer, values = layer_of(), streams_of()

    def windows_of() -> Windows:
        return Windows(LENGTHS, 4, batch_size=2, shuffle=True, seed=5)

    def run(windows: Windows, count: int) -> list[tuple[list[int], Tensor]]:
        seen: list[tuple[list[int], Tensor]] = []
        while len(seen) < count:
            for window in windows:
                output, state = layer(window.cut(values), window.state, lengths=window.lengths)
                windows.carry(window, state)
                seen.append((window.rows.tolist(), output.detach()))
                if len(seen) == count:
                    break
        return seen

    whole = run(windows_of(), 12)
    first = windows_of()
    run(first, stop)
    saved = first.state_dict()
    assert all(type(value) is Tensor for value in saved.values())
    loaded = windows_of()
    loaded.load_state_dict(saved)
    run(first, 1)  # what is saved is a copy
    for (rows, output), (expected_rows, expected) in zip(run(loaded, 12 - stop), whole[stop:], strict=True):
        assert rows == expected_rows
        same_bits(output, expected)


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


def opened(windows: Windows | None = None) -> tuple[Windows, Window]:
    windows = windows or Windows([8, 8], 4)
    return windows, next(iter(windows))


def twice() -> None:
    windows, window = opened()
    for _ in range(2):
        windows.carry(window, torch.zeros(1, 2, H))


def forgotten() -> None:
    for _ in Windows([8, 8], 4):
        pass


def carried(state: Any) -> None:
    windows, window = opened()
    windows.carry(window, state)


def loaded(change: Callable[[dict[str, Tensor]], Any], **options: Any) -> None:
    state = Windows([8, 8], 4).state_dict()
    change(state)
    Windows([8, 8], **{"steps": 4, **options}).load_state_dict(state)


@pytest.mark.parametrize(
    ("refused", "message"),
    [
        (lambda: Windows([3, -1], 4), r"lengths\[1\] is -1; a length is a whole number of steps from 0"),
        (lambda: Windows([3.0], 4), r"lengths\[0\] is 3.0"),  # type: ignore[list-item]
        (lambda: Windows(np.ones(2), 4), r"lengths\[0\] is 1.0"),
        (lambda: Windows([], 4), "lengths= is empty"),
        (lambda: Windows([3], 0), "steps is 0; it must be a whole number from 1"),
        (lambda: Windows([3], 2, batch_size=0), "batch_size is 0"),
        (lambda: Windows([3], 2, seed=-1), "seed is -1; it must be a whole number from 0"),
        (lambda: opened()[1].cut([torch.zeros(8, I), torch.zeros(3, I)]), "stream 1 holds 3 steps, and this window"),
        (lambda: opened()[1].cut(torch.zeros(3, 2, I)), "stream 0 holds 3 steps"),
        (twice, "this window is not the one in hand; carry each window once"),
        (forgotten, "the last window was not carried on"),
        (lambda: carried(torch.zeros(1, 3, H)), r"the state to carry is of shape \[1, 3, 8\], and the window has 2"),
        (lambda: carried((torch.zeros(1, 2, H), None)), "the state to carry is NoneType"),
        (lambda: loaded(lambda s: s.pop("epoch")), "this is not what Windows.state_dict gave: epoch"),
        (lambda: loaded(lambda s: None, steps=5), "the saved windows have steps 4, and these 5; make them alike"),
        (lambda: loaded(lambda s: None, seed=5), "the saved windows have seed 0, and these 5"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(refused: Callable[[], Any], message: str) -> None:
    with pytest.raises(tt.ThroughtimeError, match=message):
        refused()
