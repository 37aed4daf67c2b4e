"""An identity operator that marks a tap in an exported graph, so that taps and nodes need no matching."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["mark"]


@torch.library.custom_op("moda::tap", mutates_args=())
def mark(x: Tensor, index: int, neuron_dim: int) -> Tensor:
    """`x` unchanged: the activation of tap `index`, whose neurons are at dim `neuron_dim` of `x`.

    It is called as `torch.ops.moda.tap(x, index, neuron_dim)` while a model is exported for composition, and never
    otherwise. (An operator may not hand out its own input, hence the copy; nothing runs it.)
    """
    return x.clone()


@mark.register_fake
def _(x: Tensor, index: int, neuron_dim: int) -> Tensor:
    return torch.empty_like(x)


def _keep_nothing(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """An identity's gradient needs nothing of the forward pass."""


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
    return gradient, None, None


mark.register_autograd(_backward, setup_context=_keep_nothing)
