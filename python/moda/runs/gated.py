"""Runs whose method trains gates beside the model: MwT and NeMo."""

from __future__ import annotations

import torch
from torch import nn

from moda.data import DataSplits
from moda.inference import device_of
from moda.methods.mwt import MwT, PreparedGates
from moda.methods.nemo import NeMo
from moda.runs.config import TrainingConfig


def method_of(config: TrainingConfig, threshold: float = MwT.threshold) -> MwT | NeMo:
    """Give the method of a run that trains gates.

    Args:
        config: of the run.
        threshold: the share of a class's samples that must use a neuron for the class to keep it.

    Raises:
        ValueError: the run's method trains no gates, or the threshold is out of range.
    """
    training = {"epochs": config.epochs, "learning_rate": config.learning_rate, "momentum": config.momentum}
    if config.method == MwT.name:
        return MwT(config.cohesion, config.coupling, threshold=threshold, **training)  # type: ignore[arg-type]
    if config.method == NeMo.name:
        return NeMo(config.contrast, config.temperature, threshold=threshold, **training)  # type: ignore[arg-type]
    raise ValueError(f"method: expected one that trains gates, got {config.method!r}")


def with_gates(config: TrainingConfig, data: DataSplits, model: nn.Module) -> PreparedGates:
    """Give a model the gates of a run's method, in place.

    Raises:
        ValueError: the method does not fit the model; the message says what to do.
    """
    example = torch.zeros(2, *data.input_shape, device=device_of(model))
    return method_of(config).prepare(model, data.num_classes, example)
