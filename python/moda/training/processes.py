"""Joins several processes in a training: finds out who they are, and shares weights out among them."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from moda.runs.config import TrainingConfig

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

SHARDED = "fsdp"
"""The strategy that shares out the weights: FSDP2 (`torch.distributed.fsdp.fully_shard`)."""

SHARDED_PRECISIONS = ("32-true", "bf16-mixed")
"""The precisions that Lightning offers with it."""

SHARD_ALONE = 1 << 16
"""A layer of at least this many parameters is gathered by itself when it runs; smaller ones are gathered together."""


def process_rank() -> int:
    """Return the number of this process, as torchrun, Slurm or Lightning set it for the processes that they start."""
    names = ("RANK", "LOCAL_RANK", "SLURM_PROCID")
    return next((int(os.environ[name]) for name in names if os.environ.get(name, "").isdigit()), 0)


def trainer_options(config: TrainingConfig) -> dict[str, Any]:
    """Return the options of Lightning's Trainer: `devices` (of a machine), `num_nodes` and `strategy`.

    torchrun says how many there are and on how many machines, where it started this one. (Lightning, where it starts
    them, leaves some of the same variables behind.) "auto" is "ddp" where there are several.
    """
    processes = local = config.devices
    if "TORCHELASTIC_RUN_ID" in os.environ:
        processes, local = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
    return {"devices": local, "num_nodes": processes // local, "strategy": _strategy(config, processes)}


def _strategy(config: TrainingConfig, processes: int) -> Any:
    from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

    timeout = timedelta(seconds=config.timeout)
    if config.strategy == SHARDED:
        # One file for all, which any number of processes and any strategy can go on from.
        return ModelParallelStrategy(processes, 1, save_distributed_checkpoint=False, timeout=timeout)
    if config.strategy == "ddp" or (config.strategy == "auto" and processes > 1):
        return DDPStrategy(timeout=timeout)
    return config.strategy


def shard(model: nn.Module, mesh: DeviceMesh) -> None:
    """Share out the weights over the processes of a mesh, in place.

    Layers, not their containers: only what is called gathers its weights, and a container's forward may be passed by.
    """
    layers = [
        module
        for module in model.modules()
        if sum(weight.numel() for weight in module.parameters(recurse=False)) >= SHARD_ALONE
    ]
    for module in dict.fromkeys((*layers, model)):
        fully_shard(module, mesh=mesh)
    for module in model.modules():
        if mesh.device_type == "cpu" and isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)  # Gloo's mean was a sum up to PyTorch 2.8


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the state_dict on the CPU, gathered where weights are shared out; then all processes must call this."""
    return {name: _whole(value) for name, value in model.state_dict().items()}


def _whole(value: Tensor) -> Tensor:
    whole = value.full_tensor() if isinstance(value, DTensor) else value
    return whole.detach().cpu()
