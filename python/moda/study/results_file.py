"""Keeps a table of results that grows row by row and goes on after a kill, with a note of what it is of.

`<name>.csv` holds the rows, `<name>.json` what they follow from (hashes of weights and masks). Rows of other weights
or other modules are never mixed in: a table is continued only where its note says the same.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moda.checks import flag, json_value, mapping
from moda.files import Format, FormatError, as_path, read_csv, write_bytes, write_errors
from moda.runs.lock import locked

__all__ = ["ResultsFile", "read_note", "read_rows"]

_NOTE = {"source": mapping(json_value), "finished": flag, "summary": mapping(json_value)}
EARLIER = {"method": "moda", "rule": "firing"}
"""What sources of tables do not say that were written before there were others."""


class ResultsFile:
    """A table; `open` makes it. Every row is on disk when `append` returns.

    Attributes:
        path: the path of the CSV file.
        rows: the rows that it holds, as text.
    """

    def __init__(self, path: Path, kind: str, columns: Sequence[str], source: Mapping[str, Any]) -> None:
        self.path = path
        self.kind = kind
        self.columns = tuple(columns)
        self.source = dict(source)
        self.rows: list[dict[str, str]] = []

    @classmethod
    @contextmanager
    def locked(
        cls, path: Path, kind: str, columns: Sequence[str], source: Mapping[str, Any], *, force: bool = False
    ) -> Iterator[ResultsFile]:
        """`open` a table and keep other processes from it while the block runs.

        Raises:
            BusyError (a ValueError): another process is writing it.
            FormatError (a ValueError): as `open`.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path):
            yield cls.open(path, kind, columns, source, force=force)

    @classmethod
    def open(
        cls, path: Path, kind: str, columns: Sequence[str], source: Mapping[str, Any], *, force: bool = False
    ) -> ResultsFile:
        """Begin a table, or go on with one.

        Args:
            path: the path of the CSV file; its folder is made if need be.
            kind: "format" of the note, e.g. "moda-reuse".
            columns: the names of the columns.
            source: what all rows follow from; anything that JSON can hold.
            force: whether to begin anew where there is a table of this kind already.

        Raises:
            FormatError: there is a table already, and it is not this one, or, with `force`, of another kind; or where
                its note would go there is something else.
        """
        table = cls(path, kind, columns, source)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.with_suffix(".json").exists():
            read_note(path, kind)
        if path.exists():
            rows = read_rows(path, columns)
            # A table without a row holds nothing that could be mixed up: it was killed early, or emptied to begin anew.
            if rows and not force:
                table._check_note()
            if force:
                table.rewrite([])
            table.rows = [] if force else rows
        table.note(finished=False)  # first, so that no row is ever without
        table.rewrite(table.rows)
        return table

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row; a None is an empty cell."""
        cells = {name: _cell(row[name]) for name in self.columns}
        with write_errors(self.path), self.path.open("a", encoding="utf-8", newline="") as file:
            csv.DictWriter(file, self.columns, lineterminator="\n").writerow(cells)
        self.rows.append(cells)

    def rewrite(self, rows: Sequence[Mapping[str, str]]) -> None:
        """Replace the whole table by these rows, atomically."""
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, self.columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_bytes(self.path, buffer.getvalue().encode())
        self.rows = [dict(row) for row in rows]

    def note(self, *, finished: bool, summary: Mapping[str, Any] | None = None) -> None:
        """Write what the rows are of, whether all that was asked for are there, and what they amount to."""
        value = {"source": self.source, "finished": finished, "summary": dict(summary or {})}
        Format(self.kind, _NOTE).write(self.path.with_suffix(".json"), value)

    def _check_note(self) -> None:
        noted = {**EARLIER, **read_note(self.path, self.kind)["source"]}
        wanted = {**EARLIER, **self.source}
        for name in sorted({*noted, *wanted}):
            if noted.get(name) != wanted.get(name):
                raise FormatError(
                    f"{self.path}: its results are of another study: {name} is {noted.get(name)!r} there and "
                    f"{wanted.get(name)!r} now; write to another file, or begin anew with --force"
                )


def read_note(path: str | Path, kind: str) -> dict[str, Any]:
    """Read the note beside a table.

    Raises:
        FormatError: it is missing or malformed.
    """
    path = as_path("path", path)
    return Format(kind, _NOTE).read(path.with_suffix(".json"))


def read_rows(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """Read the whole rows of a table; a last one whose writing was cut short is left out.

    Raises:
        FormatError: it is missing, or has other columns.
    """
    found, rows = read_csv(path)
    if found != tuple(columns):
        raise FormatError(f"{path}: expected the columns {', '.join(columns)}, got {list(found) or None}")
    if any(None in row or None in row.values() for row in rows):
        raise FormatError(f"{path}: expected {len(columns)} cells in every row")
    return rows


def _cell(value: Any) -> str:
    return "" if value is None else str(value)
