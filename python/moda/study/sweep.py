"""Sweeps over the threshold or a loss weight: how sizes, overlaps and reuse accuracy move (arXiv 2411.01074)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from moda.checks import cell_integer, cell_number, integer, number, one_of
from moda.composition.measure import accuracy, mean_over_pairs, module_sizes, overlap_matrix
from moda.decomposition.container import Decomposition
from moda.decomposition.rule import decompose
from moda.decomposition.settings import BudgetRule, FiringRule, rule_of
from moda.files import as_path, format_errors
from moda.runs.config import TERMS
from moda.runs.finished import FinishedRun, decompose_run, run_scores
from moda.runs.metrics import read_metrics
from moda.settings import Settings, check_setting, setting
from moda.study.results_file import ResultsFile, read_rows
from moda.study.reuse import TestSet, evaluate_subtasks, reuse_accuracy
from moda.study.trainings import trained

__all__ = [
    "EPSILONS",
    "GRIDS",
    "SWEPT",
    "SweepPoint",
    "SweepSettings",
    "read_sweep",
    "sweep_epsilon",
    "sweep_threshold",
    "sweep_weight",
]

KIND = "moda-sweep"
GRIDS: dict[str, tuple[float, ...]] = {
    "threshold": (0.1, 0.5, 0.8, 0.9, 0.95),
    "affinity": (0.0, 0.1, 0.5, 1.0, 1.5, 2.0),
    "dispersion": (0.0, 0.1, 0.5, 1.0, 1.5, 2.0),
    "compactness": (0.0, 0.1, 0.3, 0.5, 1.0, 2.0),
}
"""The paper's grids."""
EPSILONS = (0.01, 0.02, 0.05, 0.1, 0.2)
SWEPT: tuple[str, ...] = (*GRIDS, *BudgetRule.NAMES)
"""What may be varied: threshold, weights of the terms, and epsilon of each rule that has one, by the rule's name."""


def _weights(term: str) -> Any:
    return setting(
        None,
        help=f"The weights of the {term} term, separated by commas, or `paper` for the paper's.",
        at_least=0,
        words={"paper": GRIDS[term]},
    )


def _epsilons(scores: str) -> Any:
    return setting(
        None,
        help=f"The epsilons for modules by {scores}, separated by commas, or `usual` for {EPSILONS[0]:g} to "
        f"{EPSILONS[-1]:g}.",
        at_least=0,
        at_most=1,
        words={"usual": EPSILONS},
    )


@dataclass(frozen=True)
class SweepSettings(Settings, command="sweep"):
    """The values to sweep over; None where a parameter is not varied."""

    threshold: tuple[float, ...] | None = setting(
        None,
        help="The thresholds, separated by commas, or `paper` for the paper's.",
        at_least=0,
        at_most=1,
        words={"paper": GRIDS["threshold"]},
    )
    attribution: tuple[float, ...] | None = _epsilons("attributions")
    share: tuple[float, ...] | None = _epsilons("shares of activation")
    affinity: tuple[float, ...] | None = _weights("affinity")
    dispersion: tuple[float, ...] | None = _weights("dispersion")
    compactness: tuple[float, ...] | None = _weights("compactness")


@dataclass(frozen=True)
class SweepPoint:
    """What was measured at one value of the parameter. Shares are in [0, 1].

    Attributes:
        value: the threshold, the epsilon, or the weight of the term.
        module_size: the mean over classes of the module's parameters over the model's.
        overlap: the mean over pairs of classes, in the published counting.
        reuse_accuracy: the accuracy of the composed models: the mean over sub-task sizes of each size's mean.
        modular_accuracy: that of the whole modular model on the same sub-tasks, averaged alike.
        composed_size: the size of the composed models, averaged alike.
        tasks: the number of sub-tasks behind these means.
        test_accuracy: the accuracy of the whole model on all classes after the last epoch.
        affinity: the affinity term, averaged over the last epoch's training samples; None where it was not computed.
        dispersion: the dispersion term, likewise.
        compactness: the compactness term, likewise.
    """

    value: float
    module_size: float
    overlap: float
    reuse_accuracy: float
    modular_accuracy: float
    composed_size: float
    tasks: int
    test_accuracy: float
    affinity: float | None = None
    dispersion: float | None = None
    compactness: float | None = None


