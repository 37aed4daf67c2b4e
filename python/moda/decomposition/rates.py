"""Firing rates: for how many samples of each class each neuron fires."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from moda.checks import items, text
from moda.decomposition.per_class import check_class_sizes, check_per_neuron
from moda_kernels.validation import check_magnitude, shown


@dataclass(frozen=True, eq=False)
class FiringRates:
    """For how many samples of each class each neuron fires. All tensors are on the CPU.

    Attributes:
        taps: tap names in execution order.
        rates: per tap (K, C) float32, counts / class size; 0 for a class without samples.
        counts: per tap (K, C) int64.
        class_sizes: (K,) int64.
        threshold: the magnitude that a position had to exceed.

    Raises:
        TypeError, ValueError: an attribute is not as above.
    """

    taps: tuple[str, ...]
    rates: dict[str, Tensor]
    counts: dict[str, Tensor]
    class_sizes: Tensor
    threshold: float = 0.0

    def __post_init__(self) -> None:
        items(text(empty=True), least=1)("taps", self.taps)
        for name in ("rates", "counts"):
            given = getattr(self, name)
            if isinstance(given, Mapping) and list(given) != list(self.taps):
                raise ValueError(f"{name}: expected the taps {list(self.taps)} in this order, got {shown(list(given))}")
        check_class_sizes(self.class_sizes)
        check_per_neuron("rates", self.rates, self.num_classes)
        check_per_neuron("counts", self.counts, self.num_classes, torch.int64)
        check_magnitude(self.threshold, "threshold")

    @property
    def num_classes(self) -> int:
        """K."""
        return self.class_sizes.shape[0]

    @property
    def empty_classes(self) -> list[int]:
        """Classes of which no sample was seen; their rates of 0 say nothing."""
        return [int(index) for index in (self.class_sizes == 0).nonzero().flatten()]
