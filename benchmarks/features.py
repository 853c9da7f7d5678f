"""Every feature of PyTorch that a module can meet, tried on throughtime's, and what happens: a table.

    python benchmarks/features.py                     # prints the table of docs/interop.md, after trying every row
    python benchmarks/features.py --write             # writes it there
    python benchmarks/features.py --quick             # without the rows that take long, which need a C++ compiler too
    python benchmarks/features.py --only checkpoint   # rows whose names contain a word

The rows are the functions of `features_models.py`, `features_gradients.py`, `features_programs.py` and
`features_tensors.py`. Each is run on the modules of `feature_cases.KINDS` in a process of its own, so that one that
crashes is a row which says so. What raises is tried on torch's own module too, and the row says which of them refuses.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from feature_cases import KINDS, Case, Row
from features_gradients import AUTOGRAD, DERIVATIVES
from features_models import AROUND, COPIES, SPREAD, processes
from features_programs import PROGRAMS
from features_tensors import MODES, TENSORS

from throughtime.errors import ThroughtimeError

DOCUMENT = Path(__file__).parent.parent / "docs" / "interop.md"
BEGIN, END = "<!-- made by benchmarks/features.py -->\n", "<!-- end of what it made -->\n"
PARTS = (COPIES, AROUND, DERIVATIVES, AUTOGRAD, PROGRAMS, SPREAD, TENSORS, MODES)
BAD = ("WRONG", "FAILS", "CRASHES", "HANGS")
"""How an outcome begins that is a mistake of somebody's, and not an answer."""

SECONDS = 240
"""What a row may take on one group of modules."""


def tried(row: Row, name: str) -> str:
    """What a row says of one kind of module; what it raises, beside what torch's own module does."""
    try:
        return row.run(Case(name))
    except ThroughtimeError as error:
        return f"refused: {_line(error)}"
    except Exception as error:
        kind, line = type(error).__name__, _line(error)
        try:
            theirs = row.run(Case(name, torchs=True))
        except Exception as other:
            if type(other) is type(error):
                return f"refused, as torch's own is ({kind}: {line})"
            theirs = f"raises {type(other).__name__}"
        return f"FAILS: {kind}: {line} (torch's own: {theirs})"


def _line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else "without a word"


def _try_all(pipe: Any, part: int, place: int, names: list[str], loud: bool) -> None:
    """In a process of its own: a row on one kind after the other, each answer sent as soon as it is there."""
    if not loud:  # exporters and compilers talk
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
    warnings.simplefilter("ignore")
    for name in names:
        pipe.send(tried(PARTS[part][place], name))
    pipe.close()


def outcomes(part: int, place: int, loud: bool = False) -> dict[str, str]:
    """What a row says of each kind of module that it is for."""
    row = PARTS[part][place]
    wanted = [n for n, kind in KINDS.items() if row.only is None or (row.only == "layers") == (kind.group != "cells")]
    found: dict[str, str] = {}
    for group in dict.fromkeys(KINDS[name].group for name in wanted):
        names = [name for name in wanted if KINDS[name].group == group]
        while rest := [name for name in names if name not in found]:
            answers, end = _in_a_process(part, place, rest, loud)
            found.update(zip(rest, answers, strict=False))
            if len(answers) < len(rest):
                found[rest[len(answers)]] = end
    return {name: found[name] for name in wanted}


def _in_a_process(part: int, place: int, names: list[str], loud: bool) -> tuple[list[str], str]:
    """The answers that came, and how the process ended."""
    here, there = processes().Pipe(duplex=False)
    child = processes().Process(target=_try_all, args=(there, part, place, names, loud))
    child.start()
    there.close()
    answers: list[str] = []
    try:
        while len(answers) < len(names) and here.poll(SECONDS):
            answers.append(here.recv())
    except EOFError:
        child.join()
        code = int(child.exitcode or 0)
        ended = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return answers, f"CRASHES: {ended}"
    finally:
        if len(answers) == len(names):
            child.join()
        elif child.is_alive():
            child.kill()
    return answers, f"HANGS: no answer in {SECONDS} seconds"


