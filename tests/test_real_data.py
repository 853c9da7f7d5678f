"""The benchmark on real data: its readers, its twins, its bar, and that a quick run writes whole files."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from as_typed import TASKS, classes_of, encode, read, targets_of

from throughtime.data.sequences import Columns, Sequences
from throughtime.tasks.model import Architecture

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
RAGGED = "#what it is\n@problemName small\n@timeStamps false\n@data\n1.5,2.5,3:a\n-1,0.25:b c\n"
TWO_DIMENSIONS = "@timeStamps false\n@data\n1,2,3:10,20,30:x\n"
DICTIONARY = """\
abacus AE1 B AH0 K AH0 S
abacus(2) AE1 B AH0 K AH2 S
aalborg AO1 L B AO0 R G # place, danish
m EH1 M
"""


@pytest.fixture
def real_data(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import real_data

    return real_data


@pytest.fixture
def packaged(real_data: ModuleType) -> ModuleType:
    return sys.modules["packaged_data"]


@pytest.fixture
def report(real_data: ModuleType) -> ModuleType:
    return sys.modules["real_data_report"]


def test_a_ts_file_is_read_case_by_case(packaged: ModuleType):
    (first, a), (second, b) = packaged.read_ts(RAGGED)
    assert (a, b) == ("a", "b c")
    assert first.tolist() == [[1.5], [2.5], [3.0]]
    assert second.tolist() == [[-1.0], [0.25]]
    ((case, label),) = packaged.read_ts(TWO_DIMENSIONS)
    assert label == "x"
    assert case.tolist() == [[1, 10], [2, 20], [3, 30]]
    with pytest.raises(SystemExit, match="no \\.ts file without time stamps"):
        list(packaged.read_ts("@timeStamps true\n@data\n(0,1.5):a\n"))


def test_frames_are_successive_values_and_an_incomplete_one_is_left_out(packaged: ModuleType):
    case = np.arange(7.0)[:, None]
    assert packaged.framed(case, 3).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert packaged.framed(case, 1) is case


def test_published_parts_stay_as_they_are(packaged: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for part, cases in {"TRAIN": "1,2:a\n3,4:b\n", "TEST": "5,6:b\n7,8:a\n"}.items():
        (tmp_path / f"small_{part}.ts").write_text(f"@timeStamps false\n@data\n{cases}", encoding="utf-8")
    monkeypatch.setattr(packaged, "shipped", lambda package, path: tmp_path / Path(path).name)
    data = encode(packaged.read_published(packaged.Published("small", "nowhere", "made up")))
    assert (len(data.train), len(data.test)) == (2, 2)
    assert [classes_of(data)[i] for i in targets_of(data.test)] == ["b", "a"]
    assert data.encoder.inputs.scaler.mean.tolist() == [2.5]


def test_stress_is_taken_off_the_phones_and_asked_for(packaged: ModuleType):
    data = packaged.read_stress(DICTIONARY)
    assert data.ids == ("abacus", "abacus(2)", "aalborg", "m")
    assert data.symbols[1] == (("AE",), ("B",), ("AH",), ("K",), ("AH",), ("S",))
    assert data.labels[1] == ("1", "none", "0", "none", "2", "none")
    assert data.labels[2] == ("1", "none", "none", "0", "none", "none")


def test_a_words_part_is_its_own_and_shared_by_its_pronunciations(packaged: ModuleType):
    words = "".join(f"word{place} AH0\nword{place}(2) AH1\n" for place in range(400))
    data = packaged.read_stress(words)
    assert data.parts[::2] == data.parts[1::2]
    assert data.groups == tuple(name.partition("(")[0] for name in data.ids)
    assert 0.2 < data.parts.count("test") / len(data) < 0.3
    backwards = packaged.read_stress("\n".join(words.splitlines()[::-1]))
    assert dict(zip(data.ids, data.parts, strict=True)) == dict(zip(backwards.ids, backwards.parts, strict=True))
    fewer = packaged.read_stress(words, keep=0.25)
    assert set(fewer.ids) < set(data.ids)
    assert 0.2 < len(fewer) / len(data) < 0.3


def test_what_is_not_installed_is_named_with_the_way_to_get_it(packaged: ModuleType):
    with pytest.raises(SystemExit, match=r"no-such-package is not installed; run pip install --no-deps -r"):
        packaged.shipped("no-such-package", "data.ts")
    with pytest.raises(SystemExit, match=r"numpy \S+ holds no data\.ts; run pip install"):
        packaged.shipped("numpy", "data.ts")


@pytest.mark.parametrize("cell", ["elman", "gru", "lstm"])
@pytest.mark.parametrize("task", ["classify", "tag"])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_twins_begin_with_the_same_weights_and_answers(
    real_data: ModuleType, cell: str, task: Any, bidirectional: bool
):
    shape = Architecture(TASKS[task], 2, (7,), 3, 5, bidirectional=bidirectional)
    models = real_data.twins(cell, shape, seed=3)
    plain, ours = models["torch.nn"], models["throughtime"]
    assert not [module for module in plain.modules() if type(module).__module__.startswith("throughtime")]
    lengths = torch.tensor([4, 1, 6])
    real = torch.arange(6)[:, None] < lengths
    x, symbols = torch.randn(6, 3, 2) * real[..., None], torch.randint(1, 7, (6, 3, 1)) * real[..., None]
    batch = real_data.Batch(x, symbols, lengths, torch.zeros(3, dtype=torch.long))
    theirs, mine = plain(batch), ours(batch)
    if task == "tag":
        theirs, mine = theirs[real], mine[real]
    torch.testing.assert_close(mine, theirs)


def test_recipes_are_chosen_without_the_test_part(real_data: ModuleType):
    steps = tuple(np.full((3, 1), 900.0 if place % 3 == 0 else place % 2) for place in range(24))
    parts = tuple("test" if place % 3 == 0 else "train" for place in range(24))
    columns = Columns("sequence", "label", part="part")
    labels = tuple("ab"[place % 2] for place in range(24))
    seen = real_data.validating(
        Sequences("small", "made up", columns, ("x",), tuple(map(str, range(24))), steps, labels, parts=parts)
    )
    assert (len(seen.train), len(seen.test)) == (12, 4)
    scaler = seen.encoder.inputs.scaler
    values = torch.cat([*seen.train.steps, *seen.test.steps]).numpy() * scaler.scale + scaler.mean
    assert np.unique(values.round(6)).tolist() == [0, 1]


def test_series_of_one_length_have_their_nearest_neighbour_as_a_baseline(real_data: ModuleType):
    drawn = np.random.default_rng(0)
    centre = drawn.normal(size=(2, 8, 1))
    steps = tuple(centre[place % 2] + drawn.normal(size=(8, 1)) / 10 for place in range(40))
    labels = tuple("ab"[place % 2] for place in range(40))
    columns = Columns("sequence", "label")
    data = encode(Sequences("small", "made up", columns, ("x",), tuple(map(str, range(40))), steps, labels))
    (found,) = real_data.nearest_series(data)
    assert found.score == 1.0
    assert list(real_data.nearest_series(encode(read("vowels")))) == []


def record(theirs: list[float], ours: list[float]) -> dict[str, Any]:
    """As `real_data.py` writes it, of one cell on one data set; ours takes half the time."""
    sides = {"torch.nn": (theirs, 0.2), "throughtime": (ours, 0.1)}
    return {
        "setting": {
            **{"date": "2000-01-01", "minutes": 1, "seeds": len(ours), "threads": 1, "quick": False, "system": "wood"},
            **{"processor": "an abacus", "cores": 2, "load": 1.1, "versions": {}},
        },
        "problems": {
            "small": {
                **{"source": "made up", "train": 6, "test": 4, "steps": [3, 5], "classes": ["a", "b"], "units": 2},
                **{"bidirectional": True, "note": "A note", "baselines": {"always 'a'": 0.5}},
                "recipe": {"epochs": 1, "batch_size": 2, "learning_rate": 0.01},
            }
        },
        "scores": [
            {"problem": "small", "cell": "gru", "library": library, "scores": scores, "seconds_per_epoch": [pace] * 3}
            for library, (scores, pace) in sides.items()
        ],
        "again": [],
    }


def test_the_bar_is_one_standard_error_below_torch(report: ModuleType):
    theirs = [0.90, 0.92, 0.94]  # mean 0.92, standard error 0.02 / sqrt(3)
    (row,) = report.rows(record(theirs, [0.909, 0.909, 0.909])["scores"])
    assert row.bar == pytest.approx(0.92 - 0.02 / 3**0.5)
    assert row.times == 2.0
    assert row.holds
    (row,) = report.rows(record(theirs, [0.908, 0.908, 0.908])["scores"])
    assert not row.holds


def test_a_missed_bar_is_said_plainly(report: ModuleType):
    missed = report.as_markdown(record([0.9, 0.9], [0.8, 0.9]))
    assert "**Missed by small, GRU.**" in missed
    assert "| small | GRU | 0.9000 ± 0.0000 | 0.8500 ± 0.0500 | 0.9000: MISS | -0.0500 ± 0.0500 |" in missed
    assert "| 0.2000 | 0.1000 | 2.00x |" in missed
    assert "**Met by all 1 rows.**" in report.as_markdown(record([0.9, 0.9], [0.9, 0.9]))
    assert "| small | always 'a' | 0.5000 |" in missed
    assert "once more" not in missed
    assert "busy" not in missed
    busy = record([0.9, 0.9], [0.9, 0.9])
    busy["setting"]["load"] = 2.1
    assert "The machine was busy with other work: compare the scores, not the seconds." in report.as_markdown(busy)
    once_more = record([0.9, 0.9], [0.8, 0.9]) | {"again": record([0.9, 0.9, 0.9], [0.9, 0.9, 0.9])["scores"]}
    said = report.as_markdown(once_more)
    assert "**Missed by small, GRU.**" in said
    assert "## Missed rows, once more, with 3 other seeds" in said
    assert "| small | GRU | 0.9000 ± 0.0000 | 0.9000 ± 0.0000 | 0.9000: pass |" in said


def test_a_missed_row_is_run_again_with_other_seeds(
    real_data: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def measured(problem: Any, data: Any, seeds: range, tell: Any) -> list[Any]:
        found = []
        for cell in problem.cells:
            lost = 0.5 if cell == "gru" and 0 in seeds else 0.0
            for library, score in (("torch.nn", 0.9), ("throughtime", 0.9 - lost)):
                scores, seconds = [score + seed / 1000 for seed in seeds], [0.1] * len(seeds)
                found.append(real_data.Score(problem.name, cell, library, scores, seconds, seconds))
        return found

    monkeypatch.setattr(real_data, "measure", measured)
    threads = torch.get_num_threads()
    try:
        real_data.main(["--quick", "--data", "JapaneseVowels", "--out", str(tmp_path)])
    finally:
        torch.set_num_threads(threads)
    assert "**Missed by JapaneseVowels, GRU.**" in capsys.readouterr().out
    found = json.loads((tmp_path / "real_data.json").read_text())
    assert [(score["cell"], score["scores"]) for score in found["again"]] == [("gru", [0.902, 0.903, 0.904, 0.905])] * 2


def test_a_quick_run_measures_both_and_writes_whole_files(
    real_data: ModuleType, report: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    threads = torch.get_num_threads()
    try:
        real_data.main(["--quick", "--data", "JapaneseVowels, both directions", "--out", str(tmp_path)])
    finally:
        torch.set_num_threads(threads)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"real_data.{kind}" for kind in ("json", "md", "png", "svg")
    ]
    found = json.loads((tmp_path / "real_data.json").read_text())
    assert {(score["cell"], score["library"]) for score in found["scores"]} == {
        ("lstm", "torch.nn"),
        ("lstm", "throughtime"),
    }
    assert all(len(score["scores"]) == len(score["seconds_per_epoch"]) == 2 for score in found["scores"])
    assert all(seconds > 0 for score in found["scores"] for seconds in score["seconds"])
    text = (tmp_path / "real_data.md").read_text()
    assert text == report.as_markdown(found)
    assert text in capfd.readouterr().out
