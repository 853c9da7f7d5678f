"""Frames of the fused CPU target: a field that nobody has set is an exception that names it, not a crash."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from blackboards import ALL, Decaying, random_problem
from processes import python
from test_cpu import poison, share_from

from throughtime import nn
from throughtime.engine.problem import Problem
from throughtime.engine.recurrence import run
from throughtime.engine.targets.cpu import compiled as code
from throughtime.engine.targets.cpu import setting, stepping
from throughtime.engine.targets.cpu import target as cpu
from throughtime.engine.targets.cpu.setting import UNSET, Setting, Settings
from throughtime.equations.catalogue import LSTM
from throughtime.equations.cell import Cell
from throughtime.errors import InternalError


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    poison(monkeypatch)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def forget(monkeypatch: pytest.MonkeyPatch, field: str) -> None:
    """Let settings make the mistake of never writing a field of a frame."""
    put, put_for = Setting.put, Setting.put_for

    def undo(made: Setting, name: str) -> None:
        if name == field:
            for frame in made.frames:
                frame[made.place[name]] = UNSET

    def forgetful_put(made: Setting, name: str, value: int) -> None:
        put(made, name, value)
        undo(made, name)

    def forgetful_put_for(made: Setting, thread: int, name: str, value: int) -> None:
        put_for(made, thread, name, value)
        undo(made, name)

    monkeypatch.setattr(Setting, "put", forgetful_put)
    monkeypatch.setattr(Setting, "put_for", forgetful_put_for)
    monkeypatch.setattr(cpu, "settings", Settings())


def needed(monkeypatch: pytest.MonkeyPatch, work: Any) -> list[str]:
    """Every field that some work finds out that it needs."""
    found: set[str] = set()
    check = setting.check_frame

    def noting(frame: Any, place: Any, fields: Any, whose: str) -> None:
        found.update(fields)
        check(frame, place, fields, whose)

    with monkeypatch.context() as patch:
        patch.setattr(setting, "check_frame", noting)
        patch.setattr(stepping, "check_frame", noting)
        patch.setattr(cpu, "settings", Settings())
        work()
    return sorted(found)


def train(problem: Problem) -> None:
    output, states = run(problem, "cpu")
    wanted = [tensor for tensor in problem.tensors if tensor.requires_grad]
    outputs = [tensor for tensor in (output, *states) if tensor.requires_grad]
    if outputs:
        torch.autograd.grad([tensor.sum() for tensor in outputs], wanted, allow_unused=True)


def infer(problem: Problem) -> None:
    with torch.no_grad():
        run(problem, "cpu")


RAGGED = (5, 5, 3, 2, 2, 1, 0)

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("gru", {}),
    "ragged, reset and reversed": (
        "lstm-projected",
        {"lengths": (5, 5, 3, 2, 2, 1, 0), "reset": True, "reverse": True},
    ),
    "shared by units": ("Peephole", {"rows": 2, "hidden_size": 130}),
}


@pytest.mark.parametrize("case", CASES)
def test_each_field_forgotten_in_turn_is_named_by_an_exception(case: str, monkeypatch: pytest.MonkeyPatch):
    name, way = CASES[case]
    if case == "shared by units":
        share_from(monkeypatch, 0)
        torch.set_num_threads(2)
    sizes = {"steps": 5, "rows": 7, "input_size": 3, "hidden_size": 17, "dtype": torch.float32, **way}
    problem = random_problem(ALL[name], **sizes)
    for work in (train, infer):
        fields = needed(monkeypatch, lambda work=work: work(problem))
        assert len(fields) > 60
        for field in fields:
            with monkeypatch.context() as patch:
                forget(patch, field)
                with pytest.raises(InternalError) as raised:
                    work(problem)
                assert field in str(raised.value).split(" of a frame ")[0]
                assert "driver" in str(raised.value)
    monkeypatch.setattr(cpu, "settings", Settings())
    train(problem)


@pytest.mark.parametrize("name", ALL)
def test_whatever_gradients_are_wanted_every_field_is_set(name: str):
    """One gradient alone and all but one, with and without an adjoint of the last states."""
    ways: tuple[dict[str, Any], ...] = ({}, {"lengths": (3, 2, 0), "reset": True})
    for way in ways:
        drawn = random_problem(ALL[name], 3, 3, 3, 5, dtype=torch.float32, **way)
        for place in range(len(drawn.tensors)):
            for alone in (True, False):
                wanted = [(i == place) == alone for i in range(len(drawn.tensors))]
                tensors = [t.detach().requires_grad_(w) for t, w in zip(drawn.tensors, wanted, strict=True)]
                problem = drawn.with_tensors(tensors)
                train(problem)
                output, _ = run(problem, "cpu")
                if output.requires_grad:
                    output.sum().backward()


def forget_in_streams(monkeypatch: pytest.MonkeyPatch, field: str) -> None:
    """Let the steps of a stream make the mistake."""
    step = stepping.Steps.step

    def forgetful(steps: stepping.Steps, x: torch.Tensor) -> torch.Tensor:
        if field == "x.origin":
            steps.x_origin = steps.place["sums"]  # no step reads it
        else:
            for stack in steps.frames[steps.side]:
                stack[0][steps.place[field]] = UNSET
        return step(steps, x)

    monkeypatch.setattr(stepping.Steps, "step", forgetful)


@pytest.mark.parametrize("cell", [LSTM, Decaying], ids=lambda cell: cell.name)
def test_a_stream_names_the_field_that_its_frames_lack(cell: Cell, monkeypatch: pytest.MonkeyPatch):
    torch.set_num_threads(1)
    layer = nn.Recurrent(cell, 3, 5, num_layers=2)
    outside = {name: torch.rand(2, 1) for name in cell.outside}

    def work() -> None:
        stream = layer.stream(2)
        for _ in range(2):
            stream.step(torch.ones(2, 3), outside=outside or None)

    work()
    forward = code.compiled(cell, 4, "forward", False, False)
    fields = forward.needs("walk", [stage.name for stage in forward.stages])
    assert {"walk.first", "reset", "x.origin", *(f"outside:{name}.origin" for name in cell.outside)} <= fields
    for field in sorted(fields):
        with monkeypatch.context() as patch:
            forget_in_streams(patch, field)
            with pytest.raises(InternalError, match="walk") as raised:
                work()
            assert field in str(raised.value)


FORGETFUL = """
import torch
from blackboards import random_problem
from throughtime.engine.recurrence import run
from throughtime.engine.targets.cpu import llvm
from throughtime.engine.targets.cpu.setting import Setting
from throughtime.equations.catalogue import Elman
from throughtime.errors import InternalError
compiled = []
original = llvm.compiled
llvm.compiled = lambda text: compiled.append(1) or original(text)
put = Setting.put
if {forget}:
    Setting.put = lambda self, name, value: None if name == "x.step" else put(self, name, value)
try:
    run(random_problem(Elman, 2, 1, 2, 3), "cpu")
except InternalError as error:
    print(len(compiled), error)
else:
    print(len(compiled), "done")
"""


def test_code_from_the_cache_on_disk_is_checked_too(tmp_path: Path):
    kept = {"THROUGHTIME_CACHE": str(tmp_path / "cache")}
    first, second = (python(FORGETFUL.format(forget=forget), **kept) for forget in (False, True))
    assert first.stdout.split()[1:] == ["done"], first.stderr
    assert second.stdout.startswith("0 the fields x.step of a frame are not set"), second.stdout + second.stderr
