"""What each target promises: the table of docs/engine.md, every cell of it tried."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from agreement import assert_agree, same_bits
from blackboards import MinimalGated, random_problem
from torch import Tensor

import throughtime as tt
from throughtime.engine.problem import Problem
from throughtime.engine.recurrence import TARGETS, run
from throughtime.errors import TargetError

I, H, T, B = 3, 17, 9, 6
LENGTHS = (9, 9, 7, 4, 1, 0)
CELLS = (tt.Elman, tt.GRU, tt.LSTM)
TEXT = (Path(__file__).parent.parent / "docs/engine.md").read_text(encoding="utf-8")
SECTION = TEXT.split("## What each target promises")[1].split("\n## ")[0]
HEAD, *ROWS = [
    [field.strip() for field in row.split("|")[1:-1]] for row in re.findall(r"^\|.*\|$", SECTION, re.MULTILINE)
]
TABLE = {promise: dict(zip((name.strip("`") for name in HEAD[1:]), kept, strict=True)) for promise, *kept in ROWS[1:]}

Pairs = Iterator[tuple[Tensor, Tensor]]
"""Tensors that the promise says are the same."""

Check = Callable[[str], Pairs]


def problems(**options: Any) -> Iterator[Problem]:
    for cell in CELLS:
        yield random_problem(cell, T, B, I, H, dtype=torch.float32, **options)


def everything(problem: Problem, asked: str) -> list[Tensor]:
    """Outputs, last states and the gradients of a fixed weighting of all of them."""
    output, states = run(problem, asked)
    ends = [output, *states]
    generator = torch.Generator().manual_seed(3)
    loss = sum((e * torch.randn(e.shape, generator=generator, dtype=e.dtype)).sum() for e in ends)
    assert isinstance(loss, Tensor)
    return [*(e.detach() for e in ends), *torch.autograd.grad(loss, problem.tensors)]


def rows_of(problem: Problem, rows: slice) -> Problem:
    """A few rows alone."""
    x, states = problem.x[:, rows], [state[rows] for state in problem.states]
    own = problem.with_tensors([x, *states, *problem.parameters])
    return own if problem.lengths is None else replace(own, lengths=problem.lengths[rows])


# -- same numbers -----------------------------------------------------------------------------------------------------


def beside_the_reference(asked: str) -> Pairs:
    for problem in problems(lengths=LENGTHS):
        yield from zip(everything(problem, asked), everything(problem, "reference"), strict=True)


def again(asked: str) -> Pairs:
    for problem in problems(lengths=LENGTHS, reverse=True):
        yield from zip(everything(problem, asked), everything(problem, asked), strict=True)


def past_the_end(asked: str) -> Pairs:
    past = torch.arange(T)[:, None, None] >= torch.tensor(LENGTHS)[:, None]
    for problem in problems(lengths=LENGTHS):
        filled = replace(problem, x=torch.where(past, torch.nan, problem.x.detach()).requires_grad_())
        yield from zip(everything(filled, asked), everything(problem, asked), strict=True)


def not_a_number(asked: str) -> Pairs:
    for problem in problems():
        x = problem.x.detach().clone()
        x[2, 1] = torch.nan
        others = [0, *range(2, B)]
        (output, states), (plain, ends) = (run(p, asked) for p in (replace(problem, x=x), problem))
        assert output[2:, 1].isnan().all()
        yield output[:, others], plain[:, others]
        yield from ((after[others], end[others]) for after, end in zip(states, ends, strict=True))


def in_company(asked: str) -> Pairs:
    for problem in problems(lengths=LENGTHS):
        output, states = run(problem, asked)
        for rows in (slice(0, 1), slice(1, 4)):
            alone, ends = run(rows_of(problem, rows), asked)
            yield alone, output[:, rows]
            yield from ((end, state[rows]) for end, state in zip(ends, states, strict=True))


def padded(asked: str) -> Pairs:
    for problem in problems(lengths=(6, 5, 5, 2, 1, 1)):
        output, states = run(problem, asked)
        short, ends = run(replace(problem, x=problem.x[:6].contiguous()), asked)
        yield output[:6], short
        yield from zip(states, ends, strict=True)


def threads(asked: str) -> Pairs:
    for cell in CELLS:
        problem = random_problem(cell, T, 40, 32, 64, dtype=torch.float32)
        one = everything(problem, asked)
        torch.set_num_threads(2)
        try:
            two = everything(problem, asked)
        finally:
            torch.set_num_threads(1)
        yield from zip(two, one, strict=True)


def cut_in_two(asked: str) -> Pairs:
    for problem in problems():
        output, states = run(problem, asked)
        first, middle = run(replace(problem, x=problem.x[:4]), asked)
        second, ends = run(replace(problem, x=problem.x[4:], states=middle), asked)
        yield torch.cat([first, second]), output
        yield from zip(ends, states, strict=True)


def stream(asked: str) -> Pairs:
    for cell in CELLS:
        layer = tt.nn.Recurrent(cell, I, H, num_layers=2, target=asked)
        x = torch.randn(T, B, I)
        output, _ = layer(x)
        steps = layer.stream(B)
        yield torch.stack([steps.step(x_t) for x_t in x]), output


@pytest.mark.filterwarnings("ignore:segments=")
def segments(asked: str) -> Pairs:
    for problem in problems():
        yield from zip(everything(replace(problem, segments=9), asked), everything(problem, asked), strict=True)


def second_order(asked: str) -> Pairs:
    for problem in (random_problem(cell, 4, 2, I, 5) for cell in CELLS):
        found = []
        for each in (asked, "reference"):
            loss = run(problem, each)[0].square().sum()
            first = torch.autograd.grad(loss, problem.tensors, create_graph=True)
            total = sum((g.square().sum() for g in first), torch.tensor(0.0))
            found.append(torch.autograd.grad(total, problem.tensors))
        yield from zip(*found, strict=True)


# -- what runs --------------------------------------------------------------------------------------------------------


def own_cell(asked: str) -> Pairs:
    yield from beside(random_problem(MinimalGated, T, B, I, H), asked)


def resets(asked: str) -> Pairs:
    yield from beside(random_problem(tt.GRU, T, B, I, H, reset=True), asked)


def beside(problem: Problem, asked: str) -> Pairs:
    yield from zip(everything(problem, asked), everything(problem, "reference"), strict=True)


def nothing(asked: str) -> Pairs:
    for steps, rows in ((0, B), (T, 0)):
        problem = random_problem(tt.GRU, steps, rows, I, H)
        output, (state,) = run(problem, asked)
        assert output.shape == (steps, rows, H)
        yield state, problem.states[0]


def several_dtypes(asked: str) -> Pairs:
    problem = random_problem(tt.GRU, T, B, I, H)
    run(replace(problem, x=problem.x.float()), asked)
    yield from ()


def transforms(asked: str) -> Pairs:
    layer = tt.nn.Recurrent(tt.GRU, I, H, target=asked)
    x = torch.randn(2, T, B, I)
    mapped = torch.func.vmap(lambda one: layer(one)[0])(x)
    yield mapped, torch.stack([layer(one)[0] for one in x])
    torch.func.jvp(lambda one: layer(one)[0], (x[0],), (x[1],))


@tt.cell(states="h")
def Adding(x, h):
    """A sum over time."""
    return h + x


def halves(asked: str) -> str:
    """How a run rounds, seen in a sum of quarters of a unit in the last place; or by torch's own layer."""
    said = set()
    for dtype in (torch.bfloat16, torch.float16):
        if asked == "native":
            layer = tt.nn.GRU(I, H, dtype=dtype)
            theirs = torch.nn.GRU(I, H, dtype=dtype)
            theirs.load_state_dict(layer.state_dict())
            layer.target = asked
            x = torch.randn(T, B, I).to(dtype)
            same_bits(layer(x)[0].detach(), theirs(x)[0].detach())
            said.add("as torch rounds")
            continue
        unit = torch.finfo(dtype).eps
        start = torch.ones(1, 1, dtype=dtype)
        x = torch.full((8, 1, 1), unit / 4, dtype=dtype)
        after = run(Problem(Adding, x, (start,), ()), asked)[1][0].item()
        said.add({1.0: "each step rounded", 1 + 2 * unit: "rounded once"}[after])
    (word,) = said
    return word


