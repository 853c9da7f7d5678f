"""The report as a file: whole, self-contained, the same for the same numbers, and never over another."""

import errno
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from throughtime.errors import ThroughtimeError
from throughtime.insight.reach import Reach
from throughtime.insight.report import (
    Page,
    Picture,
    Table,
    draw_accuracy,
    draw_confusion,
    draw_curves,
    draw_reach,
    render,
    save,
    unused_path,
)

DRAW = {
    "accuracy": lambda: draw_accuracy({"A": [0.9, 0.95], "B": [0.5]}, baseline=0.45),
    "curves": lambda: draw_curves({"A": np.array([[3.0, 1.0, 0.1]]), "B": np.ones((2, 3))}, "loss", log=True),
    "reach": lambda: draw_reach({"A": (decay(0.5), decay(0.9)), "B": (decay(0.7), decay(1.1))}, {"longest": 9}),
    "confusion": lambda: draw_confusion(np.array([[9, 1, 0], [0, 0, 0], [2, 3, 5]]), ["a", "b", "c<&>"]),
}


def decay(rate: float) -> Reach:
    return Reach.of(rate ** np.arange(10.0)[:, None])


def page() -> Page:
    pictures = [Picture(name, draw(), f"caption of {name}", f"describes {name}") for name, draw in DRAW.items()]
    table = Table(("cell", "value"), (("A", "1"), ("<b>B</b>", "2")))
    return Page(
        "title", "A <i>wins</i>", ["first", "second"], table, pictures, {"command": "throughtime"}, ["a notice"]
    )


class Elements(HTMLParser):
    """Collects every start tag with its attributes."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_the_same_numbers_give_the_same_page() -> None:
    assert render(page()) == render(page())


def test_ids_are_unique_and_every_reference_inside_the_page_is_met() -> None:
    html = render(page())
    ids = [attributes["id"] for _, attributes in Elements(html).found if "id" in attributes]
    assert len(ids) == len(set(ids)) > 20
    references = re.findall(r'(?:url\(|href=")#([^)"]+)', html)
    assert references
    assert set(references) <= set(ids)


def test_nothing_runs_and_nothing_is_fetched() -> None:
    html = render(page())
    for tag, attributes in Elements(html).found:
        assert tag not in ("script", "img", "link", "iframe", "object", "image")
        assert not [name for name in attributes if name.startswith("on")]
        assert (attributes.get("href") or attributes.get("xlink:href") or "#").startswith("#")
        assert "src" not in attributes
    assert "@import" not in html
    assert not re.search(r"url\((?!#)", html)


def test_every_picture_is_described_and_keeps_its_proportions() -> None:
    pictures = [attributes for tag, attributes in Elements(render(page())).found if tag == "svg"]
    assert [attributes["aria-label"] for attributes in pictures] == [f"describes {name}" for name in DRAW]
    for attributes in pictures:
        assert attributes["viewbox"]
        assert not {"width", "height"} & set(attributes)


def test_texts_are_escaped() -> None:
    html = render(page())
    assert "A &lt;i&gt;wins&lt;/i&gt;" in html
    assert "&lt;b&gt;B&lt;/b&gt;" in html
    assert "c&lt;&amp;&gt;" in html


@pytest.mark.parametrize("labels", [["x"] * 40, ["a rather long name of a class"] * 9])
def test_many_and_long_labels_are_drawn_without_a_warning(labels: list[str]) -> None:
    assert "<svg" in draw_confusion(np.eye(len(labels), dtype=np.int64), labels)


def test_extreme_numbers_are_drawn_without_a_warning() -> None:
    nothing = Reach.of(np.zeros((5, 2)))
    assert "<svg" in draw_reach({"A": (nothing, decay(0.5))}, {"longest": 4})
    assert "<svg" in draw_curves({"A": np.array([[0.0, 0.0]])}, "loss", log=True)
    assert "<svg" in draw_accuracy({"A": [1.0], "B": [0.0]}, baseline=0.0)


def test_drawing_leaves_matplotlibs_settings_alone() -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    DRAW["accuracy"]()
    assert dict(matplotlib.rcParams) == before


def test_a_failed_write_leaves_what_was_there_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ThroughtimeError, match=r"report\.html: cannot be written \(No space left on device\)"):
        save("new", path)
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]
    assert path.read_text() == "old"


def test_a_report_never_takes_the_place_of_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for expected in ("r.html", "r-2.html", "r-3.html"):
        path = unused_path(None, "r.html")
        assert path.name == expected
        save("", path)
    with pytest.raises(ThroughtimeError, match=r"r\.html: exists already"):
        unused_path(Path("r.html"), "r.html")
    with pytest.raises(ThroughtimeError, match="no such directory"):
        unused_path(Path("absent/r.html"), "r.html")
    assert unused_path(Path("new.html"), "r.html") == Path("new.html")
