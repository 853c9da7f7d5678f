"""Recurrent: any cell, any lengths, any resets; each test names the property that it holds."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from agreement import assert_agree, run_with_gradients, tensors_in
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_packed_sequence

import throughtime as tt
from throughtime.engine import recurrence

I, H, T, B = 3, 4, 6, 4
CELLS: dict[str, tuple[tt.Cell, dict[str, Any]]] = {
    "elman": (tt.Elman, {}),
    "elman-relu": (tt.Elman(activation=tt.relu), {}),
    "gru": (tt.GRU, {}),
    "gru-reset-before": (tt.GRUResetBefore, {}),
    "lstm": (tt.LSTM, {}),
    "lstm-projected": (tt.ProjectedLSTM, {"proj_size": 2}),
}


@tt.cell(states="h")
def MGU(x, h, W, U, b):
    """Zhou et al. 2016, arXiv:1603.09420: the minimal gated unit."""
    f = tt.sigmoid(W.f @ x + U.f @ h + b.f)
    n = tt.tanh(W.n @ x + U.n @ (f * h) + b.n)
    return (1 - f) * h + f * n


def layer_of(cell: str, **options: Any) -> tt.nn.Recurrent:
    """A layer in float64 whose learnt initial states, if it has them, are not zero."""
    equations, own = CELLS[cell]
    layer = tt.nn.Recurrent(equations, I, H, **own, **{"dtype": torch.float64, **options})
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name.startswith("initial_"):
                parameter.normal_()
    return layer


def batch(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def state_of(layer: tt.nn.Recurrent, rows: int) -> Any:
    depth = layer.num_layers * (2 if layer.bidirectional else 1)
    sizes = layer.cell.sizes(layer.hidden_size, layer.proj_size)
    states = tuple(batch(depth, rows, size) for size in sizes)
    return states if len(states) > 1 else states[0]


def rows_of(state: Any, row: int) -> Any:
    """One sequence's part of a state [layers, B, width]."""
    return tuple(s[:, row : row + 1] for s in state) if isinstance(state, tuple) else state[:, row : row + 1]


def joined(states: Sequence[Any]) -> Any:
    """States of single sequences as the state of their batch."""
    if isinstance(states[0], tuple):
        return tuple(torch.cat(parts, 1) for parts in zip(*states, strict=True))
    return torch.cat(list(states), 1)


def padded(outputs: Sequence[Tensor], steps: int) -> Tensor:
    """Outputs [length, 1, F] of single sequences as a batch [steps, B, F] with zeros past the ends."""
    whole = [torch.cat([o, o.new_zeros(steps - len(o), *o.shape[1:])]) for o in outputs]
    return torch.cat(whole, 1)


# ---------------------------------------------------------------------------------------------------------------------
# Beside torch.nn


@pytest.mark.parametrize(
    ("cell", "theirs"),
    [("elman", torch.nn.RNN), ("gru", torch.nn.GRU), ("lstm", torch.nn.LSTM), ("lstm-projected", torch.nn.LSTM)],
)
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_is_torchs_layer_for_the_same_seed(cell: str, theirs: type) -> None:
    equations, own = CELLS[cell]
    options: dict[str, Any] = {"num_layers": 2, "bidirectional": True, **own}
    torch.manual_seed(11)
    expected = theirs(I, H, **options)
    torch.manual_seed(11)
    actual = tt.nn.Recurrent(equations, I, H, **options)
    assert list(actual.state_dict()) == list(expected.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(actual.parameters(), expected.parameters(), strict=True))
    for x in (
        torch.randn(T, B, I, requires_grad=True),
        torch.randn(T, I, requires_grad=True),
        pack_sequence([torch.randn(n, I, requires_grad=True) for n in (2, 5, 1)], enforce_sorted=False),
    ):
        assert_agree(run_with_gradients(actual, x), run_with_gradients(expected, x))


def test_batch_first_is_time_first_transposed() -> None:
    layer = layer_of("lstm", num_layers=2, bidirectional=True)
    other = layer_of("lstm", num_layers=2, bidirectional=True, batch_first=True)
    other.load_state_dict(layer.state_dict())
    x, lengths = batch(T, B, I), [3, 6, 0, 6]
    reset = torch.rand(T, B) < 0.4
    output, state = layer(x, lengths=lengths, reset=reset)
    transposed, its_state = other(x.transpose(0, 1), lengths=lengths, reset=reset.T)
    assert_agree(transposed.transpose(0, 1), output)
    assert_agree(its_state, state)


# ---------------------------------------------------------------------------------------------------------------------
# Lengths


