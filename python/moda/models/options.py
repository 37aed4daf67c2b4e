"""Holds what every model needs: checks of sizes, the width multiplier, the published weight initialisation."""

from __future__ import annotations

import math

from torch import Tensor, nn


def check_width(width: float) -> float:
    """Return `width` if it is a positive number."""
    if not isinstance(width, (int, float)) or isinstance(width, bool):
        raise TypeError(f"width: expected a number, got {type(width).__name__}")
    if not 0 < width < float("inf"):
        raise ValueError(f"width: expected a positive number, got {width}")
    return width


def scaled(neurons: int, width: float) -> int:
    """Return the neurons of a layer at a width multiplier, at least 1."""
    return max(1, round(neurons * width))


def init_convolutions(model: nn.Module) -> None:
    """Give every convolution Kaiming-normal weights (fan-out, gain sqrt 2) and zero biases, as published."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def init_linears(model: nn.Module) -> None:
    """Give every linear layer normal weights of standard deviation 0.01 and zero biases, as published."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0.0, 0.01)
            nn.init.zeros_(module.bias)


def check_share(name: str, value: float) -> float:
    """Return `value` if it is a number in [0, 1)."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not 0 <= value < 1:
        raise ValueError(f"{name}: expected a number in [0, 1), got {value}")
    return float(value)


def add_convolution(
    model: nn.Module,
    index: int,
    inputs: int,
    outputs: int,
    kernel: int = 3,
    *,
    batch_norm: bool = False,
    nested: bool = False,
) -> None:
    """Add convolution `index` of the SimCNN family under its published name, and its ReLU.

    The convolution (with bias, keeping the size of the map) is `conv_{index}`, or `conv_{index}.0` with a batch norm
    behind it or if `nested`; the ReLU is `relu_{index}`.
    """
    convolution = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)
    layers = [convolution, *([nn.BatchNorm2d(outputs)] if batch_norm else [])]
    model.add_module(f"conv_{index}", nn.Sequential(*layers) if batch_norm or nested else convolution)
    model.add_module(f"relu_{index}", nn.ReLU())


def convolution_of(model: nn.Module, index: int, x: Tensor) -> Tensor:
    """Apply what `add_convolution` added: convolution, batch norm if there is one, ReLU."""
    y: Tensor = model.get_submodule(f"relu_{index}")(model.get_submodule(f"conv_{index}")(x))
    return y


def init_by_outputs(model: nn.Module) -> None:
    """Give every convolution normal weights of variance 2 / (k^2 outputs) and zero biases, as published."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            fan = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
            nn.init.normal_(module.weight, 0.0, math.sqrt(2 / fan))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
