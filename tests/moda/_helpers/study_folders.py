"""Folders as `moda train`, `analyze`, `reuse`, `sweep`, `replace` and `study` write them, with made-up numbers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moda.files import write_json
from moda.runs.config import TrainingConfig
from moda.runs.folder import RunFolder
from moda.runs.metrics import MetricsFile
from moda.study.analysis_files import write_analysis
from moda.study.replacement import STRATEGIES, ReplacementResult, write_replacements
from moda.study.results_file import ResultsFile
from moda.study.reuse import COLUMNS, ReuseResult, to_row
from moda.study.reuse_run import KIND
from moda.study.sweep import COLUMNS as SWEEP_COLUMNS
from moda.study.sweep import EPSILONS, GRIDS, SweepPoint

STANDARD = {"affinity": 0.0, "dispersion": 0.0, "compactness": 0.0}
METRICS = (
    "epoch", "step", "learning_rate", "loss", "cross_entropy", "affinity", "dispersion", "compactness", "train_accuracy",
    "test_cross_entropy", "test_accuracy", "seconds",
)  # fmt: skip
DIGITS = tuple(str(digit) for digit in range(10))
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def config(**changes: Any) -> TrainingConfig:
    """Settings of the yardstick, or changed ones."""
    return TrainingConfig(**{"epochs": 8, "seed": 0, "accelerator": "cpu", **changes})


def write_run(folder: Path, settings: TrainingConfig, *, epochs: int | None = None) -> Path:
    """config.json and metrics.csv; accuracies approach 0.99, modular training is a fifth slower."""
    run = RunFolder.create(folder, settings)
    with_terms = settings.modular
    file = MetricsFile(run.metrics)
    file.open(METRICS)
    for epoch in range(1, (epochs or settings.epochs) + 1):
        done = 1 - math.exp(-epoch / 2)
        jitter = 0.002 * math.sin(7 * settings.seed + epoch)
        terms = {"affinity": 0.3 - 0.25 * done, "dispersion": 0.9 - 0.4 * done, "compactness": 0.5 - 0.3 * done}
        row = {
            "epoch": epoch,
            "step": 12 * epoch,
            "learning_rate": 0.05,
            "loss": 2.3 - 2.2 * done,
            "cross_entropy": 2.3 - 2.2 * done + jitter,
            "train_accuracy": 0.1 + 0.89 * done + jitter,
            "test_cross_entropy": 2.3 - 2.1 * done,
            "test_accuracy": 0.1 + (0.89 if with_terms else 0.88) * done + jitter,
            "seconds": 0.24 if with_terms else 0.2,
        }
        file.write(row | (terms if with_terms else {}))
    file.close()
    return folder


def source(settings: TrainingConfig, masks: str = "b" * 64) -> dict[str, Any]:
    """What notes say that results follow from."""
    return {
        "model": settings.model,
        "data": settings.data,
        "threshold": 0.9,
        "min_fraction": 0.005,
        "augmented": False,
        "weights_sha256": "a" * 64,
        "masks_sha256": masks,
    }


def write_reuse(
    folder: Path, classes: int = 10, sizes: Sequence[int] = range(2, 11), *, per_size: int = 8, standard: bool = True
) -> list[ReuseResult]:
    """reuse.csv and reuse.json; a composed model is a percentage point behind the standard one."""
    settings = RunFolder.open(folder).config
    note = source(settings) | {"standard_sha256": "c" * 64 if standard else None}
    table = ResultsFile.open(folder / "reuse.csv", KIND, COLUMNS, note)
    results = []
    for size in sizes:
        for task in itertools.islice(itertools.combinations(range(classes), size), per_size):
            accuracy = 1 - 0.004 * size - 0.001 * settings.seed - 0.0005 * (sum(task) % 5)
            share = (size / classes) ** 0.5
            composed, modular = accuracy - 0.01, accuracy - 0.002
            results.append(ReuseResult(task, composed, modular, accuracy if standard else None, share, share**0.5))
            table.append(to_row(results[-1]))
    table.note(finished=True)
    return results


def write_analyses(
    folder: Path, names: Sequence[str] = DIGITS, layers: int = 5, *, masks: str = "b" * 64
) -> dict[str, Any]:
    """analysis.json: early layers shared, late ones not."""
    settings = RunFolder.open(folder).config
    count = len(names)
    bend = 0.01 * settings.seed
    overlaps = [[0.44 + bend if i == j else 0.2 + 0.02 * ((i * j) % 7) for j in range(count)] for i in range(count)]
    late = [layer / max(1, layers - 1) for layer in range(layers)]
    analysis = {
        "format": "moda-analysis",
        "format_version": 1,
        "library_version": "0",
        "source": source(settings, masks),
        "class_names": list(names),
        "mean_size": 0.44 + bend,
        "mean_overlap": 0.31 + bend,
        "mean_overlap_parameters": 0.30 + bend,
        "sizes": [0.4 + bend + 0.01 * k for k in range(count)],
        "overlaps": overlaps,
        "layers": [
            {
                "tap": f"layer{index}",
                "neurons": 32,
                "dead": int(4 * depth),
                "shared_by_all": int(20 * (1 - depth)),
                "module_share": 1 - 0.8 * depth,
                "overlap": 1 - 0.95 * depth,
                "jaccard": 1 - 0.9 * depth,
            }
            for index, depth in enumerate(late)
        ],
        "similarity": {
            f"layer{index}": [[0.95 if i == j else 0.9 - 0.7 * depth for j in range(count)] for i in range(count)]
            for index, depth in enumerate(late)
        },
    }
    write_analysis(folder / "analysis.json", analysis)
    return analysis


def write_sweep(folder: Path, parameter: str) -> list[SweepPoint]:
    """sweep_<parameter>.csv over the paper's grid, or the usual epsilons."""
    settings = RunFolder.open(folder).config
    table = ResultsFile.open(folder / f"sweep_{parameter}.csv", "moda-sweep", SWEEP_COLUMNS, source(settings))
    points = []
    for value in GRIDS.get(parameter, EPSILONS):
        points.append(
            SweepPoint(
                value, 0.8 - 0.4 * value, 0.6 - 0.3 * value, 0.97 - 0.02 * value, 0.975, 0.8, 100, 0.98, 0.1, 0.5, 0.2
            )
        )
        table.append(asdict(points[-1]))
    table.note(finished=True)
    return points


