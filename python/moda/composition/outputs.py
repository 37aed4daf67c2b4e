"""Which of a model's outputs are logits, whose columns are classes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from moda.composition.structure import Structure, flatten

__all__ = ["Output", "logit_places", "pick"]

Output = str | int | Iterable["str | int"] | None
"""A key or place of an output, several of them, or None for what the model's outputs say themselves."""


def logit_places(
    structure: Structure, shapes: Sequence[Sequence[int]], num_classes: int, output: Output = None
) -> list[int]:
    """Which of the output's tensors hold logits `(N, num_classes)` or `(N, num_classes, ...)`.

    One tensor alone is the logits. Of several, those called `logits` are, if there are any; else all that have
    `num_classes` columns (main and auxiliary heads).

    Raises:
        ValueError: none of them does, or those that `output` names do not.
    """
    paths = list(structure.paths())
    fitting = [place for place, shape in enumerate(shapes) if len(shape) >= 2 and shape[1] == num_classes]
    if output is not None:
        return _named(paths, fitting, num_classes, output)
    if len(paths) == 1 and not fitting:
        shape = shapes[0]
        if len(shape) >= 2:
            raise ValueError(f"decomposition: has {num_classes} classes, but the model puts out {shape[1]} logits")
        raise ValueError(f"model: expected logits (N, {num_classes}) as its output, got shape {tuple(shape)}")
    called = [place for place in fitting if "logits" in paths[place]]
    if not fitting:
        got = ", ".join(f"{path} {tuple(shape)}" for path, shape in zip(paths, shapes, strict=True))
        raise ValueError(f"model: expected an output of logits (N, {num_classes}), got {got or 'no tensor'}")
    return called or fitting


def _named(paths: Sequence[str], fitting: Sequence[int], num_classes: int, output: Any) -> list[int]:
    names = [output] if isinstance(output, str | int) else list(output)
    found = []
    for name in names:
        ends = (f"[{name!r}]", f".{name}")
        places = [place for place, path in enumerate(paths) if path.startswith(ends) or path == name]
        if not places:
            raise ValueError(f"output: expected one of {paths}, got {name!r}")
        if not set(places) & set(fitting):
            raise ValueError(f"output: expected logits (N, {num_classes}), but {name!r} has another shape")
        found += [place for place in places if place in fitting]
    return found


def pick(value: Any, classes: Sequence[int], num_classes: int, output: Output = None) -> Any:
    """An output of the whole model with the columns of some classes, in their order."""
    structure, tensors = flatten(value, "output of the model")
    places = logit_places(structure, [tuple(x.shape) for x in tensors], num_classes, output)
    picked: list[Tensor] = list(tensors)
    for place in places:
        picked[place] = tensors[place].index_select(1, torch.tensor(classes, device=tensors[place].device))
    return structure.rebuild(iter(picked))
