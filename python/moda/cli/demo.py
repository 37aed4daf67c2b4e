"""Holds the command `moda demo`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from moda.cli.arguments import ForceOption
from moda.cli.commands import example, group
from moda.cli.options import takes
from moda.demo.folder import check_demo_folder
from moda.demo.settings import DemoSettings

commands = group()


@commands.command(epilog=example("moda demo", "moda demo my-demo --seeds 3"))
@takes(DemoSettings, "demo")
def demo(
    given: Mapping[str, Any],
    folder: Annotated[Path, typer.Argument(help="The folder that runs and figures are written to.")] = Path("demo"),
    seeds: Annotated[int, typer.Option(help="Repeat everything with this many seeds, and show means.", min=1)] = 1,
    force: ForceOption = False,
) -> None:
    """Train a small network on handwritten digits, decompose it into modules, recombine them, and show what came of it.

    This takes about a minute on two cores and needs no network. It writes demo.html and demo.png. With --force it takes
    the place of an earlier demo, its runs and what was made of them, once it is whole.
    """
    check_demo_folder(folder, force=force)
    from moda.demo.run import run_demo

    run_demo(folder, DemoSettings(seeds=tuple(range(seeds)), **given), Console())
