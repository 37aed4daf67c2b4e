"""The tensors that firing counts and attributions are added to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Tally:
    """Tensors that a backend adds a batch's counts to, in place; all on one device.

    Attributes:
        counts: (K, C) int64 of each layer: samples of the class for which the neuron fired. Empty for attributions.
        class_sizes: (K,) int64: samples of each class.
        invalid: () int64: samples whose label is outside of [0, K); they are counted nowhere else.
        sums: (K, C) of each layer, in the accumulation dtype: pooled activations, or attributions, added over the
            class's samples. Empty where no sums are taken.
    """

    counts: Sequence[Tensor]
    class_sizes: Tensor
    invalid: Tensor
    sums: Sequence[Tensor] = ()

    def tensors(self) -> list[Tensor]:
        """All tensors of the tally."""
        return [*self.counts, self.class_sizes, self.invalid, *self.sums]
