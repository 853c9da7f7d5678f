"""The fused CPU target against the float64 reference: cells, sizes, layouts, NaN, Inf, the same bits in any company."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from agreement import SHARE, same_bits
from blackboards import MinimalGated, Peephole, random_problem
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from throughtime.engine import memory
from throughtime.engine.problem import Problem
from throughtime.engine.recurrence import run
from throughtime.engine.targets.cpu import sharing
from throughtime.engine.targets.cpu import target as cpu
from throughtime.engine.targets.cpu.setting import Settings
from throughtime.equations.catalogue import CELLS, GRU, LSTM, Elman

USED = {**CELLS, "minimal": MinimalGated, "peephole": Peephole}
NAN, INF = float("nan"), float("inf")


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Scratch and workspaces begin as NaN, and no run finds what another one prepared."""
    poison(monkeypatch)
    yield
    cpu.settings.idle.clear()


def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    take = memory.Pool.take

    def poisoned(pool: memory.Pool, size: int) -> np.ndarray:
        block = take(pool, size)
        block.fill(0xFF)
        return block

    monkeypatch.setattr(memory.Pool, "take", poisoned)
    monkeypatch.setattr(cpu, "settings", Settings())


def share_from(monkeypatch: pytest.MonkeyPatch, work: int) -> None:
    """Let threads share every run of at least so much work."""
    monkeypatch.setattr(sharing, "ALONE", work)
    monkeypatch.setattr(sharing, "_sharings", {})
    monkeypatch.setattr(cpu, "settings", Settings())


