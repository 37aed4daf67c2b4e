"""The study's page as people see it: in a browser, narrow and wide, light and dark, on paper, by keyboard."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moda.report.study import read_inputs, study_page
from tests.moda._helpers.browser import Browser, why_no_browser
from tests.moda._helpers.study_folders import STANDARD, config, write_analyses, write_reuse, write_run, write_study

if (reason := why_no_browser()) is not None:
    pytest.skip(reason, allow_module_level=True)  # one line for all of them

BOXES = """return [...document.querySelectorAll('svg')].map(svg => {
  const box = svg.getBoundingClientRect();
  return [svg.getAttribute('aria-label'), box.left, box.top + scrollY, box.width, box.height];
})"""
# Words of figures must be readable: WCAG's contrast of 4.5 between them and the page. Numbers in a heat map's cells are
# drawn in black or white by the cell, and are left out.
CONTRASTS = """
const luminance = text => {
  const parts = text.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255);
  const [r, g, b] = parts.map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const contrast = (a, b) => (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
const page = luminance(getComputedStyle(document.body).backgroundColor);
const worst = {};
for (const text of document.querySelectorAll('svg text')) {
  const fill = getComputedStyle(text).fill;
  if (fill !== 'rgb(0, 0, 0)' && fill !== 'rgb(255, 255, 255)') worst[fill] = contrast(luminance(fill), page);
}
return worst"""
CLIPPED = """const wide = [];
for (const e of document.querySelectorAll('section *, header *'))
  if (e.getBoundingClientRect().right > innerWidth + 0.5 && !e.closest('svg') && !e.closest('.scroll')) wide.push(e.tagName);
for (const e of document.querySelectorAll('svg, table')) if (e.getBoundingClientRect().right > innerWidth + 0.5) wide.push(e.tagName);
return wide"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, browser: Browser) -> Path:
    """Digits with everything there is, and a hundred classes in the paper's own setting."""
    folder = tmp_path_factory.mktemp("page")
    study = write_study(folder / "study", [("small_vgg", 1.0, 5)])
    hundred = config(model="vgg16", data="cifar100", epochs=200)
    write_run(folder / "modular", hundred, epochs=30)
    write_run(folder / "standard", hundred.changed(**STANDARD), epochs=30)
    write_reuse(folder / "modular", 100, range(10, 101, 10), per_size=3)
    write_analyses(folder / "modular", [f"a class of name {k}" for k in range(100)], layers=15)
    path = folder / "report.html"
    path.write_text(study_page(read_inputs([study, folder / "modular", folder / "standard"])), encoding="utf-8")
    return path


@pytest.mark.parametrize(("width", "scheme"), [(1400, "light"), (800, "light"), (400, "dark")])
def test_every_figure_shows_and_nothing_overflows(browser: Browser, page: Path, width: int, scheme: str) -> None:
    browser.messages(), browser.requested()
    browser.show(page, width, scheme)
    assert browser.messages() == []
    assert {address for address in browser.requested() if not address.startswith("data:")} == {page.as_uri()}
    assert browser.run("return document.documentElement.scrollWidth") == width
    picture = browser.picture()
    background = picture[2, 2]
    assert (background.mean() < 0.2) == (scheme == "dark")
    boxes = browser.run(BOXES)
    assert len(boxes) > 30
    for label, left, top, wide, high in boxes:
        assert label.strip()
        assert wide >= 200, label
        assert high >= 150, label
        part = picture[int(top) : int(top + high), int(left) : int(left + wide)]
        drawn = np.abs(part - background).max(axis=-1) > 0.3
        assert drawn.mean() > 0.005, f"{label}: nothing to see"
        assert drawn.any(axis=0).mean() > 0.3, f"{label}: only part of the width is used"
    contrasts = browser.run(CONTRASTS)
    assert len(contrasts) >= 4
    assert min(contrasts.values()) >= 4.5, contrasts


def test_names_of_lines_stay_in_their_figure(browser: Browser, page: Path) -> None:
    browser.show(page, 1400)
    outside = browser.run("""return [...document.querySelectorAll('svg text')].filter(text => {
        const box = text.getBoundingClientRect(), figure = text.closest('svg').getBoundingClientRect();
        return box.right > figure.right + 8 || box.left < figure.left - 8 || box.bottom > figure.bottom + 2;
    }).map(text => text.textContent)""")
    assert outside == []


def test_on_paper_it_is_light_and_nothing_is_cut_off(browser: Browser, page: Path) -> None:
    browser.show(page, 690, "dark", "print")  # A4 between margins of 14 mm
    assert browser.run(CLIPPED) == []
    assert browser.run("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert all(wide > 150 and high > 100 for _, _, _, wide, high in browser.run(BOXES))
    assert browser.run("return getComputedStyle(document.querySelector('figure')).breakInside") == "avoid"


def test_by_keyboard(browser: Browser, page: Path) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    browser.show(page, 1000)
    body = browser.driver.find_element(By.TAG_NAME, "body")
    body.send_keys(Keys.TAB)
    active = browser.driver.switch_to.active_element
    assert active.text == "Skip to the contents"
    assert active.rect["x"] >= 0  # it comes into view with the focus
    active.send_keys(Keys.ENTER)
    browser.driver.switch_to.active_element.send_keys(Keys.TAB)
    active = browser.driver.switch_to.active_element
    assert active.get_attribute("href").endswith("#overview")
    assert browser.run("return getComputedStyle(document.activeElement).outlineStyle") == "solid"
    active.send_keys(Keys.ENTER)
    assert browser.run("return location.hash") == "#overview"
    unreachable = browser.run("""return [...document.querySelectorAll('.scroll')]
        .filter(e => e.tabIndex !== 0 || !document.getElementById(e.getAttribute('aria-labelledby')).textContent).length""")
    assert unreachable == 0
