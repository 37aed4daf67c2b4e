"""Makes a page of results: sections of words, figures and tables become HTML."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from html import escape
from typing import Any, TypeAlias

import jinja2
from markupsafe import Markup
from matplotlib.figure import Figure

from moda.report.style import SCREEN, Theme, drawing, to_svg

__all__ = ["Block", "Panel", "Panels", "Row", "Section", "Table", "Words", "draw_all", "render"]


@dataclass(frozen=True)
class Panel:
    """A figure of the page.

    Attributes:
        name: the figure's name, unique in the page and used in ids.
        title: a line that says what the figure shows.
        description: the figure in words with its numbers, for those who do not see it.
        size: the width and height in inches.
        draw: the function that draws it.
    """

    name: str
    title: str
    description: str
    size: tuple[float, float]
    draw: Callable[[Figure, Theme], None]

    def svg(self) -> str:
        """Return the figure as an SVG element; call it while drawing for the screen."""
        figure = Figure(figsize=self.size)
        self.draw(figure, SCREEN)
        return to_svg(figure, self.name, self.description)


@dataclass(frozen=True)
class Panels:
    """Figures that stand side by side where the page is wide enough, under an optional heading and caption."""

    panels: tuple[Panel, ...]
    heading: str = ""
    caption: str = ""
    kind: str = "panels"


@dataclass(frozen=True)
class Row:
    """A row of a table. The first cell is its heading; `reference` marks other people's numbers."""

    cells: tuple[str, ...]
    reference: bool = False


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        caption: a sentence that says what the numbers are.
        columns: the headings.
        rows: the rows, each with one cell per heading.
        emphasis: the index of the column, or the heading of the row, that matters most.
        prose: whether cells hold words instead of numbers.
    """

    caption: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    emphasis: int | str | None = None
    prose: bool = False
    kind: str = "table"


@dataclass(frozen=True)
class Words:
    """A paragraph; `code` stands between backticks, [text](#section) is a link.

    With `note` it says what is missing, or what cannot be compared.
    """

    text: str
    note: bool = False
    kind: str = "words"


Block: TypeAlias = "Panels | Table | Words"


@dataclass(frozen=True)
class Section:
    """A section of the page; `name` is its id."""

    name: str
    title: str
    blocks: tuple[Block, ...]


def draw_all(sections: Iterable[Section]) -> dict[str, str]:
    """Return the figures of sections as SVG, by name.

    Raises:
        ValueError: two figures share a name.
    """
    panels = [p for section in sections for block in section.blocks if isinstance(block, Panels) for p in block.panels]
    names = [panel.name for panel in panels]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"panels: expected one figure of each name, got two of {twice[0]!r}")
    with drawing(SCREEN):
        return {panel.name: panel.svg() for panel in panels}


def render(template: str, *, package: str = "moda.report", **values: Any) -> str:
    """Render a page from a template of a package; it may extend the templates of this one."""
    packages = dict.fromkeys((package, "moda.report"))
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader([jinja2.PackageLoader(name) for name in packages]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["inline"] = inline
    return environment.get_template(template).render(**values)


def inline(text: str) -> Markup:
    """Turn plain text into HTML: `code` between backticks, [links](#section), no line break before a per cent sign."""
    linked = re.sub(r"\[([^\]]+)\]\((#[\w-]+)\)", r'<a href="\2">\1</a>', escape(text))
    parts = linked.replace(" %", "\u00a0%").split("`")
    return Markup("".join(f"<code>{part}</code>" if index % 2 else part for index, part in enumerate(parts)))
