"""The resolved configuration of a run: every option with its value, in TOML and out of it."""

from __future__ import annotations

import dataclasses
import difflib
import math
import tomllib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from throughtime.data.packaged import SHIPPED
from throughtime.data.sequences import Columns
from throughtime.errors import ThroughtimeError
from throughtime.tasks.table import DEFAULT, TASKS
from throughtime.training.recipe import Recipe

CELL_FILE = "cell.json"
"""A run's own cell, beside its config.toml: what `cell` says there unless the cell is a built-in one."""


@dataclass(frozen=True, kw_only=True)
class Data(Columns):
    """What to learn from: a file or the name of a data set that ships here, its columns, and how it is split.

    `task` is a name of `TASKS`. `sha256`, where it is given, is the content that the file must have; `fit` fills it in.
    """

    file: str
    task: str = field(default=DEFAULT, metadata={"choices": tuple(TASKS)})
    test_fraction: float = 0.25
    validation_fraction: float = 0.15
    split_seed: int = 0
    sha256: str | None = None

    @property
    def columns(self) -> Columns:
        """How the file is read, and nothing else."""
        return Columns(**{each.name: getattr(self, each.name) for each in dataclasses.fields(Columns)})

    @property
    def shares(self) -> dict[str, float]:
        """How large a share each part gets, as `encode` and `split` take it."""
        return {"test_fraction": self.test_fraction, "validation_fraction": self.validation_fraction}


@dataclass(frozen=True)
class Network:
    """What to train: `cell` is a built-in name, `module:name`, or the path of a saved cell's JSON (`.json`)."""

    cell: str = "gru"
    hidden_size: int = 100
    num_layers: int = 1
    bidirectional: bool = False
    dropout: float = 0.0
    embedding_size: int = 32
    proj_size: int = 0


@dataclass(frozen=True)
class Config:
    """Everything that decides a run. `seed` decides weights, order and dropout; `data.split_seed` the split alone.

    `run` is the folder to make; it is not written to the run's own `config.toml`. `checkpoint_seconds` lie between two
    checkpoints at least (0: one after every update) and change no number. `overridden` says which options were typed in
    place of a TOML file's own, and changes no number either. Raises ThroughtimeError for values that no run can have.
    """

    data: Data
    network: Network = field(default_factory=Network)
    training: Recipe = field(default_factory=Recipe)
    seed: int = 0
    threads: int = 1
    checkpoint_seconds: float = 60.0
    overridden: tuple[str, ...] = ()
    run: Path | None = None

    def __post_init__(self) -> None:
        for name, value, least in (
            ("seed", self.seed, 0),
            ("split_seed", self.data.split_seed, 0),
            ("threads", self.threads, 1),
            ("checkpoint_seconds", self.checkpoint_seconds, 0),
            ("hidden_size", self.network.hidden_size, 1),
            ("num_layers", self.network.num_layers, 1),
            ("embedding_size", self.network.embedding_size, 1),
        ):
            if not least <= value < 2**63 or math.isnan(value):
                raise ThroughtimeError(f"{name} is {value}; give a number from {least}")
        if not 0 <= self.network.dropout < 1:
            raise ThroughtimeError(f"dropout is {self.network.dropout}; give a share from 0 up to, but not, 1")

    @classmethod
    def resolve(cls, options: Mapping[str, Any], file: Path | None = None) -> Config:
        """Options by their names, whatever section they are of, upon those of a TOML file, upon the defaults.

        `options` with the value None count as not given. Raises ThroughtimeError for a file that cannot be read, and,
        with the place and near names, for an option that does not exist or is of another type.
        """
        record = {} if file is None else _read_toml(file)
        overridden = []
        for name, value in options.items():
            if value is None:
                continue
            place = record.setdefault(section, {}) if (section := _section_of(name)) else record
            if isinstance(place, dict):
                if file is not None and name != "run" and place.get(name, value) != value:
                    overridden.append(f"{name} = {value!r}, typed in place of {place[name]!r} in {file.name}")
                place[name] = value
        config = cls.from_dict(record, "the options" if file is None else str(file))
        return dataclasses.replace(config, overridden=(*config.overridden, *overridden))

    @classmethod
    def from_toml(cls, text: str, source: str) -> Config:
        """What `to_toml` wrote, its paths as they stand there."""
        return cls.from_dict(_parsed(text, source), source)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any], source: str) -> Config:
        """The configuration that `to_dict` wrote; `source` is the place that a refusal names."""
        record = dict(record)
        sections: dict[str, Any] = {}
        for name, kind in SECTIONS.items():
            given = record.pop(name, {})
            if not isinstance(given, Mapping):
                raise ThroughtimeError(f"{source}: {name} is {given!r}, not a section; write it as [{name}]")
            if name == "data" and "file" not in given:
                raise ThroughtimeError(f"{source}: [data] names no file; give the data's path or its name")
            sections[name] = kind(**_checked(kind, given, f"{source}, [{name}]"))
        return cls(**sections, **_checked(cls, record, source, without=set(SECTIONS)))

    def to_dict(self) -> dict[str, Any]:
        """Sections of plain values, as TOML has them; nothing that is not given, and no `run`."""
        top = {name: value for name, value in _plain(self).items() if name not in (*SECTIONS, "run")}
        if not self.overridden:
            del top["overridden"]
        return top | {name: _plain(getattr(self, name)) for name in SECTIONS}

    def to_toml(self) -> str:
        """`to_dict` as TOML text."""
        import tomli_w

        return tomli_w.dumps(self.to_dict())

    def difference(self, other: Config) -> str | None:
        """The first option that decides numbers and differs, in words; None if both give the same run."""
        mine, theirs = _flat(self.to_dict()), _flat(other.to_dict())
        for name in dict.fromkeys([*mine, *theirs]):
            if name not in ("checkpoint_seconds", "overridden") and mine.get(name) != theirs.get(name):
                return f"{name} is {_shown(mine.get(name))} and was {_shown(theirs.get(name))}"
        return None


