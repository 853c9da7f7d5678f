"""What torch.jit.trace and torch.jit.script record answers as the layer does, at sizes that it was not made with."""

from __future__ import annotations

import copy
import io
import itertools
import json
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from blackboards import ALL
from processes import python
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import throughtime as tt

SHAPES = ((5, 2, 3), (9, 7, 3), (1, 1, 3), (4, 0, 3))

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


@pytest.fixture(autouse=True)
def _torchs_own_code_may_warn() -> None:
    torch.jit.TracerWarning.ignore_lib_warnings()


def equal(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected)


def drawn(layer: torch.nn.Module) -> torch.nn.Module:
    """The layer with parameters of which none is zero."""
    torch.manual_seed(1)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.4)
    return layer


def ways() -> Iterator[torch.nn.Module]:
    for both, first in itertools.product((False, True), (False, True)):
        how: dict[str, Any] = {"bidirectional": both, "batch_first": first}
        yield tt.nn.Recurrent(tt.GRU, 3, 4, num_layers=2, learn_initial=both, **how)
        yield tt.nn.Recurrent(tt.LSTM, 3, 4, **how)
        yield tt.nn.GRU(3, 4, **how)
    yield tt.nn.LSTM(3, 4, proj_size=2, num_layers=2)
    yield tt.nn.RNN(3, 4, nonlinearity="relu", bias=False)


@pytest.mark.parametrize("layer", list(ways()), ids=str)
def test_traced_and_scripted_layers_answer_at_any_size(layer: torch.nn.Module):
    drawn(layer)
    traced, scripted = torch.jit.trace(layer, (torch.randn(5, 2, 3),)), torch.jit.script(layer)
    for shape in SHAPES:
        x = torch.randn(shape)
        if 0 in shape and isinstance(layer, torch.nn.RNNBase):
            continue  # torch's layers refuse to do nothing, and so do ours in their place
        output, states = layer(x)
        equal(traced(x), (output, states))
        equal(scripted(x), (output, states))
        equal(scripted(x, states), layer(x, states))
        steps, rows = (shape[1], shape[0]) if layer.batch_first else shape[:2]
        how = {"lengths": torch.randint(0, steps + 1, (rows,)), "reset": torch.rand(shape[:2]) < 0.3}
        equal(scripted(x, **how), layer(x, **how))


@pytest.mark.parametrize("layer", [tt.nn.GRU(3, 4), tt.nn.Recurrent(tt.LSTM, 3, 4)], ids=str)
def test_one_sequence_without_a_batch(layer: torch.nn.Module):
    scripted = torch.jit.script(drawn(layer))
    x = torch.randn(6, 3)
    output, states = layer(x)
    equal(scripted(x), (output, states))
    equal(scripted(x, states), layer(x, states))


@pytest.mark.parametrize("name", [name for name in ALL if not ALL[name].projects])
def test_any_cell_is_scripted_with_its_states_and_outside_inputs(name: str):
    cell = ALL[name]
    layer = drawn(tt.nn.Recurrent(cell, 4, 4, bidirectional=True))
    scripted = torch.jit.script(layer)
    x = torch.randn(7, 3, 4)
    outside = {n: torch.rand((7, 3, 1) if n in cell.per_step else (3, 1)) for n in cell.outside}
    lengths = torch.tensor([2, 7, 4])
    equal(scripted(x, lengths=lengths, outside=outside), layer(x, lengths=lengths, outside=outside))


@pytest.mark.parametrize("cell", [tt.nn.RNNCell(3, 4), tt.nn.LSTMCell(3, 4), tt.nn.GRUCell(3, 4, bias=False)], ids=str)
def test_cells_are_traced_and_scripted(cell: torch.nn.Module):
    traced, scripted = torch.jit.trace(cell, (torch.randn(5, 3),)), torch.jit.script(cell)
    x = torch.randn(8, 3)
    state = cell(x)
    equal(traced(x), state)
    equal(scripted(x), state)
    equal(scripted(x, state), cell(x, state))
    equal(scripted(x[0]), cell(x[0]))


