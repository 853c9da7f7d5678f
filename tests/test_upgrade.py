"""upgrade makes torch's recurrent modules throughtime's and restore undoes it; all that hangs on them survives both."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from agreement import assert_agree, run_with_gradients
from torch import Tensor
from torch.nn.utils import parametrizations, parametrize, prune, weight_norm

import throughtime as tt

I, H, T, B = 3, 5, 6, 4
TORCHS = [torch.nn.RNN, torch.nn.LSTM, torch.nn.GRU, torch.nn.RNNCell, torch.nn.LSTMCell, torch.nn.GRUCell]
OURS: dict[type, Any] = {kind: getattr(tt.nn, kind.__name__) for kind in TORCHS}

# torch's own modules still use what torch deprecates
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch", "ignore::FutureWarning:torch")


class Model(torch.nn.Module):
    """All six, one of them twice, and what is not recurrent."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.body = torch.nn.ModuleList(
            [
                torch.nn.GRU(I, H, **options),
                torch.nn.LSTM(H, H, num_layers=2, **options),
                torch.nn.RNN(H, H, nonlinearity="relu", bias=False, **options),
            ]
        )
        self.same_again = self.body[0]
        self.cells = torch.nn.ModuleDict(
            {
                "gru": torch.nn.GRUCell(H, H, **options),
                "lstm": torch.nn.LSTMCell(H, H, bias=False, **options),
                "rnn": torch.nn.RNNCell(H, H, **options),
            }
        )
        self.head = torch.nn.Linear(H, 2, **options)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.body:
            x = layer(x)[0]
        h = x[-1]
        for _ in range(2):
            h = self.cells["rnn"](h, self.cells["gru"](h, self.cells["lstm"](h)[0]))
        logits: Tensor = self.head(h)
        return logits


