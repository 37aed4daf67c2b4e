"""Which of a model's outputs are logits, whose columns are classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moda.structure import Structure, flatten_output
from moda_kernels.validation import shown

__all__ = ["Output", "check_output", "class_dim", "logit_places", "logits_of", "pick"]

Output = str | int | Sequence["str | int"] | None
"""A key or place of an output, several of them, or None for what the model's outputs say themselves."""
MOST_OUTPUTS = 1 << 20
"""No model has more; a larger number is no place of one."""


def check_output(output: Any) -> None:
    """Refuse what names no outputs.

    Raises:
        TypeError, ValueError: it is no key, no place and no sequence of them, or an empty one.
    """
    if output is None:
        return
    if isinstance(output, str | int):
        output = [output]
    if not isinstance(output, Sequence) or not all(isinstance(name, str | int) for name in output):
        raise TypeError(f"output: expected a key or place of an output, or several, got {type(output).__name__}")
    if not output:
        raise ValueError("output: expected at least one key or place of an output, got none")
    for place in output:
        if isinstance(place, int) and abs(place) > MOST_OUTPUTS:
            raise ValueError(f"output: expected a place of at most {MOST_OUTPUTS}, got {shown(place)}")


def logit_places(
    structure: Structure, shapes: Sequence[Sequence[int]], num_classes: int, output: Output = None
) -> list[int]:
    """Which of the output's tensors hold logits.

    They are `(N, num_classes)` or `(N, num_classes, ...)`; where there are none, of tokens: `(N, T, num_classes)`.
    One tensor alone is the logits. Of several, those called `logits` are, if there are any; else all that have
    `num_classes` columns (main and auxiliary heads).

    Raises:
        ValueError: none of them does, or those that `output` names do not.
    """
    paths = list(structure.paths())
    fitting = [place for place, shape in enumerate(shapes) if len(shape) >= 2 and shape[1] == num_classes]
    if not fitting:
        fitting = [place for place, shape in enumerate(shapes) if len(shape) == 3 and shape[2] == num_classes]
    if output is not None:
        return _named(paths, fitting, num_classes, output)
    if len(paths) == 1 and not fitting:
        shape = shapes[0]
        if len(shape) >= 2:
            put_out = shape[1] if len(shape) == 2 else f"{tuple(shape)}"
            raise ValueError(f"decomposition: has {num_classes} classes, but the model puts out {put_out} logits")
        raise ValueError(f"model: expected logits (N, {num_classes}) as its output, got shape {tuple(shape)}")
    called = [place for place in fitting if "logits" in paths[place]]
    if not fitting:
        got = ", ".join(f"{path} {tuple(shape)}" for path, shape in zip(paths, shapes, strict=True))
        raise ValueError(f"model: expected an output of logits (N, {num_classes}), got {got or 'no tensor'}")
    return called or fitting


def class_dim(shape: Sequence[int], num_classes: int) -> int:
    """The axis of classes in logits of this shape.

    Raises:
        ValueError: of three axes the second and the third could be it.
    """
    if len(shape) == 3 and shape[1] == shape[2] == num_classes:
        raise ValueError(
            f"model: logits of shape {tuple(shape)} do not tell which axis has the {num_classes} classes; give it "
            "inputs of another length"
        )
    return 1 if shape[1] == num_classes else 2


def _named(paths: Sequence[str], fitting: Sequence[int], num_classes: int, output: Any) -> list[int]:
    check_output(output)
    names = [output] if isinstance(output, str | int) else list(output)
    found = []
    for name in names:
        places = _places(paths, name)
        if not set(places) & set(fitting):
            raise ValueError(f"output: expected logits (N, {num_classes}), but {shown(name)} has another shape")
        found += [place for place in places if place in fitting]
    return found


def _places(paths: Sequence[str], name: str | int) -> list[int]:
    ends = (f"[{name!r}]", f".{name}")
    places = [place for place, path in enumerate(paths) if path.startswith(ends) or path == name]
    if not places:
        expected = "none, as the model puts out one tensor" if list(paths) == [""] else f"one of {list(paths)}"
        raise ValueError(f"output: expected {expected}, got {shown(name)}")
    return places


def pick(value: Any, classes: Sequence[int], num_classes: int, output: Output = None) -> Any:
    """An output of the whole model with the columns of some classes, in their order."""
    structure, tensors = flatten_output(value)
    places = logit_places(structure, [tuple(x.shape) for x in tensors], num_classes, output)
    picked: list[Tensor] = list(tensors)
    for place in places:
        dim = class_dim(tensors[place].shape, num_classes)
        picked[place] = tensors[place].index_select(dim, torch.tensor(classes, device=tensors[place].device))
    return structure.rebuild(iter(picked))


def logits_of(value: Any, num_classes: int | None = None, output: Output = None) -> Tensor:
    """The logits `(N, K)` among what a model puts out; the first of several heads.

    Args:
        value: a tensor, or tensors in a tuple, list, dict or data class.
        num_classes: K; None if it is not known: then the logits are the only tensor, or those called `logits`.
        output: which of them, by key or place.

    Raises:
        TypeError: what is put out is nothing of that.
        ValueError: none of it is logits, `output` names none, or they are not `(N, num_classes)`.
    """
    held = None if output is not None else value if isinstance(value, Tensor) else _called_logits(value)
    logits = held if isinstance(held, Tensor) else _looked_up(value, num_classes, output)
    if logits.dim() != 2 or logits.shape[1] != (num_classes or logits.shape[1]):
        raise ValueError(
            f"model: expected logits (N, {num_classes or 'K'}) as its output, "
            f"{'' if num_classes is None else f'of num_classes={num_classes}, '}got shape {tuple(logits.shape)}"
        )
    return logits


def _looked_up(value: Any, num_classes: int | None, output: Output) -> Tensor:
    structure, tensors = flatten_output(value)
    paths = list(structure.paths())
    if num_classes is not None:
        return tensors[logit_places(structure, [tuple(x.shape) for x in tensors], num_classes, output)[0]]
    if output is not None:
        check_output(output)
        first = output if isinstance(output, str | int) else output[0]
        return tensors[_places(paths, first)[0]]
    if len(tensors) != 1:
        raise ValueError(f"model: expected one tensor, or one called logits, as its output, got {paths}")
    return tensors[0]


def _called_logits(value: Any) -> Any:
    return value.get("logits") if isinstance(value, Mapping) else getattr(value, "logits", None)
