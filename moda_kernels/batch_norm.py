"""The arguments of batch norm and of the activation behind it, and the check that they fit an input."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moda_kernels.validation import check_strided, shown

RECTIFIERS = ("relu", "relu6")
"""Activations whose gradient is 0 or 1, as what they give tells."""
ACTIVATIONS = (*RECTIFIERS, "hardswish", "silu", "gelu")
"""Activations that batch norm is one operation with, by the names of their functions in `torch.nn.functional`.

Their places are those of Activation in csrc/types.h.
"""


class BatchNorm(NamedTuple):
    """The arguments of `torch.nn.functional.batch_norm`, a residual that is added to its result, and an activation.

    Numbers per neuron are (C,) tensors. Statistics are the batch's with `training` (then the running ones, if there are
    any, are updated in place), and the running ones without.
    """

    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    residual: Tensor | None
    training: bool
    momentum: float
    eps: float
    activation: str = "relu"  # one of ACTIVATIONS

    @property
    def rectifies(self) -> bool:
        """Whether the activation's result tells its gradient."""
        return self.activation in RECTIFIERS

    def tensors(self) -> list[Tensor]:
        """Every tensor that is not None."""
        found = (self.running_mean, self.running_var, self.weight, self.bias, self.residual)
        return [tensor for tensor in found if tensor is not None]


_PER_NEURON = ("running_mean", "running_var", "weight", "bias")


def check_batch_norm(x: Tensor, norm: BatchNorm) -> None:
    """Check that the arguments fit an activation `x`, which was checked before.

    Raises:
        TypeError, ValueError: an argument is of another kind, shape, dtype or device than `x` asks for, or statistics
            are missing, or are to be taken over one value.
    """
    _check_settings(norm)
    dtype: torch.dtype | None = None
    for name, tensor in zip(_PER_NEURON, norm[:4], strict=True):
        if tensor is not None:
            _check_per_neuron(name, tensor, x, dtype)
            dtype = tensor.dtype
    for name, tensor in zip(_PER_NEURON[:2], norm[:2], strict=True):
        if norm.training and tensor is not None and tensor.requires_grad:
            raise ValueError(f"{name}: expected a tensor that requires no gradient when training, as it is overwritten")
    if (norm.running_mean is None) != (norm.running_var is None):
        missing = "running_mean" if norm.running_mean is None else "running_var"
        raise ValueError(
            f"{missing}: expected both running_mean and running_var or neither, got None for this one alone"
        )
    if norm.residual is not None:
        _check_residual(norm.residual, x)
    if norm.training and x.numel() == x.shape[1]:
        raise ValueError(f"x: Expected more than 1 value per channel when training, got input size {x.shape}")
    if not norm.training and norm.running_mean is None:
        raise ValueError("running_mean: expected running statistics where training is False, got None")


def _check_settings(norm: BatchNorm) -> None:
    if not isinstance(norm.training, bool):
        raise TypeError(f"training: expected a bool, got {type(norm.training).__name__}")
    for name, value in (("momentum", norm.momentum), ("eps", norm.eps)):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            hint = "; for a cumulative average pass 1 / num_batches_tracked" if name == "momentum" else ""
            raise TypeError(f"{name}: expected a number, got {type(value).__name__}{hint}")
        if not math.isfinite(value):
            raise ValueError(f"{name}: expected a finite number, got {value}")
    if not isinstance(norm.activation, str):
        raise TypeError(f"activation: expected a str, got {type(norm.activation).__name__}")
    if norm.activation not in ACTIVATIONS:
        known = ", ".join(map(repr, ACTIVATIONS))
        raise ValueError(f"activation: expected one of {known}, got {shown(norm.activation)}")
    if norm.eps < 0 or (norm.training and norm.eps == 0):
        expected = "a positive number when training" if norm.training else "a number of at least 0"
        raise ValueError(f"eps: expected {expected}, got {norm.eps}")


def _check_per_neuron(name: str, tensor: Any, x: Tensor, others: torch.dtype | None) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor or None, got {type(tensor).__name__}")
    check_strided(tensor, name)
    if tensor.dim() != 1 or tensor.shape[0] != x.shape[1]:
        raise ValueError(f"{name}: expected shape ({x.shape[1]},), one number per neuron, got {tuple(tensor.shape)}")
    half = x.dtype in (torch.float16, torch.bfloat16)
    allowed = (x.dtype, torch.float32) if half else (x.dtype,)
    if tensor.dtype not in (allowed if others is None else (others,)):
        names = " or ".join(str(dtype) for dtype in (allowed if others is None else (others,)))
        raise TypeError(f"{name}: expected {names} beside x of {x.dtype}, got {tensor.dtype}")
    if tensor.device != x.device:
        raise ValueError(f"{name}: expected device {x.device} as x is on, got {tensor.device}")


def _check_residual(residual: Any, x: Tensor) -> None:
    if not isinstance(residual, Tensor):
        raise TypeError(f"residual: expected a tensor or None, got {type(residual).__name__}")
    check_strided(residual, "residual")
    if residual.shape != x.shape:
        raise ValueError(f"residual: expected shape {tuple(x.shape)} as x has, got {tuple(residual.shape)}")
    if residual.dtype != x.dtype:
        raise TypeError(f"residual: expected {x.dtype} as x has, got {residual.dtype}")
    if residual.device != x.device:
        raise ValueError(f"residual: expected device {x.device} as x is on, got {residual.device}")
