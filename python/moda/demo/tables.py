"""Puts the demo's numbers into text: the rows of its tables, and sentences that say what they mean."""

from __future__ import annotations

from statistics import fmean

from rich.console import Console
from rich.table import Table

from moda.demo.results import DemoResult, SubTasks
from moda.tables import print_table


def print_tables(result: DemoResult, console: Console) -> None:
    """Print the numbers, and how to read them."""
    seeds = f", mean of {len(result.seeds)} seeds" if len(result.seeds) > 1 else ""
    console.print(
        f"\nA {result.parameters:,}-parameter VGG on 1797 handwritten digits, {result.settings.epochs} epochs "
        f"in batches of {result.settings.batch_size}{seeds}.",
        highlight=False,
    )
    print_table(_training_table(result), console)
    print_table(_subtask_table(result), console)
    for line in reading(result):
        console.print(f"- {line}", highlight=False)
    spent = [
        ("standard training", result.mean("standard", "seconds")),
        ("modular training", result.mean("modular", "seconds")),
        ("decomposing both", fmean(seed.decompose_seconds for seed in result.seeds)),
        ("composing and testing", fmean(seed.compose_seconds for seed in result.seeds)),
    ]
    parts = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in spent)
    console.print(f"Time{' per seed' if len(result.seeds) > 1 else ''}: {parts}.", highlight=False)


def comparison(result: DemoResult) -> list[tuple[str, str, str]]:
    """Give rows of (quantity, standard, modular) as text."""

    def losses(training: str, name: str) -> float:
        return fmean(float(getattr(getattr(seed, training).losses, name)) for seed in result.seeds)

    def row(title: str, text: str, values: tuple[float, float]) -> tuple[str, str, str]:
        return title, text.format(values[0]), text.format(values[1])

    def both(quantity: str, scale: float = 1) -> tuple[float, float]:
        return scale * result.mean("standard", quantity), scale * result.mean("modular", quantity)

    same = 1 - losses("standard", "affinity"), 1 - losses("modular", "affinity")
    different = losses("standard", "dispersion"), losses("modular", "dispersion")
    activity = losses("standard", "compactness"), losses("modular", "compactness")
    return [
        row("test accuracy", "{:.2f} %", both("accuracy", 100)),
        row("module size, share of parameters", "{:.1f} %", both("module_size", 100)),
        row("module size by attribution", "{:.1f} %", both("attribution_size", 100)),
        row("overlap of two modules", "{:.1f} %", both("overlap", 100)),
        row("similarity of samples of one class", "{:.3f}", same),
        row("similarity of samples of two classes", "{:.3f}", different),
        row("mean activation", "{:.3f}", activity),
        row("seconds of training", "{:.1f}", both("seconds")),
    ]


SUBTASK_COLUMNS = ("classes", "sub-tasks", "composed", "whole modular", "standard", "parameters", "FLOPs")


def subtask_rows(result: DemoResult) -> list[tuple[str, ...]]:
    """Give the rows of the table of sub-tasks as text, one per number of classes; columns as in `SUBTASK_COLUMNS`."""
    return [
        (
            str(row.classes),
            str(row.count),
            *(f"{100 * share:.2f} %" for share in (row.composed, row.modular, row.standard)),
            *(f"{100 * share:.0f} %" for share in (row.size, row.flops)),
        )
        for row in result.subtasks()
    ]


def _training_table(result: DemoResult) -> Table:
    table = Table(title="Standard and modular training", title_justify="left", title_style="bold")
    table.add_column("")
    table.add_column("standard", justify="right")
    table.add_column("modular", justify="right", style="bold")
    for row in comparison(result):
        table.add_row(*row)
    return table


def _subtask_table(result: DemoResult) -> Table:
    table = Table(
        title="Models composed of modules, on the test samples of their classes",
        title_justify="left",
        title_style="bold",
    )
    for name in SUBTASK_COLUMNS:
        table.add_column(name, justify="right", style="bold" if name == "composed" else "")
    for row in subtask_rows(result):
        table.add_row(*row)
    return table


def reading(result: DemoResult) -> list[str]:
    """Say what the numbers mean, in sentences that hold for the numbers at hand."""
    size, plain = result.mean("modular", "module_size"), result.mean("standard", "module_size")
    smallest, fewer = result.subtasks()[0], result.subtasks("by_attribution")[0]
    by, plainly = result.mean("modular", "attribution_size"), result.mean("standard", "attribution_size")
    return [
        f"A module of the modular model takes {100 * size:.0f} % of the parameters; decomposed alike, one of the "
        f"standard model takes {100 * plain:.0f} %.",
        f"A composed model of {smallest.classes} classes has {100 * smallest.size:.0f} % of the parameters and "
        f"{_against(smallest)} the whole modular model on the same samples, with no fine-tuning.",
        f"Decomposed by attribution instead of firing rates, modules take {100 * by:.0f} % and {100 * plainly:.0f} %; "
        f"then a composed model of {fewer.classes} classes has {100 * fewer.size:.0f} % of the parameters and "
        f"{_against(fewer)} the whole modular model.",
    ]


def _against(row: SubTasks) -> str:
    """Compare composed models with the whole one."""
    difference = 100 * (row.composed - row.modular)
    if abs(difference) < 0.005:
        return "is as accurate as"
    return f"scores {abs(difference):.2f} points {'more' if difference > 0 else 'less'} than"
