"""From a file to a finished run: what it holds is true, and its configuration makes it again to the bit."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from as_typed import encode, predict, read, targets_of

from throughtime import cell
from throughtime.equations.catalogue import CELLS
from throughtime.errors import CellError, DataError, ThroughtimeError
from throughtime.runs import folder as runs
from throughtime.runs.configuration import Config
from throughtime.runs.fit import Event, Notice, cell_of, fit
from throughtime.runs.folder import FinishedRun
from throughtime.training.loop import Epoch, Progress

COLUMNS: dict[str, Any] = {"sequence_id": "id", "target": "label", "time": "t"}
SMALL: dict[str, Any] = {"hidden_size": 6, "epochs": 8, "batch_size": 8, "learning_rate": 0.02}


def to_classify(file: Path, seed: int = 2) -> Path:
    """Sequences of 2 to 6 steps whose class is the sign of the first step."""
    draw = np.random.default_rng(seed)
    rows = ["id,t,label,x,y"]
    for number in range(60):
        values = draw.normal(size=(2 + number % 5, 2))
        label = "up" if values[0, 0] > 0 else "down"
        rows += [f"s{number:02},{t},{label},{x:.4f},{y:.4f}" for t, (x, y) in enumerate(values)]
    file.write_text("\n".join(rows) + "\n")
    return file


def to_tag(file: Path) -> Path:
    """Words whose tag is decided by the word before."""
    draw = np.random.default_rng(4)
    sentences = []
    for _ in range(40):
        words = ["the", *draw.choice(["dog", "saw", "runs"], size=draw.integers(2, 6))]
        tags = ["D", *("N" if before == "the" else "V" for before in words[:-1])]
        sentences.append("\n".join(f"{word}\t{tag}" for word, tag in zip(words, tags, strict=True)))
    file.write_text("\n\n".join(sentences) + "\n")
    return file


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fitting")
    to_classify(folder / "signs.csv")
    to_tag(folder / "words.conll")
    return folder


@pytest.fixture(scope="module")
def told() -> list[Event]:
    return []


@pytest.fixture(scope="module")
def run(folder: Path, told: list[Event]) -> FinishedRun:
    return fit(config(folder, "signs"), on_event=told.append)


def config(folder: Path, name: str, **options: Any) -> Config:
    given = {"file": str(folder / "signs.csv"), "run": folder / name, **COLUMNS, **SMALL}
    return Config.resolve(given | options)


def same_weights(one: FinishedRun, other: FinishedRun) -> bool:
    mine, theirs = one.model.state_dict(), other.model.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def without_times(run: FinishedRun) -> list[dict[str, Any]]:
    timed = ("seconds", "steps_per_second")
    return [{name: value for name, value in line.items() if name not in timed} for line in run.metrics]


def test_the_score_is_that_of_the_kept_model_on_sequences_it_has_not_seen(run: FinishedRun, folder: Path):
    sequences = read(str(folder / "signs.csv"), **COLUMNS)
    encoded = encode(sequences, test_fraction=0.25, validation_fraction=0.15, seed=0)
    assert encoded.encoder.to_json() == run.encoder.to_json()
    said = torch.stack(predict(run.model, encoded.test))
    assert run.result["score"] == float((said == targets_of(encoded.test)).double().mean())
    assert run.result["count"] == len(encoded.test) == 16
    majority = max(torch.bincount(targets_of(encoded.test)).tolist()) / 16
    shown = {row["name"]: row["score"] for row in run.result["baselines"]}
    assert len(shown) == 2
    assert pytest.approx(majority) in shown.values()


def test_every_update_and_epoch_is_told_and_kept(run: FinishedRun, told: list[Event]):
    epochs = [event for event in told if isinstance(event, Epoch)]
    steps = [event for event in told if isinstance(event, Progress)]
    assert [line["loss"] for line in run.epochs] == [epoch.loss for epoch in epochs]
    assert len(steps) == sum(epoch.updates for epoch in epochs)
    assert steps[-1].done == 1.0
    best = min(epochs, key=lambda epoch: epoch.validation_loss or 0.0)
    assert run.result["weights_of_epoch"] == best.number
    assert run.result["epochs"] == len(epochs) == 8


def test_the_kept_configuration_makes_the_same_run_to_the_bit(run: FinishedRun, folder: Path):
    again = fit(Config.resolve({"run": folder / "again"}, run.path / runs.CONFIG))
    assert same_weights(again, run)
    assert without_times(again) == without_times(run)
    for name in (runs.CONFIG, runs.CELL_FILE, runs.ENCODER, runs.WEIGHTS):
        assert (again.path / name).read_bytes() == (run.path / name).read_bytes()
    other = fit(Config.resolve({"run": folder / "other", "seed": 1}, run.path / runs.CONFIG))
    assert not same_weights(other, run)


def test_data_that_have_changed_are_refused_by_the_kept_configuration(tmp_path: Path):
    to_classify(tmp_path / "signs.csv")
    run = fit(config(tmp_path, "run", epochs=1))
    to_classify(tmp_path / "signs.csv", seed=3)
    with pytest.raises(DataError, match=r"signs\.csv: its content is not what the configuration was written for"):
        fit(Config.resolve({"run": tmp_path / "again"}, run.path / runs.CONFIG))
    assert not (tmp_path / "again.partial").exists()


def test_the_program_on_the_card_loads_the_run(run: FinishedRun, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(run.path.parent)
    program = (run.path / runs.CARD).read_text().split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {}
    exec(program, names)
    assert same_weights(names["run"], run)


def test_a_run_to_tag_beats_what_looks_at_one_word(folder: Path):
    options = {"file": str(folder / "words.conll"), "task": "tag", "run": folder / "words", **SMALL}
    run = fit(Config.resolve({**options, "truncate": 3, "num_layers": 2, "cell": "lstm", "patience": "none"}))
    assert run.encoder.task.name == "tag"
    assert run.result["count"] > run.result["epochs"]
    best = max(row["score"] for row in run.result["baselines"])
    assert run.result["score"] > best
    assert run.result["weights_of_epoch"] == 8
    assert "test steps right" in (run.path / runs.CARD).read_text()


def test_a_cell_of_ones_own_is_kept_as_data_and_trains_again_without_its_module(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "my_cells.py").write_text(
        "from throughtime import cell, tanh\n\n\n@cell(states='h')\ndef Mine(x, h, W, U, b):\n"
        "    return 0.5 * h + 0.5 * tanh(W @ x + U @ h + b)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    run = fit(config(folder, "mine", cell="my_cells:Mine", epochs=2))
    assert run.configuration.network.cell == str(folder / "mine" / runs.CELL_FILE)
    monkeypatch.undo()
    (tmp_path / "my_cells.py").unlink()
    again = fit(Config.resolve({"run": folder / "mine-again"}, run.path / runs.CONFIG))
    assert same_weights(again, run)
    assert cell_of(str(run.path / runs.CELL_FILE)).hash == run.model.recurrent.cell.hash


def test_a_cell_that_cannot_be_found_is_refused_before_anything_is_made(folder: Path, tmp_path: Path):
    for name, reason in {"gruu": "did you mean 'gru'", "missing.json": r"missing\.json: cannot be read"}.items():
        with pytest.raises(CellError, match=reason):
            fit(config(folder, "none", cell=name))
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(CellError, match=r"broken\.json: this is not a cell's JSON"):
        cell_of(str(tmp_path / "broken.json"))
    assert cell_of("gru") is CELLS["gru"]
    assert not (folder / "none.partial").exists()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"target": "lable"}, "did you mean 'label'"),
        ({"file": "no-such-file.csv"}, "no such file"),
        ({"test_fraction": 0.9}, "test fraction"),
        ({"truncate": 3}, r"truncate is for tasks that answer at every step \(tag\)"),
        ({"learning_rate": 1e37, "clip": "none"}, "not finite in epoch"),
    ],
)
def test_what_cannot_be_trained_leaves_nothing_behind(folder: Path, options: dict[str, Any], reason: str):
    before = sorted(folder.iterdir())
    with pytest.raises(ThroughtimeError, match=reason):
        fit(config(folder, "bad", **options))
    assert sorted(folder.iterdir()) == before


def test_a_run_needs_a_name(folder: Path):
    with pytest.raises(ThroughtimeError, match="a run needs a folder of its own"):
        fit(dataclasses.replace(config(folder, "x"), run=None))


def test_resuming_what_is_finished_returns_it_and_what_is_not_there_begins(run: FinishedRun, folder: Path):
    said: list[Event] = []
    (run.path / runs.LOCK).touch()  # as if it had been killed in the end
    again = fit(config(folder, "signs"), resume=True, on_event=said.append)
    assert not (run.path / runs.LOCK).exists()
    assert same_weights(again, run)
    assert [type(event) for event in said] == [Notice]
    with pytest.raises(ThroughtimeError, match=r"begun with another configuration: training\.epochs is 3 and was 8"):
        fit(config(folder, "signs", epochs=3), resume=True)
    (folder / "other folder").mkdir()
    with pytest.raises(ThroughtimeError, match="other folder: exists already"):
        fit(config(folder, "other folder"), resume=True)
    fit(config(folder, "new", epochs=1), resume=True, on_event=said.append)
    assert "nothing to go on with: the run begins anew" in "".join(e.text for e in said if isinstance(e, Notice))


def test_only_the_same_configuration_and_data_go_on(tmp_path: Path):
    to_classify(tmp_path / "signs.csv")

    def broken_off(event: Event) -> None:
        if isinstance(event, Epoch) and event.number == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(config(tmp_path, "run", checkpoint_seconds=0.0), on_event=broken_off)
    kept = sorted((tmp_path / "run.partial").iterdir())
    with pytest.raises(ThroughtimeError, match=r"training\.learning_rate is 0\.5 and was 0\.02; go back to that"):
        fit(config(tmp_path, "run", learning_rate=0.5), resume=True)
    content = (tmp_path / "signs.csv").read_bytes()
    to_classify(tmp_path / "signs.csv", seed=3)
    with pytest.raises(ThroughtimeError, match=r"the content of \S+signs\.csv has changed"):
        fit(config(tmp_path, "run"), resume=True)
    (tmp_path / "signs.csv").write_bytes(content)
    assert sorted((tmp_path / "run.partial").iterdir()) == kept
    resumed = fit(runs.configuration_of(tmp_path / "run"), resume=True)
    assert same_weights(resumed, fit(config(tmp_path, "undisturbed")))


def test_a_loss_that_is_not_finite_on_other_parts_is_said_and_never_the_best(tmp_path: Path):
    """A cell that quadruples its state trains on three steps, and leaves float32's range in eighty."""

    @cell(states="h")
    def Quadruple(x, h, W, b):
        return 4 * h + W @ x + b

    (tmp_path / "four.json").write_text(Quadruple.to_json())
    rows = ["id,t,label,x,part"]
    for number in range(24):
        part = ("train", "validation", "test")[number // 4 % 3]
        length = 3 if part == "train" else 80
        rows += [f"{number},{t},{'ab'[number % 2]},{number % 2 + t},{part}" for t in range(length)]
    (tmp_path / "long.csv").write_text("\n".join(rows))
    said: list[Event] = []
    options = {**COLUMNS, "part": "part", "file": str(tmp_path / "long.csv"), "cell": str(tmp_path / "four.json")}
    run = fit(Config.resolve({**options, "run": tmp_path / "run", "hidden_size": 3, "epochs": 2}), on_event=said.append)
    assert run.result["loss"] is None
    assert [line["validation_loss"] for line in run.epochs] == [None, None]
    assert run.result["weights_of_epoch"] == 2
    assert "no loss on the validation part was finite" in (run.path / runs.CARD).read_text()
    assert any("the loss on the test part is not finite" in event.text for event in said if isinstance(event, Notice))


def test_the_card_says_what_the_metrics_say(run: FinishedRun):
    card = (run.path / runs.CARD).read_text()
    score, count = run.result["score"], run.result["count"]
    assert f"GRU gets {score:.1%} of {count} test sequences right" in card
    for row in run.result["baselines"]:
        assert f"| {row['name']} | {row['score']:.1%} |" in card
    assert f"| GRU, 6 units | {score:.1%} |" in card
    assert f"of epoch {run.result['weights_of_epoch']} of 8, of the lowest loss on the validation part" in card
    assert f"clipped at {run.result['clip']:.3g} in the end, above 90% of the last 200 norms" in card
    assert "`x`, `y`" in card
    assert "`down`, `up`" in card
    assert "38 for training, 6 for validation, 16 for test" in card


def test_the_report_is_one_page_with_the_score_and_the_curves(run: FinishedRun):
    page = (run.path / runs.REPORT).read_text()
    assert f"{run.result['score']:.1%}" in page
    assert page.count("<svg") == 4
    assert not re.search(r"<script|https?://(?!www\.w3\.org)", page)


def test_the_environment_is_told(run: FinishedRun):
    told = json.loads((run.path / runs.ENVIRONMENT).read_text())
    assert told["packages"]["torch"] == torch.__version__
    assert told["threads"] == 1


def test_every_option_of_the_training_reaches_it(folder: Path):
    """The threads, too, which change no bit here."""
    given = {"threads": 2, "validation_fraction": 0.0, "clip": 0.3, "accumulate": 2, "decay": "linear", "epochs": 2}
    run = fit(config(folder, "options", **given))
    assert run.recipe.clip == 0.3
    assert run.epochs[0]["threshold"] == 0.3
    assert run.epochs[0]["score"] is None
    assert run.epochs[0]["updates"] == 3
    assert "no validation part was kept out" in (run.path / runs.CARD).read_text()
    assert torch.get_num_threads() == 1
