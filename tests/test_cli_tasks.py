"""`fit`, `evaluate`, `predict` and `stream` as they are typed: what they make, print and refuse."""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer

from throughtime.cli import app, main
from throughtime.runs import folder as runs
from throughtime.runs.configuration import SECTIONS, Config, Data
from throughtime.runs.fit import Event, fit
from throughtime.training.loop import Epoch, Training

QUICK = ["--epochs", "2", "--hidden", "3", "--batch-size", "8"]
ROLES = ["--sequence-id", "id", "--time", "t", "--target", "label"]

Typed = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`signs.csv`, 40 sequences of two classes, and `signs`, a run trained on it."""
    folder = tmp_path_factory.mktemp("cli")
    draw = np.random.default_rng(0)
    rows = ["id,t,label,pitch,gain"]
    for number in range(40):
        values = draw.normal(size=(2 + number % 3, 2)).round(3)
        rows += [f"s{number:02},{t},{'ab'[number % 2]},{x},{y}" for t, (x, y) in enumerate(values)]
    (folder / "signs.csv").write_text("\n".join(rows) + "\n")
    fit(small(folder, folder / "signs"))
    return folder


def small(folder: Path, run: Path, **options: Any) -> Config:
    """What `fit signs.csv ROLES QUICK --run run` resolves to."""
    roles = {"sequence_id": "id", "time": "t", "target": "label"}
    quick = {"epochs": 2, "hidden_size": 3, "batch_size": 8}
    return Config.resolve({"file": str(folder / "signs.csv"), "run": run, **roles, **quick, **options})


@pytest.fixture
def typed(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> Typed:
    """Type a command in an empty folder with links to the data and the run; gives status, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    for name in ("signs.csv", "signs"):
        (tmp_path / name).symlink_to(data / name)

    def run(*arguments: str, stdin: bytes = b"") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["throughtime", *arguments])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        with pytest.raises(SystemExit) as end:
            main()
        sys.stdout.flush()
        captured = capfdbinary.readouterr()
        return int(end.value.code or 0), captured.out.decode(), captured.err.decode()

    return run


def contents(run: Path) -> dict[str, bytes]:
    """The files of a run that hold no times."""
    return {name: (run / name).read_bytes() for name in ("weights.safetensors", "config.toml", "encoder.json")}


def losses(run: Path) -> list[float]:
    return [epoch["loss"] for epoch in runs.load(run).epochs]


# ---------------------------------------------------------------------------------------------------------------------
# fit


def test_fit_prints_its_score_beside_the_baselines_and_names_the_run(typed: Typed) -> None:
    status, out, _ = typed("fit", "signs.csv", *ROLES, *QUICK)
    assert status == 0
    for expected in ("always 'a'", "1-nearest neighbour on means", "GRU, 3 units", "right of 10 test sequences"):
        assert expected in out
    assert "Run: signs-gru, report: signs-gru/report.html" in out
    assert {path.name for path in Path("signs-gru").iterdir()} >= {"report.html", "weights.safetensors", "config.toml"}
    status, out, _ = typed("fit", "signs.csv", *ROLES, *QUICK)
    assert "Run: signs-gru-2" in out, "the next run takes the next name"


def test_the_configuration_of_a_run_repeats_it_to_the_bit(typed: Typed) -> None:
    status, _, err = typed("fit", "--config", "signs/config.toml", "--run", "again")
    assert (status, err) == (0, "")
    assert contents(Path("again")) == contents(Path("signs"))
    assert losses(Path("again")) == losses(Path("signs"))


def test_what_is_typed_wins_over_the_file_and_the_run_says_so(typed: Typed) -> None:
    Path("my.toml").write_text(
        'seed = 3\n[data]\nfile = "signs.csv"\nsequence_id = "id"\ntarget = "label"\n[network]\nhidden_size = 5\n'
        "[training]\nepochs = 1\nclip = 0.5\n"
    )
    status, _, err = typed("fit", "--config", "my.toml", "--hidden", "3", "--clip", "none", "--seed", "3", "--run", "r")
    assert status == 0
    assert "Note: hidden_size = 3, typed in place of 5 in my.toml.\n" in err
    config = runs.configuration_of(Path("r"))
    assert (config.network.hidden_size, config.training.clip, config.seed, config.training.epochs) == (3, None, 3, 1)
    stored = Path("r/config.toml").read_text()
    assert "hidden_size = 3, typed in place of 5 in my.toml" in stored
    assert "clip = 'none', typed in place of 0.5 in my.toml" in stored
    assert "seed = 3, typed" not in stored


