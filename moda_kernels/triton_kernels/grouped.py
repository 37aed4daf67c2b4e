"""From activations of all layers to the three losses, and back: which kernel runs on what.

    forward     pool (spatial and half-precision layers) - segments and row norms - class sums - pair terms and losses
    backward    gradient of the pooled rows - gradient of the activations

Four launches and one or two, whatever the number of layers: one more pooling launch each for a second and a third
dtype, and one for long channels_last maps; beyond 512 samples one more for class sums, and PyTorch's own for segments.
A float32 (N, C) layer is read where it lies, and its gradient comes straight out of the first backward launch.
Everything here works on plain tensors; autograd is in ops.py.

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
from moda_kernels.triton_kernels.layouts import gradient_like
from moda_kernels.triton_kernels.losses_backward import launch_losses_backward
from moda_kernels.triton_kernels.pair_terms import launch_pair_terms
from moda_kernels.triton_kernels.plans import Plan, is_pooled, plan_of
from moda_kernels.triton_kernels.pool_backward import launch_pool_backward
from moda_kernels.triton_kernels.pool_forward import launch_pool
from moda_kernels.triton_kernels.preparation import launch_preparation
from moda_kernels.triton_kernels.rows import TILE_NEURONS
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
    """Whether a layer `is_pooled`."""
    return is_pooled(activation.dim(), activation.dtype)


def is_rectified(activation: Tensor) -> bool:
    """Whether a gradient of the activation goes to a ReLU's backward pass, and to nobody who looks at it before."""
    node = activation.grad_fn
    rectified = node is not None and activation.dim() > 2 and node.name() == "ReluBackward0"
    return rectified and not (activation._backward_hooks or activation.retains_grad)


def empty_saved(activations: Sequence[Tensor]) -> Saved:
    """Tensors as in `Saved` on the device of the activations, nothing in them. Traceable."""
    like, tiles = activations[0], sum(-(-layer.shape[1] // TILE_NEURONS) for layer in activations)
    samples = like.shape[0]
    pooled = sum(layer.shape[0] * layer.shape[1] for layer in activations if needs_pooling(layer))
    floats = (pooled,), (len(activations), samples), (2, tiles, samples)
    rows, inverse, terms = (like.new_empty(shape, dtype=torch.float32) for shape in floats)
    sums = like.new_empty(sums_shape(samples, tiles * TILE_NEURONS), dtype=torch.float64)
    of_segments = (samples,), (samples + 1,), (samples,), (), ()
    return Saved(rows, inverse, sums, terms, *(like.new_empty(shape, dtype=torch.int64) for shape in of_segments))


def losses_forward(
    activations: Sequence[Tensor], labels: Tensor, weights: Weights = UNWEIGHTED
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Saved]:
    """(weighted sum, affinity, dispersion, compactness), 0-d float32, and what backward needs."""
    plan, device = plan_of(activations), activations[0].device
    arranged = plan.arranged(activations)
    pooled = torch.empty(plan.size, dtype=torch.float32, device=device)
    rows, tiling = plan.rows(arranged, pooled), plan.tiling
    with on_device_of(pooled):
        _launch_pool(plan, arranged, rows, device)
        table = tiling.table(rows, device)
        prepared = launch_preparation(tiling, table, labels)
        sums = launch_class_sums(tiling, table, prepared)
        losses, terms = launch_pair_terms(tiling, table, prepared, sums, weights)
    return losses, Saved(pooled, prepared.inverse, sums, terms, *prepared.segments)


def losses_backward(
    activations: Sequence[Tensor],
    saved: Saved,
    upstream: tuple[Tensor, Tensor, Tensor],
    wanted: Sequence[bool],
    weights: Weights = UNWEIGHTED,
    rectified: Sequence[bool] | None = None,
) -> list[Tensor | None]:
    """Gradient of each wanted layer, in its dtype and layout; of those that `is_rectified` says, as a view."""
    plan, device = plan_of(activations), saved.pooled.device
    arranged, tiling = plan.arranged(activations), plan.tiling
    spread = [want and of_relu for want, of_relu in zip(wanted, rectified or [False] * len(wanted), strict=True)]
    written = [want and not expanded for want, expanded in zip(wanted, spread, strict=True)]
    through = [want and pooled for want, pooled in zip(wanted, plan.pooled, strict=True)]  # pooled rows
    pooling = [i for i, pooled in enumerate(through) if pooled and written[i]]
    gradients = [gradient_like(x) if write else None for x, write in zip(arranged, written, strict=True)]
    dpooled = torch.empty(plan.size if any(through) else 0, dtype=torch.float32, device=device)
    targets = [0 if gradient is None else gradient.data_ptr() for gradient in gradients]
    of_rows, base = list(targets), dpooled.data_ptr()
    for i, pooled in enumerate(through):
        if pooled:
            of_rows[i] = base + 4 * plan.offsets[i]
    divisors = [layout.positions if expanded else 1 for layout, expanded in zip(plan.layouts, spread, strict=True)]
    with on_device_of(saved.pooled):
        table = tiling.table(plan.rows(arranged, saved.pooled), device, of_rows, divisors)
        kept = (saved.inverse, saved.sums, saved.terms)
        launch_losses_backward(tiling, table, saved.segments, kept, upstream, weights)
        if pooling:
            addresses = [arranged[i].data_ptr() for i in pooling]
            rows, ends = ([given[i] for i in pooling] for given in (of_rows, targets))
            launch_pool_backward(plan.pooling(pooling), addresses, rows, ends, device)
    rounded = {dtype: dpooled.to(dtype) for dtype in {activations[i].dtype for i, of in enumerate(spread) if of}}
    for i, x in enumerate(activations):
        if spread[i]:
            strides = (x.shape[1], 1, *[0] * (x.dim() - 2))
            gradients[i] = rounded[x.dtype].as_strided(x.shape, strides, plan.offsets[i])
    return gradients


def _launch_pool(plan: Plan, arranged: Sequence[Tensor], rows: Sequence[int], device: torch.device) -> None:
    if plan.to_pool:
        addresses = [arranged[i].data_ptr() for i in plan.to_pool]
        launch_pool(plan.pooling(plan.to_pool), addresses, [rows[i] for i in plan.to_pool], device)


def pool_forward(activations: Sequence[Tensor]) -> list[Tensor]:
    """Pooled rows (N, C) float32 of layers that need pooling, a tensor each."""
    plan, device = plan_of(activations), activations[0].device
    arranged = plan.arranged(activations)
    pooled = [torch.empty(x.shape[:2], dtype=torch.float32, device=device) for x in activations]
    with on_device_of(activations[0]):
        _launch_pool(plan, arranged, [rows.data_ptr() for rows in pooled], device)
    return pooled


def pool_backward(activations: Sequence[Tensor], dpooled: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of layers that need pooling, in their dtype and layout."""
    if not activations:
        return []
    plan, device = plan_of(activations), activations[0].device
    arranged = plan.arranged(activations)
    gradients = [gradient_like(x) for x in arranged]
    rows = [gradient.contiguous() for gradient in dpooled]
    addresses, of_rows, targets = ([tensor.data_ptr() for tensor in given] for given in (arranged, rows, gradients))
    with on_device_of(activations[0]):
        launch_pool_backward(plan.pooling(range(len(arranged))), addresses, of_rows, targets, device)
    return gradients
