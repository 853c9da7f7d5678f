"""throughtime.nn's RNN, LSTM and GRU are torch's in everything but the computation."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from agreement import assert_agree, run_with_gradients
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence

import throughtime as tt

KINDS: dict[str, tuple[type, type, dict[str, Any]]] = {
    "rnn-tanh": (torch.nn.RNN, tt.nn.RNN, {}),
    "rnn-relu": (torch.nn.RNN, tt.nn.RNN, {"nonlinearity": "relu"}),
    "gru": (torch.nn.GRU, tt.nn.GRU, {}),
    "lstm": (torch.nn.LSTM, tt.nn.LSTM, {}),
    "lstm-projected": (torch.nn.LSTM, tt.nn.LSTM, {"proj_size": 2}),
}
I, H, T, B = 3, 5, 6, 4

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


def pair(kind: str, **options: Any) -> tuple[torch.nn.Module, torch.nn.Module]:
    """torch's layer and ours with the same options, made after the same seed."""
    theirs, ours, own = KINDS[kind]
    torch.manual_seed(3)
    expected = theirs(I, H, **own, **options)
    torch.manual_seed(3)
    return expected, ours(I, H, **own, **options)


def state_for(layer: Any, rows: int | None, dtype: torch.dtype) -> Any:
    """A state that the layer accepts, [layers * D, rows, width], without rows where there is no batch."""
    lead = (layer.num_layers * (2 if layer.bidirectional else 1), *(() if rows is None else (rows,)))
    widths = [layer.proj_size or H, *([H] if isinstance(layer, torch.nn.LSTM) else [])]
    states = tuple(torch.randn(*lead, width, dtype=dtype, requires_grad=True) for width in widths)
    return states if len(states) > 1 else states[0]


PAIRWISE: list[dict[str, Any]] = [
    dict(zip(("num_layers", "bidirectional", "bias", "batch_first", "dtype"), row, strict=True))
    for row in [
        (1, False, False, False, torch.float32),
        (1, False, True, True, torch.float64),
        (1, True, False, True, torch.float64),
        (2, False, False, True, torch.float32),
        (2, True, True, False, torch.float64),
        (2, True, True, True, torch.float32),
    ]
]
"""Every pair of two options' values occurs in some row."""


def dense(batch_first: bool, dtype: torch.dtype) -> tuple[Any, int | None]:
    shape = (B, T, I) if batch_first else (T, B, I)
    return torch.randn(shape, dtype=dtype, requires_grad=True), B


def unbatched(batch_first: bool, dtype: torch.dtype) -> tuple[Any, int | None]:
    return torch.randn(T, I, dtype=dtype, requires_grad=True), None


def packed(batch_first: bool, dtype: torch.dtype) -> tuple[Any, int | None]:
    sequences = [torch.randn(length, I, dtype=dtype, requires_grad=True) for length in (3, 6, 1, 4)]
    return pack_sequence(sequences, enforce_sorted=False), 4


def packed_sorted(batch_first: bool, dtype: torch.dtype) -> tuple[Any, int | None]:
    return pack_sequence([torch.randn(length, I, dtype=dtype, requires_grad=True) for length in (5, 3, 3)]), 3


@pytest.mark.parametrize("given", [False, True], ids=["no-state", "state"])
@pytest.mark.parametrize("make", [dense, unbatched, packed, packed_sorted])
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_states_and_gradients_are_torchs(
    kind: str, make: Callable[[bool, torch.dtype], tuple[Any, int | None]], given: bool
) -> None:
    for options in PAIRWISE:
        expected, actual = pair(kind, **options)
        x, rows = make(options["batch_first"], options["dtype"])
        inputs = (x, state_for(expected, rows, options["dtype"])) if given else (x,)
        assert_agree(run_with_gradients(actual, *inputs), run_with_gradients(expected, *inputs), f"{kind} {options}")


