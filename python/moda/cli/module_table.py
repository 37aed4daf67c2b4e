"""Prints the table of a model's modules: the neurons and parameters of each, and what it shares with the others."""

from __future__ import annotations

from collections.abc import Sequence

from moda.cli.printing import percent, show, table
from moda.decomposition.container import Decomposition


def show_modules(
    names: Sequence[str], decomposition: Decomposition, sizes: Sequence[float], overlaps: Sequence[Sequence[float]]
) -> None:
    """Print one row per class.

    Args:
        names: the names of the classes.
        decomposition: the modules.
        sizes: the parameters of each module over those of the model.
        overlaps: what every two modules share, as `moda.measure.overlap_matrix` gives it.
    """
    rows = table("Modules", "class", "neurons", "parameters", "mean overlap", "most with")
    neurons = sum(mask.shape[1] for mask in decomposition.masks.values())
    for k, (name, size, row) in enumerate(zip(names, sizes, overlaps, strict=True)):
        kept = sum(int(mask.sum()) for mask in decomposition.select([k]).values())
        others = {other: value for other, value in enumerate(row) if other != k}
        most = max(others, key=lambda other: others[other], default=k)
        mean = sum(others.values()) / max(1, len(others))
        with_most = f"{names[most]} {percent(row[most], 1)}"
        rows.add_row(name, f"{kept} of {neurons}", percent(size, 1), percent(mean, 1), with_most)
    show(rows)