COLUMNS = tuple(field.name for field in fields(SweepPoint))


def sweep_threshold(
    finished: FinishedRun,
    values: Sequence[float],
    tasks: Sequence[Sequence[int]],
    *,
    force: bool = False,
    progress: bool = True,
) -> list[SweepPoint]:
    """Decompose the model anew at every threshold, from the firing rates it already has, and measure.

    The table `sweep_threshold.csv` in the run's folder grows point by point; points that it has are not measured again.

    Args:
        finished: a decomposed run.
        values: the thresholds, in [0, 1].
        tasks: the sub-tasks to score.
        force: whether to begin the table anew.
        progress: whether to show progress bars.

    Raises:
        ValueError: a threshold is outside [0, 1], or the table is of other weights, rates or sub-tasks.
    """
    values = check_setting(SweepSettings, "threshold", values)
    rates = finished.rates()
    rule = FiringRule.of(finished.decomposition().settings)
    with _table(finished, "threshold", tasks, {"min_fraction": rule.min_fraction}, force=force) as table:
        test = TestSet.of(finished.data.test)
        for value in _missing(table, values):
            decomposition = decompose(rates, value, rule.min_fraction)
            table.append(asdict(_measure(finished, decomposition, value, tasks, test, progress)))
        return _close(table, values)


def sweep_epsilon(
    finished: FinishedRun,
    rule: str,
    values: Sequence[float],
    tasks: Sequence[Sequence[int]],
    *,
    force: bool = False,
    progress: bool = True,
) -> list[SweepPoint]:
    """Decompose the model anew at every epsilon, by attributions or activation shares, and measure.

    The scores in the run's folder are used, or made and kept there. The table is `sweep_<rule>.csv`; points that it
    has are not measured again.

    Args:
        finished: a run.
        rule: "attribution" or "share".
        values: epsilons in [0, 1].
        tasks: sub-tasks to score.
        force: whether to begin the table anew.
        progress: show progress bars.

    Raises:
        ValueError: an argument is not as above, or the table is of other weights or sub-tasks.
    """
    one_of(BudgetRule.NAMES)("rule", rule)
    values = check_setting(SweepSettings, rule, values)
    scores = run_scores(finished, rule, progress=progress)
    with _table(finished, rule, tasks, {}, force=force) as table:
        test = TestSet.of(finished.data.test)
        for value in _missing(table, values):
            decomposition = decompose(scores, epsilon=value)
            table.append(asdict(_measure(finished, decomposition, value, tasks, test, progress)))
        return _close(table, values)


def sweep_weight(
    finished: FinishedRun,
    weight: str,
    values: Sequence[float],
    tasks: Sequence[Sequence[int]],
    *,
    device: str = "auto",
    force: bool = False,
    progress: bool = True,
) -> list[SweepPoint]:
    """Train the run again with other weights of one term, decompose each at the run's threshold, and measure.

    Trainings go to `sweeps/<weight>-<value>/` in the run's folder, the run itself serves for its own weight, and the
    table is `sweep_<weight>.csv`. A sweep that was stopped goes on, a training within it too.

    Args:
        finished: a decomposed run.
        weight: one of `moda.runs.config.TERMS`.
        values: the weights, at least 0.
        tasks: the sub-tasks to score.
        device: the device that models are tested on.
        force: whether to begin the table anew; trainings that are there serve again.
        progress: whether to show progress bars.

    Raises:
        ValueError: an argument is not as above, or the table is of another run.
    """
    if weight not in TERMS:
        raise ValueError(f"weight: expected one of {', '.join(TERMS)}, got {weight!r}")
    values = check_setting(SweepSettings, weight, values)
    example = finished.decomposition()
    with _table(finished, weight, tasks, asdict(rule_of(example.settings)), force=force) as table:
        test = TestSet.of(finished.data.test)
        for value in _missing(table, values):
            point = finished
            if getattr(finished.run.config, weight) != value:
                folder = finished.run.path / "sweeps" / f"{weight}-{value:g}"
                point = trained(folder, finished.run.config.changed(**{weight: value}), device, progress=progress)
            decomposition = example if point is finished else _decomposed_alike(point, example, progress)
            table.append(asdict(_measure(point, decomposition, value, tasks, test, progress)))
        return _close(table, values)


