"""The fused target beyond the catalogue: a handful of random cells, and machines that this one is not."""

from __future__ import annotations

import llvmlite.binding as binding
import pytest
import torch
from agreement import assert_agree
from blackboards import random_cells, random_problem
from hypothesis import HealthCheck, Phase, given, settings
from test_cpu import outcome

from throughtime.engine import plan
from throughtime.engine.targets.cpu import drivers, kernels, llvm
from throughtime.engine.targets.cpu.machine import Machine
from throughtime.equations.catalogue import GRU
from throughtime.equations.cell import Cell


@settings(max_examples=4, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
@given(cell=random_cells())
def test_random_cells_run_as_on_the_reference(cell: Cell):
    problem = random_problem(cell, 3, 3, 5, 5, lengths=(3, 2, 1), reset=True, dtype=torch.float64)
    assert_agree(outcome(problem, "cpu"), outcome(problem, "reference"), cell.to_json())


def test_neon_code_multiplies_and_adds_in_vectors_of_sixteen_bytes(monkeypatch: pytest.MonkeyPatch):
    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    try:
        target = binding.Target.from_triple("aarch64-unknown-linux-gnu")
    except RuntimeError as error:
        pytest.skip(f"this llvmlite generates no code for it: {error}")
    arm = target.create_target_machine(cpu="neoverse-n1", opt=3, codemodel="jitdefault", reloc="pic")
    for module in (llvm, kernels):
        monkeypatch.setattr(module, "machine", lambda: Machine("neoverse-n1", "", 16, 32))
    monkeypatch.setattr(llvm, "_target_machine", lambda: arm)
    forward = plan.forward(GRU)
    frame = drivers.frame_of(GRU, forward)
    shape = kernels.Shape(rows=8, tiles=1, tail=False)
    text = kernels.StageKernel("kernel", forward, forward.stages[0], shape, frame, 4, save=True).text()
    triple = 'target triple = "aarch64-unknown-linux-gnu"'
    text = "\n".join(triple if line.startswith("target triple") else line for line in text.splitlines())
    listing = llvm.assembly(text)
    assert listing.count("fmla") >= 24, "24 accumulators of four floats each"
    assert "v31.4s" in listing or "v30.4s" in listing
