"""The command `moda demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from moda.cli.commands import example, group

commands = group()


@commands.command(epilog=example("moda demo", "moda demo my-demo --seeds 3"))
def demo(
    folder: Annotated[Path, typer.Argument(help="Where to write runs and figures.")] = Path("demo"),
    seeds: Annotated[int, typer.Option(help="Repeat with so many seeds and show means.", min=1)] = 1,
    epochs: Annotated[int, typer.Option(help="Of each training.", min=1)] = 40,
    batch_size: Annotated[int, typer.Option(help="Samples per step.", min=2)] = 64,
) -> None:
    """Train a small network on handwritten digits, decompose it into modules, recombine them, and show what came of it.

    About a minute on two cores, without network. Writes demo.html and demo.png.
    """
    from moda.demo.run import run_demo
    from moda.demo.settings import DemoSettings

    run_demo(folder, DemoSettings(tuple(range(seeds)), epochs, batch_size), Console())
