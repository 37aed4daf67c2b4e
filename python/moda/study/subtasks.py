"""Chooses the sub-tasks of a study: all subsets of few classes, the published sample of many (arXiv 2411.01074)."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Collection

ALL_SUBSETS_UP_TO = 12  # classes; 2^12 sub-tasks are still a matter of minutes


def subtasks(num_classes: int, seed: int = 42) -> list[tuple[int, ...]]:
    """List the sub-tasks of a study, each at least two classes in ascending order.

    Of up to 12 classes these are all subsets, by size; of more they are a `sample`, as published for 100 classes.

    Raises:
        ValueError: there are fewer than two classes.

    Examples:
        >>> subtasks(3)
        [(0, 1), (0, 2), (1, 2), (0, 1, 2)]
    """
    if num_classes < 2:
        raise ValueError(f"num_classes: expected at least 2, got {num_classes}")
    if num_classes > ALL_SUBSETS_UP_TO:
        return sample(num_classes, seed)
    classes = range(num_classes)
    return [subset for size in range(2, num_classes + 1) for subset in itertools.combinations(classes, size)]


KINDS = ("auto", "all", "sampled")
MOST_SUBTASKS = 1 << 20


def choose(
    num_classes: int,
    kind: str = "auto",
    *,
    sizes: Collection[int] | None = None,
    per_size: int | None = None,
    seed: int = 42,
) -> list[tuple[int, ...]]:
    """Choose sub-tasks as a user asks for them.

    Args:
        num_classes: the number of classes, at least 2.
        kind: "auto" chooses as `subtasks`, "all" takes all subsets, "sampled" chooses as `sample`.
        sizes: the numbers of classes to keep to; None means all.
        per_size: the most sub-tasks of each size, drawn at random; None means all.
        seed: the seed of what is drawn.

    Raises:
        ValueError: an argument is not as above, or "all" would be more than a million.
    """
    if kind not in KINDS:
        raise ValueError(f"tasks: expected one of {', '.join(KINDS)}, got {kind!r}")
    wrong = sorted(size for size in sizes or () if not 2 <= size <= num_classes)
    if wrong:
        raise ValueError(f"size: expected numbers of classes in [2, {num_classes}], got {wrong[0]}")
    if per_size is not None and per_size < 1:
        raise ValueError(f"per_size: expected at least 1, got {per_size}")
    tasks = _all(num_classes, sizes) if kind == "all" else subtasks(num_classes, seed)
    if kind == "sampled" and num_classes <= ALL_SUBSETS_UP_TO:
        tasks = sample(num_classes, seed)
    tasks = [task for task in tasks if not sizes or len(task) in sizes]
    return tasks if per_size is None else _thinned(tasks, per_size, seed)


def _all(num_classes: int, sizes: Collection[int] | None) -> list[tuple[int, ...]]:
    chosen = sorted(sizes or range(2, num_classes + 1))
    total = sum(math.comb(num_classes, size) for size in chosen)
    if total > MOST_SUBTASKS:
        raise ValueError(f"tasks: all {total:.2g} sub-tasks of {num_classes} classes are too many; take 'sampled'")
    return [subset for size in chosen for subset in itertools.combinations(range(num_classes), size)]


def _thinned(tasks: list[tuple[int, ...]], per_size: int, seed: int) -> list[tuple[int, ...]]:
    generator = random.Random(seed)
    thinned = []
    for _, group in itertools.groupby(tasks, key=len):
        same = list(group)
        thinned += sorted(generator.sample(same, min(per_size, len(same))))
    return thinned


def sample(num_classes: int, seed: int = 42, *, confidence: float = 1.96, error: float = 0.08) -> list[tuple[int, ...]]:
    """Draw random subsets of each size, as many as estimate a proportion at the given confidence, as published.

    Of the N subsets of a size, n = ceil(z^2 s^2 N/(N-1) / (e^2 + z^2 s^2/(N-1))) distinct ones are drawn by their
    lexicographic rank, with s = 1/2. With the defaults and 100 classes this is the published list of 14697
    sub-tasks, entry by entry.

    Args:
        num_classes: the number of classes, at least 2.
        seed: the seed of Python's generator.
        confidence: the number z, the normal quantile of the confidence level.
        error: the number e, the half-width of the interval.
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
    """Give the subset of this size with the given lexicographic rank."""
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
