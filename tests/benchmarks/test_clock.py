"""The statistics, and the order in which contenders are timed."""

from __future__ import annotations

import numpy as np
import pytest

from moda.bench.clock import Budget, HostClock, Quartiles, Timed, interleave, ratios


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 30])
def test_quartiles_are_numpys(count: int) -> None:
    samples = np.random.default_rng(count).exponential(size=count)
    quartiles = Quartiles.of(list(samples))
    expected = np.quantile(samples, [0.5, 0.25, 0.75, 0])
    np.testing.assert_allclose([quartiles.median, quartiles.q1, quartiles.q3, quartiles.minimum], expected)
    assert quartiles.samples == count


def test_no_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        Quartiles.of([])


def test_ratios_are_taken_round_by_round() -> None:
    """A machine that gets slower by the round changes no ratio; the ratio of medians of shuffled rounds would."""
    baseline = [1.0, 2.0, 8.0, 4.0]
    assert ratios([3 * seconds for seconds in baseline], baseline) == Quartiles(3.0, 3.0, 3.0, 3.0, 4)


class _CountingClock:
    """Notes who was sampled; a sample is what the call returns."""

    def __init__(self) -> None:
        self.order: list[str] = []

    def sample(self, timed: Timed) -> float:
        name, seconds = timed.call(timed.prepare())  # type: ignore[misc]
        self.order.append(name)
        return seconds


def _contender(name: str) -> Timed:
    return Timed(lambda state: (name, state), prepare=lambda: float(ord(name)))


def test_contenders_take_turns_and_each_goes_first() -> None:
    clock = _CountingClock()
    samples = interleave(
        {name: _contender(name) for name in "abc"}, clock, Budget(least=3, most=3, seconds=0, warmups=1)
    )
    assert "".join(clock.order) == "abc" + "abc" + "bca" + "cab"  # a warm-up of each, then three rounds
    assert samples == {name: [float(ord(name))] * 3 for name in "abc"}


@pytest.mark.parametrize(("seconds", "rounds"), [(0.0, 2), (60.0, 7)])
def test_rounds_end_with_the_time_or_at_the_most(seconds: float, rounds: int) -> None:
    budget = Budget(least=2, most=7, seconds=seconds, warmups=0)
    assert len(interleave({"a": _contender("a")}, _CountingClock(), budget)["a"]) == rounds


def test_only_the_call_is_timed() -> None:
    """Preparing takes 50 ms and the call nothing."""
    import time

    prepared = []
    timed = Timed(prepared.append, prepare=lambda: time.sleep(0.05))
    assert 0 < HostClock(cache_bytes=1 << 12).sample(timed) < 0.04
    assert prepared == [None]
