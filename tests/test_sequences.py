"""The promises about bits on the CPU target, over random problems: split, company, padding, threads, resets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import torch
from agreement import same_bits
from blackboards import MinimalGated, Peephole, random_problem
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DataObject
from test_cpu import adjoints, outcome, poison, share_from
from torch import Tensor

from throughtime.engine.problem import Problem
from throughtime.equations.catalogue import CELLS

USED = {**CELLS, "minimal": MinimalGated, "peephole": Peephole}
STEPS, SIZES = 7, [(3, 17), (20, 32)]


@pytest.fixture(autouse=True)
def _unprepared(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Scratch begins as NaN, and the number of threads ends as it began."""
    poison(monkeypatch)
    yield
    torch.set_num_threads(1)


def drawn(data: DataObject, *, rows: int, ragged: bool, reset: bool, reverse: bool = False) -> Problem:
    """A problem for any of the cells, of one of few sizes, since each size has kernels of its own to compile."""
    lengths = None
    if ragged:
        lengths = tuple(sorted(data.draw(st.lists(st.integers(0, STEPS), min_size=rows, max_size=rows)), reverse=True))
    inputs, units = data.draw(st.sampled_from(SIZES))
    return random_problem(
        USED[data.draw(st.sampled_from(sorted(USED)))],
        STEPS,
        rows,
        inputs,
        units,
        lengths=lengths,
        reset=reset,
        reverse=reverse,
        dtype=torch.float32,
        seed=data.draw(st.integers(0, 99)),
    )


def of_rows(problem: Problem, found: dict[str, Tensor]) -> dict[str, Tensor]:
    """What belongs to single rows: outputs, states, and the gradients of x and the first states."""
    names = {"output", "d x", *(f"{kind} {s}" for kind in ("last", "d") for s in problem.cell.states)}
    return {name: value for name, value in found.items() if name in names}


def leaf(tensor: Tensor) -> Tensor:
    """The same numbers, for a gradient of their own."""
    return tensor.detach().clone().requires_grad_()


def part(problem: Problem, first: int, last: int, states: Sequence[Tensor]) -> Problem:
    """Some of the steps, from these states."""
    reset = None if problem.reset is None else problem.reset[first:last].contiguous()
    return replace(problem, x=leaf(problem.x[first:last]), states=tuple(map(leaf, states)), reset=reset)


def row_alone(problem: Problem, row: int, steps: int, states: Sequence[Tensor], first: int = 0) -> Problem:
    """One row by itself, over its own steps from `first` on, without padding and without lengths."""
    reset = None if problem.reset is None else problem.reset[first : first + steps, [row]].contiguous()
    return replace(
        problem,
        x=leaf(problem.x[first : first + steps, [row]]),
        states=tuple(leaf(s[[row]]) for s in states),
        initial=tuple(leaf(s[[row]]) for s in problem.initial),
        lengths=None,
        reset=reset,
    )


@given(data=st.data(), cut=st.integers(1, STEPS - 1), reset=st.booleans())
@settings(max_examples=15)
def test_split_anywhere_and_continued_is_the_whole_forwards_and_backwards(
    data: DataObject, cut: int, reset: bool
) -> None:
    """Outputs, last states, dx and dh_0: the adjoint of the state between is handed back as the state was handed on."""
    problem = drawn(data, rows=3, ragged=False, reset=reset)
    d_output, d_states = adjoints(problem)
    whole = outcome(problem, "cpu", d_output, d_states)
    between = outcome(part(problem, 0, cut, problem.states), "cpu")
    second_part = part(problem, cut, STEPS, [between[f"last {s}"] for s in problem.cell.states])
    second = outcome(second_part, "cpu", d_output[cut:], d_states)
    d_between = [second[f"d {s}"] for s in problem.cell.states]
    first = outcome(part(problem, 0, cut, problem.states), "cpu", d_output[:cut], d_between)
    for name in ("output", "d x"):
        same_bits(torch.cat([first[name], second[name]]), whole[name], name)
    for state in problem.cell.states:
        same_bits(second[f"last {state}"], whole[f"last {state}"], f"the last {state}")
        same_bits(first[f"d {state}"], whole[f"d {state}"], f"d {state}")


