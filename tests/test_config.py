"""The configuration: what is typed, written in TOML or left out; nothing is misread, and all of it comes back."""

from __future__ import annotations

import dataclasses
import math
import tomllib
from pathlib import Path
from typing import Any

import pytest

from throughtime.errors import ThroughtimeError
from throughtime.runs.configuration import SECTIONS, Config, Data, Network
from throughtime.training.recipe import Recipe

EVERYTHING = Config(
    data=Data(
        file="/a/b.csv",
        **{"task": "tag", "sequence_id": "id", "target": "label", "time": "t", "features": ("x", "y z")},  # type: ignore[arg-type]
        **{"symbols": ("w",), "group": "none", "part": "p", "text": "letters", "sha256": "0" * 64},  # type: ignore[arg-type]
        **{"test_fraction": 0.3, "validation_fraction": 0.0, "split_seed": 7},  # type: ignore[arg-type]
    ),
    network=Network("lstm", 12, 3, True, 0.25, 9, 2),
    training=Recipe(5, 7, 0.1 + 0.2, None, 0.0, 0.5, "linear", 3, None, 40),
    seed=3,
    threads=2,
    checkpoint_seconds=0.0,
    overridden=("seed = 3, typed in place of 2 in a.toml",),
)


@pytest.mark.parametrize("config", [Config(Data(file="vowels")), EVERYTHING], ids=["defaults", "everything"])
def test_toml_brings_back_every_option_to_the_bit(config: Config):
    assert Config.from_toml(config.to_toml(), "here") == config
    assert config.difference(Config.from_toml(config.to_toml(), "here")) is None


def test_the_example_of_everything_leaves_no_option_at_its_default():
    for section in (EVERYTHING.data, EVERYTHING.network, EVERYTHING.training, EVERYTHING):
        for entry in dataclasses.fields(section):
            if entry.name not in (*SECTIONS, "file", "run"):
                assert getattr(section, entry.name) != entry.default, entry.name


def test_what_is_written_does_not_depend_on_the_defaults_of_a_later_version():
    """Every option stands in the file, but for those whose default is that they are not there."""
    written = tomllib.loads(Config(Data(file="vowels")).to_toml())
    for name, kind in SECTIONS.items():
        left_out = {entry.name for entry in dataclasses.fields(kind)} - set(written[name])
        assert all(kind.__dataclass_fields__[option].default is None for option in left_out)
    none = Config(Data(file="vowels"), training=Recipe(clip=None, patience=None))
    assert tomllib.loads(none.to_toml())["training"]["clip"] == "none"


def test_what_is_typed_wins_over_the_file_and_the_file_over_the_defaults(tmp_path: Path):
    file = tmp_path / "a.toml"
    file.write_text('seed = 2\n[data]\nfile = "vowels"\n[training]\nepochs = 9\nclip = 3\n')
    config = Config.resolve({"epochs": 4, "hidden_size": None, "run": "there", "cell": "lstm"}, file)
    assert config.training == Recipe(epochs=4, clip=3.0)
    assert config.network == Network("lstm")
    assert (config.seed, config.data.file, config.run) == (2, "vowels", Path("there"))
    assert config.overridden == ("epochs = 4, typed in place of 9 in a.toml",)
    assert "there" not in config.to_toml()


def test_paths_in_a_file_are_seen_from_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "deep").mkdir()
    file = tmp_path / "deep" / "a.toml"
    file.write_text('[data]\nfile = "../x.csv"\n[network]\ncell = "cell.json"\n')
    monkeypatch.chdir(tmp_path)
    config = Config.resolve({}, file)
    assert Path(config.data.file).resolve() == tmp_path / "x.csv"
    assert Path(config.network.cell) == tmp_path / "deep" / "cell.json"
    assert Config.resolve({"file": "x.csv", "cell": "cell.json"}, file).data.file == "x.csv"


def test_a_runs_folder_imports_no_code(tmp_path: Path):
    file = tmp_path / "config.toml"
    file.write_text('[data]\nfile = "vowels"\n[network]\ncell = "evil:cell"\n')
    assert Config.resolve({}, file).network.cell == "evil:cell", "one's own file may name one's own cell"
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(ThroughtimeError, match=r"'evil:cell' names code to import, .*; write 'cell.json', or"):
        Config.resolve({}, file)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", r"\[data\] names no file; give"),
        ("data = 3", "data is 3, not a section"),
        ("epoch = 3\n[data]\nfile='x'", "there is no option 'epoch'; the options are seed"),
        ("[data]\nfile='x'\n[training]\nepoch = 3", r"\[training\]: there is no option 'epoch'; did you mean 'epochs'"),
        ("[data]\nfile='x'\n[training]\nepochs = 'many'", r"epochs: 'many'; give a whole number"),
        ("[data]\nfile='x'\n[training]\nepochs = 2.5", "epochs: 2.5; give a whole number"),
        ("[data]\nfile='x'\n[training]\nepochs = true", "epochs: True; give a whole number"),
        ("[data]\nfile='x'\n[training]\nclip = 'some'", "clip: 'some'; give a number or 'auto' or \"none\""),
        ("[data]\nfile='x'\n[training]\ndecay = 'steep'", "decay: 'steep'; give 'cosine' or 'linear' or 'none'"),
        ("[data]\nfile='x'\nfeatures = 'a'", "features: 'a'; give a list of names"),
        ("[data]\nfile='x'\ngroup = 3", "group: 3; give text"),
        ("[data]\nfile='x'\n[network]\nbidirectional = 1", "bidirectional: 1; give true or false"),
        ("[data]\nfile='x'\ntask = 'guess'", "task: 'guess'; give 'classify' or 'tag'"),
        ("threads = 0\n[data]\nfile='x'", "threads is 0; give a number from 1"),
        ("[data]\nfile='x'\n[network]\ndropout = 1.0", "dropout is 1.0; give a share"),
        ("[data", "not TOML"),
        ("a = " + "[" * 5000, "not TOML"),
    ],
)
def test_what_is_not_an_option_is_refused_with_its_place(tmp_path: Path, text: str, reason: str):
    file = tmp_path / "a.toml"
    file.write_text(text)
    with pytest.raises(ThroughtimeError, match=reason) as refusal:
        Config.resolve({}, file)
    assert "\n" not in str(refusal.value)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path):
    with pytest.raises(ThroughtimeError, match=r"missing.toml: cannot be read"):
        Config.resolve({}, tmp_path / "missing.toml")
    (tmp_path / "latin.toml").write_bytes(b'[data]\nfile = "\xe9"')
    with pytest.raises(ThroughtimeError, match="not UTF-8"):
        Config.resolve({}, tmp_path / "latin.toml")


@pytest.mark.parametrize("options", [{"file": "x", "checkpoint_seconds": math.nan}, {"file": "x", "seed": -1}, {}])
def test_typed_nonsense_is_refused(options: dict[str, Any]):
    with pytest.raises(ThroughtimeError, match="give"):
        Config.resolve(options)


def test_the_first_difference_that_decides_numbers_is_named():
    config = Config(Data(file="vowels"))
    other = Config(Data(file="vowels"), training=Recipe(patience=None), checkpoint_seconds=1.0, overridden=("x",))
    assert config.difference(other) == "training.patience is 15 and was 'none'"
    assert config.difference(Config(Data(file="vowels"), checkpoint_seconds=1.0, overridden=("x",))) is None
    assert config.difference(Config(Data(file="vowels", group="g"))) == "data.group is not given and was 'g'"
