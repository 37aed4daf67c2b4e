"""The modular losses from class sums, in plain PyTorch: backend "torch".

For one layer with pooled activations a_i and rows n_i = a_i / max(|a_i|, 1e-12), class sums s_k, their total s and
q_k = sum over segment k of |n_i|^2:

    sum over same-class pairs      n_i . n_j  =  1/2 sum_k ( |s_k|^2 - q_k )
    sum over different-class pairs n_i . n_j  =  1/2 sum_k s_k . (s - s_k)

which are the published N x N means at O(N C) (arXiv 2411.01074). Both are written per segment, so that a batch in
which one kind of pair is rare does not lose it in the difference of two large numbers.

The functions take tensors of any device, floating dtype and strides, are differentiable twice, do not synchronise with
the host, and can be traced by `torch.compile(fullgraph=True)`. Sums are in float32 for half precision and float32, and
in float64 for float64. On the CPU results are bitwise equal from run to run; on CUDA `index_add` sums in no fixed order
unless `torch.use_deterministic_algorithms(True)` is set (the Triton backend always is deterministic).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from moda_kernels._opaque import apart, segment_add
from moda_kernels.batch_norm import BatchNorm
from moda_kernels.plain import is_traced, is_transformed
from moda_kernels.precision import accumulation
from moda_kernels.segments import Segments
from moda_kernels.tally import Tally

_FLOATS = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})

OPS = frozenset(
    {
        "grouped_losses",
        "weighted_losses",
        "pool",
        "relu_pool",
        "norm_relu_pool",
        "class_sums",
        "count_firings",
        "add_attributions",
    }
)
DTYPES: Mapping[str, frozenset[torch.dtype]] = dict.fromkeys(OPS, _FLOATS)
READS_MEMORY = False
DEVICES: Mapping[str, frozenset[str]] | None = None  # any

Weights: TypeAlias = tuple[float, float, float]  # of affinity, dispersion and compactness

EPS = 1e-12  # the published floor of a row's norm


def unavailable(device: torch.device | None = None) -> str | None:
    """Plain PyTorch always runs."""
    return None


def pooled_activation(activation: Tensor) -> Tensor:
    """(N, C) pooled activation: mean of |x| over positions; an (N, C) activation is its own pool (signed)."""
    dtype = accumulation(activation.dtype)
    if activation.dim() == 2:
        return activation.to(dtype)
    return _mean_over_positions(activation.abs())


def pool(activations: Sequence[Tensor]) -> list[Tensor]:
    """The pooled activation of every layer."""
    return [pooled_activation(activation) for activation in activations]


def relu_pool(x: Tensor, inplace: bool) -> tuple[Tensor, Tensor]:
    """`relu(x)` and its pooled activation."""
    y = torch.relu_(x) if inplace else torch.relu(x)
    return y, _pooled_relu(y)


def _pooled_relu(y: Tensor) -> Tensor:
    """The pooled activation of a ReLU's output."""
    if y.dim() == 2:
        return pooled_activation(y)
    # y is its own absolute value, and the ReLU's gradient is 0 where that of |y| would be.
    return _mean_over_positions(y)


def _mean_over_positions(magnitude: Tensor) -> Tensor:
    """The means over all axes behind the second, in the accumulation dtype; finite for finite magnitudes."""
    dtype, positions = accumulation(magnitude.dtype), tuple(range(2, magnitude.dim()))
    if magnitude.dtype == torch.float16:  # a sum of float16 numbers always fits float32
        return magnitude.mean(positions, dtype=dtype)
    if magnitude.device.type == "cpu" and not (is_traced() or is_transformed()):
        mean = magnitude.mean(positions, dtype=dtype)
        if not mean.numel() or mean.detach().amax() <= torch.finfo(dtype).max:
            return mean
    # A sum of values that were divided first is finite. Where values can be read, as above, it is taken only if needed.
    return twice((magnitude.to(dtype) * (0.5 / math.prod(magnitude.shape[2:]))).sum(positions))


def norm_relu_pool(x: Tensor, norm: BatchNorm) -> tuple[Tensor, Tensor]:
    """`activation(batch_norm(x) + residual)` and its pooled activation."""
    z = F.batch_norm(
        x, norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.training, norm.momentum, norm.eps
    )
    if norm.residual is not None:
        z = z + norm.residual
    # Neither batch norm nor the addition keeps its result for backward, so the ReLU may overwrite it.
    y = torch.relu_(z) if norm.activation == "relu" else getattr(F, norm.activation)(z)
    return y, _pooled_relu(y) if norm.rectifies else pooled_activation(y)


def normalized_rows(pooled: Tensor) -> Tensor:
    """Rows divided by max(L2 norm, 1e-12), right for all finite numbers; a NaN makes the whole row NaN.

    An all-zero row stays zero and passes gradient 0 (published: g / 1e-12).
    """
    # Rows are divided by their largest magnitude before they are squared, so that no square leaves the dtype's range.
    # The divisor cancels out, so the derivative may take it for a constant.
    largest = pooled.detach().abs().amax(1, keepdim=True)
    zero = largest == 0
    scaled = pooled / torch.where(zero, 1, largest)
    squares = torch.where(zero, 1, scaled.square().sum(1, keepdim=True))
    floored = squares.detach().sqrt() * largest < EPS
    return torch.where(floored, torch.where(zero, 0, pooled / EPS), scaled * squares.rsqrt())


def mean_magnitude(layers: Sequence[Tensor]) -> Tensor:
    """The mean of |a| over all elements of a layer, and over layers; 0-d. Finite for finite numbers."""
    halves = [(rows.abs() / (2 * rows.numel())).sum() / len(layers) for rows in layers]
    return twice(torch.stack(halves).sum())


