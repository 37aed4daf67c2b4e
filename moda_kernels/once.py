"""Gradients that compiled kernels computed, and the error for differentiating them again.

Without the error, autograd would take such a gradient for a constant and silently give a wrong second derivative.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

MESSAGE = (
    "the compiled kernels are differentiable once, and their gradient was differentiated again; use "
    'backend="torch", which is differentiable twice, or route="grouped" where moda observes the model'
)


def refuse_second_backward(ctx: Any, *gradients: Any) -> Any:
    """The autograd formula of an operator that is a gradient itself."""
    raise RuntimeError(MESSAGE)


def relu_pool_gradient(y: Tensor, dy: Tensor | None, dpooled: Tensor | None) -> Tensor:
    """Dx = (y > 0) * (dy + dpooled / S) in operations of PyTorch, for a graph of the gradient (create_graph=True).

    The gradient passes where y is NaN, and is a function of y even where dy and dpooled are constants, as in PyTorch.
    """
    gradient = dy
    if dpooled is not None:
        positions = y[0, 0].numel() if y.dim() > 2 and y.shape[0] and y.shape[1] else 1
        spread = (dpooled / positions).to(y.dtype).view(*y.shape[:2], *[1] * (y.dim() - 2)).expand_as(y)
        gradient = spread if gradient is None else gradient + spread
    if gradient is None:
        return torch.zeros_like(y)
    return torch.ops.aten.threshold_backward(gradient, y, 0)  # type: ignore[no-any-return]


def once_only(gradients: Sequence[Tensor | None], depends_on: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """The gradients. If a graph of them is being made (create_graph=True), differentiating it raises the error above.

    Args:
        gradients: what a backward pass computed; None where nothing is needed.
        depends_on: what it was computed from.
    """
    if not torch.is_grad_enabled():
        return tuple(gradients)
    present = [gradient for gradient in gradients if gradient is not None]
    sources = [tensor for tensor in depends_on if tensor is not None]
    guarded = iter(_OnceOnly.apply(len(present), *present, *sources))  # type: ignore[no-untyped-call]
    return tuple(None if gradient is None else next(guarded) for gradient in gradients)


class _OnceOnly(torch.autograd.Function):
    """Passes the first `count` tensors on, and stands in the graph as a function of all tensors."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise RuntimeError(MESSAGE)
