"""Class-imbalanced samples of a data set, as GradSplitter (arXiv 2311.04438) trains its estimators on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

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
        ValueError: an argument is not as above, or no draw gives every class so many samples.
    """
    labels = np.asarray(labels).astype(np.int64, casting="safe") if np.size(labels) else np.zeros(0, np.int64)
    classes = int(labels.max()) + 1 if labels.size else 0
    counts = np.bincount(labels, minlength=classes)
    if not classes or not counts.all():
        raise ValueError("labels: expected integers in [0, K) with samples of every class")
    if not alpha > 0:
        raise ValueError(f"alpha: expected a number above 0, got {alpha}")
    if not 0 <= train_share <= 1:
        raise ValueError(f"train_share: expected a number in [0, 1], got {train_share}")
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
