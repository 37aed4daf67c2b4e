"""Decides whether the steps of a training on Lightning are captured in a CUDA graph."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.pytorch.plugins import MixedPrecision, Precision
from lightning.pytorch.plugins.precision import DoublePrecision
from lightning.pytorch.strategies import SingleDeviceStrategy

from moda.runs.config import OFF, TrainingConfig
from moda.training import graphed

if TYPE_CHECKING:
    import lightning.pytorch as lightning

_PRECISIONS = (Precision, MixedPrecision, DoublePrecision)


def why_eager(config: TrainingConfig, trainer: lightning.Trainer) -> str:
    """Say why a training's steps are not captured, as far as its settings tell; empty if they may be."""
    device = trainer.strategy.root_device.type
    reasons = {
        f"--graph {OFF}": config.graph == OFF,
        f"no graph on a device of type {device!r}": device != graphed.DEVICE,
        "no graph of a training by several processes": trainer.world_size > 1,
        f"no graph with {type(trainer.strategy).__name__}": type(trainer.strategy) is not SingleDeviceStrategy,
        f"no graph with the method {config.method}, which trains gates": config.gated,
        "no graph where gradients of several batches are added up": trainer.accumulate_grad_batches != 1,
        f"no graph with the precision {trainer.precision}": type(trainer.precision_plugin) not in _PRECISIONS,
        "no graph with detect_anomaly, which looks at every gradient": trainer._detect_anomaly,
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def scaler_of(trainer: lightning.Trainer) -> Any:
    """Return what scales the trainer's loss; None if nothing does."""
    plugin = trainer.precision_plugin
    return plugin.scaler if isinstance(plugin, MixedPrecision) else None
