"""Threads, forks and workers of the fused CPU target."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from agreement import assert_agree, same_bits
from blackboards import MinimalGated, Peephole, random_problem
from processes import SECONDS, python
from test_cpu import adjoints, outcome, poison, share_from
from torch import Tensor

from throughtime.engine.problem import Problem
from throughtime.engine.recurrence import run
from throughtime.engine.targets.cpu import gang, sharing
from throughtime.equations.catalogue import CELLS, GRU, LSTM

USED = {**CELLS, "minimal": MinimalGated, "peephole": Peephole}


@pytest.fixture(autouse=True)
def _threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    poison(monkeypatch)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# -- the same bits for any number of threads --------------------------------------------------------------------------


def on_threads(problem: Problem, threads: int) -> dict[str, Tensor]:
    torch.set_num_threads(threads)
    return outcome(problem, "cpu")


WAYS: dict[str, dict[str, Any]] = {
    "by rows": {"rows": 25},
    "by ragged rows": {"rows": 7, "lengths": (6, 6, 4, 3, 1, 1, 0)},
    "by units": {"rows": 2, "hidden_size": 200},
    "by units, many rows of heavy weights": {"rows": 25, "hidden_size": 200, "heavy": True},
    "by units, with resets": {"rows": 2, "hidden_size": 200, "reset": True, "reverse": True},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["gru", "lstm-projected", "gru-reset-before"])
def test_the_number_of_threads_changes_no_bit(name: str, way: str, monkeypatch: pytest.MonkeyPatch):
    share_from(monkeypatch, 0)
    size: dict[str, Any] = {"steps": 6, "input_size": 3, "hidden_size": 17, "dtype": torch.float32, **WAYS[way]}
    if size.pop("heavy", False):
        monkeypatch.setattr(sharing, "STEP_BYTES_OF_FEW", 0)
        monkeypatch.setattr(sharing.os, "cpu_count", lambda: 2)
    problem = random_problem(USED[name], **size)
    alone = on_threads(problem, 1)
    for threads in (2, 3):
        together = on_threads(problem, threads)
        for key in alone:
            same_bits(together[key], alone[key], f"{threads} threads: {key}")


def test_one_thread_asked_for_is_one_thread_used(monkeypatch: pytest.MonkeyPatch):
    share_from(monkeypatch, 0)
    used: list[int] = []

    def watch(kind: Any) -> None:
        original = kind.run

        def watched(crew: Any, call: gang.Call, frames: Sequence[int]) -> None:
            used.append(len(frames))
            original(crew, call, frames)

        monkeypatch.setattr(kind, "run", watched)

    watch(gang.Team)
    watch(gang.Gang)
    problem = random_problem(GRU, 6, 25, 3, 17, dtype=torch.float32)
    on_threads(problem, 1)
    assert used == []
    on_threads(problem, 2)
    assert used
    assert set(used) == {2}


def test_threads_of_our_own_give_the_bits_of_openmps(monkeypatch: pytest.MonkeyPatch):
    share_from(monkeypatch, 0)
    problem = random_problem(GRU, 6, 25, 3, 17, dtype=torch.float32)
    expected = on_threads(problem, 2)
    monkeypatch.setattr(gang, "_openmp", lambda: None)
    monkeypatch.setattr(gang, "_team", None)
    found = on_threads(problem, 2)
    assert gang._gang is not None
    for key in expected:
        same_bits(found[key], expected[key], key)


# -- many callers -----------------------------------------------------------------------------------------------------


def test_eight_threads_call_at_once(monkeypatch: pytest.MonkeyPatch):
    share_from(monkeypatch, 0)
    torch.set_num_threads(2)
    problems = [random_problem(c, 6, 25, 3, 17, dtype=torch.float32, seed=s) for c in (GRU, LSTM) for s in range(4)]
    expected = [outcome(problem, "cpu") for problem in problems]
    begin = threading.Barrier(len(problems))

    def work(problem: Problem) -> list[dict[str, Tensor]]:
        torch.use_deterministic_algorithms(True)
        begin.wait()
        return [outcome(problem, "cpu") for _ in range(6)]

    with ThreadPoolExecutor(len(problems)) as pool:
        for found, right in zip(pool.map(work, problems), expected, strict=True):
            for result in found:
                for key in right:
                    same_bits(result[key], right[key], key)


def test_backward_passes_from_several_threads_over_a_deep_graph():
    problem = random_problem(GRU, 6, 25, 17, 17, dtype=torch.float32)

    def work(_: int) -> Tensor:
        x = problem.x
        for _layer in range(5):
            x, _states = run(Problem(GRU, x, problem.states, problem.parameters), "cpu")
        return torch.autograd.grad(x.sum(), problem.parameters)[0]

    with ThreadPoolExecutor(4) as pool:
        first, *rest = list(pool.map(work, range(8)))
    for other in rest:
        same_bits(other, first)


COMMON = """
import os, sys, torch
from blackboards import ALL, random_problem
from test_cpu import outcome
from agreement import assert_agree
from throughtime.engine.targets.cpu import sharing
from throughtime.equations.catalogue import GRU
sharing.ALONE = 0
torch.set_num_threads(2)
problem = random_problem(GRU, 6, 25, 3, 17, dtype=torch.float32)
right = outcome(problem, "cpu")
"""


def test_a_forked_child_computes_and_ends():
    script = (
        COMMON
        + """
with torch.no_grad():
    child = os.fork()
    if not child:
        from throughtime.engine.recurrence import run
        output, _ = run(problem, "cpu")
        os._exit(0 if torch.equal(output, right["output"]) else 1)
_, status = os.waitpid(child, 0)
sys.exit(os.waitstatus_to_exitcode(status))
"""
    )
    result = python(script)
    assert result.returncode == 0, result.stderr


class Layer(torch.utils.data.Dataset[Tensor]):
    """Each item is what a recurrence makes of the same sequences, times its number plus one."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Tensor:
        output, _ = run(self.problem, "cpu")
        return output.detach() * (index + 1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_layer_runs_in_the_workers_of_a_loader():
    problem = random_problem(GRU, 6, 25, 3, 17, dtype=torch.float32)
    output, _ = run(problem, "cpu")
    loader = torch.utils.data.DataLoader(
        Layer(problem), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=SECONDS
    )
    for index, item in enumerate(loader):
        assert torch.equal(item, output.detach() * (index + 1))


def test_the_reference_agrees_with_what_threads_compute():
    problem = random_problem(Peephole, 6, 25, 3, 17, dtype=torch.float64)
    torch.set_num_threads(2)
    d_output, d_states = adjoints(problem)
    given = {"d_output": d_output, "d_states": d_states}
    actual, expected = outcome(problem, "cpu", **given), outcome(problem, "reference", **given)  # type: ignore[arg-type]
    assert_agree(actual, expected)
