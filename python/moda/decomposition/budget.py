"""Scores -> masks with one budget for all layers: the fewest neurons that hold a share 1 - epsilon of all scores.

Per class, each layer's scores are divided by their sum, so that every layer brings 1 to the total. All neurons of all
layers are then sorted together. A budget per layer would keep too little of narrow early layers, which are nearly all
needed, and too much of wide late ones (docs/attribution.md).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from moda.decomposition.scores import NeuronScores, check_scores
from moda.decomposition.settings import check_fraction

_ROUNDING = 1e-12
"""Of the total: ten shares of 0.1 do not add up to 1 in float64, and still nine of them hold 0.9."""


def masks_from_scores(scores: NeuronScores, epsilon: float = 0.05) -> dict[str, Tensor]:
    """`masks_from_shares` of the scores' shares of their layers.

    Raises:
        TypeError, ValueError: a score is not finite or below 0, or `epsilon` is not in [0, 1].
    """
    if not isinstance(scores, NeuronScores):
        raise TypeError(f"scores: expected Attributions or ActivationShares, got {type(scores).__name__}")
    check_scores(scores.scores)
    return masks_from_shares(scores.shares, epsilon)


def masks_from_shares(shares: Mapping[str, Tensor], epsilon: float = 0.05) -> dict[str, Tensor]:
    """The neurons that each class keeps, at every tap.

    A class keeps the fewest neurons, of all taps together, whose shares hold 1 - epsilon of their total (ties: earlier
    tap first, then lower index), and at every tap at least the neuron with the highest share.

    Args:
        shares: per tap (K, C) floating point, finite and at least 0.
        epsilon: in [0, 1]; 0 keeps every neuron whose share is not 0.

    Returns:
        Per tap (K, C) bool.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    check_fraction("epsilon", epsilon)
    check_scores(shares, "shares")
    together = torch.cat([given.double() for given in shares.values()], dim=1)
    ordered, order = together.sort(dim=1, descending=True, stable=True)
    running = ordered.cumsum(1)
    needed = (1 - epsilon) * running[:, -1:] - _ROUNDING * running[:, -1:]
    # A neuron is kept while those before it do not hold enough.
    before = torch.cat([torch.zeros_like(running[:, :1]), running[:, :-1]], dim=1)
    kept = torch.zeros_like(together, dtype=torch.bool).scatter_(1, order, before < needed)
    widths = [given.shape[1] for given in shares.values()]
    return {
        tap: mask.scatter(1, given.argmax(1, keepdim=True), True)
        for (tap, given), mask in zip(shares.items(), kept.split(widths, dim=1), strict=True)
    }
