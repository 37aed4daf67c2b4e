"""Scores: how much each neuron matters to each class, by its attribution or by its activation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moda.checks import text
from moda.decomposition.per_class import check_class_sizes, check_per_neuron


@dataclass(frozen=True, eq=False)
class NeuronScores:
    """A score of at least 0 per class and neuron; only its share of the layer matters. All tensors are on the CPU.

    Attributes:
        scores: per tap, in execution order, (K, C) float32: mean over the class's samples; 0 for a class without any.
        class_sizes: (K,) int64.

    Raises:
        TypeError, ValueError: an attribute is not as above; what the scores are is looked at by `check_scores`.
    """

    rule: ClassVar[str]
    """What a decomposition of these scores says it is made by: of `moda.decomposition.container.RULES`."""
    noun: ClassVar[str]
    """What the scores are called, in errors."""

    scores: dict[str, Tensor]
    class_sizes: Tensor

    def __post_init__(self) -> None:
        check_class_sizes(self.class_sizes)
        check_per_neuron("scores", self.scores, self.num_classes)

    @property
    def taps(self) -> tuple[str, ...]:
        """Tap names in execution order."""
        return tuple(self.scores)

    @property
    def num_classes(self) -> int:
        """K."""
        return self.class_sizes.shape[0]

    @property
    def empty_classes(self) -> list[int]:
        """Classes of which no sample was seen; their scores of 0 say nothing."""
        return [int(index) for index in (self.class_sizes == 0).nonzero().flatten()]

    @property
    def empty_layers(self) -> dict[str, list[int]]:
        """Taps at which every neuron of a class that has samples scores 0, with these classes."""
        seen = self.class_sizes > 0
        silent = {tap: (given == 0).all(1) & seen for tap, given in self.scores.items()}
        return {tap: classes.nonzero().flatten().tolist() for tap, classes in silent.items() if classes.any()}

    def described(self) -> dict[str, str]:
        """How the scores were made, for a file's description."""
        return {}

    @property
    def shares(self) -> dict[str, Tensor]:
        """Per tap (K, C) float64: the scores over the layer's sum of them; 0 where that sum is 0."""
        exact = {tap: given.double() for tap, given in self.scores.items()}
        sums = {tap: given.sum(1, keepdim=True) for tap, given in exact.items()}
        return {tap: torch.where(sums[tap] == 0, 0, given / sums[tap]) for tap, given in exact.items()}


@dataclass(frozen=True, eq=False)
class Attributions(NeuronScores):
    """Mean |sum over positions of activation x derivative of the target|, made by `moda.attribute`.

    Attributes:
        scores: see `NeuronScores`.
        class_sizes: (K,) int64.
        target: name of what was derived.
    """

    rule: ClassVar[str] = "attribution"
    noun: ClassVar[str] = "attributions"
    target: str = "margin"

    def __post_init__(self) -> None:
        super().__post_init__()
        text()("target", self.target)

    def described(self) -> dict[str, str]:
        """The target."""
        return {"target": self.target}


@dataclass(frozen=True, eq=False)
class ActivationShares(NeuronScores):
    """Mean over positions of |activation|, made by `moda.activation_shares`."""

    rule: ClassVar[str] = "share"
    noun: ClassVar[str] = "activation shares"


def check_scores(scores: Mapping[str, Tensor], name: str = "scores") -> None:
    """Per tap (K, C) floating point, finite and at least 0; `name` is what errors call them.

    Raises:
        TypeError, ValueError: they are not.
    """
    check_per_neuron(name, scores)
    for tap, given in scores.items():
        if not bool(given.isfinite().all()):
            raise ValueError(f"{name}[{tap!r}]: expected finite numbers, got NaN or infinity")
        if bool((given < 0).any()):
            raise ValueError(f"{name}[{tap!r}]: expected numbers of at least 0, got {given.min().item():g}")