def classes(model: torch.nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


def test_every_module_is_replaced_and_named_and_restore_undoes_it_exactly() -> None:
    model = Model()
    x = torch.randn(T, B, I, requires_grad=True)
    before, held = classes(model), [dict(vars(module)) for module in model.modules()]
    expected, parameters = run_with_gradients(model, x), list(model.parameters())
    report = tt.upgrade(model)
    assert report.model is model
    assert report.left == ()
    assert [row.name for row in report.replaced] == [f"body.{i}" for i in range(3)] + [
        f"cells.{name}" for name in ("gru", "lstm", "rnn")
    ]
    assert ("cells.lstm", "torch.nn.LSTMCell", "throughtime.nn.LSTMCell") in report.replaced
    assert classes(model) == [OURS.get(kind, kind) for kind in before]
    assert model.same_again is model.body[0]
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert_agree(run_with_gradients(model, x), expected)
    layer: Any = model.body[0]
    cell: Any = model.cells["gru"]
    layer.segments, cell.target = "auto", "stepwise"
    back = tt.restore(model)
    assert [(row.name, row.after, row.before) for row in back.replaced] == list(report.replaced)
    assert classes(model) == before
    now = [vars(module) for module in model.modules()]
    assert [list(a) for a in now] == [list(b) for b in held]
    for found, was in zip(now, held, strict=True):
        assert all(found[key] is was[key] for key in was if key not in ("_flat_weights", "_flat_weight_refs"))
    assert_agree(run_with_gradients(model, x), expected)
    assert tt.restore(model) == tt.nn.Upgrade(model, (), ())


def test_a_second_upgrade_does_nothing_and_a_lone_module_is_changed_in_place() -> None:
    for kind in TORCHS:
        module = kind(I, H)
        report = tt.upgrade(module)
        assert report.replaced == (("", f"torch.nn.{kind.__name__}", f"throughtime.nn.{kind.__name__}"),)
        assert type(module) is OURS[kind]
        assert str(tt.upgrade(module)) == "nothing to replace"
        tt.restore(module)
        assert type(module) is kind


def test_what_is_said_is_a_table_and_printed_only_if_asked(capsys: pytest.CaptureFixture[str]) -> None:
    class Own(torch.nn.GRU):
        pass

    model = torch.nn.ModuleDict({"encoder": torch.nn.LSTM(I, H), "mine": Own(I, H)})
    with pytest.warns(UserWarning, match="mine is left as it is: .*Own: a subclass of torch.nn.GRU may compute"):
        report = tt.upgrade(model)
    assert capsys.readouterr().out == ""
    assert type(model["mine"]) is Own
    assert str(report).splitlines()[:3] == [
        "replaced: 1",
        "  encoder  torch.nn.LSTM -> throughtime.nn.LSTM",
        "left as it is: 1",
    ]
    assert str(report).splitlines()[3].startswith("  mine     ")
    assert "let it inherit from throughtime.nn.GRU instead" in report.left[0].reason
    tt.restore(model, verbose=True)
    assert capsys.readouterr().out == "replaced: 1\n  encoder  throughtime.nn.LSTM -> torch.nn.LSTM\n"


def scripted() -> torch.nn.Module:
    module: torch.nn.Module = torch.jit.script(torch.nn.LSTM(I, H))
    return module


def quantized() -> torch.nn.Module:
    plain = torch.nn.Sequential(torch.nn.LSTM(I, H))
    module: torch.nn.Module = torch.ao.quantization.quantize_dynamic(plain, {torch.nn.LSTM}, torch.qint8)[0]
    return module


def wrapped() -> torch.nn.Module:
    module: Any = torch.nn.GRU(I, H)
    module.forward = lambda *inputs: torch.nn.GRU.forward(module, *inputs)
    return module


def crowded() -> torch.nn.Module:
    module: Any = torch.nn.GRUCell(I, H)
    module.target = "a target of the user's"
    return module


def bare() -> torch.nn.Module:
    class Plain(torch.nn.RNNBase):
        pass

    return Plain("GRU", I, H)


LEFT: dict[str, tuple[Callable[[], torch.nn.Module], str]] = {
    "scripted": (scripted, "LSTM, scripted: it is scripted"),
    "quantized": (quantized, "torch.ao.nn.quantized.dynamic.modules.rnn.LSTM: it is quantized"),
    "forward replaced": (wrapped, "torch.nn.GRU: its forward was replaced on the module itself"),
    "an attribute taken": (crowded, "torch.nn.GRUCell: it has an attribute target of its own"),
    "a subclass of the base": (bare, "a subclass of torch.nn.RNNBase may .* let it inherit from one of throughtime.nn"),
}


@pytest.mark.filterwarnings("ignore:.*(quantiz|torch.jit|torch.ao).*")
@pytest.mark.parametrize("case", LEFT)
def test_what_may_compute_something_else_is_left_and_said_why(case: str) -> None:
    make, words = LEFT[case]
    model = torch.nn.Sequential(torch.nn.Linear(I, I), make())
    before, held = classes(model), dict(vars(model[1]))
    with pytest.warns(UserWarning, match=f"1 is left as it is: .*{words}"):
        report = tt.upgrade(model)
    assert (report.replaced, [row.name for row in report.left]) == ((), ["1"])
    assert classes(model) == before
    assert list(vars(model[1])) == list(held)


def test_restore_leaves_what_was_made_as_throughtimes() -> None:
    model = torch.nn.Sequential(tt.nn.GRU(I, H), tt.nn.Recurrent(tt.GRU, H, H), torch.nn.GRU(H, H))
    before = classes(model)
    tt.upgrade(model)
    report = tt.restore(model)
    assert classes(model) == before
    assert [row.name for row in report.left] == ["0", "1"]
    assert "made as throughtime's" in str(report)


@pytest.mark.parametrize("change", [tt.upgrade, tt.restore])
def test_what_is_no_model_is_refused(change: Any) -> None:
    with pytest.raises(tt.ThroughtimeError, match=r"takes a model, a torch\.nn\.Module, not dict"):
        change({})


# ---------------------------------------------------------------------------------------------------------------------
# What hangs on a module survives


def test_hooks_run_as_before() -> None:
    model = torch.nn.ModuleList([torch.nn.GRU(I, H), torch.nn.GRUCell(I, H)])
    calls: list[str] = []
    for module in model:
        module.register_forward_pre_hook(lambda *_: calls.append("pre"))
        module.register_forward_hook(lambda *_: calls.append("forward"))
        module.register_full_backward_hook(lambda *_: calls.append("backward"))

    def run() -> None:
        calls.clear()
        for module in model:
            found = module(torch.randn(T, I, requires_grad=True))
            (found[0] if isinstance(found, tuple) else found).sum().backward()
        assert calls == ["pre", "forward", "backward"] * 2

    for change in (tt.upgrade, tt.restore):
        run()
        change(model)
    run()


def test_an_optimiser_made_before_trains_on_through_both() -> None:
    model = Model(dtype=torch.float64)
    never = copy.deepcopy(model)
    optimisers = [torch.optim.Adam(m.parameters(), lr=0.01) for m in (model, never)]
    x = torch.randn(T, B, I, dtype=torch.float64)
    for step in range(6):
        for one, optimiser in zip((model, never), optimisers, strict=True):
            optimiser.zero_grad()
            one(x).square().sum().backward()
            optimiser.step()
        if step == 1:
            assert tt.upgrade(model).replaced
        if step == 3:
            assert tt.restore(model).replaced
    assert_agree(dict(model.named_parameters()), dict(never.named_parameters()))


def test_tied_weights_stay_tied() -> None:
    model = torch.nn.ModuleList([torch.nn.GRU(H, H), torch.nn.GRU(H, H), torch.nn.GRUCell(H, H)])
    model[1].weight_hh_l0 = model[0].weight_hh_l0
    model[2].weight_hh = model[0].weight_hh_l0

    def gradient() -> tuple[Tensor, ...]:
        x = torch.ones(T, B, H)
        out = model[2](model[1](model[0](x)[0])[0][-1])
        return torch.autograd.grad(out.sum(), list(model.parameters()))

    expected = gradient()
    for change in (tt.upgrade, tt.restore):
        change(model)
        assert model[1].weight_hh_l0 is model[0].weight_hh_l0 is model[2].weight_hh
        assert_agree(gradient(), expected)


def test_dtype_and_device_changes_go_on_working() -> None:
    model, x = Model(), torch.randn(T, B, I)
    tt.upgrade(model)
    assert model.double()(x.double()).dtype == torch.float64
    assert model.to("meta").body[0].weight_hh_l0.is_meta
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, 0.1)
    found = model(x.double())
    tt.restore(model)
    assert_agree(model(x.double()), found)


