"""Read-outs see what they should and nothing else; the ragged loss is the lecture's sum, untouched by padding."""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import pytest
import torch
from agreement import assert_agree
from torch import Tensor
from torch.nn import functional

import throughtime as tt

T, B, F, I, C = 6, 4, 8, 3, 5
LENGTHS = [4, 6, 0, 1]


def past_the_ends(shape: tuple[int, ...], value: float) -> Tensor:
    """Random numbers, with `value` past each sequence's end."""
    tensor = torch.randn(T, B, *shape, dtype=torch.float64)
    for row, length in enumerate(LENGTHS):
        tensor[length:, row] = value
    return tensor


def gradients(value: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(value, inputs)


def test_per_step_is_an_affine_map_of_state_and_input() -> None:
    head = tt.nn.PerStep(F, C, input_size=I)
    outputs, x = torch.randn(T, B, F), torch.randn(T, B, I)
    weight, bias = head.linear.weight, head.linear.bias
    assert_agree(head(outputs, x), outputs @ weight[:, :F].T + x @ weight[:, F:].T + bias)
    assert_agree(head(outputs[:, 0], x[:, 0]), head(outputs, x)[:, 0])


@pytest.mark.parametrize("batch_first", [False, True])
def test_per_step_reads_no_input_past_the_ends(batch_first: bool) -> None:
    head = tt.nn.PerStep(F, C, input_size=I, batch_first=batch_first).double()
    outputs, clean = past_the_ends((F,), 0.0), past_the_ends((I,), 0.0)
    dirty = clean.masked_fill(clean == 0.0, math.nan)
    found = []
    for x in (clean, dirty):
        given = (outputs.transpose(0, 1), x.transpose(0, 1)) if batch_first else (outputs, x)
        logits = head(*given, lengths=LENGTHS)
        found.append((logits, gradients(logits.sin().sum(), *head.parameters())))
    assert_agree(found[1], found[0])
    last = found[0][0].transpose(0, 1) if batch_first else found[0][0]
    assert_agree(last[5, 0], head.linear.bias)


def test_last_step_reads_each_direction_where_it_has_read_everything() -> None:
    layer = tt.nn.Recurrent(tt.GRU, I, F // 2, bidirectional=True)
    head = tt.nn.LastStep(F, C, bidirectional=True)
    x = torch.randn(T, B, I)
    lengths = [4, 6, 2, 1]
    outputs, h_n = layer(x, lengths=lengths)
    assert_agree(head(outputs, lengths), head.linear(torch.cat([h_n[0], h_n[1]], -1)))
    alone = [head(layer(x[:length, row : row + 1])[0]) for row, length in enumerate(lengths)]
    assert_agree(head(outputs, lengths), torch.cat(alone))


def test_last_step_sees_the_input_at_the_true_last_step() -> None:
    head = tt.nn.LastStep(F, C, input_size=I)
    outputs, x = torch.randn(T, B, F), torch.randn(T, B, I)
    expected = [torch.cat([outputs[n - 1, row], x[n - 1, row]]) for row, n in enumerate([4, 6, 2, 1])]
    assert_agree(head(outputs, [4, 6, 2, 1], x), head.linear(torch.stack(expected)))
    assert_agree(head(outputs, None, x), head(outputs, [T] * B, x))


def test_last_step_takes_batch_first_as_time_first() -> None:
    torch.manual_seed(1)
    first = tt.nn.LastStep(F, C, input_size=I, bidirectional=True)
    second = tt.nn.LastStep(F, C, input_size=I, bidirectional=True, batch_first=True)
    second.load_state_dict(first.state_dict())
    outputs, x = torch.randn(T, B, F), torch.randn(T, B, I)
    assert_agree(second(outputs.transpose(0, 1), LENGTHS, x.transpose(0, 1)), first(outputs, LENGTHS, x))


@pytest.mark.parametrize("bidirectional", [False, True])
def test_last_step_reads_nothing_past_the_ends_and_an_empty_sequence_gives_the_bias(bidirectional: bool) -> None:
    head = tt.nn.LastStep(F, C, input_size=I, bidirectional=bidirectional).double()
    outputs, x = past_the_ends((F,), math.nan).requires_grad_(), past_the_ends((I,), math.nan).requires_grad_()
    logits = head(outputs, LENGTHS, x)
    assert_agree(logits[2], head.linear.bias)
    found = gradients(logits.sum(), outputs, x, *head.parameters())
    assert all(g.isfinite().all() for g in found)
    assert (found[0][4:, 0] == 0).all()
    assert (found[0][:, 2] == 0).all()


@pytest.mark.parametrize("lengths", [np.array([4, 6, 0, 1], np.uint8), torch.tensor(LENGTHS, dtype=torch.int16)])
def test_lengths_come_in_any_container(lengths: Any) -> None:
    head = tt.nn.LastStep(F, C)
    outputs = torch.randn(T, B, F)
    assert_agree(head(outputs, lengths), head(outputs, LENGTHS))


# ---------------------------------------------------------------------------------------------------------------------
# The loss


def lectures_loss(logits: Tensor, targets: Tensor, lengths: list[int], over: str) -> Tensor:
    """The double sum as it stands on the board."""
    total = torch.zeros((), dtype=logits.dtype)
    for row, length in enumerate(lengths):
        for t in range(length):
            total = total - logits[t, row].softmax(-1)[targets[t, row]].log()
    return total / (len(lengths) if over == "sequences" else sum(lengths))


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("over", ["sequences", "steps"])
def test_ragged_loss_is_the_sum_on_the_board(over: Literal["sequences", "steps"], batch_first: bool) -> None:
    logits = past_the_ends((C,), math.nan).requires_grad_()
    targets = torch.randint(C, (T, B))
    targets[4:, 0] = -100
    expected = lectures_loss(logits, targets, LENGTHS, over)
    given = (logits.transpose(0, 1), targets.transpose(0, 1)) if batch_first else (logits, targets)
    loss = tt.nn.ragged_loss(*given, LENGTHS, normalise=over, batch_first=batch_first)
    assert_agree(loss, expected)
    (gradient,) = gradients(loss, logits)
    assert_agree(gradient, gradients(expected, logits)[0])
    assert (gradient[4:, 0] == 0).all()


def test_per_step_mean_over_full_sequences_is_torchs_cross_entropy() -> None:
    logits, targets = torch.randn(T, B, C), torch.randint(C, (T, B))
    expected = functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert_agree(tt.nn.ragged_loss(logits, targets, normalise="steps"), expected)
    assert_agree(tt.nn.ragged_loss(logits, targets), expected * T)


def test_multi_label_loss_sums_the_labels_under_sigmoid() -> None:
    logits = past_the_ends((C,), math.nan).requires_grad_()
    targets = past_the_ends((C,), math.nan) > 0
    loss = tt.nn.ragged_loss(logits, targets, LENGTHS, multi_label=True)
    p = logits.sigmoid()
    expected = sum(
        -torch.where(targets[t, row], p[t, row], 1 - p[t, row]).log().sum()
        for row, length in enumerate(LENGTHS)
        for t in range(length)
    )
    assert isinstance(expected, Tensor)
    assert_agree(loss, expected / B)
    (gradient,) = gradients(loss, logits)
    assert gradient.isfinite().all()
    soft = torch.rand(T, B, C, dtype=torch.float64)
    soft[5, 0] = math.nan
    assert tt.nn.ragged_loss(logits, soft, LENGTHS, multi_label=True).isfinite()


def test_loss_of_a_real_step_without_a_class_is_refused_not_left_out() -> None:
    targets = torch.zeros(T, B, dtype=torch.int64)
    targets[0, 0] = -100
    with pytest.raises(tt.ShapeError, match=r"targets hold -100.*classes are 0 to 4"):
        tt.nn.ragged_loss(torch.randn(T, B, C), targets)


def test_loss_works_sample_by_sample_under_vmap() -> None:
    logits, targets = torch.randn(7, T, B, C), torch.randint(C, (7, T, B))

    def loss(one: Tensor, its_targets: Tensor) -> Tensor:
        return tt.nn.ragged_loss(one, its_targets, LENGTHS)

    expected = torch.stack([loss(one, its) for one, its in zip(logits, targets, strict=True)])
    assert_agree(torch.func.vmap(loss)(logits, targets), expected)


OUTPUTS, X = torch.zeros(T, B, F), torch.zeros(T, B, I)
LOGITS, TARGETS = torch.zeros(T, B, C), torch.zeros(T, B, dtype=torch.int64)


@pytest.mark.parametrize(
    ("refused", "message"),
    [
        (lambda: tt.nn.PerStep(F, C)(OUTPUTS, X), "made without input_size=, so it takes no x"),
        (lambda: tt.nn.PerStep(F, C, input_size=I)(OUTPUTS), r"sees the input \(input_size=3\); give it x"),
        (lambda: tt.nn.PerStep(F, C, input_size=I)(OUTPUTS, OUTPUTS), r"x has shape \[6, 4, 8\].*\[6, 4, 3\]"),
        (lambda: tt.nn.LastStep(7, C, bidirectional=True), "in_features is 7, which two directions cannot share"),
        (lambda: tt.nn.LastStep(F, C)(OUTPUTS[0]), r"outputs have shape \[4, 8\]; they must have a batch"),
        (lambda: tt.nn.LastStep(F, C)(OUTPUTS, [1, 2]), "lengths= has 2 entries and the batch 4 sequences"),
        (lambda: tt.nn.LastStep(F, C)((OUTPUTS,)), "outputs are tuple; a read-out takes the padded tensor"),
        (lambda: tt.nn.ragged_loss(LOGITS, TARGETS, [7, 1, 1, 1]), r"lengths\[0\] is 7, but the input has 6 steps"),
        (lambda: tt.nn.ragged_loss(LOGITS, TARGETS.float()), "targets are torch.float32; classes are integers"),
        (lambda: tt.nn.ragged_loss(LOGITS, TARGETS[:2]), r"targets have shape \[2, 4\].*\[6, 4\], a class for each"),
        (lambda: tt.nn.ragged_loss(LOGITS, TARGETS, multi_label=True), r"\[6, 4, 5\], a number for each label"),
        (lambda: tt.nn.ragged_loss(LOGITS[0], TARGETS[0]), r"logits have shape \[4, 5\]; they must be \[T, B, C\]"),
        (lambda: tt.nn.ragged_loss(LOGITS, TARGETS, [0] * 4, normalise="steps"), "no steps to average"),
        (lambda: tt.nn.ragged_loss(LOGITS, TARGETS, normalise="mean"), "normalise is 'mean'"),  # type: ignore[arg-type]
    ],
)
def test_what_does_not_fit_is_refused_in_words(refused: Any, message: str) -> None:
    with pytest.raises(tt.ThroughtimeError, match=message):
        refused()