SECTIONS: dict[str, Any] = {"data": Data, "network": Network, "training": Recipe}


def _section_of(name: str) -> str | None:
    for section, kind in SECTIONS.items():
        if any(entry.name == name for entry in dataclasses.fields(kind)):
            return section
    return None


def _read_toml(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ThroughtimeError(f"{file}: not UTF-8 text; save it as UTF-8") from error
    except OSError as error:
        raise ThroughtimeError(f"{file}: cannot be read ({error.strerror}); give the path of a TOML file") from error
    return _anchored(_parsed(text, str(file)), file)


def _parsed(text: str, source: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise ThroughtimeError(f"{source}: not TOML ({' '.join(str(error).split())}); mend it there") from error


def _anchored(record: dict[str, Any], file: Path) -> dict[str, Any]:
    """Paths of files as seen from the TOML file's folder, wherever the command is typed."""
    data, network = record.get("data"), record.get("network")
    if isinstance(data, dict) and isinstance(name := data.get("file"), str) and name not in SHIPPED:
        data["file"] = str(file.parent / name)
    if isinstance(network, dict) and isinstance(cell := network.get("cell"), str):
        if cell.endswith(".json"):
            network["cell"] = str(file.parent / cell)
        elif ":" in cell and (file.parent / "manifest.json").exists():
            # A run never says this of itself: someone wants code to be imported through a folder that only holds data.
            raise ThroughtimeError(
                f"{file}, [network], cell: {cell!r} names code to import, and a run's configuration never does; write"
                f" {CELL_FILE!r}, or give the cell yourself (--cell)"
            )
    return record


def _checked(kind: Any, given: Mapping[str, Any], place: str, without: set[str] = frozenset()) -> dict[str, Any]:  # type: ignore[assignment]
    """The values as the dataclass `kind` has them; unknown names and other types are refused."""
    hints = {name: hint for name, hint in typing.get_type_hints(kind).items() if name not in without}
    for name in given:
        if name not in hints:
            near = difflib.get_close_matches(name, [*hints, *without], n=1)
            meant = f"did you mean {near[0]!r}?" if near else f"the options are {', '.join(hints)}"
            raise ThroughtimeError(f"{place}: there is no option {name!r}; {meant}")
    for name, value in given.items():
        choices: tuple[str, ...] = kind.__dataclass_fields__[name].metadata.get("choices", ())
        if choices and value not in choices:
            raise ThroughtimeError(f"{place}, {name}: {value!r}; give {' or '.join(map(repr, choices))}")
    return {name: _typed(value, hints[name], f"{place}, {name}") for name, value in given.items()}


def _typed(value: Any, hint: Any, place: str) -> Any:
    """The value as one of the types that the hint allows; "none" and a whole number may stand for None and a float."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    allowed = typing.get_args(hint) if union else (hint,)
    for kind in allowed:
        if typing.get_origin(kind) is Literal:
            if value in typing.get_args(kind):
                return value
        elif typing.get_origin(kind) is tuple:
            if isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
                return tuple(value)
        elif kind is Path and isinstance(value, str | Path):
            return Path(value)
        elif kind is types.NoneType and str not in allowed and value in (None, "none"):
            return None
        elif isinstance(value, kind) and not (isinstance(value, bool) and kind is not bool):
            return value
    if float in allowed and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    raise ThroughtimeError(f"{place}: {value!r}; give {' or '.join(_described(kind, allowed) for kind in allowed)}")


def _described(kind: Any, allowed: tuple[Any, ...]) -> str:
    if typing.get_origin(kind) is Literal:
        return " or ".join(repr(choice) for choice in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        return "a list of names"
    if kind is types.NoneType:
        return "nothing" if str in allowed else '"none"'
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "a path"}
    return names[kind]


def _plain(section: Any) -> dict[str, Any]:
    """Fields as TOML has them: None is left out where it is the default, and "none" where it is a choice."""
    written: dict[str, Any] = {}
    inherited = {entry.name for entry in dataclasses.fields(Columns)}  # what the data are comes before their columns
    for entry in sorted(dataclasses.fields(section), key=lambda entry: entry.name in inherited):
        value = getattr(section, entry.name)
        if value is None and entry.default is None:
            continue
        written[entry.name] = "none" if value is None else list(value) if isinstance(value, tuple) else value
    return written


def _flat(record: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in record.items():
        flat |= {f"{name}.{key}": item for key, item in value.items()} if isinstance(value, dict) else {name: value}
    return flat


def _shown(value: Any) -> str:
    return "not given" if value is None else repr(value)