@pytest.mark.parametrize("learn_initial", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_a_ragged_batch_is_each_sequence_alone(cell: str, learn_initial: bool) -> None:
    layer = layer_of(cell, num_layers=2, bidirectional=True, learn_initial=learn_initial)
    for lengths in ([4, 6, 0, 1], [6, 4, 4, 2], [1, 2, 3, 3]):
        x = batch(T, B, I)
        given = None if learn_initial else state_of(layer, B)

        def together(x: Tensor, given: Any, lengths: list[int] = lengths) -> Any:
            return layer(x, given, lengths=lengths)

        def alone(x: Tensor, given: Any, lengths: list[int] = lengths) -> Any:
            runs = [
                layer(x[:n, row : row + 1], None if given is None else rows_of(given, row))
                for row, n in enumerate(lengths)
            ]
            return padded([o for o, _ in runs], T), joined([s for _, s in runs])

        expected = run_with_gradients(layer, x, given, call=alone)
        assert_agree(run_with_gradients(layer, x, given, call=together), expected, str(lengths))


def test_nothing_past_an_end_is_read_or_has_a_gradient() -> None:
    layer = layer_of("gru", num_layers=2, bidirectional=True)
    lengths = [2, 5, 0, 3]
    clean = torch.randn(T, B, I, dtype=torch.float64)
    dirty = clean.clone()
    for row, n in enumerate(lengths):
        dirty[n:, row] = torch.nan
    expected, wanted = run_with_gradients(layer, clean.requires_grad_(), call=lambda x: layer(x, lengths=lengths))
    actual, found = run_with_gradients(layer, dirty.requires_grad_(), call=lambda x: layer(x, lengths=lengths))
    assert_agree((actual, found), (expected, wanted))
    for row, n in enumerate(lengths):
        assert (actual[0][n:, row] == 0).all()
        d_x = found["input 0.0"]
        assert d_x is not None
        assert (d_x[n:, row] == 0).all()


LENGTHS = [3, 6, 0, 5]


@pytest.mark.parametrize(
    "lengths",
    [
        tuple(LENGTHS),
        *(np.array(LENGTHS, kind) for kind in ("int8", "uint16", "int64")),
        *(torch.tensor(LENGTHS, dtype=kind) for kind in (torch.uint8, torch.int32, torch.int64)),
        [np.int32(n) for n in LENGTHS],
        [torch.tensor(n) for n in LENGTHS],
        range(3, 7),
    ],
)
def test_lengths_come_in_any_container_and_integer_type(lengths: Any) -> None:
    layer, x = layer_of("gru"), batch(T, B, I)
    assert_agree(layer(x, lengths=lengths), layer(x, lengths=[int(n) for n in lengths]))


def test_lengths_of_one_sequence_without_a_batch() -> None:
    layer, x = layer_of("lstm", bidirectional=True), batch(T, I)
    expected = layer(x[:4])
    output, state = layer(x, lengths=4)
    assert_agree((output[:4], state), expected)
    assert (output[4:] == 0).all()


def test_a_state_of_a_sequence_of_length_zero_is_the_state_given() -> None:
    layer = layer_of("lstm", num_layers=2)
    given = state_of(layer, 2)
    _, state = layer(batch(T, 2, I), given, lengths=[0, 0])
    assert_agree(state, given)


def test_packed_sequences_and_lengths_are_one_path() -> None:
    layer = layer_of("lstm", num_layers=2, bidirectional=True)
    sequences = [batch(n, I) for n in (2, 5, 1, 5)]
    packed = pack_sequence(sequences, enforce_sorted=False)
    given = state_of(layer, 4)
    reset = torch.rand(5, 4) < 0.4
    output, state = layer(packed, given, reset=reset)
    assert isinstance(output, PackedSequence)
    x, lengths = pad_packed_sequence(packed)
    assert_agree((pad_packed_sequence(output)[0], state), layer(x, given, lengths=lengths, reset=reset))


# ---------------------------------------------------------------------------------------------------------------------
# Resets


def episodes(reset: list[bool], length: int) -> list[tuple[int, int]]:
    """The first step and the end of each episode of one sequence."""
    starts = [0, *(t for t in range(1, length) if reset[t])]
    return list(zip(starts, [*starts[1:], length], strict=True))


def each_episode_alone(layer: tt.nn.Recurrent, x: Tensor, reset: Tensor, lengths: list[int], given: Any) -> Any:
    """A one-layer run cut by hand: the given state enters the first episode, and backwards the last one."""
    depth = 2 if layer.bidirectional else 1
    width = layer.cell.sizes(layer.hidden_size, layer.proj_size)[layer.cell.output]
    outputs: list[Tensor] = []
    states: list[Any] = []
    for row, length in enumerate(lengths):
        cuts = episodes(reset[:, row].tolist(), length)
        own = None if given is None else rows_of(given, row)
        runs = []
        for start, end in cuts:
            h_0 = blend(layer, own, [start == 0 and not reset[0, row], end == length][:depth])
            runs.append(layer(x[start:end, row : row + 1], h_0))
        outputs.append(torch.cat([output for output, _ in runs]))
        ends = [-1, 0][:depth]
        if isinstance(runs[0][1], tuple):
            parts = [torch.cat([runs[e][1][i][d : d + 1] for d, e in enumerate(ends)]) for i in range(2)]
            states.append(tuple(parts))
        else:
            states.append(torch.cat([runs[e][1][d : d + 1] for d, e in enumerate(ends)]))
        assert outputs[-1].shape[-1] == width * depth
    return padded(outputs, len(x)), joined(states)


def blend(layer: tt.nn.Recurrent, given: Any, enters: list[bool]) -> Any:
    """The given state in the directions that it enters, the layer's initial one in the others."""
    if given is None:
        return None
    initial = []
    for name, size in zip(layer.cell.states, layer.cell.sizes(layer.hidden_size, layer.proj_size), strict=True):
        for suffix in ("", "_reverse")[: len(enters)]:
            zero = torch.zeros(size, dtype=torch.float64)
            initial.append(getattr(layer, f"initial_{name}_l0{suffix}") if layer.learn_initial else zero)
    several = given if isinstance(given, tuple) else (given,)
    chosen = tuple(
        torch.stack([s[d] if e else initial[i * len(enters) + d][None] for d, e in enumerate(enters)])
        for i, s in enumerate(several)
    )
    return chosen if len(chosen) > 1 else chosen[0]


@pytest.mark.parametrize("learn_initial", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("cell", ["elman", "gru-reset-before", "lstm", "lstm-projected"])
def test_a_run_with_resets_is_each_episode_alone(cell: str, bidirectional: bool, learn_initial: bool) -> None:
    layer = layer_of(cell, bidirectional=bidirectional, learn_initial=learn_initial)
    reset = torch.tensor([[0, 1, 0, 0], [0, 0, 1, 1], [1, 0, 0, 1], [0, 0, 1, 0], [0, 1, 0, 1], [0, 0, 0, 1]]) > 0
    for lengths in ([6, 6, 6, 6], [2, 6, 3, 5]):
        for state in (None, state_of(layer, B)):
            x = batch(T, B, I)

            def together(x: Tensor, given: Any, lengths: list[int] = lengths) -> Any:
                return layer(x, given, lengths=lengths, reset=reset)

            def alone(x: Tensor, given: Any, lengths: list[int] = lengths) -> Any:
                return each_episode_alone(layer, x, reset, lengths, given)

            actual = run_with_gradients(layer, x, state, call=together)
            expected = run_with_gradients(layer, x, state, call=alone)
            assert_agree(without_zeros(actual), without_zeros(expected), str(lengths))


def without_zeros(run: tuple[Any, dict[str, Tensor | None]]) -> tuple[Any, dict[str, Tensor]]:
    """The run with gradients of zero left out, whether they came as zeros or as None."""
    return run[0], {name: g for name, g in run[1].items() if g is not None and g.any()}


def test_resets_reach_every_layer_of_a_stack() -> None:
    layer = layer_of("gru", num_layers=3)
    x, reset = batch(T, B, I), torch.zeros(T, B, dtype=torch.bool)
    reset[3] = True
    output, _ = layer(x, reset=reset)
    assert_agree(output, torch.cat([layer(x[:3])[0], layer(x[3:])[0]]))


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_a_reset_selects_so_that_nan_in_a_carried_state_goes_nowhere(cell: str) -> None:
    layer = layer_of(cell, learn_initial=True)
    x, carried = batch(T, B, I), state_of(layer, B)
    reset = torch.zeros(T, B, dtype=torch.bool)
    reset[0] = True
    broken = tuple(torch.full_like(s, torch.nan).requires_grad_() for s in tensors_in(carried))
    state = broken if len(broken) > 1 else broken[0]
    result, gradients = run_with_gradients(layer, x, state, call=lambda x, s: layer(x, s, reset=reset))
    assert_agree(result, layer(x))
    for name, gradient in gradients.items():
        assert gradient is not None, name
        assert gradient.isfinite().all(), name
        assert gradient.any() != name.startswith("input 1"), name


def test_nan_in_one_episode_does_not_reach_the_next() -> None:
    layer, x = layer_of("gru"), batch(T, B, I).detach()
    reset = torch.zeros(T, B, dtype=torch.bool)
    reset[3] = True
    expected = layer(x, reset=reset)[0][3:]
    x[1] = torch.nan
    output = layer(x, reset=reset)[0]
    assert output[1:3].isnan().all()
    assert_agree(output[3:], expected)


@given(data=st.data())
@settings(max_examples=25)
def test_lengths_resets_and_layers_in_any_combination_agree_with_the_reference(data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 99)))
    rows, steps = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 7))
    lengths = data.draw(st.none() | st.lists(st.integers(0, steps), min_size=rows, max_size=rows))
    reset = torch.rand(steps, rows) < data.draw(st.sampled_from([0.0, 0.3, 1.0]))
    layer = layer_of(
        data.draw(st.sampled_from(sorted(CELLS))),
        num_layers=data.draw(st.integers(1, 2)),
        bidirectional=data.draw(st.booleans()),
        learn_initial=data.draw(st.booleans()),
    )
    x, state = batch(steps, rows, I), data.draw(st.sampled_from([None, state_of(layer, rows)]))

    def run(x: Tensor, state: Any) -> Any:
        return layer(x, state, lengths=lengths, reset=reset)

    actual = run_with_gradients(layer, x, state, call=run)
    layer.target = "reference"
    assert_agree(without_zeros(actual), without_zeros(run_with_gradients(layer, x, state, call=run)))


