"""Composing: the smaller model of some classes, with the dropped neurons physically absent.

    compose(model, decomposition, classes)(x) == mask(model, decomposition, classes)(x)

for every model that torch.export can follow, any masks and any classes, up to rounding; checked before a composed model
is handed out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from moda.composition.composed import ComposedModel
from moda.composition.composer import Plan, composer_of
from moda.composition.ensemble import Ensemble, ensemble
from moda.composition.observed import observed
from moda.decomposition.container import Decomposition, chosen_classes
from moda.observation.taps import Taps
from moda.outputs import Output, check_output

__all__ = ["ComposedModel", "compose", "plan"]


def compose(
    model: nn.Module | Taps,
    decomposition: Decomposition,
    classes: Iterable[int],
    *,
    example: Any = None,
    output: Output = None,
    class_names: Sequence[str] | None = None,
    published: bool = True,
) -> ComposedModel | Ensemble:
    """The smaller model that holds the classes' modules and puts out only their logits.

    Modules unite, or stand side by side in an `Ensemble`, as `decomposition.combine` says.

    It computes what `mask(model, decomposition, classes)` computes, with the dropped neurons physically absent: rows
    and columns of weights, entries of norms. Its parameters are copies of their own under the model's names, trainable
    as those of `model` are, on the same device and in the same mode; `train()` and `eval()` switch between what the
    model does in training and in evaluation. `model` is left as it is.

    Args:
        model: any module, observed or not.
        decomposition: modules of this model.
        classes: class indices, each once; the outputs (N, len(classes)) are in this order.
        example: what the model is called with, at least two samples: a tensor, a tuple of positional arguments or a
            dict of keyword arguments; by default what it was called with when it was observed.
        output: which of several outputs are logits, by key or place; by default those called "logits", or those with a
            column for each class.
        class_names: names of all classes of the whole model, for the composed model to know those of its own.
        published: keep what the published composition keeps: the filter of every neuron of a depthwise convolution,
            also where nothing but zeros comes in to it, what it gives being a constant. With False such filters go.

    Raises:
        TypeError: `model` is no module, `decomposition` is none, or `classes` is no sequence of integers.
        ValueError: no class, one twice or an unknown one; the decomposition's taps, neurons or number of classes are
            not those of the model; there is no example; or torch.export cannot follow the model (the message has the
            line).
        RuntimeError: the composed model does not compute what the masked one does: a mistake of ours.
    """
    chosen = chosen_classes(decomposition, classes)
    check_output(output)
    names = _class_names(class_names, decomposition)
    if decomposition.combine != "rows":
        return ensemble(
            decomposition,
            chosen,
            lambda rows, wanted: compose(
                model, rows, wanted, example=example, output=output, class_names=names, published=published
            ),
        )
    with observed(model, decomposition.sites) as taps:
        composer = composer_of(taps, decomposition, example, output)
        return composer.compose(taps, decomposition.select(chosen), chosen, names, published=published)


def plan(
    model: nn.Module | Taps,
    decomposition: Decomposition,
    classes: Iterable[int],
    *,
    example: Any = None,
    output: Output = None,
    published: bool = True,
) -> Plan:
    """What `compose` keeps of the model; nothing is built.

    Raises:
        TypeError, ValueError: as `compose`.
    """
    chosen = chosen_classes(decomposition, classes)
    check_output(output)
    with observed(model, decomposition.sites) as taps:
        composer = composer_of(taps, decomposition, example, output)
        return composer.plan(decomposition.select(chosen), chosen, published=published)


def _class_names(given: Sequence[str] | None, decomposition: Decomposition) -> tuple[str, ...] | None:
    names = decomposition.metadata.get("class_names") if given is None else given
    if names is None:
        return None
    if isinstance(names, str) or not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"class_names: expected a sequence of names, got {type(names).__name__}")
    named = tuple(names)
    if len(named) != decomposition.num_classes:
        raise ValueError(
            f"class_names: expected {decomposition.num_classes} names, one for each class, got {len(named)}"
        )
    return named
