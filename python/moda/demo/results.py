"""Holds what the demo measured, and makes the numbers of its results.json."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from torch import Tensor

from moda.composition.measure import mean_over_pairs
from moda.decomposition.container import Decomposition
from moda.decomposition.rates import FiringRates
from moda.demo.settings import DemoSettings
from moda.files import Format
from moda_kernels import ModularLosses

DEMO = Format("moda-demo", {})
SHARES = ("composed", "modular", "standard", "size", "flops")
"""Fields of `SubTasks` that are shares."""


@dataclass(frozen=True, eq=False)
class Trained:
    """A trained model, and what its activations and modules are like.

    Attributes:
        accuracy: the accuracy on the test samples, in [0, 1].
        seconds: the time of training, tests after each epoch included.
        losses: the modular losses on the test samples.
        similarity: per layer the (K, K) mean cosine similarity between the test samples of two classes.
        rates: the firing rates on the training samples.
        module_sizes: per class the share of the model's parameters.
        attribution_sizes: the same of modules by attribution.
        overlaps: the (K, K) overlaps in the published counting.
    """

    accuracy: float
    seconds: float
    losses: ModularLosses
    similarity: list[Tensor]
    rates: FiringRates
    module_sizes: list[float]
    attribution_sizes: list[float]
    overlaps: Tensor

    @property
    def module_size(self) -> float:
        """The mean over classes."""
        return fmean(self.module_sizes)

    @property
    def attribution_size(self) -> float:
        """The mean over classes."""
        return fmean(self.attribution_sizes)

    @property
    def overlap(self) -> float:
        """The mean over pairs of classes."""
        return mean_over_pairs(self.overlaps)


@dataclass(frozen=True)
class SubTasks:
    """Means over the sub-tasks of one size. Accuracies are on test samples of the sub-task's classes, restricted to
    its outputs; size and FLOPs are shares of the whole model's.

    Attributes:
        classes: the number of classes of each sub-task.
        count: the number of sub-tasks.
        composed: the accuracy of the composed models.
        modular: the accuracy of the whole modular model.
        standard: the accuracy of the standard model.
        size: the parameters.
        flops: the floating-point operations.
    """

    classes: int
    count: int
    composed: float
    modular: float
    standard: float
    size: float
    flops: float


@dataclass(frozen=True, eq=False)
class SeedResult:
    """Everything that was measured with one seed.

    Attributes:
        seed: the seed of weights, data order and split.
        standard: the standard training.
        modular: the modular one.
        decomposition: the modules of the modular model.
        subtasks: one entry per size.
        by_attribution: the same of modules by attribution.
        decompose_seconds: the time of counting firings and decomposing.
        compose_seconds: the time of composing and testing all sub-tasks.
    """

    seed: int
    standard: Trained
    modular: Trained
    decomposition: Decomposition
    subtasks: list[SubTasks]
    by_attribution: list[SubTasks]
    decompose_seconds: float
    compose_seconds: float


@dataclass(frozen=True, eq=False)
class DemoResult:
    """Everything that was measured, with all seeds.

    Attributes:
        settings: what was asked for.
        class_names: the names of the classes.
        parameters: the number of parameters of the whole model.
        seeds: one result each.
        seconds: the time of everything but the figures.
    """

    settings: DemoSettings
    class_names: tuple[str, ...]
    parameters: int
    seeds: list[SeedResult]
    seconds: float

    def mean(self, training: str, quantity: str) -> float:
        """Average over seeds a number of the standard or the modular training."""
        return fmean(getattr(getattr(seed, training), quantity) for seed in self.seeds)

    def subtasks(self, modules: str = "subtasks") -> list[SubTasks]:
        """Average the sub-tasks over seeds; of modules "by_attribution" if asked for."""
        rows = zip(*(getattr(seed, modules) for seed in self.seeds), strict=True)
        return [_mean_subtasks(same_size) for same_size in rows]


def _mean_subtasks(rows: Iterable[SubTasks]) -> SubTasks:
    rows = list(rows)
    means = {name: fmean(getattr(row, name) for row in rows) for name in SHARES}
    return SubTasks(rows[0].classes, rows[0].count, **means)


def to_json(result: DemoResult) -> dict[str, Any]:
    """Give the numbers of results.json."""
    return {
        **DEMO.header(),
        "settings": dataclasses.asdict(result.settings),
        "parameters": result.parameters,
        "seconds": result.seconds,
        "mean": {
            "standard": _means(result, "standard"),
            "modular": _means(result, "modular"),
            "subtasks": [dataclasses.asdict(row) for row in result.subtasks()],
            "by_attribution": [dataclasses.asdict(row) for row in result.subtasks("by_attribution")],
        },
        "seeds": [
            {
                "seed": seed.seed,
                "standard": _numbers(seed.standard),
                "modular": _numbers(seed.modular),
                "subtasks": [dataclasses.asdict(row) for row in seed.subtasks],
                "by_attribution": [dataclasses.asdict(row) for row in seed.by_attribution],
                "decompose_seconds": seed.decompose_seconds,
                "compose_seconds": seed.compose_seconds,
            }
            for seed in result.seeds
        ],
    }


def _means(result: DemoResult, training: str) -> dict[str, float]:
    names = ("accuracy", "module_size", "attribution_size", "overlap", "seconds")
    return {name: result.mean(training, name) for name in names}


def _numbers(trained: Trained) -> dict[str, Any]:
    return {
        "accuracy": trained.accuracy,
        "seconds": trained.seconds,
        **{name: float(value) for name, value in trained.losses._asdict().items()},
        "module_sizes": trained.module_sizes,
        "attribution_sizes": trained.attribution_sizes,
        "overlaps": trained.overlaps.tolist(),
    }
