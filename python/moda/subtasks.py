"""Which sub-tasks a study looks at: all subsets of few classes, the published sample of many (moda.md section 7.1)."""

from __future__ import annotations

import itertools
import math
import random

ALL_SUBSETS_UP_TO = 12  # classes; 2^12 sub-tasks are still a matter of minutes


def subtasks(num_classes: int, seed: int = 42) -> list[tuple[int, ...]]:
    """The sub-tasks of a study, each at least two classes in ascending order.

    Up to 12 classes: all subsets, by size. More: `sample` (published for 100 classes).

    Raises:
        ValueError: fewer than two classes.
    """
    if num_classes < 2:
        raise ValueError(f"num_classes: expected at least 2, got {num_classes}")
    if num_classes > ALL_SUBSETS_UP_TO:
        return sample(num_classes, seed)
    classes = range(num_classes)
    return [subset for size in range(2, num_classes + 1) for subset in itertools.combinations(classes, size)]


def sample(num_classes: int, seed: int = 42, *, confidence: float = 1.96, error: float = 0.08) -> list[tuple[int, ...]]:
    """Random subsets of each size, as many as estimate a proportion at the given confidence; the published sampler.

    Of the N subsets of a size, n = ceil(z^2 s^2 N/(N-1) / (e^2 + z^2 s^2/(N-1))) distinct ones are drawn by their
    lexicographic rank, with s = 1/2. With the defaults and 100 classes this is the published list of 14697
    sub-tasks, entry by entry.

    Args:
        num_classes: at least 2.
        seed: of Python's generator.
        confidence: z, the normal quantile of the confidence level.
        error: e, the half-width of the interval.
    """
    generator = random.Random(seed)
    chosen = []
    for size in range(1, num_classes + 1):
        total = math.comb(num_classes, size)
        ranks: set[int] = set()
        while len(ranks) < _sample_size(total, confidence, error):
            ranks.add(generator.randint(0, total - 1))
        if size > 1:  # sizes of 1 are drawn, because the published generator draws them, and left out
            chosen += [_combination(num_classes, size, rank) for rank in ranks]
    return chosen


def _sample_size(total: int, confidence: float, error: float) -> int:
    if total <= 1:
        return total
    variance = confidence**2 * 0.5**2
    return math.ceil(variance * total / (total - 1) / (error**2 + variance / (total - 1)))


def _combination(num_classes: int, size: int, rank: int) -> tuple[int, ...]:
    """The subset of this size with the given lexicographic rank."""
    subset: list[int] = []
    for candidate in range(num_classes):
        if len(subset) == size:
            break
        following = math.comb(num_classes - candidate - 1, size - len(subset) - 1)
        if rank < following:
            subset.append(candidate)
        else:
            rank -= following
    return tuple(subset)
