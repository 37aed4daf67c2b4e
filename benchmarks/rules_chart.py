"""The figure of the study of rules: the size of a one-class module against what pairs of classes lose."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.charts import INK, SETTINGS
from benchmarks.rules_results import POINTS, Summary

_COLORS = {"attribution": "#0072B2", "share": "#E69F00", "firing": "#D55E00"}
_MARKERS = {"attribution": "o", "share": "s"}
_LINES = {"modular": "-", "standard": "--"}
_COLUMNS = 3


def chart(measured: Sequence[Summary]) -> Figure:
    """A panel for every network: curves over epsilon on held-out samples, and the published rule's size."""
    panels = [(name, list(members)) for name, members in groupby(measured, lambda summary: summary.name)]
    rows = -(-len(panels) // _COLUMNS)
    with mpl.rc_context(SETTINGS):
        figure = Figure(figsize=(9, 0.6 + 2.4 * rows), layout="constrained")
        axes = figure.subplots(rows, _COLUMNS, squeeze=False).ravel()
        for panel, (name, members) in zip(axes, panels, strict=False):
            _panel(panel, name, members)
        for empty in axes[len(panels) :]:
            empty.set_axis_off()
        figure.supxlabel("parameters of a one-class module, % of the model's")
        figure.supylabel("points that pairs of classes lose")
        named = {label: line for panel in axes for line, label in zip(*panel.get_legend_handles_labels(), strict=True)}
        figure.legend(list(named.values()), list(named), loc="outside upper center", ncols=3)
    return figure


def _panel(axes: Axes, name: str, members: Sequence[Summary]) -> None:
    for summary in members:
        line = _LINES[summary.training]
        for rule, marker in _MARKERS.items():
            _, sizes, losses = zip(*summary.curve(rule), strict=True)
            axes.plot(
                [100 * size for size in sizes], losses, line, color=_COLORS[rule], marker=marker, markersize=4,
                label=f"{rule}, {summary.training}",
            )  # fmt: skip
        axes.axvline(
            100 * summary.size("firing"), color=_COLORS["firing"], linestyle=line, label=f"firing, {summary.training}"
        )
    axes.axhline(POINTS, color=INK, linewidth=0.8, linestyle=":")
    axes.set_title(name, fontsize=9)
    axes.set_xlim(0, 102)
    axes.set_yscale("symlog", linthresh=1)
    axes.set_ylim(-0.5, 50)
    axes.set_yticks([0, 0.5, 1, 10], ["0", "0.5", "1", "10"])
    axes.grid()
