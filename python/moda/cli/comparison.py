"""Holds the commands that compare methods, and that search trained models for modules: compare, modularize."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from moda.cli.arguments import DeviceOption, ForceOption, RunArgument
from moda.cli.commands import example, group
from moda.cli.module_table import show_modules
from moda.cli.options import takes
from moda.cli.printing import percent, say, show, table
from moda.composition import measure
from moda.decomposition.files import METADATA_FILE
from moda.files import check_result_file, check_result_folder, write_bytes, write_json
from moda.hints import command_line
from moda.runs.finished import FinishedRun
from moda.runs.lock import locked
from moda.study.comparison import ComparisonSettings, MethodFigures, compare_methods, compare_run
from moda.study.searching import SearchSettings, search_run

commands = group()


@commands.command(
    epilog=example(
        "moda modularize runs/standard --method gradsplitter",
        "moda modularize runs/standard --method cnnsplitter --generations 50",
    )
)
@takes(SearchSettings, "modularize")
def modularize(
    folder: RunArgument,
    given: Mapping[str, Any],
    device: DeviceOption = "auto",
) -> None:
    """Search a trained model for modules with GradSplitter or CNNSplitter.

    The model stays as it is. One training sample in five chooses among epochs or candidates. The modules are written
    to the run's folder decomposition/.
    """
    settings = SearchSettings(**given)
    finished = FinishedRun.open(folder, device)
    check_result_folder(finished.run.decomposition, METADATA_FILE, force=True)  # the run's own: it is made again
    with locked(finished.run.path):
        decomposition = search_run(finished, settings)
        decomposition.save(finished.run.decomposition)
    sizes = measure.module_sizes(finished.taps, decomposition)
    overlaps = measure.overlap_matrix(finished.taps, decomposition, counting="parameters")
    show_modules(finished.data.class_names, decomposition, sizes.tolist(), overlaps.tolist())
    say(f"Modules: {finished.run.decomposition}/")
    say(f"Next: {command_line('compose', folder, '--classes', '0,1')}")


@commands.command(
    epilog=example(
        "moda compare comparison --methods all --data digits --model small_vgg,simcnn --epochs 40",
        "moda compare runs/moda runs/mwt runs/standard",
    )
)
@takes(ComparisonSettings, "compare")
def compare(
    folders: Annotated[
        list[Path],
        typer.Argument(
            metavar="FOLDER",
            help="Decomposed runs to compare, or one folder in which all methods are trained and compared.",
            show_default=False,
        ),
    ],
    given: Mapping[str, Any],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The page, a file.  \\[default: comparison.html in the first folder]"),
    ] = None,
    force: ForceOption = False,
) -> None:
    """Compare modularization methods: accuracy, size, overlap, FLOPs and time, in one table and on one page.

    Given decomposed runs, these are compared. Given one new folder, each method trains its model there, or searches the
    standard one, and all are measured on the same data; after Ctrl-C the same command goes on.
    """
    from moda.report.comparison import comparison_page

    settings = ComparisonSettings(**given)
    runs = [folder for folder in folders if (folder / "config.json").exists()]
    if runs and len(runs) < len(folders):
        other = next(folder for folder in folders if folder not in runs)
        raise typer.BadParameter(f"{other}: holds no run; name runs alone, or one folder for a comparison")
    if not runs and len(folders) > 1:
        raise typer.BadParameter("FOLDER: expected runs, or one folder in which all methods are compared")
    page = output or folders[0] / "comparison.html"
    check_result_file(page, force=force or output is None)
    found = [compare_run(folder, settings) for folder in runs] or compare_methods(folders[0], settings)
    _print_comparison(found)
    page.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(page, comparison_page(found).encode())
    write_json(page.with_suffix(".json"), {"methods": [asdict(figures) for figures in found]})
    say(f"Page: {page}")


def _print_comparison(found: list[MethodFigures]) -> None:
    rows = table(
        "Methods",
        "method",
        "model",
        "whole",
        "module size",
        "neurons kept",
        "overlap",
        "gain, replaced",
        "train",
        "modularize",
        keys=2,
    )
    for one in found:
        rows.add_row(
            one.method,
            f"{one.model}, seed {one.seed}",
            *(percent(share) for share in (one.accuracy, one.module_size, one.kept, one.overlap, one.calibrated)),
            *(_seconds(value) for value in (one.train_seconds, one.modularize_seconds)),
        )
    show(rows, keys=2)
    rows = table(
        "Composed modules",
        "method",
        "classes",
        "whole",
        "composed",
        "fine-tuned",
        "size",
        "kept",
        "FLOPs",
        "tuning",
        keys=2,
    )
    for one in found:
        for size in one.sizes:
            shares = (size.whole, size.before, size.after, size.size, size.kept, size.flops)
            rows.add_row(f"{one.method}, {one.model}", str(size.classes), *map(percent, shares), _seconds(size.seconds))
    show(rows, keys=2)


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.1f} s"
