"""Prints what commands have to say: tables, shares in per cent, and plain lines."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from moda.tables import print_table


def table(title: str, *names: str, keys: int = 1) -> Table:
    """Make an empty table whose first `keys` columns are text; the others are numbers and aligned to the right."""
    made = Table(title=title, title_justify="left")
    for number, name in enumerate(names):
        made.add_column(name, justify="left" if number < keys else "right")
    return made


def show(printed: Table, *, keys: int = 1) -> None:
    """Print a table on stdout; brackets and colons in its text are no markup.

    A table that is too wide comes in parts, one below the other, so that neither a number nor a word is broken.

    Args:
        printed: made by `table`.
        keys: the number of columns, the first ones, that say what a row is; each part begins with them.
    """
    print_table(printed, _console(), keys=keys)


def say(line: str) -> None:
    """Print a line on stdout, unbroken, as it is."""
    _console().print(line, highlight=False, soft_wrap=True)


def _console() -> Console:
    return Console(markup=False, emoji=False)


def percent(share: float | None, digits: int = 2) -> str:
    """Give a share in per cent; nothing for None."""
    return "" if share is None else f"{100 * share:.{digits}f} %"
