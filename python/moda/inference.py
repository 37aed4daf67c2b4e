"""Where a model is, how its inputs are best laid out, and evaluation mode that is put back afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's first parameter or buffer; the CPU if it has none."""
    for tensor in chain(model.parameters(), model.buffers()):
        return tensor.device
    return torch.device("cpu")


def fastest_layout(model: nn.Module, example: Any) -> torch.memory_format:
    """The order in memory of images with which the model is fastest: channels last on a CPU, where it takes that.

    Convolutions and pooling are up to twice as fast there. A model that views its features flat, without copying them,
    does not take it.
    """
    if not isinstance(example, Tensor) or example.dim() != 4 or example.device.type != "cpu":
        return torch.contiguous_format
    try:
        with torch.no_grad():
            model(example.contiguous(memory_format=torch.channels_last))
    except RuntimeError:
        return torch.contiguous_format
    return torch.channels_last


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for the whole model; afterwards every submodule is as it was (frozen norms stay frozen)."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            if module.training != training:
                module.training = training
