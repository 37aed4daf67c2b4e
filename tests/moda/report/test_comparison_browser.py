"""The page of `moda compare` as people see it: at 400, 800 and 1400 pixels, light, dark and on paper."""

from __future__ import annotations

from pathlib import Path

import pytest

from moda.report.comparison import comparison_page
from moda.study.comparison import MethodFigures, SizeFigures
from tests.moda._helpers.browser import OFF_SCREEN, SHADOWS, Browser, why_no_browser

if (reason := why_no_browser()) is not None:
    pytest.skip(reason, allow_module_level=True)  # one line for all of them

METHODS = ("moda", "mwt", "nemo", "gradsplitter", "cnnsplitter")


def figures(method: str, model: str, data: str, seed: int) -> MethodFigures:
    sizes = tuple(SizeFigures(count, 10, 0.99, 0.98, 0.985, 0.5, 0.4, 0.7, 12.5) for count in (2, 5, 10))
    return MethodFigures(
        method, model, data, seed, 0.9931, 0.2, 0.3, 0.1, 0.15, 0.2, 0.25, 0.1, 0.2, 1234.5, 67.8, sizes
    )  # fmt: skip


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All methods, of several seeds, beside the papers' numbers and without them."""
    path = tmp_path_factory.mktemp("page") / "comparison.html"
    found = [
        figures(method, model, data, seed)
        for model, data in (("vgg16", "cifar10"), ("small_vgg", "digits"))
        for method in METHODS
        for seed in (0, 1)
    ]
    path.write_text(comparison_page(found), encoding="utf-8")
    return path


@pytest.mark.parametrize(("width", "scheme"), [(400, "light"), (400, "dark"), (800, "dark"), (1400, "light")])
def test_nothing_that_matters_is_off_screen(browser: Browser, page: Path, width: int, scheme: str) -> None:
    """The names of methods stay while the numbers beside them are scrolled."""
    browser.messages(), browser.requested()
    browser.show(page, width, scheme)
    assert browser.messages() == []
    assert {address for address in browser.requested() if not address.startswith("data:")} == {page.as_uri()}
    assert browser.run("return document.documentElement.scrollWidth") == width
    browser.run("document.querySelectorAll('.scroll').forEach(each => { each.scrollLeft = 10000; })")
    if width == 400:
        assert browser.run(OFF_SCREEN, "tbody th[scope=row]") == []
    for what in ("h1", "h2", ".lead", ".caption-for", "footer p", "nav a"):
        assert browser.run(OFF_SCREEN, what) == [], what
    assert browser.run(SHADOWS) == 0
    assert (browser.picture()[2, 2].mean() < 0.2) == (scheme == "dark")


def test_on_paper_it_is_whole_and_light(browser: Browser, page: Path) -> None:
    browser.show(page, 690, "dark", "print")
    assert browser.run("return document.documentElement.scrollWidth") == 690
    assert browser.run(OFF_SCREEN, "table") == []
    assert browser.run("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
