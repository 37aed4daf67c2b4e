"""From activations of all layers to the three losses, and back: which kernel runs on what.

    forward     pool (spatial and half-precision layers) - segments and row norms - class sums - pair terms and losses
    backward    gradient of the pooled rows - gradient of the activations

Four launches and one or two, whatever the number of layers: one more pooling launch each for a second and a third
dtype, and one for long channels_last maps; beyond 512 samples one more for class sums, and PyTorch's own for segments.
A float32 (N, C) layer is read where it lies, and its gradient comes straight out
of the first backward launch. Everything here works on plain tensors; autograd is in ops.py.

The gradient of what a ReLU put out is not written in its size: it is the gradient of the pooled rows over the number of
positions, a view that says so for every position. Where |y| has another derivative, at 0, the ReLU that is next in the
backward pass masks it. So there is no second backward launch for such layers, and no memory for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moda_kernels.closed_form import Weights
from moda_kernels.segments import Segments
from moda_kernels.triton_kernels import layouts
from moda_kernels.triton_kernels.layouts import Layout, address_after, arrange, gradient_like
from moda_kernels.triton_kernels.losses_backward import launch_losses_backward
from moda_kernels.triton_kernels.pair_terms import launch_pair_terms
from moda_kernels.triton_kernels.pool_backward import launch_pool_backward
from moda_kernels.triton_kernels.pool_forward import Pooling, launch_pool
from moda_kernels.triton_kernels.preparation import launch_preparation
from moda_kernels.triton_kernels.rows import TILE_NEURONS, Rows
from moda_kernels.triton_kernels.segment_sums import launch_class_sums, sums_shape
from moda_kernels.triton_kernels.tables import on_device_of

UNWEIGHTED = (1.0, 1.0, 1.0)


class Saved(NamedTuple):
    """What the backward pass needs of a forward pass besides the activations."""

    pooled: Tensor  # pooled rows of all pooled layers, one after the other
    inverse: Tensor  # (L, N) inverse norms
    sums: Tensor  # float64, see segment_sums.py
    terms: Tensor  # (2, tiles, N)
    order: Tensor  # and the other fields of `Segments`
    offsets: Tensor
    segment: Tensor
    same_pairs: Tensor
    diff_pairs: Tensor

    @property
    def segments(self) -> Segments:
        """The segments of the batch."""
        return Segments(*self[-len(Segments._fields) :])


def needs_pooling(activation: Tensor) -> bool:
    """Whether a layer's pooled rows are another tensor than the layer: it is spatial or not float32."""
    return activation.dim() != 2 or activation.dtype != torch.float32


def is_rectified(activation: Tensor) -> bool:
    """Whether a gradient of the activation goes to a ReLU's backward pass, and to nobody who looks at it before."""
    node = activation.grad_fn
    rectified = node is not None and activation.dim() > 2 and node.name() == "ReluBackward0"
    return rectified and not (activation._backward_hooks or activation.retains_grad)


def pooled_offsets(activations: Sequence[Tensor]) -> tuple[list[int], int]:
    """Where each layer's pooled rows begin in one buffer (unused for layers that are their own pool), and its size.

    Without gaps: an op's outputs are compared whole. Layers stay 16-byte aligned as long as N * C is a multiple of 4.
    """
    offsets, size = [], 0
    for activation in activations:
        offsets.append(size)
        if needs_pooling(activation):
            size += activation.shape[0] * activation.shape[1]
    return offsets, size


