"""Memory that stays with the process costs no page faults when it is used again."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from moda.bench import allocator, runner
from moda.bench.case import Case, Contender
from moda.bench.clock import Budget, HostClock, Timed

# The least faults of filling a new tensor many times. An aligned block does not fit where the last one was as long as the C
# library holds back the few bytes cut off to align it; it holds seven of a size.
FILL = """
import resource, torch
from moda.bench.allocator import kept_memory

BYTES = 256 << 20

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(BYTES, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def share_of_pages():
    return min(faults() for _ in range(12)) * resource.getpagesize() / BYTES

print(share_of_pages())
for _ in range(2):  # the second time after the default was put back
    with kept_memory():
        print(share_of_pages())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library: nothing to tell it")
def test_kept_memory_is_handed_out_again() -> None:
    """In a process of its own: what free blocks the tests before have left decides where a new one goes."""
    # Pages of one size, so that a fault is a page.
    without_huge_pages = {**os.environ, "THP_MEM_ALLOC_ENABLE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", FILL], capture_output=True, text=True, check=True, env=without_huge_pages
    )
    before, first, second = map(float, done.stdout.split())
    assert first < 0.01
    assert second < 0.01
    assert before > 0.002  # where huge pages are given unasked, 512 pages are one


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
