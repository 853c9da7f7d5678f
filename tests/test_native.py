"""Torch's own fused operators as a target: the reference's numbers, for torch's equations by whoever wrote them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from agreement import assert_agree, run_with_gradients, same_bits
from blackboards import ODD, MinimalGated, random_problem
from torch import Tensor
from torch.autograd import forward_ad

import throughtime as tt
from throughtime.engine import recurrence
from throughtime.engine.problem import Problem
from throughtime.engine.recurrence import choose, run
from throughtime.engine.targets import target
from throughtime.equations import catalogue
from throughtime.equations.cell import Cell
from throughtime.errors import TargetError

I, H, T, B = 3, 5, 6, 4
TORCHS: dict[str, Cell] = {
    "elman": tt.Elman,
    "elman-relu": tt.Elman(activation=tt.relu),
    "gru": tt.GRU,
    "lstm": tt.LSTM,
    "lstm-projected": tt.ProjectedLSTM,
}
BUILT_IN = TORCHS | {f"{name}-no-biases": catalogue.without_biases(cell) for name, cell in TORCHS.items()}
WAYS: dict[str, dict[str, Any]] = {
    "full": {},
    "reverse": {"reverse": True},
    "ragged": {"lengths": (6, 6, 3, 1)},
    "ragged-reverse": {"lengths": (6, 4, 4, 1), "reverse": True},
    "empty-rows": {"lengths": (5, 2, 0, 0)},
    "empty-rows-reverse": {"lengths": (5, 2, 0, 0), "reverse": True},
    "all-empty": {"lengths": (0, 0, 0, 0)},
}
pytestmark = [
    # torch's own modules still use what torch deprecates, and its operator warns that oneDNN knows no projections
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning"),
]


@pytest.fixture(autouse=True)
def _no_preference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("THROUGHTIME_TARGET", raising=False)


@pytest.fixture
def _elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a device that has no kernels of ours."""
    monkeypatch.setattr(target("cpu"), "refusal", lambda problem: "the tensors are on elsewhere:0", raising=True)


elsewhere = pytest.mark.usefixtures("_elsewhere")


def everything(problem: Problem, asked: str) -> dict[str, Any]:
    """Outputs, last states and the gradients of a fixed weighting of all of them."""
    output, states = run(problem, asked)
    ends = [output, *states]
    generator = torch.Generator().manual_seed(11)
    loss = sum((e * torch.randn(e.shape, generator=generator, dtype=e.dtype)).sum() for e in ends)
    assert isinstance(loss, Tensor)
    found = torch.autograd.grad(loss, problem.tensors, allow_unused=True, materialize_grads=True)
    return {"ends": [e.detach() for e in ends], "gradients": list(found)}


# -- the reference's numbers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", BUILT_IN)
def test_native_is_the_reference(name: str, way: str, dtype: torch.dtype):
    problem = random_problem(BUILT_IN[name], T, B, I, H, dtype=dtype, **WAYS[way])
    assert_agree(everything(problem, "native"), everything(problem, "reference"))