NORMS: dict[str, Callable[[torch.nn.Module, str], Any]] = {
    "spectral_norm": parametrizations.spectral_norm,  # takes a step of its power iteration whenever it is read
    "weight_norm": parametrizations.weight_norm,
    "orthogonal": parametrizations.orthogonal,
    "weight_norm by hooks": weight_norm,
    "pruned": lambda module, name: prune.random_unstructured(module, name, amount=0.3),
}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", [torch.nn.GRU, torch.nn.LSTM, torch.nn.RNNCell, torch.nn.LSTMCell])
def test_parametrizations_survive_both(kind: type[torch.nn.Module], norm: str) -> None:
    model = kind(H, H)
    with torch.no_grad():  # torch copies no module whose weights hang on a graph
        for name in [name for name, _ in model.named_parameters() if "weight" in name]:
            NORMS[norm](model, name)
        twin = copy.deepcopy(model)
    before, held = type(model), list(vars(model))
    x = torch.randn(T, B, H) if kind in (torch.nn.GRU, torch.nn.LSTM) else torch.randn(B, H)
    for change in (tt.upgrade, tt.restore):
        report = change(model)
        assert len(report.replaced) == 1
        assert isinstance(model, OURS[kind]) is (change is tt.upgrade)
        for _ in range(2):
            assert_agree(run_with_gradients(model, x), run_with_gradients(twin, x))
    assert type(model) is before
    assert list(vars(model)) == held
    assert type(twin) is before, "a copy has the same class, which must not change"


