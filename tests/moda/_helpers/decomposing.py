"""Small decompositions, and what golden files of rates and masks hold."""

from __future__ import annotations

import numpy as np
import torch

from moda.decomposition.container import Decomposition
from moda.decomposition.rates import FiringRates
from moda.decomposition.settings import FiringRule


def golden_layers(z: dict[str, np.ndarray]) -> list[str]:
    """Names of the layers whose rates a golden file holds."""
    return sorted(key.removeprefix("rates_") for key in z if key.startswith("rates_l"))


def rates_of(layers: dict[str, torch.Tensor], sizes: list[int]) -> FiringRates:
    """Rates that have these values, up to rounding to whole samples."""
    class_sizes = torch.tensor(sizes)
    counts = {tap: (rate * class_sizes[:, None]).round().long() for tap, rate in layers.items()}
    return FiringRates(tuple(layers), layers, counts, class_sizes, 0.0)


def example() -> Decomposition:
    """Three classes and two taps, not in the order of their names."""
    masks = {
        "relu2": torch.tensor([[1, 0, 0, 1], [0, 0, 1, 1], [0, 1, 0, 0]], dtype=torch.bool),
        "relu1": torch.tensor([[1, 0], [0, 1], [0, 1]], dtype=torch.bool),
    }
    return Decomposition(masks, settings=FiringRule(0.8, 0.01).settings(), metadata={"class_sizes": [3, 4, 5]})
