"""Writes the checkpoints of a run, and refuses those that it has not written.

A checkpoint is read with `weights_only=True` by every strategy, after it was checked: its SHA-256, and that all of its
parts are what the run's settings can have led to.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import CheckpointIO
from torch import Tensor, nn

from moda.checks import integer, items, mapping, number, record
from moda.files import FormatError, format_errors, parse_torch
from moda.runs.checksums import read_checked, write_checked
from moda.runs.config import RUNTIME_SETTINGS, TrainingConfig
from moda.runs.folder import RunFolder

__all__ = ["CHECKPOINT_VERSION", "SafeCheckpointIO", "check_checkpoint", "check_own_part"]

CHECKPOINT_VERSION = 1
RATE_TOLERANCE = 1e-6
"""Relative error of a learning rate, which the schedule computes step by step."""


class SafeCheckpointIO(CheckpointIO):
    """Keeps a run's checkpoints: whole or absent, the very ones that were written, and read without running code."""

    def __init__(self, run: RunFolder) -> None:
        self.run = run

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint, atomically, and note its SHA-256."""
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_checked(self.run.path, Path(path), buffer.getvalue())

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = True) -> dict[str, Any]:
        """Read a checkpoint without running anything in it."""
        return _read_checkpoint(self.run, Path(path))

    def remove_checkpoint(self, path: Any) -> None:
        """Remove a checkpoint, if it is there."""
        Path(path).unlink(missing_ok=True)


def check_checkpoint(run: RunFolder, module: nn.Module) -> None:
    """Check the last checkpoint before Lightning reads it.

    Args:
        run: the run, with the settings to go on with.
        module: what is trained; the checkpoint must be of its weights.

    Raises:
        FormatError: it is not the one that was written, holds anything but tensors and plain values, or cannot be one
            of this run: parts are missing, or weights, optimiser, schedule or progress are not as the settings have it.
    """
    path = run.last_checkpoint
    checkpoint = _read_checkpoint(run, path)
    with format_errors(path):
        record({"state_dict": _any, "optimizer_states": _any, "lr_schedulers": _any, "loops": _any, "moda": _any})(
            "", {name: part for name, part in checkpoint.items() if name in _PARTS}
        )
        config = run.config
        _check_weights(checkpoint["state_dict"], module.state_dict())
        steps = integer(0)("global_step", checkpoint.get("global_step"))
        (schedule,) = items(_object, least=1, most=1)("lr_schedulers", checkpoint["lr_schedulers"])
        epoch = integer(0, config.epochs)("lr_schedulers: last_epoch", schedule["last_epoch"])
        _check_optimizer(checkpoint["optimizer_states"], module, config, epoch, steps)
        expected = {"T_max": config.epochs, "base_lrs": [config.learning_rate], "eta_min": 0}
        _check_equal("lr_schedulers", schedule, expected)
        _check_progress(checkpoint["loops"], config, steps)
        check_own_part("moda", checkpoint["moda"], config)


def check_own_part(name: str, part: Any, config: TrainingConfig) -> dict[str, Any]:
    """Give what we add to a checkpoint, if it is of a training with these settings.

    Raises:
        FormatError: it is of another version or of other settings, or is malformed.
    """
    with format_errors(name):
        version = part.get("format_version") if isinstance(part, dict) else None
        if version != CHECKPOINT_VERSION:
            raise FormatError(f"{name}: expected format_version {CHECKPOINT_VERSION}, got {version!r:.80}")
        ours = record({"config": mapping(_any), "random_state": mapping(_random_state), "train_sums": _sums})("", part)
        for setting, value in config.to_dict().items():
            saved = ours["config"].get(setting)
            if saved != value and setting not in RUNTIME_SETTINGS:
                raise FormatError(f"{name}: made with {setting}={saved!r:.80}, this run has {value!r}")
        return dict(ours)


def _read_checkpoint(run: RunFolder, path: Path) -> dict[str, Any]:
    checkpoint = parse_torch(path, read_checked(run.path, path))
    if not isinstance(checkpoint, dict):
        raise FormatError(f"{path}: not a checkpoint: it holds a {type(checkpoint).__name__}")
    return checkpoint


_PARTS = frozenset({"state_dict", "optimizer_states", "lr_schedulers", "loops", "moda"})


def _any(name: str, value: Any) -> Any:
    return value


def _object(name: str, value: Any) -> Mapping[Any, Any]:
    if not isinstance(value, Mapping):
        raise TypeError(f"{name}: expected an object, got {type(value).__name__}")
    return value


def _random_state(name: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor) or value.dtype != torch.uint8 or value.dim() != 1:
        raise ValueError(f"{name}: expected the state of a random generator")
    return value


def _sums(name: str, value: Any) -> Tensor | None:
    if value is not None and not (isinstance(value, Tensor) and value.dim() == 1 and bool(torch.isfinite(value).all())):
        raise ValueError(f"{name}: expected finite sums of an epoch, or none")
    return value


def _check_weights(saved: Any, own: Mapping[str, Tensor]) -> None:
    if not isinstance(saved, Mapping) or saved.keys() != own.keys():
        raise ValueError("state_dict: expected the weights of this run's model, got others")
    for name, tensor in saved.items():
        _check_tensor(f"state_dict: {name}", tensor, own[name])
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"state_dict: expected finite weights, got others in {name}; the training diverged")


def _check_tensor(name: str, tensor: Any, like: Tensor) -> None:
    # The model is converted when the fit begins: float64 may belong to what is float32 before.
    if (
        not isinstance(tensor, Tensor)
        or tensor.shape != like.shape
        or tensor.is_floating_point() != like.is_floating_point()
    ):
        got = f"{tensor.dtype} {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
        raise ValueError(f"{name}: expected {like.dtype} {tuple(like.shape)}, got {got}")


def _check_optimizer(saved: Any, module: nn.Module, config: TrainingConfig, epoch: int, steps: int) -> None:
    (optimizer,) = items(_object, least=1, most=1)("optimizer_states", saved)
    state, groups = _object("optimizer_states: state", optimizer["state"]), optimizer["param_groups"]
    expected = {"momentum": config.momentum, "nesterov": config.momentum > 0, "initial_lr": config.learning_rate}
    expected |= {"weight_decay": 0, "dampening": 0, "maximize": False}
    rate = config.learning_rate * (1 + math.cos(math.pi * epoch / config.epochs)) / 2
    for group in items(_object, least=1)("optimizer_states: param_groups", groups):
        given = number(0, config.learning_rate)("optimizer_states: learning rate", group["lr"])
        if abs(given - rate) > RATE_TOLERANCE * config.learning_rate:
            raise ValueError(f"optimizer_states: learning rate: expected {rate:g} in epoch {epoch}, got {given:g}")
        _check_equal("optimizer_states", group, expected)
    if config.momentum and steps and not state:
        raise ValueError("optimizer_states: expected a momentum of every weight, got none")
    # By index without shared weights, by name with them.
    trained = module.get_submodule("model")
    parameters: dict[Any, Tensor] = {**dict(module.named_parameters()), **dict(enumerate(trained.parameters()))}
    for key, entry in state.items():
        if key not in parameters:
            raise ValueError(f"optimizer_states: expected the weights of this run's model, got one of {key!r:.80}")
        momentum = _object(f"optimizer_states: {key}", entry).get("momentum_buffer")
        if momentum is not None:
            _check_tensor(f"optimizer_states: momentum of {key}", momentum, parameters[key])
            if not bool(torch.isfinite(momentum).all()):
                raise ValueError(f"optimizer_states: momentum of {key}: expected finite numbers, got others")


def _check_equal(name: str, saved: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    for entry, value in expected.items():
        if saved.get(entry, value) != value:
            raise ValueError(f"{name}: {entry}: expected {value!r}, got {saved[entry]!r:.80}")


def _check_progress(loops: Any, config: TrainingConfig, steps: int) -> None:
    """Check Lightning's counts: of epochs, of batches in the epoch, and of steps."""
    fit = mapping(_any)("loops", mapping(_any)("loops", loops).get("fit_loop"))
    counted = record({"current": record(dict.fromkeys(("ready", "started", "processed", "completed"), integer(0)))})
    epochs = counted("loops: epoch_progress", fit["epoch_progress"])["current"]
    for name, count in epochs.items():
        integer(0, config.epochs)(f"loops: epoch_progress: {name}", count)
    counted("loops: batch_progress", fit["epoch_loop.batch_progress"])
    stepped = record({"optimizer": record({"step": record({"total": record({"completed": integer(0)})})})})
    progress = stepped("loops: optim_progress", fit["epoch_loop.automatic_optimization.optim_progress"])
    done = progress["optimizer"]["step"]["total"]["completed"]
    if done != steps:
        raise ValueError(f"loops: expected as many steps as global_step, {steps}, got {done}")
