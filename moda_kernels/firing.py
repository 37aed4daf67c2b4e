"""Statistics per class and neuron: firing counts, from which models are decomposed, and sums of pooled activations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moda_kernels.backends import select
from moda_kernels.class_totals import COUNTS, SUMS, ClassTotals, names_of
from moda_kernels.marks import is_pooled
from moda_kernels.plain import holds_numbers
from moda_kernels.precision import accumulation
from moda_kernels.validation import check_batch, check_flag, check_label_range, check_magnitude


class FiringCounter(ClassTotals):
    """Counts, over batches, for how many samples of each class each neuron fires (arXiv 2411.01074).

    A neuron fires for a sample when any of its positions exceeds `threshold` in magnitude; NaN counts as firing, as
    in the published code. Counts are int64 and live on the device of the activations; integer sums have no order, so
    they are bitwise equal from run to run.

    With `sums=True` the pooled activations (mean over positions of the absolute value; an (N, C) layer is its own,
    signed) are added up per class and neuron as well, from the same read of each activation: they say how strongly a
    neuron fires, beside how often. Without sums, reading stops at a neuron's first firing position. Sums of the same
    batches in the same order are bitwise equal from run to run, with backend "native" on any device, and for any number
    of threads; another order of samples or batches rounds differently.

    Threads may share a counter: each batch is added as a whole.

    Labels outside [0, num_classes) are an error: at once on the CPU; on a GPU, where looking would be a synchronisation
    per batch, at the next read of a result.

    Args:
        num_classes: K, at least 1.
        threshold: magnitude that a position must exceed, finite and >= 0; the published code uses 0. With any other,
            pooled activations (of `pool` or `relu_pool`) are refused: a mean says nothing about single positions.
        backend: see `moda_kernels.backends`.
        sums: also add up pooled activations.

    Raises:
        TypeError, ValueError: an argument is not as above.

    Examples:
        >>> counter = FiringCounter(num_classes=2)
        >>> counter.update([torch.tensor([[1.0, 0.0], [2.0, 3.0]])], torch.tensor([0, 0]))
        >>> counter.update([torch.tensor([[0.0, 4.0]])], torch.tensor([1]))
        >>> counter.counts[0].tolist(), counter.rates[0].tolist()
        ([[2, 1], [0, 1]], [[1.0, 0.5], [0.0, 1.0]])
    """

    _WORD = "counted"
    _SAME = "classes, threshold, sums and layers"

    def __init__(self, num_classes: int, *, threshold: float = 0.0, backend: str = "auto", sums: bool = False) -> None:
        check_flag(sums, "sums")
        super().__init__(num_classes, backend, (COUNTS, SUMS) if sums else (COUNTS,))
        self.threshold = check_magnitude(threshold, "threshold")
        self.with_sums = sums

    def update(self, activations: Sequence[Tensor], labels: Tensor) -> None:
        """Count one batch.

        Args:
            activations: one tensor per layer, (N, C) or (N, C, *spatial), floating point; the same layers in every
                call.
            labels: (N,) int64 or int32, in [0, num_classes).

        Raises:
            TypeError, ValueError: an argument is not as above, or the layers differ from earlier batches' in number,
                neurons or, with sums, between float64 and narrower; nothing is counted.
        """
        layers = check_batch(activations, labels)
        for index, layer in enumerate(layers):
            if not holds_numbers(layer):
                raise TypeError(f"activations[{index}]: expected numbers to count, got a {type(layer).__name__}")
        self._check_unpooled(layers)
        widths = [layer.shape[1] for layer in layers]
        dtypes = [accumulation(layer.dtype) for layer in layers] if self.with_sums else []
        if labels.device.type == "cpu":
            check_label_range(labels, self.num_classes)
        with self._alone():
            self._check_layers(widths, dtypes)
            implementation = select("count_firings", self.backend, layers, (labels, *self._counts))
            self._place(widths, dtypes, labels.device)
            implementation.count_firings(layers, labels, self.threshold, self._tally())

    @property
    def counts(self) -> list[Tensor]:
        """One (K, C) int64 tensor per layer: samples of the class for which the neuron fired."""
        self._check_invalid()
        return self._counts

    @property
    def rates(self) -> list[Tensor]:
        """One (K, C) float32 tensor per layer in [0, 1]: counts / class size; 0 for those of `empty_classes`."""
        sizes = self.class_sizes.clamp_min(1).double()[:, None]
        return [(count.double() / sizes).float() for count in self._counts]

    @property
    def sums(self) -> list[Tensor]:
        """One (K, C) tensor per layer: pooled activations added over the class's samples.

        float64 for float64 layers and float32 otherwise.

        Raises:
            ValueError: the counter was made without `sums=True`.
        """
        if not self.with_sums:
            raise ValueError("sums: expected a counter made with FiringCounter(..., sums=True), got one made without")
        return super().sums

    def __repr__(self) -> str:
        settings = f"num_classes={self.num_classes}, threshold={self.threshold:g}, neurons={self._widths()}"
        return f"FiringCounter({settings}{', sums=True' if self.with_sums else ''})"

    def _numbers(self) -> dict[str, float]:
        return {"threshold": self.threshold}

    def _settings(self) -> dict[str, Any]:
        return {**super()._settings(), "threshold": self.threshold, "sums": self.with_sums}

    def _expected_state(self) -> str:
        per_layer = "counts.0, sums.0, counts.1, sums.1" if self.with_sums else "counts.0, counts.1"
        return f"class_sizes, threshold and {per_layer}, ..., as of a counter made with sums={self.with_sums}"

    def _describe(self, settings: Mapping[str, Any], widths: list[int], dtypes: list[torch.dtype]) -> str:
        sums = f", sums {names_of(dtypes)}" if settings["sums"] else ""
        return f"num_classes={settings['num_classes']}, threshold={settings['threshold']:g}, neurons {widths}{sums}"

    def _check_unpooled(self, layers: Sequence[Tensor]) -> None:
        if self.threshold == 0:  # a mean of magnitudes is above 0 exactly where one of them is
            return
        for index, layer in enumerate(layers):
            if is_pooled(layer):
                raise ValueError(
                    f"activations[{index}]: expected an activation, to compare its positions with the threshold "
                    f"{self.threshold:g}, got pooled rows, which hold means over positions"
                )
