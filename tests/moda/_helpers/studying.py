"""Runs to study, made without training: random weights suffice where only bookkeeping or exactness is at stake."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from moda.runs.config import TrainingConfig
from moda.runs.finished import FinishedRun, decompose_run
from moda.runs.folder import RunFolder, create_model, load_data

METRICS = "epoch,step,learning_rate,affinity,dispersion,compactness,test_accuracy\n1,12,0.05,0.25,0.5,0.125,0.1\n"


def make_run(folder: Path, *, decomposed: bool = True, weights_seed: int = 0, **settings: Any) -> FinishedRun:
    """A "finished" run of a small_vgg at quarter width on the digits."""
    config = TrainingConfig(**{"width": 0.25, "epochs": 1, "seed": 0, "accelerator": "cpu", **settings})
    run = RunFolder.create(folder, config)
    torch.manual_seed(weights_seed)
    model = create_model(config, load_data(config))
    for module in model.modules():  # let neurons differ in when they fire
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.bias)
    run.save_weights(model.state_dict())
    run.metrics.write_text(METRICS)
    finished = FinishedRun.open(folder, "cpu")
    if decomposed:
        decompose_run(finished, progress=False)
    return finished
