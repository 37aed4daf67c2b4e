"""What a composition left of each layer, and what stayed whole and why."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["Layer", "table"]


@dataclass(frozen=True)
class Layer:
    """One layer of a composed model.

    Attributes:
        name: of the module.
        neurons: outputs that are left.
        of: outputs of the whole layer.
        parameters: that are left.
        whole: parameters of the whole layer.
        why: why neurons that are dropped had to be given back to it, if so.
    """

    name: str
    neurons: int
    of: int
    parameters: int
    whole: int
    why: str = ""


def table(layers: Iterable[Layer], left: int, whole: int) -> str:
    """A table of plain text, a layer a line."""
    rows = [("layer", "neurons", "parameters", "")]
    rows += [
        (layer.name or "(model)", _of(layer.neurons, layer.of), _of(layer.parameters, layer.whole), layer.why)
        for layer in layers
    ]
    sizes = [max(len(row[place]) for row in rows) for place in range(3)]
    lines = [
        "  ".join([*(cell.ljust(size) for cell, size in zip(row, sizes, strict=False)), row[3]]).rstrip()
        for row in rows
    ]
    share = f" ({left / whole:.1%})" if whole else ""
    return "\n".join([*lines, f"{left} of {whole} parameters{share}"])


def _of(left: int, whole: int) -> str:
    return f"{left} of {whole}" if whole else "-"
