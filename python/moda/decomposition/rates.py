"""Firing rates: for how many samples of each class each neuron fires."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class FiringRates:
    """For how many samples of each class each neuron fires. All tensors are on the CPU.

    Attributes:
        taps: tap names in execution order.
        rates: per tap (K, C) float32, counts / class size; 0 for a class without samples.
        counts: per tap (K, C) int64.
        class_sizes: (K,) int64.
        threshold: the magnitude that a position had to exceed.
    """

    taps: tuple[str, ...]
    rates: dict[str, Tensor]
    counts: dict[str, Tensor]
    class_sizes: Tensor
    threshold: float = 0.0

    def __post_init__(self) -> None:
        for name in ("rates", "counts"):
            given = list(getattr(self, name))
            if given != list(self.taps):
                raise ValueError(f"{name}: expected the taps {list(self.taps)} in this order, got {given}")

    @property
    def num_classes(self) -> int:
        """K."""
        return self.class_sizes.shape[0]

    @property
    def empty_classes(self) -> list[int]:
        """Classes of which no sample was seen; their rates of 0 say nothing."""
        return [int(index) for index in (self.class_sizes == 0).nonzero().flatten()]
