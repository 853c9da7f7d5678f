"""Run folders that an earlier version wrote load as they are, and answer what they answered then."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from typer.testing import CliRunner

from throughtime.cli import app

DATA = Path(__file__).parent / "data"
ASKED = {"classify": DATA / "asked-classify.csv", "tag": DATA / "asked-tag.conll"}
TASKS = sorted(ASKED)


def told(*arguments: object, typed: str | None = None) -> str:
    """What a command writes to standard output."""
    result = CliRunner().invoke(app, [str(each) for each in arguments], input=typed, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def numbers(answer: Any) -> list[float]:
    """Every number of a record, in order."""
    if isinstance(answer, dict):
        return [number for value in answer.values() for number in numbers(value)]
    if isinstance(answer, list):
        return [number for value in answer for number in numbers(value)]
    return [answer] if isinstance(answer, int | float) else []


def without_numbers(answer: Any) -> Any:
    if isinstance(answer, dict):
        return {name: without_numbers(value) for name, value in answer.items()}
    if isinstance(answer, list):
        return [without_numbers(value) for value in answer]
    return None if isinstance(answer, int | float) else answer


def check_same(found: Any, wanted: Any) -> None:
    """The same texts in the same places, and the same numbers but for what another processor may round."""
    assert without_numbers(found) == without_numbers(wanted)
    assert numbers(found) == pytest.approx(numbers(wanted), abs=1e-5)


@pytest.mark.parametrize("task", TASKS)
def test_an_earlier_run_predicts_what_it_predicted_then(task: str) -> None:
    found = lines(told("predict", DATA / f"run-{task}-0.1", ASKED[task]))
    check_same(found, lines((DATA / f"answers-{task}.jsonl").read_text()))


@pytest.mark.parametrize("task", TASKS)
def test_an_earlier_run_gets_the_score_that_it_got_then(task: str, tmp_path: Path) -> None:
    told("evaluate", DATA / f"run-{task}-0.1", ASKED[task], "--out", tmp_path / "scores.json")
    found, wanted = (json.loads(p.read_text()) for p in (tmp_path / "scores.json", DATA / f"scores-{task}.json"))
    assert Path(found.pop("data")).name == wanted.pop("data")
    check_same(found, wanted)


def test_an_earlier_run_streams_what_it_streamed_then() -> None:
    table = pd.read_csv(ASKED["classify"])
    steps = table[table.utterance == table.utterance[0]].filter(like="cepstrum").to_numpy()
    typed = "".join(json.dumps({"id": "300", "x": step.tolist()}) + "\n" for step in steps)
    found = lines(told("stream", DATA / "run-classify-0.1", typed=typed))
    check_same(found, lines((DATA / "streamed-classify.jsonl").read_text()))


@pytest.mark.parametrize("task", TASKS)
def test_the_configuration_of_an_earlier_run_makes_a_run_of_the_same_kind(task: str, tmp_path: Path) -> None:
    """Not bit for bit: this may be another processor. The options, the columns and the sizes are the same."""
    earlier = DATA / f"run-{task}-0.1"
    text = (earlier / "config.toml").read_text().replace("/data/sentences.conll", str(DATA / "sentences.conll"))
    (tmp_path / "again.toml").write_text(text)
    (tmp_path / "cell.json").write_bytes((earlier / "cell.json").read_bytes())
    told("fit", "--config", tmp_path / "again.toml", "--run", tmp_path / "again")
    for name in ("encoder.json", "cell.json"):
        assert (tmp_path / "again" / name).read_bytes() == (earlier / name).read_bytes()
    metrics = [lines((folder / "metrics.jsonl").read_text()) for folder in (tmp_path / "again", earlier)]
    assert without_numbers(metrics[0][-1]) == without_numbers(metrics[1][-1])
    assert [line.keys() for line in metrics[0]] == [line.keys() for line in metrics[1]]