def adjoints(problem: Problem, seed: int = 1) -> tuple[Tensor, list[Tensor]]:
    """An adjoint for the output and one for each last state, zero past each row's end."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(problem.x.dtype)

    d_output = draw(problem.steps, problem.rows, problem.sizes[problem.cell.output])
    return d_output, [draw(problem.rows, size) for size in problem.sizes]


def outcome(
    problem: Problem, target: str, d_output: Tensor | None = None, d_states: Sequence[Tensor | None] | None = None
) -> dict[str, Tensor]:
    """Output, last states and every gradient, by name."""
    drawn, d_drawn = adjoints(problem)
    if d_output is None and d_states is None:
        d_output, d_states = drawn, d_drawn
    output, states = run(problem, target)
    named = dict(zip(names(problem), problem.tensors, strict=True))
    pairs = [(o, d) for o, d in zip((output, *states), (d_output, *(d_states or ())), strict=False) if d is not None]
    pairs = [(o, d) for o, d in pairs if o.requires_grad]
    found = torch.autograd.grad(
        [o for o, _ in pairs], list(named.values()), [d.to(o.dtype) for o, d in pairs], allow_unused=True
    )
    result = {"output": output.detach()}
    result |= {f"last {name}": s.detach() for name, s in zip(problem.cell.states, states, strict=True)}
    return result | {
        f"d {name}": torch.zeros_like(t) if g is None else g for (name, t), g in zip(named.items(), found, strict=True)
    }


def names(problem: Problem) -> list[str]:
    cell = problem.cell
    parameters = [p.namespace for p in cell.parameters]
    initial = [f"initial {s}" for s in cell.states[: len(problem.initial)]]
    return ["x", *cell.states, *parameters, *cell.outside, *initial]


def exact(problem: Problem) -> Problem:
    """The same numbers in float64."""
    return problem.with_tensors([t.detach().double().requires_grad_() for t in problem.tensors])


def agree(problem: Problem, **given: Any) -> None:
    expected = outcome(exact(problem), "reference", **given)
    actual = outcome(problem, "cpu", **given)
    for name, value in expected.items():
        scale = value.abs().max().item() if value.numel() else 0.0
        apart = (actual[name].double() - value).abs().max().item() if value.numel() else 0.0
        assert apart <= SHARE[problem.x.dtype] * max(scale, 0.1), f"{name}: {apart:.1e} from {scale:.1e}"


# -- right ------------------------------------------------------------------------------------------------------------

WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "reverse": {"reverse": True},
    "ragged": {"lengths": (5, 5, 3, 2, 2, 1, 0)},
    "ragged-reverse-reset": {"lengths": (5, 5, 3, 2, 2, 1, 0), "reset": True, "reverse": True},
    "reset": {"reset": True},
}


@pytest.mark.parametrize("name", USED)
def test_every_cell_every_way(name: str):
    for way in WAYS.values():
        agree(random_problem(USED[name], 5, 7, 3, 17, dtype=torch.float32, **way))


@pytest.mark.parametrize("name", ["gru", "lstm-projected", "peephole"])
def test_double_precision(name: str):
    agree(random_problem(USED[name], 3, 2, 5, 9, dtype=torch.float64, reset=True, lengths=(3, 1)))


SIZES = [(1, 1, 1, 1), (2, 9, 2, 15), (3, 8, 16, 16), (40, 2, 17, 33), (3, 17, 4, 48), (2, 1, 33, 64)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", ["gru", "lstm"])
def test_odd_sizes(name: str, size: tuple[int, int, int, int]):
    agree(random_problem(USED[name], *size, dtype=torch.float32))


@given(st.data())
@settings(max_examples=8)
def test_any_shape(data: st.DataObject):
    steps, rows = data.draw(st.sampled_from([1, 2, 3, 40])), data.draw(st.integers(1, 9))
    lengths = data.draw(st.none() | st.lists(st.integers(0, steps), min_size=rows, max_size=rows))
    agree(
        random_problem(
            Elman,
            steps,
            rows,
            data.draw(st.sampled_from([1, 2, 5, 17, 33])),
            data.draw(st.sampled_from([1, 16, 33, 50])),
            lengths=None if lengths is None else tuple(sorted(lengths, reverse=True)),
            reset=data.draw(st.booleans()),
            reverse=data.draw(st.booleans()),
            dtype=torch.float32,
            seed=data.draw(st.integers(0, 99)),
        )
    )


def layouts(tensor: Tensor) -> dict[str, Tensor]:
    """The same values, laid out otherwise."""
    wide = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1]), NAN, dtype=tensor.dtype)
    wide[..., ::2] = tensor
    inside = torch.full((tensor.shape[0], tensor.shape[1] + 2, tensor.shape[2] + 3), NAN, dtype=tensor.dtype)
    inside[:, 1:-1, 1:-2] = tensor
    return {
        "batch first": tensor.transpose(0, 1).contiguous().transpose(0, 1),
        "units first": tensor.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        "every second": wide[..., ::2],
        "inside": inside[:, 1:-1, 1:-2],
    }


@pytest.mark.parametrize("ragged", [False, True])
def test_any_layout_of_x_and_of_the_adjoint(ragged: bool):
    lengths = (5, 5, 3, 2, 2, 1, 0) if ragged else None
    problem = random_problem(LSTM, 5, 7, 3, 17, dtype=torch.float32, lengths=lengths)
    d_output, d_states = adjoints(problem)
    expected = outcome(problem, "cpu")
    for what, x in layouts(problem.x.detach()).items():
        actual = outcome(replace(problem, x=x.requires_grad_()), "cpu")
        for name in expected:
            same_bits(actual[name], expected[name], f"{what}: {name}")
    for what, d in layouts(d_output).items():
        actual = outcome(problem, "cpu", d_output=d, d_states=d_states)
        for name in expected:
            same_bits(actual[name], expected[name], f"{what}: {name}")


def test_an_adjoint_may_be_one_number_everywhere_or_missing():
    problem = random_problem(GRU, 5, 7, 3, 17, dtype=torch.float32)
    d_output, d_states = adjoints(problem)
    for d in (torch.tensor(0.5).expand_as(d_output), d_output[:1].expand_as(d_output), None):
        agree(problem, d_output=d, d_states=d_states)
    agree(problem, d_output=d_output, d_states=[None])


def test_repeated_rows_of_state_and_weights_in_other_layouts():
    problem = random_problem(GRU, 5, 7, 3, 17, dtype=torch.float32)
    h = problem.states[0].detach()[:1].clone().requires_grad_()
    expected = outcome(replace(problem, states=(h.expand(7, 17).contiguous().detach().requires_grad_(),)), "cpu")
    weights = tuple(p.detach().T.contiguous().T.requires_grad_() if p.dim() == 2 else p for p in problem.parameters)
    actual = outcome(replace(problem, states=(h.expand(7, 17),), parameters=weights), "cpu")
    for name in expected:
        same_bits(actual[name], expected[name], name)


# -- NaN and Inf ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [NAN, INF], ids=str)
@pytest.mark.parametrize("name", ["gru", "lstm", "gru-reset-before"])
def test_what_is_not_finite_spreads_as_in_the_reference(name: str, value: float):
    """One entry of each operand in turn: the same entries of every result are no longer finite."""
    problem = random_problem(USED[name], 3, 7, 3, 17, dtype=torch.float32)
    for place in range(len(problem.tensors)):
        tensors = [t.detach().clone() for t in problem.tensors]
        tensors[place].view(-1)[tensors[place].numel() // 2] = value
        spoilt = problem.with_tensors([t.requires_grad_() for t in tensors])
        compare_spread(spoilt, f"{value} in {names(problem)[place]}")
    d_output, d_states = adjoints(problem)
    d_output[1, 2, 3] = value
    compare_spread(problem, f"{value} in d_output", d_output=d_output, d_states=d_states)


def compare_spread(problem: Problem, what: str, **given: Any) -> None:
    expected, actual = outcome(exact(problem), "reference", **given), outcome(problem, "cpu", **given)
    for name in expected:
        wrong = expected[name].isfinite() != actual[name].isfinite()
        assert not wrong.any(), f"{what}: {name} differs at {wrong.nonzero()[:5].tolist()}"


# -- the same bits ----------------------------------------------------------------------------------------------------


def rows_of(problem: Problem, rows: Sequence[int], steps: int | None = None) -> Problem:
    """Some rows of a problem, in this order, on memory of their own, perhaps with steps of padding behind."""
    place = list(rows)
    x = problem.x.detach()[:, place]
    if steps is not None:
        x = torch.cat([x, torch.full((steps - problem.steps, *x.shape[1:]), NAN, dtype=x.dtype)])
    states = tuple(s.detach()[place].requires_grad_() for s in problem.states)
    initial = tuple(s.detach()[place].requires_grad_() for s in problem.initial)
    reset = None if problem.reset is None else problem.reset[:, place].contiguous()
    lengths = None if problem.lengths is None else tuple(problem.lengths[i] for i in place)
    if steps is not None:
        lengths = tuple([problem.steps] * len(place))
    return replace(problem, x=x.requires_grad_(), states=states, initial=initial, reset=reset, lengths=lengths)


def rowwise(problem: Problem, d_output: Tensor, d_states: Sequence[Tensor]) -> dict[str, Tensor]:
    """What belongs to rows: [..., B, width]."""
    found = outcome(problem, "cpu", d_output=d_output, d_states=d_states)
    return {k: v for k, v in found.items() if k in ("output", "d x") or k.split()[-1] in problem.cell.states}


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("name", ["gru", "lstm", "gru-reset-before"])
def test_a_row_is_the_same_in_any_company(name: str, reset: bool):
    problem = random_problem(USED[name], 5, 7, 3, 17, dtype=torch.float32, reset=reset)
    d_output, d_states = adjoints(problem)
    whole = rowwise(problem, d_output, d_states)
    for rows in ([0], [6, 2], [6, 5, 4, 3, 2, 1, 0]):
        some = rowwise(rows_of(problem, rows), d_output[:, rows], [d[rows] for d in d_states])
        for key in whole:
            same_bits(some[key], whole[key].index_select(-2, torch.tensor(rows)), f"{rows}: {key}")
    if not reset:
        padded = torch.cat([d_output, torch.full((3, *d_output.shape[1:]), NAN)])
        longer = rowwise(rows_of(problem, range(7), steps=8), padded, d_states)
        for key in whole:
            same_bits(longer[key][:5] if longer[key].dim() == 3 else longer[key], whole[key], f"padded: {key}")


def test_ragged_rows_are_the_same_alone():
    lengths = (5, 5, 3, 2, 2, 1, 0)
    problem = random_problem(LSTM, 5, 7, 3, 17, dtype=torch.float32, lengths=lengths)
    d_output, d_states = adjoints(problem)
    whole = rowwise(problem, d_output, d_states)
    for row, length in enumerate(lengths[:-1]):
        alone = replace(
            rows_of(problem, [row]), x=problem.x.detach()[:length, row : row + 1].requires_grad_(), lengths=None
        )
        found = rowwise(alone, d_output[:length, [row]], [d[[row]] for d in d_states])
        for key, value in found.items():
            expected = whole[key][:length, [row]] if value.dim() == 3 else whole[key][[row]]
            same_bits(value, expected, f"row {row}: {key}")


@pytest.mark.parametrize("name", USED)
def test_a_run_in_two_parts_and_one_without_training_have_the_same_bits(name: str):
    problem = random_problem(USED[name], 5, 7, 3, 17, dtype=torch.float32)
    output, states = run(problem, "cpu")
    with torch.no_grad():
        plain, plain_states = run(problem, "cpu")
        first, between = run(replace(problem, x=problem.x[:2]), "cpu")
        second, last = run(replace(problem, x=problem.x[2:], states=between), "cpu")
    same_bits(plain, output.detach(), "without training")
    same_bits(torch.cat([first, second]), plain, "in two parts")
    for a, b, c in zip(last, plain_states, states, strict=True):
        same_bits(a, b, "last state in two parts")
        same_bits(b, c.detach(), "last state without training")
