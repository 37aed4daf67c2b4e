"""Checks of tensors that have a row for every class, and in it a number for every neuron of a tap."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moda_kernels.validation import check_strided

__all__ = ["check_class_sizes", "check_per_neuron"]


def check_class_sizes(class_sizes: Any) -> None:
    """Check that these are (K,) integers of at least 0.

    Raises:
        TypeError, ValueError: they are not.
    """
    _check_tensor("class_sizes", class_sizes)
    if class_sizes.dtype != torch.int64:
        raise TypeError(f"class_sizes: expected dtype torch.int64, got {class_sizes.dtype}")
    if class_sizes.dim() != 1 or not class_sizes.shape[0]:
        raise ValueError(f"class_sizes: expected shape (classes,), got {tuple(class_sizes.shape)}")
    if bool((class_sizes < 0).any()):
        raise ValueError(f"class_sizes: expected sizes of at least 0, got {int(class_sizes.min())}")


def check_per_neuron(name: str, tensors: Any, num_classes: int | None = None, dtype: torch.dtype | None = None) -> None:
    """Check that these are (K, C) tensors by the names of taps, of one dtype, or of any that is floating-point.

    Raises:
        TypeError, ValueError: they are not.
    """
    if not isinstance(tensors, Mapping):
        raise TypeError(f"{name}: expected a mapping of taps to tensors, got {type(tensors).__name__}")
    if not tensors:
        raise ValueError(f"{name}: expected at least one tap, got none")
    for tap, tensor in tensors.items():
        if not isinstance(tap, str):
            raise TypeError(f"{name}: expected names of taps, got {type(tap).__name__}")
        of_tap = f"{name}[{tap!r}]"
        _check_tensor(of_tap, tensor)
        if not (tensor.dtype.is_floating_point if dtype is None else tensor.dtype == dtype):
            expected = "a floating-point tensor" if dtype is None else f"dtype {dtype}"
            raise TypeError(f"{of_tap}: expected {expected}, got {tensor.dtype}")
        if tensor.dim() != 2 or 0 in tensor.shape or num_classes not in (None, tensor.shape[0]):
            expected = f"({'classes' if num_classes is None else num_classes}, neurons)"
            raise ValueError(f"{of_tap}: expected shape {expected}, got {tuple(tensor.shape)}")


def _check_tensor(name: str, tensor: Any) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    check_strided(tensor, name)
    if tensor.is_meta:
        raise TypeError(f"{name}: expected a tensor with numbers, got one on device meta")
