"""Streams: step by step is the whole run, bit for bit; the state moves between streams; bad input changes nothing."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from agreement import assert_agree, same_bits
from blackboards import Decaying, MinimalGated, Peephole, ScaledProjection, Unitwise
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import throughtime as tt

I, H, T, B = 3, 17, 6, 5
CELLS: dict[str, tuple[tt.Cell, dict[str, Any]]] = {
    "elman": (tt.Elman, {}),
    "gru": (tt.GRU, {}),
    "gru-reset-before": (tt.GRUResetBefore, {}),
    "lstm": (tt.LSTM, {}),
    "lstm-projected": (tt.ProjectedLSTM, {"proj_size": 5}),
    "minimal": (MinimalGated, {}),
    "peephole": (Peephole, {}),
}


def layer_of(name: str, **options: Any) -> tt.nn.Recurrent:
    """A layer whose learnt initial states, if it has them, are not zero."""
    cell, own = CELLS[name]
    layer = tt.nn.Recurrent(cell, I, H, **own, **options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0, 0.4)
    return layer


def states_in(state: Any) -> tuple[Tensor, ...]:
    return state if isinstance(state, tuple) else (state,)


def same_state(actual: Any, expected: Any) -> None:
    for a, b in zip(states_in(actual), states_in(expected), strict=True):
        same_bits(a, b.detach(), "the state")


def run(stream: tt.nn.Stream, x: Tensor, reset: Tensor | None = None) -> Tensor:
    """Every step of x [T, ...] in turn."""
    return torch.stack([stream.step(x[t], reset=None if reset is None else reset[t]) for t in range(len(x))])


# ---------------------------------------------------------------------------------------------------------------------
# The same bits as the whole run


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("name", CELLS)
def test_steps_are_the_whole_run_bit_for_bit(name: str, depth: int, dtype: torch.dtype) -> None:
    layer = layer_of(name, num_layers=depth, learn_initial=True, dtype=dtype)
    x = torch.randn(T, B, I, dtype=dtype)
    output, state = layer(x)
    stream = layer.stream(B)
    same_bits(run(stream, x), output.detach())
    same_state(stream.state, state)


@given(data=st.data())
@settings(max_examples=12)
def test_any_sizes_resets_and_given_states(data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 99)))
    cell, own = CELLS[data.draw(st.sampled_from(sorted(CELLS)))]
    inputs, units = (data.draw(st.sampled_from([1, 16, 33])) for _ in "IH")
    rows, steps, depth = (
        data.draw(st.sampled_from([1, 3, 9])),
        data.draw(st.integers(1, 6)),
        data.draw(st.integers(1, 2)),
    )
    layer = tt.nn.Recurrent(
        cell,
        inputs,
        units,
        num_layers=depth,
        learn_initial=data.draw(st.booleans()),
        proj_size=max(1, units // 2) if own else 0,
    )
    x, reset = torch.randn(steps, rows, inputs), torch.rand(steps, rows) < 0.3
    sizes = cell.sizes(units, layer.proj_size)
    given = tuple(torch.randn(depth, rows, size) for size in sizes) if data.draw(st.booleans()) else None
    h_0 = given[0] if given and len(given) == 1 else given
    output, state = layer(x, h_0, reset=reset)
    stream = layer.stream(rows, h_0=h_0)
    same_bits(run(stream, x, reset=reset), output.detach())
    same_state(stream.state, state)


@pytest.mark.parametrize("make", [tt.nn.RNN, tt.nn.LSTM, tt.nn.GRU])
@pytest.mark.parametrize("bias", [False, True])
def test_drop_ins_stream(make: Any, bias: bool) -> None:
    layer = make(I, H, num_layers=2, bias=bias, batch_first=True)
    x = torch.randn(B, T, I)
    output, state = layer(x)
    stream = layer.stream(B)
    same_bits(run(stream, x.transpose(0, 1)).transpose(0, 1), output.detach())
    same_state(stream.state, state)


@pytest.mark.parametrize("name", ["gru", "lstm"])
def test_without_a_batch(name: str) -> None:
    layer = layer_of(name, num_layers=2)
    x, reset = torch.randn(T, I), torch.tensor([False, True, False, False, True, False])
    output, state = layer(x, reset=reset)
    stream = layer.stream()
    same_bits(run(stream, x, reset=reset), output.detach())
    same_state(stream.state, state)
    stream.step(x[0], reset=True)
    same_state(stream.state, layer(x[:1])[1])


@pytest.mark.parametrize("cell", [Decaying, ScaledProjection])
def test_outside_inputs_of_each_step(cell: tt.Cell) -> None:
    layer = tt.nn.Recurrent(cell, I, H, num_layers=2, proj_size=5 if cell.projects else 0)
    x = torch.randn(T, B, I)
    per_step = {name: torch.rand(T, B, 1) for name in cell.per_step}
    per_sequence = {name: torch.rand(B, H) for name in cell.per_sequence}
    output, state = layer(x, outside=per_step | per_sequence)
    stream = layer.stream(B)
    steps = [stream.step(x[t], outside={n: v[t] for n, v in per_step.items()} | per_sequence) for t in range(T)]
    same_bits(torch.stack(steps), output.detach())
    same_state(stream.state, state)


def test_x_used_unit_by_unit() -> None:
    layer = tt.nn.Recurrent(Unitwise, H, H, num_layers=2)
    x = torch.randn(T, B, H)
    same_bits(run(layer.stream(B), x), layer(x)[0].detach())


def test_many_rows_on_any_number_of_threads() -> None:
    layer = tt.nn.Recurrent(tt.LSTM, 64, 96, num_layers=2)
    x = torch.randn(3, 50, 64)
    expected = layer(x)[0].detach()
    try:
        for made, used in ((1, 2), (2, 1), (2, 2), (3, 2)):
            torch.set_num_threads(made)
            stream = layer.stream(50)
            torch.set_num_threads(used)
            same_bits(run(stream, x), expected, f"made on {made} threads, stepped on {used}")
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("target", ["reference", "stepwise"])
def test_other_targets_step_too(target: str) -> None:
    layer = layer_of("lstm", num_layers=2, learn_initial=True, target=target)
    x, reset = torch.randn(T, B, I), torch.rand(T, B) < 0.3
    output, state = layer(x, reset=reset)
    stream = layer.stream(B)
    assert_agree(run(stream, x, reset=reset), output.detach())
    assert_agree(stream.state, tuple(s.detach() for s in state))
    kept = stream.step(x[0])
    expected = kept.clone()
    other = stream.copy()
    stream.step(x[1])
    assert torch.equal(kept, expected)
    assert_agree(other.step(x[1]), stream.rows([0, 1, 2, 3, 4]).state[0][-1])


def test_nan_passes_and_a_reset_ends_it() -> None:
    layer = layer_of("gru", num_layers=2, learn_initial=True)
    stream, x = layer.stream(2), torch.randn(2, I)
    stream.step(torch.full((2, I), torch.nan))
    assert stream.step(x).isnan().all()
    output = stream.step(x, reset=torch.tensor([True, False]))
    same_bits(output[0], layer(x[None])[0][0, 0].detach())
    assert output[1].isnan().all()


def test_x_may_lie_in_memory_in_any_way() -> None:
    layer = layer_of("gru")
    x = torch.randn(T, I, 2 * B)
    stream, other = layer.stream(B), layer.stream(B)
    for t in range(T):
        same_bits(stream.step(x[t, :, ::2].T), other.step(x[t, :, ::2].T.contiguous()))


# ---------------------------------------------------------------------------------------------------------------------
# The state


@pytest.mark.parametrize("name", ["gru", "lstm-projected"])
@pytest.mark.parametrize("batch_size", [None, B])
def test_a_saved_state_goes_on_where_it_was(name: str, batch_size: int | None) -> None:
    layer = layer_of(name, num_layers=2)
    x = torch.randn(T, I) if batch_size is None else torch.randn(T, B, I)
    stream = layer.stream(batch_size)
    run(stream, x[:2])
    saved = stream.state_dict()
    assert list(saved) == list(layer.cell.states)
    rest = run(stream, x[2:])
    loaded, given = layer.stream(batch_size), layer.stream(batch_size)
    loaded.load_state_dict(saved)
    given.state = layer(x[:2])[1]
    same_bits(run(loaded, x[2:]), rest)
    same_bits(run(given, x[2:]), rest)


def test_what_is_read_or_returned_is_a_copy() -> None:
    layer, x = layer_of("lstm"), torch.randn(T, B, I)
    stream = layer.stream(B)
    output = stream.step(x[0])
    expected = output.clone()
    for state in stream.state:
        state.fill_(torch.nan)
    for state in stream.state_dict().values():
        state.fill_(torch.nan)
    h_0 = tuple(torch.zeros(1, B, H) for _ in "hc")
    other = layer.stream(B, h_0=h_0)
    h_0[0].fill_(torch.nan)
    assert not run(other, x).isnan().any()
    assert not run(stream, x).isnan().any()
    same_bits(output, expected)
    output.fill_(torch.nan)
    assert not stream.step(x[0]).isnan().any()


@pytest.mark.parametrize("copied", [tt.nn.Stream.copy, copy.copy, copy.deepcopy])
def test_copies_go_their_own_ways(copied: Callable[[tt.nn.Stream], tt.nn.Stream]) -> None:
    layer, x = layer_of("lstm", num_layers=2), torch.randn(T, B, I)
    stream = layer.stream(B)
    stream.step(x[0])
    other = copied(stream)
    same_bits(run(other, x[1:]), layer(x)[0][1:].detach())
    same_bits(run(stream, x[1:]), layer(x)[0][1:].detach())


def test_streams_are_stacked_and_taken_apart() -> None:
    layer, x = layer_of("lstm", num_layers=2), torch.randn(T, B, I)
    whole = layer(x)[0].detach()
    alone, pair = layer.stream(), layer.stream(2)
    alone.step(x[0, 0])
    pair.step(x[0, 1:3])
    both = tt.nn.Stream.stack([pair, alone])
    assert both.batch_size == 3
    same_bits(both.step(x[1, [1, 2, 0]]), whole[1, [1, 2, 0]])
    turned, one = both.rows([2, 0, 2]), both.rows(1)
    assert (turned.batch_size, one.batch_size) == (3, None)
    same_bits(turned.step(x[2, [0, 1, 0]]), whole[2, [0, 1, 0]])
    same_bits(one.step(x[2, 2]), whole[2, 2])
    same_bits(both.rows(torch.tensor([0])).step(x[2, [1]]), whole[2, [1]])
    same_bits(pair.step(x[1, 1:3]), whole[1, 1:3])


def test_assigned_rows_reorder_a_batch_in_place() -> None:
    layer, x = layer_of("gru"), torch.randn(T, B, I)
    stream, order = layer.stream(B), [4, 4, 0, 1, 2]
    stream.step(x[0])
    state = stream.state
    assert isinstance(state, Tensor)
    stream.state = state[:, order]
    same_bits(stream.step(x[1, order]), layer(x)[0][1, order].detach())


def test_threads_may_each_have_a_stream() -> None:
    layer, x = layer_of("lstm", num_layers=2), torch.randn(200, 1, I)
    expected = layer(x)[0].detach()
    first = layer.stream(1)
    streams = [first, *(first.copy() for _ in range(3))]
    found: dict[int, Tensor] = {}

    def work(number: int) -> None:
        found[number] = run(streams[number], x)

    workers = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for number in range(4):
        same_bits(found[number], expected)


# ---------------------------------------------------------------------------------------------------------------------
# Weights


@pytest.mark.parametrize("target", [None, "stepwise"])
def test_weights_are_those_of_the_day_until_refreshed(target: str | None) -> None:
    layer, x = layer_of("gru", num_layers=2, learn_initial=True, target=target), torch.randn(T, B, I)
    before = layer(x)[0].detach()
    stream = layer.stream(B)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.data += 0.1
    assert_agree(run(stream, x[:2]), before[:2])
    assert_agree(run(stream.copy(), x[2:]), before[2:])
    state = stream.state
    stream.refresh()
    assert_agree(run(stream, x[2:]), layer(x[2:], state)[0].detach())
    reset = torch.ones(B, dtype=torch.bool)
    assert_agree(stream.step(x[0], reset=reset), layer(x[:1])[0][0].detach())


def test_a_stream_made_in_inference_mode_serves_outside_it() -> None:
    layer, x = layer_of("gru"), torch.randn(T, B, I)
    with torch.inference_mode():
        stream = layer.stream(B)
        stream.step(x[0])
        state = stream.state
    stream.state = state
    output = stream.step(x[1])
    assert not output.is_inference()
    same_bits(output, layer(x)[0][1].detach())


# ---------------------------------------------------------------------------------------------------------------------
# What is refused, in words, with the state left as it was

DECAYING = tt.nn.Recurrent(Decaying, I, H)
OUTSIDE = {"gap": torch.zeros(B, 1), "mask": torch.zeros(B, 1), "who": torch.zeros(B, H)}
X = torch.zeros(B, I)


@pytest.mark.parametrize(
    ("refused", "message"),
    [
        (lambda s: s.step(torch.zeros(B, I + 1)), r"x_t has shape \[5, 4\]; this stream takes \[B, I\] = \[5, 3\]"),
        (lambda s: s.step(torch.zeros(B + 1, I)), r"x_t has shape \[6, 3\]; this stream takes \[B, I\] = \[5, 3\]"),
        (lambda s: s.step(X[0]), r"x_t has shape \[3\]"),
        (lambda s: s.step(X[None]), r"x_t has shape \[1, 5, 3\]"),
        (lambda s: s.step(X.double()), r"x_t is torch.float64 on cpu, and the stream's layer torch.float32"),
        (lambda s: s.step(X.to("meta")), "x_t is torch.float32 on meta"),
        (lambda s: s.step(X.tolist()), "x_t is list, and must be a Tensor"),
        (lambda s: s.step(X.numpy()), "x_t is ndarray, and must be a Tensor"),
        (lambda s: s.step(None), "x_t is NoneType"),
        (lambda s: s.step(X.clone().requires_grad_()), "x_t requires a gradient, and a stream computes none"),
        (lambda s: s.step(X, reset=torch.zeros(B)), r"reset= holds torch.float32.*use reset.bool\(\)"),
        (lambda s: s.step(X, reset=[True, False]), r"reset= has shape \[2\]; this stream takes \[B\] = \[5\]"),
        (lambda s: s.step(X, reset=True), r"reset= has shape \[\]"),
        (lambda s: s.step(X, reset="yes"), r"reset= cannot be read \("),
        (lambda s: s.step(X, outside={"gap": X}), "the outside inputs of LSTM: none; outside= holds gap"),
        (lambda s: torch.func.vmap(lambda x: s.step(x))(X.expand(2, B, I)), "has no memory of its own"),
        (lambda s: setattr(s, "state", torch.zeros(1, B, H)), r"the state is 1 value\(s\); LSTM wants 2 tensors"),
        (
            lambda s: setattr(s, "state", (torch.zeros(1, B, H), torch.zeros(1, B, H + 1))),
            r"the state c has shape \[1, 5, 18\]; this stream takes \[layers, B, width\] = \[1, 5, 17\]",
        ),
        (
            lambda s: s.load_state_dict({"h": torch.zeros(1, B, H), "c": torch.zeros(1, B, H).double()}),
            "the state c is torch.float64",
        ),
        (lambda s: s.load_state_dict({"h": torch.zeros(1, B, H)}), "the saved state holds h, and LSTM has h, c"),
        (lambda s: s.rows([0, B]), r"rows \[0, 5\] are not all there; this stream has rows 0 to 4"),
        (lambda s: s.rows([-1]), r"rows \[-1\] are not all there"),
        (lambda s: s.rows([]), "at least one"),
        (lambda s: s.rows([0.5]), "rows are named by whole numbers"),
        (lambda s: tt.nn.Stream.stack([s, layer_of("lstm").stream()]), "stream 1 has other weights than stream 0"),
        (lambda s: tt.nn.Stream.stack([]), "there are no streams to stack"),
        (lambda s: pickle.dumps(s), "cannot be pickled; save stream.state_dict"),
        (lambda s: s.layer.double() and s.refresh(), "the layer has changed its sizes, dtype or device"),
    ],
)
def test_what_does_not_fit_is_refused_and_the_state_stays(refused: Callable[[Any], Any], message: str) -> None:
    stream = layer_of("lstm").stream(B)
    stream.step(torch.randn(B, I))
    before = stream.state
    with pytest.raises(tt.ThroughtimeError, match=message):
        refused(stream)
    same_state(stream.state, before)
    copied = stream.copy()
    x = torch.randn(B, I)
    same_bits(stream.step(x), copied.step(x))


@pytest.mark.parametrize(
    ("outside", "message"),
    [
        (None, "the outside inputs of Decaying: gap, mask, who; outside= holds nothing"),
        (OUTSIDE | {"gap": torch.zeros(B)}, r"gap has shape \[5\]; this stream takes \[B, 1 or H\] = \[5, 1 or 17\]"),
        (OUTSIDE | {"who": torch.zeros(B, 2)}, r"who has shape \[5, 2\]"),
        (OUTSIDE | {"mask": torch.zeros(B, 1).double()}, "the outside input mask is torch.float64"),
    ],
)
def test_outside_inputs_that_do_not_fit_are_refused(outside: Any, message: str) -> None:
    stream = DECAYING.stream(B)
    stream.step(torch.randn(B, I), outside=OUTSIDE)
    before = stream.state
    with pytest.raises(tt.ShapeError, match=message):
        stream.step(X, outside=outside)
    same_state(stream.state, before)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: tt.nn.Recurrent(tt.GRU, I, H, bidirectional=True).stream(), "read a sequence to its end before it"),
        (lambda: tt.nn.LSTM(I, H, bidirectional=True).stream(2), "no step to stream; make the layer with bidirect"),
        (lambda: layer_of("gru", num_layers=2, dropout=0.5).stream(), r"in training, with dropout=0.5.*layer.eval\(\)"),
        (lambda: layer_of("gru").stream(0), "batch_size is 0; it must be a whole number from 1, or None"),
        (lambda: layer_of("gru").stream(2.0), "batch_size is 2.0"),  # type: ignore[arg-type]
        (lambda: layer_of("gru").stream(True), "batch_size is True"),
        (lambda: layer_of("gru").stream(2, h_0=torch.zeros(1, 3, H)), r"the state h has shape \[1, 3, 17\]"),
        (lambda: layer_of("gru", target="abacus").stream(), "'abacus'; the targets are"),
    ],
)
def test_layers_without_a_step_are_refused(made: Callable[[], Any], message: str) -> None:
    with pytest.raises(tt.ThroughtimeError, match=message):
        made()


def test_dropout_does_not_hinder_a_layer_that_is_not_in_training() -> None:
    layer, x = layer_of("gru", num_layers=2, dropout=0.5).eval(), torch.randn(T, B, I)
    same_bits(run(layer.stream(B), x), layer(x)[0].detach())


def test_x_that_requires_a_gradient_is_taken_where_none_is_wanted() -> None:
    layer, x = layer_of("gru"), torch.randn(B, I)
    with torch.no_grad():
        output = layer.stream(B).step(x.clone().requires_grad_())
    same_bits(output, layer.stream(B).step(x))
