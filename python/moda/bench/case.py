"""Defines a benchmark's case and its contenders."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from moda.bench.clock import Budget, Timed


def _right() -> str:
    return ""


@dataclass(frozen=True)
class Contender:
    """One way to do what the case asks for.

    Attributes:
        name: the contender's name, unique in the case.
        phases: the calls to time, by phase ("forward", "backward", "both", "step", ...).
        check: returns "" when the results are right, else what is wrong with them; it runs before anything is timed.
        memory: returns the peak device memory of one call in bytes; None if the case does not ask for it.
        flops: the floating-point operations of one call; None if the case does not ask for them.
        skipped: the reason why it cannot run here, in which case it has no phases.
    """

    name: str
    phases: Mapping[str, Timed] = field(default_factory=dict)
    check: Callable[[], str] = _right
    memory: Callable[[], int] | None = None
    flops: int | None = None
    skipped: str = ""


@dataclass(frozen=True)
class Case:
    """A question that the benchmarks answer.

    Attributes:
        suite: the family that the case belongs to.
        name: the case's name, unique in the suite.
        baseline: the name of the contender that the others are compared with.
        build: makes the inputs and the contenders; what they hold is freed when they are dropped.
        budget: how often to sample each phase.
        moved: the bytes that an ideal implementation must read and write, by phase; empty where bandwidth is not the
            limit.
        keeps_memory: whether freed memory stays with the process (`allocator.kept_memory`): it does in a question about
            kernels at sizes where fresh memory would be most of what is timed.
        parameters: numbers and words that describe the case (shapes, classes, ...), as stored in the results.
    """

    suite: str
    name: str
    baseline: str
    build: Callable[[], Sequence[Contender]]
    budget: Budget
    moved: Mapping[str, int] = field(default_factory=dict)
    keeps_memory: bool = False
    parameters: Mapping[str, int | float | str] = field(default_factory=dict)
