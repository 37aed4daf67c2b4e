"""The demonstration: train on handwritten digits standard and modular, cut, recombine, compare."""

from __future__ import annotations

import dataclasses
import itertools
import random
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from moda.composition import measure
from moda.data import DataSplits
from moda.data.batches import BatchLoader, EpochOrder
from moda.decomposition.container import Decomposition
from moda.decomposition.counting import count_firings
from moda.decomposition.rates import FiringRates
from moda.decomposition.rule import decompose
from moda.files import write_bytes, write_json
from moda.models.options import check_count
from moda.observation.taps import InstrumentedModel, instrument
from moda.runs.config import TrainingConfig
from moda.runs.folder import load_data
from moda.study.reuse import TestSet, by_size, evaluate_subtasks
from moda.training.loop import train
from moda.training.progress import TrainingProgress
from moda_kernels import ModularLosses, __version__, class_similarity, modular_losses

RUNS, PAGE, PICTURE, RESULTS = "runs", "demo.html", "demo.png", "results.json"
FORMAT, FORMAT_VERSION = "moda-demo", 1
_SHARES = ("composed", "modular", "standard", "size", "flops")  # of SubTasks


@dataclass(frozen=True)
class DemoSettings:
    """What the demo does.

    Attributes:
        seeds: one pair of trainings each.
        epochs: of each training.
        batch_size: samples per step: half the paper's, as the digits are few.
        threshold: firing rate from which a neuron is kept.
        subtask_sizes: numbers of classes.
        samples: sub-tasks of each size, or all where there are fewer.
    """

    seeds: tuple[int, ...] = (0,)
    epochs: int = 40
    batch_size: int = 64
    threshold: float = 0.9
    subtask_sizes: tuple[int, ...] = (2, 3, 5, 10)
    samples: int = 20

    def __post_init__(self) -> None:
        if not self.seeds:
            raise ValueError("seeds: expected at least one seed, got none")
        for name in ("epochs", "batch_size", "samples"):
            check_count(name, getattr(self, name))


@dataclass(frozen=True, eq=False)
class Trained:
    """A trained model, and what its activations and modules are like.

    Attributes:
        accuracy: on the test samples, in [0, 1].
        seconds: of training, tests after each epoch included.
        losses: the modular losses on the test samples.
        similarity: per layer (K, K), mean cosine similarity between the test samples of two classes.
        rates: firing rates on the training samples.
        module_sizes: per class, share of the model's parameters.
        overlaps: (K, K), published counting.
    """

    accuracy: float
    seconds: float
    losses: ModularLosses
    similarity: list[Tensor]
    rates: FiringRates
    module_sizes: list[float]
    overlaps: Tensor

    @property
    def module_size(self) -> float:
        """Mean over classes."""
        return fmean(self.module_sizes)

    @property
    def overlap(self) -> float:
        """Mean over pairs of classes."""
        classes = len(self.overlaps)
        return float(self.overlaps.triu(1).sum()) / (classes * (classes - 1) / 2)


