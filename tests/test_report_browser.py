"""The report as a browser shows it: pictures drawn, nothing fetched, nothing wider than a desk's or a hand's screen."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from throughtime.insight.report import render, save
from throughtime.tasks import findings
from throughtime.tasks.compare import compare
from throughtime.tasks.encoding import encode
from throughtime.tasks.reading import Columns, Sequences
from throughtime.tasks.training import Recipe

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
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
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
    comparison = compare(encode(sequences), hidden_size=4, recipe=Recipe(epochs=3), seeds=2)
    path = tmp_path_factory.mktemp("report") / "report.html"
    save(render(findings.page(comparison, "throughtime compare " + "--an-option " * 30)), path)
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


@pytest.mark.parametrize("width", [1280, 390])
def test_the_report_is_drawn_fits_and_fetches_nothing(browser: webdriver.Chrome, report: Path, width: int) -> None:
    # A headless window has a least width of its own, so the screen is set by its metrics.
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.get(report.as_uri())

    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert browser.execute_script("return innerWidth") == width
    pictures = browser.execute_script(
        """return [...document.querySelectorAll("svg")].map(svg => {
            const box = svg.getBoundingClientRect();
            const drawn = [...svg.querySelectorAll("path, use")].filter(path => path.getBoundingClientRect().width > 0);
            return [box.left, box.right, box.height, drawn.length];
        })"""
    )
    assert len(pictures) == 4
    for left, right, height, paths in pictures:
        assert 0 <= left < right <= width
        assert right - left > 250
        assert height > 150
        assert paths > 10
    assert browser.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)") == []
    assert browser.get_log("browser") == []
