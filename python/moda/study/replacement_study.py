"""The trainings behind the replacement study, and the study over all of its weak models."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moda.composition.replace import Calibration
from moda.runs.config import RUNTIME_SETTINGS, TrainingConfig
from moda.runs.finished import FinishedRun, decompose_run
from moda.runs.folder import RunFolder
from moda.study.replacement import (
    RESULTS,
    STRATEGIES,
    ReplacementResult,
    current_strategy,
    replace_class,
    write_replacements,
)

__all__ = ["ReplacementStudy", "run_replacement_study", "trained"]


@dataclass(frozen=True)
class ReplacementStudy:
    """The replacement study of one pair of architectures. The defaults are the paper's, on CIFAR10.

    Attributes:
        data: name of the data set; its first half of classes are the strong ones.
        data_root: folder that holds it.
        data_options: of the data set.
        strong_model: architecture that gives the modules.
        strong_width: its width multiplier.
        weak_model: architecture that is given modules.
        weak_width: its width multiplier.
        mixed_classes: strong classes, each mixed into a weak model of its own; None: all of them.
        strategies: of `moda.study.replacement.STRATEGIES`.
        epochs: of each training.
        under_epoch: epoch of the under-fitted weak model; None: not studied.
        over_epoch: epoch of the over-fitted weak model; None: not studied. With neither the final weights are studied.
        fraction: share of training samples that a weak model sees.
        batch_size: of training and calibration.
        seed: of everything.
        threshold: firing rate from which the strong model's neurons are kept.
        calibration_epochs: passes over the weak training samples that calibrate.
        weak_modular: train the weak models with the modular terms, as the published code does.
        device: "auto", "cpu" or "cuda".
    """

    data: str = "cifar10"
    data_root: str | None = None
    data_options: Mapping[str, Any] = field(default_factory=dict)
    strong_model: str = "vgg16"
    strong_width: float = 1.0
    weak_model: str = "lenet5"
    weak_width: float = 1.0
    mixed_classes: tuple[int, ...] | None = None
    strategies: tuple[str, ...] = STRATEGIES
    epochs: int = 200
    under_epoch: int | None = 10
    over_epoch: int | None = 195
    fraction: float = 0.1
    batch_size: int = 128
    seed: int = 42
    threshold: float = 0.9
    calibration_epochs: int = 5
    weak_modular: bool = True
    device: str = "auto"

    def __post_init__(self) -> None:
        """Every field is as the class's docstring says, or a ValueError that names it."""
        object.__setattr__(self, "strategies", tuple(map(current_strategy, self.strategies)))
        unknown = [name for name in self.strategies if name not in STRATEGIES]
        if unknown or not self.strategies:
            raise ValueError(f"strategies: expected some of {', '.join(STRATEGIES)}, got {unknown or 'none'}")
        for name in ("under_epoch", "over_epoch"):
            epoch = getattr(self, name)
            if epoch is not None and not 1 <= epoch <= self.epochs:
                raise ValueError(f"{name}: expected an epoch in [1, {self.epochs}], got {epoch}")

    @property
    def checkpoints(self) -> list[tuple[str, int]]:
        """Name and epoch of the weak weights that are studied."""
        named = [("under-fitted", self.under_epoch), ("over-fitted", self.over_epoch)]
        return [(name, epoch) for name, epoch in named if epoch] or [("final", self.epochs)]

    def strong_config(self) -> TrainingConfig:
        """Settings of the strong training."""
        return self._config("strong", 0).changed(model=self.strong_model, width=self.strong_width)

    def weak_config(self, mixed_class: int) -> TrainingConfig:
        """Settings of a weak training."""
        kept = [epoch for _, epoch in self.checkpoints if epoch != self.epochs]
        config = self._config("weak", mixed_class).changed(model=self.weak_model, width=self.weak_width)
        config = config.changed(keep_every_epochs=_common_divisor(kept))
        return config if self.weak_modular else config.standard()

    def _config(self, part: str, mixed_class: int) -> TrainingConfig:
        replacement: dict[str, Any] = {"part": part, "mixed_class": mixed_class, "seed": self.seed}
        if part == "weak":
            replacement["fraction"] = self.fraction
        return TrainingConfig(
            data=self.data,
            data_root=self.data_root,
            data_options={**self.data_options, "replacement": replacement},
            epochs=self.epochs,
            batch_size=self.batch_size,
            seed=self.seed,
            accelerator="gpu" if self.device == "cuda" else self.device,
            log_every_steps=0,
        )


def _common_divisor(epochs: list[int]) -> int:
    return math.gcd(*epochs) if epochs else 0


def run_replacement_study(
    folder: Path, study: ReplacementStudy, strong: FinishedRun | None = None, *, progress: bool = True
) -> list[ReplacementResult]:
    """Train what is not trained yet, replace a class of every weak model in every way, write replacement.json.

    Args:
        folder: of the study; holds `strong/`, `weak-<class>/` and the results. A study that was stopped goes on.
        study: what to do.
        strong: take this strong run instead of training one.
        progress: show progress.

    Raises:
        ValueError: settings that do not go together, or a folder that holds runs with other settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if strong is None:
        strong = trained(folder / "strong", study.strong_config(), study.device, progress=progress)
    if not strong.run.decomposition.exists():
        decompose_run(strong, study.threshold, progress=progress)
    calibration = Calibration(epochs=study.calibration_epochs)
    results = []
    for mixed_class in study.mixed_classes if study.mixed_classes is not None else range(strong.data.num_classes):
        weak = trained(folder / f"weak-{mixed_class}", study.weak_config(mixed_class), study.device, progress=progress)
        for checkpoint, epoch in study.checkpoints:
            for strategy in study.strategies:
                _, result = replace_class(
                    strong, weak, strategy, epoch=epoch, checkpoint=checkpoint, calibration=calibration
                )
                results.append(result)
        write_replacements(folder / RESULTS, results)
    return results


def trained(folder: Path, config: TrainingConfig, device: str = "auto", *, progress: bool = True) -> FinishedRun:
    """The run in a folder, trained first if it is not, or from where it stopped.

    Raises:
        ValueError: the folder holds a run with other settings, or the settings do not go together.
    """
    started = (folder / "config.json").exists()
    if not (started and RunFolder.open(folder).finished):
        from moda.training.loop import train
        from moda.training.progress import TrainingProgress

        label = f"{folder.parent.name}/{folder.name}"
        train(config, folder, resume=started, progress=TrainingProgress(label, shown=progress))
    else:
        _check_same(folder, RunFolder.open(folder).config, config)
    return FinishedRun.open(folder, device)


def _check_same(folder: Path, there: TrainingConfig, wanted: TrainingConfig) -> None:
    for name, value in wanted.to_dict().items():
        found = there.to_dict()[name]
        if found != value and name not in RUNTIME_SETTINGS:
            raise ValueError(
                f"{folder}: holds a run with {name}={found!r}, this study needs {value!r}; use another folder"
            )
