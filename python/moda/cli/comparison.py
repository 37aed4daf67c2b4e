"""Holds the commands that compare methods, and that search trained models for modules: compare, modularize."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from moda.cli.arguments import DeviceOption, ForceOption, RunArgument
from moda.cli.commands import example, group
from moda.cli.module_table import show_modules
from moda.cli.options import takes
from moda.cli.printing import say, show, table
from moda.cli.report import PAGE
from moda.composition import measure
from moda.decomposition.files import METADATA_FILE
from moda.files import check_result_file, check_result_folder
from moda.hints import command_line
from moda.methods import CNNSplitter
from moda.runs.finished import FinishedRun
from moda.runs.lock import locked
from moda.study.comparison import (
    COMPARISON,
    COMPARISON_FILE,
    ComparisonSettings,
    MethodFigures,
    compare_methods,
    compare_run,
    means,
    read_comparison,
)
from moda.study.searching import SearchSettings, search_run

commands = group()
PAGE_FILE = Path(COMPARISON_FILE).with_suffix(".html").name


@commands.command(
    epilog=example(
        "moda modularize runs/standard --method gradsplitter",
        "moda modularize runs/standard --method cnnsplitter --generations 50",
        "moda modularize runs/standard --method cnnsplitter --generations 50 --resume",
    )
)
@takes(SearchSettings, "modularize")
def modularize(
    folder: RunArgument,
    given: Mapping[str, Any],
    device: DeviceOption = "auto",
    resume: Annotated[
        bool, typer.Option("--resume", help="With cnnsplitter: go on with the search that was stopped.")
    ] = False,
    force: ForceOption = False,
) -> None:
    """Search a trained model for modules with GradSplitter or CNNSplitter.

    The model stays as it is. One training sample in five chooses among epochs or candidates. The modules are written
    to the run's folder decomposition/. A search of CNNSplitter is kept after every generation: after Ctrl-C, --resume
    goes on with it.
    """
    settings = SearchSettings(**given)
    finished = FinishedRun.open(folder, device)
    run = finished.run
    check_result_folder(run.decomposition, METADATA_FILE, force=force)
    with locked(run.path):
        _check_search(run.search, settings.method, resume=resume, force=force)
        decomposition = search_run(finished, settings, run.search)
        decomposition.save(run.decomposition)
        run.search.unlink(missing_ok=True)
    sizes = measure.module_sizes(finished.taps, decomposition)
    overlaps = measure.overlap_matrix(finished.taps, decomposition, counting="parameters")
    show_modules(finished.data.class_names, decomposition, sizes.tolist(), overlaps.tolist())
    say(f"Modules: {run.decomposition}/")
    say(f"Next: {command_line('compose', folder, '--classes', '0,1')}")


def _check_search(kept: Path, method: str, *, resume: bool, force: bool) -> None:
    """Say what cannot be resumed; a search that was stopped is begun anew with --force alone.

    Raises:
        ValueError: there is none to resume, or one that would be lost.
    """
    if resume and method != CNNSplitter.name:
        raise ValueError(f"--resume: a search by {method} begins anew; only {CNNSplitter.name} keeps its search")
    if resume and not kept.exists():
        raise ValueError(f"--resume: {kept.parent} has no search that was stopped")
    if kept.exists() and not resume:
        if not force:
            raise ValueError(f"{kept}: is a search that was stopped; go on with --resume, or begin anew with --force")
        kept.unlink()


@commands.command(
    epilog=example(
        "moda compare comparison --methods all --data digits --model small_vgg --epochs 40 --seeds 0,1,2",
        "moda compare runs/moda runs/mwt runs/standard",
        "moda compare comparisons/vgg comparisons/simcnn -o both.html",
    )
)
@takes(ComparisonSettings, "compare")
def compare(
    folders: Annotated[
        list[Path],
        typer.Argument(
            metavar="FOLDER",
            help="One folder in which all methods are trained and compared, decomposed runs to compare, or several "
            "folders of comparisons to show together.",
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

    Given one new folder, each method trains its model there, or searches the standard one, and all are measured on the
    same data; after Ctrl-C the same command goes on. Given decomposed runs, these are compared; given several folders
    of comparisons, they are read.
    """
    from moda.report.comparison import comparison_page

    page = output or folders[0] / PAGE_FILE
    _check_page(page, folders, force=force)
    found = _compared(folders, ComparisonSettings(**given))
    _print_comparison(found)
    figures = {"methods": [asdict(one) for one in found]}
    COMPARISON.write_with(page.with_suffix(".json"), figures, {page.name: comparison_page(found).encode()})
    say(f"Page: {page}")


