"""Summarises a figure that was measured with several seeds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean, stdev

__all__ = ["Spread"]


@dataclass(frozen=True)
class Spread:
    """The mean and spread of a figure over seeds.

    Attributes:
        mean: the mean over seeds.
        deviation: the sample standard deviation; None for a single seed.
        low: the least value.
        high: the largest value.
    """

    mean: float
    deviation: float | None
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Summarise one value per seed, at least one."""
        listed = list(values)
        return cls(fmean(listed), stdev(listed) if len(listed) > 1 else None, min(listed), max(listed))

    def percent(self, digits: int = 2) -> str:
        """Format as per cent, without the sign."""
        return self._text(100, digits, "")

    def points(self, digits: int = 2) -> str:
        """Format as a difference in percentage points, with its sign."""
        return self._text(100, digits, "+")

    def number(self, digits: int) -> str:
        """Format the numbers without a factor."""
        return self._text(1, digits, "")

    def _text(self, factor: float, digits: int, sign: str) -> str:
        rounded = round(factor * self.mean, digits) + 0.0  # a rounded -0.0 loses its minus
        text = f"{rounded:{sign}.{digits}f}".replace("-", "\u2212")
        return text if self.deviation is None else f"{text}\u00a0\u00b1\u00a0{factor * self.deviation:.{digits}f}"
