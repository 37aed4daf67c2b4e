"""The mark of pooled rows, by which a counter of firings knows that they are no activation."""

from __future__ import annotations

import torch
from torch import Tensor

POOLED = "_moda_pooled"


def mark_pooled(rows: Tensor) -> None:
    """Mark a tensor as means over positions, which no longer hold the activation's own values."""
    if not torch.compiler.is_compiling():
        setattr(rows, POOLED, True)


def is_pooled(tensor: Tensor) -> bool:
    """Whether `mark_pooled` marked this very tensor; tensors computed from it have no mark."""
    return getattr(tensor, POOLED, False)
