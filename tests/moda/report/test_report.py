"""What figures are made of: orders, contrasts, SVG that can stand in a page beside others."""

from __future__ import annotations

import re

import pytest
import torch
from matplotlib.figure import Figure

from moda.demo import panels
from moda.report.style import PAPER, SCREEN, contrasting, drawing, to_png, to_svg


def test_neurons_are_grouped_by_the_class_they_fire_most_for() -> None:
    rates = torch.tensor([[0.1, 0.0, 0.9, 0.3, 1.0], [0.8, 0.0, 0.2, 0.9, 0.0]])
    assert panels.by_class(rates).tolist() == [4, 2, 3, 0, 1]  # class 0: 1.0, 0.9; class 1: 0.9, 0.8; never: last


@pytest.mark.parametrize(
    ("colour", "ink"),
    [((1, 1, 1, 1), "#000000"), ((0, 0, 0, 1), "#ffffff"), ((0.27, 0, 0.33, 1), "#ffffff"), ((0.99, 0.9, 0.14, 1), "#000000")],
)  # fmt: skip
def test_contrasting(colour: tuple[float, float, float, float], ink: str) -> None:
    assert contrasting(colour) == ink


def heat_map(name: str) -> str:
    with drawing(SCREEN):
        figure = Figure(figsize=(3, 3))
        panels.overlaps(figure.add_subplot(), ["<a>", "b"], torch.tensor([[0.5, 0.25], [0.25, 0.5]]))
        return to_svg(figure, name, 'overlap of "a" & b')


def test_svg_stands_in_a_page() -> None:
    text = heat_map("one")
    head = text[: text.index(">")]
    assert head.startswith("<svg")
    assert "viewBox" in head
    assert not re.search(r'\s(width|height)="', head)
    assert 'aria-label="overlap of &quot;a&quot; &amp; b"' in head
    assert "<metadata" not in text
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert ids
    assert all(each.startswith("one-") for each in ids)
    references = re.findall(r'(?:url\(|href=")#([^)"]+)', text)
    assert set(references) <= set(ids)
    assert "&lt;a&gt;" in text


def test_svg_is_the_same_every_time_and_shares_no_id() -> None:
    assert heat_map("one") == heat_map("one")
    ids = [set(re.findall(r'\bid="([^"]+)"', heat_map(name))) for name in ("one", "two")]
    assert not ids[0] & ids[1]


def test_overlap_shows_each_pair_once_in_per_cent() -> None:
    texts = re.findall(r"<text[^>]*>(\d+)</text>", heat_map("one"))
    assert sorted(texts) == ["25", "50", "50"]


def test_module_sizes_are_drawn_to_scale() -> None:
    with drawing(PAPER):
        axes = Figure().add_subplot()
        panels.module_sizes(axes, PAPER, ["a", "b"], [0.8, 0.9], [0.25, 0.5])
    assert [bar.get_width() for bar in axes.patches] == [0.25, 0.5]
    assert axes.get_xlim() == (0, 1)
    assert [text.get_text() for text in axes.texts] == ["25 %", "80 %", "50 %", "90 %", "modular", "standard"]


def test_png() -> None:
    with drawing(PAPER):
        assert to_png(Figure(figsize=(1, 1)), 50).startswith(b"\x89PNG\r\n")
