"""Measures how well, how large and how costly the composed model of every sub-task is (arXiv 2411.01074).

For each sub-task (a set of classes) three models are scored on the test samples of its classes, restricted to its
classes: the standard model, the modular model before decomposition, and the composed model. Work is shared where
that changes no result:

- the two whole models run over the test set once; a sub-task only picks rows and columns of their logits;
- sub-tasks whose modules unite to the same masks have the same hidden layers: they are evaluated by one composed model
  that has the rows of all their classes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from moda.checks import cell_integer, cell_number, integer, number
from moda.composition.composer import composer_of
from moda.composition.measure import flops, plan_size
from moda.composition.observed import observed
from moda.composition.planned_flops import PlannedFlops
from moda.decomposition.container import Decomposition, check_classes
from moda.files import FormatError, as_path, format_errors, write_bytes
from moda.hints import command_line
from moda.inference import device_of, evaluating
from moda.study.results_file import read_rows

__all__ = [
    "COLUMNS",
    "ReuseResult",
    "TestSet",
    "by_size",
    "evaluate_subtasks",
    "from_row",
    "read_results",
    "reuse_accuracy",
    "to_row",
    "write_parquet",
]


@dataclass(frozen=True)
class ReuseResult:
    """The result of one sub-task. Shares are in [0, 1]; sizes and FLOPs are relative to the whole model.

    Attributes:
        classes: the sub-task's classes, ascending.
        composed: the accuracy of the composed model.
        modular: the accuracy of the un-decomposed modular model, restricted to the classes.
        standard: the accuracy of the standard model, restricted to the classes; None if there is none.
        size: the parameters of the composed model over those of the whole one.
        flops: the floating-point operations of the composed model over those of the whole one, for one sample.
    """

    classes: tuple[int, ...]
    composed: float
    modular: float
    standard: float | None
    size: float
    flops: float


@dataclass(frozen=True)
class TestSet:
    """A test set in memory.

    Attributes:
        images: (n, C, H, W) float32.
        labels: (n,) int64.
        batch_size: the samples of a forward pass.
    """

    __test__ = False  # not a test class, pytest

    images: Tensor
    labels: Tensor
    batch_size: int = 512

    @classmethod
    def of(cls, dataset: Any, batch_size: int = 512) -> TestSet:
        """Gather all samples of a data set of (image, class)."""
        samples = [dataset[index] for index in range(len(dataset))]
        images = torch.stack([image for image, _ in samples])
        return cls(images, torch.tensor([int(label) for _, label in samples]), batch_size)

    def to(self, device: torch.device) -> TestSet:
        """Give a copy with the images on a device; labels stay on the CPU."""
        return replace(self, images=self.images.to(device))

    def logits(self, model: nn.Module, rows: Tensor | None = None) -> Tensor:
        """Compute the (rows, K) logits of `model` in evaluation mode, on the CPU; all rows by default."""
        images = self.images if rows is None else self.images[rows.to(self.images.device)]
        device = device_of(model)
        with evaluating(model), torch.no_grad():
            return torch.cat([model(batch.to(device)).cpu() for batch in images.split(self.batch_size)])


def evaluate_subtasks(
    model: nn.Module,
    decomposition: Decomposition,
    tasks: Sequence[Sequence[int]],
    test: TestSet,
    *,
    standard: nn.Module | None = None,
    progress: bool = True,
) -> Iterator[ReuseResult]:
    """Score the composed model of every sub-task, beside the whole models.

    Args:
        model: the modular model, observed or not.
        decomposition: its modules.
        tasks: the classes of each sub-task; the order inside one does not matter.
        test: samples of all classes.
        standard: a model trained without the modular terms, with the same classes.
        progress: whether to show a progress bar on stderr, if that is a terminal.

    Yields:
        One result per sub-task, as it is done; sub-tasks with the same masks come together.

    Raises:
        ValueError: a class is unknown or comes twice, or the test set has no sample of a sub-task.
    """
    chosen = [tuple(sorted(check_classes(task, decomposition.num_classes))) for task in tasks]
    test = test.to(device_of(model))
    whole = _WholeModels.of(test, model, standard)
    with observed(model, decomposition.sites) as taps:
        composer = composer_of(taps, decomposition, test.images[:2])
    costs = PlannedFlops(composer, test.images[:1])
    console = Console(stderr=True)
    bar = Progress(console=console, transient=True)
    done = bar.add_task("Sub-tasks", total=len(chosen))
    with bar if progress and console.is_terminal else nullcontext():  # a log file wants no bar
        for group in _same_masks(decomposition, chosen):
            classes = sorted(set().union(*group))
            masks = decomposition.select(classes)
            rows = _rows(test.labels, classes)
            whole_plan = composer.plan(masks, classes)
            united = composer.build(whole_plan)
            logits, labels = test.logits(united, rows), test.labels[rows]
            for task in group:
                mine = _rows(labels, task)
                plan = whole_plan if len(task) == len(classes) else composer.plan(masks, task)
                operations = costs.of(plan) if costs.exact else flops(composer.build(plan), test.images[:1])
                yield ReuseResult(
                    classes=task,
                    composed=_restricted_accuracy(logits[mine], labels[mine], task, classes),
                    modular=_whole_accuracy(whole.modular, test.labels, task),
                    standard=None if whole.standard is None else _whole_accuracy(whole.standard, test.labels, task),
                    size=plan_size(model, plan),
                    flops=operations / costs.whole,
                )
                bar.advance(done)


@dataclass(frozen=True, eq=False)
class _WholeModels:
    """Logits of the whole models on the test set."""

    modular: Tensor
    standard: Tensor | None

    @classmethod
    def of(cls, test: TestSet, modular: nn.Module, standard: nn.Module | None) -> _WholeModels:
        return cls(test.logits(modular), None if standard is None else test.logits(standard))


def _same_masks(decomposition: Decomposition, tasks: Sequence[tuple[int, ...]]) -> list[list[tuple[int, ...]]]:
    """Group the sub-tasks by the union of their modules."""
    groups: dict[bytes, list[tuple[int, ...]]] = {}
    for task in tasks:
        digest = hashlib.sha256()
        for mask in decomposition.select(task).values():
            digest.update(mask.numpy().tobytes())
        groups.setdefault(digest.digest(), []).append(task)
    return list(groups.values())


def _rows(labels: Tensor, classes: Sequence[int]) -> Tensor:
    rows = torch.isin(labels, torch.tensor(classes)).nonzero().flatten()
    if not len(rows):
        raise ValueError(f"test: expected samples of the classes {list(classes)}, got none")
    return rows


def _whole_accuracy(logits: Tensor, labels: Tensor, task: Sequence[int]) -> float:
    rows = _rows(labels, task)
    return _restricted_accuracy(logits[rows], labels[rows], task, range(logits.shape[1]))


def _restricted_accuracy(logits: Tensor, labels: Tensor, task: Sequence[int], columns: Sequence[int]) -> float:
    """Compute the accuracy when only the logits of `task` compete; `columns` are the classes of the logits."""
    picked = logits[:, [list(columns).index(c) for c in task]].argmax(1)
    return float((torch.tensor(task)[picked] == labels).double().mean())


def by_size(results: Iterable[ReuseResult]) -> dict[int, ReuseResult]:
    """Average over the sub-tasks of each number of classes; `classes` of a mean is empty."""
    groups: dict[int, list[ReuseResult]] = {}
    for result in results:
        groups.setdefault(len(result.classes), []).append(result)
    return {count: _mean(groups[count]) for count in sorted(groups)}


def _mean(results: Sequence[ReuseResult]) -> ReuseResult:
    def mean(name: str) -> Any:
        values = [getattr(result, name) for result in results]
        return None if None in values else sum(values) / len(values)

    return ReuseResult((), *(mean(field.name) for field in fields(ReuseResult)[1:]))


def reuse_accuracy(results: Iterable[ReuseResult], figure: str = "composed") -> float:
    """Compute the paper's "reuse accuracy": the unweighted mean over sub-task sizes of the mean accuracy of each size.

    Args:
        results: at least one.
        figure: the field of the results to average so, e.g. "modular" or "size".
    """
    means = [float(getattr(mean, figure)) for mean in by_size(results).values()]
    return sum(means) / len(means)


COLUMNS = tuple(field.name for field in fields(ReuseResult))
"""Columns of the table: the fields of `ReuseResult`; classes are separated by spaces."""


def to_row(result: ReuseResult) -> dict[str, Any]:
    """Give a result as cells of the table; a cell is None where there is no standard model."""
    row = {name: getattr(result, name) for name in COLUMNS}
    row["classes"] = " ".join(map(str, result.classes))
    return row


def from_row(row: Mapping[str, str]) -> ReuseResult:
    """Read the result in a row of the table.

    Raises:
        ValueError: a cell is no number, or one that it cannot be.
    """
    accuracies = {name: number(0, 1)(name, cell_number(name, row[name])) for name in ("composed", "modular")}
    costs = {name: number(0)(name, cell_number(name, row[name])) for name in ("size", "flops")}
    standard = number(0, 1)("standard", cell_number("standard", row["standard"])) if row["standard"] else None
    classes = [integer(0)("classes", cell_integer("classes", index)) for index in row["classes"].split(" ")]
    if classes != sorted(set(classes)):
        raise ValueError(f"classes: expected each once, in ascending order, got {row['classes']!r:.80}")
    return ReuseResult(classes=tuple(classes), standard=standard, **accuracies, **costs)


def read_results(path: str | Path) -> list[ReuseResult]:
    """Read the results in a table of `moda reuse`, a CSV file.

    Raises:
        FormatError: the file is missing or not such a file.
    """
    path = as_path("path", path)
    if not path.is_file():
        raise FormatError(f"{path}: no such file; make it with: {command_line('reuse', path.parent)}")
    with format_errors(path):
        return [from_row(row) for row in read_rows(path, COLUMNS)]


def write_parquet(path: Path, results: Iterable[ReuseResult]) -> None:
    """Write results as Parquet, atomically; columns as in the CSV table, `classes` as text.

    Raises:
        ImportError: pyarrow is missing; the message says how to install it.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ImportError(f"{path.name}: Parquet needs pyarrow; install it: pip install pyarrow") from None
    rows = [to_row(result) for result in results]
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({name: [row[name] for row in rows] for name in COLUMNS}), sink)
    write_bytes(path, sink.getvalue().to_pybytes())