def test_gradients_are_the_layers_own():
    layer = drawn(tt.nn.Recurrent(tt.LSTM, 3, 4, num_layers=2, bidirectional=True))
    for made in (torch.jit.trace(layer, (torch.randn(2, 2, 3),)), torch.jit.script(layer)):
        x = torch.randn(6, 3, 3)
        gradients = []
        for module in (layer, made):
            layer.zero_grad()
            output, (h, c) = module(x)
            (output.square().sum() + (h * c).sum()).backward()
            gradients.append(
                [torch.clone(parameter.grad) for parameter in layer.parameters() if parameter.grad is not None]
            )
        equal(*gradients)


class Packing(torch.nn.Module):
    """A model that packs by itself, begins somewhere, and reads out."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer, self.linear = layer, torch.nn.Linear(4, 2)

    def forward(self, x: Tensor, lengths: Tensor, h_0: Tensor) -> tuple[Tensor, Tensor]:
        packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
        output, states = self.layer(packed, h_0)
        return self.linear(pad_packed_sequence(output)[0]), states


@pytest.mark.parametrize("layer", [tt.nn.GRU(3, 4), tt.nn.Recurrent(tt.GRU, 3, 4)], ids=str)
def test_a_traced_model_that_packs_takes_other_lengths(layer: torch.nn.Module):
    model = Packing(drawn(layer))
    traced = torch.jit.trace(model, (torch.randn(5, 2, 3), torch.tensor([3, 5]), torch.randn(1, 2, 4)))
    given = (torch.randn(9, 4, 3), torch.tensor([3, 9, 4, 3]), torch.randn(1, 4, 4))
    equal(traced(*given), model(*given))


class Ragged(torch.nn.Module):
    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, lengths: Tensor, reset: Tensor) -> Tensor:
        return self.layer(x, lengths=lengths, reset=reset)[0]


@pytest.mark.parametrize("layer", [tt.nn.LSTM(3, 4), tt.nn.Recurrent(tt.GRU, 3, 4, bidirectional=True)], ids=str)
def test_lengths_and_resets_stay_inputs(layer: torch.nn.Module):
    model = Ragged(drawn(layer))
    example = (torch.randn(5, 2, 3), torch.tensor([3, 5]), torch.zeros(5, 2, dtype=torch.bool))
    given = (torch.randn(9, 3, 3), torch.tensor([3, 9, 0]), torch.rand(9, 3) < 0.3)
    for made in (torch.jit.trace(model, example), torch.jit.script(model)):
        equal(made(*given), model(*given))


def test_two_layers_of_one_class_keep_their_own_programs():
    """TorchScript shares programs between modules that look alike to it."""
    layers = [drawn(tt.nn.Recurrent(tt.GRU, 4, 4, batch_first=first, dropout=0.0)) for first in (False, True)]
    scripted = [torch.jit.script(layer) for layer in layers]
    x = torch.randn(5, 3, 4)
    for layer, program in zip(layers, scripted, strict=True):
        equal(program(x), layer(x))


def test_scripting_leaves_the_layer_as_it_was():
    model = torch.nn.Sequential(drawn(tt.nn.Recurrent(tt.GRU, 3, 4)))
    layer, x = model[0], torch.randn(5, 2, 3)
    before = layer(x)
    torch.jit.script(model)
    assert model[0] is layer
    assert type(layer) is tt.nn.Recurrent
    equal(layer(x, lengths=[2, 5], masks=None)[0], copy.deepcopy(layer)(x, lengths=[2, 5])[0])
    equal(pickle.loads(pickle.dumps(layer))(x), before)
    assert "forward" not in vars(pickle.loads(pickle.dumps(layer)))
    packed = pack_padded_sequence(x, [5, 2])
    equal(layer(packed)[0].data, copy.deepcopy(layer)(packed)[0].data)
    layer.stream(2).step(x[0])


def test_an_upgraded_model_is_restored_whole_after_scripting():
    model = torch.nn.Sequential(torch.nn.GRU(3, 4))
    tt.upgrade(model)
    torch.jit.script(model)
    tt.restore(model)
    assert type(model[0]) is torch.nn.GRU
    assert "forward" not in vars(model[0])


def test_dropout_acts_in_training_and_only_there():
    layer = drawn(tt.nn.Recurrent(tt.GRU, 3, 4, num_layers=2, dropout=0.5))
    scripted, x = torch.jit.script(layer), torch.randn(5, 2, 3)
    assert not torch.equal(scripted(x)[0], scripted(x)[0])
    scripted.eval()
    layer.eval()
    equal(scripted(x), layer(x))


LOADS = """
import sys, torch, warnings
warnings.simplefilter("ignore")
import throughtime
program = torch.jit.load(sys.argv[1])
x, expected = torch.load(sys.argv[2])
torch.testing.assert_close(program(x)[0], expected)
"""


def test_a_saved_program_runs_in_another_process(tmp_path: Any):
    layer = drawn(tt.nn.GRU(3, 4, bidirectional=True))
    x = torch.randn(8, 3, 3)
    torch.jit.script(layer).save(str(tmp_path / "program.pt"))
    torch.save((x, layer(x)[0].detach()), tmp_path / "expected.pt")
    code = f"import sys; sys.argv[1:] = {[str(tmp_path / 'program.pt'), str(tmp_path / 'expected.pt')]!r}\n{LOADS}"
    assert python(code).returncode == 0


def test_parameters_keep_their_names():
    layer = tt.nn.Recurrent(tt.LSTM, 3, 4, num_layers=2, learn_initial=True)
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(layer), buffer)
    buffer.seek(0)
    assert torch.jit.load(buffer).state_dict().keys() == layer.state_dict().keys()


class Own(tt.nn.GRU):
    def forward(self, input: Any, hx: Any = None, **more: Any) -> Any:
        return super().forward(input, hx, **more)


def test_what_torchscript_cannot_carry_is_refused_with_a_way_out():
    with pytest.raises(tt.ThroughtimeError, match=r"Own has a forward of its own.*hold the layer.*torch\.export"):
        torch.jit.script(Own(3, 4))
    computed = tt.nn.GRU(3, 4)
    torch.nn.utils.parametrizations.spectral_norm(computed, "weight_hh_l0")
    with pytest.raises(tt.ThroughtimeError, match=r"weight_hh_l0.*is no plain parameter.*remove_parametrizations"):
        torch.jit.script(computed)
    with pytest.raises(tt.ThroughtimeError, match="masks= does not go into a trace"):
        torch.jit.trace(Masked(), (torch.randn(5, 2, 3),))


class Masked(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = tt.nn.GRU(3, 4, num_layers=2, dropout=0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, masks=tt.nn.Masks(3))[0]


def test_what_does_not_fit_a_program_is_an_exception():
    layer = tt.nn.Recurrent(tt.GRU, 3, 4)
    for program in (torch.jit.trace(layer, (torch.randn(5, 2, 3),)), torch.jit.script(layer)):
        for x in (torch.randn(5, 2, 4), torch.randn(3), torch.randn(5, 2, 3).double()):
            with pytest.raises(Exception, match=r"features|dimensions|dtype|input"):
                program(x)
    with pytest.raises(torch.jit.Error, match="give one integer for each of 2 sequences"):
        torch.jit.script(layer)(torch.randn(5, 2, 3), lengths=torch.tensor([1, 2, 3]))


HOSTILE = """'] + [__import__('os')._exit(3)] #\\" {x}
"""


def test_what_a_cells_file_says_stays_text():
    """A cell comes from a file, and nothing in it must become code."""
    record = json.loads(tt.GRU.json)
    cell = tt.Cell.from_json(json.dumps({**record, "name": HOSTILE, "about": HOSTILE}))
    layer = drawn(tt.nn.Recurrent(cell, 3, 4))
    x = torch.randn(5, 2, 3)
    equal(torch.jit.script(layer)(x), layer(x))
