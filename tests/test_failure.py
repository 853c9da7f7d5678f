"""The first failure: planted NaNs and infinities are found where they were planted, and harmless ones are let be."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

import throughtime as tt
from throughtime.equations.catalogue import GRU, Elman
from throughtime.equations.cell import cell
from throughtime.equations.expr import exp, identity, log, sigmoid, sqrt, tanh, where
from throughtime.insight.failure import Failure, first_failure

STEPS, ROWS, INPUTS, UNITS = 7, 4, 3, 5


class Tagger(nn.Module):
    """A linear map, a recurrent layer and a read-out at every step."""

    def __init__(self, recurrent: nn.Module) -> None:
        super().__init__()
        self.first = nn.Linear(INPUTS, INPUTS)
        self.recurrent = recurrent
        self.readout = nn.Linear(UNITS, 2)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        given = self.first(x)
        output = self.recurrent(given) if lengths is None else self.recurrent(given, lengths=lengths)
        logits: Tensor = self.readout(output[0])
        return logits


def inputs() -> Tensor:
    return torch.randn(STEPS, ROWS, INPUTS, generator=torch.Generator().manual_seed(3))


def layer(one: tt.Cell, bidirectional: bool = False) -> tt.nn.Recurrent:
    torch.manual_seed(0)
    return tt.nn.Recurrent(one, INPUTS, UNITS, bidirectional=bidirectional)


def found(*arguments: object) -> Failure:
    failure = first_failure(*arguments)  # type: ignore[arg-type]
    assert failure is not None
    return failure


def test_a_sound_run_has_no_failure() -> None:
    model = Tagger(torch.nn.LSTM(INPUTS, UNITS, 2, dropout=0.5))
    state = torch.get_rng_state()
    before = copy.deepcopy(model.state_dict())
    assert first_failure(model, (inputs(),), lambda logits: logits.square().sum(-1)) is None
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert type(model.recurrent) is torch.nn.LSTM


@cell(states="h c")
def Open(x, h, c, W, U, b, d):
    """An LSTM whose new value is not squashed."""
    i = sigmoid(W.i @ x + b.i + U.i @ h + d.i)
    g = W.g @ x + b.g + U.g @ h + d.g
    c_next = 0.5 * c + i * g
    return tanh(c_next), c_next


@pytest.mark.parametrize("reverse", [False, True])
def test_a_product_that_overflows_is_found_with_its_step_row_unit_and_gate(reverse: bool) -> None:
    one = layer(Open, bidirectional=reverse)
    x = inputs()
    x[4, 2, 1] = 3e38
    with torch.no_grad():
        for name, parameter in one.named_parameters():
            if name.startswith("weight_ih") and name.endswith("reverse") == reverse:
                parameter.fill_(0.5)
                parameter[UNITS + 3, 1] = 4.0  # gate g, the second, unit 3
    failure = found(one, x)
    assert str(failure.place) == ("the layer, backward" if reverse else "the layer")
    assert (failure.way, failure.step, failure.row, failure.unit, failure.gate) == ("forward", 4, 2, 3, "g")
    assert (failure.operation, failure.value) == ("W_g x_t", float("inf"))
    assert dict(failure.operands) == {"x_t": pytest.approx(3e38), "W_g": 4.0}


def test_a_nan_in_the_input_is_said_to_have_come_in() -> None:
    x = inputs()
    x[3, 1, 2] = float("nan")
    failure = found(layer(GRU), x)
    assert (failure.operation, failure.step, failure.row, failure.unit) == ("the input x", 3, 1, 2)
    assert "step 3, row 1, unit 2: the input x is nan" in str(failure)


def test_what_lies_past_a_rows_end_is_no_failure() -> None:
    x = inputs()
    x[5:, 1] = float("nan")
    assert first_failure(layer(GRU), {"x": x, "lengths": [7, 5, 7, 7]}, lambda result: result[0].sum(-1)) is None
    assert found(layer(GRU), {"x": x, "lengths": [7, 6, 7, 7]}).step == 5


def test_a_module_before_the_layer_is_named() -> None:
    model = Tagger(layer(GRU))
    with torch.no_grad():
        model.first.weight.fill_(3e38)
    failure = found(model, (inputs(),))
    assert (failure.place, failure.operation) == ("first", "Linear")
    with torch.no_grad():
        model.first.bias[1] = float("nan")
    assert found(model, (inputs(),)).operation == "its bias"


def test_a_module_after_the_layer_and_the_loss_are_named() -> None:
    model = Tagger(layer(GRU))
    failure = found(model, (inputs(),), lambda logits: (logits - logits).log().sum())
    assert (failure.way, failure.place) == ("forward", "the loss")
    with torch.no_grad():
        model.readout.bias.fill_(float("inf"))
    failure = found(model, (inputs(),))
    assert (failure.place, failure.operation) == ("readout", "its bias")


def test_a_broken_weight_is_named_with_its_gate_and_unit() -> None:
    one = layer(GRU)
    with torch.no_grad():
        one.get_parameter("weight_hh_l0")[UNITS + 2, 4] = float("nan")  # gate z, the second, unit 2
    failure = found(one, inputs())
    assert (failure.operation, failure.gate, failure.unit) == ("the parameter weight_hh", "z", 2)


def test_an_explosion_is_found_at_the_step_where_it_leaves_the_range_of_its_type() -> None:
    one = tt.nn.Recurrent(Elman(activation=identity), 1, 1)
    with torch.no_grad():
        for parameter in one.parameters():
            parameter.zero_()
        one.get_parameter("weight_ih_l0").fill_(1.0)
        one.get_parameter("weight_hh_l0").fill_(1e10)
    failure = found(one, torch.ones(STEPS, 1, 1))  # 1, 1e10, 1e20, 1e30, and float32 ends at 3.4e38
    assert (failure.step, failure.operation) == (4, "U h_{t-1}")
    assert dict(failure.operands) == {"h_{t-1}": pytest.approx(1e30), "U": 1e10}
    assert first_failure(copy.deepcopy(one).double(), torch.ones(STEPS, 1, 1, dtype=torch.double)) is None


@cell(states="h")
def Logarithmic(x, h, W, U, b):
    """A value that leaves the domain of a logarithm."""
    a = W.a @ x + U.a @ h
    return tanh(log(a) + W.b @ x)


@cell(states="h")
def Harmless(x, h, W, U, b):
    """A sigmoid written so that exp overflows without harm, and a branch that is never taken."""
    gate = 1 / (1 + exp(-200 * (W.f @ x)))
    return where(gate < 2.0, gate * tanh(W.n @ x + U.n @ h), log(gate - 2.0))


@cell(states="h")
def Rooted(x, h, W, U, b):
    """A root whose derivative is infinite where its argument is 0."""
    f = sigmoid(W.f @ x)
    a = abs(W.n @ x + U.n @ h)
    return f * sqrt(a)


def test_the_cell_of_a_user_is_named_by_its_own_variables() -> None:
    one = layer(Logarithmic)
    with torch.no_grad():
        one.get_parameter("weight_ih_l0")[:UNITS] = torch.tensor([[1.0, 0, 0]])
        one.get_parameter("weight_hh_l0").zero_()
    x = inputs().abs() + 0.1
    x[2, 3, 0] = -2.0
    failure = found(one, x)
    assert (failure.step, failure.row, failure.unit, failure.gate) == (2, 3, 0, "a")
    assert (failure.operation, failure.operands) == ("log(a)", (("a", -2.0),))


def test_an_infinity_that_does_no_harm_is_no_failure() -> None:
    one = layer(Harmless)
    with torch.no_grad():
        one.get_parameter("weight_ih_l0").fill_(1.0)
    x = inputs() - 3
    assert torch.isinf(torch.exp(-200 * x.sum(-1))).any(), "exp must overflow somewhere, or this tests nothing"
    assert first_failure(one, x) is None


def test_a_derivative_that_is_infinite_is_found_on_the_way_back() -> None:
    one = layer(Rooted)
    x = inputs()
    with torch.no_grad():
        one.get_parameter("weight_hh_l0").zero_()
        one.get_parameter("weight_ih_l0").copy_(torch.ones(2 * UNITS, INPUTS))
    x[3, 2] = torch.tensor([1.0, 1.0, -2.0])
    loss = lambda result: result[0].sum()  # noqa: E731
    assert first_failure(one, x) is None, "forward, the root of 0 is 0"
    failure = found(one, x, loss)
    assert (failure.way, failure.step, failure.row, failure.gate) == ("backward", 3, 2, "n")
    assert failure.operation == "the derivative of sqrt(a) by a"
    assert failure.operands[0] == ("a", 0.0)
    assert "makes the gradient inf" in str(failure)


def test_a_gradient_that_explodes_is_found_at_its_step_and_product() -> None:
    one = tt.nn.Recurrent(Elman(activation=identity), 1, 1)
    with torch.no_grad():
        for parameter in one.parameters():
            parameter.zero_()
        one.get_parameter("weight_hh_l0").fill_(1e10)
    # the states are all 0, and the gradient is 1, 1e10, 1e20, 1e30 at the steps 6, 5, 4, 3
    failure = found(one, torch.zeros(STEPS, 1, 1), lambda result: result[0][-1].sum())
    assert (failure.way, failure.step, failure.row, failure.unit) == ("backward", 3, 0, 0)
    assert failure.operation == "Uᵀ times the gradient of U h_{t-1}"
    assert dict(failure.operands) == {"that gradient": pytest.approx(1e30), "weight": 1e10}


def test_a_gradient_that_comes_from_above_broken_is_said_to() -> None:
    model = Tagger(layer(GRU))
    failure = found(model, (inputs(),), lambda logits: (0.0 * logits).sqrt().sum())
    assert (failure.way, failure.place) == ("backward", "what follows readout")
    assert not math.isfinite(failure.value)
    failure = found(layer(GRU), inputs(), lambda result: (0.0 * result[0][-1]).sqrt().sum())
    assert (failure.way, failure.step) == ("backward", STEPS - 1)
    assert failure.operation == "what comes from above to (1 - z) ⊙ n + z ⊙ h_{t-1}"


def test_a_sum_that_overflows_though_its_terms_do_not_is_told() -> None:
    one = layer(Elman(activation=identity))
    with torch.no_grad():
        one.get_parameter("weight_hh_l0").zero_()
        one.get_parameter("weight_ih_l0").zero_()
    failure = found(one, torch.full((STEPS, ROWS, INPUTS), 1e21), lambda result: (1e17 * result[0]).sum())
    assert (failure.way, failure.operation) == ("backward", "the sum over steps and rows")
    assert failure.place == "weight_ih_l0"
