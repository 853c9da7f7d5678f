"""throughtime.nn's RNNCell, LSTMCell and GRUCell are torch's in everything but the computation."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from agreement import assert_agree, run_with_gradients, tensors_in
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import throughtime as tt
from throughtime.engine import recurrence

I, H, B = 3, 5, 4

KINDS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "rnn-tanh": (torch.nn.RNNCell, tt.nn.RNNCell, {}),
    "rnn-relu": (torch.nn.RNNCell, tt.nn.RNNCell, {"nonlinearity": "relu"}),
    "gru": (torch.nn.GRUCell, tt.nn.GRUCell, {}),
    "lstm": (torch.nn.LSTMCell, tt.nn.LSTMCell, {}),
}

# torch's own modules still use what torch deprecates
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")


def pair(kind: str, **options: Any) -> tuple[Any, Any]:
    """torch's cell and ours with the same options, made after the same seed."""
    theirs, ours, own = KINDS[kind]
    torch.manual_seed(3)
    expected = theirs(I, H, **own, **options)
    torch.manual_seed(3)
    return expected, ours(I, H, **own, **options)


def given(kind: str, *lead: int, state: bool = True, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    """x and a state, or x alone, with as many rows as `lead` says."""
    x = torch.randn(*lead, I, dtype=dtype, requires_grad=True)
    h, c = (torch.randn(*lead, H, dtype=dtype, requires_grad=True) for _ in range(2))
    return (x, (h, c) if kind == "lstm" else h) if state else (x,)


def ran_on(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list that gets the target of every recurrence from now on."""
    seen: list[str] = []
    choose = recurrence.choose

    def noted(*arguments: Any) -> recurrence.Choice:
        choice = choose(*arguments)
        seen.append(choice.target)
        return choice

    monkeypatch.setattr(recurrence, "choose", noted)
    return seen


@pytest.mark.parametrize("state", [False, True], ids=["no-state", "state"])
@pytest.mark.parametrize("lead", [(B,), (), (1,), (0,)], ids=["rows", "unbatched", "one row", "no rows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_states_and_gradients_are_torchs(
    kind: str, bias: bool, dtype: torch.dtype, lead: tuple[int, ...], state: bool
) -> None:
    expected, actual = pair(kind, bias=bias, dtype=dtype, device="cpu")
    inputs = given(kind, *lead, state=state, dtype=dtype)
    assert_agree(run_with_gradients(actual, *inputs), run_with_gradients(expected, *inputs))


@pytest.mark.parametrize("kind", KINDS)
def test_a_loop_of_steps_is_the_layer(kind: str) -> None:
    _, cell = pair(kind, dtype=torch.float64)
    layers = {"rnn-tanh": tt.nn.RNN, "rnn-relu": tt.nn.RNN, "gru": tt.nn.GRU, "lstm": tt.nn.LSTM}
    layer = layers[kind](I, H, dtype=torch.float64, **KINDS[kind][2])
    layer.load_state_dict({f"{name}_l0": value for name, value in cell.state_dict().items()})
    x, h = torch.randn(7, B, I, dtype=torch.float64), None
    shown = []
    for x_t in x:
        h = cell(x_t, h)
        shown.append(h[0] if kind == "lstm" else h)
    assert_agree(torch.stack(shown), layer(x)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_torchs_class_with_torchs_values_and_names(kind: str) -> None:
    expected, actual = pair(kind, bias=False)
    assert isinstance(actual, type(expected))
    assert str(actual) == str(expected)
    assert_agree(actual.state_dict(), expected.state_dict())
    assert actual.cell.states == (("h", "c") if kind == "lstm" else ("h",))
    twin = copy.deepcopy(actual)
    assert_agree(twin(torch.ones(I)), expected(torch.ones(I)))


@pytest.mark.parametrize("kind", KINDS)
def test_strides_and_shared_tensors_change_nothing(kind: str) -> None:
    expected, actual = pair(kind)
    x = torch.randn(I, 2 * B)[:, ::2].T
    h = torch.randn(H, B).T
    hx = [h, h] if kind == "lstm" else h
    assert_agree(actual(x, hx), expected(x, tuple(hx) if kind == "lstm" else hx))


# ---------------------------------------------------------------------------------------------------------------------
# Messages


def t(*shape: int, **options: Any) -> Tensor:
    return torch.zeros(*shape, **options)


BAD_CALLS: dict[str, tuple[Callable[[], tuple[Any, ...]], str]] = {
    "x of no dimension": (lambda: (torch.tensor(1.0),), "all"),
    "x of three dimensions": (lambda: (t(1, B, I),), "all"),
    "x of another width": (lambda: (t(B, I + 1),), "all"),
    "x of another width, unbatched": (lambda: (t(I + 1),), "all"),
    "x of another type": (lambda: (t(B, I, dtype=torch.float64),), "all"),
    "x of integers": (lambda: (t(B, I, dtype=torch.int64),), "all"),
    "x no tensor": (lambda: ([[1.0]],), "all"),
    "state of another width": (lambda: (t(B, I), t(B, H + 1)), "single"),
    "state of other rows": (lambda: (t(B, I), t(B + 1, H)), "single"),
    "state without rows": (lambda: (t(B, I), t(H)), "single"),
    "state with rows, x without": (lambda: (t(I), t(1, H)), "single"),
    "state of three dimensions": (lambda: (t(B, I), t(1, B, H)), "single"),
    "state of another type": (lambda: (t(B, I), t(B, H, dtype=torch.float64)), "single"),
    "state a tuple": (lambda: (t(B, I), (t(B, H),)), "single"),
    "a tensor for a pair": (lambda: (t(B, I), t(B, H)), "pair"),
    "one state for two": (lambda: (t(B, I), (t(B, H),)), "pair"),
    "three states for two": (lambda: (t(B, I), (t(B, H),) * 3), "pair"),
    "pair with a bad h": (lambda: (t(B, I), (t(B, H + 1), t(B, H))), "pair"),
    "pair with a bad c": (lambda: (t(B, I), (t(B, H), t(B, H + 1))), "pair"),
    "pair of other rows": (lambda: (t(B, I), (t(B + 1, H), t(B + 1, H))), "pair"),
    "pair of four dimensions": (lambda: (t(B, I), (t(B, 1, 1, H), t(B, 1, 1, H))), "pair"),
    "pair of another type": (lambda: (t(B, I), (t(B, H, dtype=torch.float64), t(B, H))), "pair"),
}


def outcome(call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """What is returned, or the error's type and words."""
    try:
        return call(*arguments, **options)
    except Exception as error:
        return type(error), str(error)


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls_get_torchs_own_answers(case: str) -> None:
    make, whose = BAD_CALLS[case]
    kinds = {"all": list(KINDS), "single": ["rnn-tanh", "rnn-relu", "gru"], "pair": ["lstm"]}[whose]
    for kind in kinds:
        expected, actual = pair(kind)
        wanted = outcome(expected, *make())
        assert isinstance(wanted, tuple), kind
        assert isinstance(wanted[0], type), f"{kind}: torch takes this"
        assert outcome(actual, *make()) == wanted, kind


@pytest.mark.filterwarnings("ignore:Complex modules are a new feature")
def test_what_torch_takes_beyond_the_usual_is_torchs_to_compute() -> None:
    expected, actual = pair("lstm")
    x, h, c = t(B, I) + 1, t(B, H) + 1, t(B, H, dtype=torch.float64) + 1
    assert_agree(actual(x, (h, c)), expected(x, (h, c)))
    for cell in (expected, actual):
        cell.to(torch.complex64)
    x, h = torch.randn(B, I, dtype=torch.cfloat), torch.randn(B, H, dtype=torch.cfloat)
    assert torch.equal(actual(x, (h, h))[0], expected(x, (h, h))[0])


def test_weights_that_do_not_fit_get_torchs_own_words() -> None:
    for change in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        found = []
        for cell in pair("gru"):
            setattr(cell, change, torch.nn.Parameter(torch.zeros(2, 2)))
            found.append(outcome(cell, t(B, I), t(B, H)))
        assert found[0] == found[1]
        assert isinstance(found[0][0], type)


@pytest.mark.parametrize(
    ("sizes", "options"), [((I,), {}), ((I, H), {"bias": 1}), ((I, -1), {}), ((2.5, H), {}), ((I, H), {"odd": 1})]
)
@pytest.mark.parametrize("kind", KINDS)
def test_constructors_are_torchs(kind: str, sizes: tuple[Any, ...], options: dict[str, Any]) -> None:
    theirs, ours, own = KINDS[kind]

    def made(make: Any) -> Any:
        torch.manual_seed(0)
        found = outcome(make, *sizes, **own, **options)
        return str(found.state_dict()) if isinstance(found, torch.nn.Module) else found

    wanted, found = made(theirs), made(ours)
    if isinstance(wanted, tuple):  # the words name the class by where it is defined
        wanted, found = wanted[0], found[0]
    assert found == wanted


def test_an_unknown_nonlinearity_is_refused_as_by_torch() -> None:
    found = [outcome(kind(I, H, nonlinearity="sine"), t(B, I)) for kind in (torch.nn.RNNCell, tt.nn.RNNCell)]
    assert found[0] == found[1] == (RuntimeError, "Unknown nonlinearity: sine")


# ---------------------------------------------------------------------------------------------------------------------
# In every way that torch differentiates and runs


@pytest.mark.parametrize("kind", KINDS)
def test_it_can_be_differentiated_twice(kind: str) -> None:
    _, cell = pair(kind, dtype=torch.float64)
    inputs = given(kind, 2, dtype=torch.float64)
    flat = [*tensors_in(inputs), *cell.parameters()]

    def f(*tensors: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip([name for name, _ in cell.named_parameters()], tensors[-4:], strict=True))
        state = tensors[1:-4]
        found = torch.func.functional_call(cell, named, (tensors[0], state if kind == "lstm" else state[0]))
        return found if kind == "lstm" else (found,)

    assert torch.autograd.gradcheck(f, flat, fast_mode=True)
    assert torch.autograd.gradgradcheck(f, flat, fast_mode=True)


def by_hand(kind: str, named: dict[str, Tensor], x: Tensor, state: Any) -> Tensor:
    """h after a step, in torch's plain operations: torch has no batching rules for its own cells."""
    h, c = state if kind == "lstm" else (state, state)
    from_x = torch.nn.functional.linear(x, named["weight_ih"], named["bias_ih"])
    from_h = torch.nn.functional.linear(h, named["weight_hh"], named["bias_hh"])
    if kind == "lstm":
        i, f, g, o = (from_x + from_h).chunk(4, -1)
        found: Tensor = o.sigmoid() * (f.sigmoid() * c + i.sigmoid() * g.tanh()).tanh()
        return found
    if kind == "gru":
        (r, z, n), (r_h, z_h, n_h) = from_x.chunk(3, -1), from_h.chunk(3, -1)
        z = (z + z_h).sigmoid()
        return (1 - z) * (n + (r + r_h).sigmoid() * n_h).tanh() + z * h
    return (from_x + from_h).relu() if kind == "rnn-relu" else (from_x + from_h).tanh()


@pytest.mark.parametrize("kind", KINDS)
def test_transforms_of_torch_func_and_forward_mode_are_right(kind: str) -> None:
    _, cell = pair(kind, dtype=torch.float64)
    x, state = given(kind, B, dtype=torch.float64)
    x = x.detach()
    state = tuple(s.detach() for s in state) if kind == "lstm" else state.detach()
    named = {name: parameter.detach() for name, parameter in cell.named_parameters()}

    def ours(named: dict[str, Tensor], x: Tensor, state: Any) -> Tensor:
        found = torch.func.functional_call(cell, named, (x, state))
        return found[0] if kind == "lstm" else found

    def theirs(named: dict[str, Tensor], x: Tensor, state: Any) -> Tensor:
        return by_hand(kind, named, x, state)

    for transform in (
        lambda f: torch.func.vmap(f, (None, 0, 0))(named, x, state),
        lambda f: torch.func.jacrev(f, (1, 2))(named, x, state),
        lambda f: torch.func.jacfwd(f, (1, 2))(named, x, state),
        lambda f: torch.func.jvp(lambda v: f(named, v, state), (x,), (torch.ones_like(x),)),
        lambda f: torch.func.vmap(torch.func.grad(lambda *a: f(*a).square().sum()), (None, 0, 0))(named, x, state),
    ):
        assert_agree(transform(ours), transform(theirs))


@pytest.fixture
def dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_it_is_one_graph_of_torchs_operations(kind: str) -> None:
    expected, actual = pair(kind)
    backend = CompileCounterWithBackend("aot_eager")
    compiled: Any = torch.compile(actual, fullgraph=True, backend=backend)
    for rows in (B, B + 1, B + 2):
        inputs = given(kind, rows)
        found = run_with_gradients(actual, *inputs, call=compiled.__call__)
        assert_agree(found, run_with_gradients(expected, *inputs))
    assert backend.frame_count <= 2


@pytest.mark.parametrize("kind", KINDS)
def test_traced_and_exported_it_needs_nothing_of_throughtime(kind: str) -> None:
    expected, actual = pair(kind)
    inputs = given(kind, B)
    program = torch.export.export(actual, inputs)
    assert "throughtime" not in str(program.graph)
    traced = torch.jit.trace(actual, inputs)
    other = given(kind, B + 3)
    assert_agree(program.module()(*inputs), expected(*inputs))
    assert_agree(traced(*other), expected(*other))


@pytest.mark.parametrize("kind", KINDS)
def test_under_autocast_it_computes_in_its_own_dtype(kind: str) -> None:
    _, cell = pair(kind)
    x, state = given(kind, B)
    low: Any = tuple(s.bfloat16() for s in state) if kind == "lstm" else state.bfloat16()
    wide = tuple(s.float() for s in low) if kind == "lstm" else low.float()
    with torch.autocast("cpu", torch.bfloat16):
        whole, mixed, alone = cell(x, state), cell(x.bfloat16(), low), cell(x.bfloat16())
    assert_agree(whole, cell(x, state))
    assert_agree(mixed, cell(x.bfloat16().float(), wide))
    assert_agree(alone, cell(x.bfloat16().float()))


class Marked(Tensor):
    pass


def test_subclasses_of_tensor_and_shapes_alone_are_torchs_to_compute() -> None:
    from torch._subclasses import FakeTensorMode

    expected, actual = pair("gru")
    x = torch.randn(B, I)
    found = actual(x.as_subclass(Marked))
    assert type(found) is Marked
    assert_agree(found.as_subclass(Tensor), expected(x))
    assert actual.to("meta")(x.to("meta")).shape == (B, H)
    with FakeTensorMode():
        assert tt.nn.GRUCell(I, H)(torch.randn(B, I)).shape == (B, H)


# ---------------------------------------------------------------------------------------------------------------------
# In the library


@pytest.mark.parametrize("kind", KINDS)
def test_the_engine_runs_it_and_says_on_what(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, actual = pair(kind)
    inputs = given(kind, B)
    assert tt.explain(actual, *inputs) == ["step: cpu: the fastest of the targets that can run this"]
    seen = ran_on(monkeypatch)
    actual(*inputs)
    for target in ("stepwise", "reference", "cpu"):
        actual.target = target
        assert tt.explain(actual, *inputs) == [f"step: {target}: the argument target= asks for it"]
        seen.clear()
        assert_agree(actual(*inputs), expected(*inputs))
        assert seen == [target]
    actual.target = "abacus"
    with pytest.raises(tt.TargetError, match="'abacus'; the targets are"):
        actual(*inputs)


def test_insight_looks_past_it() -> None:
    class Both(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.cell = torch.nn.GRU(I, H), torch.nn.GRUCell(H, H)

        def forward(self, x: Tensor) -> Tensor:
            outputs: Tensor = self.layer(x)[0]
            found: Tensor = self.cell(outputs[-1])
            return found

    from throughtime.insight.rehearsal import rehearse

    model = Both()
    for _ in range(2):
        run = rehearse(model, torch.randn(6, B, I))
        assert [place.module for place in run.places] == ["layer"]
        assert len(run.records) == 1
        tt.upgrade(model)
    with pytest.raises(tt.ThroughtimeError, match="no single-step cells such as GRUCell"):
        rehearse(tt.nn.GRUCell(I, H), torch.randn(B, I))
