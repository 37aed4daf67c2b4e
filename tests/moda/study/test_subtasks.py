from __future__ import annotations

import hashlib
import re
from collections import Counter
from itertools import combinations

import pytest

from moda.study.subtasks import _combination, choose, sample, subtasks


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


def test_choosing_sub_tasks():
    assert choose(10) == subtasks(10)
    assert choose(10, "sampled") == sample(10)
    assert choose(5, sizes=[3]) == [task for task in subtasks(5) if len(task) == 3]
    assert choose(20, "all", sizes=[19, 20]) == [*combinations(range(20), 19), tuple(range(20))]
    few = choose(10, per_size=4)
    assert [len(task) for task in few] == [size for size in range(2, 10) for _ in range(4)] + [10]
    assert set(few) <= set(subtasks(10))
    assert few == choose(10, per_size=4) != choose(10, per_size=4, seed=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((10, "some"), "tasks: expected one of auto, all, sampled, got 'some'"),
        ((100, "all"), "tasks: all 1.3e+30 sub-tasks of 100 classes are too many; take 'sampled'"),
    ],
)
def test_impossible_choices(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        choose(*arguments)
    with pytest.raises(ValueError, match=re.escape("size: expected numbers of classes in [2, 10], got 1")):
        choose(10, sizes=[2, 1])
    with pytest.raises(ValueError, match="per_size: expected at least 1, got 0"):
        choose(10, per_size=0)