# ---------------------------------------------------------------------------------------------------------------------
# Derivatives of every kind


def as_function(layer: tt.nn.Recurrent, **options: Any) -> Callable[..., tuple[Tensor, ...]]:
    """The layer as a function of x and its parameters, for checks by finite differences."""
    names = [name for name, _ in layer.named_parameters()]

    def function(x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(names, parameters, strict=True))
        output, state = torch.func.functional_call(layer, given, (x,), options)
        return (output, *tensors_in(state))

    return function


@pytest.mark.parametrize("cell", [*CELLS, "mgu"])
def test_gradients_are_those_of_finite_differences_twice_over(cell: str) -> None:
    if cell == "mgu":
        layer = tt.nn.Recurrent(MGU, 2, 2, learn_initial=True, bidirectional=True, dtype=torch.float64)
    else:
        equations, own = CELLS[cell]
        size = 1 if own else 0
        layer = tt.nn.Recurrent(
            equations, 2, 2, learn_initial=True, bidirectional=True, proj_size=size, dtype=torch.float64
        )
    reset = torch.tensor([[False, False], [False, True], [True, False]])
    function = as_function(layer, lengths=[2, 3], reset=reset)
    inputs = (batch(3, 2, 2), *(torch.randn_like(p).requires_grad_() for p in layer.parameters()))
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


