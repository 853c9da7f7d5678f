"""The documents are true: their programs run, their commands exist, their excerpts and paths are what is there."""

from __future__ import annotations

import re
import runpy
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

from throughtime.cli import app
from throughtime.equations.catalogue import GRU
from throughtime.equations.latex import written
from throughtime.errors import CellError

ROOT = Path(__file__).parent.parent
DOCUMENTS = [
    "README.md",
    "CONTRIBUTING.md",
    "docs/design.md",
    "docs/cells.md",
    "docs/tasks.md",
    "docs/sequences.md",
    "docs/interop.md",
    "docs/interop-keras.md",
    "docs/interop-torch.md",
]
COMMANDS: Any = typer.main.get_command(app)


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(name: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", read(name), flags=re.MULTILINE | re.DOTALL)


PROGRAMS = [(name, i) for name in DOCUMENTS for i in range(len(blocks(name, "python")))]


@pytest.mark.parametrize(("name", "place"), PROGRAMS)
def test_programs_run_and_learn(name: str, place: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(blocks(name, "python")[place], f"{name}[{place}]", "exec"), names)
    if "loss" in names:
        assert names["loss"] < 0.04, "guessing would give 1/12"
    assert list(tmp_path.iterdir()) == []


def test_the_layers_of_the_readme_are_torchs():
    names: dict[str, Any] = {}
    exec(next(block for block in blocks("README.md", "python") if "theirs" in block), names)
    packed = torch.nn.utils.rnn.pack_padded_sequence(names["x"], torch.tensor([29, 7, 14, 9]), enforce_sorted=False)
    expected, h_n = names["theirs"](packed)
    torch.testing.assert_close(names["output"], torch.nn.utils.rnn.pad_packed_sequence(expected)[0])
    torch.testing.assert_close(names["h_n"], h_n)


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_examples_run(path: Path, capsys: pytest.CaptureFixture[str]):
    torch.manual_seed(0)
    runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out


def commands_in(name: str) -> list[list[str]]:
    """What a document types after `throughtime`, in blocks and in the text."""
    typed = [line for block in blocks(name, "sh") for line in block.splitlines()]
    typed += re.findall(r"`(throughtime [^`]+)`", read(name))
    lines = (line.partition("#")[0].strip() for line in typed)
    return [shlex.split(line)[1:] for line in lines if line.startswith("throughtime ")]


@pytest.mark.parametrize("name", ["README.md", "docs/cells.md", "docs/tasks.md", "docs/interop.md"])
def test_what_is_typed_in_a_document_can_be_typed(name: str):
    assert commands_in(name)
    for command, *arguments in commands_in(name):
        assert command in COMMANDS.commands, command
        if arguments:  # options and arguments as the command reads them; it is not run
            COMMANDS.commands[command].make_context(command, list(arguments))


def test_what_the_readme_makes_can_be_made():
    made = set(re.findall(r"\bmake (\w+)", " ".join(blocks("README.md", "sh"))))
    assert made == {"demo", "test"}
    assert made <= set(re.findall(r"^(\w+):", read("Makefile"), flags=re.MULTILINE))


def test_every_command_is_in_the_readme():
    documented = {command for command, *_ in commands_in("README.md")}
    assert documented == set(COMMANDS.commands)


def test_an_option_that_does_not_exist_would_be_noticed():
    with pytest.raises(Exception, match="No such option: --colour"):
        COMMANDS.commands["show"].make_context("show", ["gru", "--colour"])


def test_the_excerpt_is_what_the_command_prints():
    (excerpt,) = blocks("README.md", "text")
    printed = written(GRU, input_size=12, hidden_size=100).splitlines()
    parts = [part.splitlines() for part in excerpt.removesuffix("\n").split("\n...\n")]
    place = 0
    for part in parts:
        starts = [i for i in range(place, len(printed)) if printed[i : i + len(part)] == part]
        assert starts, part
        place = starts[0] + len(part)


def paths_in(name: str) -> set[str]:
    """What a document points at: links, pictures, and whatever in its code marks looks like a path of ours."""
    text = re.sub(r"^```.*?^```", "", read(name), flags=re.MULTILINE | re.DOTALL)
    links = {target for target in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in target}
    folder = Path(name).parent
    found = {str(folder / link) for link in links}
    marked = re.findall(r"`([\w./-]+)`", text)
    tops = ("src/", "docs/", "examples/", "benchmarks/", "tests/")
    return found | {word for word in marked if word.startswith(tops) or word.endswith(".md")}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_path_exists(name: str):
    missing = [path for path in paths_in(name) if not (ROOT / path).exists()]
    assert not missing


def test_the_table_of_places_names_every_package():
    table = paths_in("README.md")
    packages = [path.parent for path in (ROOT / "src/throughtime").glob("*/__init__.py")]
    for package in packages:
        relative = f"{package.relative_to(ROOT)}/"
        assert relative in table or not any(package.glob("[a-z]*.py")), relative


def test_every_row_of_the_lectures_says_where_it_is():
    rows = re.findall(r"^\| (L\d+) \| .+ \| (.+) \|$", read("README.md"), flags=re.MULTILINE)
    assert [row for row, _ in rows] == [f"L{i}" for i in range(1, 16)]
    import throughtime

    for _, place in rows:
        assert "`" in place or "planned" in place
        for dotted in re.findall(r"`throughtime((?:\.\w+)+)`", place):
            found: Any = throughtime
            for part in dotted.strip(".").split("."):
                found = getattr(found, part)


def test_what_the_language_lists_is_what_the_package_offers():
    import throughtime

    text = read("docs/cells.md")
    section = text.split("## What can be written")[1].split("##")[0]
    listed = re.search(r"of throughtime `([a-z0-9\s]+)`", section)
    assert listed is not None
    functions = {name for name in throughtime.__all__ if name.islower() and callable(getattr(throughtime, name))}
    assert set(listed[1].split()) == functions - {"cell", "explain", "restore", "upgrade"}


def test_the_report_in_the_document_is_what_is_printed(capsys: pytest.CaptureFixture[str]):
    exec(blocks("docs/interop-torch.md", "python")[0], {})
    assert capsys.readouterr().out == blocks("docs/interop-torch.md", "text")[0]


def test_refusals_of_the_document_are_refusals():
    import throughtime as tt

    with pytest.raises(CellError, match="write where"):

        @tt.cell(states="h")
        def Wrong(x, h, W, U):
            return h if W @ x < U @ h else -h


def test_every_dependency_has_its_reason():
    import tomllib

    project = tomllib.loads(read("pyproject.toml"))["project"]
    wanted = list(project["dependencies"])
    wanted += project["optional-dependencies"]["tasks"] + project["optional-dependencies"]["test"]
    names = {re.split(r"[\[<>=]", requirement)[0] for requirement in wanted} - {"throughtime"}
    table = read("docs/design.md").split("## Dependencies")[1]
    assert not [name for name in names if name.removesuffix("-stubs") not in table]
