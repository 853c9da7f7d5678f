"""The derived adjoints run through time against the plain loop under autograd: every cell, every way to run it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from agreement import assert_agree
from blackboards import ALL, ODD, MinimalGated, random_cells, random_problem
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import forward_ad

from throughtime.engine import recurrence, targets
from throughtime.engine.problem import Problem, Result
from throughtime.engine.recurrence import choose, recording, run
from throughtime.engine.targets import reference, stepwise
from throughtime.engine.targets.target import Target
from throughtime.equations.catalogue import CELLS, GRU, LSTM, Elman
from throughtime.equations.cell import Cell, cell
from throughtime.equations.expr import tanh, where
from throughtime.errors import TargetError

RAGGED = (5, 3, 0)


def outcome(problem: Problem, target: str) -> dict[str, Any]:
    """Outputs, last states and, by name, every gradient of a fixed weighting of all of them."""
    output, states = run(problem, target)
    generator = torch.Generator().manual_seed(11)
    ends = [output, *states]
    loss = sum((end * torch.randn(end.shape, generator=generator, dtype=end.dtype)).sum() for end in ends)
    wanted = [tensor for tensor in problem.tensors if tensor.requires_grad]
    found: Sequence[Tensor | None] = [None] * len(wanted)
    if isinstance(loss, Tensor) and loss.requires_grad:
        found = torch.autograd.grad(loss, wanted, allow_unused=True)
    gradients = [torch.zeros_like(t) if g is None else g for t, g in zip(wanted, found, strict=True)]
    return {"output": output.detach(), "states": [s.detach() for s in states], "gradients": gradients}


def filled(problem: Problem, filler: float) -> Problem:
    """The same problem with something else past each row's end, in x and in what comes from outside per step."""
    if problem.lengths is None:
        return problem
    past = torch.arange(problem.steps)[:, None, None] >= torch.tensor(problem.lengths)[:, None]
    per_step = len(problem.cell.per_step)

    def fill(tensor: Tensor) -> Tensor:
        return torch.where(past, filler, tensor.detach()).requires_grad_()

    outside = tuple(fill(value) if i < per_step else value for i, value in enumerate(problem.outside))
    return replace(problem, x=fill(problem.x), outside=outside)


def agree(problem: Problem, target: str = "stepwise") -> None:
    """The target and the reference give the same, and nothing that lies past a row's end reaches either."""
    expected = outcome(problem, "reference")
    assert_agree(outcome(filled(problem, float("nan")), target), expected, target)
    if problem.lengths is not None:
        assert_agree(outcome(filled(problem, float("nan")), "reference"), expected, "reference")


# -- every cell, every way --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("ragged", [False, True], ids=["full", "ragged"])
@pytest.mark.parametrize("reset", [False, True], ids=["whole", "reset"])
@pytest.mark.parametrize("name", ALL)
def test_stepwise_is_the_reference(name: str, reverse: bool, ragged: bool, reset: bool):
    lengths = RAGGED if ragged else None
    agree(random_problem(ALL[name], lengths=lengths, reset=reset, reverse=reverse, wide_outside=reverse))


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 4, 3, 17), (7, 1, 2, 1), (3, 2, 5, 17)], ids=str)
@pytest.mark.parametrize("name", ALL)
def test_odd_sizes(name: str, shape: tuple[int, int, int, int]):
    agree(random_problem(ALL[name], *shape))


@pytest.mark.parametrize("name", ALL)
def test_single_precision(name: str):
    agree(random_problem(ALL[name], lengths=RAGGED, reset=True, dtype=torch.float32))


@pytest.mark.parametrize("name", [name for name in ODD if not name.startswith("elman")])
@pytest.mark.parametrize("target", [name for name in recurrence.TARGETS if name not in ("stepwise", "reference")])
def test_every_target_runs_odd_cells(target: str, name: str):
    ragged = random_problem(ODD[name], 6, 5, 3, 17, lengths=(6, 6, 4, 1, 0), reverse=True, dtype=torch.float32)
    reason = targets.target(target).refusal(ragged)
    if reason is not None:
        pytest.skip(f"{target}: {reason}")
    agree(ragged, target)
    agree(random_problem(ODD[name], 6, 5, 3, 17, reset=True, dtype=torch.float32), target)


