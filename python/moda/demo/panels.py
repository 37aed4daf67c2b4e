"""Draws the demo's figures, each into given axes or a given part of a figure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from torch import Tensor

from moda.report.style import SEQUENTIAL, Theme, bare, contrasting


def module_sizes(axes: Axes, theme: Theme, names: Sequence[str], standard: Any, modular: Any) -> None:
    """Draw a bar for the modular model's module of each class, and a mark where the standard model's ends.

    `standard` and `modular` are shares of the model's parameters, one per class.
    """
    places = np.arange(len(names))
    axes.barh(places, modular, height=0.62, color=theme.modular)
    axes.scatter(standard, places, s=36, marker="D", color=theme.standard, zorder=3)
    for place, (own, plain) in enumerate(zip(modular, standard, strict=True)):
        axes.hlines(place, own, plain, color=theme.rule, linewidth=1, zorder=1)
        axes.text(own - 0.012, place, f"{100 * own:.0f} %", ha="right", va="center", color="#ffffff", fontsize=9)
        axes.text(plain + 0.02, place, f"{100 * plain:.0f} %", ha="left", va="center", color=theme.muted, fontsize=9)
    top = -0.75
    axes.text(modular[0], top, "modular", ha="right", va="bottom", color=theme.modular, weight="bold")
    axes.text(standard[0], top, "standard", ha="center", va="bottom", color=theme.muted, weight="bold")
    axes.set_yticks(places, names)
    axes.set_xlim(0, max(1.0, *standard))
    axes.set_ylim(len(names) - 0.4, -1.2)
    axes.set_xticks([])
    bare(axes)


def overlaps(axes: Axes, names: Sequence[str], values: Tensor) -> None:
    """Draw a symmetric (K, K) matrix as a heat map below the diagonal, with its numbers in per cent."""
    shares = values.numpy()
    shown = np.tril(np.ones_like(shares, dtype=bool))
    colours = colormaps[SEQUENTIAL]
    axes.imshow(np.where(shown, shares, np.nan), cmap=colours, vmin=0, vmax=max(0.6, float(shares.max())))
    limit = max(0.6, float(shares.max()))
    for row, column in np.argwhere(shown):
        ink = contrasting(colours(shares[row, column] / limit))
        weight = "bold" if row == column else "normal"
        text = f"{100 * shares[row, column]:.0f}"
        axes.text(column, row, text, ha="center", va="center", color=ink, fontsize=8.5, weight=weight)
    _label_classes(axes, names)


def similarity(axes: Axes, values: Tensor, names: Sequence[str], *, rows: bool, columns: bool) -> Any:
    """Draw the (K, K) mean cosine similarity between samples of two classes, from 0 to 1."""
    image = axes.imshow(values.numpy(), cmap=SEQUENTIAL, vmin=0, vmax=1)
    _label_classes(axes, names, rows=rows, columns=columns)
    axes.tick_params(labelsize=7)
    return image


def firing_rates(axes: Axes, values: Tensor, names: Sequence[str]) -> Any:
    """Draw (K, C) firing rates with the neurons in the order of `by_class`."""
    ordered = values[:, by_class(values)].numpy()
    image = axes.imshow(ordered, cmap=SEQUENTIAL, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    axes.set_yticks(range(len(names)), names)
    axes.set_xticks([])
    axes.tick_params(labelsize=8)
    bare(axes)
    return image


def by_class(rates: Tensor) -> Tensor:
    """Return the (C,) order of neurons by the class they fire most for, then by falling rate; those that never fire
    come last.
    """
    highest, owner = rates.max(0)
    group = torch.where(highest > 0, owner, len(rates))
    order = (-highest).argsort(stable=True)
    return order[group[order].argsort(stable=True)]


def _label_classes(axes: Axes, names: Sequence[str], *, rows: bool = True, columns: bool = True) -> None:
    places = range(len(names))
    axes.set_xticks(places if columns else [], names if columns else [])
    axes.set_yticks(places if rows else [], names if rows else [])
    bare(axes)
