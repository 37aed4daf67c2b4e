"""Pooled activations, and ReLU with pooling in one pass."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from moda_kernels._native_relu_pool import CompiledReluPool, compiled
from moda_kernels.backends import select
from moda_kernels.marks import mark_pooled
from moda_kernels.validation import check_activation, check_flag, check_layers


def pool(activations: Sequence[Tensor], *, backend: str = "auto") -> list[Tensor]:
    """The pooled activation of every layer: mean over positions of the absolute value (arXiv 2411.01074).

    Args:
        activations: one tensor per layer, (N, C) or (N, C, *spatial), floating point, any strides.
        backend: see `moda_kernels.backends`.

    Returns:
        One (N, C) tensor per layer, float64 for float64 layers and float32 otherwise. An (N, C) activation is its
        own pool and keeps its sign.

    Raises:
        TypeError, ValueError: a layer is no floating-point tensor of such a shape, or there is none.
        BackendUnavailableError: the backend asked for cannot run.

    Examples:
        >>> image = torch.tensor([[[[1.0, -3.0]], [[0.0, 0.5]]]])  # one sample, two neurons, 1 x 2 positions
        >>> [pooled.tolist() for pooled in pool([image])]
        [[[2.0, 0.25]]]
    """
    layers = check_layers(activations)
    pooled = select("pool", backend, layers).pool(layers)
    for layer, rows in zip(layers, pooled, strict=True):
        if layer.dim() > 2:
            mark_pooled(rows)
    return pooled


def relu_pool(x: Tensor, *, inplace: bool = False, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """`relu(x)` and its pooled activation, in one pass over memory where the backend can.

    The pooled activation of a layer costs no pass of its own when it is taken while the ReLU has the values in
    registers, and its gradient none when it joins the ReLU's: dx = (y > 0) * (dy + dpooled / S).

    Args:
        x: (N, C) or (N, C, *spatial), floating point; S is the number of positions.
        inplace: write relu(x) over x, as `torch.relu_` does.
        backend: see `moda_kernels.backends`.

    Returns:
        `(y, pooled)`: y like x; pooled (N, C), mean of y over positions, float64 for float64 x and float32 otherwise.

    Raises:
        TypeError, ValueError: x is no floating-point tensor of such a shape, or `inplace` is no bool.
        BackendUnavailableError: the backend asked for cannot run.

    Examples:
        >>> y, pooled = relu_pool(torch.tensor([[[1.0, -3.0], [0.0, 0.5]]]))  # one sample, two neurons, two positions
        >>> y.tolist(), pooled.tolist()
        ([[[1.0, 0.0], [0.0, 0.5]]], [[0.5, 0.25]])
    """
    check_activation(x, "x")
    check_flag(inplace, "inplace")
    implementation = select("relu_pool", backend, (x,))
    if inplace and _is_guarded(x):
        y = torch.relu_(x)
        pooled = implementation.pool([y])[0]
    else:
        y, pooled = implementation.relu_pool(x, inplace)
    if x.dim() > 2:
        mark_pooled(pooled)
    return y, pooled


def compiled_relu_pool() -> CompiledReluPool | None:
    """relu_pool of tensors on the CPU as one function of C++; None if that is not what backend "auto" takes."""
    return compiled() if os.environ.get("MODA_BACKEND", "auto") in ("auto", "native") else None


def _is_guarded(x: Tensor) -> bool:
    """Whether autograd may forbid overwriting x, or must be told first; `torch.relu_` asks it before it writes."""
    if torch.compiler.is_compiling():  # the compiler looks after what is overwritten
        return False
    if x.is_inference():
        return not torch.is_inference_mode_enabled()
    return x._is_view() or (x.requires_grad and x.is_leaf)