CHECKS: dict[str, Check] = {
    "outputs, states and gradients beside the reference's": beside_the_reference,
    "the same run again, on as many threads": again,
    "what lies past a row's end, NaN too, changes nothing": past_the_end,
    "NaN in one row leaves the others as they were": not_a_number,
    "a row in other company, or alone": in_company,
    "a row with more padding behind it": padded,
    "another number of threads": threads,
    "a sequence cut in two, the state handed on": cut_in_two,
    "a stream beside the run": stream,
    "`segments=` beside none": segments,
    "a cell of one's own": own_cell,
    "`reset=`": resets,
    "no steps, or no rows": nothing,
    "tensors of several dtypes or devices": several_dtypes,
    "gradients of gradients": second_order,
    "`torch.func` transforms, forward mode": transforms,
}
ROUNDING = "bfloat16 and float16"


def test_the_table_names_every_target_and_every_promise_has_a_check():
    assert set(HEAD[1:]) == {f"`{name}`" for name in TARGETS}
    assert set(TABLE) == {*CHECKS, ROUNDING}


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.parametrize("asked", TARGETS)
@pytest.mark.parametrize("promise", TABLE)
def test_a_target_keeps_what_the_table_says(promise: str, asked: str):
    word = TABLE[promise][asked]
    if promise == ROUNDING:
        assert halves(asked) == word
        return
    check = CHECKS[promise]
    if word == "refused":
        with pytest.raises(TargetError, match=f"'{asked}', which cannot run this"):
            list(check(asked))
        return
    if word == "torch's error":
        with pytest.raises(RuntimeError):
            list(check(asked))
        return
    if word == "not obeyed, and said":
        layer = tt.nn.GRU(I, H)
        layer.target, layer.segments = asked, "auto"
        assert tt.explain(layer, torch.randn(T, B, I))[0].endswith("it keeps every step, whatever segments= says")
    assert word in ("to the bit", "to rounding", "runs", "not obeyed, and said"), word
    pairs = list(check(asked))
    assert pairs
    for own, other in pairs:
        if word in ("to the bit", "not obeyed, and said"):
            same_bits(own.detach(), other.detach(), promise)
        else:
            assert_agree(own.detach(), other.detach(), promise)
