"""Holds what every model needs: checks of sizes, the width multiplier, the published weight initialisation."""

from __future__ import annotations

from torch import nn


def check_count(name: str, value: int, least: int = 1) -> int:
    """Return `value` if it is an int of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")
    return value


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