def test_second_derivatives_are_right_where_a_weight_acts_twice() -> None:
    layer = tt.nn.Recurrent(tt.GRU, 2, 2, dtype=torch.float64)
    function = as_function(layer)

    def twice(x: Tensor, *parameters: Tensor) -> Tensor:
        return function(function(x, *parameters)[0], *parameters)[0]

    inputs = (batch(2, 1, 2), *(p.detach().clone().requires_grad_() for p in layer.parameters()))
    plain = torch.autograd.grad(twice(*inputs).sum(), inputs)
    differentiable = torch.autograd.grad(twice(*inputs).sum(), inputs, create_graph=True)
    assert_agree(differentiable, plain)
    assert torch.autograd.gradgradcheck(twice, inputs)


Problem = tuple[tt.nn.Recurrent, dict[str, Tensor], Tensor]


@pytest.fixture
def problem() -> Problem:
    """A layer, its parameters as plain tensors, and an input."""
    layer = layer_of("lstm", num_layers=2, bidirectional=True)
    return layer, {name: p.detach() for name, p in layer.named_parameters()}, batch(T, B, I).detach()


def loss_of(layer: tt.nn.Recurrent, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
    output, (h, c) = torch.func.functional_call(layer, parameters, (x,), {"lengths": [3, 6, 0, 5]})
    return output.sin().sum() + (h * c).sum()


def test_func_grad_is_backward(problem: Problem) -> None:
    layer, parameters, x = problem
    loss_of(layer, dict(layer.named_parameters()), x).backward()
    found = torch.func.grad(loss_of, argnums=1)(layer, parameters, x)
    assert_agree(found, {name: p.grad for name, p in layer.named_parameters()})


def test_vmap_of_grad_is_each_sequence_in_turn() -> None:
    layer, x = layer_of("gru", bidirectional=True), batch(T, B, I).detach()
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(parameters: dict[str, Tensor], sequence: Tensor) -> Tensor:
        output, _ = torch.func.functional_call(layer, parameters, (sequence,), {"lengths": 4})
        return output.square().sum()

    found = torch.func.vmap(torch.func.grad(loss), (None, 1))(parameters, x)
    for row in range(B):
        expected = torch.func.grad(loss)(parameters, x[:, row])
        assert_agree({name: g[row] for name, g in found.items()}, expected)
        assert all(g.any() for g in expected.values())


def test_vmap_over_an_ensemble_is_each_member_in_turn() -> None:
    members, x = [layer_of("gru") for _ in range(3)], batch(T, B, I).detach()
    parameters, _ = torch.func.stack_module_state(members)
    outputs = torch.func.vmap(lambda p: torch.func.functional_call(members[0], p, (x,))[0])(parameters)
    assert_agree(outputs, torch.stack([member(x)[0] for member in members]))


FORWARD_MODE = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
"""torch itself trips over its deprecation the first time that forward mode is used."""


@FORWARD_MODE
def test_jvp_is_a_finite_difference(problem: Problem) -> None:
    layer, parameters, x = problem
    tangents = {name: torch.randn_like(p) for name, p in parameters.items()}
    found = torch.func.jvp(lambda p: loss_of(layer, p, x), (parameters,), (tangents,))[1]
    step = 1e-5
    ahead = loss_of(layer, {n: p + step * tangents[n] for n, p in parameters.items()}, x)
    behind = loss_of(layer, {n: p - step * tangents[n] for n, p in parameters.items()}, x)
    assert abs(found.item()) > 1e-3
    torch.testing.assert_close(found, (ahead - behind) / (2 * step), rtol=1e-7, atol=0.0)


@FORWARD_MODE
def test_forward_mode_carries_tangents_through_the_layer(
    problem: Problem,
) -> None:
    layer, parameters, x = problem
    direction = torch.randn_like(x)
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(loss_of(layer, parameters, forward_ad.make_dual(x, direction))).tangent
    assert found is not None
    gradient = torch.func.grad(loss_of, argnums=2)(layer, parameters, x)
    assert abs(found.item()) > 1e-3
    torch.testing.assert_close(found, (gradient * direction).sum())


@FORWARD_MODE
def test_jacrev_is_the_jacobian_row_by_row() -> None:
    layer, x = layer_of("gru"), batch(2, 1, I)
    found = torch.func.jacrev(lambda x: layer(x)[0])(x.detach())
    output = layer(x)[0]
    rows = [torch.autograd.grad(value, x, retain_graph=True)[0] for value in output.flatten()]
    assert_agree(found, torch.stack(rows).reshape(*output.shape, *x.shape))
    assert_agree(torch.func.jacfwd(lambda x: layer(x)[0])(x.detach()), found)
    assert found.any()


# ---------------------------------------------------------------------------------------------------------------------
# A cell of one's own


def test_a_cell_of_ones_own_learns() -> None:
    """The parity of the signs seen so far, which takes memory: the loss falls to a tenth of guessing."""
    torch.manual_seed(0)
    layer, head = tt.nn.Recurrent(MGU, 1, 12), tt.nn.PerStep(12, 2)
    optimiser = torch.optim.Adam([*layer.parameters(), *head.parameters()], lr=0.03)
    x = torch.randint(2, (8, 64, 1)).float()
    targets = x.squeeze(-1).cumsum(0).long() % 2
    losses = []
    for _ in range(150):
        loss = tt.nn.ragged_loss(head(layer(x)[0]), targets, normalise="steps")
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[0] > 0.6
    assert losses[-1] < 0.07


@tt.cell(states="h", per_step="gap", per_sequence="leak")
def Decaying(x, h, W, U, b, gap, leak):
    """Forgets with the time that has passed since the last step."""
    kept = tt.exp(-leak * gap) * h
    return tt.tanh(W @ x + U @ kept + b)


@tt.cell(states="h")
def Smoother(x, h):
    """An exponential mean of x itself: no parameters at all."""
    return 0.9 * h + 0.1 * x


@tt.cell(states="v s", output="s")
def Spiking(x, v, s, W, U):
    """Two states of which the second is shown."""
    charged = 0.9 * v + W @ x + U @ s
    return charged, tt.sigmoid(charged)


@pytest.mark.parametrize("batch_first", [False, True])
def test_outside_inputs_follow_their_steps_and_rows(batch_first: bool) -> None:
    layer = tt.nn.Recurrent(Decaying, I, H, num_layers=2, bidirectional=True, dtype=torch.float64)
    layer.batch_first = batch_first
    x, gap, leak = batch(T, B, I), torch.rand(T, B, 1).double(), torch.rand(B, H).double()
    lengths = [2, 6, 3, 5]

    def turned(tensor: Tensor) -> Tensor:
        return tensor.transpose(0, 1) if batch_first else tensor

    output, state = layer(turned(x), lengths=lengths, outside={"gap": turned(gap), "leak": leak})
    for row, n in enumerate(lengths):
        expected, its_state = layer(x[:n, row], outside={"gap": gap[:n, row], "leak": leak[row]})
        assert_agree(turned(output)[:n, row], expected)
        assert_agree(state[:, row], its_state)


def test_under_autocast_everything_given_is_taken_to_the_layers_dtype() -> None:
    layer = tt.nn.Recurrent(Decaying, I, H)
    x, state, gap, leak = (torch.rand(*shape).bfloat16() for shape in ((T, B, I), (1, B, H), (T, B, 1), (B, H)))
    with torch.autocast("cpu", torch.bfloat16):
        result = layer(x, state, outside={"gap": gap, "leak": leak})
    expected = layer(x.float(), state.float(), outside={"gap": gap.float(), "leak": leak.float()})
    assert_agree(result, expected)


def test_a_cell_without_parameters_is_a_layer() -> None:
    layer, x = tt.nn.Recurrent(Smoother, I, I), torch.randn(2, 1, I)
    assert list(layer.parameters()) == []
    assert_agree(layer(x)[1][0], 0.1 * x[1] + 0.09 * x[0])


def test_the_state_that_a_cell_shows_is_the_output() -> None:
    layer, x = tt.nn.Recurrent(Spiking, I, H), torch.randn(T, B, I)
    output, (v, s) = layer(x)
    assert_agree(output[-1], s[0])
    assert_agree(v.sigmoid(), s)


# ---------------------------------------------------------------------------------------------------------------------
# As a module


@pytest.mark.parametrize(("rows", "width", "steps"), [(1, 1, 1), (1, 17, 2), (3, 1, 4), (0, 2, 3)])
@pytest.mark.parametrize("cell", ["elman", "gru", "lstm"])
def test_odd_sizes_agree_with_the_reference(cell: str, rows: int, width: int, steps: int) -> None:
    layer = tt.nn.Recurrent(CELLS[cell][0], I, width, num_layers=2, bidirectional=True)
    x = torch.randn(steps, rows, I, requires_grad=True)
    actual = run_with_gradients(layer, x)
    layer.target = "reference"
    assert_agree(without_zeros(actual), without_zeros(run_with_gradients(layer, x)))


def test_an_input_of_no_steps_gives_no_outputs_and_the_state_given() -> None:
    layer = layer_of("lstm", num_layers=2, bidirectional=True)
    given = state_of(layer, B)
    output, state = layer(batch(0, B, I), given)
    assert output.shape == (0, B, 2 * H)
    assert_agree(state, given)


def test_learnt_initial_states_begin_at_zero_and_learn() -> None:
    layer = tt.nn.Recurrent(tt.LSTM, I, H, num_layers=2, bidirectional=True, learn_initial=True)
    initial = {name: p for name, p in layer.named_parameters() if name.startswith("initial_")}
    assert list(initial) == [f"initial_{s}_l{d}{r}" for d in (0, 1) for r in ("", "_reverse") for s in "hc"]
    assert not any(p.any() for p in initial.values())
    layer(torch.randn(T, B, I))[0].sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in initial.values())


