"""Runs the replacement study over all of its weak models, trainings included."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moda import models
from moda.composition.replace import Calibration
from moda.files import check_study_folder
from moda.runs.config import DataOptions, DecompositionSettings, TrainingConfig
from moda.runs.finished import FinishedRun, decompose_run
from moda.settings import Settings, setting
from moda.study.replacement import (
    RESULTS,
    STRATEGIES,
    ReplacementResult,
    current_strategy,
    read_replacements,
    replace_class,
    results_file,
    write_replacements,
)
from moda.study.trainings import trained

__all__ = ["ReplacementStudy", "run_replacement_study"]

_DATA, _MODELS, _TRAINING, _REPLACEMENT = "Data", "Models", "Training", "Replacement"


@dataclass(frozen=True)
class ReplacementStudy(Settings, command="replace"):
    """The replacement study of one pair of architectures. The defaults are the paper's, on CIFAR10."""

    data: str = setting("cifar10", help="The data set; the first half of its classes are the strong ones.", panel=_DATA)
    data_root: str | None = setting(
        None, help="The folder that holds the data set; ./data if it is not given.", panel=_DATA
    )
    data_options: Mapping[str, Any] = setting(
        {}, help="Further options of the data set, see `moda.data.load`.", panel=_DATA, entries=DataOptions
    )
    strong_model: str = setting(
        "vgg16", help="The architecture that gives the modules.", choices=models.NAMES, panel=_MODELS
    )
    strong_width: float = setting(1.0, help="The multiplier of its hidden widths.", above=0, panel=_MODELS)
    weak_model: str = setting(
        "lenet5", help="The architecture that is given modules.", choices=models.NAMES, panel=_MODELS
    )
    weak_width: float = setting(1.0, help="The multiplier of its hidden widths.", above=0, panel=_MODELS)
    mixed_classes: tuple[int, ...] | None = setting(
        None,
        help="The indices of the strong classes to replace, each in a weak model of its own; all of them if not given.",
        at_least=0,
        commands=(),
    )
    strategies: tuple[str, ...] = setting(
        STRATEGIES,
        help=f"How the module is joined to the weak model: {' or '.join(STRATEGIES)}, or both, separated by a comma.",
        choices=STRATEGIES,
        panel=_REPLACEMENT,
        option="--strategy",
    )
    epochs: int = setting(200, help="The epochs of each training.", at_least=1, panel=_TRAINING)
    under_epoch: int | None = setting(
        10,
        help="The epoch of the under-fitted weak model; with 0 none is studied.",
        at_least=0,
        panel=_REPLACEMENT,
        option="--under",
    )
    over_epoch: int | None = setting(
        195,
        help="The epoch of the over-fitted weak model; with 0 none is studied, and with neither the final weights are.",
        at_least=0,
        panel=_REPLACEMENT,
        option="--over",
    )
    fraction: float = setting(
        0.1, help="The share of training samples that a weak model sees.", above=0, at_most=1, panel=_TRAINING
    )
    batch_size: int = setting(
        128, help="The samples of a step of training and of calibration.", at_least=1, panel=_TRAINING
    )
    seed: int = setting(42, help="The seed of everything.", at_least=0, panel=_TRAINING)
    threshold: float = setting(
        DecompositionSettings.threshold,
        help="The firing rate from which a neuron of the strong model is kept.",
        at_least=0,
        at_most=1,
        panel=_REPLACEMENT,
    )
    calibration_epochs: int = setting(
        5, help="The passes over the weak training samples that calibrate.", at_least=1, panel=_REPLACEMENT
    )
    weak_modular: bool = setting(
        True,
        help="Whether weak models are trained with the modular terms, as in the published code (the default).",
        panel=_TRAINING,
        option="--weak-modular/--weak-standard",
    )
    device: str = setting("auto", help="The device to compute on: auto, cpu, cuda, cuda:1, ...", panel=_TRAINING)

    def __post_init__(self) -> None:
        """Check every field, and that the studied epochs are trained.

        Raises:
            TypeError, ValueError: a field is not as above; the message names it.
        """
        if not isinstance(self.strategies, str):
            object.__setattr__(self, "strategies", tuple(map(current_strategy, self.strategies)))
        super().__post_init__()
        for name in ("under_epoch", "over_epoch"):
            epoch = getattr(self, name)
            if epoch and epoch > self.epochs:
                raise ValueError(f"{name}: expected an epoch in [1, {self.epochs}], got {epoch}")

    @property
    def checkpoints(self) -> list[tuple[str, int]]:
        """The names and epochs of the weak weights that are studied."""
        named = [("under-fitted", self.under_epoch), ("over-fitted", self.over_epoch)]
        return [(name, epoch) for name, epoch in named if epoch] or [("final", self.epochs)]

    def strong_config(self) -> TrainingConfig:
        """Give the settings of the strong training."""
        return self._config("strong", 0).changed(model=self.strong_model, width=self.strong_width)

    def weak_config(self, mixed_class: int) -> TrainingConfig:
        """Give the settings of a weak training."""
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
    folder: Path,
    study: ReplacementStudy,
    strong: FinishedRun | None = None,
    *,
    force: bool = False,
    progress: bool = True,
) -> list[ReplacementResult]:
    """Train what is not trained yet, replace a class of every weak model in every way, write replacement.json.

    Args:
        folder: the folder of the study; it holds `strong/`, `weak-<class>/` and the results. A study that was stopped
            goes on.
        study: what to do.
        strong: a strong run to take instead of training one.
        force: whether to drop results in the folder that this study does not make.
        progress: whether to show progress.

    Raises:
        ValueError: settings that do not go together, or a folder that is of another kind, holds runs with other
            settings, or results that this study does not make.
    """
    _check_folder(folder, study, strong, force=force)
    if strong is None:
        strong = trained(folder / "strong", study.strong_config(), study.device, progress=progress)
    if not strong.run.decomposition.exists():
        decompose_run(strong, study.threshold, progress=progress)
    calibration = Calibration(epochs=study.calibration_epochs)
    made: dict[tuple[int, str, str], ReplacementResult] = {}
    for mixed_class in study.mixed_classes if study.mixed_classes is not None else range(strong.data.num_classes):
        weak = trained(folder / f"weak-{mixed_class}", study.weak_config(mixed_class), study.device, progress=progress)
        for checkpoint, epoch in study.checkpoints:
            for strategy in study.strategies:
                _, result = replace_class(
                    strong, weak, strategy, epoch=epoch, checkpoint=checkpoint, calibration=calibration
                )
                made[_key(result)] = result
        # What an earlier run of the same study has made stays until its turn comes.
        earlier = {} if force else {_key(result): result for result in _there(folder)}
        write_replacements(folder / RESULTS, ({**earlier, **made}).values())
    return list(made.values())


