"""The command as typed: what it prints and writes, and that a refusal is one line, status 2 and no file."""

import sys
from pathlib import Path

import pandas as pd
import pytest

from throughtime.cli import main

QUICK = ["--epochs", "2", "--seeds", "2", "--hidden", "3", "--cells", "elman,gru"]
ROLES = ["--sequence-id", "utterance", "--time", "frame", "--target", "speaker"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory but for `my.csv`: 16 sequences of two speakers, two features, one of them constant."""
    rows = [
        (utterance, frame, "ab"[utterance % 2], utterance % 2 + frame / 10, 1)
        for utterance in range(16)
        for frame in range(utterance % 3 + 1)
    ]
    monkeypatch.chdir(tmp_path)
    pd.DataFrame(rows, columns=["utterance", "frame", "speaker", "pitch", "gain"]).to_csv("my.csv", index=False)
    return tmp_path


def throughtime(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["throughtime", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    return int(end.value.code or 0)


def test_compare_prints_a_table_and_writes_a_report(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert throughtime(monkeypatch, "compare", "my.csv", *ROLES, *QUICK) == 0
    out = capsys.readouterr().out
    for expected in ("Elman", "GRU", "always 'a'", "50.0%", "parameters", "Report: throughtime-my.html"):
        assert expected in out
    assert "column 'gain' is 1 all through the training part: it teaches nothing." in out
    html = (folder / "throughtime-my.html").read_text()
    assert "throughtime compare my.csv --sequence-id utterance" in html
    assert html.count("<svg") == 4
    assert throughtime(monkeypatch, "compare", "my.csv", *ROLES, *QUICK, "--features", "pitch") == 0
    assert "Report: throughtime-my-2.html" in capsys.readouterr().out
    assert (folder / "throughtime-my.html").read_text() == html


def test_vowels_needs_no_more_than_its_name(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--epochs", "1", "--seeds", "1", "--hidden", "2", "--cells", "elman"]
    assert throughtime(monkeypatch, "compare", "vowels", *small, "--out", "vowels.html") == 0
    assert "95.1%" in capsys.readouterr().out
    assert "270 training and 370 test sequences of 7 to 29 steps" in (folder / "vowels.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["compare", "absent.csv", *ROLES], "absent.csv: no such file"),
        (
            ["compare", "vowel"],
            "vowel: no such file; give a data file, or a data set that ships here (vowels)",
        ),
        (["compare", "my.csv"], "say which columns hold the sequence's id and the class: --sequence-id and --target"),
        (["compare", "my.csv", *ROLES[:-1], "speeker"], "no column 'speeker'; did you mean 'speaker'?"),
        (["compare", "vowels", *ROLES], "leave the options that name columns out"),
        (["compare", "my.csv", *ROLES, "--features", "pitch,speaker"], "'speaker' is the target"),
        (["compare", "my.csv", *ROLES, "--group", "speaker"], "named both as target and as group"),
        (["compare", "my.csv", *ROLES, "--test-fraction", "0.9"], "the test fraction is 0.9"),
        (["compare", "my.csv", *ROLES, "--cells", "elmo"], "no cell is called 'elmo'; the cells are elman, gru"),
        (["compare", "my.csv", *ROLES, "--cells", ","], "name a cell; the cells are elman, gru"),
        (["compare", "my.csv", *ROLES, "--learning-rate", "0"], "the learning rate is 0.0"),
        (["compare", "my.csv", *ROLES, "--out", "my.csv"], "my.csv: exists already"),
        (["compare", "my.csv", *ROLES, "--out", "nowhere/report.html"], "nowhere: no such directory"),
    ],
)
def test_a_refusal_is_one_line_and_leaves_no_file(
    arguments: list[str],
    expected: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert throughtime(monkeypatch, *arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert expected in err
    assert err.startswith("throughtime: ")
    assert err.count("\n") == 1
    assert [path.name for path in folder.iterdir()] == ["my.csv"]


def test_a_package_that_is_not_installed_is_named_with_the_way_to_get_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    assert throughtime(monkeypatch, "compare", "my.csv", *ROLES) == 2
    assert capsys.readouterr().err == "throughtime: this command needs pandas; pip install 'throughtime[tasks]'\n"


def test_a_number_out_of_range_is_refused_by_its_option(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert throughtime(monkeypatch, "compare", "my.csv", *ROLES, "--epochs", "0") == 2
    assert "--epochs" in capsys.readouterr().err
