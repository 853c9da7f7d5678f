"""The benchmark of sequences: what it measures it writes whole, and its ratios, verdicts and fits are right."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def sequences(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import sequences

    return sequences


@pytest.fixture
def report(sequences: ModuleType) -> ModuleType:
    return sys.modules["sequence_report"]


def case(section: str, medians: dict[str, float], **names: Any) -> dict[str, Any]:
    times = {name: {"median": median, "rounds": [median], "runs": 1} for name, median in medians.items()}
    return {"section": section, "seconds": times, **names}


def record(*cases: dict[str, Any], **setting: Any) -> dict[str, Any]:
    """As `sequences.py` writes it."""
    said = {"threads": 1, "rounds": 1, "quick": False, "processor": "an abacus", "cores": 1, "system": "wood"}
    said |= {"date": "2000-01-01", "minutes": 1, "versions": {}, "sections": [c["section"] for c in cases]}
    return {"setting": {**said, **setting}, "cases": list(cases)}


def test_a_section_is_measured_and_written_and_joins_what_is_there(
    sequences: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for section in ("dropout", "streams"):
        sequences.main(["--only", section, "--quick", "--threads", "1", "--out", str(tmp_path)])
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"sequences.{k}" for k in ("json", "md", "png", "svg")]
    found = json.loads((tmp_path / "sequences.json").read_text())
    assert [(c["section"], c.get("cell")) for c in found["cases"]] == [
        ("dropout", None), ("streams", "elman"), ("streams", "gru"), ("streams", "lstm"),
    ]  # fmt: skip
    assert found["setting"]["sections"] == ["dropout", "streams"]
    assert all(times["median"] > 0 for c in found["cases"] for times in c["seconds"].values())
    text = (tmp_path / "sequences.md").read_text()
    assert "A quick run" in text
    assert text in capfd.readouterr().out


def test_ratios_are_over_the_right_thing(report: ModuleType) -> None:
    found = report.Findings(
        record(
            case("ragged", {"throughtime": 2.0}, cell="lstm", way="throughtime"),
            case("ragged", {"packed": 120.0}, cell="lstm", way="packed"),
            case("shares", {"full": 4.0, "ragged": 3.0}, cell="gru", rows=32, share=0.5),
            case("resets", {"none": 2.0, "resets": 2.1}, cell="gru"),
            case("episodes", {"throughtime": 0.1, "loop": 2.5}, layout="rows"),
        )
    )
    assert found.ragged("lstm", "packed") == 60
    assert found.ragged("gru", "packed") is None
    verdicts = {bar.what: (bar.found, bar.verdict) for bar in report.bars(found)}
    assert verdicts["ragged training, LSTM, against torch.nn on PackedSequence"] == (60, "pass")
    assert verdicts["ragged training, GRU, against torch.nn on PackedSequence"] == (None, "not measured")
    assert verdicts["cost of a ragged batch over its share of real steps, B=32, GRU"] == (1.5, "MISS")
    assert verdicts["dense batch with resets over none, GRU"] == (1.05, "pass")
    assert verdicts["64 uneven episodes, GRU-256, as 64 padded rows, against the loop"] == (25, "pass")


def test_recomputation_is_taken_off_where_there_is_some(report: ModuleType) -> None:
    """A step at T=100 recomputes nothing; the others take 1.25 times as long, and the longest 1.1 times that."""
    found = report.Findings(
        record(
            case("length", {"auto": 100e-6, "none": 100e-6}, steps=100),
            case("length", {"auto": 1250e-6, "none": 1000e-6}, steps=1000),
            case("length", {"auto": 13750e-6}, steps=10_000),
        )
    )
    assert found.recomputation() == pytest.approx(1.25)
    assert found.flatness() == pytest.approx(1.1)


def test_the_exponent_is_the_slope_of_the_long_runs(report: ModuleType) -> None:
    sizes = {1000: 1e6, 3000: 1e3 * 3000**0.5, 10_000: 1e5, 30_000: 1e3 * 30_000**0.5}
    cases = [case("memory", {"run": 1.0}, cell="gru", segments="auto", steps=s, bytes=b) for s, b in sizes.items()]
    assert report.Findings(record(*cases)).exponent("gru") == pytest.approx(0.5)
    assert report.Findings(record(*cases[:3])).exponent("gru") is None


def test_figures_of_another_kind_of_run_are_not_joined(report: ModuleType) -> None:
    old, new = record(case("resets", {"none": 1.0}, cell="gru")), record(case("streams", {"stream": 1.0}, cell="gru"))
    assert [c["section"] for c in report.joined(old, new)["cases"]] == ["resets", "streams"]
    assert report.joined(record(*old["cases"], quick=True), new) == new
    assert [c["seconds"]["none"]["median"] for c in report.joined(old, old)["cases"]] == [1.0]


def test_another_computation_is_refused(sequences: ModuleType) -> None:
    ours = {"section": "ragged", "cell": "gru", "way": "throughtime", "check": {"output": 100.0}}
    sequences._compare([ours, {**ours, "way": "padded", "check": {"output": 100.01}}, {**ours, "check": {}}])
    with pytest.raises(SystemExit, match=r"padded gru: output is 101\.0"):
        sequences._compare([ours, {**ours, "way": "padded", "check": {"output": 101.0}}])
