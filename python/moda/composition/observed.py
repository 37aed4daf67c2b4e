"""The taps of a model at the sites of a decomposition, and the example that composition runs the model on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moda.composition.capture import Example
from moda.decomposition.container import Decomposition
from moda.observation.labels import dim_of_samples
from moda.observation.taps import Taps, observing

__all__ = ["check_taps", "example_of", "names_every_tap", "observed"]


@contextmanager
def observed(model: nn.Module | Taps, sites: Iterable[str], taps: Taps | None = None) -> Iterator[Taps]:
    """The taps of a model at these sites inside this block; afterwards the model is observed as it was before.

    Args:
        model: any module, observed or not; or its taps.
        sites: of a decomposition: names of taps, or paths of modules whose outputs a method acts on.
        taps: those that an earlier block made, to be used again.

    Raises:
        TypeError: `model` is neither a module nor the taps of one.
    """
    with observing(model, taps, sites=sites) as present:
        yield present


def names_every_tap(decomposition: Decomposition) -> bool:
    """Whether a decomposition has masks for every tap of its model.

    The method "moda" acts on all activations. Others may leave some alone; what they do not name keeps its neurons.
    """
    return decomposition.method == "moda"


def check_taps(names: Iterable[str], widths: Iterable[int], masked: dict[str, int], every: bool) -> None:
    """Compare a model's taps with the sites of a decomposition.

    Args:
        names: of the taps.
        widths: neurons of the taps.
        masked: neurons per site.
        every: whether each tap is to be a site.

    Raises:
        ValueError: names or widths differ.
    """
    present = dict(zip(names, widths, strict=True))
    missing = [name for name in present if name not in masked] if every else []
    unknown = [name for name in masked if name not in present]
    if missing or unknown:
        raise ValueError(
            f"decomposition: its taps are not those of the model: it lacks {missing}, and the model lacks {unknown}"
        )
    for name, width in masked.items():
        if present[name] != width:
            raise ValueError(
                f"decomposition: tap {name!r} has masks of {width} neurons, but the model has {present[name]} there"
            )


def example_of(taps: Taps, given: Any) -> Example:
    """The example to compose with: the one given, or the one that the probe kept; of at least two samples.

    Raises:
        ValueError: there is none.
    """
    if given is None and taps.example is None:
        raise ValueError(
            "example: expected an input of the model (a tensor, a tuple of positional arguments or a dict of keyword "
            "arguments), as the model was not observed while it ran; pass example="
        )
    example = Example(*taps.example) if given is None and taps.example is not None else Example.of(given)
    _, tensors = example.flat()
    axes = [dim_of_samples(x.shape, taps.sample_dim) for x in tensors]
    if tensors and all(x.dim() and x.shape[axis] == 1 for x, axis in zip(tensors, axes, strict=True)):
        twice = partial(_twice, taps.sample_dim)
        return Example(*torch.utils._pytree.tree_map(twice, (example.args, dict(example.kwargs))))
    return example


def _twice(sample_dim: int, value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return torch.cat([value, value], dim_of_samples(value.shape, sample_dim))