def twice(half: Tensor) -> Tensor:
    """A mean from its half, without letting rounding make the mean of finite numbers infinite."""
    doubled = 2 * half
    rounded = doubled.isinf() & half.isfinite()
    return torch.where(rounded, doubled.clamp_max(torch.finfo(half.dtype).max), doubled)


def class_sums(pooled: Sequence[Tensor], labels: Tensor, num_classes: int, *, normalize: bool = True) -> list[Tensor]:
    """Per layer the (K, C) sum over each class's samples of the rows, normalised by default; `labels` in [0, K)."""
    index = labels.long()
    rows = [normalized_rows(layer) for layer in pooled] if normalize else pooled
    return [layer.new_zeros(num_classes, layer.shape[1]).index_add(0, index, layer) for layer in rows]


def _is_compiled_for_cpu(rows: Tensor) -> bool:
    return rows.device.type == "cpu" and torch.compiler.is_compiling()


def _segment_add(rows: Tensor, segment: Tensor) -> Tensor:
    if _is_compiled_for_cpu(rows):
        summed: Tensor = segment_add(rows, segment)
        return summed
    return torch.zeros_like(rows).index_add(0, segment, rows)


def pair_sums(pooled: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
    """Sums of n_i . n_j over same-class and over different-class pairs i < j of one layer; 0-d tensors."""
    rows = normalized_rows(pooled)
    sums = _segment_add(rows, segments.segment)
    own = _segment_add(rows.square().sum(1), segments.segment)
    same = (sums.square().sum(1) - own).sum() / 2
    different = (sums * (sums.sum(0) - sums)).sum() / 2
    return same, different


def mean_over_pairs(pair_sum: Tensor, pairs: Tensor) -> Tensor:
    """`pair_sum / pairs`; 0 with zero gradient where there is no pair."""
    return torch.where(pairs > 0, pair_sum / pairs.clamp_min(1), 0)


def grouped_losses(activations: Sequence[Tensor], labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(affinity, dispersion, compactness) over all layers; 0-d, in the accumulation dtype of the widest layer."""
    segments = Segments.from_labels(labels)
    pooled = [apart(rows) if _is_compiled_for_cpu(rows) else rows for rows in pool(activations)]
    sums = [pair_sums(rows, segments) for rows in pooled]
    same = torch.stack([same for same, _ in sums]).mean()
    different = torch.stack([different for _, different in sums]).mean()
    affinity = torch.where(segments.same_pairs > 0, 1 - mean_over_pairs(same, segments.same_pairs), 0)
    return affinity, mean_over_pairs(different, segments.diff_pairs), mean_magnitude(pooled)


def weighted_losses(
    activations: Sequence[Tensor], labels: Tensor, weights: Weights
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """The weighted sum of these losses, and the losses, detached."""
    return summed(grouped_losses(activations, labels), weights)


def summed(losses: tuple[Tensor, Tensor, Tensor], weights: Weights) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """The sum of losses times weights, and the losses, detached.

    A term of weight 0 is left out of the sum, because 0 * inf would make it NaN.
    """
    affinity, dispersion, compactness = losses
    terms = [weight * loss for weight, loss in zip(weights, losses, strict=True) if weight != 0]
    total = torch.stack(terms).sum() if terms else torch.zeros_like(affinity)
    return total, (affinity.detach(), dispersion.detach(), compactness.detach())


@torch.no_grad()
def count_firings(activations: Sequence[Tensor], labels: Tensor, threshold: float, tally: Tally) -> None:
    """Contract of `backends.Backend.count_firings`."""
    num_classes = tally.class_sizes.shape[0]
    valid = (labels >= 0) & (labels < num_classes)
    index = torch.where(valid, labels, 0).long()
    weight = valid.long()
    for activation, count in zip(activations, tally.counts, strict=True):
        # Comparing the largest and the smallest value keeps NaN and makes no temporary of the activation's size.
        positions = tuple(range(2, activation.dim()))
        largest = activation.amax(positions) if positions else activation
        smallest = activation.amin(positions) if positions else activation
        fired = ~((largest <= threshold) & (smallest >= -threshold))
        count.index_add_(0, index, fired.long() * weight[:, None])
    if tally.sums:
        pooled = [torch.where(valid[:, None], rows, 0) for rows in pool(activations)]
        for total, batch in zip(tally.sums, class_sums(pooled, index, num_classes, normalize=False), strict=True):
            total += batch
    tally.class_sizes.index_add_(0, index, weight)
    tally.invalid.add_((~valid).sum())


def attributions(activation: Tensor, gradient: Tensor) -> Tensor:
    """(N, C): |sum over positions of activation x gradient|, in the accumulation dtype."""
    dtype = accumulation(activation.dtype)
    product = activation.to(dtype) * gradient.to(dtype)
    return (product if product.dim() == 2 else product.flatten(2).sum(2)).abs()


@torch.no_grad()
def add_attributions(activations: Sequence[Tensor], gradients: Sequence[Tensor], labels: Tensor, tally: Tally) -> None:
    """Contract of `backends.Backend.add_attributions`."""
    num_classes = tally.class_sizes.shape[0]
    valid = (labels >= 0) & (labels < num_classes)
    index = torch.where(valid, labels, 0).long()
    for activation, gradient, total in zip(activations, gradients, tally.sums, strict=True):
        rows = torch.where(valid[:, None], attributions(activation, gradient), 0)
        total += class_sums([rows], index, num_classes, normalize=False)[0]
    tally.class_sizes.index_add_(0, index, valid.long())
    tally.invalid.add_((~valid).sum())
