"""Holds a run's results, and keeps them in one JSON file per device."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moda.bench.clock import Quartiles
from moda.checks import flag, items, json_value, mapping
from moda.files import Format, as_path, check_result_file, format_errors

BENCHMARKS = Format(
    "moda-benchmark",
    {
        "machine": mapping(json_value),
        "limits": mapping(json_value),
        "quick": flag,
        "rows": items(mapping(json_value)),
    },
)

MEASURED, SKIPPED, WRONG = "measured", "skipped", "wrong"


@dataclass(frozen=True)
class Row:
    """The measurement of one contender in one phase of one case.

    Attributes:
        suite, case, parameters, baseline: the case's own.
        contender, phase: what was timed; the phase is "" for a contender that was not timed.
        status: "measured"; "skipped" or "wrong", with the reason in `note`.
        seconds: the quartiles of the samples.
        ratio: the quartiles of its time over the baseline's, round by round; below 1 is faster. None without a
            baseline.
        moved: the bytes that an ideal implementation must read and write.
        memory: the peak memory in bytes.
        flops: the floating-point operations for one input.
    """

    suite: str
    case: str
    parameters: Mapping[str, int | float | str]
    baseline: str
    contender: str
    phase: str
    status: str
    note: str = ""
    seconds: Quartiles | None = None
    ratio: Quartiles | None = None
    moved: int | None = None
    memory: int | None = None
    flops: int | None = None

    @property
    def bandwidth(self) -> float | None:
        """The bytes moved per second at the median."""
        return self.moved / self.seconds.median if self.moved and self.seconds else None


@dataclass(frozen=True)
class Results:
    """A run: the machine, the settings and the rows."""

    machine: Mapping[str, Any]
    limits: Mapping[str, Any]
    quick: bool
    rows: tuple[Row, ...]

    @property
    def device(self) -> str:
        """The device's name."""
        return str(self.machine["device"])

    @property
    def copy_bandwidth(self) -> float:
        """The median bytes per second of a copy, read and written."""
        return float(self.limits["copy_bytes_per_second"]["median"])


def file_name(device: str) -> str:
    """Return the device's name as a file name: "AMD EPYC, 2 threads" -> "amd-epyc-2-threads.json"."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".json"


def check_place(folder: Path, device: str, *, force: bool) -> None:
    """Raise ValueError unless a device's results may be written to a folder.

    Args:
        folder: the folder.
        device: the device's name.
        force: whether they may replace earlier ones.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: expected a folder, found a file")
    path = folder / file_name(device)
    check_result_file(path, force=force)
    BENCHMARKS.check_replaceable(path)


def write(results: Results, folder: Path) -> Path:
    """Write the run as `<folder>/<device>.json`, whole or not at all; the folder is made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / file_name(results.device)
    BENCHMARKS.write(path, asdict(results))
    return path


def read(path: str | Path) -> Results:
    """Read what `write` wrote.

    Raises:
        FormatError: the file is missing, malformed or of another version.
    """
    path = as_path("path", path)
    stored = BENCHMARKS.read(path)
    with format_errors(path):
        rows = tuple(_row(row) for row in stored["rows"])
        return Results(stored["machine"], stored["limits"], stored["quick"], rows)


def _row(stored: Mapping[str, Any]) -> Row:
    quartiles = {name: Quartiles(**stored[name]) if stored[name] else None for name in ("seconds", "ratio")}
    return Row(**{**stored, **quartiles})