def test_copies_and_saved_files_compute_the_same() -> None:
    layer = tt.nn.Recurrent(MGU, I, H, num_layers=2, learn_initial=True)
    x = torch.randn(T, B, I)
    assert_agree(copy.deepcopy(layer)(x), layer(x))
    stored = io.BytesIO()
    torch.save(layer, stored)
    stored.seek(0)
    loaded = torch.load(stored, weights_only=False)
    assert loaded.cell == MGU
    assert_agree(loaded(x), layer(x))


def test_it_says_what_it_is() -> None:
    assert str(tt.nn.Recurrent(tt.GRU, 12, 100, bidirectional=True)) == "Recurrent(GRU, 12, 100, bidirectional=True)"


def test_dropout_acts_between_layers_in_training_alone() -> None:
    layer = tt.nn.Recurrent(tt.GRU, I, H, num_layers=2, dropout=1.0)
    x = torch.randn(T, B, I)
    expected = tt.nn.Recurrent(tt.GRU, H, H)
    expected.load_state_dict({k.replace("l1", "l0"): v for k, v in layer.state_dict().items() if "l1" in k})
    assert_agree(layer(x)[0], expected(torch.zeros(T, B, H))[0])
    assert not torch.equal(layer.eval()(x)[0], expected(torch.zeros(T, B, H))[0])


