"""Firing counts per class and neuron: the statistic behind a decomposition."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moda_kernels.backends import select
from moda_kernels.validation import check_batch, check_label_range, check_num_classes

if TYPE_CHECKING:
    from moda_kernels.distributed import Group


class FiringCounter:
    """Counts, over batches, for how many samples of each class each neuron fires (arXiv 2411.01074).

    A neuron fires for a sample when any of its positions exceeds `threshold` in magnitude; NaN counts as firing, as
    in the published code. Counts are int64 and live on the device of the activations; integer sums have no order, so
    they are bitwise equal from run to run.

    Labels outside [0, num_classes) are an error: at once on the CPU; on a GPU, where looking would be a synchronisation
    per batch, at the next read of a result.

    Args:
        num_classes: K, at least 1.
        threshold: magnitude that a position must exceed, finite and >= 0; the published code uses 0.
        backend: see `moda_kernels.backends`.

    Raises:
        TypeError, ValueError: an argument is not as above.

    Example:
        >>> counter = FiringCounter(num_classes=10)
        >>> for x, y in loader:
        ...     model(x)
        ...     counter.update(model.activations(), y)
        >>> counter.rates[0].shape     # (10, neurons of the first layer)
    """

    def __init__(self, num_classes: int, *, threshold: float = 0.0, backend: str = "auto") -> None:
        check_num_classes(num_classes)
        if not (math.isfinite(threshold) and threshold >= 0):
            raise ValueError(f"threshold: expected a finite number of at least 0, got {threshold}")
        self.num_classes = num_classes
        self.threshold = float(threshold)
        self.backend = backend
        self._counts: list[Tensor] = []
        self._class_sizes = torch.zeros(num_classes, dtype=torch.int64)
        self._invalid = torch.zeros((), dtype=torch.int64)

    @torch.no_grad()
    def update(self, activations: Sequence[Tensor], labels: Tensor) -> None:
        """Count one batch.

        Args:
            activations: one tensor per layer, (N, C) or (N, C, *spatial), floating point; the same layers in every
                call.
            labels: (N,) int64 or int32, in [0, num_classes).

        Raises:
            TypeError, ValueError: an argument is not as above, or the layers differ from earlier batches'; nothing
                is counted.
        """
        layers = check_batch(activations, labels)
        self._check_widths([layer.shape[1] for layer in layers])
        if labels.device.type == "cpu":
            check_label_range(labels, self.num_classes)
        implementation = select("count_firings", self.backend, layers)
        self._place(layers)
        implementation.count_firings(layers, labels, self.threshold, self._counts, self._class_sizes, self._invalid)

    @property
    def counts(self) -> list[Tensor]:
        """One (K, C) int64 tensor per layer: samples of the class for which the neuron fired."""
        self._check_invalid()
        return self._counts

    @property
    def class_sizes(self) -> Tensor:
        """(K,) int64: samples seen of each class."""
        self._check_invalid()
        return self._class_sizes

    @property
    def rates(self) -> list[Tensor]:
        """One (K, C) float32 tensor per layer in [0, 1]: counts / class size; 0 for those of `empty_classes`."""
        sizes = self.class_sizes.clamp_min(1).double()[:, None]
        return [(count.double() / sizes).float() for count in self._counts]

    @property
    def empty_classes(self) -> list[int]:
        """Classes of which no sample was seen; their rates of 0 say nothing. Reads the sizes on the host."""
        return (self.class_sizes == 0).nonzero().flatten().tolist()

    def merge(self, other: FiringCounter) -> None:
        """Add the counts of another counter of the same classes, threshold and layers.

        Raises:
            ValueError: the counters differ in one of these; nothing is added.
        """
        for name in ("num_classes", "threshold"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                raise ValueError(f"other: expected {name}={mine} as here, got {theirs}")
        if not other.counts:
            return
        self._check_widths([count.shape[1] for count in other.counts])
        self._place(other.counts)
        device = self._class_sizes.device
        for mine, theirs in zip(self._counts, other.counts, strict=True):
            mine += theirs.to(device)
        self._class_sizes += other.class_sizes.to(device)

    def all_reduce(self, group: Group) -> None:
        """Replace the counts on every rank by their sums over the ranks of a process group.

        Integer sums have no order: every rank ends with the same counts, whatever the number of ranks that shared the
        samples. A rank that counted no batch takes part. Calling it twice counts twice.

        Args:
            group: a process group that this process is in, or "world" for the default one.

        Raises:
            TypeError, ValueError: `group` is none, or the ranks' counters differ in classes, threshold or layers; then
                on every rank, and nothing is added.
        """
        from moda_kernels import distributed  # brings in torch's compiler, which is slow to import

        process_group = distributed.resolve_group(group)
        mine = (self.num_classes, self.threshold, tuple(count.shape[1] for count in self._counts))
        everyone = distributed.gather_objects(mine, process_group)
        widths = max(theirs for _, _, theirs in everyone)
        if {(*settings, seen or widths) for *settings, seen in everyone} != {(*mine[:2], widths)}:
            described = [f"num_classes={k}, threshold={t:g}, neurons {list(seen)}" for k, t, seen in everyone]
            raise ValueError(
                f"group: expected the same classes, threshold and layers on every rank, got "
                f"{distributed.describe(described)}"
            )
        device = self._class_sizes.device
        counts = self._counts or [
            torch.zeros(self.num_classes, width, dtype=torch.int64, device=device) for width in widths
        ]
        *self._counts, self._class_sizes, self._invalid = distributed.sum_counts(
            [*counts, self._class_sizes, self._invalid], process_group
        )

    def state_dict(self) -> dict[str, Tensor]:
        """Counts, sizes and settings as tensors; `load_state_dict` takes it back, safetensors can hold it."""
        state = {f"counts.{index}": count for index, count in enumerate(self.counts)}
        state["class_sizes"] = self._class_sizes
        state["threshold"] = torch.tensor(self.threshold, dtype=torch.float64)
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` gave, in place of what was counted so far.

        Raises:
            ValueError: entries are missing, unknown or of another shape or dtype; the counter stays as it was.
        """
        layers = len(state) - 2
        names = [f"counts.{index}" for index in range(layers)]
        if set(state) != {*names, "class_sizes", "threshold"}:
            raise ValueError(f"state: expected class_sizes, threshold and counts.0, counts.1, ..., got {sorted(state)}")
        for name in [*names, "class_sizes"]:
            _check_count_tensor(name, state[name], self.num_classes)
        threshold = float(state["threshold"])
        if threshold != self.threshold:
            raise ValueError(f"state['threshold']: expected {self.threshold} as here, got {threshold}")
        self._counts = [state[name].clone() for name in names]
        self._class_sizes = state["class_sizes"].clone()
        self._invalid = torch.zeros((), dtype=torch.int64, device=self._class_sizes.device)

    def __repr__(self) -> str:
        widths = [count.shape[1] for count in self._counts]
        return f"FiringCounter(num_classes={self.num_classes}, threshold={self.threshold:g}, neurons={widths})"

    def _check_widths(self, widths: list[int]) -> None:
        counted = [count.shape[1] for count in self._counts]
        if counted and counted != widths:
            raise ValueError(f"activations: expected layers of {counted} neurons as counted so far, got {widths}")

    def _place(self, layers: Sequence[Tensor]) -> None:
        """Counts for `layers`, made at the first batch, on the device of the layers."""
        device = layers[0].device
        if not self._counts:
            self._counts = [
                torch.zeros(self.num_classes, layer.shape[1], dtype=torch.int64, device=device) for layer in layers
            ]
        if self._class_sizes.device != device:
            self._counts = [count.to(device) for count in self._counts]
            self._class_sizes, self._invalid = self._class_sizes.to(device), self._invalid.to(device)

    def _check_invalid(self) -> None:
        invalid = int(self._invalid)
        if invalid:
            raise ValueError(
                f"labels: expected classes in [0, {self.num_classes}), got {invalid} samples with a class outside of it"
            )


def _check_count_tensor(name: str, tensor: Any, num_classes: int) -> None:
    dims = 1 if name == "class_sizes" else 2
    if tensor.dtype != torch.int64 or tensor.dim() != dims or tensor.shape[0] != num_classes:
        shape = f"({num_classes},)" if dims == 1 else f"({num_classes}, C)"
        raise ValueError(f"state[{name!r}]: expected int64 of shape {shape}, got {tensor.dtype} {tuple(tensor.shape)}")
