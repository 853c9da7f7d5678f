"""bfloat16 and float16 on the CPU target: a float32 run between two conversions, rounded once."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from agreement import same_bits
from blackboards import ALL, Decaying, MinimalGated, Peephole, random_problem
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence
from torch.utils._python_dispatch import TorchDispatchMode

import throughtime as tt
from throughtime.engine import recurrence
from throughtime.engine.problem import Problem
from throughtime.engine.recurrence import choose, run
from throughtime.engine.targets import target

I, H, T, B = 3, 17, 6, 4
HALF = (torch.bfloat16, torch.float16)
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "ragged-reverse": {"lengths": (5, 5, 2, 0), "reverse": True},
    "reset": {"reset": True},
    "ragged-reset": {"lengths": (5, 4, 1, 1), "reset": True},
}
half = pytest.mark.parametrize("dtype", HALF, ids=str)

# torch's own modules still use what torch deprecates
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")


@pytest.fixture(autouse=True)
def _no_preference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("THROUGHTIME_TARGET", raising=False)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def kernels_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """No gradient takes a way around the kernels."""

    def refuse(*args: Any) -> Any:
        raise AssertionError("the kernels refused what they should take")

    monkeypatch.setattr(recurrence, "_backward_elsewhere", refuse)
    monkeypatch.setattr(recurrence, "_through_reference", refuse)


def ends_and_gradients(problem: Problem, weights: list[Tensor] | None = None) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and last states, and the gradients of every tensor for incoming gradients that are the same each time."""
    output, states = run(problem)
    ends = [output, *states]
    generator = torch.Generator().manual_seed(5)
    d_ends = [torch.randn(end.shape, generator=generator).to(problem.x.dtype) for end in ends]
    if weights is not None:
        d_ends = [weight.to(problem.x.dtype) for weight in weights]
    pairs = [(end, d) for end, d in zip(ends, d_ends, strict=True) if end.requires_grad]
    found = torch.autograd.grad(
        [end for end, _ in pairs], problem.tensors, [d for _, d in pairs], materialize_grads=True, allow_unused=True
    )
    return [end.detach() for end in ends], list(found)


def weights_of(problem: Problem) -> list[Tensor]:
    """The incoming gradients of `ends_and_gradients`, as numbers that the format holds."""
    generator = torch.Generator().manual_seed(5)
    shapes = [(problem.steps, problem.rows, problem.sizes[problem.cell.output]), *(s.shape for s in problem.states)]
    return [torch.randn(shape, generator=generator).to(problem.x.dtype).float() for shape in shapes]


def widened(problem: Problem) -> Problem:
    return problem.with_tensors([tensor.detach().float().requires_grad_() for tensor in problem.tensors])


def is_rounded_once(problem: Problem) -> None:
    """Every number of the run is the one of the float32 run, rounded to the format."""
    dtype = problem.x.dtype
    assert choose(problem).target == "cpu"
    ends, gradients = ends_and_gradients(problem)
    wide_ends, wide_gradients = ends_and_gradients(widened(problem), weights_of(problem))
    for what, own, wide in (("end", ends, wide_ends), ("gradient", gradients, wide_gradients)):
        for place, (narrow, exact) in enumerate(zip(own, wide, strict=True)):
            same_bits(narrow, exact.to(dtype), f"{what} {place}")


# -- rounded once -----------------------------------------------------------------------------------------------------


@half
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ALL)
@pytest.mark.usefixtures("kernels_only")
def test_a_run_is_the_float32_run_rounded_once(name: str, way: str, dtype: torch.dtype):
    is_rounded_once(random_problem(ALL[name], 5, 4, hidden_size=H, dtype=dtype, wide_outside=True, **WAYS[way]))


@half
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (9, 1, 2, 33), (3, 40, 5, 64), (70, 2, 1, 16)], ids=str)
@pytest.mark.usefixtures("kernels_only")
def test_of_any_size(shape: tuple[int, int, int, int], dtype: torch.dtype):
    for cell in (tt.GRU, tt.ProjectedLSTM, Peephole):
        is_rounded_once(random_problem(cell, *shape, dtype=dtype))


