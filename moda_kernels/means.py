"""Mean activation of every neuron for every class, from sums per class."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moda_kernels.backends import Backend, select
from moda_kernels.pooling import pool
from moda_kernels.validation import check_batch, check_label_range, check_num_classes


@torch.no_grad()
def class_means(
    activations: Sequence[Tensor], labels: Tensor, num_classes: int, *, backend: str = "auto"
) -> list[Tensor]:
    """Mean pooled activation of every neuron over the samples of each class.

    The firing rate says how often a neuron fires for a class; this says how strongly.

    Args:
        activations: one tensor per layer, (N, C) or (N, C, *spatial), floating point.
        labels: (N,) int64 or int32, in [0, num_classes); read on the host to check this.
        num_classes: K, at least 1.
        backend: see `moda_kernels.backends`.

    Returns:
        One (K, C) tensor per layer, float64 for float64 layers and float32 otherwise; 0 for a class without samples.

    Raises:
        TypeError, ValueError: an argument is not as above.
        BackendUnavailableError: the backend asked for cannot run.

    Examples:
        >>> class_means([torch.tensor([[1.0, 0.0], [3.0, 0.5]])], torch.tensor([1, 1]), num_classes=2)[0].tolist()
        [[0.0, 0.0], [2.0, 0.25]]
    """
    check_num_classes(num_classes)
    layers = check_batch(activations, labels)
    check_label_range(labels, num_classes)
    pooled = pool(layers, backend=backend)
    index = labels.long()
    sums = summing_backend(backend, pooled, labels).class_sums(pooled, index, num_classes, normalize=False)
    sizes = torch.zeros(num_classes, dtype=torch.int64, device=labels.device).index_add(
        0, index, torch.ones_like(index)
    )
    return [mean_of_classes(total, sizes) for total in sums]


def summing_backend(requested: str, pooled: Sequence[Tensor], labels: Tensor) -> Backend:
    """The backend that adds rows up over classes: the one asked for, but plain PyTorch for "reference"."""
    return select("class_sums", "torch" if requested == "reference" else requested, pooled, (labels,))


def mean_of_classes(total: Tensor, sizes: Tensor) -> Tensor:
    """(K, C) means from sums over each class and the (K,) class sizes; 0 for a class without samples."""
    return total / sizes.clamp_min(1)[:, None]
