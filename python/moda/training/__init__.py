"""The training loop on Lightning (needs the extra `train`)."""

from moda.lazy import submodules
from moda.requirements import lightning_problem

if (_problem := lightning_problem()) is not None:
    raise ImportError(_problem)
from moda.training.graphed import GraphedStep
from moda.training.loop import ModularModule, TrainingInterrupted, TrainingResult, train

__all__ = ["GraphedStep", "ModularModule", "TrainingInterrupted", "TrainingResult", "train"]

__getattr__ = submodules(__name__)
