"""Charts of results as transparent SVG, in colours that read on white and black and for colour-blind readers."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from moda.bench.results import MEASURED, Results, Row
from moda.bench.scaling import FRESH_MEMORY

INK = "#7d7d7d"  # contrast above 4 on white and on black
# The palette is Okabe and Ito's; markers repeat what hues say.
STYLE = {
    "reference": ("#D55E00", "o"),
    "torch": ("#E69F00", "s"),
    "triton": ("#009E73", "^"),
    "native": ("#0072B2", "D"),
    "accelerated": ("#CC79A7", "v"),
    "grouped": ("#E69F00", "s"),
    "fused": ("#009E73", "^"),
    "ours": ("#0072B2", "D"),
    "reference, compiled": ("#CC79A7", "v"),
    "torch, compiled": ("#56B4E9", "P"),
    "ours, compiled": ("#56B4E9", "P"),
    "standard, compiled": ("#999999", "X"),
}
_OTHER = ("#999999", "X")

SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "moda",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": INK,
    "grid.alpha": 0.25,
    "legend.frameon": False,
}


def charts(results: Results) -> dict[str, tuple[str, Figure]]:
    """Name -> (what it shows, figure) of every chart that the results have data for."""
    with mpl.rc_context(SETTINGS):
        made = {
            "step": ("Training step over standard training", _step(results)),
            "loss": ("Speed-up of the losses, forward and backward, over the published formulas", _speed_up(results)),
            "roofline": ("Bandwidth of every kernel against what a copy reaches", _roofline(results)),
            "scaling": ("Cost of the losses against batch, classes and layers", _scaling(results)),
        }
    return {name: (text, figure) for name, (text, figure) in made.items() if figure is not None}


def svg(figure: Figure) -> str:
    """The figure as SVG text, the same for the same data."""
    file = io.BytesIO()
    with mpl.rc_context(SETTINGS):
        figure.savefig(file, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None})
    return "\n".join(line.rstrip() for line in file.getvalue().decode().splitlines()) + "\n"


def _plain_numbers(*axes: Axis) -> None:
    """Ticks of logarithmic axes as 1, 2, 5, 10, not as powers."""
    for axis in axes:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.set_minor_formatter(NullFormatter())


def _measured(results: Results, suite: str, phase: str) -> list[Row]:
    return [
        r for r in results.rows if (r.suite, r.phase, r.status) == (suite, phase, MEASURED) and r.ratio and r.seconds
    ]


def _names(rows: Sequence[Row]) -> tuple[list[str], list[str]]:
    """Cases and contenders, in order of appearance, the baseline left out."""
    cases = list(dict.fromkeys(row.case for row in rows))
    return cases, list(dict.fromkeys(row.contender for row in rows if row.contender != row.baseline))


def _bars(rows: Sequence[Row], height: float) -> tuple[Figure, list[tuple[Row, float, float]]]:
    """An empty figure of grouped horizontal bars: each row with its place and thickness."""
    cases, contenders = _names(rows)
    figure = Figure(figsize=(7.6, 1.1 + height * len(cases) * len(contenders)))
    axes = figure.subplots()
    axes.set_yticks(range(len(cases)), cases)
    axes.invert_yaxis()
    axes.grid(axis="x")
    axes.set_axisbelow(True)
    thickness = 0.8 / len(contenders)
    places = [
        (
            row,
            cases.index(row.case) + (contenders.index(row.contender) - (len(contenders) - 1) / 2) * thickness,
            thickness,
        )
        for row in rows
        if row.contender in contenders
    ]
    return figure, places


def _step(results: Results) -> Figure | None:
    rows = _measured(results, "step", "step")
    if not rows:
        return None
    figure, places = _bars(rows, 0.21)
    axes = figure.axes[0]
    seen: set[str] = set()
    for row, place, thickness in places:
        ratio, color = row.ratio, STYLE.get(row.contender, _OTHER)[0]
        assert ratio is not None
        label = row.contender if row.contender not in seen else None
        seen.add(row.contender)
        axes.barh(place, ratio.median - 1, thickness * 0.9, left=1, color=color, label=label)
        axes.plot([ratio.q1, ratio.q3], [place, place], color=INK, linewidth=1.5)
        axes.annotate(
            f"{ratio.median:.3f}x", (max(ratio.median, ratio.q3, 1), place), (4, 0), textcoords="offset points",
            va="center", fontsize=8,
        )  # fmt: skip
    axes.axvline(1, color=INK, linewidth=1)
    axes.set_xlabel("time over standard training (median and quartiles of rounds)")
    figure.legend(loc="outside upper center", ncols=4)
    figure.set_layout_engine("constrained")
    return figure


def _speed_up(results: Results) -> Figure | None:
    rows = _measured(results, "loss", "both")
    if not any(row.contender != row.baseline for row in rows):
        return None
    figure, places = _bars(rows, 0.2)
    axes = figure.axes[0]
    seen: set[str] = set()
    for row, place, thickness in places:
        assert row.ratio is not None
        label = row.contender if row.contender not in seen else None
        seen.add(row.contender)
        speed_up, color = 1 / row.ratio.median, STYLE.get(row.contender, _OTHER)[0]
        axes.barh(place, speed_up - 1, thickness * 0.9, left=1, color=color, label=label)
        axes.annotate(
            f"{speed_up:.1f}x", (max(speed_up, 1), place), (4, 0), textcoords="offset points", va="center", fontsize=8
        )
    axes.set_xscale("log")
    _plain_numbers(axes.xaxis)
    axes.axvline(1, color=INK, linewidth=1)
    axes.set_xlabel("speed-up over the published formulas")
    figure.legend(loc="outside upper center", ncols=4)
    figure.set_layout_engine("constrained")
    return figure


def _roofline(results: Results) -> Figure | None:
    rows = [
        row for row in results.rows if row.bandwidth and row.moved and row.suite in ("loss", "relu_pool", "scaling")
    ]
    rows = [row for row in rows if row.contender in ("reference", "torch", "triton", "native")]
    if not rows:
        return None
    figure = Figure(figsize=(7.6, 4.4), layout="constrained")
    axes = figure.subplots()
    axes.set_xscale("log")
    axes.set_yscale("log")
    _plain_numbers(axes.xaxis, axes.yaxis)
    _roof(results, rows, figure)
    for contender in dict.fromkeys(row.contender for row in rows):
        mine = [row for row in rows if row.contender == contender]
        color, marker = STYLE[contender]
        axes.scatter(
            [row.moved / 2**20 for row in mine if row.moved], [(row.bandwidth or 0) / 1e9 for row in mine],
            color=color, marker=marker, s=26, alpha=0.85, label=contender,
        )  # fmt: skip
    axes.set_xlabel("MiB that must be read and written")
    axes.set_ylabel("GB/s")
    axes.grid()
    axes.legend()
    return figure


def _roof(results: Results, rows: Sequence[Row], figure: Figure) -> None:
    """The bandwidth that a copy of so many bytes reaches, with the cost of its call."""
    call = float(results.limits["call_seconds"]["median"])
    smallest = min(row.moved for row in rows if row.moved)
    largest = max(row.moved for row in rows if row.moved)
    sizes = [smallest * (largest / smallest) ** (i / 100) for i in range(101)] if largest > smallest else [smallest]
    reached = [size / (call + size / results.copy_bandwidth) / 1e9 for size in sizes]
    label = f"copy: {results.copy_bandwidth / 1e9:.0f} GB/s, call: {call * 1e6:.1f} us"
    figure.axes[0].plot([size / 2**20 for size in sizes], reached, color=INK, linestyle="--", label=label)


def _scaling(results: Results) -> Figure | None:
    rows = [row for row in _measured(results, "scaling", "both") if row.parameters["axis"] != FRESH_MEMORY]
    axes_names = list(dict.fromkeys(str(row.parameters["axis"]) for row in rows))
    if not axes_names:
        return None
    figure = Figure(figsize=(2.9 * max(2, len(axes_names)), 3.4), layout="constrained")
    for panel, name in zip(figure.subplots(1, len(axes_names), squeeze=False)[0], axes_names, strict=True):
        mine = [row for row in rows if row.parameters["axis"] == name]
        for contender in dict.fromkeys(row.contender for row in mine):
            points = sorted(
                (float(r.parameters["value"]), r.seconds.median) for r in mine if r.contender == contender and r.seconds
            )
            color, marker = STYLE.get(contender, _OTHER)
            panel.plot(*zip(*points, strict=True), color=color, marker=marker, markersize=5, label=contender)
        panel.set_xscale("log")
        panel.set_yscale("log")
        _plain_numbers(panel.xaxis)
        panel.set_xlabel(name)
        panel.grid()
    figure.axes[0].set_ylabel("seconds, forward and backward")
    figure.axes[0].legend(fontsize=8)
    return figure
