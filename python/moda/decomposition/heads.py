"""Heads of modules that answer with a probability: one small network a class, on the logits of the class's module.

The head of class k turns logits z into sigmoid(W2 relu(W1 relu(z) + b1) + b2), the probability that a sample is of the
class (GradSplitter, arXiv 2311.04438).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

HEAD_TENSORS = ("hidden.weight", "hidden.bias", "output.weight", "output.bias")
"""Of K heads with H hidden neurons on L logits: (K, H, L), (K, H), (K, 1, H) and (K, 1)."""


def check_heads(heads: Any, num_classes: int) -> dict[str, Tensor]:
    """Give the heads' tensors, detached.

    Raises:
        TypeError, ValueError: a tensor is missing, unknown, of another shape or not of floating point.
    """
    if not isinstance(heads, Mapping):
        raise TypeError(f"heads: expected a mapping of names to tensors, got {type(heads).__name__}")
    if sorted(heads) != sorted(HEAD_TENSORS):
        raise ValueError(f"heads: expected the tensors {', '.join(HEAD_TENSORS)}, got {', '.join(sorted(heads))}")
    for name, tensor in heads.items():
        if not isinstance(tensor, Tensor) or not tensor.dtype.is_floating_point:
            got = getattr(tensor, "dtype", type(tensor).__name__)
            raise TypeError(f"heads[{name!r}]: expected a floating-point tensor, got {got}")
    first = heads["hidden.weight"]
    if first.dim() != 3 or len(first) != num_classes or 0 in first.shape:
        raise ValueError(
            f"heads['hidden.weight']: expected shape ({num_classes}, neurons, logits), got {tuple(first.shape)}"
        )
    hidden = first.shape[1]
    shapes = ((num_classes, hidden), (num_classes, 1, hidden), (num_classes, 1))
    for name, shape in zip(HEAD_TENSORS[1:], shapes, strict=True):
        if tuple(heads[name].shape) != shape or heads[name].dtype != first.dtype:
            raise ValueError(
                f"heads[{name!r}]: expected shape {shape} in {first.dtype}, got {tuple(heads[name].shape)} in "
                f"{heads[name].dtype}"
            )
    return {name: heads[name].detach() for name in HEAD_TENSORS}


def head_parameters(heads: Mapping[str, Tensor]) -> int:
    """How many parameters one head has; 0 without heads."""
    return sum(tensor[0].numel() for tensor in heads.values())
