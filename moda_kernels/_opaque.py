"""Opaque operators for operations that `torch.compile` must not fuse on the CPU.

Inductor's C++ code gets two things wrong there (seen with PyTorch 2.13, 2 threads and layers of 1024 neurons):

- `index_add` of rows that it computes in the same kernel adds them once per OpenMP thread: class sums twice too large;
- a kernel that spreads the gradient of rows over 2 x 2 positions while it computes that gradient takes the gradients
  of other rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("moda_kernels::segment_add", mutates_args=())
def segment_add(rows: Tensor, segment: Tensor) -> Tensor:
    """Like `rows`: row g is the sum of the rows i with segment[i] == g."""
    return torch.zeros_like(rows).index_add(0, segment, rows)


@segment_add.register_fake
def _(rows: Tensor, segment: Tensor) -> Tensor:
    return torch.empty_like(rows)


def _keep_segment(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _gather(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
    (segment,) = ctx.saved_tensors
    return gradient.index_select(0, segment), None


segment_add.register_autograd(_gather, setup_context=_keep_segment)


@torch.library.custom_op("moda_kernels::apart", mutates_args=())
def apart(rows: Tensor) -> Tensor:
    """A copy, which keeps the kernels that make the rows apart from those that use them, forward and backward."""
    return rows.clone()


@apart.register_fake
def _(rows: Tensor) -> Tensor:
    return torch.empty_like(rows)


def _apart(ctx: Any, gradient: Tensor) -> Tensor:
    copy: Tensor = apart(gradient)
    return copy


apart.register_autograd(_apart)
