"""The published implementation as it is: the oracle of the tests and the baseline of the benchmarks.

N x N cosine similarities and lists of pair indices per layer (with the host synchronisation that building such a list
takes), gradients by autograd; firing rates by a loop over classes; masks by a loop over classes and layers
(arXiv 2411.01074, section 3). Where the published code logs NaN (no pair of a kind), so do
`published_losses`; as a backend, the edge rules of `moda_kernels.modular_losses` apply.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from moda_kernels import closed_form
from moda_kernels.segments import Segments
from moda_kernels.tally import Tally

OPS = frozenset({"grouped_losses", "pool", "relu_pool", "count_firings", "add_attributions"})
DTYPES: Mapping[str, frozenset[torch.dtype]] = {op: closed_form.DTYPES[op] for op in OPS}
READS_MEMORY = False
DEVICES: Mapping[str, frozenset[str]] | None = None  # any

pool = closed_form.pool
relu_pool = closed_form.relu_pool


def unavailable(device: torch.device | None = None) -> str | None:
    """Plain PyTorch always runs."""
    return None


def normalized_rows(pooled: Tensor) -> Tensor:
    """Rows divided by max(L2 norm, 1e-12), as in the published code.

    Two rules differ from it: rows whose squares might leave the dtype's range are first divided by their largest
    magnitude, and an all-zero row gets gradient 0 (published: g / 1e-12).
    """
    largest = pooled.detach().abs().amax(1, keepdim=True)
    rows = F.normalize(pooled / torch.where(largest > 1e9, largest, 1), dim=1, eps=closed_form.EPS)
    return torch.where(largest == 0, 0, rows)


def published_losses(activations: Sequence[Tensor], labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(affinity, dispersion, compactness) of (N, C) or (N, C, *spatial) activations; NaN where a kind has no pair."""
    affinities, dispersions, pools = [], [], []
    for activation in activations:
        pooled = closed_form.pooled_activation(activation)
        rows = normalized_rows(pooled)
        with torch.autocast(rows.device.type, enabled=False):
            similarity = rows @ rows.T
        i, j = torch.triu_indices(len(labels), len(labels), offset=1, device=labels.device)
        same = labels[i] == labels[j]
        affinities.append(similarity[i[same], j[same]].mean())
        dispersions.append(similarity[i[~same], j[~same]].mean())
        pools.append(pooled)
    affinity = 1 - torch.stack(affinities).mean()
    return affinity, torch.stack(dispersions).mean(), closed_form.mean_magnitude(pools)


def grouped_losses(activations: Sequence[Tensor], labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The published losses with our edge rules: a term without a pair is 0."""
    segments = Segments.from_labels(labels)
    affinity, dispersion, compactness = published_losses(activations, segments.segment)
    affinity = torch.where(segments.same_pairs > 0, affinity, 0)
    dispersion = torch.where(segments.diff_pairs > 0, dispersion, 0)
    return affinity, dispersion, compactness


@torch.no_grad()
def count_firings(activations: Sequence[Tensor], labels: Tensor, threshold: float, tally: Tally) -> None:
    """Count by the published loop, which selects the samples of each class and layer."""
    num_classes = tally.class_sizes.shape[0]
    for activation, count in zip(activations, tally.counts, strict=True):
        if threshold == 0:
            fired = closed_form.pooled_activation(activation) != 0
        else:  # the published code has no threshold
            magnitude = activation.abs()
            fired = ~((magnitude if magnitude.dim() == 2 else magnitude.flatten(2).amax(2)) <= threshold)
        for k in range(num_classes):
            count[k] += fired[labels == k].sum(0)
    for rows, total in zip(pool(activations) if tally.sums else (), tally.sums, strict=True):
        for k in range(num_classes):
            total[k] += rows[labels == k].sum(0)
    for k in range(num_classes):
        tally.class_sizes[k] += (labels == k).sum()
    tally.invalid.add_(((labels < 0) | (labels >= num_classes)).sum())


@torch.no_grad()
def add_attributions(activations: Sequence[Tensor], gradients: Sequence[Tensor], labels: Tensor, tally: Tally) -> None:
    """Add attributions by a loop over classes, which selects the samples of each."""
    num_classes = tally.class_sizes.shape[0]
    for activation, gradient, total in zip(activations, gradients, tally.sums, strict=True):
        for k in range(num_classes):
            of_class = labels == k
            total[k] += closed_form.attributions(activation[of_class], gradient[of_class]).sum(0)
    for k in range(num_classes):
        tally.class_sizes[k] += (labels == k).sum()
    tally.invalid.add_(((labels < 0) | (labels >= num_classes)).sum())


def published_rates(activations: Sequence[Tensor], labels: Tensor, num_classes: int) -> list[Tensor]:
    """Per layer the (K, C) float32 share of each class's samples for which a neuron fires; 0 for an empty class."""
    rates = []
    for activation in activations:
        fired = closed_form.pooled_activation(activation) != 0
        layer = torch.zeros(num_classes, activation.shape[1], device=activation.device)
        for k in range(num_classes):
            of_class = fired[labels == k]
            if len(of_class):
                layer[k] = of_class.sum(0).float() / len(of_class)
        rates.append(layer)
    return rates


def published_masks(rates: Sequence[Tensor], threshold: float, min_fraction: float = 0.005) -> list[Tensor]:
    """Per layer the (K, C) bool mask `rate >= threshold` (in float32) with the published floor of neurons per class.

    A class with fewer than max(1, int(min_fraction C)) neurons gets its top k by rate, k the larger of that floor
    and the largest mask any class has in the layer. Ties fall as `torch.topk` lets them.
    """
    masks = []
    for layer in rates:
        mask = layer >= torch.tensor(threshold, dtype=torch.float32)
        floor = max(1, int(min_fraction * layer.shape[1]))
        for k in range(layer.shape[0]):
            if int(mask[k].sum()) < floor:
                size = max(floor, int(mask.sum(1).max()))
                mask[k] = torch.zeros_like(mask[k]).scatter(0, layer[k].topk(size).indices, True)
        masks.append(mask)
    return masks
