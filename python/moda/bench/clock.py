"""Times contenders in turn, one cold sample at a time, and reports medians with quartiles."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch


@dataclass(frozen=True)
class Quartiles:
    """The median of a series of samples with its quartiles and extremes."""

    median: float
    q1: float
    q3: float
    minimum: float
    samples: int

    @staticmethod
    def of(samples: Sequence[float]) -> Quartiles:
        """Compute quartiles by linear interpolation, both ends included; raise ValueError if there are no samples."""
        if not samples:
            raise ValueError("samples: expected at least one, got none")
        if len(samples) == 1:
            return Quartiles(samples[0], samples[0], samples[0], samples[0], 1)
        q1, median, q3 = statistics.quantiles(samples, n=4, method="inclusive")
        return Quartiles(median, q1, q3, min(samples), len(samples))


@dataclass(frozen=True)
class Timed:
    """A call to time: `call(prepare())`, of which only `call` is timed."""

    call: Callable[[Any], object]
    prepare: Callable[[], Any] = lambda: None


@dataclass(frozen=True)
class Budget:
    """The number of rounds to sample: at least `least`, then more until `seconds` have passed or `most` are done."""

    least: int
    most: int
    seconds: float
    warmups: int = 2


class Clock(Protocol):
    """A clock that takes one sample, in seconds."""

    def sample(self, timed: Timed) -> float:
        """Return the seconds that one call takes with cold caches."""


class HostClock:
    """A clock of the wall time of a call on the CPU.

    Before each sample a buffer larger than the last-level cache is written, so that no contender finds in cache what
    the one before it, or its own last call, left there.
    """

    def __init__(self, cache_bytes: int) -> None:
        self._evict = torch.zeros(2 * cache_bytes, dtype=torch.uint8)

    def sample(self, timed: Timed) -> float:
        """Return the seconds that one call takes with cold caches."""
        state = timed.prepare()
        self._evict.add_(1)
        begin = time.perf_counter()
        result = timed.call(state)
        seconds = time.perf_counter() - begin
        del result  # the time to free the result is not counted
        return seconds


class CudaClock:
    """A clock of the time between two events on the GPU. Launches count, because the stream is idle when the call
    begins.
    """

    def __init__(self, cache_bytes: int) -> None:
        self._evict = torch.zeros(2 * cache_bytes, dtype=torch.uint8, device="cuda")

    def sample(self, timed: Timed) -> float:
        """Return the seconds that one call takes with a cold L2 cache."""
        event: Any = torch.cuda.Event
        begin, end = event(enable_timing=True), event(enable_timing=True)
        state = timed.prepare()
        self._evict.add_(1)
        torch.cuda.synchronize()
        begin.record()
        result = timed.call(state)
        end.record()
        end.synchronize()
        del result
        return float(begin.elapsed_time(end)) / 1e3


def interleave(contenders: Mapping[str, Timed], clock: Clock, budget: Budget) -> dict[str, list[float]]:
    """Return every contender's samples in seconds, taken in turn; sample i of each belongs to round i.

    Each round begins with another contender, so that none always runs behind the same neighbour.
    """
    names = list(contenders)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        for _ in range(budget.warmups):
            clock.sample(contenders[name])
    collecting = gc.isenabled()
    gc.disable()
    try:
        end = time.perf_counter() + budget.seconds
        for round_ in range(budget.most):
            if round_ >= budget.least and time.perf_counter() >= end:
                break
            first = round_ % len(names)
            for name in names[first:] + names[:first]:
                samples[name].append(clock.sample(contenders[name]))
    finally:
        if collecting:
            gc.enable()
    return samples


def ratios(samples: Sequence[float], baseline: Sequence[float]) -> Quartiles:
    """Return the quartiles of the ratios taken round by round, in which drift over the rounds cancels."""
    return Quartiles.of([mine / other for mine, other in zip(samples, baseline, strict=True)])