def test_a_run_that_was_broken_off_goes_on_when_it_is_named(typed: Typed, data: Path) -> None:
    def break_off(event: Event) -> None:
        if isinstance(event, Epoch):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(small(data, Path("broken"), checkpoint_seconds=0.0), on_event=break_off)
    checkpoint = Path("broken.partial/checkpoint.safetensors")
    before = checkpoint.read_bytes()
    status, _, err = typed("fit", "--resume", "--run", "broken", "--epochs", "3")
    assert status == 2
    assert "was begun with another configuration: training.epochs is 3 and was 2" in err
    assert checkpoint.read_bytes() == before, "a refusal costs nothing of what was done"
    status, out, err = typed("fit", "--resume", "--run", "broken")
    assert (status, err) == (0, "Note: going on in epoch 1, from the last checkpoint.\n")
    assert "Run: broken" in out
    assert losses(Path("broken")) == losses(Path("signs"))
    assert not Path("broken.partial").exists()


def test_whoever_breaks_a_training_off_is_told_how_it_goes_on(typed: Typed, monkeypatch: pytest.MonkeyPatch) -> None:
    def end_epoch(self: Training) -> Epoch:
        raise KeyboardInterrupt

    monkeypatch.setattr(Training, "end_epoch", end_epoch)
    status, _, err = typed("fit", "signs.csv", *ROLES, *QUICK, "--run", "my run", "--checkpoint-seconds", "0")
    assert status != 0
    assert "`throughtime fit --resume --run 'my run'` goes on from here" in err
    status, _, err = typed("fit", "signs.csv", *ROLES, *QUICK, "--run", "other")
    assert "goes on" not in err, "there was no checkpoint yet"


def test_progress_is_drawn_where_someone_looks(typed: Typed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("COLUMNS", "120")
    _, out, err = typed("fit", "signs.csv", *ROLES, *QUICK, "--run", "seen")
    for expected in ("epoch 2/2", "loss ", "score ", "steps/s"):
        assert expected in err
    assert "epoch" not in out


def test_the_defaults_that_help_shows_are_those_of_the_configuration() -> None:
    command = typer.main.get_command(app)
    options = command.commands["fit"].params  # type: ignore[attr-defined]
    shown = {option.name: option.show_default for option in options if isinstance(option.show_default, str)}
    config = Config(Data(file="x"))
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    for section in SECTIONS:
        fields |= {field.name: getattr(fields[section], field.name) for field in dataclasses.fields(fields[section])}
    spelt = {True: "yes", False: "no"}
    defaults = {
        name: str(spelt.get(value, value) if isinstance(value, bool) else value) for name, value in fields.items()
    }
    assert {name: defaults[name] for name in shown} == shown
    names = {option.name for option in options} - {"config", "resume", "help"}
    assert names == set(fields) - {*SECTIONS, "sha256", "overridden"}, "every option of a TOML file can be typed"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "there is no DATA; give a file"),
        (["absent.csv", *ROLES], "absent.csv: no such file"),
        (["signs.csv"], "--sequence-id and --target"),
        (["signs.csv", *ROLES, "--task", "tag", "--cell", "elmo"], "there is no cell 'elmo'"),
        (["signs.csv", *ROLES, "--clip", "much"], "clip: 'much'; give a number or 'auto' or"),
        (["signs.csv", *ROLES, "--patience", "1.5"], "patience: 1.5; give a whole number"),
        (["signs.csv", *ROLES, "--epochs", "0"], "the epochs is 0; give a number above 0"),
        (["signs.csv", *ROLES, "--config", "absent.toml"], "absent.toml: cannot be read"),
        (["signs.csv", *ROLES, "--config", "signs.csv"], "signs.csv: not TOML"),
        (["signs.csv", *ROLES, "--run", "signs"], "signs: exists already, and a run never replaces anything"),
        (["signs.csv", *ROLES, "--run", "signs.csv/run"], "signs.csv: cannot be made (File exists)"),
        (["--resume"], "name it (--run)"),
        (["--resume", "--run", "absent"], "absent: there is no run here"),
        (["signs.csv", *ROLES, "--truncate", "2"], "runcat"),
    ],
)
def test_a_refused_fit_is_one_line_and_leaves_no_file(arguments: list[str], expected: str, typed: Typed) -> None:
    status, out, err = typed("fit", *arguments)
    assert (status, out) == (2, "")
    assert expected in err
    assert err.startswith("throughtime: ")
    assert err.count("\n") == 1
    assert sorted(path.name for path in Path().iterdir()) == ["signs", "signs.csv"]


# ---------------------------------------------------------------------------------------------------------------------
# evaluate, predict, stream


def test_evaluate_prints_a_row_a_class_and_writes_json(typed: Typed) -> None:
    status, out, err = typed("evaluate", "signs", "signs.csv", "--out", "scores.json")
    assert status == 0
    assert "Note: the run was made from this: only its test part counts, 10 of 40 sequences.\n" in err
    record = json.loads(Path("scores.json").read_text())
    assert record["count"] == 10
    assert f"{record['accuracy']:.1%} of 10 sequences right" in out
    for label in "ab":
        assert any(line.split()[0] == label for line in out.splitlines() if line.strip())


