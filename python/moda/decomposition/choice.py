"""The largest epsilon whose modules are as good as the model, found on training data that is kept apart.

Pairs of classes are the binding case: a module of more classes holds more neurons and loses less. All pairs are scored
in the same forward passes: every sample of a batch runs as the masked model of its class and one other, each row of the
batch with the neurons of its own pair.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from moda.data.unpacking import Inputs, Unpack
from moda.decomposition.budget import masks_from_scores
from moda.decomposition.passes import batches
from moda.decomposition.scores import NeuronScores
from moda.decomposition.settings import check_fraction
from moda.inference import device_of, evaluating
from moda.observation.taps import Taps, observing
from moda.outputs import Output, check_output, logits_of
from moda_kernels.validation import check_label_range

CANDIDATES = (0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3)
ALL_PAIRS_TO = 10
"""Classes of which all pairs are scored; of more, each sample runs in pairs with `2 * SPREAD` others."""
SPREAD = 4


@dataclass(frozen=True)
class EpsilonPoint:
    """What modules at one epsilon lose. Accuracies and losses are means over pairs of classes, in percent.

    Attributes:
        epsilon: share of the scores that is dropped.
        kept: mean share of the neurons that a class keeps, in [0, 1].
        model: accuracy of the whole model, with the logits of the pair alone competing.
        modules: of the masked models of the pairs.
        loss: `model - modules`.
    """

    epsilon: float
    kept: float
    model: float
    modules: float
    loss: float


@dataclass(frozen=True)
class EpsilonChoice:
    """The epsilon chosen, and the curve it was read from.

    Attributes:
        epsilon: the largest candidate whose modules lose at most `tolerance`; 0, which drops nothing that has a score,
            if there is none.
        tolerance: percentage points.
        samples: on which the curve was measured.
        curve: ascending.
    """

    epsilon: float
    tolerance: float
    samples: int
    curve: tuple[EpsilonPoint, ...]

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON can hold them."""
        return asdict(self)

    def lines(self) -> list[str]:
        """The curve as text, the choice marked."""
        told = [
            f"{'->' if point.epsilon == self.epsilon else '  '} epsilon {point.epsilon:<5g} keeps "
            f"{100 * point.kept:5.1f} % of the neurons, pairs of classes lose {point.loss:+.2f} points "
            f"({point.model:.2f} -> {point.modules:.2f} %)"
            for point in self.curve
        ]
        return [*told, f"epsilon {self.epsilon:g}: at most {self.tolerance:g} points lost on {self.samples} samples"]


def choose_epsilon(
    scores: NeuronScores,
    model: nn.Module | Taps,
    loader: Iterable[Any],
    *,
    tolerance: float = 0.5,
    candidates: Sequence[float] = CANDIDATES,
    unpack: Unpack | None = None,
    output: Output = None,
    progress: bool = True,
) -> EpsilonChoice:
    """The largest epsilon whose modules lose at most `tolerance` on pairs of classes, and the curve.

    The loss is the mean over pairs of classes of the whole model's accuracy, with the two logits alone competing, less
    that of the masked model. With more than ten classes each sample runs in pairs with eight others, evenly spread.

    Args:
        scores: of this model, finite.
        model: the model, observed or not, or its taps.
        loader: batches of training data that neither the training nor the scores saw; never test data. It is run
            through once.
        tolerance: percentage points, at least 0.
        candidates: epsilons in [0, 1], at least one.
        unpack: how to take a batch apart; see `count_firings`.
        output: which of several outputs are the logits; see `attribute`.
        progress: show a progress bar and print the curve, on standard error.

    Raises:
        TypeError, ValueError: an argument is not as above, or the loader lacks samples of a class.
    """
    if not isinstance(scores, NeuronScores):
        raise TypeError(f"scores: expected Attributions or ActivationShares, got {type(scores).__name__}")
    if isinstance(candidates, str | bytes) or not isinstance(candidates, Sequence):
        raise TypeError(f"candidates: expected a sequence of epsilons, got {type(candidates).__name__}")
    for value in candidates:
        check_fraction("candidates", value)
    if not candidates:
        raise ValueError("candidates: expected at least one epsilon, got none")
    check_output(output)
    if isinstance(tolerance, bool) or not isinstance(tolerance, (int, float)):
        raise TypeError(f"tolerance: expected a number of percentage points, got {type(tolerance).__name__}")
    if not tolerance >= 0:
        raise ValueError(f"tolerance: expected percentage points of at least 0, got {tolerance}")
    given = batches(loader, "Choosing epsilon", progress, unpack)
    epsilons = sorted(set(map(float, candidates)))
    with observing(model) as taps, evaluating(taps.model), torch.no_grad():
        device = device_of(taps.model)
        pairs = _Pairs(scores, epsilons, device, output)
        for inputs, labels, _ in given:
            check_label_range(labels, scores.num_classes)
            pairs.add(taps, inputs.to(device), labels.to(device).long())
    curve = pairs.curve()
    fitting = [point.epsilon for point in curve if point.loss <= tolerance]
    choice = EpsilonChoice(max(fitting, default=0.0), float(tolerance), pairs.samples, curve)
    if progress:
        for line in choice.lines():
            Console(stderr=True).print(line, highlight=False, markup=False, soft_wrap=True)
    return choice


