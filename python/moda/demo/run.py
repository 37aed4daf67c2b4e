"""Runs the demonstration: trains on handwritten digits standard and modular, decomposes, recombines and compares."""

from __future__ import annotations

import dataclasses
import itertools
import random
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from moda.composition.measure import module_sizes, overlap_matrix
from moda.data import DataSplits
from moda.data.batches import BatchLoader, EpochOrder
from moda.decomposition.attribution import attribute
from moda.decomposition.container import Decomposition
from moda.decomposition.counting import count_firings
from moda.decomposition.rule import decompose
from moda.demo.folder import PAGE, PICTURE, RESULTS, RUNS, check_demo_folder, replaced
from moda.demo.page import demo_page
from moda.demo.results import SHARES, DemoResult, SeedResult, SubTasks, Trained, to_json
from moda.demo.settings import DemoSettings
from moda.demo.tables import comparison, print_tables
from moda.files import write_bytes, write_json
from moda.hints import command_line
from moda.observation.taps import observe
from moda.runs.config import TrainingConfig
from moda.runs.folder import create_model, load_data
from moda.study.reuse import TestSet, by_size, evaluate_subtasks
from moda.training.loop import train
from moda.training.progress import TrainingProgress
from moda_kernels import class_similarity, modular_losses


def run_demo(folder: Path, settings: DemoSettings, console: Console) -> DemoResult:
    """Run everything; print tables; write the figure page, the numbers and the run folders to `folder`.

    A folder of an earlier demo takes this one in its place, whole or not at all.

    Raises:
        ValueError: `folder` holds something else.
        ImportError: an optional package is missing; the message says which.
    """
    check_demo_folder(folder, force=True)
    data = load_data(_config(settings.seeds[0], settings))  # before anything is made
    with replaced(folder) as making:
        result = _made(making, settings, data, console)
        modular = folder / RUNS / f"seed-{settings.seeds[0]}" / "modular"
        picture, page = demo_page(result, comparison(result), command_line("compose", modular, "--classes", "1,7"))
        write_json(making / RESULTS, to_json(result))
        write_bytes(making / PICTURE, picture)
        write_bytes(making / PAGE, page.encode())
    console.print(
        f"\nFigures: [bold]{folder / PAGE}[/bold] and {folder / PICTURE}; runs: {folder / RUNS}/", highlight=False
    )
    return result


def _made(folder: Path, settings: DemoSettings, data: DataSplits, console: Console) -> DemoResult:
    """Train and measure with every seed, the runs in `folder`, and print tables."""
    start = time.perf_counter()
    seeds = [_run_seed(folder / RUNS / f"seed-{seed}", seed, settings, console) for seed in settings.seeds]
    parameters = _parameters(create_model(_config(settings.seeds[0], settings), data))
    result = DemoResult(settings, data.class_names, parameters, seeds, time.perf_counter() - start)
    print_tables(result, console)
    return result


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
    plain = config.standard()
    results = {
        name: train(each, folder / name, data=data, progress=TrainingProgress(f"{label}{name} training"))
        for name, each in (("standard", plain), ("modular", config))
    }
    start = time.perf_counter()
    examined = {name: _examine(result.model, result.seconds, data, settings) for name, result in results.items()}
    decompose_seconds = time.perf_counter() - start
    _, decomposition, by_attribution = examined["modular"]
    decomposition.save(results["modular"].run.decomposition)
    start = time.perf_counter()
    models = {name: result.model for name, result in results.items()}
    subtasks = _subtasks(models, decomposition, data, settings, random.Random(seed))
    attributed = _subtasks(models, by_attribution, data, settings, random.Random(seed))
    return SeedResult(
        seed,
        examined["standard"][0],
        examined["modular"][0],
        decomposition,
        subtasks,
        attributed,
        decompose_seconds,
        time.perf_counter() - start,
    )


def _examine(
    model: nn.Module, seconds: float, data: DataSplits, settings: DemoSettings
) -> tuple[Trained, Decomposition, Decomposition]:
    """Test a trained model, and decompose it by firing rates and by attribution."""
    loader = BatchLoader(data.train_eval, EpochOrder(len(data.train_eval), 128, None))  # type: ignore[arg-type]
    images, labels = _tensors(data.test)
    model.eval()
    with observe(model, route="grouped", example=images[:2]) as taps:
        with torch.no_grad(), taps.recording():
            logits = model(images)
            activations = taps.activations()
        rates = count_firings(taps, loader, data.num_classes, progress=False)
        decomposition = decompose(rates, settings.threshold)
        by_attribution = decompose(attribute(taps, loader, data.num_classes, progress=False))
        trained = Trained(
            accuracy=_share(logits, labels),
            seconds=seconds,
            losses=modular_losses(activations, labels),
            similarity=class_similarity(activations, labels, data.num_classes),
            rates=rates,
            module_sizes=module_sizes(taps, decomposition).tolist(),
            attribution_sizes=module_sizes(taps, by_attribution).tolist(),
            overlaps=overlap_matrix(taps, decomposition),
        )
    return trained, decomposition, by_attribution


def _tensors(dataset: Dataset[Any]) -> tuple[Tensor, Tensor]:
    """Gather all samples of a small data set."""
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
    """Score composed models of sub-tasks of each size beside the whole models, on the same samples and outputs."""
    test, rows = TestSet.of(data.test), []
    for size in settings.subtask_sizes:
        tasks = choose_subtasks(data.num_classes, size, settings.samples, generator)
        results = evaluate_subtasks(
            models["modular"], decomposition, tasks, test, standard=models["standard"], progress=False
        )
        mean = dataclasses.asdict(by_size(results)[size])
        rows.append(SubTasks(size, len(tasks), **{name: mean[name] for name in SHARES}))
    return rows


def choose_subtasks(num_classes: int, size: int, samples: int, generator: random.Random) -> list[list[int]]:
    """Draw `samples` different subsets of `size` classes, or all if there are no more; classes ascend.

    Raises:
        ValueError: there is no subset of that size.
    """
    if not 1 <= size <= num_classes:
        raise ValueError(f"subtask_sizes: expected sizes in [1, {num_classes}], got {size}")
    every = [list(classes) for classes in itertools.combinations(range(num_classes), size)]
    return sorted(generator.sample(every, samples)) if len(every) > samples else every


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
