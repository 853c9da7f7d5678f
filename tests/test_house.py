"""The layout of the house: imports run downwards only, heavy ones wait, and nothing executes what it loads."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import throughtime
from throughtime.tasks.table import TASKS

ROOT = Path(throughtime.__file__).parent
MODULES = sorted(ROOT.rglob("*.py"))
FLOORS = {
    "errors": 0,
    "equations": 1,
    "engine": 2,
    "nn": 3,
    **{"insight": 4, "interop": 4, "data": 4},
    "report": 5,
    "tasks": 6,
    "training": 7,
    "runs": 8,
    "estimators": 9,
    "cli": 10,
}
HEAVY = {
    "numba",
    "llvmlite",
    "triton",
    "matplotlib",
    "pandas",
    "sklearn",
    "jinja2",
    "pyarrow",
    "rich",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "keras",
    "h5py",
}
EXECUTES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def name_of(path: Path) -> str:
    return ".".join(("throughtime", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")


def imports(tree: ast.AST, at_load: bool = False) -> Iterator[tuple[str, int]]:
    """The modules that a file imports, with the line; `at_load` leaves out functions and what only types need."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative imports hide which floor they come from"
            yield str(node.module), node.lineno
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)
        elif at_load and _waits(node):
            continue
        else:
            yield from imports(node, at_load)


def _waits(node: ast.AST) -> bool:
    """Whether what stands inside is not run as the module is loaded."""
    for_types = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    return for_types or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)


def part_of(module: str) -> str:
    """`throughtime.nn.layout` is of `nn`."""
    return [*module.split("."), ""][1]


@pytest.fixture(scope="module")
def trees() -> dict[Path, ast.Module]:
    return {path: ast.parse(path.read_text()) for path in MODULES}


def test_every_module_has_a_floor():
    parts = {part_of(name_of(path)) for path in MODULES} - {""}
    assert parts <= set(FLOORS)
    assert {"equations", "engine", "nn", "insight", "data", "tasks", "training", "runs", "cli", "errors"} <= parts


def test_imports_run_downwards_only(trees: dict[Path, ast.Module]):
    upwards = []
    for path, tree in trees.items():
        own = part_of(name_of(path)) or "insight"  # throughtime/__init__.py offers what is below, up to nn
        for module, line in imports(tree):
            other = part_of(module)
            inside = module.startswith("throughtime.") and other != own
            if inside and (other not in FLOORS or FLOORS[other] >= FLOORS[own]):
                upwards.append(f"{path.relative_to(ROOT)}:{line} ({own}) imports {module}")
    assert not upwards


def test_every_way_to_import_is_seen():
    source = """
import pandas.io
from throughtime import nn
if TYPE_CHECKING:
    import jinja2
def later():
    import numba as nb
class Now:
    from matplotlib import pyplot
"""
    assert {module for module, _ in imports(ast.parse(source))} == {
        *("pandas.io", "throughtime", "throughtime.nn", "jinja2", "numba", "matplotlib", "matplotlib.pyplot")
    }
    loaded = {module for module, _ in imports(ast.parse(source), at_load=True)}
    assert loaded == {"pandas.io", "throughtime", "throughtime.nn", "matplotlib", "matplotlib.pyplot"}


def test_the_blackboard_needs_only_the_standard_library(trees: dict[Path, ast.Module]):
    foreign = [
        f"{path.name}:{line} imports {module}"
        for path, tree in trees.items()
        if part_of(name_of(path)) in ("equations", "errors")
        for module, line in imports(tree)
        if module.split(".")[0] not in (*sys.stdlib_module_names, "throughtime", "__future__")
    ]
    assert not foreign


def test_the_definition_of_right_uses_no_other_target(trees: dict[Path, ast.Module]):
    used = {module for module, _ in imports(trees[ROOT / "engine/targets/reference.py"])}
    others = {module for module in used if module.startswith("throughtime.engine.targets")}
    assert others <= {f"throughtime.engine.targets.target{name}" for name in ("", ".Target")}, "the contract alone"
    assert "throughtime.equations.calculus" not in used, "autograd differentiates it, not our own adjoints"