def _check_page(page: Path, folders: list[Path], *, force: bool) -> None:
    """Check where a page and its figures go, before anything is measured.

    The page of a comparison in the comparison's own folder is made anew unasked: the folder keeps every figure of it.

    Raises:
        ValueError: the page's name is none of a page, or one would replace something else, or a result without `force`.
    """
    if page.suffix != ".html":
        raise ValueError(f"output: expected a name that ends in .html, got {page.name!r}")
    figures = page.with_suffix(".json")
    own = folders == [page.parent] and page.name == PAGE_FILE and not (page.parent / "config.json").exists()
    check_result_file(page, force=force or own, begins=PAGE)
    check_result_file(figures, force=force or own)
    COMPARISON.check_replaceable(figures)


def _compared(folders: list[Path], settings: ComparisonSettings) -> list[MethodFigures]:
    """The figures of runs or of comparisons, whichever the folders hold; those of a new one are measured."""
    runs = [(folder / "config.json").exists() for folder in folders]
    if all(runs):
        return [compare_run(folder, settings) for folder in folders]
    if any(runs):
        other = folders[runs.index(False)]
        raise typer.BadParameter(f"{other}: holds no run; name runs alone, or one folder for a comparison")
    if len(folders) == 1:
        return compare_methods(folders[0], settings)
    read = [read_comparison(folder) for folder in folders]
    if not all(read):
        raise typer.BadParameter(
            f"{folders[read.index([])]}: holds no run and no comparison; name runs alone, comparisons alone, or one "
            "folder in which all methods are compared"
        )
    return [figures for one in read for figures in one]


def _print_comparison(found: list[MethodFigures]) -> None:
    """Print means over seeds, one table of methods and one of composed modules for every model."""
    averaged = means(found)
    for model, data in dict.fromkeys((one.model, one.data) for one in averaged):
        members = [one for one in averaged if (one.model, one.data) == (model, data)]
        seeds = len({one.seed for one in found if (one.model, one.data) == (model, data)})
        words = f"{model} on {data}, " + (f"means over {seeds} seeds" if seeds > 1 else f"seed {members[0].seed}")
        show(_table_of_methods(words, members))
        show(_table_of_modules(words, members), keys=2)


def _table_of_methods(words: str, members: list[MethodFigures]) -> Table:
    made = table(
        f"{words}: shares in %, seconds",
        "method",
        "whole",
        "module size",
        "neurons kept",
        "overlap",
        "gain, replaced",
        "to train",
        "to modularize",
    )
    for one in members:
        shares = (one.accuracy, one.module_size, one.kept, one.overlap, one.calibrated)
        made.add_row(one.method, *map(_hundredths, shares), *map(_number, (one.train_seconds, one.modularize_seconds)))
    return made


def _table_of_modules(words: str, members: list[MethodFigures]) -> Table:
    made = table(
        f"Composed modules, {words}",
        "method",
        "classes",
        "whole",
        "composed",
        "fine-tuned",
        "size",
        "neurons kept",
        "FLOPs",
        keys=2,
    )
    for one in members:
        for size in one.sizes:
            shares = (size.whole, size.before, size.after, size.size, size.kept, size.flops)
            made.add_row(one.method, str(size.classes), *map(_hundredths, shares))
        made.add_section()
    return made


def _hundredths(share: float | None) -> str:
    return _number(None if share is None else 100 * share)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"
