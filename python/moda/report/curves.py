"""Draws small charts to stand side by side: lines with a band, bars, changes and heat maps, with labels at the data."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from moda.report.page import Panel
from moda.report.spread import Spread
from moda.report.style import SEQUENTIAL, Theme, bare, contrasting

__all__ = ["Change", "Line", "Scale", "bars", "changes", "heat_map", "lines"]

SIZE = (3.0, 2.4)  # inches; all panels of a row share it, so that their letters have one size
SMALL, LABEL = 8.0, 8.5  # points
_LEFT, _RIGHT, _BOTTOM, _TOP = 0.14, 0.735, 0.165, 0.88  # share of the figure; labels of lines stand right of the axes


@dataclass(frozen=True)
class Line:
    """A line of a chart.

    Attributes:
        name: the label that stands at the line's end.
        x: the horizontal places, ascending.
        y: a value per x, with its range over seeds.
        colour: the name of a field of `Theme`.
        dashed: draw the line dashed, for other people's numbers and second quantities.
        points: mark the values with dots.
    """

    name: str
    x: Sequence[float]
    y: Sequence[Spread]
    colour: str
    dashed: bool = False
    points: bool = False


@dataclass(frozen=True)
class Scale:
    """A vertical axis.

    Attributes:
        unit: the quantity and its unit, e.g. "accuracy, %".
        factor: what numbers are multiplied by.
        logarithmic: whether the axis is logarithmic.
        low: the axis's lower end in that unit; None places it below the data.
        high: the axis's upper end; None places it above the data.
    """

    unit: str
    factor: float = 1.0
    logarithmic: bool = False
    low: float | None = None
    high: float | None = None


def lines(name: str, title: str, drawn: Sequence[Line], scale: Scale, along: str) -> Panel:
    """Make a line chart; `along` says what is on the horizontal axis."""

    def draw(figure: Figure, theme: Theme) -> None:
        axes = figure.add_axes((_LEFT, _BOTTOM, _RIGHT - _LEFT, _TOP - _BOTTOM))
        if scale.logarithmic:
            axes.set_yscale("log")
        for line in drawn:
            _line(axes, theme, line, scale.factor)
        first, last = min(line.x[0] for line in drawn), max(line.x[-1] for line in drawn)
        room = 0.03 * (last - first) or 0.5
        axes.set_xlim(first - room, last + room)
        _limit(axes, scale)
        _furnish(axes, theme, scale.unit, along)
        axes.xaxis.set_major_locator(_places(drawn))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        _name_ends(axes, theme, drawn, scale.factor)

    return Panel(name, title, _described(title, drawn, scale, along), SIZE, draw)


def _line(axes: Axes, theme: Theme, line: Line, factor: float) -> None:
    colour = getattr(theme, line.colour)
    mean, low, high = (factor * np.array([getattr(band, end) for band in line.y]) for end in ("mean", "low", "high"))
    if np.any(high > low):
        axes.fill_between(line.x, low, high, color=colour, alpha=0.2, linewidth=0)
    style = (0, (4, 2)) if line.dashed else "solid"
    marker = "o" if line.points else None
    axes.plot(line.x, mean, color=colour, linestyle=style, linewidth=1.6, marker=marker, markersize=3.2)


def _limit(axes: Axes, scale: Scale) -> None:
    low, high = axes.get_ylim()
    axes.set_ylim(low if scale.low is None else scale.low, high if scale.high is None else scale.high)
    if not scale.logarithmic:
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        return
    low, high = axes.get_ylim()
    steps = (1, 2, 3, 5, 7) if high < 10 * low else (1, 2, 5) if high < 100 * low else (1,)
    ticks = [step * 10.0**power for power in range(-6, 4) for step in steps if low <= step * 10.0**power <= high]
    axes.yaxis.set_major_locator(FixedLocator(ticks))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def _places(drawn: Sequence[Line]) -> FixedLocator | MaxNLocator:
    """Return ticks at the values if they are few, else at round numbers."""
    values = sorted({value for line in drawn for value in line.x})
    whole = all(float(value).is_integer() for value in values)
    if whole and len(values) <= 10 and values[-1] < 100:
        return FixedLocator(values)
    return MaxNLocator(6, steps=[1, 2, 5, 10] if whole else [1, 2, 2.5, 5, 10], integer=whole)


def _furnish(axes: Axes, theme: Theme, unit: str, along: str) -> None:
    bare(axes)
    axes.grid(axis="y", color=theme.rule, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=SMALL, labelcolor=theme.muted, pad=3)
    axes.set_xlabel(along, fontsize=SMALL, color=theme.muted, labelpad=2)
    axes.figure.text(0.01, 0.965, unit, fontsize=SMALL, color=theme.muted, ha="left", va="top")


def _name_ends(axes: Axes, theme: Theme, drawn: Sequence[Line], factor: float) -> None:
    """Write names at the ends of lines, moved apart where they would overlap."""
    ends = [(line.x[-1], factor * line.y[-1].mean) for line in drawn]
    to_axes = axes.transData + axes.transAxes.inverted()
    wanted = [float(np.clip(to_axes.transform(end)[1], 0, 1)) for end in ends]
    gap = 1.2 * LABEL / (72 * SIZE[1] * (_TOP - _BOTTOM))
    for line, place in zip(drawn, spread_out(wanted, gap), strict=True):
        colour = theme.muted if line.colour == "standard" else getattr(theme, line.colour)
        axes.text(1.02, place, line.name, color=colour, fontsize=LABEL, va="center", transform=axes.transAxes)


def spread_out(places: Sequence[float], gap: float) -> list[float]:
    """Return places between 0 and 1 in the same order and at least `gap` apart, moved by a pass up and a pass down."""
    order = sorted(range(len(places)), key=lambda index: places[index])
    moved = list(places)
    for below, above in itertools.pairwise(order):
        moved[above] = max(moved[above], moved[below] + gap)
    limit = 1.0
    for index in reversed(order):
        moved[index] = min(moved[index], limit)
        limit = moved[index] - gap
    return moved


def _described(title: str, drawn: Sequence[Line], scale: Scale, along: str) -> str:
    told = []
    for line in drawn:
        first, last = (scale.factor * line.y[index].mean for index in (0, -1))
        told.append(f"{line.name}: {first:.3g} at {line.x[0]:g}, {last:.3g} at {line.x[-1]:g}")
    return f"{title}. Line chart, {scale.unit}, along {along}. {'; '.join(told)}."


def bars(name: str, title: str, names: Sequence[str], values: Sequence[Spread], unit: str) -> Panel:
    """Make horizontal bars of shares in per cent with their numbers, one under another."""
    height = max(SIZE[1], 0.21 * len(names) + 0.3)
    listed = ", ".join(f"{label} {100 * band.mean:.1f}" for label, band in zip(names, values, strict=True))

    def draw(figure: Figure, theme: Theme) -> None:
        left = min(0.34, 0.04 + 0.027 * max(map(len, names)))
        axes = figure.add_axes((left, 0.02, 0.88 - left, 0.96 - 0.3 / height))
        places = np.arange(len(names))
        means = np.array([100 * band.mean for band in values])
        highest = max(100 * band.high for band in values)
        axes.barh(places, means, height=0.66, color=theme.modular)
        for place, band in enumerate(values):
            if band.high > band.low:
                axes.hlines(place, 100 * band.low, 100 * band.high, color=theme.ink, linewidth=1)
            end = max(100 * band.high, 100 * band.mean)
            axes.text(end + 0.02 * highest, place, f"{100 * band.mean:.1f}", va="center", fontsize=SMALL)
        axes.set_yticks(places, names)
        axes.set_xlim(0, highest)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_xticks([])
        bare(axes)
        axes.tick_params(labelsize=SMALL)
        figure.text(0.01, 1 - 0.035 * SIZE[1] / height, unit, fontsize=SMALL, color=theme.muted, va="top")

    return Panel(name, title, f"{title}. Bar chart, {unit}: {listed}.", (SIZE[0], height), draw)


@dataclass(frozen=True)
class Change:
    """Numbers before and after a change, a pair per row; `colour` is the name of a field of `Theme`."""

    name: str
    before: Sequence[float]
    after: Sequence[float]
    colour: str


def changes(name: str, title: str, names: Sequence[str], drawn: Sequence[Change], unit: str) -> Panel:
    """Draw each change from a hollow mark (before) to a filled one (after), in per cent, a row per name and change."""
    step = 0.17
    height = max(SIZE[1], 0.6 + len(names) * (step * len(drawn) + 0.1))
    told = "; ".join(
        f"{change.name}, {label} {100 * before:.1f} to {100 * after:.1f}"
        for change in drawn
        for label, before, after in zip(names, change.before, change.after, strict=True)
    )

    def draw(figure: Figure, theme: Theme) -> None:
        left = min(0.34, 0.05 + 0.027 * max(map(len, names)))
        axes = figure.add_axes((left, 0.36 / height, _RIGHT - left, 1 - 0.62 / height))
        apart = 0.8 / len(drawn)
        for index, change in enumerate(drawn):
            colour = getattr(theme, change.colour)
            places = np.arange(len(names)) + (index - (len(drawn) - 1) / 2) * apart * 0.75
            before, after = 100 * np.array(change.before), 100 * np.array(change.after)
            axes.hlines(places, before, after, color=colour, linewidth=1.6)
            axes.plot(before, places, "o", markersize=4.2, markerfacecolor="none", markeredgecolor=colour)
            axes.plot(after, places, "o", markersize=4.2, color=colour)
            label = 1 - (index + 0.5) * 1.3 * LABEL / (72 * height)
            axes.text(1.03, label, change.name, color=colour, fontsize=LABEL, transform=axes.transAxes, va="center")
        axes.set_yticks(np.arange(len(names)), names)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        _furnish(axes, theme, unit, "")
        axes.grid(visible=False)
        axes.grid(axis="x", color=theme.rule, linewidth=0.6)
        axes.tick_params(axis="y", labelcolor=theme.ink)

    return Panel(name, title, f"{title}. {unit}, before and after. {told}.", (SIZE[0], height), draw)


def heat_map(
    name: str, title: str, names: Sequence[str], values: np.ndarray, unit: str, *, half: bool = False
) -> Panel:
    """Make a square heat map of shares in per cent, with numbers in it where there is room.

    Args:
        name: see `Panel`.
        title: see `Panel`.
        names: the names of rows and columns.
        values: (K, K), in [0, 1].
        unit: the quantity that is shown.
        half: leave out what is above the diagonal, for a symmetric matrix.
    """
    count = len(names)
    shown = np.tril(np.ones_like(values, dtype=bool)) if half else np.ones_like(values, dtype=bool)
    limit = max(float(values[shown].max()), 1e-9)
    outside = values[~np.eye(count, dtype=bool)] if count > 1 else values
    ends = f"from {100 * outside.min():.0f} to {100 * outside.max():.0f}"
    told = f"Between different classes {ends}, mean {100 * outside.mean():.0f}"

    def draw(figure: Figure, theme: Theme) -> None:
        side = 1.99  # inches
        size = figure.get_size_inches()
        axes = figure.add_axes((0.135, 0.085, side / size[0], side / size[1]))
        colours = colormaps[SEQUENTIAL]
        seen = np.where(shown, values, np.nan)
        image = axes.imshow(seen, cmap=colours, vmin=0, vmax=limit, interpolation="none")
        if count <= 12:
            _write_cells(axes, values, shown, lambda value: contrasting(colours(value / limit)))
        _name_classes(axes, names)
        axes.tick_params(labelsize=SMALL if count <= 12 else 6, labelcolor=theme.muted, pad=2)
        bar = figure.colorbar(image, cax=figure.add_axes((0.155 + side / size[0], 0.085, 0.03, side / size[1])))
        bar.outline.set_visible(False)
        bar.ax.tick_params(labelsize=SMALL, length=0, labelcolor=theme.muted)
        bar.ax.yaxis.set_major_locator(MaxNLocator(4))
        bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f}"))
        figure.text(0.01, 0.985, unit, fontsize=SMALL, color=theme.muted, va="top")

    description = f"{title}. Heat map of {count} by {count} classes, {unit}. {told}."
    return Panel(name, title, description, SIZE, draw)


def _write_cells(axes: Axes, values: np.ndarray, shown: np.ndarray, ink: Callable[[float], str]) -> None:
    for row, column in np.argwhere(shown):
        value = float(values[row, column])
        weight = "bold" if row == column else "normal"
        axes.text(
            column, row, f"{100 * value:.0f}", ha="center", va="center", color=ink(value), fontsize=6.5, weight=weight
        )


def _name_classes(axes: Axes, names: Sequence[str]) -> None:
    """Write names at rows, and at columns where they are short; of many classes, about every tenth index."""
    every = 1 if len(names) <= 12 else -(-len(names) // 10)
    places = range(0, len(names), every)
    told = [names[place] if every == 1 else str(place) for place in places]
    short = all(len(name) <= 2 for name in told)
    cut = [name if len(name) <= 5 else f"{name[:4]}." for name in told]
    axes.set_yticks(places, cut)
    axes.set_xticks(places if short else [], told if short else [])
    bare(axes)