@pytest.mark.parametrize("kind", [torch.nn.GRU, torch.nn.GRUCell])
def test_parametrizations_may_come_and_go_while_a_module_is_throughtimes(kind: type[torch.nn.Module]) -> None:
    suffix = "_l0" if kind is torch.nn.GRU else ""
    first, second = f"weight_ih{suffix}", f"weight_hh{suffix}"
    model = kind(H, H)
    parametrizations.weight_norm(model, first)
    tt.upgrade(model)
    parametrizations.weight_norm(model, second)
    parametrize.remove_parametrizations(model, first)
    x = torch.randn(B, H)
    found = run_with_gradients(model, x)
    tt.restore(model)
    assert type(model).__bases__ == (kind,)
    assert parametrize.is_parametrized(model, second)
    assert not parametrize.is_parametrized(model, first)
    assert_agree(run_with_gradients(model, x), found)
    tt.upgrade(model)
    parametrize.remove_parametrizations(model, second)
    assert type(model) is OURS[kind]
    tt.restore(model)
    assert type(model) is kind


def test_copies_pickles_and_state_dicts_go_through_both() -> None:
    model = Model()
    x, plain = torch.randn(T, B, I), copy.deepcopy(model)
    expected = model(x)
    tt.upgrade(model)
    assert list(model.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(model.state_dict())
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    for again in (copy.deepcopy(model), torch.load(stored, weights_only=False)):
        assert type(again.cells["gru"]) is tt.nn.GRUCell
        assert_agree(again(x), expected)
        tt.restore(again)
        assert type(again.cells["gru"]) is torch.nn.GRUCell
        assert_agree(copy.deepcopy(again)(x), expected)
    assert type(model.cells["gru"]) is tt.nn.GRUCell, "a copy was restored, not the model"


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
def test_a_restored_model_can_be_scripted() -> None:
    model = torch.nn.Sequential(torch.nn.GRU(I, H))
    tt.upgrade(model)
    tt.restore(model)
    x = torch.randn(T, B, I)
    assert_agree(torch.jit.script(model)(x), model(x))


@pytest.fixture
def dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.usefixtures("dynamo")
def test_a_compiled_model_survives_both() -> None:
    model = Model()
    expected, x = copy.deepcopy(model), torch.randn(T, B, I)
    compiled: Any = torch.compile(model, backend="aot_eager")
    for change in (tt.upgrade, tt.restore):
        assert_agree(run_with_gradients(compiled, x)[0], expected(x))
        assert [row.name.split(".")[0] for row in change(compiled).replaced] == ["_orig_mod"] * 6
    found, gradients = run_with_gradients(compiled, x)
    wanted, expected_gradients = run_with_gradients(expected, x)
    assert_agree(found, wanted)
    assert_agree(list(gradients.values()), list(expected_gradients.values()))
    assert model.body[0] is compiled.body[0]


def test_a_model_wrapped_for_data_parallel_training_survives_both(tmp_path: Path) -> None:
    from torch import distributed
    from torch.nn.parallel import DistributedDataParallel

    distributed.init_process_group(
        "gloo", store=distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    try:
        model = Model()
        twin, x = copy.deepcopy(model), torch.randn(T, B, I)
        wrapped = DistributedDataParallel(model)
        for change in (tt.upgrade, tt.restore, None):
            for one in (wrapped, twin):
                one.zero_grad()
                one(x).square().sum().backward()
            assert_agree([p.grad for p in model.parameters()], [p.grad for p in twin.parameters()])
            if change is not None:
                assert len(change(wrapped).replaced) == 6
    finally:
        distributed.destroy_process_group()
