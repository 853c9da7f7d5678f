"""Compiled code of the fused CPU target on disk: what names it, who may hold it, what happens where it cannot be."""

from __future__ import annotations

import ast
import importlib.util
import os
import stat
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from processes import python

import throughtime
from throughtime.engine.targets.cpu import cache

HOUSE = Path(throughtime.__file__).parent
ENTRY = cache.Entry(b"code", ("a field",), ())


@pytest.fixture
def _looked_up_anew() -> Iterator[None]:
    cache.directory.cache_clear()
    yield
    cache.directory.cache_clear()


SMALL = """
import torch
from blackboards import random_problem
from throughtime.engine.targets.cpu import target as cpu
from throughtime.engine.targets.cpu import llvm
from throughtime.engine.recurrence import run
from throughtime.equations.catalogue import Elman
compiled = []
original = llvm.compiled
llvm.compiled = lambda text: compiled.append(1) or original(text)
output, _ = run(random_problem(Elman, 2, 1, 2, 3), "cpu")
print(len(compiled), output.sum().item())
"""


def small(**environment: str) -> tuple[int, str, str]:
    """How many kernels were compiled, the result, what was warned about."""
    result = python(SMALL, **environment)
    assert result.returncode == 0, result.stderr
    count, value = result.stdout.split()
    return int(count), value, result.stderr


def entries(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_a_warm_cache_compiles_nothing_and_a_damaged_entry_is_made_again(tmp_path: Path):
    kept = {"THROUGHTIME_CACHE": str(tmp_path / "cache")}
    cold, value, said = small(**kept)
    assert cold > 0
    assert said == ""
    assert small(**kept) == (0, value, "")
    short, garbled, *_ = found = entries(tmp_path)
    assert len(found) == cold
    before = garbled.read_bytes()
    short.write_bytes(short.read_bytes()[:50])
    garbled.write_bytes(before[:-4] + b"\0\1\2\3")
    assert small(**kept) == (2, value, "")
    assert garbled.read_bytes()[:32] == before[:32] or small(**kept)[0] == 0
    if hasattr(os, "getuid"):
        assert all(stat.S_IMODE(path.stat().st_mode) & 0o077 == 0 for path in (tmp_path / "cache").rglob("*"))


def test_two_processes_may_fill_one_cache(tmp_path: Path):
    kept = {"THROUGHTIME_CACHE": str(tmp_path / "cache")}
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: small(**kept), range(2))
    assert first[1:] == second[1:]
    assert small(**kept) == (0, first[1], "")


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="needs POSIX permissions")
def test_a_folder_that_others_can_write_is_not_trusted(tmp_path: Path):
    open_to_all = tmp_path / "cache"
    open_to_all.mkdir()
    open_to_all.chmod(0o770)
    count, _, said = small(THROUGHTIME_CACHE=str(open_to_all))
    assert count > 0
    assert "can be written by others" in said
    assert entries(open_to_all) == []


def test_where_there_can_be_no_folder_it_is_said_and_works(tmp_path: Path):
    (tmp_path / "file").write_text("")
    count, _, said = small(THROUGHTIME_CACHE=str(tmp_path / "file" / "cache"))
    assert count > 0
    assert said.count("cannot be kept") == 1


def test_a_folder_that_turns_read_only_is_said_and_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr(cache.tempfile, "mkstemp", refuse)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        cache._write(tmp_path / "entry", ENTRY)
    assert ["could not be kept" in str(w.message) for w in said] == [True]


def test_no_half_file_is_left_where_the_last_step_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(cache.os, "replace", refuse)
    with pytest.warns(UserWarning, match=r"could not be kept in .* \(Input/output error\)"):
        cache._write(tmp_path / "entry", ENTRY)
    assert entries(tmp_path) == []


def test_what_is_written_is_read_back(tmp_path: Path):
    cache._write(tmp_path / "entry", ENTRY)
    assert cache._read(tmp_path / "entry") == ENTRY
    assert entries(tmp_path) == [tmp_path / "entry"]


# -- where ------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_looked_up_anew")
def test_a_tilde_is_the_home_and_a_relative_folder_stays_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    for asked, found in (("~/x", tmp_path / "home" / "x"), ("x/../y", tmp_path / "y")):
        monkeypatch.setenv("THROUGHTIME_CACHE", asked)
        cache.directory.cache_clear()
        folder = cache.directory()
        monkeypatch.chdir("/")
        assert cache.directory() == folder == found.resolve() / cache.generation()
        assert folder.is_dir()
        monkeypatch.chdir(tmp_path)
    assert not (tmp_path / "~").exists()


