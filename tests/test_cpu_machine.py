"""What THROUGHTIME_CPU may name: code is generated for lesser machines, and no name ends the process."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator

import llvmlite.binding as binding
import pytest
from processes import python

from throughtime.engine.targets.cpu import machine as machines
from throughtime.engine.targets.cpu.machine import LEVELS, Machine, machine
from throughtime.errors import TargetError

x86 = pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="another kind of processor")


@pytest.fixture
def _looked_at_anew() -> Iterator[None]:
    forget()
    yield
    forget()


def forget() -> None:
    machine.cache_clear()
    machines._tried.cache_clear()


LESSER = """
from throughtime.engine.targets.cpu import target as cpu
from throughtime.engine.targets.cpu import kernels, llvm, drivers
from throughtime.engine import plan as plans
from blackboards import ALL, random_problem
from test_cpu import agree
import torch
torch.set_num_threads(1)
for name in {cells}:
    agree(random_problem(ALL[name], 3, 3, 3, 9, dtype=torch.float32, lengths=(3, 2, 0), reset=True))
agree(random_problem(ALL["gru"], 3, 3, 3, 5))
cell = ALL["gru"]
plan = plans.forward(cell)
kernel = kernels.StageKernel(
    "kernel", plan, plan.stages[0], kernels.Shape(2, 1, False), drivers.frame_of(cell, plan), 4, True
)
print(llvm.assembly(kernel.text()))
"""


@x86
@pytest.mark.parametrize(("name", "register", "wider"), [("x86-64-v3", "ymm", "zmm"), ("x86-64-v2", "xmm", "ymm")])
def test_a_lesser_machine_gets_narrower_code_that_is_right(name: str, register: str, wider: str):
    cells = ["gru", "lstm", "elman", "gru-reset-before"] if name.endswith("3") else ["elman", "lstm"]
    result = python(LESSER.format(cells=cells), THROUGHTIME_CPU=name)
    assert result.returncode == 0, result.stderr[-3000:]
    assert f"%{register}" in result.stdout
    assert f"%{wider}" not in result.stdout


PATHS = """
import torch
import throughtime as tt
from blackboards import random_problem
from throughtime.engine.recurrence import listing, run
problem = random_problem(tt.GRU, 2, 2, 3, 5, dtype=torch.float32)
layer = tt.nn.GRU(3, 5)

def inferred():
    with torch.no_grad():
        layer(torch.zeros(2, 2, 3))

ways = {
    "train": lambda: run(problem, "cpu"),
    "infer": inferred,
    "list": lambda: listing(tt.GRU, "cpu"),
    "assembly": lambda: listing(tt.GRU, "cpu", assembly=True),
    "stream": lambda: layer.stream(2).step(torch.zeros(2, 3)),
    "compiled": lambda: torch.compile(layer, backend="eager")(torch.zeros(2, 2, 3)),
}
for name, way in ways.items():
    try:
        way()
    except Exception as error:
        kinds = [kind.__name__ for kind in type(error).__mro__]
        print(name, "TargetError" in kinds, "THROUGHTIME_CPU is" in str(error))
    else:
        print(name, "ran")
"""


@pytest.mark.parametrize("name", ["foo", pytest.param("i386", marks=x86), "help", "+avx512f"])
def test_a_name_that_cannot_be_is_an_exception_on_every_path(name: str):
    result = python(PATHS, THROUGHTIME_CPU=name)
    assert result.returncode == 0, result.stderr[-2000:]
    said = [line.split() for line in result.stdout.splitlines()]
    assert len(said) == 6
    assert all(line[1:] == ["True", "True"] for line in said if line[0] != "compiled"), result.stdout
    assert said[-1][2:] == ["True"], "torch.compile may put its own error around ours"


ANY = """
import torch
from blackboards import ALL, random_problem
from test_cpu import agree
from throughtime.engine.targets.cpu.machine import machine
print(machine().vector_bytes)
agree(random_problem(ALL["elman"], 3, 3, 3, 9, dtype=torch.float32))
"""


@x86
@pytest.mark.parametrize("name", ["bdver4", "sandybridge", "generic", "haswell"])
def test_no_name_gives_code_that_this_machine_cannot_run(name: str):
    """Bulldozers have instructions of their own (FMA4, XOP) that no other machine has."""
    result = python(ANY, THROUGHTIME_CPU=name)
    wide = binding.get_host_cpu_features().get("avx2") or name in ("sandybridge", "generic")
    if wide:
        assert result.returncode == 0, result.stderr[-2000:]
        assert result.stdout.split() == ["32" if name in ("bdver4", "haswell") else "16"]
    else:
        assert "TargetError" in result.stderr


@x86
@pytest.mark.usefixtures("_looked_at_anew")
def test_a_name_whose_vectors_are_wider_than_this_machines_is_refused(monkeypatch: pytest.MonkeyPatch):
    here = machine()
    narrow = Machine(here.cpu, here.features, 16, 16)
    monkeypatch.setattr(machines, "_this_machine", lambda: narrow)
    for name in ("x86-64-v3", "x86-64-v4", "skylake-avx512", "haswell"):
        monkeypatch.setenv("THROUGHTIME_CPU", name)
        machine.cache_clear()
        with pytest.raises(TargetError, match=f"{name}.*wider than this machine's; use x86-64, x86-64-v2, {here.cpu}"):
            machine()


@x86
@pytest.mark.usefixtures("_looked_at_anew")
def test_features_that_this_machine_lacks_are_taken_from_any_name(monkeypatch: pytest.MonkeyPatch):
    lacking = {name for name, there in binding.get_host_cpu_features().items() if not there}
    for name in ("x86-64", "x86-64-v2"):
        monkeypatch.setenv("THROUGHTIME_CPU", name)
        machine.cache_clear()
        assert {f"-{feature}" for feature in lacking} == set(machine().features.split(",")) - {""}


@pytest.mark.usefixtures("_looked_at_anew")
def test_this_machines_own_name_is_this_machine(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("THROUGHTIME_CPU", raising=False)
    here = machine()
    machine.cache_clear()
    monkeypatch.setenv("THROUGHTIME_CPU", here.cpu)
    assert machine() == here


@x86
@pytest.mark.usefixtures("_looked_at_anew")
def test_where_no_process_can_be_started_only_levels_are_taken(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "executable", "")
    monkeypatch.setenv("THROUGHTIME_CPU", "nehalem")
    with pytest.raises(TargetError, match="could not be tried"):
        machine()
    monkeypatch.setenv("THROUGHTIME_CPU", "x86-64-v2")
    assert machine().vector_bytes == LEVELS["x86-64-v2"]


@x86
@pytest.mark.usefixtures("_looked_at_anew")
def test_a_name_that_is_misspelt_is_put_right(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("THROUGHTIME_CPU", "nehalen")
    with pytest.raises(TargetError, match=r"does not know \(it knows nehalem\)"):
        machine()
