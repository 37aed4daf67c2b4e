from __future__ import annotations

import hashlib
from collections import Counter
from itertools import combinations

import pytest

from moda.subtasks import _combination, sample, subtasks


def test_ten_classes_give_all_1013_subsets():
    tasks = subtasks(10)
    assert len(tasks) == len(set(tasks)) == 1013
    assert tasks[0] == (0, 1)
    assert tasks[-1] == tuple(range(10))


def test_hundred_classes_give_the_published_list():
    tasks = subtasks(100)
    text = "".join(" ".join(map(str, task)) + "\n" for task in tasks)
    assert hashlib.md5(text.encode(), usedforsecurity=False).hexdigest() == "d3687dc324347a88a3e777f6eae1d27b"
    sizes = Counter(map(len, tasks))
    assert (sizes[2], sizes[3], sizes[50], sizes[99], sizes[100]) == (146, 150, 151, 61, 1)


def test_ranks_run_through_the_combinations_in_order():
    assert [_combination(6, 3, rank) for rank in range(20)] == list(combinations(range(6), 3))


def test_seed_decides_the_sample():
    assert sample(14, seed=1) == sample(14, seed=1)
    assert sample(14, seed=1) != sample(14, seed=2)


def test_one_class_is_no_study():
    with pytest.raises(ValueError, match="num_classes: expected at least 2, got 1"):
        subtasks(1)
