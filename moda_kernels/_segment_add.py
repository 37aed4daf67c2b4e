"""Sums over segments as one opaque operation, for `torch.compile` on the CPU.

Inductor's C++ code for `index_add` of rows that it computes in the same kernel adds them once per OpenMP thread
(seen with PyTorch 2.13 and 2 threads: class sums twice too large). As an operation of its own the sum is right.
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