@given(data=st.data(), reset=st.booleans(), reverse=st.booleans())
@settings(max_examples=15)
def test_a_row_of_a_ragged_batch_is_the_row_alone(data: DataObject, reset: bool, reverse: bool) -> None:
    """Whatever the others' lengths, and though its padding is there: alone it has neither company nor padding."""
    problem = drawn(data, rows=data.draw(st.sampled_from([2, 9])), ragged=True, reset=reset, reverse=reverse)
    assert problem.lengths is not None
    d_output, d_states = adjoints(problem)
    for row, length in enumerate(problem.lengths):
        d_output[length:, row] = torch.nan
    padded = problem.x.detach().clone()
    for row, length in enumerate(problem.lengths):
        padded[length:, row] = torch.nan
    whole = of_rows(problem, outcome(replace(problem, x=padded.requires_grad_()), "cpu", d_output, d_states))
    row = data.draw(st.integers(0, problem.rows - 1))
    length = problem.lengths[row]
    if length == 0:
        for state, given_state in zip(problem.cell.states, problem.states, strict=True):
            same_bits(whole[f"last {state}"][row], given_state[row].detach(), "the state of a row without steps")
        return
    alone = row_alone(problem, row, length, problem.states)
    found = outcome(alone, "cpu", d_output[:length, [row]], [d[[row]] for d in d_states])
    for name, value in of_rows(problem, found).items():
        expected = whole[name][:length, [row]] if value.dim() == 3 else whole[name][[row]]
        same_bits(value, expected, name)


@given(data=st.data(), ragged=st.booleans(), reset=st.booleans(), threads=st.integers(2, 4))
@settings(max_examples=12)
def test_the_number_of_threads_changes_nothing_at_all(
    data: DataObject, ragged: bool, reset: bool, threads: int
) -> None:
    """The weights' gradients too."""
    with pytest.MonkeyPatch.context() as patch:
        share_from(patch, 0)
        problem = drawn(data, rows=data.draw(st.sampled_from([2, 9, 25])), ragged=ragged, reset=reset)
        torch.set_num_threads(1)
        alone = outcome(problem, "cpu")
        torch.set_num_threads(threads)
        together = outcome(problem, "cpu")
        torch.set_num_threads(1)
    for name, value in alone.items():
        same_bits(together[name], value, f"{threads} threads: {name}")


@given(data=st.data(), ragged=st.booleans())
@settings(max_examples=15)
def test_a_run_with_resets_is_each_episode_alone(data: DataObject, ragged: bool) -> None:
    """Outputs, last states and dx of every episode of a row; dh_0 where no reset stands at the first step."""
    problem = drawn(data, rows=3, ragged=ragged, reset=True)
    assert problem.reset is not None
    d_output, d_states = adjoints(problem)
    whole = of_rows(problem, outcome(problem, "cpu", d_output, d_states))
    row = data.draw(st.integers(0, 2))
    length = STEPS if problem.lengths is None else problem.lengths[row]
    starts = sorted({0, *(t for t in range(length) if problem.reset[t, row])})
    for start, end in zip(starts, [*starts[1:], length], strict=True):
        if start == end:
            continue
        is_reset = bool(problem.reset[start, row])
        states = problem.initial if is_reset else problem.states
        episode = replace(row_alone(problem, row, end - start, states, start), reset=None, initial=())
        last = [d[[row]] for d in d_states] if end == length else [torch.zeros_like(d[[row]]) for d in d_states]
        found = outcome(episode, "cpu", d_output[start:end, [row]], last)
        for name in ("output", "d x"):
            same_bits(found[name], whole[name][start:end, [row]], f"{name} of steps {start} to {end}")
        for state in problem.cell.states:
            if end == length:
                same_bits(found[f"last {state}"], whole[f"last {state}"][[row]], f"the last {state}")
            if start == 0 and not is_reset:
                same_bits(found[f"d {state}"], whole[f"d {state}"][[row]], f"d {state}")
