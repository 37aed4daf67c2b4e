"""relu_pool through the compiled extension, eagerly: as a node of autograd in C++, and in Python where C++ leaves it.

The node in C++ (csrc/torch/autograd.cpp) computes the same with the same kernels, and asks Python for what is not
plain, so that results and errors are the same. It costs a tenth of what PyTorch takes to run a node of Python.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any, Protocol

import torch
from torch import Tensor

from moda_kernels import _native_calls as calls
from moda_kernels.marks import POOLED
from moda_kernels.once import relu_pool_gradient


class CompiledReluPool(Protocol):
    """relu_pool in C++."""

    def __call__(self, x: Tensor, inplace: bool, dims: int = ...) -> tuple[Tensor, Tensor] | None:
        """`relu(x)` and its pooled activation, marked as such; None if `x` or the moment is not plain.

        With `dims`, also if `x` has another number of axes or gradients are disabled.
        """


@functools.cache
def compiled() -> CompiledReluPool | None:
    """The function in C++; None where there is none that was built for this PyTorch and beside these kernels."""
    try:
        kernels = calls.extension()
        module = importlib.import_module("moda_kernels._autograd")
    except (calls.NotBuiltError, ImportError):
        return None
    if module.torch_version != torch.__version__ or module.source_digest != kernels.build_info()["source_digest"]:
        return None
    module.use(kernels.kernels(), _gradient, POOLED)
    function: CompiledReluPool = module.relu_pool
    return function


def relu_pool(x: Tensor, inplace: bool) -> tuple[Tensor, Tensor]:
    """`relu(x)` and its pooled activation; x is spatial, and dense if it is to be overwritten."""
    function = compiled()
    results = None if function is None else function(x, inplace)
    if results is None:
        results = _ReluPool.apply(x if inplace else calls.dense(x), inplace)  # type: ignore[no-untyped-call]
    return results


class _ReluPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, inplace: bool) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        y = x if inplace else torch.empty_like(x)
        pooled = calls.relu_pool_forward(x, y)
        if inplace:
            ctx.mark_dirty(x)
        ctx.save_for_backward(y)
        return y, pooled

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dpooled: Tensor | None) -> tuple[Tensor | None, None]:
        (y,) = ctx.saved_tensors
        if dy is None and dpooled is None:
            return None, None
        return _gradient(y, dy, dpooled), None


def _gradient(y: Tensor, dy: Tensor | None, dpooled: Tensor | None) -> Tensor:
    if torch.is_grad_enabled():
        return relu_pool_gradient(y, dy, dpooled)
    return calls.relu_pool_backward(y, dy, dpooled)
