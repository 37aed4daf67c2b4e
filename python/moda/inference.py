"""Where a model is, how its inputs are best laid out, and modes of computing that are put back afterwards."""

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
def whole_float32() -> Iterator[None]:
    """On GPUs float32 is multiplied as float32, not as TF32, whose ten bits hide what is compared in here."""
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    names: list[tuple[Any, str, object]] = [(setting, "allow_tf32", False) for setting in (cuda.matmul, cudnn)]
    try:
        for setting, name, _ in names:
            getattr(setting, name)
    except RuntimeError:  # the newer settings are in use, and may not be mixed with these
        names = [(setting, "fp32_precision", "ieee") for setting in (cuda.matmul, cudnn.conv, cudnn.rnn)]  # type: ignore[attr-defined]
    before = [getattr(setting, name) for setting, name, _ in names]
    try:
        for setting, name, value in names:
            setattr(setting, name, value)
        yield
    finally:
        for (setting, name, _), value in zip(names, before, strict=True):
            setattr(setting, name, value)


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


def check_module(model: Any, name: str = "model") -> None:
    """Refuse what is no network.

    Raises:
        TypeError: it is something else; the message begins with `name`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{name}: expected a torch.nn.Module, got {type(model).__name__}")