@given(random_cells(), st.data())
@settings(max_examples=120)
def test_any_cell_on_any_problem(cell: Cell, data: st.DataObject):
    steps, rows = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3))
    lengths = data.draw(st.none() | st.lists(st.integers(0, steps), min_size=rows, max_size=rows))
    hidden_size = data.draw(st.sampled_from([1, 2, 5]))
    problem = random_problem(
        cell,
        steps,
        rows,
        data.draw(st.integers(1, 3)),
        hidden_size,
        lengths=None if lengths is None else tuple(sorted(lengths, reverse=True)),
        reset=data.draw(st.booleans()),
        reverse=data.draw(st.booleans()),
        wide_outside=data.draw(st.booleans()),
        seed=data.draw(st.integers(0, 99)),
    )
    agree(problem)


@pytest.mark.parametrize("name", ["gru", "lstm-projected", "Decaying", "Still"])
def test_only_what_is_asked_for_gets_a_gradient(name: str):
    whole = random_problem(ALL[name], reset=True)
    everything = outcome(whole, "stepwise")["gradients"]
    for place in range(len(whole.tensors)):
        tensors = [t.detach().requires_grad_(i == place) for i, t in enumerate(whole.tensors)]
        (alone,) = outcome(whole.with_tensors(tensors), "stepwise")["gradients"]
        assert_agree(alone, everything[place], f"tensor {place}")


def test_a_loss_on_the_last_state_alone_or_on_one_output():
    problem = random_problem(LSTM, lengths=RAGGED)
    for pick in (lambda o, s: s[1].sum(), lambda o, s: o[2].square().sum(), lambda o, s: s[0][0].sum()):
        ours, theirs = (
            torch.autograd.grad(pick(*run(problem, target)), problem.tensors, allow_unused=True)
            for target in ("stepwise", "reference")
        )
        zeros = [torch.zeros_like(t) for t in problem.tensors]
        expected = [z if g is None else g for g, z in zip(theirs, zeros, strict=True)]
        assert_agree([z if g is None else g for g, z in zip(ours, zeros, strict=True)], expected)


def test_a_state_that_no_step_reads_reaches_no_gradient():
    """A row without steps may begin at NaN; its gradient is its own alone."""
    problem = random_problem(GRU, lengths=RAGGED)
    h_0 = problem.states[0].detach().clone()
    h_0[2] = float("nan")
    broken = replace(problem, states=(h_0.requires_grad_(),))
    for target in ("stepwise", "reference"):
        assert_agree(outcome(broken, target)["gradients"], outcome(problem, target)["gradients"])


def test_no_steps_and_no_length_give_back_where_they_began():
    for lengths, steps in (((0, 0, 0), 4), (None, 0)):
        problem = random_problem(GRU, steps=steps, lengths=lengths)
        for target in ("stepwise", "reference"):
            output, (h_n,) = run(problem, target)
            assert output.shape == (steps, 3, 6)
            assert not output.any()
            assert torch.equal(h_n, problem.states[0])


# -- what running through time means ----------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["stepwise", "reference"])
@pytest.mark.parametrize("name", ALL)
def test_a_sequence_run_in_two_pieces_is_the_sequence_run_whole(name: str, target: str):
    problem = random_problem(ALL[name], steps=6)
    per_step = len(problem.cell.per_step)

    def piece(start: int, stop: int, states: tuple[Tensor, ...]) -> Problem:
        outside = tuple(v[start:stop] if i < per_step else v for i, v in enumerate(problem.outside))
        return replace(problem, x=problem.x[start:stop], states=states, outside=outside)

    whole, last = run(problem, target)
    first, between = run(piece(0, 2, problem.states), target)
    second, end = run(piece(2, 6, between), target)
    assert_agree(torch.cat([first, second]), whole)
    assert_agree(end, last)


@pytest.mark.parametrize("name", CELLS)
def test_a_reset_is_a_sequence_that_begins(name: str):
    problem = random_problem(CELLS[name], steps=6, reset=True)
    mask = torch.zeros(6, 3, dtype=torch.bool)
    mask[2] = True
    output, last = run(replace(problem, reset=mask), "stepwise")
    plain = replace(problem, reset=None, initial=())
    first, _ = run(replace(plain, x=problem.x[:2]), "stepwise")
    second, end = run(replace(plain, x=problem.x[2:], states=problem.initial), "stepwise")
    assert_agree(output, torch.cat([first, second]))
    assert_agree(last, end)


