"""Data sets that come with the package; `ATTRIBUTION.md` says more about their sources and licences."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable

from throughtime.data.sequences import Columns


@dataclass(frozen=True)
class Shipped:
    """A data set that comes with the package: its file here, its columns, and whom to thank for it."""

    file: str
    columns: Columns
    credit: str


SHIPPED = {
    "vowels": Shipped(
        "japanese_vowels.csv.gz",
        Columns(sequence_id="utterance", time="frame", target="speaker", part="part"),
        "Japanese Vowels (Kudo, Toyama and Shimbo 1999; UCI, doi:10.24432/C5NS47, CC BY 4.0)",
    )
}


def file_of(name: str) -> Traversable:
    """The file of the data set of this name."""
    return resources.files("throughtime.data.packaged") / SHIPPED[name].file
