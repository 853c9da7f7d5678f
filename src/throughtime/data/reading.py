"""Files and shipped data read as labelled sequences, each format in its own way; or refused, with the way out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import get_args

from throughtime.data import files
from throughtime.data.formats.conll import read_conll
from throughtime.data.formats.jsonl import read_jsonl
from throughtime.data.formats.long_tables import read_sequences
from throughtime.data.formats.text_lines import read_text_lines
from throughtime.data.packaged import SHIPPED, file_of
from throughtime.data.sequences import Columns, Sequences, Task
from throughtime.errors import DataError

__all__ = ["FORMATS", "SHIPPED", "Columns", "Sequences", "read", "read_sequences", "read_shipped"]

FORMATS = {
    ".csv": "table",
    ".parquet": "table",
    ".pq": "table",
    ".jsonl": "lines",
    ".txt": "text",
    ".tsv": "text",
    ".conll": "columns",
}
"""How a file is read, by its suffix; each may be followed by `.gz`, but for Parquet."""

OPTIONS = {
    "table": {"sequence_id", "target", "time", "features", "symbols", "group", "part"},
    "lines": {"sequence_id", "target", "features", "symbols", "group", "part"},
    "text": {"text"},
    "columns": {"target", "features", "symbols"},
}
"""The options of `read` that each format knows."""

KINDS = {"table": "a long table", "lines": "JSON lines", "text": "lines of text", "columns": "CoNLL columns"}


def read(
    data: str,
    *,
    task: Task = "classify",
    sequence_id: str | None = None,
    target: str | None = None,
    time: str | None = None,
    features: Sequence[str] = (),
    symbols: Sequence[str] = (),
    group: str | None = None,
    part: str | None = None,
    text: str | None = None,
    labelled: bool = True,
    splitting: bool = True,
) -> Sequences:
    """Read a data set that ships here, by its name, or else a file, in the way that its suffix says (`FORMATS`).

    Tables (`long_tables`) need the names of their columns; JSON lines (`jsonl`) and CoNLL columns (`conll`) have
    defaults; lines of text (`text_lines`) are read as `text="words"` or "letters". `features` are numbers, `symbols`
    are text; not named, every other column is a feature. `labelled=False` reads no labels, so that a file to predict
    need not have any; `splitting=False` leaves the group and the part out, for a model that is in use. Options that a
    format does not have are refused.
    """
    if task not in get_args(Task):
        raise DataError(f"the task is {task!r}; it is 'classify' or 'tag'")
    options = {
        "sequence_id": sequence_id,
        "target": target,
        "time": time,
        "features": tuple(features),
        "symbols": tuple(symbols),
        "group": group,
        "part": part,
        "text": text,
    }
    given = {name for name, value in options.items() if value}
    if data in SHIPPED:
        if given:
            raise DataError(f"{data} ships here and its columns are known; leave the options that name columns out")
        return read_shipped(data, task=task, labelled=labelled, splitting=splitting)
    path = Path(data)
    way = _way(path, task, given)
    if way == "text":
        return read_text_lines(path, text=text or "words", labelled=labelled)
    if way == "columns":
        return read_conll(path, target=target, features=tuple(features), symbols=tuple(symbols), labelled=labelled)
    if way == "lines":
        sequence_id, target = sequence_id or "id", target or ("label" if task == "classify" else "labels")
    if not sequence_id or (labelled and not target):
        kind = "class" if task == "classify" else "label of each row"
        raise DataError(f"{data}: say which columns hold the sequence's id and the {kind}: --sequence-id and --target")
    columns = Columns(sequence_id, target, time, tuple(features) or None, group, part, tuple(symbols))
    reader = read_jsonl if way == "lines" else read_sequences
    return reader(path, columns, task=task, labelled=labelled, splitting=splitting)


def read_shipped(name: str, *, task: Task = "classify", labelled: bool = True, splitting: bool = True) -> Sequences:
    """Read a data set that comes with the package, with its credit for a source."""
    shipped = SHIPPED[name]
    if task != "classify":
        raise DataError(
            f"{name} has one label for each sequence, so it is to classify, not to {task}; leave --task out"
        )
    with resources.as_file(file_of(name)) as path:
        read = read_sequences(path, shipped.columns, labelled=labelled, splitting=splitting)
    return replace(read, name=name, source=shipped.credit)


def _way(path: Path, task: Task, given: set[str]) -> str:
    """How to read a file; refused where there is none, and where the task or an option does not go with its format."""
    if not path.exists():
        raise DataError(f"{path}: no such file; give a data file, or a data set that ships here ({', '.join(SHIPPED)})")
    files.require(path)
    suffix = files.kind(path)
    if suffix not in FORMATS:
        raise DataError(
            f"{path}: its name does not say how to read it; end it in .csv or .parquet (a row for each step), .jsonl (a"
            " sequence a line), .txt (label, tab, text) or .conll (a token a line)"
        )
    way = FORMATS[suffix]
    strange = sorted(given - OPTIONS[way])
    if strange:
        raise DataError(f"{path}: --{strange[0].replace('_', '-')} means nothing for {KINDS[way]}; leave it out")
    if way == "text" and task == "tag":
        raise DataError(f"{path}: lines of text have one label each, so they are to classify; to tag, write .conll")
    if way == "columns" and task == "classify":
        raise DataError(f"{path}: CoNLL columns have a label for each token, so they are to tag (--task tag)")
    return way