def _decomposed_alike(finished: FinishedRun, example: Decomposition, progress: bool) -> Decomposition:
    if finished.run.decomposition.exists():
        return finished.decomposition()
    augmented = bool(example.metadata.get("augmented", False))
    rule = {"rule": FiringRule.NAME, **asdict(rule_of(example.settings))}
    return decompose_run(finished, **rule, augmented=augmented, progress=progress)


def _measure(
    finished: FinishedRun,
    decomposition: Decomposition,
    value: float,
    tasks: Sequence[Sequence[int]],
    test: TestSet,
    progress: bool,
) -> SweepPoint:
    model = finished.model
    results = list(evaluate_subtasks(model, decomposition, tasks, test, progress=progress))
    metrics = finished.run.metrics
    last = read_metrics(metrics)[-1] if metrics.exists() else {}  # an imported run has none
    return SweepPoint(
        value=float(value),
        module_size=float(module_sizes(model, decomposition).mean()),
        overlap=mean_over_pairs(overlap_matrix(model, decomposition)),
        reuse_accuracy=reuse_accuracy(results),
        modular_accuracy=reuse_accuracy(results, "modular"),
        composed_size=reuse_accuracy(results, "size"),
        tasks=len(results),
        test_accuracy=accuracy(model, finished.loader(finished.data.test)),
        **{name: last.get(name) for name in TERMS},
    )


def _table(
    finished: FinishedRun, parameter: str, tasks: Sequence[Sequence[int]], settings: dict[str, Any], *, force: bool
) -> AbstractContextManager[ResultsFile]:
    listed = ";".join(" ".join(map(str, task)) for task in tasks)
    source = {
        "parameter": parameter,
        "model": finished.run.config.model,
        "data": finished.run.config.data,
        "weights_sha256": finished.weights_sha256,
        "subtasks_sha256": hashlib.sha256(listed.encode()).hexdigest(),
        **settings,
    }
    return ResultsFile.locked(finished.run.path / f"sweep_{parameter}.csv", KIND, COLUMNS, source, force=force)


def _missing(table: ResultsFile, values: Sequence[float]) -> list[float]:
    there = {float(row["value"]) for row in table.rows}
    return [value for value in dict.fromkeys(map(float, values)) if value not in there]


def _close(table: ResultsFile, values: Sequence[float]) -> list[SweepPoint]:
    """Order the table, and give the points asked for."""
    table.rewrite(sorted(table.rows, key=lambda row: float(row["value"])))
    table.note(finished=True)
    return [point for point in read_sweep(table.path) if point.value in set(map(float, values))]


def read_sweep(path: str | Path) -> list[SweepPoint]:
    """Read the points of a `sweep_<parameter>.csv`.

    Raises:
        FormatError: the file is missing or malformed.
    """
    path = as_path("path", path)
    with format_errors(path):
        return [SweepPoint(**_numbers(row)) for row in read_rows(path, COLUMNS)]


def _numbers(row: dict[str, str]) -> dict[str, Any]:
    values: dict[str, Any] = {
        name: None if not cell and name in TERMS else cell_number(name, cell) for name, cell in row.items()
    }
    for name in ("reuse_accuracy", "modular_accuracy", "test_accuracy"):
        number(0, 1)(name, values[name])
    for name in ("value", "module_size", "overlap", "composed_size"):
        number(0)(name, values[name])
    return values | {"tasks": integer(0)("tasks", cell_integer("tasks", row["tasks"]))}