def _check_folder(folder: Path, study: ReplacementStudy, strong: FinishedRun | None, *, force: bool) -> None:
    """Check, before anything is made, that a folder may take a study's results.

    Raises:
        ValueError: it is of another kind or, without `force`, holds results that this study does not make.
    """
    there = _there(folder)
    if force:
        return
    checkpoints = [name for name, _ in study.checkpoints]
    for result in there:
        wanted: dict[str, Collection[Any]] = {
            "strong_model": (study.strong_model if strong is None else strong.run.config.model,),
            "strong_weights_sha256": (result.strong_weights_sha256 if strong is None else strong.weights_sha256,),
            "weak_model": (study.weak_model,),
            "strategy": study.strategies,
            "checkpoint": checkpoints,
            "mixed_class": study.mixed_classes or (result.mixed_class,),
        }
        for name, values in wanted.items():
            if getattr(result, name) not in values:
                raise ValueError(
                    f"{results_file(folder)}: holds a result with {name}={getattr(result, name)!r}, which this study "
                    "does not make; replace it with --force, or choose another folder"
                )


def _there(folder: Path) -> list[ReplacementResult]:
    """The results that a folder holds.

    Raises:
        ValueError: the folder is of another kind, or its results are malformed.
    """
    path = results_file(folder)
    if path.exists():
        return read_replacements(path)
    check_study_folder(folder, RESULTS, "strong", "weak-*")
    return []


def _key(result: ReplacementResult) -> tuple[int, str, str]:
    return result.mixed_class, result.checkpoint, result.strategy
