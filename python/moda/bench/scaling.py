"""Suite "scaling": cost against batch size, number of classes and number of layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moda.bench.case import Case
from moda.bench.clock import Budget
from moda.bench.losses import LossInputs, loss_case

BATCHES = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
CLASSES = (2, 10, 100, 1000)
LAYERS = (1, 2, 4, 8, 16, 32, 64)
FRESH_MEMORY, FRESH_BATCHES = "fresh memory", (1024, 4096, 8192)
"""The axis of batch sizes at which memory comes from the operating system anew, as it does by default."""

_LAYER = (64, 8, 8)
"""Neurons and positions of a layer: small enough that 8192 samples fit on any machine."""


def scaling_cases(device: torch.device, budget: Budget, axes: dict[str, Sequence[int]]) -> list[Case]:
    """Measure forward and backward of the losses along each axis.

    `axes` gives the points of "batch", "classes", "layers", and of "fresh memory": batch sizes again, but without
    keeping memory, as the other axes do.
    """
    return [_case(axis, point, device, budget) for axis, points in axes.items() for point in points]


def _case(axis: str, point: int, device: torch.device, budget: Budget) -> Case:
    # 1024 samples, so that every one of 1000 classes has some; two layers keep the published formulas in memory.
    value = {"batch": 1024, "classes": 10, "layers": 2}
    if axis == "layers":
        value["batch"] = 128
    value["batch" if axis == FRESH_MEMORY else axis] = point
    about = LossInputs(((value["batch"], *_LAYER),) * value["layers"], value["classes"], device)
    parameters: dict[str, int | float | str] = {"axis": axis, "value": point}
    keeps = axis != FRESH_MEMORY
    name = f"{axis} {point}" if keeps else f"batch {point}, {axis}"
    return loss_case("scaling", name, about, budget, phases=("both",), keeps_memory=keeps, parameters=parameters)
