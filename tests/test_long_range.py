"""The long-range benchmark: its tasks are what they say, its remedies begin as they should, its files are whole."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import long_range

    return long_range


@pytest.fixture
def report(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    import long_range_report

    return long_range_report


def drawn(bench: ModuleType, task: str, length: int, rows: int = 400) -> Any:
    return bench.TASKS[task].draw(length, rows, torch.Generator().manual_seed(5))


@pytest.mark.parametrize("length", [10, 21, 50])
def test_adding_asks_for_the_sum_of_one_marked_number_from_each_half(bench: ModuleType, length: int):
    batch = drawn(bench, "adding", length)
    values, marks = batch.x.unbind(-1)
    half = length // 2
    assert batch.x.shape == (length, 400, 2)
    assert torch.equal(marks[:half].sum(0), torch.ones(400))
    assert torch.equal(marks[half:].sum(0), torch.ones(400))
    torch.testing.assert_close(batch.targets, (values * marks).sum(0, keepdim=True))
    assert float((batch.targets - 1).square().mean()) == pytest.approx(bench.TASKS["adding"].chance, abs=0.03)


@pytest.mark.parametrize("length", [10, 50])
def test_copying_shows_the_symbols_first_and_asks_for_them_at_the_end(bench: ModuleType, length: int):
    batch = drawn(bench, "copying", length)
    steps = batch.x.argmax(-1)
    assert torch.equal(steps[:5], batch.targets)
    assert (steps[5 : length + 5] == 4).all(), "blanks"
    assert (steps[length + 5] == 5).all(), "the mark"
    assert len(steps) - 5 - 0 == bench.TASKS["copying"].needs(length) == length + 5
    assert batch.targets.unique().tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("length", [10, 50])
def test_temporal_order_has_two_symbols_at_their_places_and_their_order_is_the_answer(bench: ModuleType, length: int):
    batch = drawn(bench, "order", length)
    steps = batch.x.argmax(-1)
    assert (steps[0] == 6).all()
    assert (steps[-1] == 7).all()
    shown = steps < 2
    assert (shown.sum(0) == 2).all()
    first = shown.int().argmax(0)
    second = length - 1 - shown.flip(0).int().argmax(0)
    assert (first >= length // 10).all()
    assert (first <= 2 * (length // 10)).all()
    assert (second >= 4 * (length // 10)).all()
    assert (second <= 5 * (length // 10)).all()
    rows = torch.arange(400)
    assert torch.equal(batch.targets[0], 2 * steps[first, rows] + steps[second, rows])
    middle = length - 1 - (length // 10 + 2 * (length // 10)) // 2
    assert bench.TASKS["order"].needs(length) == middle


def test_every_task_can_be_answered_and_the_error_says_how_well(bench: ModuleType):
    for task in bench.TASKS.values():
        batch = task.draw(20, 500, torch.Generator().manual_seed(1))
        if task.outputs == 1:
            right, blind = batch.targets[..., None], torch.ones(1, 500, 1)
        else:
            right = torch.nn.functional.one_hot(batch.targets, task.outputs).float() * 50
            blind = torch.zeros_like(right)
        assert task.error(right, batch.targets) == 0
        assert float(task.losses(right, batch.targets).max()) < 1e-6
        assert task.losses(right, batch.targets).shape == (500,)
        assert task.error(blind, batch.targets) == pytest.approx(task.chance, abs=0.05)


def test_the_remedies_reach_further_before_training(bench: ModuleType):
    task = bench.TASKS["order"]
    share = {}
    for name, net in bench.NETS.items():
        model = bench.Network(net, task, task.needs(50), 32, seed=1)
        share[name], _ = bench.measured(model, task, 50, task.needs(50))
    for plain, remedies in {
        "elman": ("elman orthogonal", "elman identity"),
        "gru": ("gru chrono",),
        "lstm": ("lstm chrono",),
    }.items():
        assert all(share[remedy] > 1e4 * share[plain] for remedy in remedies)


def test_a_gradient_that_is_not_finite_changes_nothing(bench: ModuleType):
    task = bench.TASKS["adding"]
    model = bench.Network(bench.NETS["gru"], task, 7, 8, seed=1)
    optimiser = torch.optim.Adam(model.parameters())
    before = [parameter.detach().clone() for parameter in model.parameters()]
    batch = task.draw(10, 4, torch.Generator().manual_seed(0))
    assert not bench.update(model, task, optimiser, bench.Batch(batch.x * math.inf, batch.targets), None)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert bench.update(model, task, optimiser, batch, None)


def test_a_quick_run_writes_whole_files(
    bench: ModuleType, report: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    bench.main(["--quick", "--nets", "elman", "gru chrono", "--out", str(tmp_path)])
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"long_range.{k}" for k in ("json", "md", "png", "svg")]
    record = json.loads((tmp_path / "long_range.json").read_text())
    assert len(record["results"]) == 3 * 2 * 2
    assert all(0 < result["share"] < 10 and result["seed"] == 1 for result in record["results"])
    text = (tmp_path / "long_range.md").read_text()
    assert text in capsys.readouterr().out
    assert all(f"## {title}" in text for title in report.TITLES.values())


def result(net: str, length: int, share: float, solved: bool) -> dict[str, Any]:
    numbers = {"task": "order", "net": net, "length": length, "share": share, "solved": solved, "share_after": None}
    return {
        **numbers,
        "error": 0.0 if solved else 0.7,
        "updates": 100,
        "trained": True,
        "diverged": False,
        "carried": {},
    }


def test_what_missed_two_lengths_in_a_row_is_not_trained_on_longer_ones(bench: ModuleType):
    setting = bench.Setting(units=4, rows=2, updates=1, test_rows=20)
    found = bench.run(["order"], ["gru"], [30, 10, 20], setting, 1, everything=False)
    assert [(r.length, r.trained, r.updates) for r in found] == [(10, True, 1), (20, True, 1), (30, False, 0)]
    assert found[-1].share > 0
    assert math.isnan(found[-1].error)
    found = bench.run(["order"], ["gru"], [10, 20, 30], setting, 1, everything=True)
    assert all(result.trained for result in found)


def test_where_a_network_breaks_is_before_the_first_length_that_it_missed(report: ModuleType):
    results = [result("gru", length, share, length != 20) for length, share in ((10, 0.5), (20, 0.1), (50, 1e-4))]
    record = {"results": results, "tasks": {"order": {}}, "nets": {"gru": {}}, "setting": {"threshold": 1e-3}}
    found = report.Findings(record)
    assert found.longest("order", "gru", lambda one: one["solved"]) == 10
    assert found.longest("order", "gru", found.reached) == 20
    assert found.longest("order", "lstm", found.reached) is None
    told = found.agreement(["order"], ["gru"])
    assert told["counts"] == {(True, True): 1, (True, False): 1, (False, True): 1, (False, False): 0}
    assert told["ranking"] == 0.5, "of 20 steps against 10 the reach was right, against 50 it was wrong"


def test_what_the_document_says_of_the_committed_run_is_what_it_found(report: ModuleType):
    found = report.Findings(json.loads((BENCHMARKS / "results" / "long_range.json").read_text()))
    counts = found.agreement(found.tasks, found.nets)["counts"]
    reached, others = counts[True, True] + counts[True, False], counts[False, True] + counts[False, False]
    text = " ".join((BENCHMARKS.parent / "docs" / "insight.md").read_text().split())
    assert f"{counts[True, True]} of {reached} solved their task; of the others, {counts[False, True]} of" in text
    assert f"of the others, {counts[False, True]} of {others}." in text
    assert f"in {100 * found.agreement(['order'], found.nets)['ranking']:.0f} % of pairs" in text
    far = [one for one in found.results if one["task"] == "order" and one["length"] >= 200 and one["solved"]]
    assert far
    assert all(found.reached(one) for one in far)
    assert found.longest("adding", "gru", lambda one: one["solved"]) == 500