@pytest.mark.parametrize("kind", KINDS)
def test_agrees_over_thirty_steps_at_a_hundred_units(kind: str) -> None:
    theirs, ours, own = KINDS[kind]
    torch.manual_seed(1)
    expected = theirs(12, 100, bidirectional=True, **own)
    actual = ours(12, 100, bidirectional=True, **own)
    actual.load_state_dict(expected.state_dict())
    x = torch.randn(30, 5, 12, requires_grad=True)
    assert_agree(run_with_gradients(actual, x), run_with_gradients(expected, x))


@pytest.mark.parametrize(("rows", "width", "steps"), [(1, 1, 1), (1, 17, 3), (0, 4, 2), (3, 1, 1)])
@pytest.mark.parametrize("kind", ["rnn-tanh", "gru", "lstm"])
def test_odd_sizes_are_torchs(kind: str, rows: int, width: int, steps: int) -> None:
    theirs, ours, own = KINDS[kind]
    expected, actual = theirs(I, width, **own), ours(I, width, **own)
    actual.load_state_dict(expected.state_dict())
    x = torch.randn(steps, rows, I, requires_grad=True)
    assert_agree(run_with_gradients(actual, x), run_with_gradients(expected, x))


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_draws_the_same_values(kind: str) -> None:
    expected, actual = pair(kind, num_layers=2, bidirectional=True)
    assert list(actual.state_dict()) == list(expected.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(actual.parameters(), expected.parameters(), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_state_dicts_go_both_ways(kind: str) -> None:
    expected, actual = pair(kind, num_layers=2, bidirectional=True)
    x = torch.randn(T, B, I)
    with torch.no_grad():
        for parameter in actual.parameters():
            parameter.normal_()
    expected.load_state_dict(actual.state_dict())
    assert_agree(actual(x), expected(x))
    torch.nn.init.normal_(next(expected.parameters()))
    actual.load_state_dict(expected.state_dict())
    assert_agree(actual(x), expected(x))


def test_dropout_between_layers_acts_as_torchs_though_by_masks_of_its_own() -> None:
    """Over many draws the mean and the variance of the output are torch's; without training there is none."""
    expected, actual = pair("gru", num_layers=2, dropout=0.5)
    x = torch.randn(T, 1, I).expand(T, 4000, I)
    with torch.no_grad():
        wanted, found = expected(x)[0][-1], actual(x)[0][-1]
    error = (wanted.var(0) / len(wanted)).sqrt()
    assert ((found.mean(0) - wanted.mean(0)).abs() < 6 * error).all()
    assert (found.var(0) / wanted.var(0) - 1).abs().max() < 0.15
    assert_agree(actual.eval()(x), expected.eval()(x))


# ---------------------------------------------------------------------------------------------------------------------
# Messages


def tensor(*shape: int, **options: Any) -> Tensor:
    return torch.zeros(*shape, **options)


def short_pack() -> Any:
    return pack_sequence([tensor(2, I), tensor(3, I)], enforce_sorted=False)


BAD_CALLS: dict[str, tuple[Callable[[], tuple[Any, ...]], str]] = {
    "x of one dimension": (lambda: (tensor(I),), "all"),
    "x of four dimensions": (lambda: (tensor(1, T, B, I),), "all"),
    "x of another width": (lambda: (tensor(T, B, I + 1),), "all"),
    "x of another width, unbatched": (lambda: (tensor(T, I + 1),), "all"),
    "x of another type": (lambda: (tensor(T, B, I, dtype=torch.float64),), "all"),
    "x no tensor": (lambda: ([[1.0]],), "all"),
    "x without steps": (lambda: (tensor(0, B, I),), "all"),
    "x elsewhere": (lambda: (tensor(T, B, I, device="meta"),), "all"),
    "packed x of another width": (lambda: (pack_sequence([tensor(2, I + 1)]),), "single"),
    "packed x of another type": (lambda: (pack_sequence([tensor(2, I).double()]),), "single"),
    "state without a batch": (lambda: (tensor(T, B, I), tensor(1, H)), "single"),
    "state with a batch, x without": (lambda: (tensor(T, I), tensor(1, 1, H)), "single"),
    "state of another batch": (lambda: (tensor(T, B, I), tensor(1, B + 1, H)), "single"),
    "state of another width": (lambda: (tensor(T, B, I), tensor(1, B, H + 1)), "single"),
    "state of more layers": (lambda: (tensor(T, B, I), tensor(2, B, H)), "single"),
    "state of more layers, unbatched": (lambda: (tensor(T, I), tensor(2, H)), "single"),
    "state of another type": (lambda: (tensor(T, B, I), tensor(1, B, H).double()), "single"),
    "state elsewhere": (lambda: (tensor(T, B, I), tensor(1, B, H, device="meta")), "single"),
    "state a tuple": (lambda: (tensor(T, B, I), (tensor(1, B, H),)), "single"),
    "state of a larger batch, packed": (lambda: (pack_sequence([tensor(2, I)]), tensor(1, 3, H)), "single"),
    "state of a smaller batch, packed": (lambda: (short_pack(), tensor(1, 1, H)), "single"),
    "state without a batch, packed": (lambda: (short_pack(), tensor(1, H)), "single"),
    "pair without a batch": (lambda: (tensor(T, B, I), (tensor(1, H), tensor(1, H))), "pair"),
    "pair with a batch, x without": (lambda: (tensor(T, I), (tensor(1, 1, H), tensor(1, 1, H))), "pair"),
    "pair with a bad h": (lambda: (tensor(T, B, I), (tensor(1, B, H + 1), tensor(1, B, H))), "pair"),
    "pair with a bad c": (lambda: (tensor(T, B, I), (tensor(1, B, H), tensor(2, B, H))), "pair"),
    "pair of another type": (lambda: (tensor(T, B, I), (tensor(1, B, H).double(),) * 2), "pair"),
    "one state for two": (lambda: (tensor(T, B, I), (tensor(1, B, H),)), "pair"),
    "three states for two": (lambda: (tensor(T, B, I), (tensor(1, B, H),) * 3), "pair"),
    "a tensor for a pair": (lambda: (tensor(T, B, I), tensor(1, B, H)), "pair"),
    "a stacked tensor for a pair": (lambda: (tensor(T, B, I), tensor(2, 1, B, H)), "pair"),
    "pair of a smaller batch, packed": (lambda: (short_pack(), (tensor(1, 1, H),) * 2), "pair"),
    "pair without a batch, packed": (lambda: (short_pack(), (tensor(1, H),) * 2), "pair"),
}


def outcome(layer: Callable[..., Any], arguments: tuple[Any, ...], **options: Any) -> tuple[type, str]:
    with pytest.raises(Exception) as refusal:  # noqa: PT011
        layer(*arguments, **options)
    return refusal.type, str(refusal.value)


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls_get_torchs_own_messages(case: str) -> None:
    make, whose = BAD_CALLS[case]
    kinds = {"all": KINDS, "single": ["rnn-tanh", "rnn-relu", "gru"], "pair": ["lstm"]}[whose]
    for kind in kinds:
        for batch_first in (False, True):
            expected, actual = pair(kind, batch_first=batch_first)
            arguments = make()
            if case == "x without steps" and batch_first:
                arguments = (tensor(B, 0, I),)
            assert outcome(actual, arguments) == outcome(expected, arguments), kind


def test_packed_input_of_an_lstm_is_checked_where_torch_reads_past_its_end() -> None:
    layer = tt.nn.LSTM(I, H)
    for bad, message in [
        (pack_sequence([tensor(2, I + 1)]), "input.size(-1) must be equal to input_size. Expected 3, got 4"),
        (pack_sequence([tensor(2, I).double()]), "RNN input dtype (torch.float64) does not match weight dtype"),
    ]:
        assert outcome(layer, (bad,))[1].startswith(message)
    state = (tensor(1, 3, H),) * 2
    assert outcome(layer, (pack_sequence([tensor(2, I)]), state))[1] == (
        f"Expected hidden[0] size (1, 1, {H}), got [1, 3, {H}]"
    )


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ((I, H), {"num_layers": 0}),
        ((I, H), {"dropout": 2.0}),
        ((I, H), {"bias": 1}),
        ((0, H), {}),
        ((I, -1), {}),
        ((2.5, H), {}),
        ((I, H), {"proj_size": H}),
        ((I, H), {"nonlinearity": "sine"}),
        ((I,), {}),
    ],
)
@pytest.mark.parametrize("kind", ["rnn-tanh", "gru", "lstm"])
def test_bad_options_get_torchs_own_messages(kind: str, sizes: tuple[Any, ...], options: dict[str, Any]) -> None:
    theirs, ours, own = KINDS[kind]
    expected, actual = outcome(theirs, sizes, **own, **options), outcome(ours, sizes, **own, **options)
    assert actual == expected


