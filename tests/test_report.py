"""The report as a file: whole, self-contained, the same for the same numbers, and never over another."""

import base64
import errno
import io
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from throughtime.errors import ThroughtimeError
from throughtime.report import drawing
from throughtime.report.drawing import Line
from throughtime.report.page import Chapter, Page, Picture, Remedy, Table, render, save, unused_path

BACK: Any = {"xlabel": "steps back", "ylabel": "gradient left"}
DRAW = {
    "accuracy": lambda: drawing.accuracy({"A": [0.9, 0.95], "B": [0.5]}, baseline=0.45, called="right"),
    "curves": lambda: drawing.curves({"A": np.array([[3.0, 1.0, 0.1]]), "B": np.ones((2, 3))}, "loss", log=True),
    "reach": lambda: drawing.reach([Line("A", decay(0.9), decay(0.5)), Line("B", decay(1.1))], {"longest": 9}, **BACK),
    "confusion": lambda: drawing.confusion(np.array([[9, 1, 0], [0, 0, 0], [2, 3, 5]]), ["a", "b", "c<&>"]),
    "pairs": lambda: drawing.pairs(triangle(6), "share"),
    "shares": lambda: drawing.shares({"W": np.array([0.7, 0.5, -0.2]), "U": np.array([1.0, 0, 0])}, "steps", first=0),
    "singular values": lambda: drawing.singular_values(np.array([1, 2, 4]), np.log([[2.0, 1], [3, 0.5], [5, 0.1]])),
    "exponents": lambda: drawing.exponents([Line("A", np.array([0.1, -1, -np.inf]), decay(0.5))]),
    "eigenvalues": lambda: drawing.eigenvalues({"point 1": np.array([1.2 + 0.3j, 1.2 - 0.3j, 0.1])}),
    "saturation": lambda: drawing.saturation({"r": (0.1, 0.2), "z": (0.0, 1.0)}),
    "memory": lambda: drawing.memory([Line("c by f", np.array([3.0, np.inf, 0.0, -2.0, 8.0]), decay(0.5))], needed=5),
    "training": lambda: drawing.training({"norm": np.array([2.0, 1.0, np.nan])}, "norm", log=True),
}


def decay(rate: float) -> NDArray[np.float64]:
    return rate ** np.arange(10.0)


def triangle(steps: int) -> NDArray[np.float64]:
    lags = np.subtract.outer(np.arange(steps), np.arange(steps)).astype(float)
    return np.where(lags >= 0, 0.5**lags, np.nan)


def page() -> Page:
    pictures = [Picture(name, draw(), f"caption of {name}", f"describes {name}") for name, draw in DRAW.items()]
    table = Table(("cell", "value"), (("A", "1"), ("<b>B</b>", "2")))
    return Page(
        title="title",
        verdict="A <i>wins</i>",
        findings=["first", "second"],
        chapters=[Chapter("Numbers", ["in words"], table), Chapter("Pictures", pictures=pictures)],
        facts={"command": "throughtime"},
        notices=["a notice"],
        remedies=[Remedy("Do this", "because a < b", "call(a, b)")],
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
        assert tag not in ("script", "img", "link", "iframe", "object")
        assert not [name for name in attributes if name.startswith("on")]
        held = "data:image/png;base64," if tag == "image" else "#"
        assert (attributes.get("href") or attributes.get("xlink:href") or held).startswith(held)
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
    assert "because a &lt; b" in html


def test_a_remedy_stands_before_the_chapters_with_the_code_that_does_it() -> None:
    html = render(page())
    assert html.index("A &lt;i&gt;wins") < html.index("<code>call(a, b)</code>") < html.index("<h2>Numbers</h2>")


@pytest.mark.parametrize("labels", [["x"] * 40, ["a rather long name of a class"] * 9])
def test_many_and_long_labels_are_drawn_without_a_warning(labels: list[str]) -> None:
    assert "<svg" in drawing.confusion(np.eye(len(labels), dtype=np.int64), labels)


def test_extreme_numbers_are_drawn_without_a_warning() -> None:
    nothing, huge = np.full(5, np.nan), np.logspace(0, 250, 6)
    for lines in ([Line("A", decay(0.5), nothing)], [Line("A", huge)], [Line("A", nothing)], [Line("A", np.ones(1))]):
        limits = drawing.common_limits(lines)
        assert "<svg" in drawing.reach(lines, {"longest": 4}, lost=1e-3, limits=limits, **BACK)
        assert "<svg" in drawing.reach(lines, {}, **BACK)
    assert "<svg" in drawing.curves({"A": np.array([[0.0, 0.0]])}, "loss", log=True)
    assert "<svg" in drawing.accuracy({"A": [1.0], "B": [0.0]}, baseline=0.0, called="right")
    assert "<svg" in drawing.accuracy({"A": [0.5]}, baseline=1.0, called="nearest", counted="steps")
    for norms in (
        np.zeros((3, 3)),
        np.full((3, 3), np.nan),
        np.ones((1, 1)),
        10.0 ** -np.diag(np.arange(0.0, 300, 60)),
    ):
        assert "<svg" in drawing.pairs(norms, "share")
    assert "<svg" in drawing.singular_values(np.array([1]), np.full((1, 3), -np.inf))
    assert "<svg" in drawing.singular_values(np.array([1, 900]), np.array([[1.0, 0.0], [2000.0, -2000.0]]))
    assert "<svg" in drawing.exponents([Line("A", np.full(3, -np.inf))])
    assert "<svg" in drawing.eigenvalues({"A": np.zeros(2, dtype=complex)})
    assert "<svg" in drawing.memory([Line("A", np.full(3, np.inf))], None)
    assert "<svg" in drawing.training({"A": np.full(3, np.nan)}, "norm", log=True)


def test_the_heat_map_shows_states_after_the_loss_as_nothing_and_exact_zeros_as_grey() -> None:
    norms = triangle(4)
    norms[3, 0] = 0
    pixels = heat_map_pixels(drawing.pairs(norms, "share"))
    assert pixels.shape == (4, 4, 4)
    assert (pixels[np.triu_indices(4, 1)] == 255).all(axis=-1).all()
    assert len({tuple(pixel) for pixel in pixels[3, 0:1]} & {(221, 221, 221, 255)}) == 1
    lightness = pixels[3, 1:, :3].sum(axis=-1)
    assert (np.diff(lightness.astype(int)) <= 0).all()
    assert lightness[0] > lightness[-1]


def heat_map_pixels(svg: str) -> NDArray[np.uint8]:
    """The embedded picture, [rows, columns, RGBA]."""
    from matplotlib import image

    found = re.search(r'href="data:image/png;base64,([^"]+)"', svg)
    assert found is not None
    return np.round(255 * image.imread(io.BytesIO(base64.b64decode(found.group(1))), format="png")).astype(np.uint8)


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
