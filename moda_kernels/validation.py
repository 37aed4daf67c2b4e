"""Checks of the arguments of public functions. Every error names the argument, what was given and what is expected."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.masked import is_masked_tensor

from moda_kernels import plain

_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_LABEL_DTYPES = (torch.int64, torch.int32)
LONGEST_SHOWN = 80
MOST_CLASSES = 1 << 24
"""More are a mistake: their totals alone would take all memory."""


def check_batch(activations: Sequence[Tensor], labels: Tensor, *, allow_empty: bool = False) -> tuple[Tensor, ...]:
    """The activations as a tuple, if they and the labels are one batch of at least one layer and one sample.

    With `allow_empty` there may be no sample, because a process may hold none of a batch that others share.
    """
    check_labels(labels, allow_empty=allow_empty)
    layers = check_layers(activations, allow_empty=allow_empty)
    samples, device = labels.shape[0], labels.device
    for index, activation in enumerate(layers):
        if activation.shape[0] != samples:
            found = activation.shape[0]
            raise ValueError(f"activations[{index}]: expected {samples} samples as in labels, got {found}")
        if activation.device != device:
            raise ValueError(
                f"activations[{index}]: expected device {device} as labels are on, got {activation.device}"
            )
    return layers


def check_layers(activations: Sequence[Tensor], *, allow_empty: bool = False) -> tuple[Tensor, ...]:
    """The activations as a tuple, if they are at least one layer and all floating-point."""
    if isinstance(activations, Tensor) or not isinstance(activations, Sequence):
        raise TypeError(f"activations: expected a sequence of tensors, one per layer, got {type(activations).__name__}")
    layers = tuple(activations)
    if not layers:
        raise ValueError("activations: expected at least one layer, got none")
    for index, activation in enumerate(layers):
        if problem := _problem(activation, allow_empty):
            raise type(problem)(f"activations[{index}]: {problem}")
    return layers


def check_gradients(gradients: Sequence[Tensor], layers: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The gradients as a tuple, if there is one for each layer that is like it."""
    if isinstance(gradients, Tensor) or not isinstance(gradients, Sequence):
        raise TypeError(f"gradients: expected a sequence of tensors, one per layer, got {type(gradients).__name__}")
    if len(gradients) != len(layers):
        raise ValueError(f"gradients: expected {len(layers)}, one per layer, got {len(gradients)}")
    for index, (gradient, layer) in enumerate(zip(gradients, layers, strict=True)):
        check_strided_like(gradient, layer, f"gradients[{index}]")
    return tuple(gradients)


def check_strided_like(tensor: Any, activation: Tensor, name: str) -> None:
    """Check that this is a strided tensor of the shape, dtype and device of an activation."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    check_strided(tensor, name)
    for what in ("shape", "dtype", "device"):
        expected, found = getattr(activation, what), getattr(tensor, what)
        if found != expected:
            expected, found = (tuple(x) if what == "shape" else x for x in (expected, found))
            raise ValueError(f"{name}: expected {what} {expected} of the activation, got {found}")


def check_activation(activation: Any, name: str, *, allow_empty: bool = False) -> None:
    """Check that this is a floating-point (N, C) or (N, C, *spatial) tensor; only N may be 0, if `allow_empty`."""
    if problem := _problem(activation, allow_empty):
        raise type(problem)(f"{name}: {problem}")


def _problem(activation: Any, allow_empty: bool) -> TypeError | ValueError | None:
    """The error for an activation; None if nothing is wrong. It is cheap then: every step asks it."""
    if not isinstance(activation, Tensor):
        return TypeError(f"expected a tensor, got {type(activation).__name__}")
    if activation.dtype not in _FLOATS:
        expected = "a dtype of 16, 32 or 64 bits" if activation.dtype.is_floating_point else "a floating-point dtype"
        return TypeError(f"expected {expected}, got {activation.dtype}")
    if unfit := _unfit(activation):
        return TypeError(f"expected a strided tensor, got {unfit}")
    shape = activation.shape
    if len(shape) < 2:
        return ValueError(f"expected shape (N, C) or (N, C, *spatial), got {tuple(shape)}")
    if 0 in (shape[1:] if allow_empty else shape):
        return ValueError(f"expected at least one sample, neuron and position, got shape {tuple(shape)}")
    return None


def check_strided(tensor: Tensor, name: str) -> None:
    """Check that a tensor's elements lie in memory at strides, or that it stands for such a tensor."""
    if unfit := _unfit(tensor):
        raise TypeError(f"{name}: expected a strided tensor, got {unfit}")


def _unfit(tensor: Tensor) -> str | None:
    """The kind of a tensor whose elements do not lie at strides (sparse, nested, masked, freed); None for others."""
    if tensor.is_nested:
        return "a nested one"
    if tensor.layout is not torch.strided:
        return f"layout {tensor.layout}"
    if type(tensor) is not Tensor and is_masked_tensor(tensor):
        return "a masked one"
    if plain.is_freed(tensor):
        return "one whose storage was freed"
    return None


def check_labels(labels: Any, *, allow_empty: bool = False) -> None:
    """Check that labels are an (N,) int64 or int32 tensor, not empty unless `allow_empty`."""
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels: expected a tensor, got {type(labels).__name__}")
    if labels.dtype not in _LABEL_DTYPES:
        raise TypeError(f"labels: expected dtype torch.int64 or torch.int32, got {labels.dtype}")
    check_strided(labels, "labels")
    if labels.dim() != 1:
        raise ValueError(f"labels: expected shape (N,), got {tuple(labels.shape)}")
    if labels.shape[0] == 0 and not allow_empty:
        raise ValueError("labels: expected at least one sample, got none")


def check_magnitude(number: Any, name: str, noun: str = "number") -> float:
    """The number as a float, if it is finite and at least 0; `noun` is what an error calls it."""
    if not isinstance(number, Real) or isinstance(number, bool):
        raise TypeError(f"{name}: expected a number, got {type(number).__name__}")
    value = float(number)
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name}: expected a finite {noun} of at least 0, got {number}")
    return value


def check_num_classes(num_classes: Any) -> None:
    """Check that the number of classes is a positive integer of reasonable size."""
    if not isinstance(num_classes, int) or isinstance(num_classes, bool):
        raise TypeError(f"num_classes: expected an int, got {type(num_classes).__name__}")
    if not 1 <= num_classes <= MOST_CLASSES:
        wanted = "at least 1" if num_classes < 1 else f"at most {MOST_CLASSES}"
        raise ValueError(f"num_classes: expected {wanted}, got {shown(num_classes)}")


def check_flag(value: Any, name: str) -> None:
    """Check that this is True or False; what else Python takes for one, or cannot, is a mistake."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {type(value).__name__}")


def shown(value: Any) -> str:
    """A value as an error shows it, which may be of any length."""
    if isinstance(value, int) and abs(value) > 1 << 64:
        return f"one of {value.bit_length()} bits"
    try:
        text = repr(value)
    except ValueError:  # Python does not write the largest integers, inside of others neither
        return f"a {type(value).__name__}"
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."


def check_label_range(labels: Tensor, num_classes: int) -> None:
    """Check that all labels are in [0, num_classes). This reads the labels on the host."""
    if labels.shape[0] == 0:
        return
    smallest, largest = map(int, labels.aminmax())
    if smallest < 0 or largest >= num_classes:
        wrong = smallest if smallest < 0 else largest
        raise ValueError(f"labels: expected classes in [0, {num_classes}), got {wrong}")
