"""Shows results as text: one table for the terminal, and the figures as the documents print them."""

from __future__ import annotations

from collections.abc import Iterator

from rich import box
from rich.table import Table

from moda.bench.results import MEASURED, SKIPPED, Results, Row

TEXT_COLUMNS = ("suite", "case", "contender", "phase")
NUMBER_COLUMNS = ("median", "quartiles", "over baseline", "GB/s", "of copy", "peak memory")


def table(results: Results) -> Table:
    """Return a table of all measured rows."""
    shown = Table(box=box.SIMPLE, title=f"{results.device}: {results.copy_bandwidth / 1e9:.1f} GB/s copied")
    for column in TEXT_COLUMNS:
        shown.add_column(column)
    for column in NUMBER_COLUMNS:
        shown.add_column(column, justify="right", no_wrap=True)
    measured = [row for row in results.rows if row.status == MEASURED]
    for row, following in zip(measured, [*measured[1:], None], strict=True):
        new_case = following is not None and (row.suite, row.case) != (following.suite, following.case)
        shown.add_row(*cells(row, results), end_section=new_case)
    return shown


def notes(results: Results) -> Iterator[str]:
    """Return a line for every contender that was not timed, with the reason; equal reasons come once."""
    seen = set()
    for row in results.rows:
        if row.status == MEASURED or (row.status == SKIPPED and (row.suite, row.contender, row.note) in seen):
            continue
        seen.add((row.suite, row.contender, row.note))
        yield f"{row.status}: {row.suite}, {row.case}, {row.contender}: {row.note}"


def cells(row: Row, results: Results) -> tuple[str, ...]:
    """Return the cells of a measured row as text."""
    if row.seconds is None:
        raise ValueError(f"row: expected a measured one, got {row.status} {row.suite} {row.case} {row.contender}")
    bandwidth = row.bandwidth
    return (
        row.suite,
        row.case,
        row.contender,
        row.phase,
        duration(row.seconds.median),
        f"{duration(row.seconds.q1)} .. {duration(row.seconds.q3)}",
        ratio(row),
        f"{bandwidth / 1e9:.1f}" if bandwidth else "",
        f"{bandwidth / results.copy_bandwidth:.0%}" if bandwidth else "",
        size(row.memory) if row.memory else "",
    )


def ratio(row: Row) -> str:
    """Format the time over the baseline's with its quartiles, `1.02x (1.01 .. 1.03)`; "" for the baseline itself."""
    if row.ratio is None or row.contender == row.baseline:
        return ""
    digits = 3 if row.ratio.median >= 0.1 else 4
    return f"{row.ratio.median:.{digits}f}x ({row.ratio.q1:.{digits}f} .. {row.ratio.q3:.{digits}f})"


def duration(seconds: float) -> str:
    """Format seconds with three digits and a unit."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{_three_digits(seconds / scale)} {unit}"
    return f"{_three_digits(seconds / 1e-6)} us"


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def size(count: int) -> str:
    """Format bytes in MiB."""
    return f"{count / 2**20:.1f} MiB"
