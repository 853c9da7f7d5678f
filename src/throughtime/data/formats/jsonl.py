"""JSON lines: one sequence a line, its numbers and symbols in nested lists."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from throughtime.data import files
from throughtime.data.formats.format import Asked, Format
from throughtime.data.sequences import PER_SEQUENCE, PER_STEP, Columns, Sequences, TargetRole
from throughtime.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray

KEYS = ("x", "symbols", "id", "label", "labels", "group", "part")
"""The keys that a line may have without their being named."""

TARGETS = {PER_SEQUENCE: "label", PER_STEP: "labels"}
"""The key of the target, unless another is named."""


def read_jsonl(path: Path, asked: Asked) -> Sequences:
    """Read one sequence a line: `{"x": [[1.5, 2], ...], "symbols": [["a", "b"], ...], "label": "u"}`.

    "x" holds a list of numbers for each step, or one number each; "symbols" a list of texts, or one text each; either
    may be left out. The target, "label", is text or a whole number; one for every step is a list of them, "labels".
    `asked.columns` names other keys. The id "id" is optional: lines without one are called by their number. A group or
    part that is not named is read from "group" and "part" where lines have them. Numbers are called "x1", "x2", ...,
    symbols "symbol1", ...; `features` and `symbols` choose among them.

    Raises `DataError`, with the line, for what is not JSON, a key that is not known or is there twice, numbers that are
    not finite, lists of different widths, labels that do not fit, and an id that is there twice.
    """
    columns = replace(
        asked.columns,
        sequence_id=asked.columns.sequence_id or "id",
        target=asked.columns.target or TARGETS[asked.role],
    )
    lines: list[_Sequence] = []
    first: _Line | None = None
    keys = columns
    for number, text in files.read_lines(path, b","):
        line = _Line(path, number, _parse(path, number, text))
        if first is None:
            first = line
            keys = _keys(line, columns, asked)
        line.check_keys(first, columns, keys, asked.splitting)
        lines.append(_read(line, first, keys, asked))
    if first is None:
        raise DataError(f"{path}: is empty; one JSON object a line is needed")
    _check_ids(path, lines)
    return _chosen(_together(path, lines, keys, asked.role), columns)


@dataclass(frozen=True)
class _Line:
    """One line's record, and the means to say where it is."""

    path: Path
    number: int
    record: dict[str, Any]

    def refuse(self, problem: str) -> NoReturn:
        files.refuse_line(self.path, self.number, problem)

    def check_keys(self, first: _Line, named: Columns, keys: Columns, splitting: bool) -> None:
        """Refuse a key that nothing reads, and one that only this line has or lacks."""
        known = {*KEYS, *named.roles()}
        strange = next((key for key in self.record if key not in known), None)
        if strange is not None:
            self.refuse(f"the key {strange!r} has no meaning here; remove it (known are {', '.join(sorted(known))})")
        for key in ("x", "symbols", *keys.roles(), *(("group", "part") if splitting else ())):
            if (key in self.record) != (key in first.record):
                has, lacks = ("has", "lacks") if key in self.record else ("lacks", "has")
                self.refuse(f"{has} the key {key!r}, and line {first.number} {lacks} it; write all lines alike")

    def text(self, key: str, value: object, like: object) -> str:
        """A label or a name: text or a whole number, of the same kind as in the first line."""
        if isinstance(value, bool) or not isinstance(value, str | int):
            self.refuse(f"{key!r} holds {_shown(value)}; give text or a whole number")
        if value == "":
            self.refuse(f"{key!r} holds an empty text; fill it or remove the line")
        if isinstance(value, str) != isinstance(like, str):
            self.refuse(
                f"{key!r} holds {_shown(value)}, and {_shown(like)} before; write all as text or all as numbers"
            )
        return str(value)


@dataclass(frozen=True)
class _Sequence:
    """What one line holds."""

    line: int
    id: str
    steps: NDArray[np.float64]
    symbols: tuple[tuple[str, ...], ...]
    labels: tuple[str, ...]
    group: str
    part: str


