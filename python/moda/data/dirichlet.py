"""Class-imbalanced samples of a data set, as GradSplitter (arXiv 2311.04438) trains its estimators on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moda.checks import Bounds, check_count, check_number

Integers = npt.NDArray[np.int64]
_TRIES = 10_000


@dataclass(frozen=True, eq=False)
class DirichletSplit:
    """Rows of a data set.

    Attributes:
        train: the rows to train on, int64.
        validation: the rows to validate on, int64.
    """

    train: Integers
    validation: Integers


def dirichlet_split(
    labels: npt.ArrayLike, seed: int, *, alpha: float = 1.0, least: int = 100, train_share: float = 0.8
) -> DirichletSplit:
    """Draw a sample whose class sizes differ, and split it.

    Proportions of the classes come from a symmetric Dirichlet distribution and are divided by their largest; of every
    class that share is drawn. This repeats until every class has at least `least` samples. The draws are those of the
    published code for a seed (NumPy's legacy generator).

    Args:
        labels: (n,) integers in [0, K), every class at least once.
        seed: of the draws; published: the estimator's index.
        alpha: the distribution's parameter; published: 1 for CIFAR-10, 0.5 for SVHN.
        least: samples that every class must have; published: 100 for CIFAR-10, 10 for SVHN.
        train_share: share of the sample to train on, in [0, 1].

    Raises:
        TypeError, ValueError: an argument is not as above, or no draw gives every class so many samples.
    """
    labels, classes = _checked_labels(labels)
    counts = np.bincount(labels, minlength=classes)
    check_count("seed", seed, least=0, most=(1 << 32) - 1)
    alpha = check_number("alpha", alpha, Bounds(above=0))
    check_count("least", least, least=0)
    check_number("train_share", train_share, Bounds(at_least=0, at_most=1))
    generator = np.random.RandomState(seed)
    for _ in range(_TRIES):
        proportions = generator.dirichlet(np.repeat(alpha, classes))
        drawn = []
        for number, share in enumerate(proportions / proportions.max()):
            own = np.flatnonzero(labels == number).tolist()
            generator.shuffle(own)
            drawn.append(own[: int(share * len(own))])
        if min(len(own) for own in drawn) >= least:
            chosen = [row for own in drawn for row in own]
            generator.shuffle(chosen)
            cut = int(train_share * len(chosen))
            return DirichletSplit(np.array(chosen[:cut], np.int64), np.array(chosen[cut:], np.int64))
    raise ValueError(f"least: expected a number that draws reach, got {least} of classes with {counts.min()} samples")


def _checked_labels(labels: Any) -> tuple[Integers, int]:
    """The labels as (n,) int64, and K."""
    try:
        given = np.asarray(labels)
    except (TypeError, ValueError, RuntimeError):  # a tensor that is not on the CPU or has no numbers, lists of lists
        given = np.zeros(0, np.object_)
    if given.ndim != 1 or (given.size and not np.issubdtype(given.dtype, np.integer)):
        raise TypeError(f"labels: expected a sequence of integers, got {type(labels).__name__}")
    # K classes with samples of each take K samples at least, so that a larger one needs no look at the others.
    if not given.size or given.min() < 0 or given.max() >= len(given) or not np.bincount(given.astype(np.int64)).all():
        raise ValueError("labels: expected integers in [0, K) with samples of every class")
    return given.astype(np.int64), int(given.max()) + 1
