"""Scores -> decomposition: which neurons each class keeps.

The rule for firing rates is MODA's (arXiv 2411.01074) and its published code's, with the code's undefined cases
defined; the one for attributions and activation shares is in budget.py.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from moda.data.unpacking import Unpack
from moda.decomposition.budget import masks_from_scores
from moda.decomposition.choice import choose_epsilon
from moda.decomposition.container import Decomposition
from moda.decomposition.rates import FiringRates
from moda.decomposition.scores import NeuronScores
from moda.decomposition.settings import BudgetRule, FiringRule
from moda.observation.taps import Taps
from moda.outputs import Output
from moda_kernels.validation import check_flag, check_strided, shown


def masks_from_rates(
    rates: Tensor, threshold: float = FiringRule.threshold, min_fraction: float = FiringRule.min_fraction
) -> Tensor:
    """The neurons that each class keeps in one layer.

    A class keeps the neurons with rate >= threshold, compared in float32. A class that would keep fewer than
    max(1, int(min_fraction * C)) keeps its k highest rates instead (ties: lower index first), where k is that minimum
    or the size of the largest class in this layer, whichever is larger. This is the published floor, but for ties,
    which it leaves to the library.

    Args:
        rates: (K, C) floating point in [0, 1].
        threshold: in [0, 1].
        min_fraction: in [0, 1].

    Returns:
        (K, C) bool.

    Raises:
        TypeError, ValueError: an argument is not as above.

    Examples:
        >>> rates = torch.tensor([[0.95, 0.2, 1.0], [0.1, 0.3, 0.2]])  # the second class would keep nothing
        >>> masks_from_rates(rates, threshold=0.9).int().tolist()
        [[1, 0, 1], [0, 1, 1]]
    """
    FiringRule(threshold, min_fraction)  # which checks them
    _check_rates(rates)
    rates = rates.float()
    kept = rates >= torch.tensor(threshold, dtype=torch.float32, device=rates.device)
    sizes = kept.sum(1)
    minimum = max(1, int(min_fraction * rates.shape[1]))
    k = max(minimum, int(sizes.max()))
    highest = rates.argsort(dim=1, descending=True, stable=True)[:, :k]
    lifted = torch.zeros_like(kept).scatter_(1, highest, True)
    return torch.where((sizes < minimum)[:, None], lifted, kept)


def _check_rates(rates: Tensor) -> None:
    if not isinstance(rates, Tensor) or not rates.dtype.is_floating_point:
        raise TypeError(f"rates: expected a floating-point tensor, got {getattr(rates, 'dtype', type(rates).__name__)}")
    check_strided(rates, "rates")
    if rates.is_meta:
        raise TypeError("rates: expected a tensor with numbers, got one on device meta")
    if rates.dim() != 2 or 0 in rates.shape:
        raise ValueError(f"rates: expected shape (classes, neurons), got {tuple(rates.shape)}")
    if not bool(((rates >= 0) & (rates <= 1)).all()):
        raise ValueError("rates: expected values in [0, 1], got some outside of it or NaN")


def decompose(
    scores: FiringRates | NeuronScores,
    threshold: float | None = None,
    min_fraction: float | None = None,
    *,
    epsilon: float | Literal["auto"] | None = None,
    model: nn.Module | Taps | None = None,
    loader: Iterable[Any] | None = None,
    tolerance: float | None = None,
    unpack: Unpack | None = None,
    output: Output = None,
    allow_empty_classes: bool = False,
    progress: bool = True,
) -> Decomposition:
    """One module per class, by the rule that goes with the scores.

    - Firing rates, the published rule: a class keeps the neurons that fire for `threshold` of its samples, layer by
      layer (`masks_from_rates`).
    - Attributions and activation shares: a class keeps the fewest neurons, of all layers together, that hold a share of
      1 - `epsilon` of its scores (`masks_from_shares`).

    Args:
        scores: what `count_firings`, `attribute` or `activation_shares` gave.
        threshold: with firing rates: rate from which a neuron is kept, in [0, 1]; 0.9 unless given.
        min_fraction: with firing rates: the least share of a layer's neurons that a class keeps, in [0, 1]; 0.005
            unless given.
        epsilon: with the others: share of the scores that may be dropped, in [0, 1], 0.05 unless given; or "auto": the
            largest at which modules lose at most `tolerance` on pairs of classes (`choose_epsilon`).
        model: with epsilon="auto": the model that the scores are of.
        loader: with epsilon="auto": batches of training data that are kept apart for this; never test data.
        tolerance: with epsilon="auto": percentage points, 0.5 unless given.
        unpack: with epsilon="auto": see `count_firings`.
        output: with epsilon="auto": which of several outputs are the logits; see `attribute`.
        allow_empty_classes: give classes without samples a module all the same: with scores of 0 everywhere it is an
            arbitrary one (the published code's behaviour).
        progress: with epsilon="auto": show a progress bar and print the curve, on standard error.

    Raises:
        TypeError: `scores` is none of these, or an argument does not go with them.
        ValueError: a number is out of range, a score is not finite, or a class has no samples.

    Warns:
        UserWarning: a whole layer has no score for a class, so that the neuron kept there is an arbitrary one; or, with
            firing rates, classes keep nearly all neurons.
    """
    check_flag(allow_empty_classes, "allow_empty_classes")
    check_flag(progress, "progress")
    for_auto: dict[str, Any] = {
        "model": model,
        "loader": loader,
        "tolerance": tolerance,
        "unpack": unpack,
        "output": output,
    }
    if isinstance(scores, FiringRates):
        _check_unused({"epsilon": epsilon, **for_auto}, "attributions or activation shares", "firing rates")
        _check_seen(scores, allow_empty_classes)
        return _by_threshold(scores, _or(threshold, FiringRule.threshold), _or(min_fraction, FiringRule.min_fraction))
    if not isinstance(scores, NeuronScores):
        raise TypeError(
            "scores: expected FiringRates from count_firings, Attributions from attribute or ActivationShares from "
            f"activation_shares, got {type(scores).__name__}"
        )
    _check_unused({"threshold": threshold, "min_fraction": min_fraction}, "firing rates", scores.noun)
    _check_seen(scores, allow_empty_classes)
    if not (isinstance(epsilon, str) and epsilon == "auto"):
        _check_unused(for_auto, 'epsilon="auto"', f"epsilon={shown(epsilon)}")
        return _by_budget(scores, _or(epsilon, 0.05))
    if model is None or loader is None:
        missing = "model" if model is None else "loader"
        raise TypeError(f'{missing}: expected the {_NEEDED[missing]} with epsilon="auto", got none')
    choice = choose_epsilon(
        scores, model, loader, tolerance=_or(tolerance, 0.5), unpack=unpack, output=output, progress=progress
    )
    return _by_budget(scores, choice.epsilon, choice.to_dict())


_STRICT = 0.5  # a threshold from which on neurons are meant to be dropped
_NEARLY_ALL = 0.95

_NEEDED = {"model": "model that the scores are of", "loader": "batches of training data that are kept apart"}


def _or(given: float | None, default: float) -> float:
    return default if given is None else given


def _check_unused(arguments: Mapping[str, Any], wanted: str, got: str) -> None:
    """None of these is given: they go with other scores, or another epsilon, than what was."""
    for name, value in arguments.items():
        if value is not None:
            raise TypeError(f"{name}: goes with {wanted}, got it with {got}")


def _check_seen(scores: FiringRates | NeuronScores, allow_empty_classes: bool) -> None:
    if scores.empty_classes and not allow_empty_classes:
        raise ValueError(
            f"scores: expected samples of every class, got none of classes {scores.empty_classes}; count over data "
            "that has them, or pass allow_empty_classes=True to give them arbitrary modules"
        )


def _by_threshold(rates: FiringRates, threshold: float, min_fraction: float) -> Decomposition:
    masks = {tap: masks_from_rates(rates.rates[tap], threshold, min_fraction) for tap in rates.taps}
    share = sum(int(mask.sum()) for mask in masks.values()) / sum(mask.numel() for mask in masks.values())
    if threshold >= _STRICT and share > _NEARLY_ALL:
        warnings.warn(
            f"rates: a class keeps {share:.1%} of the neurons on average, because nearly all of them fire for nearly "
            "every sample: smooth activations (GELU, SiLU, ...) are hardly ever exactly 0, and on large images a ReLU "
            "neuron fires somewhere for every sample. The rule for attributions tells neurons apart there: "
            "moda.decompose(moda.attribute(model, loader, num_classes)), or --rule attribution",
            stacklevel=3,
        )
    metadata = {**_samples(rates), "firing_threshold": rates.threshold}
    return Decomposition(masks, settings=FiringRule(threshold, min_fraction).settings(), metadata=metadata)


def _by_budget(scores: NeuronScores, epsilon: float, chosen: Mapping[str, Any] | None = None) -> Decomposition:
    masks = masks_from_scores(scores, epsilon)
    silent = scores.empty_layers
    if silent:
        told = "; ".join(f"{tap} for classes {classes}" for tap, classes in silent.items())
        warnings.warn(
            f"scores: every neuron of a layer scores 0, and the one kept there is arbitrary: {told}", stacklevel=3
        )
    metadata = {**_samples(scores), "empty_layers": silent, **scores.described()}
    if chosen is not None:
        metadata["epsilon_auto"] = dict(chosen)
    return Decomposition(masks, settings=BudgetRule(scores.rule, float(epsilon)).settings(), metadata=metadata)


def _samples(scores: FiringRates | NeuronScores) -> dict[str, Any]:
    return {"class_sizes": scores.class_sizes.tolist(), "empty_classes": scores.empty_classes}
