"""The report as a browser shows it: pictures drawn, nothing fetched, nothing wider than a desk's or a hand's screen."""

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from as_typed import encode

from throughtime.data.sequences import Columns, Sequences
from throughtime.equations.catalogue import GRU
from throughtime.insight.diagnosis import Diagnosis, Seen, look
from throughtime.nn import Recurrent
from throughtime.report.diagnosis_page import page
from throughtime.report.page import Remedy, render, save
from throughtime.runs import findings
from throughtime.runs.compare import compare
from throughtime.training.recipe import Recipe

if TYPE_CHECKING:
    from selenium import webdriver
else:
    webdriver = pytest.importorskip("selenium.webdriver")

CHROMIUM, DRIVER = shutil.which("chromium") or "", shutil.which("chromedriver") or ""
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="chromium and chromedriver are not installed (Debian: chromium, chromium-driver)"
)

QUIET = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small comparison with what strains a layout: long names, a long command, a notice."""
    rng = np.random.default_rng(0)
    labels = ("a-class-with-quite-a-long-name-and-no-space-in-it", "b", "c") * 8
    sequences = Sequences(
        name="small",
        source="a-folder-with-a-long-name/" * 6 + "small.csv",
        columns=Columns(sequence_id="id", target="class"),
        features=("value", "constant"),
        ids=tuple(str(i) for i in range(24)),
        steps=tuple(np.column_stack([rng.normal(size=3 + i % 4), np.ones(3 + i % 4)]) for i in range(24)),
        labels=labels,
    )
    compared = compare(encode(sequences), hidden_size=4, recipe=Recipe(epochs=3), seeds=2)
    path = tmp_path_factory.mktemp("report") / "report.html"
    save(render(findings.page(compared, "throughtime compare " + "--an-option " * 30)), path)
    return path


@pytest.fixture(scope="module")
def diagnosis(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers in both directions, so that there is much to draw, before training and with other weights after it."""
    torch.manual_seed(0)
    x = torch.randn(12, 3, 2)

    def seen() -> Seen:
        layer = Recurrent(GRU, 2, 4, num_layers=2, bidirectional=True)
        return look(layer, x, lambda output: output[0].square().sum(-1), needs=11)

    longest = " ".join(["and-a-rather-long-word-in-it"] * 30)
    remedy = Remedy("A remedy", longest, f"throughtime fit {'a-folder-with-a-long-name/' * 9}small.csv --clip 1\n" * 2)
    shown = page(Diagnosis("GRU", before=seen(), after=seen()), title="a diagnosis", facts={"command": longest})
    path = tmp_path_factory.mktemp("diagnosis") / "diagnosis.html"
    save(render(dataclasses.replace(shown, remedies=[remedy] * 3)), path)
    return path


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in (*QUIET, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(argument)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


SCREENS = pytest.mark.parametrize("width", [1280, 390])
REPORTS = pytest.mark.parametrize(("report", "drawn"), [("comparison", 4), ("diagnosis", 21)])


def show(browser: webdriver.Chrome, path: Path, width: int, media: str = "screen") -> None:
    # A headless window has a least width of its own, so the screen is set by its metrics.
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media})
    browser.get(path.as_uri())


@SCREENS
@REPORTS
def test_a_report_is_drawn_fits_and_fetches_nothing(
    browser: webdriver.Chrome, request: pytest.FixtureRequest, report: str, drawn: int, width: int
) -> None:
    show(browser, request.getfixturevalue(report), width)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert browser.execute_script("return innerWidth") == width
    pictures = browser.execute_script(
        """return [...document.querySelectorAll("svg")].map(svg => {
            const box = svg.getBoundingClientRect();
            const parts = [...svg.querySelectorAll("path, use, image")];
            const shown = parts.filter(part => part.getBoundingClientRect().width > 0);
            return [box.left, box.right, box.height, shown.length];
        })"""
    )
    assert len(pictures) == drawn
    for left, right, height, parts in pictures:
        assert 0 <= left < right <= width
        assert right - left > 250
        assert height > 100
        assert parts > 10
    assert browser.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)") == []
    assert browser.get_log("browser") == []


@SCREENS
def test_nothing_that_is_written_leaves_the_screen_or_its_picture(
    browser: webdriver.Chrome, diagnosis: Path, width: int
) -> None:
    show(browser, diagnosis, width)
    outside = browser.execute_script(
        """return [...document.querySelectorAll("h1, h2, h3, p, pre, figcaption, dd, svg text")].filter(element => {
            const box = element.getBoundingClientRect();
            const frame = element.closest("svg")?.getBoundingClientRect();
            const [left, right] = frame ? [frame.left, frame.right] : [0, innerWidth];
            const beyond = box.left < left - 1 || box.right > right + 1;
            return beyond || !frame && element.scrollWidth > element.clientWidth + 1;
        }).map(element => element.textContent)"""
    )
    assert outside == []


def test_heat_maps_are_decoded(browser: webdriver.Chrome, diagnosis: Path) -> None:
    show(browser, diagnosis, 1280)
    assert (
        browser.execute_async_script(
            """const done = arguments[0];
        Promise.all([...document.querySelectorAll("image")].map(image => image.decode().then(() => true, () => false)))
            .then(done);"""
        )
        == [True] * 4
    )


def test_on_paper_nothing_is_cut_off(browser: webdriver.Chrome, diagnosis: Path) -> None:
    paper = 700  # A4 at 96 dots an inch, less its margins
    show(browser, diagnosis, paper, media="print")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= paper
    for element in ("pre", ".scroll"):
        hidden = browser.execute_script(
            "return [...document.querySelectorAll(arguments[0])].filter(e => e.scrollWidth > e.clientWidth + 1).length",
            element,
        )
        assert hidden == 0
