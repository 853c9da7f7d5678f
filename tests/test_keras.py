"""Live Keras layers as ours and ours as Keras's: the same outputs, final states and gradients, or a refusal by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from agreement import assert_agree, tensors_in
from keras_peer import FEATURES, LENGTHS, in_keras_layout, inputs, keras, randomised, sequential, values, weighted
from torch import Tensor

import throughtime as tt
from throughtime.equations.catalogue import CELLS
from throughtime.interop.keras import Stack, from_keras, mask_lengths, to_keras
from throughtime.interop.keras.activations import ACTIVATIONS

layers = keras.layers
Made = Callable[..., Any]
KINDS: dict[str, tuple[Made, tt.Cell | None]] = {
    "SimpleRNN": (layers.SimpleRNN, tt.Elman),
    "GRU, reset after": (layers.GRU, tt.GRU),
    "GRU, reset before": (lambda *a, **k: layers.GRU(*a, reset_after=False, **k), tt.GRUResetBefore),
    "LSTM": (layers.LSTM, tt.LSTM),
    "SimpleRNN, no bias": (lambda *a, **k: layers.SimpleRNN(*a, use_bias=False, **k), None),
    "GRU, no bias": (lambda *a, **k: layers.GRU(*a, use_bias=False, **k), None),
    "GRU, reset before, no bias": (lambda *a, **k: layers.GRU(*a, use_bias=False, reset_after=False, **k), None),
    "LSTM, no bias": (lambda *a, **k: layers.LSTM(*a, use_bias=False, **k), None),
    "SimpleRNN, relu": (lambda *a, **k: layers.SimpleRNN(*a, activation="relu", **k), tt.Elman(activation=tt.relu)),
    "LSTM, softsign and hard_sigmoid": (
        lambda *a, **k: layers.LSTM(*a, activation="softsign", recurrent_activation="hard_sigmoid", **k),
        None,
    ),
    "GRU, elu and linear": (
        lambda *a, **k: layers.GRU(*a, activation="elu", recurrent_activation=None, **k),
        None,
    ),
}


def states_of(h_n: Any, bidirectional: bool) -> list[Tensor]:
    """Our final states in Keras's order: every state of the forward direction, then of the backward one."""
    return [state[direction] for direction in range(1 + bidirectional) for state in tensors_in(h_n)]


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("sequences", [True, False], ids=["sequences", "last"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["forward", "both"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_is_keras_s(kind: str, bidirectional: bool, sequences: bool, masked: bool):
    make, cell = KINDS[kind]
    theirs = make(4, return_sequences=sequences, return_state=True)
    theirs = randomised(layers.Bidirectional(theirs) if bidirectional else theirs)
    ours = from_keras(theirs)
    assert isinstance(ours, tt.nn.Recurrent)
    assert cell is None or ours.cell == cell
    ours.target = None if cell in CELLS.values() else "stepwise"  # which compiles nothing

    x, mask = inputs()
    output, *states = theirs(x, mask=mask if masked else None)
    if sequences and masked:
        output = torch.where(mask[..., None], output, 0.0)
    expected = torch.autograd.grad(weighted([output, *states]), [x, *values(theirs)])

    lengths = mask_lengths(mask) if masked else None
    steps, h_n = ours(x, lengths=lengths)
    found_states = states_of(h_n, bidirectional)
    half = len(found_states) // 2
    last = torch.cat([found_states[0], found_states[half]], -1) if bidirectional else found_states[0]
    found_output = steps if sequences else last
    assert_agree(found_output, output, "output")
    assert_agree(found_states, states, "states")

    named = dict(ours.named_parameters())
    gradients = torch.autograd.grad(weighted([found_output, *found_states]), [x, *named.values()])
    by_name = dict(zip(named, gradients[1:], strict=True))
    one_bias = kind != "GRU, reset after" and kind != "GRU, elu and linear"
    arranged = [
        gradient
        for suffix in ("", "_reverse")[: 1 + bidirectional]
        for gradient in in_keras_layout(by_name, suffix=suffix, one_bias=one_bias)
    ]
    assert_agree([gradients[0], *arranged], list(expected), "gradients")


@pytest.mark.parametrize("kind", ["SimpleRNN", "GRU, reset after", "GRU, reset before", "LSTM"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["forward", "both"])
def test_initial_states_enter_as_keras_s(kind: str, bidirectional: bool):
    theirs = KINDS[kind][0](4, return_sequences=True, return_state=True)
    theirs = randomised(layers.Bidirectional(theirs) if bidirectional else theirs)
    ours = from_keras(theirs)
    x, _ = inputs()
    assert isinstance(ours, tt.nn.Recurrent)
    kinds = len(ours.cell.states)
    given = [torch.randn(len(LENGTHS), 4) for _ in range(kinds * (1 + bidirectional))]
    output, *states = theirs(x, initial_state=given)
    stacked = tuple(torch.stack(given[state::kinds]) for state in range(kinds))
    found, h_n = ours(x, stacked if kinds > 1 else stacked[0])
    assert_agree([found, *states_of(h_n, bidirectional)], [output, *states])


@pytest.mark.parametrize("sequences", [True, False], ids=["sequences", "last"])
@pytest.mark.parametrize("merge", ["concat", "sum", "mul", "ave", None])
def test_directions_merge_as_keras_s(merge: str | None, sequences: bool):
    inner = layers.LSTM(4, return_sequences=sequences)
    theirs = randomised(layers.Bidirectional(inner, merge_mode=merge))
    model = keras.Sequential([keras.Input((None, FEATURES)), theirs]) if merge else theirs
    ours = from_keras(model)
    assert isinstance(ours, Stack)
    x, mask = inputs()
    expected = theirs(x, mask=mask)
    found, _ = ours(x, lengths=LENGTHS)
    assert_agree(tensors_in(found), tensors_in(expected))


def test_a_model_of_unlike_layers_is_a_stack_with_its_states():
    def made(**constants: Any) -> list[Any]:
        wanted: list[tuple[type, int, dict[str, Any]]] = [
            (layers.GRU, 5, {}),
            (layers.GRU, 5, {}),
            (layers.LSTM, 4, {}),
            (layers.SimpleRNN, 6, {"activation": "relu"}),
        ]
        return [made(units, return_sequences=True, **said, **constants) for made, units, said in wanted]

    model = sequential(*made())
    x, mask = inputs()
    steps, states, weights = x, [], []
    for layer, twin in zip(model.layers, made(return_state=True), strict=True):
        twin.build((None, None, layer.cell.kernel.shape[0]))
        for variable, source in zip(twin.weights, layer.weights, strict=True):
            variable.value.data.copy_(source.value)
        steps, *final = twin(steps, mask=mask)
        states.append(final)
        weights += values(twin)

    ours = from_keras(model)
    assert isinstance(ours, Stack)
    held = [layer for layer in ours.layers if isinstance(layer, tt.nn.Recurrent)]
    assert [(layer.cell, layer.num_layers) for layer in held] == [
        (tt.GRU, 2),
        (tt.LSTM, 1),
        (tt.Elman(activation=tt.relu), 1),
    ]
    output, h_n = ours(x, lengths=LENGTHS)
    assert_agree(output, torch.where(mask[..., None], steps, 0.0), "output")
    found_states = [h_n[0][0], h_n[0][1], h_n[1][0][0], h_n[1][1][0], h_n[2][0]]
    assert_agree(found_states, [state for final in states for state in final], "states")

    loss = weighted([torch.where(mask[..., None], steps, 0.0), *(state for final in states for state in final)])
    expected = torch.autograd.grad(loss, [x, *weights])
    named = dict(ours.named_parameters())
    gradients = torch.autograd.grad(weighted([output, *found_states]), [x, *named.values()])
    by_name = dict(zip(named, gradients[1:], strict=True))
    arranged: list[Tensor] = []
    for place, depth, one_bias in ((0, 0, False), (0, 1, False), (1, 0, True), (2, 0, True)):
        inside = {n.removeprefix(f"layers.{place}."): g for n, g in by_name.items() if n.startswith(f"layers.{place}.")}
        arranged += in_keras_layout(inside, depth, one_bias=one_bias)
    assert_agree([gradients[0], *arranged], list(expected), "gradients")


def test_initial_states_of_a_stack_are_one_for_each_of_its_layers():
    model = randomised(
        keras.Sequential([keras.Input((None, FEATURES)), layers.GRU(5, return_sequences=True), layers.LSTM(4)])
    )
    ours = from_keras(model)
    x, _ = inputs()
    _, after = ours(x[:, :3])
    resumed, _ = ours(x[:, 3:], after)
    assert_agree(resumed, ours(x)[0])
    with pytest.raises(tt.ShapeError, match="h_0 has 1 entries; a Stack of 2 layers"):
        ours(x, after[:1])


def test_a_masking_layer_finds_the_lengths():
    stacked = [layers.Masking(-1.0), layers.Bidirectional(layers.GRU(4, return_sequences=True)), layers.LSTM(5)]
    model = sequential(*stacked)
    x, mask = inputs()
    padded = torch.where(mask[..., None], x, -1.0).detach()
    ours = from_keras(model)
    assert_agree(ours(padded)[0], model(padded))
    assert_agree(ours(padded)[0], ours(x, lengths=LENGTHS)[0])
    assert_agree(to_keras(ours)(padded), model(padded))


def test_at_masked_steps_keras_repeats_and_ours_is_zero():
    theirs = randomised(layers.GRU(4, return_sequences=True))
    x, mask = inputs()
    output, (found, _) = theirs(x, mask=mask), from_keras(theirs)(x, lengths=mask_lengths(mask))
    row, length = 1, LENGTHS[1]
    assert torch.equal(output[row, length:], output[row, length - 1].expand(max(LENGTHS) - length, -1))
    assert not found[row, length:].any()


# -- masks ------------------------------------------------------------------------------------------------------------


def test_a_mask_of_leading_steps_is_its_lengths():
    embedding = layers.Embedding(9, 2, mask_zero=True)
    tokens = torch.tensor([[4, 1, 0, 0], [0, 0, 0, 0], [1, 2, 3, 4]])
    assert mask_lengths(embedding.compute_mask(tokens)).tolist() == [2, 0, 4]
    assert mask_lengths([[True, False]]).tolist() == [1]


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        ([[1, 1], [0, 1]], r"row 1 of the mask begins with padding and counts step 1.*padding='post'"),
        ([[1, 0, 0, 1]], r"row 0 of the mask leaves out step 1 and counts step 3.*move the steps"),
    ],
)
def test_a_mask_with_holes_is_refused_where_the_hole_is(mask: list[list[int]], said: str):
    with pytest.raises(tt.ShapeError, match=said):
        mask_lengths(torch.tensor(mask).bool())


@pytest.mark.parametrize("mask", [torch.ones(2, 3), torch.ones(3).bool(), "abc", [["a"]], None])
def test_what_is_no_mask_is_refused(mask: Any):
    with pytest.raises(tt.ShapeError, match="the mask"):
        mask_lengths(mask)


# -- activations ------------------------------------------------------------------------------------------------------

POINTS = [-40.0, -6.0, -3.0, -2.5, -1.0, -0.3, 0.0, 0.3, 1.0, 2.5, 3.0, 6.0, 40.0]


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_is_keras_s_at_its_corners_too(name: str):
    theirs = layers.SimpleRNN(len(POINTS), activation=name)
    theirs.build((None, None, len(POINTS)))
    for variable, value in zip(values(theirs), (torch.eye(len(POINTS)), 0.0, 0.0), strict=True):
        variable.data.copy_(torch.as_tensor(value))
    x = torch.tensor(POINTS)[None, None].requires_grad_()
    expected = keras.activations.get(name)(x)
    ours = from_keras(theirs)
    assert isinstance(ours, tt.nn.Recurrent)
    ours.target = "stepwise"  # the derived equations, without a compilation for each
    found, _ = ours(x)
    assert_agree(found, expected, "values")
    assert_agree(torch.autograd.grad(found.sum(), x), torch.autograd.grad(expected.sum(), x), "derivatives")


def test_every_activation_of_keras_is_known_or_refused_by_name():
    names = set(keras.src.activations.ALL_OBJECTS_DICT)
    assert set(ACTIVATIONS) <= names
    for name in names:
        layer = layers.LSTM(2, recurrent_activation=name, name="told")
        layer.build((None, None, 2))
        if name in {*ACTIVATIONS, "swish", "hard_swish"}:
            assert isinstance(from_keras(layer), tt.nn.Recurrent)
        else:
            with pytest.raises(tt.InteropError, match=f"layer 'told': recurrent_activation='{name}'"):
                from_keras(layer)


def tanh(a: Tensor) -> Tensor:
    """Named as Keras's, and another function."""
    return torch.sin(a)


@pytest.mark.parametrize("function", [tanh, lambda a: a, layers.LeakyReLU(0.1)], ids=["own", "lambda", "object"])
def test_an_activation_of_ones_own_is_refused(function: Any):
    with pytest.raises(tt.InteropError, match=r"layer 'mine': activation is .*under @throughtime.cell"):
        from_keras(randomised(layers.GRU(2, activation=function, name="mine")))


# -- refusals and warnings --------------------------------------------------------------------------------------------


class OwnLSTM(layers.LSTM):  # type: ignore[name-defined]
    """A subclass, which may compute anything."""


def functional() -> Any:
    x = keras.Input((None, FEATURES))
    return keras.Model(x, layers.Dense(2)(layers.GRU(4, name="inside")(x)))


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "unbuilt": (lambda: layers.LSTM(4, name="a"), r"layer 'a' has no weights yet; call it"),
    "backwards": (
        lambda: randomised(layers.LSTM(4, go_backwards=True, name="a")),
        r"layer 'a': go_backwards=True outside a Bidirectional; .*x\.flip\(1\)",
    ),
    "half": (
        lambda: randomised(layers.LSTM(4, dtype="float16", recurrent_initializer="zeros", name="a")),
        r"layer 'a': kernel holds float16; .*cast the Keras model",
    ),
    "bfloat16": (
        lambda: randomised(layers.LSTM(4, dtype="bfloat16", recurrent_initializer="zeros", name="a")),
        r"layer 'a': kernel holds bfloat16; .*cast the Keras model",
    ),
    "subclass": (lambda: OwnLSTM(4, name="a"), r"layer 'a' is test_keras\.OwnLSTM, and SimpleRNN, GRU, LSTM"),
    "cell": (lambda: randomised(layers.RNN(layers.LSTMCell(4), name="a")), r"layer 'a' is RNN, and SimpleRNN"),
    "dense": (
        lambda: sequential(layers.GRU(4, name="g"), layers.Dense(2, name="d")),
        r'layer \'d\' is Dense, .*layer="g"',
    ),
    "functional": (functional, r'is Functional, .*layer="inside"'),
    "empty": (lambda: sequential(), r"layer 'sequential.*' holds no recurrent layer"),
    "no model": (lambda: torch.nn.LSTM(2, 2), r"layer None is torch\.nn\.modules\.rnn\.LSTM"),
    "path": (lambda: "model.keras", r"load reads model\.keras"),
    "unlike directions": (
        lambda: randomised(
            layers.Bidirectional(layers.LSTM(4), backward_layer=layers.LSTM(5, go_backwards=True), name="b")
        ),
        r"layer 'b': units is 4 forward and 5 backward",
    ),
    "unlike cells": (
        lambda: randomised(
            layers.Bidirectional(layers.LSTM(4), backward_layer=layers.GRU(4, go_backwards=True), name="b")
        ),
        r"layer 'b': class is 'LSTM' forward and 'GRU' backward",
    ),
    "turned round": (
        lambda: randomised(
            layers.Bidirectional(layers.LSTM(4, go_backwards=True), backward_layer=layers.LSTM(4), name="b")
        ),
        r"layer 'b': its forward layer must have go_backwards=False",
    ),
    "masking later": (
        lambda: sequential(layers.GRU(4, return_sequences=True), layers.Masking(name="m"), layers.GRU(4)),
        r"layer 'm' is Masking",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_ours_cannot_say_is_refused_by_name(case: str):
    make, said = REFUSED[case]
    with pytest.raises(tt.InteropError, match=said) as refusal:
        from_keras(make())
    assert "\n" not in str(refusal.value)


def test_one_layer_is_taken_out_of_any_model():
    model = functional()
    x, _ = inputs()
    assert_agree(from_keras(model, layer="inside")(x)[1][0], model.get_layer("inside")(x))
    with pytest.raises(tt.InteropError, match="no layer 'outside'; its recurrent layers: inside"):
        from_keras(model, layer="outside")
    with pytest.raises(tt.InteropError, match="is Dense"):
        from_keras(model, layer=model.layers[-1].name)


@pytest.mark.parametrize(
    ("constants", "said"),
    [
        ({"dropout": 0.5}, "layer 'a': dropout=0.5 act in training only"),
        ({"recurrent_dropout": 0.25, "kernel_regularizer": "l2"}, "recurrent_dropout=0.25, kernel_regularizer act"),
        ({"bias_constraint": "unit_norm", "trainable": False}, "bias_constraint, trainable=False act"),
        ({"stateful": True}, "layer 'a': stateful=True is not carried over; every call of ours begins at h_0"),
        ({"dtype": "mixed_float16"}, "layer 'a': its dtype is mixed_float16; ours computes in the type of its weights"),
    ],
)
def test_what_is_not_carried_is_said(constants: dict[str, Any], said: str):
    layer = layers.LSTM(4, name="a", **constants)
    layer.build((2, None, FEATURES))
    with pytest.warns(UserWarning, match=said):
        from_keras(layer)


# -- ours as Keras's --------------------------------------------------------------------------------------------------


def layer_of(cell: tt.Cell, depth: int, both: bool) -> tt.nn.Layer:
    return tt.nn.Recurrent(cell, FEATURES, 4, num_layers=depth, bidirectional=both, batch_first=True)


OURS: dict[str, Callable[[], tt.nn.Layer]] = {
    **{
        f"{cell.name}, {depth} deep, {1 + both} directions": partial(layer_of, cell, depth, both)
        for cell, depth, both in product((tt.Elman, tt.GRU, tt.GRUResetBefore, tt.LSTM), (1, 2), (False, True))
    },
    "drop-in RNN": lambda: tt.nn.RNN(FEATURES, 4, nonlinearity="relu", batch_first=True),
    "drop-in GRU": lambda: tt.nn.GRU(FEATURES, 4, bias=False, num_layers=2, batch_first=True),
    "drop-in LSTM": lambda: tt.nn.LSTM(FEATURES, 4, bidirectional=True, batch_first=True),
    "own activations": lambda: tt.nn.Recurrent(
        tt.LSTM(activation=ACTIVATIONS["mish"], gate=ACTIVATIONS["hard_sigmoid"]), FEATURES, 4, batch_first=True
    ),
}


@pytest.mark.parametrize("name", OURS)
def test_our_layer_is_keras_s_and_comes_back(name: str):
    ours = OURS[name]()
    theirs = to_keras(ours)
    x, _ = inputs()
    output, _ = ours(x)
    assert_agree(theirs(x), output)
    back = from_keras(theirs)
    found, _ = back(x)
    assert_agree(found, output)
    inner = back.layers[0] if isinstance(back, Stack) else back
    assert isinstance(inner, tt.nn.Recurrent)
    assert (inner.cell, inner.num_layers) == (ours.cell, ours.num_layers)


def test_weights_of_float64_are_carried_whole():
    """Weights, not outputs: Keras's torch back end multiplies matrices of float64 in float32."""
    ours = tt.nn.GRU(FEATURES, 4, bidirectional=True, dtype=torch.float64)
    theirs = to_keras(ours)
    assert {variable.dtype for variable in theirs.weights} == {"float64"}
    back = from_keras(theirs)
    assert_agree(dict(back.state_dict()), dict(ours.state_dict()))
    named = dict(ours.named_parameters())
    arranged = [t for suffix in ("", "_reverse") for t in in_keras_layout(named, suffix=suffix, one_bias=False)]
    assert all(torch.equal(*pair) for pair in zip(arranged, values(theirs), strict=True))


def test_keras_s_views_of_the_output_are_asked_for():
    ours = tt.nn.Recurrent(tt.LSTM, FEATURES, 4, batch_first=True)
    x, _ = inputs()
    output, (h_n, c_n) = ours(x)
    assert_agree(to_keras(ours, return_sequences=False, return_state=True)(x), [output[:, -1], h_n[0], c_n[0]])
    deep = tt.nn.Recurrent(tt.LSTM, FEATURES, 4, batch_first=True, num_layers=2)
    assert_agree(to_keras(deep, return_sequences=False)(x), deep(x)[0][:, -1])
    with pytest.raises(tt.InteropError, match="return_state=True: a Keras Sequential has one output"):
        to_keras(deep, return_state=True)


@pytest.mark.parametrize("merge", ["sum", "mul", "ave"])
def test_a_stack_comes_back_as_it_was(merge: str):
    model = randomised(
        sequential(layers.Bidirectional(layers.GRU(4, return_sequences=True), merge_mode=merge), layers.LSTM(5))
    )
    x, _ = inputs()
    assert_agree(to_keras(from_keras(model))(x), model(x))


@tt.cell(states="h")
def MinimalGated(x, h, W, U, b):
    f = tt.sigmoid(W.f @ x + b.f + U.f @ h)
    return (1 - f) * h + f * tt.tanh(W.n @ x + b.n + U.n @ (f * h))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: tt.nn.Recurrent(MinimalGated, 3, 4), "MinimalGated is no cell of Keras's"),
        (lambda: tt.nn.Recurrent(tt.ProjectedLSTM, 3, 4, proj_size=2), "ProjectedLSTM is no cell of Keras's"),
        (lambda: tt.nn.Recurrent(tt.GRU, 3, 4, learn_initial=True), "learn_initial=True: Keras learns no"),
        (lambda: tt.nn.GRU(3, 4, dtype=torch.bfloat16), r"parameters are torch\.bfloat16; convert it"),
        (lambda: torch.nn.GRU(3, 4), "takes a recurrent layer or a Stack, not GRU"),
    ],
)
def test_what_keras_cannot_say_is_refused_by_name(make: Callable[[], Any], said: str):
    with pytest.raises(tt.InteropError, match=said):
        to_keras(make())