@half
@pytest.mark.parametrize("name", ["elman", "gru", "gru-reset-before", "lstm", "lstm-projected"])
def test_the_result_is_the_definitions_but_for_that_rounding(name: str, dtype: torch.dtype):
    """Against the reference in float64: half a unit in the last place of the format, and float32's own error."""
    problem = random_problem(ALL[name], 12, B, hidden_size=H, lengths=(12, 9, 9, 1), dtype=dtype)
    ends, gradients = ends_and_gradients(problem)
    exact = problem.with_tensors([t.detach().double().requires_grad_() for t in problem.tensors])
    output, states = run(exact, "reference")
    d_ends = [weight.double() for weight in weights_of(problem)]
    right = [output, *states, *torch.autograd.grad([output, *states], exact.tensors, d_ends)]
    for number, wanted in zip([*ends, *gradients], right, strict=True):
        share, smallest = torch.finfo(dtype).eps / 2, torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        room = share * wanted.abs() + 1e-5 * wanted.abs().max() + smallest
        assert bool(((number.double() - wanted).abs() <= room).all())


@tt.cell(states="h")
def Adding(x, h):
    """A sum over time."""
    return h + x


@half
def test_states_are_carried_in_float32_where_rounding_at_each_step_would_stand_still(dtype: torch.dtype):
    """Adding a quarter of a unit in the last place does nothing if each step is rounded; 64 of them add 16 units."""
    unit = torch.finfo(dtype).eps
    x = torch.full((64, 1, 2), unit / 4, dtype=dtype)
    h_0 = torch.ones(1, 1, 2, dtype=dtype)
    layer = tt.nn.Recurrent(Adding, 2, 2)
    output, h_n = layer(x, h_0)
    expected = 1 + unit / 4 * torch.arange(1, 65, dtype=torch.float64)
    same_bits(output[:, 0, 0], expected.to(dtype))
    assert h_n.unique().item() == 1 + 16 * unit
    layer.target = "stepwise"
    assert layer(x, h_0)[0].unique().item() == 1, "which is what a loop in this format gives"
    stream = tt.nn.Recurrent(Adding, 2, 2, dtype=dtype)
    assert choose(Problem(Adding, x, (h_0[0],), ())).target == "cpu"
    assert stream(x, h_0)[1].unique().item() == 1 + 16 * unit


def test_what_a_float16_cannot_hold_is_infinite_and_not_clipped():
    layer = tt.nn.Recurrent(Adding, 1, 1)
    x = torch.full((4, 1, 1), 30000.0, dtype=torch.float16)
    output, h_n = layer(x)
    assert output.flatten().tolist() == [30000.0, 60000.0, math.inf, math.inf]
    assert h_n.item() == math.inf
    falling, _ = layer(torch.tensor([65504.0, 65504.0, -65504.0]).half()[:, None, None])
    assert falling.flatten().tolist() == [65504.0, math.inf, 65504.0], "the state itself was never infinite"


@half
def test_not_a_number_passes_through_to_its_own_row_alone(dtype: torch.dtype):
    layer = tt.nn.Recurrent(tt.GRU, I, H, dtype=dtype)
    x = torch.randn(T, B, I).to(dtype)
    plain, _ = layer(x)
    x[2, 1] = math.nan
    output, _ = layer(x)
    assert output[2:, 1].isnan().all()
    same_bits(output[:, [0, 2, 3]].detach(), plain[:, [0, 2, 3]].detach())


# -- layers -----------------------------------------------------------------------------------------------------------


def layer_of(cell: tt.Cell, dtype: torch.dtype, inputs: int = I, **options: Any) -> tt.nn.Recurrent:
    """A layer whose learnt initial states, if it has them, are not zero."""
    if cell.projects:
        options["proj_size"] = 5
    layer = tt.nn.Recurrent(cell, inputs, H, **options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0, 0.4)
    return layer.to(dtype)


def states_in(state: Any) -> tuple[Tensor, ...]:
    return state if isinstance(state, tuple) else (state,)


