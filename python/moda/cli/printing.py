"""Prints what commands have to say: tables, shares in per cent, and plain lines."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table


def table(title: str, first: str, *others: str) -> Table:
    """Make an empty table whose first column is text; the others are numbers and aligned to the right."""
    made = Table(title=title, title_justify="left")
    made.add_column(first)
    for name in others:
        made.add_column(name, justify="right")
    return made


def show(printed: Table) -> None:
    """Print a table on stdout; brackets and colons in its text are no markup."""
    _console().print(printed)


def say(line: str) -> None:
    """Print a line on stdout, unbroken, as it is."""
    _console().print(line, highlight=False, soft_wrap=True)


def _console() -> Console:
    return Console(markup=False, emoji=False)


def percent(share: float | None, digits: int = 2) -> str:
    """Give a share in per cent; nothing for None."""
    return "" if share is None else f"{100 * share:.{digits}f} %"