def empty_saved(like: Tensor, neurons: Sequence[int], pooled: int) -> Saved:
    """Tensors as in `Saved` on the device of an activation, nothing in them."""
    samples, tiles = like.shape[0], sum(-(-width // TILE_NEURONS) for width in neurons)
    floats = (pooled,), (len(neurons), samples), (2, tiles, samples)
    rows, inverse, terms = (like.new_empty(shape, dtype=torch.float32) for shape in floats)
    sums = like.new_empty(sums_shape(samples, tiles * TILE_NEURONS), dtype=torch.float64)
    of_segments = (samples,), (samples + 1,), (samples,), (), ()
    return Saved(rows, inverse, sums, terms, *(like.new_empty(shape, dtype=torch.int64) for shape in of_segments))


def losses_forward(
    activations: Sequence[Tensor], labels: Tensor, weights: Weights = UNWEIGHTED
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Saved]:
    """(weighted sum, affinity, dispersion, compactness), 0-d float32, and what backward needs."""
    arranged, device = [arrange(activation) for activation in activations], activations[0].device
    offsets, size = pooled_offsets(activations)
    pooled = torch.empty(size, dtype=torch.float32, device=device)
    rows = _rows(arranged, pooled, offsets)
    with on_device_of(pooled):
        launch_pool(_poolings(arranged, pooled, offsets, range(len(arranged))))
        table = rows.table([0] * len(arranged))
        prepared = segments, inverse, _ = launch_preparation(rows, table, labels)
        sums = launch_class_sums(rows, table, inverse, segments)
        losses, terms = launch_pair_terms(rows, table, prepared, sums, weights)
    return losses, Saved(pooled, inverse, sums, terms, *segments)


def losses_backward(
    activations: Sequence[Tensor],
    saved: Saved,
    upstream: tuple[Tensor, Tensor, Tensor],
    wanted: Sequence[bool],
    weights: Weights = UNWEIGHTED,
    rectified: Sequence[bool] | None = None,
) -> list[Tensor | None]:
    """Gradient of each wanted layer, in its dtype and layout; of those that `is_rectified` says, as a view."""
    arranged = [arrange(activation) for activation in activations]
    offsets, size = pooled_offsets(activations)
    spread = [want and of_relu for want, of_relu in zip(wanted, rectified or [False] * len(wanted), strict=True)]
    pooling = [i for i, (x, _) in enumerate(arranged) if wanted[i] and needs_pooling(x) and not spread[i]]
    gradients = [
        gradient_like(x) if want and not expanded else None
        for (x, _), want, expanded in zip(arranged, wanted, spread, strict=True)
    ]
    dpooled = torch.empty(size if pooling or any(spread) else 0, dtype=torch.float32, device=saved.pooled.device)
    targets = [0 if gradient is None else gradient.data_ptr() for gradient in gradients]
    activation_targets = [targets[i] for i in pooling]
    for i, (x, _) in enumerate(arranged):
        if wanted[i] and needs_pooling(x):
            targets[i] = address_after(dpooled, offsets[i])
    divisors = [layout.positions if expanded else 1 for (_, layout), expanded in zip(arranged, spread, strict=True)]
    rows = _rows(arranged, saved.pooled, offsets)
    with on_device_of(saved.pooled):
        kept = (saved.inverse, saved.sums, saved.terms)
        launch_losses_backward(rows, rows.table(targets, divisors), saved.segments, kept, upstream, weights)
        launch_pool_backward(_poolings(arranged, dpooled, offsets, pooling), activation_targets)
    rounded = {dtype: dpooled.to(dtype) for dtype in {activations[i].dtype for i, of in enumerate(spread) if of}}
    for i, x in enumerate(activations):
        if spread[i]:
            strides = (x.shape[1], 1, *[0] * (x.dim() - 2))
            gradients[i] = rounded[x.dtype].as_strided(x.shape, strides, offsets[i])
    return gradients


def _rows(arranged: Sequence[tuple[Tensor, Layout]], pooled: Tensor, offsets: Sequence[int]) -> Rows:
    addresses = tuple(
        address_after(pooled, offset) if needs_pooling(activation) else activation.data_ptr()
        for (activation, _), offset in zip(arranged, offsets, strict=True)
    )
    neurons = tuple(layout.neurons for _, layout in arranged)
    return Rows(arranged[0][0].shape[0], neurons, addresses, pooled.device)


def _poolings(
    arranged: Sequence[tuple[Tensor, Layout]], pooled: Tensor, offsets: Sequence[int], which: Sequence[int]
) -> list[Pooling]:
    return [
        Pooling(activation, layout, address_after(pooled, offsets[i]), activation.dim() == 2)
        for i, (activation, layout) in ((i, arranged[i]) for i in which)
        if needs_pooling(activation)
    ]


def pool_forward(activations: Sequence[Tensor]) -> list[Tensor]:
    """Pooled rows (N, C) float32 of layers that need pooling, a tensor each."""
    arranged = [arrange(activation) for activation in activations]
    pooled = [torch.empty(x.shape[:2], dtype=torch.float32, device=x.device) for x in activations]
    launch_pool(
        [Pooling(x, layout, rows.data_ptr(), x.dim() == 2) for (x, layout), rows in zip(arranged, pooled, strict=True)]
    )
    return pooled


def pool_backward(activations: Sequence[Tensor], dpooled: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of layers that need pooling, in their dtype and layout."""
    arranged = [arrange(activation) for activation in activations]
    gradients = [layouts.gradient_like(x) for x, _ in arranged]
    rows = [gradient.contiguous() for gradient in dpooled]
    poolings = [
        Pooling(x, layout, row.data_ptr(), x.dim() == 2) for (x, layout), row in zip(arranged, rows, strict=True)
    ]
    launch_pool_backward(poolings, [gradient.data_ptr() for gradient in gradients])
    return gradients
