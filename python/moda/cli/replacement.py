"""Holds the command `moda replace`, which was called `moda repair`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from moda.cli.arguments import ForceOption, parse_classes
from moda.cli.commands import example, group
from moda.cli.options import takes
from moda.cli.printing import say, show, table
from moda.runs.finished import FinishedRun
from moda.runs.folder import load_data
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
@takes(ReplacementStudy, "replace")
def replace(
    out: Annotated[
        Path, typer.Argument(help="The folder of the study, for its runs and replacement.json.", show_default=False)
    ],
    given: Mapping[str, Any],
    classes: Annotated[
        str | None,
        typer.Option(
            "--classes",
            "-c",
            help="The strong classes to replace, names or indices, each in a weak model of its own; all if not given.",
            show_default=False,
            rich_help_panel="Replacement",
        ),
    ] = None,
    strong: Annotated[
        Path | None, typer.Option(help="Take this strong run instead of training one.", show_default=False)
    ] = None,
    force: ForceOption = False,
) -> None:
    """Replace a class of weak models by a strong model's module, and test what that does.

    A strong model is trained on the first half of the classes and, for each of these, a weak model on a tenth of the
    data of the other half and of that class. That class is then replaced in the under-fitted and the over-fitted weak
    model. The defaults are the paper's. After Ctrl-C the same command goes on.
    """
    study = ReplacementStudy(**given)
    given_strong = None if strong is None else FinishedRun.open(strong, study.device)
    if classes is not None:
        data = load_data(study.strong_config()) if given_strong is None else given_strong.data
        study = study.changed(mixed_classes=tuple(parse_classes(classes, data.class_names)))
    results = run_replacement_study(out, study, given_strong, force=force)
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
        keys=3,
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
    show(rows, keys=3)


def _change(before: float, after: float) -> str:
    return f"{100 * before:.1f} -> {100 * after:.1f} ({100 * (after - before):+.1f})"