def test_heavy_modules_wait_until_they_are_needed(trees: dict[Path, ast.Module]):
    early = []
    for path, tree in trees.items():
        allowed = {"numba", "llvmlite", "triton"} if path.parent == ROOT / "engine/targets/cpu" else set()
        if path == ROOT / "estimators.py":
            allowed = {"sklearn"}  # its classes inherit from scikit-learn's; nothing of the library imports it
        for module, line in imports(tree, at_load=True):
            if module.split(".")[0] in HEAVY - allowed:
                early.append(f"{path.relative_to(ROOT)}:{line} imports {module} as it is loaded")
    assert not early


def test_nothing_but_its_user_imports_the_estimators(trees: dict[Path, ast.Module]):
    """They alone load scikit-learn as they are loaded."""
    assert not [
        path
        for path, tree in trees.items()
        if any(module.startswith("throughtime.estimators") for module, _ in imports(tree))
    ]


def test_nothing_loads_what_could_execute(trees: dict[Path, ast.Module]):
    found = []
    for path, tree in trees.items():
        found += [f"{path.name}:{line} {m}" for m, line in imports(tree) if m.split(".")[0] in EXECUTES]
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                if (path, called) == (ROOT / "nn/scripting.py", "exec"):
                    continue  # its own template for TorchScript, with literals in it; test_torchscript tries others
                if called in ("torch.load", "eval", "exec", "np.load", "numpy.load", "__import__"):
                    found.append(f"{path.relative_to(ROOT)}:{node.lineno} calls {called}")
    assert not found


def test_no_drawer_for_odds_and_ends():
    assert not [path for path in MODULES if path.stem in ("utils", "util", "helpers", "misc", "common")]


FILES_OF_TASKS = ("tasks/classify.py", "tasks/tag.py")
NAMES_OF_TASKS = re.compile(r"\b(classif(y|ies|ied|ier)s?|tag(s|ged|ger|gers)?)\b")


def test_nothing_but_its_file_and_its_row_names_a_task(trees: dict[Path, ast.Module]):
    """No text of the program, messages and help included, says which task it is about; docstrings may give examples.

    `tasks/table.py` has the rows and `estimators.py` a class for each, both by the tasks' own classes.
    """
    assert {f"tasks/{name}.py" for name in TASKS} == set(FILES_OF_TASKS)
    named = []
    for path, tree in trees.items():
        place = str(path.relative_to(ROOT))
        documentation = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        texts = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
        for node in () if place in FILES_OF_TASKS else texts:
            if id(node) not in documentation and NAMES_OF_TASKS.search(str(node.value)):
                named.append(f"{place}:{node.lineno} says {node.value!r}")
        if place not in (*FILES_OF_TASKS, "tasks/table.py", "estimators.py"):
            named += [
                f"{place}:{line} imports {module}"
                for module, line in imports(tree)
                if module in [f"throughtime.tasks.{name}" for name in TASKS]
            ]
    assert not named


INSIDE = {
    "data": "sequences packaged files tables batches arrays splitting encoding formats reading",
    "tasks": "task model classes classify|tag table encoding",
    "training": "recipe evaluation loop",
    "runs": "configuration folder card fit serve export streaming compare findings diagnose",
    "report": "page drawing verdict diagnosis_page",
}
"""Rooms whose files stand one upon the other, the lowest first; `a|b` are beside one another."""


def test_inside_a_room_imports_run_downwards_too(trees: dict[Path, ast.Module]):
    upwards = []
    for room, files in INSIDE.items():
        level = {name: place for place, names in enumerate(files.split()) for name in names.split("|")}
        for path, tree in trees.items():
            own = name_of(path).split(".")[1:]
            if own[0:1] != [room] or len(own) < 2:
                continue
            assert own[1] in level, f"{path.relative_to(ROOT)} has no place in INSIDE"
            for module, line in imports(_at_run_time(tree)):
                other = module.split(".")[1:]
                inside = other[:1] == [room] and len(other) > 1 and other[1] in level and other[1] != own[1]
                if inside and level[other[1]] >= level[own[1]]:
                    upwards.append(f"{path.relative_to(ROOT)}:{line} imports {module}")
    assert not upwards


def _at_run_time(tree: ast.Module) -> ast.Module:
    """Without what only types need."""
    body = [node for node in tree.body if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")]
    return ast.Module(body, [])


def test_public_names_are_what_the_package_says():
    assert sorted(throughtime.__all__, key=str) == sorted(set(throughtime.__all__), key=str)
    assert all(hasattr(throughtime, name) for name in throughtime.__all__)
    undocumented = [n for n in throughtime.__all__ if not getattr(getattr(throughtime, n), "__doc__", None)]
    assert not undocumented
