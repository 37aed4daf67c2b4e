"""Batch norm, an added residual, an activation and pooling as one operation, and its gradient, in three launches each.

    z = (x - mean) * scale + bias [+ residual]          scale = weight / sqrt(var + eps)
    y = f(z)             pooled[n, c] = mean over positions of |y[n, c, :]|

    g  = f'(z) * (dy + sign(y) * dpooled[n, c] / S)     the gradient of z, and of the residual
    dx = scale * (g - mean of g - (x - mean) / (var + eps) * mean of g * (x - mean))

Forward sums x and its square over parts of the batch (norm_sums.py), joins the parts and normalises (norm_apply.py);
backward sums g and g * (x - mean), joins them and writes dx. Kept for backward are x and four numbers per neuron: z is
computed again from the same numbers in the same order. With a residual, what is kept beside them is y for ReLU and
ReLU6, whose gradient it tells, and the residual for other activations (activation.py).
Shapes and layouts as in layouts.py; x, residual, y and their gradients in float16, bfloat16 or float32, all else in
float32.
Precision: a part's sums are of x less a shift near its mean, and are joined in float64, so that a mean far from 0 costs
no digits. Squares beyond the range of float32 make a variance infinite, as they do in PyTorch's batch norm on a GPU.
Determinism: the parts and every order of summation follow from shape and layout; there are no atomics.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moda_kernels.batch_norm import BatchNorm
from moda_kernels.plain import resolved
from moda_kernels.triton_kernels import norm_apply, norm_sums
from moda_kernels.triton_kernels.layouts import Layout, arrange, is_arranged
from moda_kernels.triton_kernels.tables import on_device_of


class Forward(NamedTuple):
    """Results, and what backward needs: mean, 1 / sqrt(var + eps), scale and bias, (4, C)."""

    y: Tensor
    pooled: Tensor | None
    saved: Tensor


class Backward(NamedTuple):
    """Gradients of x, of the residual (None without one), and of weight and bias, (2, C)."""

    x: Tensor
    residual: Tensor | None
    parameters: Tensor


def dense(x: Tensor) -> Tensor:
    """The activation, copied if it lies in none of the ways that layouts.py names."""
    return x if is_arranged(x) else x.contiguous()


def norm_relu_pool_forward(x: Tensor, norm: BatchNorm) -> Forward:
    """The forward pass of a dense x. Running statistics are updated in place; pooled is None for a matrix."""
    x, layout = _arranged(x)
    y = torch.empty_like(x)
    residual = None if norm.residual is None else like_layout(norm.residual, x)
    with on_device_of(x):
        sums = norm_sums.launch_statistics(x, layout) if norm.training else None
        saved = norm_apply.launch_numbers(x, layout, sums, norm)
        pooled = norm_apply.launch_apply(x, residual, y, saved, layout, norm.activation)
    return Forward(y, None if x.dim() == 2 else pooled, saved)


def norm_relu_pool_backward(
    x: Tensor,
    kept: Tensor | None,
    saved: Tensor,
    dy: Tensor | None,
    dpooled: Tensor | None,
    training: bool,
    activation: str,
) -> Backward:
    """The gradients. An upstream gradient that is None is zero.

    `kept` is there if there was a residual: y where the activation rectifies, and else the residual.
    """
    x, layout = _arranged(x)
    kept = None if kept is None else like_layout(kept, x)
    dy = None if dy is None else like_layout(resolved(dy), x)
    rows = None if dpooled is None else resolved(dpooled).contiguous()
    dresidual = None if kept is None else torch.empty_like(x)
    with on_device_of(x):
        sums = norm_sums.launch_gradient_sums(x, kept, saved, dy, rows, dresidual, layout, activation)
        parameters, means = norm_apply.launch_join(x, layout, sums, saved, training)
        dx = norm_apply.launch_gradient(x, saved, dy, rows, dresidual, means, layout, training, activation)
    return Backward(dx, dresidual, parameters)


def _arranged(x: Tensor) -> tuple[Tensor, Layout]:
    x, layout = arrange(x)
    return x, layout.as_matrix


def like_layout(tensor: Tensor, x: Tensor) -> Tensor:
    """The tensor as x lies in memory."""
    return tensor if tensor.stride() == x.stride() else torch.empty_like(x).copy_(tensor)
