"""Numbers to one self-contained HTML page: nothing is fetched, nothing runs, and pictures are inline SVG."""

from __future__ import annotations

import itertools
import os
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from throughtime.errors import ThroughtimeError

SVG = "http://www.w3.org/2000/svg"
XLINK = "http://www.w3.org/1999/xlink"


@dataclass(frozen=True)
class Table:
    """A table of texts, right down to the digits shown, and a note that says what they are.

    The last `baselines` rows are what the others are measured against, and not of their kind.
    """

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    baselines: int = 0


@dataclass(frozen=True)
class Picture:
    """An inline SVG with a title, a caption below it and a description for those who cannot see it."""

    title: str
    svg: str
    caption: str
    description: str


@dataclass(frozen=True)
class Chapter:
    """A part of a page: what it says in words, a table, pictures; any of them may be missing."""

    title: str
    words: Sequence[str] = ()
    table: Table | None = None
    pictures: Sequence[Picture] = ()


@dataclass(frozen=True)
class Remedy:
    """Something to do: its name, the numbers that ask for it, and the lines of code that do it."""

    name: str
    why: str
    call: str


@dataclass(frozen=True)
class Page:
    """A report: the verdict first, then what it rests on, what to do about it, the chapters, and how it was run."""

    title: str
    verdict: str
    findings: Sequence[str]
    chapters: Sequence[Chapter]
    facts: Mapping[str, str]
    notices: Sequence[str] = ()
    remedies: Sequence[Remedy] = ()


def render(page: Page) -> str:
    """The page as one HTML document."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("throughtime.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    numbers = itertools.count(1)

    def drawn(picture: Picture) -> Markup:
        return Markup(_embed(picture.svg, f"picture{next(numbers)}-", picture.description))

    return environment.get_template("page.html").render(page=page, drawn=drawn)


def save(html: str, path: Path) -> None:
    """Write the page whole or not at all: a reader never sees half of it, and a failure leaves nothing behind."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        partial.write_text(html, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise ThroughtimeError(f"{path}: cannot be written ({error.strerror}); choose another place") from error
    finally:
        partial.unlink(missing_ok=True)


def unused_path(asked: Path | None, default: str) -> Path:
    """Where a report may go without covering another: `asked`, or the first of default, default-2, ... that is free.

    Raises ThroughtimeError where `asked` exists, or its folder does not.
    """
    if asked is None:
        stem, suffix = os.path.splitext(default)
        names = itertools.chain([default], (f"{stem}-{number}{suffix}" for number in itertools.count(2)))
        return next(path for path in map(Path, names) if not path.exists())
    if asked.exists():
        raise ThroughtimeError(f"{asked}: exists already; choose another name for the report, or remove it first")
    if not asked.parent.is_dir():
        raise ThroughtimeError(f"{asked.parent}: no such directory to write the report in; make it first")
    return asked


def _embed(svg: str, prefix: str, description: str) -> str:
    """The SVG element for use inside HTML: as wide as its place, described, its ids unlike any other picture's."""
    ElementTree.register_namespace("", SVG)
    ElementTree.register_namespace("xlink", XLINK)
    root = ElementTree.fromstring(svg)
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.attrib |= {"role": "img", "aria-label": description}
    for child in [child for child in root if child.tag == f"{{{SVG}}}metadata"]:
        root.remove(child)
    for element in root.iter():
        for name, value in element.attrib.items():
            if name == "id":
                element.set(name, prefix + value)
            elif name == f"{{{XLINK}}}href":
                element.set(name, re.sub(r"^#", f"#{prefix}", value))
            elif "url(#" in value:
                element.set(name, value.replace("url(#", f"url(#{prefix}"))
    return ElementTree.tostring(root, encoding="unicode")
