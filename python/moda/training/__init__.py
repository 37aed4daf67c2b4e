"""The training loop on Lightning (needs the extra `train`)."""

from moda.training.loop import ModularModule, TrainingInterrupted, TrainingResult, train

__all__ = ["ModularModule", "TrainingInterrupted", "TrainingResult", "train"]
