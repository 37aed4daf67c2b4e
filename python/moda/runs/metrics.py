"""Writes the CSV files of a run, which grow by a row at a time and can be cut back to a checkpoint."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from moda.checks import cell_number, number
from moda.files import FormatError, as_path, read_csv, write_bytes, write_errors


class MetricsFile:
    """A CSV file with a header; every row has a `step` and is on disk (flushed) when `write` returns."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: TextIO | None = None
        self._columns: list[str] = []

    def open(self, columns: Sequence[str], *, keep_until_step: int | None = None) -> None:
        """Start with an empty table, or with the rows up to a step: later rows were written after the checkpoint."""
        rows = []
        if keep_until_step is not None and self.path.exists():
            rows = [row for row in read_csv(self.path)[1] if _step(row) <= keep_until_step]
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, columns, restval="", extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_bytes(self.path, buffer.getvalue().encode())
        self._columns = list(columns)
        with write_errors(self.path):
            self._file = self.path.open("a", encoding="utf-8", newline="")

    def write(self, row: Mapping[str, float]) -> None:
        """Append a row; columns it lacks stay empty.

        Raises:
            RuntimeError: the file is not open.
            ValueError: the row has a column that the file has not.
            OSError: the disk is full, say; the error names the file.
        """
        if self._file is None:
            raise RuntimeError(f"{self.path}: not open")
        writer = csv.DictWriter(self._file, self._columns, restval="", lineterminator="\n")
        with write_errors(self.path):
            writer.writerow({name: _text(value) for name, value in row.items()})
            self._file.flush()

    def close(self) -> None:
        """Close the file, if it is open."""
        if self._file is not None:
            file, self._file = self._file, None
            with write_errors(self.path):  # where the disk was full, it tries once more
                file.close()


def read_metrics(path: str | Path) -> list[dict[str, float]]:
    """Read the rows of a metrics file as numbers; empty cells are left out.

    Raises:
        FormatError: it is missing, or a cell is no number.
    """
    path = as_path("path", path)
    rows = read_csv(path)[1]
    try:
        return [{name: _number(name, cell) for name, cell in row.items() if cell} for row in rows]
    except ValueError as error:
        raise FormatError(f"{path}: not a table of numbers: {error}") from None


def _number(name: str | None, cell: Any) -> float:
    """The number in a cell; one of a column that is too many is refused, and an accuracy that is no share."""
    value = cell_number("a cell without a column" if name is None else name, cell)
    return number(0, 1)(name, value) if name is not None and name.endswith("accuracy") else value


def _step(row: Mapping[str, str]) -> float:
    """Give the step of a row; it is infinite for a row whose writing was cut short."""
    if None in row.values():
        return float("inf")
    try:
        return int(row["step"])
    except (KeyError, ValueError):
        return float("inf")


def _text(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.9g}"
