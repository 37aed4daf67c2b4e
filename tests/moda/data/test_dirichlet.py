"""Class-imbalanced samples, against the published code's."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from moda.data.dirichlet import dirichlet_split

Golden = Callable[[str], dict[str, np.ndarray]]


@pytest.mark.parametrize("case", range(3))
def test_samples_are_the_published_ones(golden: Golden, case: int):
    arrays = golden("peers/gs_dirichlet")
    seed, _, least = arrays[f"cfg_{case}"].tolist()
    split = dirichlet_split(arrays["labels"], seed, alpha=float(arrays[f"alpha_{case}"]), least=least)
    rows = arrays[f"idx_{case}"]
    np.testing.assert_array_equal(split.train, rows[: int(0.8 * len(rows))])
    np.testing.assert_array_equal(split.validation, rows[int(0.8 * len(rows)) :])


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        ([], {}, "labels: expected integers in"),
        ([0, 2], {}, "labels: expected integers in .* every class"),
        ([0, 1], {"alpha": 0.0}, "alpha: expected a finite number greater than 0, got 0.0"),
        ([0, 1], {"train_share": 1.5}, r"train_share: expected a number in \[0, 1\], got 1.5"),
        ([0, 1], {"least": 2}, "least: expected a number that draws reach, got 2 of classes with 1 samples"),
    ],
)
def test_bad_arguments_are_named(labels: list[int], options: dict[str, float], message: str):
    with pytest.raises(ValueError, match=message):
        dirichlet_split(labels, 0, **options)
