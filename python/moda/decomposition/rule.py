"""Firing rates -> decomposition: which neurons each class keeps.

Rules as in MODA (arXiv 2411.01074) and its published code, with the code's undefined cases defined.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moda.decomposition.container import Decomposition
from moda.decomposition.rates import FiringRates
from moda.decomposition.settings import FiringRule


def masks_from_rates(rates: Tensor, threshold: float = 0.9, min_fraction: float = 0.005) -> Tensor:
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

    Example:
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
    if rates.dim() != 2 or 0 in rates.shape:
        raise ValueError(f"rates: expected shape (classes, neurons), got {tuple(rates.shape)}")
    if not bool(((rates >= 0) & (rates <= 1)).all()):
        raise ValueError("rates: expected values in [0, 1], got some outside of it or NaN")


def decompose(
    rates: FiringRates, threshold: float = 0.9, min_fraction: float = 0.005, *, allow_empty_classes: bool = False
) -> Decomposition:
    """One module per class from firing rates, by `masks_from_rates` at every tap.

    Args:
        rates: what `count_firings` gave.
        threshold: rate from which a neuron is kept, in [0, 1].
        min_fraction: the least share of a layer's neurons that a class keeps, in [0, 1].
        allow_empty_classes: give classes without samples a module all the same: with rates of 0 everywhere it is an
            arbitrary one (the published code's behaviour).

    Raises:
        TypeError: `rates` is no FiringRates.
        ValueError: a number is out of range, or a class has no samples.
    """
    if not isinstance(rates, FiringRates):
        raise TypeError(f"rates: expected FiringRates from count_firings, got {type(rates).__name__}")
    empty = rates.empty_classes
    if empty and not allow_empty_classes:
        raise ValueError(
            f"rates: expected samples of every class, got none of classes {empty}; count over data that has them, or "
            "pass allow_empty_classes=True to give them arbitrary modules"
        )
    masks = {tap: masks_from_rates(rates.rates[tap], threshold, min_fraction) for tap in rates.taps}
    metadata = {
        "class_sizes": rates.class_sizes.tolist(),
        "empty_classes": empty,
        "firing_threshold": rates.threshold,
    }
    return Decomposition(masks, settings=FiringRule(threshold, min_fraction).settings(), metadata=metadata)
