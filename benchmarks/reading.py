"""A million steps in every format: seconds to read and to encode, and memory beside what a refusal would estimate.

    .venv/bin/python benchmarks/reading.py        writes benchmarks/results/reading.md

Each file is read in a process of its own. Processor seconds do not depend on what else the machine does.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from throughtime.data import files
from throughtime.data.sequences import Columns
from throughtime.tasks.encoding import encode
from throughtime.tasks.table import DEFAULT, TASKS, read

TABLE = {"sequence_id": "id", "target": "y", "time": "t"}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "numbers.csv": ("12 features, sequences of 100 steps", TABLE),
    "numbers.parquet": ("the same", TABLE),
    "numbers.jsonl": ("the same", {}),
    "words.csv": ("2 columns of symbols, a label for each row", {**TABLE, "task": "tag", "symbols": ("w", "p")}),
    "words.conll": ("the same, sentences of 25", {"task": "tag"}),
    "words.txt": ("sequences of 100 words", {}),
}
RESULT = Path(__file__).parent / "results" / "reading.md"


def write_files(folder: Path, rows: int) -> None:
    """The same steps in every format."""
    random = np.random.default_rng(0)
    sequences = rows // 100
    classes = np.char.add("c", (np.arange(sequences) % 5).astype(str))
    steps = pd.DataFrame({"id": np.repeat(np.arange(sequences), 100), "t": np.tile(np.arange(100), sequences)})
    values = random.normal(size=(rows, 12)).round(6)
    numbers = steps.assign(y=np.repeat(classes, 100), **{f"f{i}": values[:, i] for i in range(12)})
    numbers.to_csv(folder / "numbers.csv", index=False)
    numbers.to_parquet(folder / "numbers.parquet")
    with (folder / "numbers.jsonl").open("w") as file:
        for i, label in enumerate(classes.tolist()):
            file.write(json.dumps({"x": values[i * 100 : (i + 1) * 100].tolist(), "label": label}) + "\n")
    words = np.char.add("w", random.zipf(1.3, size=rows).clip(max=50_000).astype(str))
    tags = np.array(["B", "I", "O"])[random.integers(0, 3, rows)]
    steps.assign(w=words, p=tags, y=tags).to_csv(folder / "words.csv", index=False)
    with (folder / "words.conll").open("w") as file:
        for i, (word, tag) in enumerate(zip(words.tolist(), tags.tolist(), strict=True), 1):
            file.write(f"{word} {tag} {tag}\n" + "\n" * (i % 25 == 0))
    with (folder / "words.txt").open("w") as file:
        for i, label in enumerate(classes.tolist()):
            file.write(f"{label}\t{' '.join(words[i * 100 : (i + 1) * 100])}\n")


def measure(path: Path) -> dict[str, float]:
    """Read and encode one file, here: seconds and bytes."""
    import pyarrow.parquet  # noqa: F401 - what is loaded once is no part of reading
    import sklearn.model_selection  # noqa: F401

    estimates: list[float] = []
    check = files.check_fits

    def noting(path: Path, size: float, cells: float) -> None:
        estimates.append(2 * size + files.BYTES_PER_CELL * cells)
        check(path, size, cells)

    files.check_fits = noting
    before = _peak()
    started = time.process_time()
    columns: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in CASES[path.name][1].items()
    }
    task = TASKS[columns.pop("task", DEFAULT)]
    sequences = read(str(path), Columns(**columns), task=task)
    reading = time.process_time() - started
    encode(task, sequences)
    return {
        "size": path.stat().st_size,
        "read": reading,
        "encode": time.process_time() - started - reading,
        "memory": _peak() - before,
        "estimate": estimates[-1],
    }


def _peak() -> int:
    """The most memory that this process has had. Not getrusage, which begins with what its parent had."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024


def as_markdown(rows: int, results: dict[str, dict[str, float]]) -> str:
    """The table that is kept."""
    lines = [
        f"# Reading {rows:,} steps",
        "",
        f"`python benchmarks/reading.py`, Python {platform.python_version()}, pandas {pd.__version__}. Seconds are the"
        " processor's; memory is the highest growth of the process over both; a file is refused where the estimate is"
        " more than is free.",
        "",
        "| file | holds | MB | read, s | split and encode, s | memory, MB | estimate, MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, found in results.items():
        cells = [
            name,
            CASES[name][0],
            f"{found['size'] / 1e6:.0f}",
            f"{found['read']:.1f}",
            f"{found['encode']:.1f}",
            f"{found['memory'] / 1e6:.0f}",
            f"{found['estimate'] / 1e6:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure every format and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000, help="steps in each file, a multiple of 500")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        print(json.dumps(measure(asked.one)))
        return
    with tempfile.TemporaryDirectory() as folder:
        write_files(Path(folder), asked.rows)
        results = {}
        for name in CASES:
            command = [sys.executable, __file__, "--one", str(Path(folder) / name)]
            results[name] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    asked.out.write_text(as_markdown(asked.rows, results), encoding="utf-8")
    print(asked.out.read_text(encoding="utf-8"), end="")


if __name__ == "__main__":
    main()