@pytest.mark.parametrize("name", CELLS)
def test_reverse_is_forward_on_each_row_turned_round(name: str):
    problem = random_problem(CELLS[name], lengths=RAGGED, reverse=True)
    output, last = run(problem, "stepwise")
    for row, length in enumerate(RAGGED):
        alone = replace(
            problem,
            x=problem.x[:length, row : row + 1].flip(0),
            states=tuple(state[row : row + 1] for state in problem.states),
            lengths=None,
            reverse=False,
        )
        turned, end = run(alone, "stepwise")
        assert_agree(output[:length, row : row + 1], turned.flip(0))
        assert_agree([state[row : row + 1] for state in last], list(end))
        assert not output[length:, row].any()


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(0, 3))
def test_active_rows_are_those_whose_length_is_not_reached(lengths: list[int], more: int):
    lengths = sorted(lengths, reverse=True)
    steps = lengths[0] + more
    problem = random_problem(Elman, steps, len(lengths), 1, 1, lengths=tuple(lengths))
    assert problem.active() == [sum(length > t for length in lengths) for t in range(steps)]


def test_nan_and_infinity_inside_a_row_are_not_laundered():
    for name, broken in itertools.product(CELLS, (float("nan"), float("inf"))):
        problem = random_problem(CELLS[name])
        x = problem.x.detach().clone()
        x[2, 1, 0] = broken
        output, _ = run(replace(problem, x=x), "stepwise")
        expected, _ = run(replace(problem, x=x), "reference")
        assert torch.equal(output.isnan(), expected.isnan()), (name, broken)
        assert output[:, 0].isfinite().all(), "another row is not touched"
        if broken != broken:
            assert output[2:, 1].isnan().all()


# -- differentiation in every way -------------------------------------------------------------------------------------

SMOOTH = ["elman", "gru", "gru-reset-before", "lstm", "lstm-projected", "MinimalGated", "Peephole", "Twins", "LowRank"]


def as_function(problem: Problem, target: str | None = None) -> Any:
    """The recurrence as a function of its tensors alone."""

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        output, states = run(problem.with_tensors(tensors), target)
        return output, *states

    return function


@pytest.mark.parametrize("name", SMOOTH)
def test_gradcheck(name: str):
    problem = random_problem(ALL[name], 3, 2, 2, 3, lengths=(3, 2), reset=True)
    assert torch.autograd.gradcheck(as_function(problem, "stepwise"), problem.tensors)


@pytest.mark.parametrize("name", ["elman", "gru-reset-before", "lstm-projected", "MinimalGated"])
def test_gradgradcheck(name: str):
    problem = random_problem(ALL[name], 2, 1, 1, 3)
    assert torch.autograd.gradgradcheck(as_function(problem, "stepwise"), problem.tensors)


@pytest.mark.parametrize("name", ALL)
def test_a_penalty_on_gradients_differentiates_twice(name: str):
    problem = random_problem(ALL[name], lengths=RAGGED, reset=True)
    twice = []
    for target in ("stepwise", "reference"):
        output, states = run(problem, target)
        loss = output.square().sum() + sum(state.sum() for state in states)
        found = torch.autograd.grad(loss, problem.tensors, create_graph=True, allow_unused=True)
        penalty = sum(g.square().sum() for g in found if g is not None)
        assert isinstance(penalty, Tensor)
        second = torch.autograd.grad(penalty, problem.tensors, allow_unused=True)
        twice.append([torch.zeros_like(t) if g is None else g for t, g in zip(problem.tensors, second, strict=True)])
    assert_agree(twice[0], twice[1])
    assert any(g.any() for g in twice[0])


def tangents_of(problem: Problem, seed: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in problem.tensors)


torch_uses_its_own_deprecated_script = pytest.mark.filterwarnings("ignore:`torch.jit.script` is:DeprecationWarning")


@torch_uses_its_own_deprecated_script
@pytest.mark.parametrize("name", SMOOTH)
def test_tangents_are_right_and_not_zero(name: str):
    problem = random_problem(ALL[name], lengths=RAGGED)
    tensors = tuple(tensor.detach() for tensor in problem.tensors)
    tangents = tangents_of(problem, 5)
    function, reference = as_function(problem), as_function(problem, "reference")
    step = 1e-6
    ahead, behind = (reference(*(t + s * d for t, d in zip(tensors, tangents, strict=True))) for s in (step, -step))
    by_func = torch.func.jvp(function, tensors, tangents)[1]
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(t, d) for t, d in zip(tensors, tangents, strict=True)]
        by_duals = [forward_ad.unpack_dual(end).tangent for end in function(*duals)]
    for i, one in enumerate(by_func):
        slope = (ahead[i] - behind[i]) / (2 * step)
        torch.testing.assert_close(one, slope, rtol=1e-6, atol=1e-8)
        assert_agree(by_duals[i], one)
        assert one.abs().max() > 1e-3