class _Pairs:
    """Right answers of the whole model and of the masked models, for every pair of classes."""

    def __init__(self, scores: NeuronScores, epsilons: Sequence[float], device: torch.device, output: Output) -> None:
        self._epsilons = epsilons
        self._output = output
        self._classes = classes = scores.num_classes
        self._taps = scores.taps
        self._masks = [_to(masks_from_scores(scores, value), device) for value in epsilons]
        # [0]: the whole model; [class of the sample, the other class]
        self._right = torch.zeros(1 + len(epsilons), classes, classes, dtype=torch.int64, device=device)
        self._all = torch.zeros(classes, classes, dtype=torch.int64, device=device)

    def add(self, taps: Taps, inputs: Inputs, labels: Tensor) -> None:
        """Run a batch as the whole model, and with every sample masked for each of its pairs."""
        whole = self._logits(taps, inputs)
        if taps.names != self._taps:
            raise ValueError(f"scores: expected the taps of the model {taps.names}, got {self._taps}")
        for shift in partners(self._classes):
            others = (labels + shift) % self._classes
            self._all.index_put_((labels, others), torch.ones_like(labels), accumulate=True)
            self._score(0, whole, labels, others)
            for number, masks in enumerate(self._masks, 1):
                kept = [mask[labels] | mask[others] for mask in masks]
                with taps.replacing(partial(_masked, kept)):
                    self._score(number, self._logits(taps, inputs), labels, others)

    def _logits(self, taps: Taps, inputs: Inputs) -> Tensor:
        return logits_of(inputs.into(taps.model), self._classes, self._output)

    def _score(self, number: int, logits: Tensor, labels: Tensor, others: Tensor) -> None:
        own, other = (logits.gather(1, of[:, None])[:, 0] for of in (labels, others))
        right = (own > other) | ((own == other) & (labels < others))  # of equal logits the first wins, as in argmax
        self._right[number].index_put_((labels, others), right.long(), accumulate=True)

    @property
    def samples(self) -> int:
        """Samples seen."""
        return int(self._all.sum()) // len(partners(self._classes))

    def curve(self) -> tuple[EpsilonPoint, ...]:
        """A point for every epsilon.

        Raises:
            ValueError: a class had no sample.
        """
        missing = (self._all.sum(1) == 0).nonzero().flatten().tolist()
        if missing:
            raise ValueError(f"loader: expected samples of every class, got none of classes {missing}")
        of_pairs = (self._all + self._all.T).triu(1)
        shares = (self._right + self._right.transpose(1, 2)).triu(1).double() / of_pairs.clamp_min(1)
        whole, *masked = (100 * shares.sum((1, 2)) / (of_pairs > 0).sum()).tolist()
        kept = [float(torch.cat(masks, dim=1).double().mean()) for masks in self._masks]
        return tuple(
            EpsilonPoint(value, share, whole, modules, whole - modules)
            for value, share, modules in zip(self._epsilons, kept, masked, strict=True)
        )


def partners(classes: int) -> list[int]:
    """How far the other classes of a sample's pairs are from its own; with each distance its opposite."""
    if classes <= ALL_PAIRS_TO:
        return list(range(1, classes))
    near = [1 + round(step * ((classes - 1) // 2 - 1) / (SPREAD - 1)) for step in range(SPREAD)]
    return sorted({*near, *(classes - distance for distance in near)})


def _to(masks: Mapping[str, Tensor], device: torch.device) -> list[Tensor]:
    return [mask.to(device) for mask in masks.values()]


def _masked(kept: Sequence[Tensor], index: int, activation: Tensor) -> Tensor:
    rows = kept[index].to(activation.dtype)
    return activation * rows.reshape(*rows.shape, *(1,) * (activation.dim() - 2))
