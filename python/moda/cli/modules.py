"""Holds the commands that make modules of a model and put them together: decompose, compose, evaluate."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from moda.cli.arguments import ForceOption, OptionalClasses, RunArgument, parse_classes
from moda.cli.commands import example, group
from moda.cli.module_table import show_modules
from moda.cli.options import takes
from moda.cli.printing import percent, say, show, table
from moda.composition import measure
from moda.composition.compose import compose as build
from moda.composition.files import (
    DESCRIPTION_FILE,
    ENSEMBLE_FILE,
    load_composed,
    metadata_of,
    save_composed,
)
from moda.data import DataSplits
from moda.data.batches import BatchLoader, EpochOrder
from moda.decomposition.container import Decomposition
from moda.decomposition.files import DECOMPOSITION, METADATA_FILE
from moda.files import FormatError, check_result_folder, format_errors
from moda.hints import command_line
from moda.observation.taps import Taps
from moda.runs.config import DecompositionSettings, TrainingConfig
from moda.runs.finished import FinishedRun, decompose_run
from moda.runs.folder import load_data
from moda.study.searching import SEARCHING

commands = group()


@commands.command(
    epilog=example(
        "moda decompose runs/digits",
        "moda decompose runs/digits --threshold 0.8",
        "moda decompose runs/digits --rule attribution --epsilon auto",
    )
)
@takes(DecompositionSettings, "decompose")
def decompose(
    folder: RunArgument,
    given: Mapping[str, Any],
    force: ForceOption = False,
) -> None:
    """Decompose a trained model into one module per class.

    By default the command counts, on the training data, for which share of each class's samples every neuron fires, as
    published. The rule `attribution` keeps the neurons through which a class's margin goes, which are far fewer. The
    modules are written to the run's folder decomposition/. They replace those that this command made before; those of
    a search (moda modularize), which takes long, are replaced with --force alone.
    """
    settings = DecompositionSettings(**given)
    finished = FinishedRun.open(folder)
    check_result_folder(finished.run.decomposition, METADATA_FILE, force=force or not _of_search(finished))
    try:
        decomposition = decompose_run(finished, **{name: getattr(settings, name) for name in given})
    except TypeError as error:  # an option that does not go with the rule
        raise typer.BadParameter(f"--{error}") from None
    run = finished.run
    _print_modules(finished.taps, decomposition, finished.data)
    say(f"Modules: {run.decomposition}/")
    say(f"Next: {command_line('compose', folder, '--classes', '0,1')}")


def _of_search(finished: FinishedRun) -> bool:
    """Whether the run has modules that a search found."""
    description = finished.run.decomposition / METADATA_FILE
    try:
        return DECOMPOSITION.read(description)["method"] in SEARCHING
    except FormatError:
        return False


def _print_modules(taps: Taps, decomposition: Decomposition, data: DataSplits) -> None:
    sizes, overlaps = measure.module_sizes(taps, decomposition), measure.overlap_matrix(taps, decomposition)
    show_modules(data.class_names, decomposition, sizes.tolist(), overlaps.tolist())
    say(
        f"Mean module: {percent(float(sizes.mean()), 1)} of the parameters; "
        f"mean overlap of two modules: {percent(measure.mean_over_pairs(overlaps), 1)}."
    )


@commands.command(
    epilog=example("moda compose runs/digits --classes 1,7", "moda compose runs/cifar10 -c cat,dog -o cat-or-dog")
)
def compose(
    folder: RunArgument,
    classes: OptionalClasses = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The folder to write it to.  \\[default: composed-... in the run]"),
    ] = None,
    force: ForceOption = False,
) -> None:
    """Build the smaller model of some classes from their modules."""
    if classes is None:
        raise typer.BadParameter("--classes: name the classes that the model is to tell apart, e.g. --classes 1,7")
    finished = FinishedRun.open(folder, "cpu")
    run, data = finished.run, finished.data
    chosen = parse_classes(classes, data.class_names)
    target = output or run.path / f"composed-{'-'.join(map(str, chosen))}"
    decomposition = finished.decomposition()
    check_result_folder(target, _description_of(decomposition), force=force)
    model = build(finished.taps, decomposition, chosen, class_names=data.class_names)
    names = [data.class_names[index] for index in chosen]
    metadata = {"source_run": str(run.path), "class_names": names, "training": run.config.to_dict()}
    save_composed(model, target, metadata)
    _print_accuracies(finished, chosen, model)
    say(model.report())
    say(f"The composed model: {target}/")
    say(f"Next: {command_line('evaluate', target)}")


@commands.command(
    epilog=example(
        "moda evaluate runs/digits",
        "moda evaluate runs/digits --classes 1,7",
        "moda evaluate runs/digits/composed-1-7",
    )
)
def evaluate(
    folder: Annotated[
        Path, typer.Argument(help="A run folder, or a folder that `moda compose` wrote.", show_default=False)
    ],
    classes: OptionalClasses = None,
) -> None:
    """Test a trained model, or a composed one, on the test data.

    With --classes only samples and outputs of these classes count, and where the run is decomposed the model composed
    of them is tested beside the whole one.
    """
    if any((folder / name).exists() for name in (DESCRIPTION_FILE, ENSEMBLE_FILE)):
        _evaluate_composed(folder, classes)
        return
    finished = FinishedRun.open(folder, "cpu")
    if classes is not None:
        chosen = parse_classes(classes, finished.data.class_names)
        _print_accuracies(finished, chosen, _composed(finished, chosen))
        return
    share = measure.accuracy(finished.whole, finished.loader(finished.data.test))
    say(f"{finished.run.config.model}: {percent(share)} of the test samples")


def _description_of(decomposition: Decomposition) -> str:
    return DESCRIPTION_FILE if decomposition.combine == "rows" else ENSEMBLE_FILE


def _evaluate_composed(folder: Path, classes: str | None) -> None:
    settings = metadata_of(folder).get("training")
    if not isinstance(settings, dict):
        raise FormatError(
            f"{folder / DESCRIPTION_FILE}: does not say how the model was trained; was it made by moda compose?"
        )
    with format_errors(folder / DESCRIPTION_FILE):
        config = TrainingConfig.from_dict(settings)
    data = load_data(config)
    model = load_composed(folder)
    chosen = list(model.classes) if classes is None else parse_classes(classes, data.class_names)
    loader = BatchLoader(data.test, EpochOrder(len(data.test), config.batch_size, None))  # type: ignore[arg-type]
    share = measure.accuracy(model, loader, chosen)
    names = ", ".join(data.class_names[index] for index in chosen)
    say(
        f"composed of {names}: {percent(share)} of their test samples, "
        f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters"
    )


def _composed(finished: FinishedRun, classes: list[int]) -> nn.Module | None:
    """Compose the model of these classes; None where the run is not decomposed."""
    if not finished.run.decomposition.exists():
        return None
    return build(finished.model, finished.decomposition(), classes)


def _print_accuracies(finished: FinishedRun, classes: list[int], composed: nn.Module | None) -> None:
    """Print what the whole model and the composed one do on the test samples of some classes."""
    names = ", ".join(finished.data.class_names[index] for index in classes)
    rows = table(f"On the test samples of {names}", "model", "accuracy", "parameters", "FLOPs")
    example = torch.zeros(1, *finished.data.input_shape)
    whole = None
    for title, model in (("whole", finished.whole), ("composed", composed)):
        if model is None:
            continue
        share = measure.accuracy(model, finished.loader(finished.data.test), classes)
        cost = sum(parameter.numel() for parameter in model.parameters()), measure.flops(model, example)
        whole = whole or cost
        cells = [f"{value:,} ({100 * value / total:.0f} %)" for value, total in zip(cost, whole, strict=True)]
        rows.add_row(title, percent(share), *cells)
    show(rows)