@dataclass(frozen=True)
class SubTasks:
    """Means over the sub-tasks of one size. Accuracies are on test samples of the sub-task's classes, restricted to
    its outputs; size and FLOPs are shares of the whole model's.

    Attributes:
        classes: of each sub-task.
        count: how many sub-tasks.
        composed: accuracy of the composed models.
        modular: accuracy of the whole modular model.
        standard: accuracy of the standard model.
        size: parameters.
        flops: floating-point operations.
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
    """Everything about one seed.

    Attributes:
        seed: of weights, data order and split.
        standard: the standard training.
        modular: the modular one.
        decomposition: of the modular model.
        subtasks: one entry per size.
        decompose_seconds: counting firings and cutting.
        compose_seconds: composing and testing all sub-tasks.
    """

    seed: int
    standard: Trained
    modular: Trained
    decomposition: Decomposition
    subtasks: list[SubTasks]
    decompose_seconds: float
    compose_seconds: float


@dataclass(frozen=True, eq=False)
class DemoResult:
    """All seeds.

    Attributes:
        settings: what was asked for.
        class_names: of the data.
        parameters: of the whole model.
        seeds: one result each.
        seconds: of everything but the figures.
    """

    settings: DemoSettings
    class_names: tuple[str, ...]
    parameters: int
    seeds: list[SeedResult]
    seconds: float

    def mean(self, training: str, quantity: str) -> float:
        """Mean over seeds of a number of the standard or the modular training."""
        return fmean(getattr(getattr(seed, training), quantity) for seed in self.seeds)

    def subtasks(self) -> list[SubTasks]:
        """Means over seeds."""
        rows = zip(*(seed.subtasks for seed in self.seeds), strict=True)
        return [_mean_subtasks(same_size) for same_size in rows]


def _mean_subtasks(rows: Iterable[SubTasks]) -> SubTasks:
    rows = list(rows)
    means = {name: fmean(getattr(row, name) for row in rows) for name in _SHARES}
    return SubTasks(rows[0].classes, rows[0].count, **means)


def run_demo(folder: Path, settings: DemoSettings, console: Console) -> DemoResult:
    """Run everything; print tables; write the figure page, the numbers and the run folders to `folder`.

    A folder of an earlier demo is written over.

    Raises:
        ValueError: `folder` holds something else.
        ImportError: an optional package is missing; the message says which.
    """
    from moda.demo.page import demo_page  # before the minutes of training: it may be what is missing

    _clear(folder)
    start = time.perf_counter()
    seeds = [_run_seed(folder / RUNS / f"seed-{seed}", seed, settings, console) for seed in settings.seeds]
    data = load_data(_config(settings.seeds[0], settings))
    parameters = _parameters(_model(_config(settings.seeds[0], settings), data))
    result = DemoResult(settings, data.class_names, parameters, seeds, time.perf_counter() - start)
    print_tables(result, console)
    write_json(folder / RESULTS, to_json(result))
    picture, page = demo_page(result, comparison(result))
    write_bytes(folder / PICTURE, picture)
    write_bytes(folder / PAGE, page.encode())
    console.print(
        f"\nFigures: [bold]{folder / PAGE}[/bold] and {folder / PICTURE}; runs: {folder / RUNS}/", highlight=False
    )
    return result


def _clear(folder: Path) -> None:
    """Make the folder, or empty it of an earlier demo's files and of nothing else."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: expected a folder, found a file")
    folder.mkdir(parents=True, exist_ok=True)
    strangers = sorted(path.name for path in folder.iterdir() if path.name not in (RUNS, PAGE, PICTURE, RESULTS))
    if strangers:
        raise ValueError(f"{folder}: holds {strangers[0]!r}, which no demo made; choose another folder")
    shutil.rmtree(folder / RUNS, ignore_errors=True)
    for name in (PAGE, PICTURE, RESULTS):
        (folder / name).unlink(missing_ok=True)


def _config(seed: int, settings: DemoSettings) -> TrainingConfig:
    return TrainingConfig(
        model="small_vgg",
        data="digits",
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        seed=seed,
        accelerator="cpu",
        log_every_steps=0,
    )


def _run_seed(folder: Path, seed: int, settings: DemoSettings, console: Console) -> SeedResult:
    config = _config(seed, settings)
    data = load_data(config)
    label = f"seed {seed}, " if len(settings.seeds) > 1 else ""
    plain = config.changed(affinity=0, dispersion=0, compactness=0)
    results = {
        name: train(each, folder / name, data=data, progress=TrainingProgress(f"{label}{name} training"))
        for name, each in (("standard", plain), ("modular", config))
    }
    start = time.perf_counter()
    examined = {name: _examine(result.model, result.seconds, data, settings) for name, result in results.items()}
    decompose_seconds = time.perf_counter() - start
    decomposition = examined["modular"][1]
    decomposition.save(results["modular"].run.decomposition)
    start = time.perf_counter()
    models = {name: result.model for name, result in results.items()}
    subtasks = _subtasks(models, decomposition, data, settings, random.Random(seed))
    return SeedResult(
        seed,
        examined["standard"][0],
        examined["modular"][0],
        decomposition,
        subtasks,
        decompose_seconds,
        time.perf_counter() - start,
    )


