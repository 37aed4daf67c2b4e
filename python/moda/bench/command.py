"""Runs what `moda bench` asks for, writes the results and prints one table last."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from moda.bench import results, runner
from moda.bench.machine import device_name
from moda.bench.plan import SUITES
from moda.bench.table import TEXT_COLUMNS, notes, table
from moda.tables import print_table

_TABLE_WIDTH = 190


def bench(*, quick: bool, device: str, suites: Sequence[str], folder: Path | None, force: bool = False) -> bool:
    """Run the suites and print their table; return False if a contender was wrong.

    Args:
        quick: run few cases and rounds.
        device: "auto" (a GPU if there is one), "cpu" or "cuda".
        suites: names from `moda.bench.plan.SUITES`; an empty sequence means all.
        folder: the folder for `<device>.json`. With None, a full run of all suites writes to `benchmarks/results` in a
            checkout and to the current folder elsewhere; any other run writes nothing.
        force: whether to replace results of this device that are there already.

    Raises:
        ValueError: an argument is not as above, there is no such device, or nothing may be written there.
    """
    chosen = _suites(suites)
    on = _device(device)
    target = folder or (runner.default_folder() if not quick and chosen == SUITES else None)
    if target is not None:
        results.check_place(target, device_name(on), force=force)
    progress = Console(stderr=True, highlight=False)
    begin = time.perf_counter()

    def report(line: str) -> None:
        progress.print(f"[dim]{time.perf_counter() - begin:6.0f} s[/dim]  {line}")

    measured = runner.run(on, quick=quick, suites=chosen, report=report)
    report("done")
    for note in notes(measured):
        progress.print(note)
    if target is not None:
        report(f"written to {results.write(measured, target)}")
    console = Console()
    shown = console if console.is_terminal else Console(width=_TABLE_WIDTH)
    print_table(table(measured), shown, keys=len(TEXT_COLUMNS))
    return not any(row.status == results.WRONG for row in measured.rows)


def _suites(wanted: Sequence[str]) -> tuple[str, ...]:
    unknown = [name for name in wanted if name not in SUITES]
    if unknown:
        raise ValueError(f"suites: expected some of {', '.join(SUITES)}, got {', '.join(unknown)}")
    return tuple(name for name in SUITES if not wanted or name in wanted)


def _device(name: str) -> torch.device:
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device: expected auto, cpu or cuda, got {name!r}")
    gpu = torch.cuda.is_available()
    if name == "cuda" and not gpu:
        raise ValueError("device: got 'cuda', but PyTorch finds no usable GPU (see moda doctor)")
    return torch.device("cuda" if gpu and name != "cpu" else "cpu")
