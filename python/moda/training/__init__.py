"""The training loop on Lightning (needs the extra `train`)."""

from moda.lazy import submodules
from moda.training.loop import ModularModule, TrainingInterrupted, TrainingResult, train

__all__ = ["ModularModule", "TrainingInterrupted", "TrainingResult", "train"]

__getattr__ = submodules(__name__)