def test_dropout_between_our_layers_is_not_carried_and_said():
    with pytest.warns(UserWarning, match=r"dropout=0\.3 between layers acts in training only"):
        to_keras(tt.nn.GRU(3, 4, num_layers=2, dropout=0.3))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (([], []), "a Stack of 0 layers"),
        (([tt.nn.Recurrent(tt.GRU, 3, 4)], ["concat"]), "batch_first=True"),
        (([tt.nn.Recurrent(tt.GRU, 3, 4, batch_first=True)], ["sum"]), "merge 0 of a Stack is 'sum'"),
        (
            ([tt.nn.Recurrent(tt.GRU, 3, 4, batch_first=True)] * 2, ["concat"] * 2),
            "layer 1 of a Stack takes 3 features",
        ),
        (
            ([tt.nn.Recurrent(tt.GRU, 4, 4, batch_first=True, bidirectional=True)] * 2, [None, "sum"]),
            "only the last may be",
        ),
    ],
)
def test_a_stack_of_what_does_not_fit_is_refused(arguments: Any, said: str):
    with pytest.raises(tt.InteropError, match=said):
        Stack(*arguments)
    with pytest.raises(tt.ShapeError, match=r"a Stack takes a tensor \[B, T, I\]"):
        Stack([tt.nn.Recurrent(tt.GRU, 3, 4, batch_first=True)], ["concat"])(torch.zeros(3))