@half
@pytest.mark.parametrize("name", ["elman", "gru", "lstm", "lstm-projected", "MinimalGated"])
def test_layers_and_directions_round_what_each_of_them_shows(name: str, dtype: torch.dtype):
    """A deep layer in both directions is its single directions in float32, rounded one after the other."""
    deep = layer_of(ALL[name], dtype, num_layers=2, bidirectional=True, learn_initial=True)
    lengths = torch.tensor([T, 2, 0, 3])
    x = torch.randn(T, B, I).to(dtype)
    output, state = deep(x, lengths=lengths)
    below, ends = x, []
    for depth in range(2):
        sides = []
        for suffix in ("", "_reverse"):
            alone = layer_of(ALL[name], torch.float32, below.shape[-1], learn_initial=True)
            own = {key: deep.state_dict()[key.replace("_l0", f"_l{depth}{suffix}")] for key in alone.state_dict()}
            alone.load_state_dict(own)
            steps = below.float() if not suffix else backwards(below.float(), lengths)
            found, last = alone(steps, lengths=lengths)
            sides.append((found if not suffix else backwards(found, lengths)).to(dtype))
            ends.append([s.to(dtype) for s in states_in(last)])
        below = torch.cat(sides, -1)
    same_bits(output.detach(), below.detach())
    for actual, expected in zip(states_in(state), zip(*ends, strict=True), strict=True):
        same_bits(actual.detach(), torch.cat(expected).detach())


def backwards(steps: Tensor, lengths: Tensor) -> Tensor:
    """Each row from its last step to its first; what lies past its end stays."""
    turned = steps.clone()
    for row, length in enumerate(lengths.tolist()):
        turned[:length, row] = steps[:length, row].flip(0)
    return turned


@half
def test_packed_lengths_and_single_sequences_are_the_same_numbers(dtype: torch.dtype):
    layer = layer_of(tt.LSTM, dtype, bidirectional=True)
    rows = [torch.randn(n, I).to(dtype) for n in (2, 6, 3)]
    packed, _ = layer(pack_sequence(rows, enforce_sorted=False))
    padded, lengths = torch.nn.utils.rnn.pad_packed_sequence(packed)
    again, _ = layer(torch.nn.utils.rnn.pad_sequence(rows), lengths=lengths)
    same_bits(again.detach(), padded.detach())
    for number, row in enumerate(rows):
        alone, _ = layer(row)
        same_bits(alone.detach(), padded[: len(row), number].detach())


@half
def test_no_step_and_no_row_keep_the_format(dtype: torch.dtype):
    layer = layer_of(tt.GRU, dtype)
    state = torch.randn(1, B, H).to(dtype)
    output, h_n = layer(torch.empty(0, B, I, dtype=dtype), state)
    assert (output.shape, output.dtype) == ((0, B, H), dtype)
    same_bits(h_n.detach(), state)
    assert layer(torch.empty(T, 0, I, dtype=dtype))[0].shape == (T, 0, H)
    output, h_n = layer(torch.full((T, B, I), math.nan, dtype=dtype), state, lengths=[0] * B)
    same_bits(output.detach(), torch.zeros(T, B, H, dtype=dtype))
    same_bits(h_n.detach(), state)


@half
def test_dropout_between_layers_draws_the_masks_of_float32(dtype: torch.dtype):
    layer = layer_of(tt.GRU, dtype, num_layers=2, dropout=0.5)
    x = torch.randn(T, B, I).to(dtype)
    wide = copy.deepcopy(layer).float()
    found = []
    for each, steps in ((layer, x), (wide, x.float())):
        torch.manual_seed(3)
        found.append(each(steps)[0])
    layer.eval()
    assert not torch.equal(found[0], layer(x)[0])
    apart = (found[0].float() - found[1]).abs().max()
    assert apart <= 4 * torch.finfo(dtype).eps, "another mask would be tenths apart"


@half
@pytest.mark.usefixtures("kernels_only")
@pytest.mark.parametrize("steps", [30, 150, 400])
@pytest.mark.parametrize("segments", ["auto", 32])
def test_segments_change_no_bit(segments: Any, steps: int, dtype: torch.dtype):
    """At 150 steps the values that are kept are more than 4 MB in float32 and less in half precision."""
    x = torch.randn(steps, 32, 8).to(dtype).requires_grad_()
    layer = tt.nn.Recurrent(tt.LSTM, 8, 64, dtype=dtype)
    found = []
    for each in (None, segments):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it says where it rounds a number of steps up
            layer.segments = each
            output, _ = layer(x)
        loss = output.float().square().mean()
        found.append([output, *torch.autograd.grad(loss, [x, *layer.parameters()])])
    for whole, cut in zip(*found, strict=True):
        same_bits(cut.detach(), whole.detach())


