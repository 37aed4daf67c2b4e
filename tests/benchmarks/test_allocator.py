"""Memory that stays with the process costs no page faults when it is used again."""

from __future__ import annotations

import platform
import resource

import pytest
import torch

from moda.bench import allocator, runner
from moda.bench.case import Case, Contender
from moda.bench.clock import Budget, HostClock, Timed

BYTES = 256 << 20
PAGES = BYTES // resource.getpagesize()


def _least_faults() -> int:
    """Of filling a new tensor several times; an aligned block does not always fit where the last one was."""
    return min(_faults() for _ in range(6))


def _faults() -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(BYTES, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library: nothing to tell it")
def test_kept_memory_is_handed_out_again() -> None:
    with allocator.kept_memory():
        assert _least_faults() < PAGES // 100
    with allocator.kept_memory():  # after the default was put back
        assert _least_faults() < PAGES // 100


def test_a_case_says_whether_memory_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    kept = allocator.kept_memory
    monkeypatch.setattr(runner, "kept_memory", lambda: asked.append(True) or kept())  # type: ignore[func-returns-value]
    for keeps in (True, False):
        case = Case(
            suite="scaling",
            name="tiny",
            baseline="only",
            build=lambda: [Contender("only", {"call": Timed(lambda _: None)})],
            budget=Budget(1, 1, 0, warmups=0),
            keeps_memory=keeps,
        )
        runner.run_case(case, HostClock(cache_bytes=1 << 12))
        assert asked == [True]
