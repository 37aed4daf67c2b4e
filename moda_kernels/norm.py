"""Batch norm, a ReLU or its like, and the pooled activation as one operation."""

from __future__ import annotations

from torch import Tensor

from moda_kernels.backends import select
from moda_kernels.batch_norm import BatchNorm, check_batch_norm
from moda_kernels.marks import mark_pooled
from moda_kernels.validation import check_activation


def norm_relu_pool(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str = "relu",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`activation(batch_norm(x) + residual)` and its pooled activation.

    The kernels read x once for the statistics and once to write y, and backward reads x and the gradient of y twice and
    writes the gradient of x: they keep x and numbers per neuron and compute the activation's input again. With a
    residual they keep y for the mask of ReLU and ReLU6, or the residual for the others, and write the residual's
    gradient too. Apart, batch norm, ReLU and pooling take 13 passes.

    Args:
        x: (N, C) or (N, C, *spatial), floating point.
        running_mean: (C,) or None, as `torch.nn.functional.batch_norm` takes it: of x's dtype or, beside half
            precision, float32. Updated in place with `training`.
        running_var: like running_mean.
        weight: like running_mean; left alone.
        bias: like weight.
        residual: like x in shape and dtype, or None.
        training: normalise with the batch's statistics; with the running ones otherwise.
        momentum: the share of the batch's statistics in the running ones; a module whose momentum is None passes
            1 / num_batches_tracked here.
        eps: added to the variance.
        activation: "relu", "relu6", "hardswish", "silu" or "gelu" (the exact one, by the error function).
        backend: see `moda_kernels.backends`.

    Returns:
        `(y, pooled)`: y like x; pooled (N, C), mean of |y| over positions, or y itself where there are none (x is
        (N, C)); float64 for float64 x and float32 otherwise.

    Raises:
        TypeError, ValueError: an argument is of another kind, shape, dtype or device than x asks for; running
            statistics are missing without `training`; x has one value per neuron with it, as PyTorch refuses it.
        BackendUnavailableError: the backend asked for cannot run.
    """
    check_activation(x, "x")
    norm = BatchNorm(running_mean, running_var, weight, bias, residual, training, momentum, eps, activation)
    check_batch_norm(x, norm)
    y, pooled = select("norm_relu_pool", backend, (x,), norm.tensors()).norm_relu_pool(x, norm)
    if x.dim() > 2:
        mark_pooled(pooled)
    return y, pooled