def write_replacement(
    folder: Path, names: Sequence[str] = DIGITS, strong: str = "small_vgg", **changes: Any
) -> list[ReplacementResult]:
    """replacement.json and the settings of a weak run: MODA gains 8 points and more, CNNSplitter loses 2."""
    folder.mkdir(parents=True, exist_ok=True)
    RunFolder.create(folder / "weak-0", config(model="lenet5", **changes))
    results = [
        ReplacementResult(
            strong_model=strong,
            weak_model="lenet5",
            strategy=strategy,
            mixed_class=target,
            class_name=names[target],
            epoch=4,
            checkpoint=checkpoint,
            before=(0.9, 0.8, 0.85, 0.9, 0.95, 0.7),
            after=(0.9, 0.8, 0.85, 0.9, 0.95 + gain / 10, 0.7 + gain + 0.01 * target),
            strong_weights_sha256="a" * 64,
            masks_sha256="b" * 64,
            weak_weights_sha256="d" * 64,
        )
        for target in range(5)
        for checkpoint in ("under-fitted", "over-fitted")
        for strategy, gain in zip(STRATEGIES, (0.08, -0.02), strict=True)
    ]
    write_replacements(folder / "replacement.json", results)
    return results


def write_study(
    out: Path, models: Sequence[tuple[str, float, int]], seeds: Sequence[int] = (0, 1), epochs: int = 8
) -> Path:
    """A whole study's folder; `models` are name, width and number of layers."""
    runs = []
    for model, width, layers in models:
        for seed in seeds:
            folder = out / model / f"seed-{seed}" / "modular"
            settings = config(model=model, width=width, seed=seed, epochs=epochs)
            write_run(folder, settings)
            write_run(folder.with_name("standard"), settings.changed(**STANDARD))
            write_reuse(folder)
            write_analyses(folder, layers=layers)
            runs.append(
                {
                    "model": model,
                    "seed": seed,
                    **{kind: f"{model}/seed-{seed}/{kind}" for kind in ("modular", "standard")},
                }
            )
    first = out / models[0][0] / f"seed-{seeds[0]}" / "modular"
    for parameter in GRIDS:
        write_sweep(first, parameter)
    write_replacement(out / "replacement" / "small_vgg", epochs=epochs)
    value = {
        "format": "moda-study",
        "format_version": 1,
        "library_version": "0",
        "epochs": epochs,
        "batch_size": 128,
        "per_size": None,
        "runs": runs,
        "replacements": ["replacement/small_vgg"],
        "sweeps": runs[0]["modular"],
        "finished": True,
    }
    write_json(out / "study.json", value)
    return out