@torch_uses_its_own_deprecated_script
def test_functional_transforms_agree_with_autograd():
    problem = random_problem(GRU, 3, 2, 2, 3)
    tensors = tuple(tensor.detach() for tensor in problem.tensors)

    def loss(x: Tensor, *others: Tensor) -> Tensor:
        output, (h_n,) = run(problem.with_tensors((x, *others)))
        return output.square().sum() + h_n.sum()

    expected = torch.autograd.grad(loss(*problem.tensors), problem.tensors)
    assert_agree(list(torch.func.grad(loss, argnums=tuple(range(len(tensors))))(*tensors)), list(expected))
    reverse, forward = torch.func.jacrev(loss)(*tensors), torch.func.jacfwd(loss)(*tensors)
    assert_agree(reverse, expected[0])
    assert_agree(forward, expected[0])
    hessian = torch.func.hessian(loss)(*tensors)
    by_hand = torch.autograd.functional.hessian(lambda x: loss(x, *tensors[1:]), tensors[0])
    assert_agree(hessian, by_hand)
    assert hessian.abs().max() > 1e-2


def test_gradients_sample_by_sample():
    problem = random_problem(GRU, 3, 4, 2, 3)

    def loss(weight: Tensor, x: Tensor, h_0: Tensor) -> Tensor:
        tensors = (x[:, None], h_0[None], problem.parameters[0], weight, *problem.parameters[2:])
        output, _ = run(problem.with_tensors(tensors))
        return output.square().sum()

    weight = problem.parameters[1].detach()
    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 1, 0))(weight, problem.x, problem.states[0])
    for row in range(4):
        watched = weight.clone().requires_grad_()
        (alone,) = torch.autograd.grad(loss(watched, problem.x[:, row], problem.states[0][row]), watched)
        assert_agree(each[row], alone, f"row {row}")


def test_a_batch_of_gradients_at_once():
    """torch runs the backward under vmap for is_grads_batched and for jacobian(vectorize=True)."""
    problem = random_problem(LSTM, 3, 2, 2, 3)
    output, _ = run(problem, "stepwise")
    seeds = torch.randn(5, *output.shape, dtype=torch.float64)
    together = torch.autograd.grad(output, problem.tensors, seeds, is_grads_batched=True, retain_graph=True)
    for i, seed in enumerate(seeds):
        alone = torch.autograd.grad(output, problem.tensors, seed, retain_graph=True)
        assert_agree([g[i] for g in together], list(alone))

    def last(x: Tensor) -> Tensor:
        return run(replace(problem, x=x), "stepwise")[0][-1]

    plain, vectorised = (torch.autograd.functional.jacobian(last, problem.x, vectorize=v) for v in (False, True))
    assert_agree(vectorised, plain)


def test_checkpointing_recomputes_the_same():
    problem = random_problem(GRU)
    plain = outcome(problem, "stepwise")["gradients"]
    output, states = torch.utils.checkpoint.checkpoint(lambda: run(problem, "stepwise"), use_reentrant=False)
    generator = torch.Generator().manual_seed(11)
    loss = sum((end * torch.randn(end.shape, generator=generator, dtype=end.dtype)).sum() for end in (output, *states))
    assert isinstance(loss, Tensor)
    assert_agree(list(torch.autograd.grad(loss, problem.tensors)), plain)


def test_changing_an_input_between_forward_and_backward_is_noticed():
    problem = random_problem(GRU)
    with torch.no_grad():
        changed = problem.x.clone()
    output, _ = run(replace(problem, x=changed), "stepwise")
    changed.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_autograd_alone_holds_the_tensors():
    """So that torch can free, offload or recompute them, and notices changes."""
    problem = random_problem(GRU)
    output, _ = run(problem, "stepwise")
    kept: Any = output.grad_fn
    assert all(tensor is None for tensor in kept.problem.tensors)


# -- choosing a target ------------------------------------------------------------------------------------------------


@pytest.fixture
def no_preference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("THROUGHTIME_TARGET", raising=False)


def test_an_unknown_target_is_refused_wherever_it_was_asked_for(monkeypatch: pytest.MonkeyPatch):
    problem = random_problem(GRU)
    with pytest.raises(TargetError, match=r"target= asks for 'cuda9'; the targets are .*stepwise.*reference"):
        run(problem, "cuda9")
    monkeypatch.setenv("THROUGHTIME_TARGET", "quick")
    with pytest.raises(TargetError, match="THROUGHTIME_TARGET asks for 'quick'"):
        run(problem)
    assert choose(problem, "stepwise").target == "stepwise", "the argument comes before the environment"


