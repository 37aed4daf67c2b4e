"""Holds the commands of the paper's study over trained runs: reuse, analyze, sweep, study."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from moda.cli.arguments import (
    PER_SIZE,
    DecomposedRun,
    DeviceOption,
    ForceOption,
    TasksOption,
    parse_integers,
)
from moda.cli.commands import example, group
from moda.cli.module_table import show_modules
from moda.cli.options import takes
from moda.cli.printing import percent, say, show, table
from moda.decomposition.settings import BudgetRule
from moda.runs.finished import FinishedRun
from moda.study.analysis_files import analyze_run, check_analysis, write_analysis
from moda.study.digits import StudySettings, run_study
from moda.study.reuse import ReuseResult, by_size, reuse_accuracy
from moda.study.reuse_run import run_reuse
from moda.study.subtasks import choose
from moda.study.sweep import GRIDS, SweepPoint, SweepSettings, sweep_epsilon, sweep_threshold, sweep_weight

commands = group()


@commands.command(
    epilog=example(
        "moda reuse runs/digits --standard runs/standard",
        "moda reuse runs/digits --size 2,3 --per-size 20",
        "moda reuse runs/cifar100 --tasks sampled --out cifar100.parquet --device cuda",
    )
)
def reuse(
    folder: DecomposedRun,
    standard: Annotated[
        Path | None, typer.Option(help="A run that was trained with --standard, to compare with.", show_default=False)
    ] = None,
    tasks: TasksOption = "auto",
    size: Annotated[
        str | None,
        typer.Option("--size", help="Only sub-tasks of these numbers of classes, e.g. 2,3.", show_default=False),
    ] = None,
    per_size: Annotated[int | None, typer.Option("--per-size", help=PER_SIZE, min=1)] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="The table to write, .csv or .parquet.  \\[default: reuse.csv in the run]"),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="The samples of a forward pass.", min=1)] = 512,
    device: DeviceOption = "auto",
    force: ForceOption = False,
) -> None:
    """Score the composed model of every sub-task against the whole models.

    The scores are the accuracy on the test samples of the sub-task's classes, and parameters and FLOPs relative to the
    whole model. Rows are kept as they are made: after Ctrl-C or a crash the same command goes on.
    """
    finished = FinishedRun.open(folder, device)
    chosen = choose(
        finished.data.num_classes,
        tasks,
        sizes=None if size is None else parse_integers("--size", size),
        per_size=per_size,
    )
    other = None if standard is None else FinishedRun.open(standard, device)
    path = out or finished.run.path / "reuse.csv"
    results = run_reuse(finished, chosen, path, standard=other, batch_size=batch_size, force=force)
    _print_reuse(results, finished)
    say(f"Table: {path}")


def _print_reuse(results: list[ReuseResult], finished: FinishedRun) -> None:
    rows = table(
        f"Sub-tasks of {finished.run.config.model} on {finished.run.config.data}",
        "classes",
        "sub-tasks",
        "standard",
        "modular",
        "composed",
        "size",
        "FLOPs",
    )
    for count, mean in by_size(results).items():
        number = sum(len(result.classes) == count for result in results)
        figures = (mean.standard, mean.modular, mean.composed, mean.size, mean.flops)
        rows.add_row(str(count), str(number), *map(percent, figures))
    show(rows)
    say(f"Reuse accuracy (mean over sizes): {percent(reuse_accuracy(results))}")


@commands.command(epilog=example("moda analyze runs/digits"))
def analyze(folder: DecomposedRun, device: DeviceOption = "auto", force: ForceOption = False) -> None:
    """Describe the modules: sizes, overlaps, dead and shared neurons, layer by layer.

    The command writes analysis.json to the run, with the similarity between classes on the test set besides.
    """
    finished = FinishedRun.open(folder, device)
    path = finished.run.path / "analysis.json"
    if not force:
        check_analysis(path, finished.provenance())
    analysis = analyze_run(finished)
    write_analysis(path, analysis)
    show_modules(analysis["class_names"], finished.decomposition(), analysis["sizes"], analysis["overlaps"])
    _print_layers(analysis)
    say(f"Mean module: {percent(analysis['mean_size'])} of the parameters")
    say(
        f"Mean overlap of two modules: {percent(analysis['mean_overlap'])} as published, "
        f"{percent(analysis['mean_overlap_parameters'])} counting parameters alone"
    )
    say(f"All figures: {path}")


def _print_layers(analysis: dict[str, Any]) -> None:
    rows = table(
        "Layers, from the input",
        "tap",
        "neurons",
        "dead",
        "in all modules",
        "in a module",
        "in both of two",
        "both / either",
    )
    for layer in analysis["layers"]:
        shares = (layer["module_share"], layer["overlap"], layer["jaccard"])
        counts = (layer["neurons"], layer["dead"], layer["shared_by_all"])
        rows.add_row(layer["tap"], *map(str, counts), *map(percent, shares))
    show(rows)


@commands.command(
    epilog=example(
        "moda sweep runs/digits",
        "moda sweep runs/digits --threshold 0.5,0.7,0.9,0.95 --per-size 50",
        "moda sweep runs/digits --threshold paper --attribution usual --share usual",
        "moda sweep runs/digits --affinity paper --dispersion paper --compactness 0,0.3,1",
    )
)
@takes(SweepSettings, "sweep")
def sweep(
    folder: DecomposedRun,
    given: Mapping[str, Any],
    tasks: TasksOption = "auto",
    per_size: Annotated[int, typer.Option(help=PER_SIZE, min=1)] = 20,
    device: DeviceOption = "auto",
    force: ForceOption = False,
) -> None:
    """Vary the threshold, an epsilon or a weight, and measure module size, overlap and reuse accuracy.

    Without options the paper's thresholds are taken. A threshold or an epsilon costs no training, since the run has its
    firing rates and scores. A weight costs a training, which is kept in the run's folder sweeps/. After Ctrl-C the same
    command goes on.
    """
    settings = SweepSettings(**(given or {"threshold": GRIDS["threshold"]}))
    finished = FinishedRun.open(folder, device)
    chosen = choose(finished.data.num_classes, tasks, per_size=per_size)
    for name, values in settings.to_dict().items():
        if values is None:
            continue
        if name == "threshold":
            points = sweep_threshold(finished, values, chosen, force=force)
        elif name in BudgetRule.NAMES:
            points = sweep_epsilon(finished, name, values, chosen, force=force)
        else:
            points = sweep_weight(finished, name, values, chosen, device=device, force=force)
        _print_sweep(name, points)
        say(f"Table: {finished.run.path / f'sweep_{name}.csv'}")


def _print_sweep(name: str, points: list[SweepPoint]) -> None:
    rows = table(f"By {name}", name, "module size", "overlap", "reuse accuracy", "whole model", "test accuracy")
    for point in points:
        figures = (point.module_size, point.overlap, point.reuse_accuracy, point.modular_accuracy, point.test_accuracy)
        rows.add_row(f"{point.value:g}", *map(percent, figures))
    show(rows)


@commands.command(epilog=example("moda study study", "moda study quick --models small_vgg --seeds 0 --per-size 20"))
@takes(StudySettings, "study")
def study(
    out: Annotated[Path, typer.Argument(help="The folder of the study.", show_default=False)],
    given: Mapping[str, Any],
    jobs: Annotated[int, typer.Option(help="The processes side by side, each with one thread.", min=1)] = 2,
    force: ForceOption = False,
) -> None:
    """Run the whole study on handwritten digits: trainings, modules, reuse, sweeps, replacement.

    The study needs neither network nor GPU. Every architecture is trained at reduced width, standard and modular, with
    every seed. After Ctrl-C the same command goes on. Go on with moda report.
    """
    settings = StudySettings(**given)
    run_study(out, settings, jobs=jobs, force=force)
    say(f"The study: {out / 'study.json'}")