@pytest.mark.usefixtures("_looked_up_anew")
def test_a_relative_folder_of_xdg_is_invalid_as_its_specification_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("THROUGHTIME_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    for caches, found in (("caches", tmp_path / ".cache"), (str(tmp_path / "x"), tmp_path / "x"), ("", None)):
        monkeypatch.setenv("XDG_CACHE_HOME", caches)
        cache.directory.cache_clear()
        expected = (found or tmp_path / ".cache").resolve() / "throughtime" / cache.generation()
        assert cache.directory() == expected


@pytest.mark.usefixtures("_looked_up_anew")
def test_a_home_that_nobody_knows_is_no_reason_to_fail(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("THROUGHTIME_CACHE", "~no-such-user-of-this-machine/x")
    with pytest.warns(UserWarning, match="compiled code cannot be kept in ~no-such-user"):
        assert cache.directory() is None


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="needs POSIX permissions")
@pytest.mark.usefixtures("_looked_up_anew")
def test_code_is_not_kept_where_another_user_could_put_some(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("THROUGHTIME_CACHE", str(tmp_path / "open" / "cache"))
    assert cache.directory() is not None
    cache.directory.cache_clear()
    (tmp_path / "open").chmod(0o777)
    with pytest.warns(UserWarning, match="open, in which .* lies, can be written by others"):
        assert cache.directory() is None
    (tmp_path / "open").chmod(0o1777)
    cache.directory.cache_clear()
    assert cache.directory() is not None, "in a folder with the sticky bit nobody else can move it away"
    cache.directory.cache_clear()
    monkeypatch.setattr(cache.os, "getuid", lambda: 987654)
    with pytest.warns(UserWarning, match="belongs to another user"):
        assert cache.directory() is None


# -- the name ---------------------------------------------------------------------------------------------------------


def imported(path: Path) -> set[Path]:
    """The files of the library that a file imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    specs = (find(name) for name in found if name.split(".")[0] == "throughtime")
    return {Path(spec.origin) for spec in specs if spec and spec.origin}


def find(name: str) -> importlib.machinery.ModuleSpec | None:
    try:
        return importlib.util.find_spec(name)
    except ModuleNotFoundError:  # a name in a module
        return None


def generating() -> list[Path]:
    """The files of the target in which a piece of code or a frame is begun."""
    here = Path(cache.__file__).parent

    def begins(path: Path) -> bool:
        calls = (node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
        return any(isinstance(call, ast.Name) and call.id in ("Code", "Frame") for call in calls)

    return [path for path in here.glob("*.py") if begins(path)]


def test_whatever_the_generators_import_is_part_of_the_name_of_their_code():
    begun = generating()
    assert {path.stem for path in begun} == {"drivers", "kernels", "gang", "stepping"}
    waiting = [path for path in begun if path.stem != "stepping"]  # one loop over layers, with settings around it
    waiting += [Path(cache.__file__).parent / f"{name}.py" for name in ("backward", "compiled")]
    closure: set[Path] = set(begun)
    while waiting:
        closure.add(path := waiting.pop())
        waiting += imported(path) - closure
    code = {path for path in closure if path.name != "__init__.py" and path != HOUSE / "errors.py"}
    assert {HOUSE / "engine/plan.py", HOUSE / "equations/cell.py", HOUSE / "equations/expr.py"} <= code
    assert code <= set(cache.sources())


def test_what_decides_a_kernel_changes_its_name_and_nothing_else_does(monkeypatch: pytest.MonkeyPatch):
    before, read = cache.generation(), Path.read_bytes
    engine = [
        "engine/plan.py",
        *(f"engine/targets/cpu/{name}.py" for name in ("drivers", "kernels", "backward", "llvm")),
    ]
    deciding = {HOUSE / part for part in (*engine, *(f"equations/{name}.py" for name in ("cell", "calculus", "expr")))}
    for path in HOUSE.rglob("*.py"):
        more = lambda this, path=path: read(this) + (b"#" if this == path else b"")  # noqa: E731
        monkeypatch.setattr(Path, "read_bytes", more)
        if path in deciding:
            assert cache.generation() != before, path
        elif HOUSE / "engine/targets/cpu" not in path.parents:
            assert cache.generation() == before, path
