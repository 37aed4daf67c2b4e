"""Lays tables out for a terminal: a table that is too wide comes in parts, so that no number and no word is broken."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.table import Column, Table


def print_table(printed: Table, console: Console, *, keys: int = 1) -> None:
    """Print a table, in parts below one another if it is wider than the console.

    Args:
        printed: a table of text.
        console: where to print it.
        keys: the number of columns, the first ones, that say what a row is; each part begins with them.
    """
    longest_name = console.width // (2 * keys)  # a longer one is broken, for names may have any length
    names = [min(longest_name, _widest_word(column, cells=True)) for column in printed.columns[:keys]]
    least = names + [max(_widest_word(column), _widest_cell(column)) for column in printed.columns[keys:]]
    for index, part in enumerate(_shared_out(least, keys, console.width)):
        fits = _total(_widest_cell(printed.columns[number], header=True) for number in part) <= console.width
        fixed = {} if fits else {number: least[number] for number in part[keys:]}
        console.print(_part(printed, part, fixed, titled=index == 0))


def _shared_out(least: Sequence[int], keys: int, width: int) -> list[list[int]]:
    """Share columns of these least widths out to as few tables as the width allows."""
    parts: list[list[int]] = [[]]
    for number in range(keys, len(least)):
        if parts[-1] and _total(least[one] for one in [*range(keys), *parts[-1], number]) > width:
            parts.append([])
        parts[-1].append(number)
    return [[*range(keys), *part] for part in parts]


def _widest_cell(column: Column, *, header: bool = False) -> int:
    return max(map(cell_len, [*map(str, column.cells), *([str(column.header)] if header else [])]), default=0)


def _widest_word(column: Column, *, cells: bool = False) -> int:
    texts = [str(column.header), *(map(str, column.cells) if cells else ())]
    return max((cell_len(word) for text in texts for word in text.split()), default=0)


def _total(widths: Iterable[int]) -> int:
    """The width of a table with columns of these widths: two blanks and a line for each, and a line."""
    return sum(width + 3 for width in widths) + 1


def _part(printed: Table, numbers: Sequence[int], fixed: dict[int, int], *, titled: bool) -> Table:
    """Take some columns of a table, of which some are of fixed width."""
    made = Table(
        title=printed.title if titled else None,
        title_justify=printed.title_justify,
        title_style=printed.title_style,
        box=printed.box,
    )
    for number in numbers:
        column = printed.columns[number]
        made.add_column(
            column.header, justify=column.justify, style=column.style, overflow="fold", width=fixed.get(number)
        )
    cells = [list(printed.columns[number].cells) for number in numbers]
    for row, *shown in zip(printed.rows, *cells, strict=True):
        made.add_row(*shown, end_section=row.end_section)
    return made
