"""Holds the command `moda report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moda.cli.arguments import ForceOption
from moda.cli.commands import example, group
from moda.cli.printing import say
from moda.files import check_result_file, write_bytes

commands = group()
PAGE = b"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="generator" content="moda-kernels">
"""
"""What every page of ours begins with."""


@commands.command(
    epilog=example(
        "moda report runs/digits runs/standard -o report.html", "moda report study -o docs/study/report.html --force"
    )
)
def report(
    folders: Annotated[
        list[Path],
        typer.Argument(
            metavar="FOLDER",
            help="The folders of runs (moda train), of a study (moda study) or of replacement studies (moda replace).",
            show_default=False,
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The page, a file.")] = Path("report.html"),
    force: ForceOption = False,
    title: Annotated[str | None, typer.Option(help="Its heading.", show_default=False)] = None,
) -> None:
    """Make one page of runs' results: training, reuse, modules, sweeps, replacement, beside the paper's numbers.

    The page is one file and needs no network. Runs that differ only in the seed are shown as means with their spread,
    modular ones against the standard ones of the same settings. What a run has no results of is left out, with the
    command that makes them.
    """
    from moda.report.study import read_inputs, study_page

    check_result_file(output, force=force, begins=PAGE)
    page = study_page(read_inputs(folders), title)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(output, page.encode())
    say(f"Page: {output}")
