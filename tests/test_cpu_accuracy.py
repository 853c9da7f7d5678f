"""Float32 errors of the fused CPU target: no more than torch.nn's own, on a quick part of benchmarks/accuracy.py."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

SIZES = [(20, 8, 16, 33), (50, 2, 3, 33), (400, 8, 16, 33)]


@pytest.fixture(scope="module")
def accuracy() -> ModuleType:
    path = Path(__file__).parents[1] / "benchmarks" / "accuracy.py"
    spec = importlib.util.spec_from_file_location("accuracy", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["accuracy"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("cell", ["elman", "gru", "lstm"])
def test_errors_are_no_larger_than_torchs(
    cell: str, size: tuple[int, int, int, int], accuracy: ModuleType, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("THROUGHTIME_TARGET", "cpu")
    torch.set_num_threads(1)
    for m in accuracy.measure(cell, size, range(4)):
        assert m.rms_ratio <= accuracy.RMS_BAR, f"{m.quantity}: {m.rms:.1e}, torch's {m.torch_rms:.1e}"
        assert m.largest_ratio <= accuracy.LARGEST_BAR, f"{m.quantity}: {m.largest:.1e}, not {m.torch_largest:.1e}"
