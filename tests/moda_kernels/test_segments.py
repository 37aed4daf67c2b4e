from __future__ import annotations

from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st

from moda_kernels.segments import Segments


@given(st.lists(st.integers(-3, 4), min_size=1, max_size=12))
def test_segments_of_any_labels(values):
    labels = torch.tensor(values)
    segments = Segments.from_labels(labels)
    classes = sorted(set(values))
    members = [[i for i, value in enumerate(values) if value == k] for k in classes]
    offsets = segments.offsets.tolist()
    assert [segments.order[a:b].tolist() for a, b in pairwise(offsets)] == members + [[]] * (len(values) - len(classes))
    assert segments.segment.tolist() == [classes.index(value) for value in values]
    same = sum(a == b for i, a in enumerate(values) for b in values[:i])
    assert segments.same_pairs.item() == same
    assert segments.diff_pairs.item() == len(values) * (len(values) - 1) // 2 - same


def test_pair_counts_beyond_int32():
    segments = Segments.from_labels(torch.zeros(70_000, dtype=torch.int32))
    assert segments.same_pairs.item() == 70_000 * 69_999 // 2 > 2**31
    assert segments.diff_pairs.item() == 0
