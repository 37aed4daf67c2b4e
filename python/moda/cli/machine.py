"""Holds the commands about this machine: doctor, bench."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moda.bench.command import bench as measure
from moda.bench.plan import SUITES
from moda.cli.arguments import ForceOption
from moda.cli.commands import example, group
from moda.cli.doctor import build, examine

commands = group()


@commands.command(epilog=example("moda doctor", "moda doctor --json"))
def doctor(
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the same as JSON, for a program or to paste into an issue.")
    ] = False,
) -> None:
    """Show versions, devices and backends, why one is not available, and how to fix it."""
    if as_json:
        print(json.dumps({"findings": [asdict(finding) for finding in examine()], "native": build()}, indent=1))
        return
    rows = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for _ in range(3):
        rows.add_column(no_wrap=True)
    rows.add_column(overflow="fold")
    topic = None
    for finding in examine():
        if topic is not None and finding.topic != topic:
            rows.add_row()
        heading = finding.topic if finding.topic != topic else ""
        topic = finding.topic
        mark = Text("yes", style="green") if finding.ok else Text("no", style="yellow")
        rows.add_row(Text(heading, style="bold"), finding.name, mark, finding.detail)
    Console(markup=False, emoji=False).print(rows)


@commands.command(epilog=example("moda bench --quick", "moda bench --suite step --suite loss"))
def bench(
    quick: Annotated[bool, typer.Option("--quick", help="Measure few cases in few rounds.")] = False,
    device: Annotated[
        str, typer.Option(help="The device: auto, cpu or cuda; auto takes a GPU if there is one.")
    ] = "auto",
    suite: Annotated[
        list[str] | None,
        typer.Option(
            help=f"A suite: {', '.join(SUITES[:-1])} or {SUITES[-1]}; repeat for several.",
            show_default="all",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="The folder for <device>.json.",
            show_default="benchmarks/results in a checkout, else here, for a full run; none for any other",
        ),
    ] = None,
    force: ForceOption = False,
) -> None:
    """Measure this machine: training steps, losses, pooling, counting and decomposition, ours beside PyTorch's.

    Results are checked first, contenders take turns, and one table comes last. A full run takes more than half an hour
    on two cores. The exit status is 1 if a contender computed something wrong.
    """
    if not measure(quick=quick, device=device, suites=suite or (), folder=output, force=force):
        raise typer.Exit(1)