def test_a_recording_keeps_the_callers_rows_and_the_result() -> None:
    layer = layer_of("lstm", bidirectional=True)
    sequences = [batch(n, I) for n in (2, 5, 0, 3)]
    x = torch.nn.utils.rnn.pad_sequence(sequences)
    expected = layer(x, lengths=[2, 5, 0, 3])
    with recurrence.recording() as records:
        output, state = layer(x, lengths=[2, 5, 0, 3])
    assert_agree((output, state), expected)
    assert [(r.reverse, r.lengths) for r in records] == [(False, (2, 5, 0, 3)), (True, (2, 5, 0, 3))]
    assert_agree(records[0].states[1][0][0], output[1, 0, :H])
    assert torch.autograd.grad(output.sum(), records[0].states[1][0])[0].any()
    packed = pack_sequence([sequences[i] for i in (0, 1, 3)], enforce_sorted=False)
    expected = layer(packed)
    with recurrence.recording() as records:
        assert_agree(layer(packed), expected)
    assert records[0].lengths == (2, 5, 3)


def test_explain_names_layer_direction_target_and_reason_and_computes_nothing() -> None:
    layer, x = tt.nn.Recurrent(tt.LSTM, I, H, num_layers=2, bidirectional=True, dropout=0.5), torch.randn(T, B, I)
    torch.manual_seed(2)
    expected = torch.rand(1)
    torch.manual_seed(2)
    lines = tt.explain(layer, x, lengths=[1, 2, 3, 4])
    assert torch.equal(torch.rand(1), expected)
    assert [line.split(":")[0] for line in lines] == [
        f"layer {depth}, {direction}" for depth in (0, 1) for direction in ("forward", "backward")
    ]
    with recurrence.recording() as records:
        lines = tt.explain(layer, x)
    assert lines[0] == "layer 0, forward: reference: a recording of the states is under way"
    assert records == []
    with pytest.raises(tt.ThroughtimeError, match=r"explain takes one recurrent layer or cell of .*, not Linear"):
        tt.explain(torch.nn.Linear(1, 1), torch.randn(1, 1))  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------------------------