# ---------------------------------------------------------------------------------------------------------------------
# in words


def joined(found: dict[str, str]) -> str:
    """The answers for the kinds of modules as one text; what is the same for many is said once.

    "layers" are `Recurrent` and the drop-ins.
    """
    by_words: dict[str, list[str]] = {}
    for name, words in found.items():
        by_words.setdefault(words, []).append(name)
    if len(by_words) == 1:
        return next(iter(by_words))
    return "; ".join(f"{', '.join(_called(names, list(found)))}: {words}" for words, names in by_words.items())


def _called(names: list[str], everything: list[str]) -> Iterator[str]:
    """A set of kinds by the names of its groups where it has all of a group."""
    rest = list(names)
    groups: dict[str, list[str]] = {"layers": [name for name in everything if KINDS[name].group != "cells"]}
    for name in everything:
        groups.setdefault(KINDS[name].group, []).append(name)
    for group, members in groups.items():
        if members and all(name in rest for name in members) and len(members) < len(everything):
            yield group
            rest = [name for name in rest if name not in members]
    yield from (f"`{name}`" for name in rest)


def tables(rows: dict[tuple[int, int], str]) -> str:
    """The rows as Markdown, a table for each part."""
    lines = [BEGIN.removesuffix("\n")]
    for number, part in enumerate(PARTS):
        mine = [
            (row.feature, rows[number, place].replace("|", "\\|"))
            for place, row in enumerate(part)
            if (number, place) in rows
        ]
        if mine:
            lines += ["", f"| {part.title} | what happens |", "|---|---|"]
            lines += [f"| {feature} | {words} |" for feature, words in mine]
    return "\n".join([*lines, "", END])


def in_document(text: str) -> tuple[str, str, str]:
    """A document before the table, the table, and after it. Raises ValueError if the marks are not there."""
    before, first, rest = text.partition(BEGIN)
    made, last, after = rest.partition(END)
    if not first or not last:
        raise ValueError(f"the document has no {BEGIN.strip()} ... {END.strip()}")
    return before, first + made + last, after


def main(arguments: list[str] | None = None) -> None:
    """Try the rows that are asked for and print the table, or write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the table into docs/interop.md; tries every row")
    parser.add_argument("--quick", action="store_true", help="without the rows that take long")
    parser.add_argument("--only", help="rows whose names contain this")
    parser.add_argument("--loud", action="store_true", help="with what exporters and compilers print")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="processes at once")
    options = parser.parse_args(arguments)
    if options.write and (options.quick or options.only):
        parser.error("--write needs every row; leave --quick and --only out")
    wanted = [
        (number, place)
        for number, part in enumerate(PARTS)
        for place, row in enumerate(part)
        if not (options.quick and row.slow) and (not options.only or options.only.lower() in row.feature.lower())
    ]
    with ThreadPoolExecutor(options.jobs) as pool:
        found = pool.map(lambda where: joined(outcomes(where[0], where[1], loud=options.loud)), wanted)
        rows = dict(zip(wanted, found, strict=True))
    made = tables(rows)
    if options.write:
        before, _, after = in_document(DOCUMENT.read_text(encoding="utf-8"))
        DOCUMENT.write_text(before + made + after, encoding="utf-8")
    else:
        print(made)
    bad = [line for line in made.splitlines() if any(word in line for word in BAD)]
    print(f"{len(rows)} rows, {len(bad)} of them bad", file=sys.stderr)


if __name__ == "__main__":
    if "forkserver" in multiprocessing.get_all_start_methods():
        # every row is forked from a process that has imported all of this and computed nothing
        processes().set_forkserver_preload(["features", "torch._dynamo", "torch.onnx"])
    main()