@half
@pytest.mark.parametrize("way", WAYS)
def test_the_workspace_is_what_was_announced(way: str, dtype: torch.dtype):
    for segments in (None, "auto", 1):
        problem = random_problem(tt.LSTM, 5, 4, hidden_size=H, dtype=dtype, **WAYS[way])
        problem = replace(problem, segments=segments)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = target("cpu").forward(problem, True)
        assert [(t.shape, t.dtype) for t in found.workspace] == [tuple(s) for s in target("cpu").workspace(problem)]


# -- streams ----------------------------------------------------------------------------------------------------------


@half
@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("name", ["elman", "gru", "lstm", "lstm-projected", "MinimalGated", "Peephole"])
def test_a_stream_is_the_run_bit_for_bit(name: str, depth: int, dtype: torch.dtype):
    layer = layer_of(ALL[name], dtype, num_layers=depth, learn_initial=True)
    x, reset = torch.randn(T, B, I).to(dtype), torch.rand(T, B) < 0.3
    for resets in (None, reset):
        output, state = layer(x, reset=resets)
        stream = layer.stream(B)
        steps = [stream.step(x[t], reset=None if resets is None else resets[t]) for t in range(T)]
        same_bits(torch.stack(steps), output.detach())
        for actual, expected in zip(states_in(stream.state), states_in(state), strict=True):
            same_bits(actual, expected.detach())


@half
def test_a_saved_stream_goes_on_with_the_same_bits(dtype: torch.dtype):
    layer = layer_of(tt.LSTM, dtype, num_layers=2)
    x = torch.randn(12, B, I).to(dtype)
    output, _ = layer(x)
    stream = layer.stream(B)
    for t in range(5):
        stream.step(x[t])
    saved = stream.state_dict()
    assert {state.dtype for state in saved.values()} == {torch.float32}
    loaded = layer.stream(B)
    loaded.load_state_dict(saved)
    others = {"loaded": loaded, "copied": stream.copy(), "cut and stacked": type(stream).stack([stream.rows([0, 1])])}
    for name, other in others.items():
        rows = slice(0, 2) if name == "cut and stacked" else slice(None)
        steps = [other.step(x[t, rows]) for t in range(5, 12)]
        same_bits(torch.stack(steps), output[5:, rows].detach(), name)
    stream.state = stream.state  # rounded, as h_n is: it may go on with other bits, but takes it
    assert stream.state_dict()["h"].dtype == torch.float32


