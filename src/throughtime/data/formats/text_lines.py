"""Text lines with labels: `label TAB text`, read as sequences of words or of letters."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

import numpy as np

from throughtime.data import files
from throughtime.data.formats.format import Asked, Format
from throughtime.data.sequences import PER_SEQUENCE, Columns, Sequences
from throughtime.errors import DataError

Text = Literal["words", "letters"]
"""What a step is: what stands between white space, marks and all; or each Unicode character, spaces too."""


def read_text_lines(path: Path, asked: Asked) -> Sequences:
    """Read one sequence a line, its label before a tab; it is called by the number of its line.

    Where labels are not asked for, the lines may lack them, all or none. Raises `DataError` with the line for one
    without a tab, with two, or with nothing on either side.
    """
    text, labelled = asked.columns.text or "words", asked.labelled
    if text not in get_args(Text):
        raise DataError(f"{path}: text is {text!r}; a step is one of the 'words' or one of the 'letters'")
    ids, labels, symbols = [], [], []
    with_label = None
    known: dict[str, tuple[str]] = {}
    for number, line in files.read_lines(path, b" \n" if text == "words" else bytes(range(1, 256))):
        if with_label is None:
            with_label = labelled or "\t" in line
        label, content = _divide(path, number, line, with_label)
        ids.append(str(number))
        labels.append(label)
        steps = content.split() if text == "words" else content
        symbols.append(tuple(known.setdefault(step, (step,)) for step in steps))
    if not ids:
        raise DataError(f"{path}: is empty; one line for each sequence is needed: its label, a tab, its text")
    return Sequences(
        name=path.name.split(".")[0],
        source=str(path),
        columns=Columns("line", "label" if labelled else None, symbols=(text.removesuffix("s"),)),
        features=(),
        ids=tuple(ids),
        steps=tuple(np.empty((len(steps), 0)) for steps in symbols),
        labels=tuple(labels) if labelled else (),
        symbols=tuple(symbols),
        symbol_columns=(text.removesuffix("s"),),
    )


def _divide(path: Path, number: int, line: str, with_label: bool) -> tuple[str, str]:
    """The label (empty if there is none) and the text of a line."""
    parts = line.split("\t")
    if not with_label:
        if len(parts) > 1:
            files.refuse_line(path, number, "has a tab, and the lines before it have none; give all a label or none")
        return "", line
    if len(parts) != 2:
        what = "no tab" if len(parts) == 1 else f"{len(parts) - 1} tabs"
        hint = "" if len(parts) == 1 else " (a long table is separated by commas and ends in .csv)"
        files.refuse_line(path, number, f"has {what}; write the label, one tab and the text{hint}")
    label, content = parts[0].strip(), parts[1]
    if not label:
        files.refuse_line(path, number, "has no label before the tab; write one or remove the line")
    if not content.strip():
        files.refuse_line(path, number, "has no text after the tab; write some or remove the line")
    return label, content


FORMAT = Format(
    name="lines of text",
    suffixes=(".txt", ".tsv"),
    layout="label, tab, text",
    options=frozenset({"text"}),
    read=read_text_lines,
    roles=(PER_SEQUENCE,),
    why_not="lines of text have one label each; where every word has its own, write .conll, or ask for one",
)