def _examine(
    model: nn.Module, seconds: float, data: DataSplits, settings: DemoSettings
) -> tuple[Trained, Decomposition]:
    model = _instrumented(model)
    images, labels = _tensors(data.test)
    model.eval()
    with torch.no_grad(), model.recording():
        logits = model(images)
        activations = model.activations()
    loader = BatchLoader(data.train_eval, EpochOrder(len(data.train_eval), 128, None))  # type: ignore[arg-type]
    rates = count_firings(model, loader, data.num_classes, progress=False)
    decomposition = decompose(rates, settings.threshold)
    trained = Trained(
        accuracy=_share(logits, labels),
        seconds=seconds,
        losses=modular_losses(activations, labels),
        similarity=class_similarity(activations, labels, data.num_classes),
        rates=rates,
        module_sizes=[measure.size(model, decomposition, [k]) for k in range(data.num_classes)],
        overlaps=measure.overlap_matrix(model, decomposition),
    )
    return trained, decomposition


def _instrumented(model: nn.Module) -> InstrumentedModel:
    traced = model if isinstance(model, InstrumentedModel) else instrument(model)
    if not isinstance(traced, InstrumentedModel):
        raise TypeError("the demo's model cannot be traced")
    return traced


def _tensors(dataset: Dataset[Any]) -> tuple[Tensor, Tensor]:
    """All samples of a small data set."""
    images, labels = next(iter(DataLoader(dataset, batch_size=len(dataset))))  # type: ignore[arg-type]
    return images, labels


def _share(logits: Tensor, labels: Tensor) -> float:
    return float((logits.argmax(1) == labels).float().mean())


def _subtasks(
    models: dict[str, nn.Module],
    decomposition: Decomposition,
    data: DataSplits,
    settings: DemoSettings,
    generator: random.Random,
) -> list[SubTasks]:
    """Composed models of sub-tasks of each size, against the whole models on the same samples and outputs."""
    test, rows = TestSet.of(data.test), []
    for size in settings.subtask_sizes:
        tasks = choose_subtasks(data.num_classes, size, settings.samples, generator)
        results = evaluate_subtasks(
            _instrumented(models["modular"]), decomposition, tasks, test, standard=models["standard"], progress=False
        )
        mean = dataclasses.asdict(by_size(results)[size])
        rows.append(SubTasks(size, len(tasks), **{name: mean[name] for name in _SHARES}))
    return rows


def choose_subtasks(num_classes: int, size: int, samples: int, generator: random.Random) -> list[list[int]]:
    """`samples` different subsets of `size` classes, or all if there are no more; classes ascending.

    Raises:
        ValueError: there is no subset of that size.
    """
    if not 1 <= size <= num_classes:
        raise ValueError(f"subtask_sizes: expected sizes in [1, {num_classes}], got {size}")
    every = [list(classes) for classes in itertools.combinations(range(num_classes), size)]
    return sorted(generator.sample(every, samples)) if len(every) > samples else every


def _model(config: TrainingConfig, data: DataSplits) -> nn.Module:
    from moda.runs.folder import create_model

    return create_model(config, data)


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


# ---- what is printed and kept ------------------------------------------------------------------------------------


def print_tables(result: DemoResult, console: Console) -> None:
    """The numbers, and how to read them."""
    seeds = f", mean of {len(result.seeds)} seeds" if len(result.seeds) > 1 else ""
    console.print(
        f"\nA {result.parameters:,}-parameter VGG on 1797 handwritten digits, {result.settings.epochs} epochs "
        f"in batches of {result.settings.batch_size}{seeds}.",
        highlight=False,
    )
    console.print(_training_table(result))
    console.print(_subtask_table(result))
    for line in reading(result):
        console.print(f"- {line}", highlight=False)
    spent = [
        ("standard training", result.mean("standard", "seconds")),
        ("modular training", result.mean("modular", "seconds")),
        ("cutting both", fmean(seed.decompose_seconds for seed in result.seeds)),
        ("composing and testing", fmean(seed.compose_seconds for seed in result.seeds)),
    ]
    parts = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in spent)
    console.print(f"Time{' per seed' if len(result.seeds) > 1 else ''}: {parts}.", highlight=False)