def test_predict_goes_from_file_to_file_and_from_stdin_to_stdout(typed: Typed) -> None:
    assert typed("predict", "signs", "signs.csv", "--out", "answers.csv")[:2] == (
        0,
        "answers.csv: answers to 40 sequences\n",
    )
    status, out, err = typed("predict", "signs", "signs.csv")
    assert (status, err) == (0, "")
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["label"] for line in lines] == [
        row.split(",")[1] for row in Path("answers.csv").read_text().split()[1:]
    ]
    piped = Path("signs.csv").read_bytes()
    assert typed("predict", "signs", "-", "--format", "csv", stdin=piped) == (0, out, "")
    one = json.dumps({"id": "q", "x": [[0.5, 1], [1, 2]]}).encode()
    status, out, err = typed("predict", "signs", stdin=one)
    assert (status, json.loads(out)["id"]) == (0, "q")
    assert "in the order of the training: 'pitch', 'gain'" in err


def test_stream_answers_each_line_and_says_what_it_keeps(typed: Typed) -> None:
    lines = [{"id": "a", "x": [0.5, 1]}, {"id": "a", "x": [1]}, {"id": "b", "x": [1, 2]}, {"id": "a", "end": True}]
    text = "\n".join(map(json.dumps, lines)).encode()
    status, out, err = typed("stream", "signs", "--max-ids", "1", stdin=text)
    said = [json.loads(line) for line in out.splitlines()]
    assert status == 0
    assert "at most 1 states are kept, one for an id, 12 bytes each; beyond that a new one is refused" in err
    assert said[0].keys() == {"id", "step", "label", "probabilities"}
    assert "1 values where a step has 2" in said[1]["error"]
    assert "as many as were allowed" in said[2]["error"]
    assert said[3] == {"id": "a", "step": 1, "end": True}
    _, _, err = typed("stream", "signs")
    assert "the state of every id is kept until it ends, 12 bytes each; --max-ids sets a bound" in err


def test_a_model_that_reads_both_ways_is_not_streamed(typed: Typed) -> None:
    typed("fit", "signs.csv", *ROLES, *QUICK, "--bidirectional", "--run", "both")
    status, out, err = typed("stream", "both", stdin=b'{"id": 1, "x": [1, 2]}\n')
    assert (status, out) == (2, "")
    assert "it reads a sequence from its end too" in err


@pytest.mark.parametrize(
    ("arguments", "stdin", "expected"),
    [
        (["evaluate", "absent", "signs.csv"], b"", "absent: there is no run here"),
        (["evaluate", "signs", "absent.csv"], b"", "absent.csv: no such file"),
        (["evaluate", "signs", "signs.csv", "--out", "a.csv"], b"", "written as .json"),
        (["predict", "signs", "signs.csv", "--out", "signs.csv"], b"", "signs.csv: exists already"),
        (["predict", "signs", "signs.csv", "--out", "a.xls"], b"", "a.xls: the result is written as"),
        (["predict", "signs", "signs.csv", "--sequence-id", "name"], b"", "no column 'name'"),
        (["predict", "signs"], b"", "standard input: is empty"),
        (["predict", "signs"], b'{"x": [[1, 2], [3]]}', "standard input, line 1"),
        (["stream", "signs.csv"], b"", "signs.csv: there is no run here"),
    ],
)
def test_a_refusal_in_use_is_one_line_and_leaves_no_file(
    arguments: list[str], stdin: bytes, expected: str, typed: Typed
) -> None:
    status, out, err = typed(*arguments, stdin=stdin)
    assert (status, out) == (2, "")
    assert expected in err
    assert err.startswith("throughtime: ")
    assert err.count("\n") == 1
    assert sorted(path.name for path in Path().iterdir()) == ["signs", "signs.csv"]


@pytest.mark.parametrize(
    ("failure", "expected_status", "expected"),
    [
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 1, ""),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "standard output: cannot be written (No space left"),
    ],
)
def test_a_reader_that_leaves_is_no_error_and_a_full_disk_is_one_line(
    failure: OSError, expected_status: int, expected: str, typed: Typed, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing(io.BytesIO):
        def write(self, _: Any) -> int:
            raise failure

    for arguments in (["predict", "signs", "signs.csv"], ["stream", "signs"]):
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(Failing()))
        status, _, err = typed(*arguments, stdin=b'{"id": 1, "x": [1, 2]}\n')
        assert status == expected_status
        told = [line for line in err.splitlines() if not line.startswith("Note: ")]
        assert [line.startswith(f"throughtime: {expected}") for line in told] == [True] * bool(expected)