@pytest.mark.usefixtures("no_preference")
def test_the_choice_can_be_explained(monkeypatch: pytest.MonkeyPatch):
    problem = random_problem(GRU)
    assert str(choose(problem, "reference")) == "reference: the argument target= asks for it"
    assert choose(problem).target in recurrence.TARGETS
    monkeypatch.setenv("THROUGHTIME_TARGET", "reference")
    assert str(choose(problem)) == "reference: THROUGHTIME_TARGET asks for it"
    monkeypatch.setenv("THROUGHTIME_TARGET", "auto")
    assert choose(problem).target in recurrence.TARGETS


@pytest.mark.usefixtures("no_preference")
def test_a_target_that_cannot_is_passed_over_with_its_reason(monkeypatch: pytest.MonkeyPatch):
    class Choosy(Target):
        name = "choosy"

        def refusal(self, problem: Problem) -> str | None:
            return "it takes three units at most" if problem.hidden_size > 3 else None

        def forward(self, problem: Problem, save: bool = False) -> Result:
            raise AssertionError("choosing runs nothing")

    rows = {"choosy": Choosy(), "stepwise": stepwise.TARGET, "reference": reference.TARGET}
    monkeypatch.setattr(recurrence, "target", rows.__getitem__)
    monkeypatch.setattr(recurrence, "TARGETS", ("choosy", "stepwise", "reference"))
    assert str(choose(random_problem(GRU))) == "stepwise: not choosy, because it takes three units at most"
    assert choose(random_problem(GRU, hidden_size=3)).target == "choosy"
    with pytest.raises(TargetError, match="cannot run this: it takes three units"):
        choose(random_problem(GRU), "choosy")
    monkeypatch.setattr(recurrence, "TARGETS", ("choosy", "reference"))
    assert str(choose(random_problem(GRU))) == "reference: not choosy, because it takes three units at most"


@pytest.mark.usefixtures("no_preference")
def test_what_adjoints_cannot_do_goes_to_the_reference_and_says_so():
    problem = random_problem(GRU, 2, 1, 1, 2)
    seen: list[str] = []

    def look(x: Tensor) -> Tensor:
        seen.append(str(choose(replace(problem, x=x))))
        with pytest.raises(TargetError, match=r"torch\.func transform is active"):
            choose(problem, "stepwise")
        return x.sum()

    torch.func.grad(look)(problem.x.detach())
    with forward_ad.dual_level():
        seen.append(str(choose(problem)))
    with recording():
        seen.append(str(choose(problem)))
    assert ["torch.func" in seen[0], "forward-mode" in seen[1], "recording" in seen[2]] == [True] * 3
    assert all(line.startswith("reference: ") for line in seen)


def test_nothing_is_kept_where_no_gradient_is_wanted(monkeypatch: pytest.MonkeyPatch):
    asked: list[bool] = []
    original = stepwise.TARGET.forward

    def watched(problem: Problem, save: bool) -> Any:
        asked.append(save)
        return original(problem, save)

    monkeypatch.setattr(stepwise.TARGET, "forward", watched)
    problem = random_problem(GRU)
    run(problem, "stepwise")
    with torch.no_grad():
        run(problem, "stepwise")
    with torch.inference_mode():
        run(problem, "stepwise")
    run(problem.with_tensors([tensor.detach() for tensor in problem.tensors]), "stepwise")
    assert asked == [True, False, False, False]


# -- recording --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reverse", [False, True])
def test_a_recording_holds_the_states_of_every_step_in_the_graph(reverse: bool):
    problem = random_problem(LSTM, lengths=RAGGED, reverse=reverse)
    with recording() as records:
        output, last = run(problem)
    plain, plain_last = run(problem, "stepwise")
    assert_agree([output, *last], [plain, *plain_last])
    (record,) = records
    assert (record.cell, record.reverse, record.lengths) == (LSTM, reverse, RAGGED)
    assert len(record.states) == problem.steps
    assert_agree(list(record.states[-1]), list(last))
    adjoints = torch.autograd.grad(output.sum(), [states[1] for states in record.states], allow_unused=True)
    assert any(a is not None and a.any() for a in adjoints)
    run(problem)
    assert len(records) == 1, "what runs after the recording is not part of it"


# -- a cell of one's own ----------------------------------------------------------------------------------------------


def test_a_cell_defined_here_runs_at_once():
    @cell(states="h")
    def Clipped(x, h, W, U, b, *, bound=0.4):
        n = tanh(W.n @ x + b.n + U.n @ h)
        return where(abs(n) < bound, n, bound * h)

    agree(random_problem(Clipped, lengths=RAGGED, reset=True))
    agree(random_problem(Cell.from_json(Clipped.to_json()), reverse=True))
    assert MinimalGated.parameter_count(3, 4) == 2 * (4 * 3 + 4 * 4 + 4)
