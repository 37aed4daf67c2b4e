"""Pooled activations, and ReLU with pooling in one pass."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from moda_kernels.backends import select
from moda_kernels.validation import check_activation, check_layers


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
    """
    layers = check_layers(activations)
    pooled: list[Tensor] = select("pool", backend, layers).pool(layers)
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
        TypeError, ValueError: x is no floating-point tensor of such a shape.
        BackendUnavailableError: the backend asked for cannot run.
    """
    check_activation(x, "x")
    y, pooled = select("relu_pool", backend, (x,)).relu_pool(x, inplace)
    return y, pooled