# What is refused, in words


def gru(**options: Any) -> tt.nn.Recurrent:
    return tt.nn.Recurrent(tt.GRU, I, H, **options)


def lstm() -> tt.nn.Recurrent:
    return tt.nn.Recurrent(tt.LSTM, I, H)


X, STATE = torch.zeros(T, B, I), torch.zeros(1, B, H)
PACK = pack_sequence([torch.zeros(2, I), torch.zeros(1, I)])
TRUE = torch.ones(T, B, dtype=torch.bool)
DECAYING = tt.nn.Recurrent(Decaying, I, H)
GAP, LEAK = torch.zeros(T, B, 1), torch.zeros(B, 1)


@pytest.mark.parametrize(
    ("refused", "message"),
    [
        (lambda: gru()([1.0]), "x is list; a layer takes a Tensor or a PackedSequence"),
        (lambda: gru()(X[0, 0]), r"x has 1 dimensions; it must be \[T, B, I\], or \[T, I\] for one sequence"),
        (lambda: gru()(torch.zeros(T, B, 5)), "x has 5 features in its last dimension.*input_size=3"),
        (lambda: gru()(X.double()), r"x is torch.float64 and the layer's parameters are torch.float32.*\.to\(dtype\)"),
        (lambda: gru()(X.to("meta")), r"x is on meta and the layer on cpu; move one of them with \.to\(device\)"),
        (lambda: gru()(X, STATE[0]), r"the state h in h_0 has shape \[4, 4\]; it must be .* = \[1, 4, 4\]"),
        (lambda: gru()(X[:, 0], STATE), r"the state h in h_0 has shape \[1, 4, 4\]; it must be .* = \[1, 4\]"),
        (lambda: gru()(PACK, STATE), r"must be \[layers \* directions, B, width\] = \[1, 2, 4\]"),
        (lambda: gru()(X, STATE.double()), "the state h in h_0 is torch.float64"),
        (lambda: gru()(X, (STATE, STATE)), "h_0 is 2 values; GRU wants one tensor"),
        (lambda: gru()(X, 1.0), "the state h in h_0 is float, and must be a Tensor"),
        (lambda: lstm()(X, STATE), r"h_0 is one Tensor; LSTM wants a tuple of 2 tensors \(h, c\)"),
        (lambda: lstm()(X, (STATE, STATE[..., :2])), r"the state c in h_0 has shape \[1, 4, 2\]"),
        (lambda: gru()(X, lengths=[1, 2, 7, 3]), r"lengths\[2\] is 7, but the input has 6 steps; lengths lie between"),
        (lambda: gru()(X, lengths=[1, -2, 6, 3]), r"lengths\[1\] is -2"),
        (
            lambda: gru()(X, lengths=[1, 2]),
            "lengths= has 2 entries and the batch 4 sequences; give one length for each",
        ),
        (lambda: gru()(X, lengths=3), "lengths= has 1 entry and the batch 4 sequences"),
        (lambda: gru()(X, lengths=[1.0, 2, 3, 4]), r"lengths\[0\] is 1.0; a length is an integer number of steps"),
        (lambda: gru()(X, lengths=2.0), "lengths= has 1 entry and the batch 4 sequences"),
        (lambda: gru()(X[:, 0], lengths=2.0), r"lengths\[0\] is 2.0; a length is an integer"),
        (lambda: gru()(X, lengths="3456"), "lengths= is str; give one integer for each sequence"),
        (lambda: gru()(X, lengths=object()), "lengths= is object; give one integer"),
        (lambda: gru()(X, lengths=[6, None, 1, 2]), r"lengths\[1\] is None; a length is an integer"),
        (lambda: gru()(X, reset="yes"), r"reset= cannot be read \("),
        (lambda: gru()(X, reset=[[True], [True, False]]), r"reset= cannot be read \("),
        (lambda: gru()(X, lengths=torch.ones(4)), r"lengths\[0\] is 1.0; a length is an integer"),
        (lambda: gru()(X, lengths=np.ones(4)), r"lengths\[0\] is 1.0; a length is an integer"),
        (lambda: gru()(X, lengths=[True] * 4), r"lengths\[0\] is True"),
        (lambda: gru()(X, lengths=torch.ones(4, 1, dtype=torch.int64)), r"lengths\[0\] is \[1\]"),
        (lambda: gru()(PACK, lengths=[2, 1]), "lengths= came together with a PackedSequence"),
        (lambda: gru()(X, reset=TRUE.T), r"reset= has shape \[4, 6\]; .* must be \[T, B\] = \[6, 4\]"),
        (lambda: gru(batch_first=True)(X, reset=TRUE.T), r"must be \[B, T\] = \[6, 4\]"),
        (lambda: gru()(X[:, 0], reset=TRUE), r"must be \[T\] = \[6\]"),
        (lambda: gru()(PACK, reset=TRUE), r"must be \[T, B\] = \[2, 2\]"),
        (lambda: gru()(X, reset=TRUE.float()), r"reset= holds torch.float32.*use reset.bool\(\)"),
        (lambda: gru()(X, outside={"gap": GAP}), "the outside inputs of GRU: none; outside= holds gap"),
        (lambda: DECAYING(X), "the outside inputs of Decaying: gap, leak; outside= holds nothing"),
        (
            lambda: DECAYING(X, outside={"gap": GAP[..., 0], "leak": LEAK}),
            r"gap has shape \[6, 4\]; it must be \[T, B, 1 or H\] = \[6, 4, 1 or 4\]",
        ),
        (
            lambda: DECAYING(X, outside={"gap": GAP, "leak": LEAK[0]}),
            r"leak has shape \[1\]; it must be \[B, 1 or H\] = \[4, 1 or 4\]",
        ),
        (lambda: DECAYING(X, outside={"gap": GAP.double(), "leak": LEAK}), r"gap is torch.float64.*\.to\(x\)"),
        (lambda: tt.nn.Recurrent(len, I, H), "cell is builtin_function_or_method, not a Cell; give"),  # type: ignore[arg-type]
        (lambda: tt.nn.Recurrent(tt.GRU, 0, H), "input_size is 0; it must be a whole number from 1"),
        (lambda: tt.nn.Recurrent(tt.GRU, I, 2.0), "hidden_size is 2.0"),  # type: ignore[arg-type]
        (lambda: gru(num_layers=0), "num_layers is 0"),
        (lambda: gru(dropout=1.5), "dropout is 1.5; it must be a probability"),
        (lambda: gru(proj_size=2), "proj_size is 2, but GRU has no projection"),
        (lambda: tt.nn.Recurrent(tt.ProjectedLSTM, I, H), "ProjectedLSTM projects its state; say to how many units"),
        (lambda: tt.nn.Recurrent(Smoother, I, H), "Smoother uses x unit by unit, so layer 0 needs as many inputs"),
        (
            lambda: tt.nn.Recurrent(Smoother, I, I, num_layers=2, bidirectional=True),
            "layer 1 needs as many inputs as units, but it has 6 inputs and 3 units",
        ),
        (lambda: gru(target="abacus")(X), "'abacus'; the targets are"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(refused: Callable[[], Any], message: str) -> None:
    with pytest.raises(tt.ThroughtimeError, match=message):
        refused()


def test_dropout_that_does_nothing_is_said() -> None:
    with pytest.warns(UserWarning, match="with num_layers=1 it does nothing"):
        gru(dropout=0.5)
