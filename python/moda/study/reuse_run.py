"""Scores all sub-tasks of a run into a table that survives a kill."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moda.files import check_result_file
from moda.runs.finished import FinishedRun
from moda.study.results_file import ResultsFile
from moda.study.reuse import (
    COLUMNS,
    ReuseResult,
    TestSet,
    by_size,
    evaluate_subtasks,
    from_row,
    reuse_accuracy,
    to_row,
    write_parquet,
)

__all__ = ["KIND", "run_reuse"]

KIND = "moda-reuse"
PARQUET = b"PAR1"
"""What every Parquet file begins with."""


def run_reuse(
    finished: FinishedRun,
    tasks: Sequence[Sequence[int]],
    path: Path,
    *,
    standard: FinishedRun | None = None,
    batch_size: int = 512,
    force: bool = False,
    progress: bool = True,
) -> list[ReuseResult]:
    """Score the composed model of every sub-task into a table; go on where it holds some already.

    Args:
        finished: a decomposed run.
        tasks: the classes of each sub-task.
        path: the path of the table, .csv or .parquet; a .parquet table grows in the .csv file of the same name.
        standard: a run trained without the modular terms, on the same data.
        batch_size: the samples of a forward pass.
        force: whether to begin anew where there is a table already.
        progress: whether to show a progress bar.

    Returns:
        The results of the sub-tasks asked for; the table may hold others too.

    Raises:
        ValueError: the name's ending is neither, the standard run is of other data, or no sub-task was asked for.
        FormatError (a ValueError): the run is not decomposed, or the table is of another run or decomposition.
        KeyboardInterrupt: Ctrl-C was pressed; what is done is kept.
    """
    if path.suffix not in (".csv", ".parquet"):
        raise ValueError(f"out: expected a name that ends in .csv or .parquet, got {path.name!r}")
    if not tasks:
        raise ValueError("tasks: expected at least one sub-task, got none")
    _check_standard(finished, standard)
    if path.suffix == ".parquet":
        check_result_file(path, force=force or path.with_suffix(".csv").exists(), begins=PARQUET)
    source = finished.provenance() | {"standard_sha256": standard.weights_sha256 if standard else None}
    with ResultsFile.locked(path.with_suffix(".csv"), KIND, COLUMNS, source, force=force) as table:
        results = {result.classes: result for result in map(from_row, table.rows)}
        wanted = [tuple(sorted(task)) for task in tasks]
        missing = [task for task in wanted if task not in results]
        if missing:
            test = TestSet.of(finished.data.test, batch_size)
            models = finished.model, finished.decomposition()
            other = standard.model if standard else None
            try:
                for result in evaluate_subtasks(*models, missing, test, standard=other, progress=progress):
                    table.append(to_row(result))
                    results[result.classes] = result
            except KeyboardInterrupt:
                done = len(wanted) - len([task for task in missing if task not in results])
                raise KeyboardInterrupt(
                    f"interrupted after {done} of {len(wanted)} sub-tasks; the same command goes on from there"
                ) from None
        everything = sorted(results.values(), key=lambda result: (len(result.classes), result.classes))
        table.rewrite([_cells(result) for result in everything])
        table.note(finished=True, summary=summary(everything))
        if path.suffix == ".parquet":
            write_parquet(path, everything)
        return [results[task] for task in dict.fromkeys(wanted)]


def _check_standard(finished: FinishedRun, standard: FinishedRun | None) -> None:
    if standard is None:
        return
    ours, theirs = finished.run.config, standard.run.config
    same = ("data", "data_options") + (("seed",) if ours.data == "digits" else ())  # which then decides the split
    for name in same:
        if getattr(ours, name) != getattr(theirs, name):
            raise ValueError(
                f"standard: expected a run with {name}={getattr(ours, name)!r} as {finished.run.path}, "
                f"got {getattr(theirs, name)!r}"
            )


def _cells(result: ReuseResult) -> dict[str, str]:
    return {name: "" if value is None else str(value) for name, value in to_row(result).items()}


def summary(results: Sequence[ReuseResult]) -> dict[str, Any]:
    """Average over the sub-tasks of each size, and over sizes, as the note beside the table holds it."""
    sizes = by_size(results)
    counts = {size: sum(len(result.classes) == size for result in results) for size in sizes}
    with_standard = all(result.standard is not None for result in results)
    return {
        "reuse_accuracy": reuse_accuracy(results),
        **{name: reuse_accuracy(results, name) for name in ("modular", "size", "flops")},
        "standard": reuse_accuracy(results, "standard") if with_standard else None,
        "by_size": [{**asdict(mean), "classes": size, "tasks": counts[size]} for size, mean in sizes.items()],
    }
