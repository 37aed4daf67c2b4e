"""The command `moda replace`, which was called `moda repair`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moda.cli.arguments import DeviceOption, parse_integers, parse_words
from moda.cli.commands import example, group
from moda.cli.printing import say, show, table
from moda.runs.finished import FinishedRun
from moda.study.replacement import RESULTS, ReplacementResult
from moda.study.replacement_study import ReplacementStudy, run_replacement_study

commands = group()


@commands.command("repair", hidden=True)
@commands.command(
    "replace",
    epilog=example(
        "moda replace replacements/vgg16 --data cifar10 --data-root ~/data",
        "moda replace replacements/resnet18 --data svhn --strong-model resnet18 --classes 0,3",
        "moda replace replacements/digits --data digits --image-size 16 --strong-model small_vgg",
    ),
)
def replace(
    out: Annotated[
        Path, typer.Argument(help="Folder of the study: its runs and replacement.json.", show_default=False)
    ],
    strong: Annotated[
        Path | None, typer.Option(help="Take this strong run instead of training one.", show_default=False)
    ] = None,
    data: Annotated[str, typer.Option(help="Its first half of classes are the strong ones.")] = "cifar10",
    data_root: Annotated[str | None, typer.Option(help="Folder that holds the data set.  \\[default: ./data]")] = None,
    image_size: Annotated[int | None, typer.Option(help="Resize images (digits, imagefolder).")] = None,
    strong_model: Annotated[str, typer.Option(help="Architecture that gives the modules.")] = "vgg16",
    strong_width: Annotated[float, typer.Option(help="Multiplier of its hidden widths.")] = 1.0,
    weak_model: Annotated[str, typer.Option(help="Architecture that is given modules.")] = "lenet5",
    weak_width: Annotated[float, typer.Option(help="Multiplier of its hidden widths.")] = 1.0,
    classes: Annotated[
        str | None, typer.Option("--classes", "-c", help="Indices of strong classes to replace.  \\[default: all]")
    ] = None,
    strategy: Annotated[str, typer.Option(help="calibrate, normalize, or both, separated by a comma.")] = (
        "calibrate,normalize"
    ),
    epochs: Annotated[int, typer.Option(help="Of each training.", min=1)] = 200,
    under: Annotated[int, typer.Option(help="Epoch of the under-fitted weak model; 0: none.", min=0)] = 10,
    over: Annotated[int, typer.Option(help="Epoch of the over-fitted weak model; 0: none.", min=0)] = 195,
    fraction: Annotated[float, typer.Option(help="Share of training samples that a weak model sees.")] = 0.1,
    batch_size: Annotated[int, typer.Option(help="Samples per step.", min=1)] = 128,
    seed: Annotated[int, typer.Option(help="Of everything.", min=0)] = 42,
    threshold: Annotated[float, typer.Option(help="Firing rate from which a neuron is kept.")] = 0.9,
    calibration_epochs: Annotated[
        int, typer.Option(help="Passes over the weak training samples that calibrate.", min=1)
    ] = 5,
    weak_standard: Annotated[
        bool, typer.Option("--weak-standard", help="Train weak models without the modular terms.")
    ] = False,
    device: DeviceOption = "auto",
) -> None:
    """Replace a class of weak models by a strong model's module, and test what that does.

    Trains a strong model on the first half of the classes and, for each of these, a weak model on a tenth of the data
    of the other half and of that class; replaces that class in the under-fitted and the over-fitted weak model. The
    defaults are the paper's. After Ctrl-C the same command goes on.
    """
    study = ReplacementStudy(
        data=data,
        data_root=data_root,
        data_options={} if image_size is None else {"image_size": image_size},
        strong_model=strong_model,
        strong_width=strong_width,
        weak_model=weak_model,
        weak_width=weak_width,
        mixed_classes=None if classes is None else parse_integers("--classes", classes),
        strategies=parse_words(strategy),
        epochs=epochs,
        under_epoch=under or None,
        over_epoch=over or None,
        fraction=fraction,
        batch_size=batch_size,
        seed=seed,
        threshold=threshold,
        calibration_epochs=calibration_epochs,
        weak_modular=not weak_standard,
        device=device,
    )
    results = run_replacement_study(out, study, None if strong is None else FinishedRun.open(strong, device))
    _print_results(results)
    say(f"All figures: {out / RESULTS}")


def _print_results(results: list[ReplacementResult]) -> None:
    first = results[0]
    rows = table(
        f"{first.weak_model} with modules of {first.strong_model}: accuracy in %, before -> after",
        "class",
        "weak model",
        "strategy",
        "replaced class",
        "other classes",
    )
    for result in results:
        (target, target_after), (others, others_after) = result.target, result.others
        rows.add_row(
            result.class_name,
            f"{result.checkpoint}, epoch {result.epoch}",
            result.strategy,
            _change(target, target_after),
            _change(others, others_after),
        )
    show(rows)


def _change(before: float, after: float) -> str:
    return f"{100 * before:.1f} -> {100 * after:.1f} ({100 * (after - before):+.1f})"