@half
def test_a_step_that_fails_in_a_deep_stream_changes_nothing(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    layer = layer_of(tt.GRU, dtype, num_layers=3)
    stream, x = layer.stream(B), torch.randn(2, B, I).to(dtype)
    first = stream.step(x[0])
    before = stream.state_dict()["h"]
    with monkeypatch.context() as patch:
        above: Any = stream._steps
        patch.setattr(above.layers[2], "step", lambda rows: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            stream.step(x[1])
    same_bits(stream.state_dict()["h"], before)
    output, _ = layer(x)
    same_bits(torch.stack([first, stream.step(x[1])]), output.detach())


@half
def test_a_stream_of_outside_inputs_without_a_batch(dtype: torch.dtype):
    layer = layer_of(Decaying, dtype)
    x = torch.randn(T, I).to(dtype)
    gap, mask, who = torch.rand(T, 1).to(dtype), torch.rand(T, H).to(dtype), torch.rand(H).to(dtype)
    output, _ = layer(x, outside={"gap": gap, "mask": mask, "who": who})
    stream = layer.stream()
    steps = [stream.step(x[t], outside={"gap": gap[t], "mask": mask[t], "who": who}) for t in range(T)]
    same_bits(torch.stack(steps), output.detach())


# -- what is said, and other ways in ----------------------------------------------------------------------------------


@half
def test_explain_says_it(dtype: torch.dtype):
    layer = layer_of(tt.GRU, dtype)
    x = torch.randn(T, B, I).to(dtype)
    (line,) = tt.explain(layer, x)
    assert line.startswith("layer 0, forward: cpu: ")
    assert f"it computes in float32 and rounds outputs, last states and gradients to {dtype} once" in line
    assert "float32" not in tt.explain(layer.float(), x.float())[0]
    for kind in ("GRUCell", "LSTMCell", "RNNCell"):
        one = getattr(tt.nn, kind)(I, H, dtype=dtype)
        assert f"to {dtype} once" in tt.explain(one, x[0])[0]


KINDS = ("RNN", "GRU", "LSTM")


@half
@pytest.mark.parametrize("kind", KINDS)
def test_drop_ins_are_torchs_to_the_precision_of_the_format(kind: str, dtype: torch.dtype):
    """torch rounds every value of every step: gates and states of size 1, each a few units in the last place off.

    An error in a state lives on, damped by the cell, so the sum over T steps is bounded by T times a step's few units.
    """
    theirs = getattr(torch.nn, kind)(I, H, num_layers=2, bidirectional=True, dtype=dtype)
    ours = getattr(tt.nn, kind)(I, H, num_layers=2, bidirectional=True, dtype=dtype)
    ours.load_state_dict(theirs.state_dict())
    exact = copy.deepcopy(theirs).double()
    x = torch.randn(T, B, I).to(dtype)
    output, state = ours(x)
    wanted, wanted_state = exact(x.double())
    tolerance = T * 4 * torch.finfo(dtype).eps
    other, _ = theirs(x)
    assert output.dtype == other.dtype == dtype
    assert (output.float() - other.float()).abs().max() <= tolerance
    # between the layers there is one more rounding, so ours is nearer than a step's worth of torch's
    assert (output.double() - wanted).abs().max() <= 2 * torch.finfo(dtype).eps
    for own, right in zip(states_in(state), states_in(wanted_state), strict=True):
        assert (own.double() - right).abs().max() <= 2 * torch.finfo(dtype).eps * max(1, right.abs().max().item())


@half
@pytest.mark.parametrize("kind", KINDS)
def test_single_step_cells_round_once_too(kind: str, dtype: torch.dtype):
    one = getattr(tt.nn, f"{kind}Cell")(I, H, dtype=dtype)
    x = torch.randn(B, I).to(dtype)
    wide = copy.deepcopy(one).float()
    for narrow, exact in zip(states_in(one(x)), states_in(wide(x.float())), strict=True):
        same_bits(narrow.detach(), exact.to(dtype).detach())


def modules_of(dtype: torch.dtype) -> dict[str, torch.nn.Module]:
    return {
        "recurrent": layer_of(MinimalGated, dtype, num_layers=2),
        "drop-in": tt.nn.LSTM(I, H, num_layers=2, dtype=dtype),
        "cell": tt.nn.GRUCell(I, H, dtype=dtype),
    }


@half
@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", modules_of(torch.float32))
def test_under_autocast_the_kernels_run_in_the_parameters_own_format(
    kind: str, parameters: torch.dtype, dtype: torch.dtype
):
    module = modules_of(parameters)[kind]
    x = torch.randn(B, I) if kind == "cell" else torch.randn(T, B, I)
    found = []
    for given in (x, x.to(dtype)):
        plain = module(given.to(parameters))
        with torch.autocast("cpu", dtype):
            cast = module(given)
            assert ": cpu: " in tt.explain(module, given)[0]  # type: ignore[arg-type]
            loss = (cast if kind == "cell" else cast[0]).square().sum()
        loss.backward()
        found.append(loss)
        first, second = (states_in(result)[0].detach() for result in (cast, plain))
        assert first.dtype == parameters
        same_bits(first, second)
    assert all(p.grad is not None and p.grad.dtype == parameters for p in module.parameters())


@half
@pytest.mark.parametrize("segments", [None, "auto"])
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_and_eager_are_the_same_bits(segments: Any, dtype: torch.dtype):
    """The operator's twin announces the workspace that the kernels leave, in float32."""
    layer = tt.nn.Recurrent(tt.LSTM, 8, 64, num_layers=2, segments=segments, dtype=dtype)
    x = torch.randn(150, 32, 8).to(dtype).requires_grad_()
    program = torch.compile(layer, backend="aot_eager", fullgraph=True)
    found = []
    for call in (layer, program):
        output, state = call(x)
        loss = output.float().square().mean() + state[1].float().mean()
        found.append([output, *state, *torch.autograd.grad(loss, [x, *layer.parameters()])])
    for eager, compiled in zip(*found, strict=True):
        same_bits(compiled.detach(), eager.detach())


class Watching(TorchDispatchMode):
    """Sees every operation, and runs it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@half
def test_the_registered_operator_gives_the_same_bits(dtype: torch.dtype):
    layer = layer_of(tt.GRU, dtype)
    x = torch.randn(T, B, I).to(dtype)
    output, _ = layer(x, lengths=[6, 1, 0, 4])
    with Watching() as mode:
        seen, _ = layer(x, lengths=[6, 1, 0, 4])
    assert any("throughtime.recurrence" in name for name in mode.seen)
    same_bits(seen.detach(), output.detach())


@half
def test_accumulated_and_scaled_gradients_are_the_exact_ones_to_the_format(dtype: torch.dtype):
    """As with `torch.amp.GradScaler`: a loss scaled by a power of two saves what float16 would flush to zero."""
    layer = layer_of(tt.GRU, dtype)
    exact = copy.deepcopy(layer).double()
    parts = [torch.randn(T, B, I).to(dtype) for _ in range(3)]
    scale = 2.0**12
    for x in parts:
        (layer(x)[0].float().mean() * 1e-4 * scale).backward()
        (exact(x.double())[0].mean() * 1e-4).backward()
    for own, right in zip(layer.parameters(), exact.parameters(), strict=True):
        assert own.grad is not None
        assert right.grad is not None
        apart = (own.grad.double() / scale - right.grad).abs().max() / right.grad.abs().max()
        # each of three terms and two sums is rounded by half a unit; the terms may be larger than their sum
        assert apart <= 8 * torch.finfo(dtype).eps


@half
def test_a_gradient_too_large_for_float16_is_infinite_so_that_a_scaler_sees_it(dtype: torch.dtype):
    layer = tt.nn.Recurrent(Adding, 1, 1)
    x = torch.ones(3, 1, 1, dtype=dtype, requires_grad=True)
    output, _ = layer(x)
    output.backward(torch.full_like(output, 60000.0))
    expected = torch.full((3, 1, 1), 60000.0).to(dtype).float() * torch.tensor([3.0, 2.0, 1.0])[:, None, None]
    assert x.grad is not None
    same_bits(x.grad, expected.to(dtype))
    assert x.grad.isinf().any().item() == (dtype == torch.float16)


@half
def test_gradients_of_gradients_go_through_float32(dtype: torch.dtype):
    """With create_graph the reference runs, in float32: first gradients stay what they are without, to one rounding."""
    problem = random_problem(tt.GRU, 20, 2, hidden_size=5, dtype=dtype)
    exact = problem.with_tensors([t.detach().double().requires_grad_() for t in problem.tensors])
    found = []
    for each, asked in ((problem, None), (exact, "reference")):
        output, _ = run(each, asked)
        loss = widened_sum_of_squares(output)
        first = torch.autograd.grad(loss, each.tensors, create_graph=True)
        second = torch.autograd.grad(sum(map(widened_sum_of_squares, first), torch.tensor(0.0)), each.tensors)
        found.append((first, second))
    eps = torch.finfo(dtype).eps
    for own, right in zip(found[0][0], found[1][0], strict=True):
        assert (own.double() - right).abs().max() <= 4 * eps * right.abs().max()
    for own, right in zip(found[0][1], found[1][1], strict=True):
        assert (own.double() - right).abs().max() <= 16 * eps * right.abs().max()


def widened_sum_of_squares(tensor: Tensor) -> Tensor:
    """In float32 at least."""
    return (tensor.float() if tensor.element_size() == 2 else tensor).square().sum()


@half
def test_nothing_given_is_changed_and_nothing_returned_is_shared(dtype: torch.dtype):
    layer = layer_of(tt.LSTM, dtype)
    x, state = torch.randn(T, B, I).to(dtype), tuple(torch.randn(1, B, H).to(dtype) for _ in "hc")
    before = [t.detach().clone() for t in (x, *state, *layer.parameters())]
    output, h_n = layer(x, state, lengths=[6, 0, 2, 1])
    output.float().sum().backward()
    for kept, now in zip(before, (x, *state, *layer.parameters()), strict=True):
        same_bits(now.detach(), kept)
    given = {t.untyped_storage().data_ptr() for t in (x, *state, *layer.parameters())}
    assert not given & {t.untyped_storage().data_ptr() for t in (output, *h_n)}