# ---------------------------------------------------------------------------------------------------------------------
# As parts of models


def test_copies_saved_files_and_functional_calls_compute_the_same(tmp_path: Any) -> None:
    layer = tt.nn.GRU(I, H, num_layers=2)
    x = torch.randn(T, B, I)
    assert_agree(copy.deepcopy(layer)(x), layer(x))
    stored = io.BytesIO()
    torch.save(layer, stored)
    stored.seek(0)
    assert_agree(torch.load(stored, weights_only=False)(x), layer(x))
    doubled = {name: parameter * 2 for name, parameter in layer.named_parameters()}
    other = copy.deepcopy(layer)
    other.load_state_dict(doubled)
    assert_agree(torch.func.functional_call(layer, doubled, (x,)), other(x))


def test_lengths_and_resets_are_taken_too() -> None:
    layer = tt.nn.LSTM(I, H, bidirectional=True, batch_first=True, bias=False)
    x = torch.randn(2, T, I)
    output, (h, c) = layer(x, lengths=[4, T])
    alone, (h_alone, c_alone) = layer(x[:1, :4])
    assert_agree(output[:1, :4], alone)
    assert_agree((h[:, :1], c[:, :1]), (h_alone, c_alone))
    reset = torch.zeros(2, T, dtype=torch.bool)
    reset[:, 2] = True
    first, second = layer(x[:, :2])[0], layer(x[:, 2:])[0]
    assert_agree(layer(x, reset=reset)[0], torch.cat([first, second], 1))
    with pytest.raises(tt.ShapeError, match=r"lengths\[1\] is 9, but the input has 6 steps"):
        layer(x, lengths=[1, 9])


def test_the_target_that_was_asked_for_runs_it() -> None:
    layer = tt.nn.GRU(I, H)
    x = torch.randn(T, B, I)
    layer.target = "reference"
    assert "reference: the argument target= asks for it" in tt.explain(layer, x)[0]
    layer.target = "abacus"
    with pytest.raises(tt.TargetError, match="'abacus'; the targets are"):
        layer(x)


@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_under_autocast_a_layer_computes_in_its_own_dtype(kind: str) -> None:
    layer = KINDS[kind][1](I, H)
    x = torch.randn(T, B, I)
    state = state_for(layer, B, torch.float32)
    low: Any = tuple(s.bfloat16() for s in state) if kind == "lstm" else state.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        result = layer(x, state)
        rounded = layer(x.bfloat16(), low)
        mixed = layer(x, low)
    assert_agree(result, layer(x, state))
    wide = tuple(s.float() for s in low) if kind == "lstm" else low.float()
    assert_agree(rounded, layer(x.bfloat16().float(), wide))
    assert_agree(mixed, layer(x, wide))
