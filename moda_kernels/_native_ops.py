"""The native kernels as operators of `torch.library`, for `torch.compile` and `torch.export`.

`torch.ops.moda_kernels.native_*`, each with a schema, a fake (shapes and dtypes without data) and, where it is
differentiable, an autograd formula whose backward is an operator itself. Activations are dense, see `_native_calls.py`.
The bodies are the calls that eager mode makes directly.
"""

# No `from __future__ import annotations`: torch.library reads the annotations to infer the schemas.

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moda_kernels import _native_calls as calls
from moda_kernels.once import refuse_second_backward
from moda_kernels.precision import accumulation
from moda_kernels.segments import Segments
from moda_kernels.tally import Tally


def _zeros_for_none(gradients: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(x) if g is None else g for g, x in zip(gradients, like, strict=True)]


def _rows_like(x: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], x.shape[1]), dtype=accumulation(x.dtype))


# Pooling.


@torch.library.custom_op("moda_kernels::native_pool", mutates_args=())
def pool(activations: Sequence[Tensor]) -> list[Tensor]:
    """Pooled activations of spatial layers."""
    return calls.pool_forward(activations)


@pool.register_fake
def _(activations: Sequence[Tensor]) -> list[Tensor]:
    return [_rows_like(x) for x in activations]


@torch.library.custom_op("moda_kernels::native_pool_backward", mutates_args=())
def pool_backward(upstream: Sequence[Tensor], activations: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of spatial layers from those of their pooled activations."""
    return [gradient for gradient in calls.pool_backward(upstream, activations) if gradient is not None]


@pool_backward.register_fake
def _(upstream: Sequence[Tensor], activations: Sequence[Tensor]) -> list[Tensor]:
    return [torch.empty_like(x) for x in activations]


def _save_activations(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[0])


def _differentiate_pool(ctx: Any, upstream: Sequence[Tensor | None]) -> list[Tensor]:
    layers = ctx.saved_tensors
    rows = _zeros_for_none(upstream, [_rows_like(x) for x in layers])
    gradients: list[Tensor] = pool_backward(rows, list(layers))
    return gradients


pool.register_autograd(_differentiate_pool, setup_context=_save_activations)
pool_backward.register_autograd(refuse_second_backward)


# ReLU and pooling.


@torch.library.custom_op("moda_kernels::native_relu_pool", mutates_args=())
def relu_pool(x: Tensor) -> tuple[Tensor, Tensor]:
    """relu(x) and its pooled activation; x is spatial."""
    y = torch.empty_like(x)
    return y, calls.relu_pool_forward(x, y)


@relu_pool.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), _rows_like(x)


@torch.library.custom_op("moda_kernels::native_relu_pool_backward", mutates_args=())
def relu_pool_backward(y: Tensor, dy: Tensor, dpooled: Tensor) -> Tensor:
    """The gradient of x."""
    return calls.relu_pool_backward(y, dy, dpooled)


@relu_pool_backward.register_fake
def _(y: Tensor, dy: Tensor, dpooled: Tensor) -> Tensor:
    return torch.empty_like(y)


def _save_output(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[0])


def _differentiate_relu_pool(ctx: Any, dy: Tensor | None, dpooled: Tensor | None) -> Tensor:
    (y,) = ctx.saved_tensors
    dy, dpooled = _zeros_for_none([dy, dpooled], [y, _rows_like(y)])
    gradient: Tensor = relu_pool_backward(y, dy, dpooled)
    return gradient


relu_pool.register_autograd(_differentiate_relu_pool, setup_context=_save_output)
relu_pool_backward.register_autograd(refuse_second_backward)


# Losses.


@torch.library.custom_op("moda_kernels::native_grouped_losses", mutates_args=())
def grouped_losses(activations: Sequence[Tensor], segments: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Affinity, dispersion, compactness, and the workspace of the backward pass."""
    # The workspace is zeros, because an operator's outputs must not differ from call to call.
    room = len(activations[0])
    workspace = activations[0].new_zeros(calls.losses_workspace_bytes(activations, room), dtype=torch.uint8)
    terms = calls.losses_forward(activations, Segments(*segments), workspace, room)
    dtype = calls.losses_dtype(activations)
    affinity, dispersion, compactness = (workspace.new_tensor(term, dtype=dtype) for term in terms)
    return affinity, dispersion, compactness, workspace


@grouped_losses.register_fake
def _(activations: Sequence[Tensor], segments: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    first, dtype = activations[0], calls.losses_dtype(activations)
    affinity, dispersion, compactness = (first.new_empty((), dtype=dtype) for _ in range(3))
    workspace = first.new_empty(calls.losses_workspace_bytes(activations, len(activations[0])), dtype=torch.uint8)
    return affinity, dispersion, compactness, workspace


@torch.library.custom_op("moda_kernels::native_grouped_losses_backward", mutates_args=())
def grouped_losses_backward(
    upstream: Sequence[Tensor], activations: Sequence[Tensor], segments: Sequence[Tensor], workspace: Tensor
) -> list[Tensor]:
    """The gradient of every layer."""
    needed, room = [True] * len(activations), len(activations[0])
    gradients = calls.losses_backward(upstream, activations, needed, Segments(*segments), workspace, room)
    return [gradient for gradient in gradients if gradient is not None]


@grouped_losses_backward.register_fake
def _(
    upstream: Sequence[Tensor], activations: Sequence[Tensor], segments: Sequence[Tensor], workspace: Tensor
) -> list[Tensor]:
    return [torch.empty_like(x) for x in activations]


def _save_losses(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    activations, segments = inputs
    workspace = output[3]
    ctx.mark_non_differentiable(workspace)
    ctx.save_for_backward(workspace, *segments, *activations)


def _differentiate_losses(ctx: Any, *upstream: Tensor | None) -> tuple[list[Tensor], list[None]]:
    saved = calls.SavedLosses.of(ctx.saved_tensors)
    layers = list(saved.layers)
    zero = layers[0].new_zeros((), dtype=calls.losses_dtype(layers))
    terms = _zeros_for_none(upstream[:3], [zero] * 3)
    return grouped_losses_backward(terms, layers, list(saved.segments), saved.workspace), [None] * len(saved.segments)


grouped_losses.register_autograd(_differentiate_losses, setup_context=_save_losses)
grouped_losses_backward.register_autograd(refuse_second_backward)


# Class sums, firing counts, attributions.


@torch.library.custom_op("moda_kernels::native_class_sums", mutates_args=())
def class_sums(pooled: Sequence[Tensor], labels: Tensor, num_classes: int) -> list[Tensor]:
    """Per layer of (N, C) rows the (K, C) sums of each class's normalised rows."""
    return calls.class_sums(pooled, labels, num_classes)


@class_sums.register_fake
def _(pooled: Sequence[Tensor], labels: Tensor, num_classes: int) -> list[Tensor]:
    return [rows.new_empty((num_classes, rows.shape[1])) for rows in pooled]


@torch.library.custom_op(
    "moda_kernels::native_count_firings", mutates_args=("counts", "class_sizes", "invalid", "sums")
)
def count_firings(
    activations: Sequence[Tensor],
    labels: Tensor,
    threshold: float,
    counts: Sequence[Tensor],
    class_sizes: Tensor,
    invalid: Tensor,
    sums: Sequence[Tensor],
) -> None:
    """Add the batch to the tensors of a tally, in place."""
    calls.count_firings(activations, labels, threshold, Tally(counts, class_sizes, invalid, sums))


@count_firings.register_fake
def _(*_: Any) -> None:
    """The operator only adds to its arguments."""


@torch.library.custom_op("moda_kernels::native_add_attributions", mutates_args=("class_sizes", "invalid", "sums"))
def add_attributions(
    activations: Sequence[Tensor],
    gradients: Sequence[Tensor],
    labels: Tensor,
    class_sizes: Tensor,
    invalid: Tensor,
    sums: Sequence[Tensor],
) -> None:
    """Add the batch to the tensors of a tally, in place."""
    calls.add_attributions(activations, gradients, labels, Tally((), class_sizes, invalid, sums))


@add_attributions.register_fake
def _(*_: Any) -> None:
    """The operator only adds to its arguments."""
