"""The speed benchmark: it measures what it says, its ratios and verdicts are right, and its files are whole."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def speed(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import speed

    return speed


@pytest.fixture
def report(speed: ModuleType) -> ModuleType:
    return sys.modules["speed_report"]


def record(times: dict[str, dict[str, float]], cell: str = "gru", mode: str = "training") -> dict[str, Any]:
    """As `speed.py` writes it, on one thread of a machine that does 1 GFLOP/s; `times` by shape and peer."""
    return {
        "setting": {
            **{"threads": 1, "rounds": 3, "quick": False, "processor": "an abacus", "cores": 1, "system": "wood"},
            **{"date": "2000-01-01", "minutes": 1, "versions": {}, "cells": [cell], "shapes": list(times)},
            "peers": list(next(iter(times.values()))),
        },
        "peak": {"1": 1e9},
        "first": {"cold": 6.0, "warm": 0.4},
        "times": [
            {"shape": shape, "cell": cell, "mode": mode, "peer": peer, "median": median}
            for shape, peers in times.items()
            for peer, median in peers.items()
        ],
    }


def test_two_peers_are_measured_and_written(speed: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    wanted = ["--shapes", "3,2,4,5", "--cells", "gru", "--peers", "torch", "throughtime"]
    speed.main([*wanted, "--threads", "1", "--quick", "--out", str(tmp_path)])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"speed-1-thread.{kind}" for kind in ("json", "md", "png", "svg")
    ]
    found = json.loads((tmp_path / "speed-1-thread.json").read_text())
    measured = {(t["cell"], t["mode"], t["peer"]) for t in found["times"]}
    assert len(measured) == len(found["times"]) == 3 * 2
    assert all(t["median"] > 0 and t["runs"] == 2 for t in found["times"])
    assert found["peak"]["1"] > 1e8
    text = (tmp_path / "speed-1-thread.md").read_text()
    assert text.count("| GRU | 3,2,4,5 |") == 3
    assert text in capfd.readouterr().out


def test_ratios_are_of_the_peer_over_ours(report: ModuleType):
    shapes = {"9,1,2,2": {"throughtime": 1.0, "torch": 8.0, "jax": 4.0}, "9,1,3,3": dict.fromkeys(report.NAMES, 2.0)}
    found = report.Findings(record(shapes))
    assert list(found.against_torch("gru", "training").values()) == [8.0, 1.0]
    assert list(found.against_fastest("gru", "training").values()) == [4.0, 1.0]
    assert found.share(found.shapes[0], "gru", "training") == pytest.approx(3 * 2 * 3 * 9 * 2 * 4 / 1e9)


def test_a_missed_bar_is_said_plainly_and_an_unmeasured_one_too(report: ModuleType):
    found = report.Findings(record({"9,1,2,2": {"throughtime": 1.0, "torch": 5.0}}))
    verdicts = {bar.what: bar.verdict for bar in report.bars(found)}
    assert verdicts["training, GRU, against torch.nn: geometric mean"] == "pass"
    assert verdicts["training, LSTM, against torch.nn: least"] == "not measured"
    assert verdicts["first call, cold cache"] == "MISS"
    assert verdicts["first call, warm cache"] == "pass"


def test_a_lost_cell_is_in_the_table(report: ModuleType):
    text = report.as_markdown(record({"9,1,2,2": {"throughtime": 4.0, "torch": 3.0}}))
    assert "| GRU | 9,1,2,2 | 4000 | 3000 | **0.75** | **0.75** (torch.nn) | 0% |" in text


def test_a_peer_that_computes_something_else_is_refused(speed: ModuleType, tmp_path: Path):
    from peers import compare

    kept = tmp_path / "kept.npz"
    np.savez(kept, output=np.zeros(3, np.float32), x=np.array([0.0, 100.0], np.float32))
    compare({"output": np.full(3, 9e-5, np.float32), "x": np.array([0.09, 100.0], np.float32)}, kept, "near")
    with pytest.raises(SystemExit, match="far: output differs"):
        compare({"output": np.full(3, 2e-4, np.float32)}, kept, "far")
    with pytest.raises(SystemExit, match="wild: x differs"):
        compare({"x": np.array([np.nan, 100.0], np.float32)}, kept, "wild")
    assert speed.RUNS >= 15
