"""The command `moda report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from moda.cli.examples import example


def register(app: typer.Typer) -> None:
    """Add the command to the `moda` command."""
    lines = ("moda report runs/digits runs/standard -o report.html", "moda report study -o docs/study/report.html")
    app.command("report", epilog=example(*lines), rich_help_panel="The paper's study")(report)


def report(
    folders: Annotated[
        list[Path],
        typer.Argument(
            metavar="FOLDER",
            help="Folders of runs (moda train), of a study (moda study), of replacement studies (moda repair).",
            show_default=False,
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The page, a file.")] = Path("report.html"),
    title: Annotated[str | None, typer.Option(help="Its heading.", show_default=False)] = None,
) -> None:
    """Make one page of runs' results: training, reuse, modules, sweeps, replacement, beside the paper's numbers.

    The page is one file and needs no network. Runs that differ only in the seed are shown as means with their spread,
    modular ones against the standard ones of the same settings. What a run has no results of is left out, with the
    command that makes them.
    """
    from moda.files import write_bytes
    from moda.report.study import read_inputs, study_page

    page = study_page(read_inputs(folders), title)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(output, page.encode())
    Console().print(f"Page: {output}", highlight=False, soft_wrap=True)