@pytest.mark.parametrize("way", ["ragged", "empty-rows-reverse"])
@pytest.mark.parametrize("name", TORCHS)
def test_what_lies_past_an_end_is_not_read(name: str, way: str):
    problem = random_problem(TORCHS[name], T, B, I, H, **WAYS[way])
    assert problem.lengths is not None
    past = torch.arange(T)[:, None, None] >= torch.tensor(problem.lengths)[:, None]
    x = torch.where(past, torch.nan, problem.x.detach()).requires_grad_()
    assert_agree(everything(replace(problem, x=x), "native"), everything(problem, "reference"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", TORCHS)
def test_half_precision_is_torchs_own(name: str, dtype: torch.dtype):
    """Rounded as torch does it, each step: a few units in the last place of numbers up to 1, T times."""
    problem = random_problem(TORCHS[name], T, B, I, H, lengths=(6, 4, 1, 0), dtype=dtype)
    exact = problem.with_tensors([tensor.double() for tensor in problem.tensors])
    output, states = run(problem, "native")
    wanted, wanted_states = run(exact, "reference")
    for own, right in zip((output, *states), (wanted, *wanted_states), strict=True):
        assert own.dtype == dtype
        room = 4 * T * torch.finfo(dtype).eps * max(1.0, right.abs().max().item())
        assert (own.double() - right).abs().max() <= room


LAYERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "deep-both-ways": {"num_layers": 2, "bidirectional": True},
    "batch-first-learnt-start": {"batch_first": True, "learn_initial": True},
}


@pytest.mark.parametrize("options", LAYERS)
@pytest.mark.parametrize("name", TORCHS)
def test_whole_layers_with_states_and_lengths(name: str, options: str):
    proj_size = 2 if TORCHS[name].projects else 0
    layer = tt.nn.Recurrent(TORCHS[name], I, H, proj_size=proj_size, dtype=torch.float64, **LAYERS[options])
    shape = (B, T, I) if layer.batch_first else (T, B, I)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    found = []
    for asked in ("native", "reference"):
        layer.target = asked
        output, state = layer(x, lengths=[3, 0, 6, 6])
        again = layer(x, state, lengths=[6, 2, 0, 1])
        found.append(run_with_gradients(layer, x, call=lambda given, ends=(output, again): [given, *ends]))
    assert_agree(found[0], found[1])


@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
@pytest.mark.parametrize("bias", [True, False], ids=["biases", "no-biases"])
def test_drop_ins_are_torchs(kind: str, bias: bool):
    theirs = getattr(torch.nn, kind)(I, H, num_layers=2, bias=bias)
    ours = getattr(tt.nn, kind)(I, H, num_layers=2, bias=bias)
    ours.load_state_dict(theirs.state_dict())
    ours.target = "native"
    x = torch.randn(T, B, I)
    assert_agree(ours(x), theirs(x))
    assert_agree(run_with_gradients(ours, x.requires_grad_())[1], run_with_gradients(theirs, x)[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_under_autocast_it_computes_in_the_parameters_format(dtype: torch.dtype):
    layer = tt.nn.LSTM(I, H)
    layer.target = "native"
    x = torch.randn(T, B, I)
    plain, _ = layer(x)
    with torch.autocast("cpu", dtype):
        cast, _ = layer(x)
    same_bits(cast.detach(), plain.detach())
    cast.sum().backward()


# -- whose equations --------------------------------------------------------------------------------------------------


@tt.cell(states="s")
def MyGRU(x, s, W, U, b, c):
    """Every name, the order of gates, and the order of sums and products another; the same mathematics."""
    keep = tt.sigmoid(c.keep + U.keep @ s + b.keep + W.keep @ x)
    forget = tt.sigmoid(U.look @ s + W.look @ x + c.look + b.look)
    fresh = tt.tanh((c.new + U.new @ s) * forget + b.new + W.new @ x)
    return s * keep + fresh * (1 - keep)


@tt.cell(states="memory shown", output="shown")
def MyLSTM(x, memory, shown, W, U, b):
    """The states the other way round, and one bias."""
    o = tt.sigmoid(U.o @ shown + b.o + W.o @ x)
    g = tt.tanh(W.g @ x + U.g @ shown + b.g)
    i = tt.sigmoid(b.i + W.i @ x + U.i @ shown)
    f = tt.sigmoid(W.f @ x + b.f + U.f @ shown)
    after = g * i + memory * f
    return after, tt.tanh(after) * o


@tt.cell(states="h")
def OneBias(x, h, W, U, b):
    """The lecture's: one bias."""
    return tt.tanh(U @ h + W @ x + b)


@tt.cell(states="h")
def OtherBias(x, h, W, U, c):
    """The same with the other bias, and a rectifier."""
    return tt.relu(W @ x + U @ h + c)


@tt.cell(states="h")
def SomeBiases(x, h, W, U, b, c):
    """A GRU whose reset gate has no bias and whose others have one each."""
    r = tt.sigmoid(W.r @ x + U.r @ h)
    z = tt.sigmoid(W.z @ x + b.z + U.z @ h)
    n = tt.tanh(W.n @ x + r * (U.n @ h + c.n))
    return z * h + (1 - z) * n


@tt.cell(states="h c")
def MyProjected(x, h, c, W, U, P, b):
    """Projected, gates in another order, one bias."""
    f = tt.sigmoid(W.f @ x + U.f @ h + b.f)
    i = tt.sigmoid(W.i @ x + U.i @ h + b.i)
    o = tt.sigmoid(W.o @ x + U.o @ h + b.o)
    g = tt.tanh(W.g @ x + U.g @ h + b.g)
    after = i * g + f * c
    return P @ (tt.tanh(after) * o), after


MINE = {one.name: one for one in (MyGRU, MyLSTM, OneBias, OtherBias, SomeBiases, MyProjected)}


@pytest.mark.parametrize("way", ["full", "ragged-reverse", "empty-rows"])
@pytest.mark.parametrize("name", MINE)
@elsewhere
def test_the_same_mathematics_is_known_however_it_is_written(name: str, way: str):
    problem = random_problem(MINE[name], T, B, I, H, **WAYS[way])
    assert choose(problem).target == "native"
    assert_agree(everything(problem, "native"), everything(problem, "reference"))


@tt.cell(states="h")
def Sigmoid(x, h, W, U, b):
    """Another activation."""
    return tt.sigmoid(W @ x + U @ h + b)


@tt.cell(states="h")
def Interpolated(x, h, W, U, b, c):
    """A GRU with its last line multiplied out: equal on paper, but not by reordering sums and products."""
    r = tt.sigmoid(W.r @ x + b.r + U.r @ h + c.r)
    z = tt.sigmoid(W.z @ x + b.z + U.z @ h + c.z)
    n = tt.tanh(W.n @ x + b.n + r * (U.n @ h + c.n))
    return n + z * (h - n)


@tt.cell(states="h")
def Swapped(x, h, W, U, b, c):
    """A GRU whose update gate keeps what torch's forgets."""
    r = tt.sigmoid(W.r @ x + b.r + U.r @ h + c.r)
    z = tt.sigmoid(W.z @ x + b.z + U.z @ h + c.z)
    n = tt.tanh(W.n @ x + b.n + r * (U.n @ h + c.n))
    return z * n + (1 - z) * h


@tt.cell(states="h c")
def CoupledGates(x, h, c, W, U, b):
    """An LSTM whose forget gate is one minus its input gate."""
    i = tt.sigmoid(W.i @ x + U.i @ h + b.i)
    g = tt.tanh(W.g @ x + U.g @ h + b.g)
    o = tt.sigmoid(W.o @ x + U.o @ h + b.o)
    after = i * g + (1 - i) * c
    return o * tt.tanh(after), after


@tt.cell(states="h c", output="c")
def ShowsTheOther(x, h, c, W, U, b):
    """An LSTM that shows its memory."""
    i = tt.sigmoid(W.i @ x + U.i @ h + b.i)
    f = tt.sigmoid(W.f @ x + U.f @ h + b.f)
    g = tt.tanh(W.g @ x + U.g @ h + b.g)
    o = tt.sigmoid(W.o @ x + U.o @ h + b.o)
    after = i * g + f * c
    return o * tt.tanh(after), after


OTHERS = ODD | {one.name: one for one in (Sigmoid, Interpolated, Swapped, CoupledGates, ShowsTheOther)}
OTHERS |= {"gru-reset-before": tt.GRUResetBefore}
del OTHERS["elman-relu"]


@pytest.mark.parametrize("name", OTHERS)
@elsewhere
def test_other_equations_go_step_by_step_and_it_is_said(name: str):
    problem = random_problem(OTHERS[name], T, B, I, H)
    reason = f"torch has no fused operator for the equations of {OTHERS[name].name}"
    passed = f"not cpu, because the tensors are on elsewhere:0; not native, because {reason}"
    assert str(choose(problem)) == f"stepwise: {passed}"


# -- the choice -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BUILT_IN)
@elsewhere
def test_without_kernels_of_ours_the_built_in_cells_run_natively_and_it_is_said(name: str):
    problem = random_problem(BUILT_IN[name], T, B, I, H, lengths=(6, 3, 1, 0))
    assert str(choose(problem)) == "native: not cpu, because the tensors are on elsewhere:0"
    proj_size = 2 if BUILT_IN[name].projects else 0
    layer = tt.nn.Recurrent(BUILT_IN[name], I, H, proj_size=proj_size)
    assert tt.explain(layer, torch.randn(T, B, I)) == [f"layer 0, forward: {choose(problem)}"]


@elsewhere
def test_resets_and_other_formats_go_step_by_step_and_segments_are_said():
    reset = random_problem(tt.GRU, T, B, I, H, reset=True)
    assert "stepwise: " in str(choose(reset))
    assert str(choose(reset)).endswith("not native, because torch's fused operators know no resets")
    assert_agree(everything(reset, "auto"), everything(reset, "reference"))
    mixed = random_problem(tt.GRU, T, B, I, H)
    mixed = replace(mixed, x=mixed.x.float())
    assert "not native, because its tensors differ in dtype or device" in str(choose(mixed))
    layer = tt.nn.GRU(I, H)
    layer.segments = "auto"
    (line,) = tt.explain(layer, torch.randn(T, B, I))
    assert line.startswith("layer 0, forward: native: ")
    assert line.endswith("; it keeps every step, whatever segments= says")
    empty = random_problem(tt.GRU, 0, B, I, H)
    assert str(choose(empty)).endswith("not native, because there is nothing to compute")


@elsewhere
def test_upgraded_models_and_single_steps_run_natively_where_we_have_no_kernels():
    model = torch.nn.ModuleDict({"a": torch.nn.GRU(I, H), "b": torch.nn.LSTMCell(I, H)}).double()
    x = torch.randn(T, B, I, dtype=torch.float64)
    wanted = model["a"](x), model["b"](x[0])
    tt.upgrade(model)
    assert ": native: " in tt.explain(model["a"], x)[0]  # type: ignore[arg-type]
    assert ": native: " in tt.explain(model["b"], x[0])[0]  # type: ignore[arg-type]
    assert_agree((model["a"](x), model["b"](x[0])), wanted)


def test_asked_for_and_impossible_is_an_error_in_words(monkeypatch: pytest.MonkeyPatch):
    reset = random_problem(tt.LSTM, T, B, I, H, reset=True)
    with pytest.raises(TargetError, match=r"target= asks for 'native', which cannot run this: .*know no resets"):
        run(reset, "native")
    layer = tt.nn.Recurrent(MinimalGated, I, H, target="native")
    with pytest.raises(TargetError, match="no fused operator for the equations of MinimalGated"):
        layer(torch.randn(T, B, I))
    monkeypatch.setenv("THROUGHTIME_TARGET", "native")
    with pytest.raises(TargetError, match=r"THROUGHTIME_TARGET asks for 'native', which cannot run this"):
        run(reset)
    with pytest.raises(TargetError, match="there is nothing to compute"):
        tt.nn.GRU(I, H)(torch.randn(0, B, I).reshape(T, 0, I))


def test_the_environment_asks_for_it_too(monkeypatch: pytest.MonkeyPatch):
    problem = random_problem(tt.GRU, T, B, I, H, lengths=(6, 6, 2, 0))
    monkeypatch.setenv("THROUGHTIME_TARGET", "native")
    assert str(choose(problem)) == "native: THROUGHTIME_TARGET asks for it"
    assert_agree(everything(problem, ""), everything(problem, "reference"))


def test_on_a_cpu_it_is_not_chosen():
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        assert choose(random_problem(tt.LSTM, T, B, I, H, dtype=dtype)).target == "cpu"


# -- autograd, transforms, programs, streams --------------------------------------------------------------------------


@pytest.mark.parametrize("name", TORCHS)
def test_gradients_of_gradients_are_the_references(name: str):
    found = []
    problem = random_problem(TORCHS[name], T, 2, I, H, lengths=(6, 3))
    for asked in ("native", "reference"):
        output, states = run(problem, asked)
        loss = output.square().sum() + states[-1].sum()
        first = torch.autograd.grad(loss, problem.tensors, create_graph=True)
        second = torch.autograd.grad(sum((g.square().sum() for g in first), torch.tensor(0.0)), problem.tensors)
        found.append([*(g.detach() for g in first), *second])
    assert_agree(found[0], found[1])


@elsewhere
def test_transforms_and_tangents_go_to_the_reference():
    layer = tt.nn.GRU(I, H, dtype=torch.float64)
    x = torch.randn(2, T, B, I, dtype=torch.float64)
    each: Callable[[Tensor], Tensor] = lambda given: layer(given)[0]  # noqa: E731
    assert_agree(torch.func.vmap(each)(x), torch.stack([each(one) for one in x]))
    direction = torch.randn_like(x[0])
    _, tangent = torch.func.jvp(each, (x[0],), (direction,))  # type: ignore[misc]
    with forward_ad.dual_level():
        assert tt.explain(layer, x[0])[0].startswith("layer 0, forward: reference: forward-mode")
        dual = forward_ad.unpack_dual(each(forward_ad.make_dual(x[0], direction))).tangent
    assert_agree(dual, tangent)
    numbers = torch.randn(3, T, B, H, dtype=torch.float64)
    given = x[0].requires_grad_()
    (batched,) = torch.autograd.grad(each(given), given, numbers, is_grads_batched=True)
    single = [torch.autograd.grad(each(given), given, number)[0] for number in numbers]
    assert_agree(batched, torch.stack(single))


@pytest.fixture
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("name", TORCHS)
@pytest.mark.usefixtures("fresh")
def test_compiled_programs_agree(name: str):
    proj_size = 2 if TORCHS[name].projects else 0
    layer = tt.nn.Recurrent(TORCHS[name], I, H, proj_size=proj_size, target="native", dtype=torch.float64)
    x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    program = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert_agree(run_with_gradients(layer, x, call=program), run_with_gradients(layer, x))
    lengths = torch.tensor([6, 0, 2, 4])
    calls = (lambda given: program(given, lengths=lengths), lambda given: layer(given, lengths=lengths))
    compiled, eager = (run_with_gradients(layer, x, call=call) for call in calls)
    assert_agree(compiled, eager)


@pytest.mark.usefixtures("fresh")
def test_a_compiled_program_whose_loss_sees_one_end_only():
    layer = tt.nn.Recurrent(tt.LSTM, I, H, target="native", dtype=torch.float64)
    x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    program = torch.compile(layer, backend="aot_eager", fullgraph=True)
    picks: list[Callable[[Any], Tensor]] = [
        lambda r: r[0].sum(),
        lambda r: r[1][1].sum(),
        lambda r: r[1][0][0, 0].sum(),
    ]
    for lengths in (None, torch.zeros(B, dtype=torch.int64)):
        for pick in picks:
            found = []
            for call in (program, layer):
                loss = pick(call(x, lengths=lengths)).sum()
                found.append(torch.autograd.grad(loss, x, allow_unused=True, materialize_grads=True)[0])
            assert_agree(found[0], found[1])


def test_streams_step_on_it():
    layer = tt.nn.Recurrent(tt.LSTM, I, H, num_layers=2, target="native")
    x = torch.randn(T, B, I)
    output, state = layer(x)
    stream = layer.stream(B)
    assert_agree(torch.stack([stream.step(x_t) for x_t in x]), output.detach())
    assert_agree(stream.state, tuple(s.detach() for s in state))


def test_a_recording_takes_the_reference():
    layer = tt.nn.GRU(I, H)
    layer.target = "native"
    with recurrence.recording() as records:
        layer(torch.randn(T, B, I))
    assert len(records[0].states) == T


@pytest.mark.parametrize("name", TORCHS)
def test_a_batch_of_empty_rows_can_be_learnt_from_without_a_word(name: str):
    """Every gradient is zero, as on other targets; nothing is missing from the graph."""
    proj_size = 2 if TORCHS[name].projects else 0
    layer = tt.nn.Recurrent(TORCHS[name], I, H, proj_size=proj_size, target="native")
    for part in range(2):
        output, state = layer(torch.full((T, B, I), torch.nan), lengths=[0] * B)
        (output, state[0])[part].sum().backward()
        assert all(p.grad is not None and not p.grad.any() for p in layer.parameters())


# -- manners ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*TORCHS, *MINE])
@pytest.mark.parametrize("way", ["full", "empty-rows-reverse", "all-empty"])
def test_nothing_given_is_changed_shared_or_kept(name: str, way: str):
    problem = random_problem((TORCHS | MINE)[name], T, B, I, H, dtype=torch.float32, **WAYS[way])
    before = [tensor.detach().clone() for tensor in problem.tensors]
    first = everything(problem, "native")
    for tensor, kept in zip(problem.tensors, before, strict=True):
        same_bits(tensor.detach(), kept)
    given = {tensor.untyped_storage().data_ptr() for tensor in problem.tensors}
    assert not given & {tensor.untyped_storage().data_ptr() for tensor in (*first["ends"], *first["gradients"])}
    again = everything(problem, "native")
    for one, other in zip((*first["ends"], *first["gradients"]), (*again["ends"], *again["gradients"]), strict=True):
        same_bits(one, other)


def test_weights_changed_before_the_backward_run_are_noticed():
    layer = tt.nn.Recurrent(tt.GRU, I, H, target="native")
    output, _ = layer(torch.randn(T, B, I))
    with torch.no_grad():
        dict(layer.named_parameters())["weight_hh_l0"].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_shapes_that_do_not_fit_are_refused_before_torch_sees_them():
    layer = tt.nn.Recurrent(tt.GRU, I, H, target="native")
    layer.weight_hh_l0 = torch.nn.Parameter(torch.zeros(3 * H, H + 1))
    with pytest.raises(tt.errors.ShapeError, match="weight_hh has shape"):
        layer(torch.randn(T, B, I))


def test_on_other_devices_shapes_alone_can_be_asked():
    layer = tt.nn.LSTM(I, H, num_layers=2, bidirectional=True, device="meta")
    output, (h_n, c_n) = layer(torch.empty(T, B, I, device="meta"))
    assert (output.shape, h_n.shape, c_n.shape) == ((T, B, 2 * H), (4, B, H), (4, B, H))
    assert all(": native: " in line for line in tt.explain(layer, torch.empty(T, B, I, device="meta")))
