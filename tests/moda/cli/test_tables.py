"""Tables that commands print: at 80 columns and less, no number and no word is broken."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from moda.cli.printing import table
from moda.tables import print_table

NAMES = ("method", "model", "whole", "module size", "neurons kept", "overlap", "gain, replaced", "train", "modularize")
ROWS = (
    (
        "gradsplitter",
        "small_vgg, seed 42",
        "99.72 %",
        "100.00 %",
        "12.34 %",
        "18.60 %",
        "12.00 %",
        "103.4 s",
        "1234.5 s",
    ),
    ("moda", "mobilenet, seed 7", "9.72 %", "10.00 %", "2.34 %", "8.60 %", "", "3.4 s", "4.5 s"),
)


def printed(width: int, rows=ROWS, names=NAMES, keys: int = 2) -> str:
    made = table("Methods", *names, keys=keys)
    for row in rows:
        made.add_row(*row)
    console = Console(width=width, markup=False, emoji=False, record=True, file=io.StringIO())
    print_table(made, console, keys=keys)
    return console.export_text()


@pytest.mark.parametrize("width", [200, 80, 60])
def test_every_cell_is_whole(width):
    text = printed(width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    for cell in (cell for row in ROWS for cell in row[2:] if cell):
        assert f" {cell} " in text, cell
    for word in " ".join(NAMES).split():
        assert word in text
    assert text.count("Methods") == 1


def test_a_wide_console_has_one_table():
    assert printed(200).count("┏") == 1
    assert printed(80).count("┏") == 2


def test_each_part_says_what_its_rows_are():
    assert printed(80).count("gradsplitter") == printed(80).count("┏")


@pytest.mark.parametrize("width", [80, 40])
def test_a_long_name_takes_more_lines(width):
    """A class or a path of any length costs lines, not numbers."""
    text = printed(width, rows=[("n" * 200, "5.00 %", "12.00 %")], names=("class", "parameters", "overlap"), keys=1)
    assert max(map(len, text.splitlines())) <= width
    assert text.count("n" * 10) >= 200 // 10 - 20
    assert sum(line.count("n") for line in text.splitlines() if "│" in line) >= 200
    assert " 5.00 % " in text
    assert " 12.00 % " in text
