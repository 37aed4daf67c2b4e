"""MODA (arXiv 2411.01074): samples of one class should fire the same few neurons, samples of others other ones."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from moda.checks import Bounds, check_count, check_number, one_of
from moda.decomposition.attribution import attribute
from moda.decomposition.container import Decomposition
from moda.decomposition.counting import activation_shares, count_firings
from moda.decomposition.rule import decompose
from moda.decomposition.settings import RULES, BudgetRule, FiringRule
from moda.methods.base import TASK, Loader, Phase, Prepared, check_trainable
from moda.methods.mwt import check_training, sgd_phase
from moda.observation.taps import Taps, observe
from moda_kernels import modular_losses
from moda_kernels.validation import MOST_CLASSES

AFFINITY, DISPERSION, COMPACTNESS = "affinity", "dispersion", "compactness"


@dataclass(frozen=True, eq=False)
class PreparedTaps(Prepared):
    """An observed network.

    Attributes:
        taps: of the network.
    """

    taps: Taps = field(kw_only=True)


@dataclass(frozen=True)
class MODA:
    """MODA's settings; the defaults are the published ones.

    Attributes:
        affinity: weight of the affinity term (alpha).
        dispersion: weight of the dispersion term (beta).
        compactness: weight of the compactness term (gamma).
        epochs: passes over the training data.
        learning_rate: of SGD with Nesterov momentum, annealed along a cosine to 0.
        momentum: of SGD.
        rule: what a class keeps neurons by: "firing" (published), "share" or "attribution" (docs/attribution.md).
        threshold: with "firing": rate from which a class keeps a neuron.
        min_fraction: with "firing": the least share of a layer's neurons that a class keeps.
        epsilon: with the others: the share of a class's scores that is dropped.

    Raises:
        ValueError: a number is out of range, or the rule is none of these.
    """

    affinity: float = 1.0
    dispersion: float = 1.0
    compactness: float = 0.3
    epochs: int = 200
    learning_rate: float = 0.05
    momentum: float = 0.9
    rule: str = FiringRule.NAME
    threshold: float = FiringRule.threshold
    min_fraction: float = FiringRule.min_fraction
    epsilon: float = BudgetRule.epsilon

    name = "moda"

    def __post_init__(self) -> None:
        for name in (AFFINITY, DISPERSION, COMPACTNESS):
            check_number(name, getattr(self, name), Bounds(at_least=0))
        check_training(self.epochs, self.learning_rate, self.momentum)
        one_of(RULES)("rule", self.rule)
        FiringRule(self.threshold, self.min_fraction)  # which checks them, as the next one does
        BudgetRule(epsilon=self.epsilon)

    def prepare(self, model: nn.Module, num_classes: int, example: Any) -> PreparedTaps:
        """Observe the network.

        Raises:
            ValueError: there are fewer than two classes, the network is frozen, or it calls no activation function.
        """
        check_count("num_classes", num_classes, least=2, most=MOST_CLASSES)
        check_trainable(model, self.name)
        taps = observe(model, example=example)
        return PreparedTaps(model, num_classes, {"model": list(model.parameters()), "generators": []}, taps=taps)

    def phases(self) -> list[Phase]:
        """One phase: everything is trained together."""
        terms = {AFFINITY: self.affinity, DISPERSION: self.dispersion, COMPACTNESS: self.compactness}
        return [sgd_phase("train", self.epochs, self.learning_rate, self.momentum, {TASK: 1.0, **terms})]

    def loss(self, prepared: PreparedTaps, outputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Cross-entropy and the three terms on the activations of every hidden layer."""
        losses = modular_losses(prepared.taps.activations(), labels)
        return {TASK: F.cross_entropy(outputs, labels), **losses._asdict()}

    def epoch_ended(self, prepared: PreparedTaps, phase: Phase, validation: Loader | None) -> None:
        """Nothing has to be noted."""

    def extract(self, prepared: PreparedTaps, loader: Loader) -> Decomposition:
        """The neurons that each class keeps by the rule, from one pass over the training data."""
        taps, num_classes = prepared.taps, prepared.num_classes
        if self.rule == FiringRule.NAME:
            rates = count_firings(taps, loader, num_classes, progress=False)
            return decompose(rates, threshold=self.threshold, min_fraction=self.min_fraction)
        score = attribute if self.rule == "attribution" else activation_shares
        return decompose(score(taps, loader, num_classes, progress=False), epsilon=self.epsilon)
