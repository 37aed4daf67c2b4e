"""Sets how figures look: colours for paper and for light and dark pages, fonts, and SVG that can stand inside HTML."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from html import escape
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Perceptually uniform, ordered in grey too, and told apart with any colour vision.
SEQUENTIAL = "viridis"


@dataclass(frozen=True)
class Theme:
    """The colours of frames and text, of the two trainings, and of composed models (after Okabe and Ito's palette)."""

    ink: str = "#1d2530"
    muted: str = "#5c6673"
    rule: str = "#d5dae1"
    standard: str = "#8b95a3"
    modular: str = "#0072b2"
    composed: str = "#b84a00"


PAPER = Theme()

# In a page the colours are CSS variables; matplotlib wants colours, so each has a stand-in that is replaced afterwards.
SCREEN = Theme(
    ink="#010203", muted="#010204", rule="#010205", standard="#010206", modular="#010207", composed="#010208"
)
_VARIABLES = {getattr(SCREEN, field.name): f"var(--{field.name})" for field in fields(Theme)}

_RC: dict[str, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.titleweight": "normal",
    "axes.linewidth": 0.8,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "svg.fonttype": "none",  # text stays text, so that it can be selected and searched, in the page's font
    "savefig.transparent": True,
}


@contextmanager
def drawing(theme: Theme) -> Iterator[None]:
    """Apply a theme's matplotlib settings while figures are made and saved."""
    colours = dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), theme.ink)
    settings: Any = {**_RC, **colours, "axes.edgecolor": theme.rule}
    with matplotlib.rc_context(settings):
        yield


def bare(axes: Axes) -> None:
    """Remove frame and ticks, so that data and words are left."""
    axes.set_frame_on(False)
    axes.tick_params(length=0)


def contrasting(colour: tuple[float, float, float, float]) -> str:
    """Return black or white, whichever is easier to read on a colour (WCAG relative luminance)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#000000" if luminance > 0.179 else "#ffffff"


def to_svg(figure: Figure, name: str, description: str) -> str:
    """Return a figure as an SVG element for a page.

    It scales with the page, takes its colours, is named to screen readers by `description`, and its ids begin with
    `name`, so that several stand in one page.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(url\(|href=")#', rf"\g<1>#{name}-", text)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, variable)
    head, rest = text.split(">", 1)
    head = re.sub(r'\s(?:width|height)="[^"]*"', "", head)
    return f'{head} role="img" aria-label="{escape(description)}">{rest}'


def to_png(figure: Figure, dots_per_inch: int) -> bytes:
    """Return a figure as PNG on white."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dots_per_inch, transparent=False, facecolor="white")
    return buffer.getvalue()