def comparison(result: DemoResult) -> list[tuple[str, str, str]]:
    """Rows of (quantity, standard, modular) as text."""

    def losses(training: str, name: str) -> float:
        return fmean(float(getattr(getattr(seed, training).losses, name)) for seed in result.seeds)

    def row(title: str, text: str, values: tuple[float, float]) -> tuple[str, str, str]:
        return title, text.format(values[0]), text.format(values[1])

    def both(quantity: str, scale: float = 1) -> tuple[float, float]:
        return scale * result.mean("standard", quantity), scale * result.mean("modular", quantity)

    same = 1 - losses("standard", "affinity"), 1 - losses("modular", "affinity")
    different = losses("standard", "dispersion"), losses("modular", "dispersion")
    activity = losses("standard", "compactness"), losses("modular", "compactness")
    return [
        row("test accuracy", "{:.2f} %", both("accuracy", 100)),
        row("module size, share of parameters", "{:.1f} %", both("module_size", 100)),
        row("overlap of two modules", "{:.1f} %", both("overlap", 100)),
        row("similarity of samples of one class", "{:.3f}", same),
        row("similarity of samples of two classes", "{:.3f}", different),
        row("mean activation", "{:.3f}", activity),
        row("seconds of training", "{:.1f}", both("seconds")),
    ]


def _training_table(result: DemoResult) -> Table:
    table = Table(title="Standard and modular training", title_justify="left", title_style="bold")
    table.add_column("")
    table.add_column("standard", justify="right")
    table.add_column("modular", justify="right", style="bold")
    for row in comparison(result):
        table.add_row(*row)
    return table


def _subtask_table(result: DemoResult) -> Table:
    table = Table(
        title="Models composed of modules, on the test samples of their classes",
        title_justify="left",
        title_style="bold",
    )
    for name in ("classes", "sub-tasks", "composed", "whole modular", "standard", "parameters", "FLOPs"):
        table.add_column(name, justify="right", style="bold" if name == "composed" else "")
    for row in result.subtasks():
        shares = [f"{100 * share:.2f} %" for share in (row.composed, row.modular, row.standard)]
        costs = [f"{100 * share:.0f} %" for share in (row.size, row.flops)]
        table.add_row(str(row.classes), str(row.count), *shares, *costs)
    return table


def reading(result: DemoResult) -> list[str]:
    """What the numbers say, in sentences that hold for the numbers at hand."""
    size, plain = result.mean("modular", "module_size"), result.mean("standard", "module_size")
    smallest = result.subtasks()[0]
    difference = 100 * (smallest.composed - smallest.modular)
    more = "more" if difference > 0 else "less"
    against = "is as accurate as" if abs(difference) < 0.005 else f"scores {abs(difference):.2f} points {more} than"
    return [
        f"Cut the same way, a module of the modular model takes {100 * size:.0f} % of the parameters, one of the "
        f"standard model {100 * plain:.0f} %.",
        f"A composed model of {smallest.classes} classes has {100 * smallest.size:.0f} % of the parameters and "
        f"{against} the whole modular model on the same samples, with no fine-tuning.",
    ]


def to_json(result: DemoResult) -> dict[str, Any]:
    """The numbers of results.json."""
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "library_version": __version__,
        "settings": dataclasses.asdict(result.settings),
        "parameters": result.parameters,
        "seconds": result.seconds,
        "mean": {
            "standard": _means(result, "standard"),
            "modular": _means(result, "modular"),
            "subtasks": [dataclasses.asdict(row) for row in result.subtasks()],
        },
        "seeds": [
            {
                "seed": seed.seed,
                "standard": _numbers(seed.standard),
                "modular": _numbers(seed.modular),
                "subtasks": [dataclasses.asdict(row) for row in seed.subtasks],
                "decompose_seconds": seed.decompose_seconds,
                "compose_seconds": seed.compose_seconds,
            }
            for seed in result.seeds
        ],
    }


def _means(result: DemoResult, training: str) -> dict[str, float]:
    return {name: result.mean(training, name) for name in ("accuracy", "module_size", "overlap", "seconds")}


def _numbers(trained: Trained) -> dict[str, Any]:
    return {
        "accuracy": trained.accuracy,
        "seconds": trained.seconds,
        **{name: float(value) for name, value in trained.losses._asdict().items()},
        "module_sizes": trained.module_sizes,
        "overlaps": trained.overlaps.tolist(),
    }