def _parse(path: Path, number: int, text: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        record = dict(pairs)
        if len(record) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            files.refuse_line(path, number, f"has the key {twice!r} twice; keep one")
        return record

    try:
        record = json.loads(text, object_pairs_hook=unique)
    except DataError:
        raise
    except (ValueError, RecursionError) as error:
        files.refuse_line(path, number, f"is not JSON ({files.first_line(error)}); write one whole object a line")
    if not isinstance(record, dict):
        files.refuse_line(path, number, f"is {_shown(record)}, not a JSON object; write {{'x': ..., 'label': ...}}")
    if "\\u" in text and any("\ud800" <= character <= "\udfff" for character in json.dumps(record, ensure_ascii=False)):
        files.refuse_line(path, number, "holds half a surrogate pair (\\ud800 to \\udfff), which is no text; mend it")
    return record


def _keys(first: _Line, columns: Columns, asked: Asked) -> Columns:
    """The keys to read, by what is asked for and by what the first line has."""
    wanted = columns.without(labels=not asked.labelled, splitting=not asked.splitting)
    if asked.splitting:
        wanted = replace(
            wanted,
            group=wanted.group or ("group" if "group" in first.record else None),
            part=wanted.part or ("part" if "part" in first.record else None),
        )
    wanted = replace(wanted, features=(), symbols=())
    name = None if wanted.sequence_id == "id" else wanted.sequence_id
    for role, key in (("id", name), ("target", wanted.target), ("group", wanted.group), ("part", wanted.part)):
        if key is not None and key not in first.record:
            hint = ""
            if role == "target":
                others = [(each, name) for each, name in TARGETS.items() if name != key and name in first.record]
                hint = "".join(f"; it has {name!r}{asked.way(each)}" for each, name in others)
            first.refuse(f"lacks the {role} {key!r}; add it to every line, or name the key that holds it{hint}")
    if "x" not in first.record and "symbols" not in first.record:
        first.refuse("has neither 'x' nor 'symbols'; give numbers or texts for each step")
    return wanted


def _read(line: _Line, first: _Line, keys: Columns, asked: Asked) -> _Sequence:
    record = line.record
    steps = _numbers(line, record["x"]) if "x" in record else None
    symbols = _symbols(line, record["symbols"]) if "symbols" in record else ()
    if steps is None:
        steps = np.empty((len(symbols), 0))
    elif symbols and len(symbols) != len(steps):
        line.refuse(f"'x' has {len(steps)} steps and 'symbols' {len(symbols)}; give both for each step")

    def text(key: str | None) -> str:
        return "" if key is None else line.text(key, record[key], first.record[key])

    return _Sequence(
        line=line.number,
        id=text(keys.sequence_id) if keys.sequence_id in record else str(line.number),
        steps=steps,
        symbols=symbols,
        labels=_labels(line, first, keys.target, asked, len(steps)),
        group=text(keys.group),
        part=text(keys.part),
    )


def _labels(line: _Line, first: _Line, target: str | None, asked: Asked, length: int) -> tuple[str, ...]:
    if target is None:
        return ()
    value, like = line.record[target], first.record[target]
    if not asked.role.by_step:
        if isinstance(value, list):
            line.refuse(f"{target!r} is a list; give one label, or ask for one at every step{asked.way(PER_STEP)}")
        return (line.text(target, value, like),)
    if not isinstance(value, list) or len(value) != length:
        found = f"has {len(value)} labels" if isinstance(value, list) else f"is {_shown(value)}"
        line.refuse(f"{target!r} {found}, and the sequence {length} steps; give a list with a label for each step")
    return tuple(line.text(target, label, like[0]) for label in value)


def _numbers(line: _Line, cells: object) -> NDArray[np.float64]:
    """The numbers of a sequence: [length, features]."""
    if not isinstance(cells, list) or not cells:
        line.refuse(f"'x' is {_shown(cells)}; give a list with a step or more")
    try:
        found = np.array(cells)
        if found.ndim > 2 or found.dtype.kind not in "iufb" or not found.size:
            _refuse_numbers(line, cells)
        values = found.astype(np.float64)
    except (ValueError, OverflowError):
        _refuse_numbers(line, cells)
    if not np.isfinite(values).all():
        _refuse_numbers(line, cells)
    return values.reshape(len(cells), -1)


def _refuse_numbers(line: _Line, cells: list[Any]) -> NoReturn:
    """Say which step numpy could not take as finite numbers, all of one width."""
    for place, step in enumerate(cells, 1):
        values = step if isinstance(step, list) else [step]
        for value in values:
            if isinstance(value, str):
                line.refuse(f"step {place} of 'x' holds the text {value!r}; give numbers, and text under 'symbols'")
            if not isinstance(value, int | float):
                line.refuse(f"step {place} of 'x' holds {_shown(value)}, not a number; mend it or remove the step")
            if not abs(value) < float("inf"):
                line.refuse(f"step {place} of 'x' holds {_shown(value)}; replace it or remove the step")
        if not values:
            line.refuse(f"step {place} of 'x' is empty; give it numbers, or leave 'x' out")
        if np.shape(step) != np.shape(cells[0]):
            line.refuse(f"step {place} of 'x' has {_width(step)} where step 1 has {_width(cells[0])}; make them alike")
    line.refuse("'x' holds a whole number beyond 64 bits; write it as a decimal number")


def _symbols(line: _Line, cells: object) -> tuple[tuple[str, ...], ...]:
    """The symbols of a sequence: length x columns of text."""
    if not isinstance(cells, list) or not cells:
        line.refuse(f"'symbols' is {_shown(cells)}; give a list with a step or more")
    steps = tuple(tuple(step) if isinstance(step, list) else (step,) for step in cells)
    for place, step in enumerate(steps, 1):
        wrong = [text for text in step if not isinstance(text, str) or not text]
        if wrong or not step:
            line.refuse(f"step {place} of 'symbols' holds {_shown([*wrong, []][0])}; give text that is not empty")
        if len(step) != len(steps[0]):
            line.refuse(f"step {place} of 'symbols' has {len(step)} texts where step 1 has {len(steps[0])}")
    return tuple(tuple(map(sys.intern, step)) for step in steps)  # equal texts are one object: they are many


def _check_ids(path: Path, lines: list[_Sequence]) -> None:
    """Refuse an id, and a width, that differs between lines where it must not."""
    seen: dict[str, int] = {}
    for line in lines:
        if line.id in seen:
            files.refuse_line(
                path,
                line.line,
                f"the id {line.id!r} again, after line {seen[line.id]}; give each line an id of its own",
            )
        seen[line.id] = line.line
        for key, width, expected in (
            ("x", line.steps.shape[1], lines[0].steps.shape[1]),
            ("symbols", len(line.symbols[0]) if line.symbols else 0, len(lines[0].symbols[0]) if line.symbols else 0),
        ):
            if width != expected:
                files.refuse_line(
                    path,
                    line.line,
                    f"a step of {key!r} has {width} values where line {lines[0].line} has {expected}; make them alike",
                )


def _together(path: Path, lines: list[_Sequence], keys: Columns, role: TargetRole) -> Sequences:
    labels = tuple(line.labels for line in lines) if keys.target is not None else ()
    count = len(lines[0].symbols[0]) if lines[0].symbols else 0
    return Sequences(
        name=path.name.split(".")[0],
        source=str(path),
        columns=keys,
        features=tuple(f"x{place + 1}" for place in range(lines[0].steps.shape[1])),
        ids=tuple(line.id for line in lines),
        steps=tuple(line.steps for line in lines),
        labels=labels if role.by_step else tuple(label for (label,) in labels),
        groups=tuple(line.group for line in lines) if keys.group else None,
        parts=tuple(line.part for line in lines) if keys.part else None,
        role=role,
        symbols=tuple(line.symbols for line in lines) if count else (),
        symbol_columns=tuple(f"symbol{place + 1}" for place in range(count)),
    )


def _chosen(sequences: Sequences, columns: Columns) -> Sequences:
    """The features and the symbols that `columns` names, all where it names none."""
    features = columns.features or sequences.features
    symbols = columns.symbols or sequences.symbol_columns
    for name, known in [(name, sequences.features) for name in features] + [
        (name, sequences.symbol_columns) for name in symbols
    ]:
        if name not in known:
            has = ", ".join(known) or "none"
            raise DataError(f"{sequences.source}: no column {name!r}; the columns are {has}")
    if features == sequences.features and symbols == sequences.symbol_columns:
        return sequences
    places = [sequences.features.index(name) for name in features]
    chosen = [sequences.symbol_columns.index(name) for name in symbols]
    return replace(
        sequences,
        features=features,
        steps=tuple(steps[:, places] for steps in sequences.steps),
        symbols=tuple(tuple(tuple(step[i] for i in chosen) for step in steps) for steps in sequences.symbols),
        symbol_columns=symbols,
    )


def _width(step: object) -> str:
    return f"{len(step)} values" if isinstance(step, list) else "one number without a list"


def _shown(value: object, most: int = 40) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= most else f"{text[:most]}..."


FORMAT = Format(
    name="JSON lines",
    suffixes=(".jsonl",),
    layout="a sequence a line",
    options=frozenset({"sequence_id", "target", "features", "symbols", "group", "part"}),
    read=read_jsonl,
    names_columns=False,
)
