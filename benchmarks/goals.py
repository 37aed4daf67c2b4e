"""The numbers to reach: which rows of results each goal is about, and what it asks of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from moda.bench.results import MEASURED, Results, Row

CPU, GPU = "cpu", "cuda"
LARGE = 16 << 20


@dataclass(frozen=True)
class Goal:
    """A number that the worst of the matching rows has to reach.

    Attributes:
        text: what is measured, in words.
        limit: the number to reach.
        at_most: whether smaller is better.
        device: "cpu" or "cuda".
        measure: the figure of a row; None if the goal is not about it.
    """

    text: str
    limit: float
    at_most: bool
    device: str
    measure: Callable[[Row, Results], float | None]

    def reached(self, figure: float) -> bool:
        """Whether the figure is good enough."""
        return figure <= self.limit if self.at_most else figure >= self.limit


def _over_baseline(suite: str, contender: str, phase: str, case: str = "") -> Callable[[Row, Results], float | None]:
    def measure(row: Row, _: Results) -> float | None:
        matches = (row.suite, row.contender, row.phase) == (suite, contender, phase) and case in row.case
        return row.ratio.median if matches and row.ratio else None

    return measure


def _speed_up(suite: str, contender: str, phase: str, case: str = "") -> Callable[[Row, Results], float | None]:
    over = _over_baseline(suite, contender, phase, case)

    def measure(row: Row, results: Results) -> float | None:
        ratio = over(row, results)
        return None if ratio is None else 1 / ratio

    return measure


def _of_copy(suite: str, contender: str, phase: str, case: str) -> Callable[[Row, Results], float | None]:
    def measure(row: Row, results: Results) -> float | None:
        matches = (row.suite, row.contender, row.phase) == (suite, contender, phase) and case in row.case
        return row.bandwidth / results.copy_bandwidth if matches and row.bandwidth else None

    return measure


def _large_relu_pool(row: Row, results: Results) -> float | None:
    large = row.suite == "relu_pool" and int(row.parameters["bytes"]) > LARGE
    return _over_baseline("relu_pool", "native", "both")(row, results) if large else None


def _memory(row: Row, results: Results) -> float | None:
    if (row.suite, row.contender) != ("step", "ours") or row.memory is None:
        return None
    plain = [r.memory for r in results.rows if (r.suite, r.case, r.contender) == ("step", row.case, row.baseline)]
    return row.memory / plain[0] if plain and plain[0] else None


def _growth(contender: str) -> Callable[[Row, Results], float | None]:
    """Time per sample at batch 8192 over that at batch 1024: 1 is linear."""

    def measure(row: Row, results: Results) -> float | None:
        if (row.suite, row.contender, row.case) != ("scaling", contender, "batch 8192") or not row.seconds:
            return None
        small = [
            r.seconds.median
            for r in results.rows
            if (r.suite, r.contender, r.case) == ("scaling", contender, "batch 1024") and r.seconds
        ]
        return row.seconds.median / small[0] / 8 if small else None

    return measure


GOALS = (
    Goal("training step over standard", 1.03, True, CPU, _over_baseline("step", "ours", "step")),
    Goal("training step over standard", 1.02, True, GPU, _over_baseline("step", "ours", "step")),
    Goal("peak memory of a training step over standard", 1.01, True, CPU, _memory),
    Goal("peak memory of a training step over standard", 1.01, True, GPU, _memory),
    Goal(
        "loss, forward and backward, CIFAR shapes: speed-up",
        20,
        False,
        GPU,
        _speed_up("loss", "triton", "both", "CIFAR"),
    ),
    Goal("loss, forward, ImageNet shapes: of copy", 0.9, False, GPU, _of_copy("loss", "triton", "forward", "ImageNet")),
    Goal(
        "loss, backward, ImageNet shapes: of copy", 0.9, False, GPU, _of_copy("loss", "triton", "backward", "ImageNet")
    ),
    Goal("loss per sample, batch 8192 over 1024", 1.1, True, CPU, _growth("native")),
    Goal("loss per sample, batch 8192 over 1024", 1.1, True, GPU, _growth("triton")),
    Goal("relu_pool over ReLU alone, more than 16 MB", 1.05, True, CPU, _large_relu_pool),
    Goal(
        "firing counts over the published loop: speed-up",
        10,
        False,
        CPU,
        _speed_up("firing", "native", "update", "classes"),
    ),
    Goal("firing counts, all-zero input: of copy", 0.9, False, GPU, _of_copy("firing", "native", "update", "all zero")),
    Goal(
        "firing counts, input behind a ReLU: of copy",
        1.0,
        False,
        GPU,
        _of_copy("firing", "native", "update", "classes"),
    ),
    Goal("decomposition pass over plain inference", 1.05, True, CPU, _over_baseline("decomposition", "native", "pass")),
    Goal("attribution pass over forward and backward", 1.1, True, CPU, _over_baseline("attribution", "native", "pass")),
    Goal("attribution pass over forward and backward", 1.1, True, GPU, _over_baseline("attribution", "triton", "pass")),
    Goal(
        "a GPU's host, eager step over a standard one, launches stubbed",
        1.1,
        True,
        CPU,
        _over_baseline("host", "grouped", "10 steps"),
    ),
    Goal("step of MwT or NeMo: speed-up over the published", 1.3, False, CPU, _speed_up("methods", "ours", "step", "")),
    Goal(
        "epoch of GradSplitter: speed-up over the published", 3, False, CPU, _speed_up("methods", "ours", "epoch", "")
    ),
    Goal(
        "generation of CNNSplitter: speed-up over the published",
        10,
        False,
        CPU,
        _speed_up("methods", "ours", "generation", ""),
    ),
)


def verdicts(results: Results) -> Iterator[tuple[Goal, Row, float]]:
    """Each goal of this device with the row that does worst and its figure; goals without a row are left out."""
    for goal in GOALS:
        if goal.device != results.machine["device_type"]:
            continue
        figures = [(goal.measure(row, results), row) for row in results.rows if row.status == MEASURED]
        known = [(figure, row) for figure, row in figures if figure is not None]
        if known:
            figure, row = (max if goal.at_most else min)(known, key=lambda pair: pair[0])
            yield goal, row, figure
