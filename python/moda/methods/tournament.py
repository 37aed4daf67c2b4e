"""The joint fitness of CNNSplitter's modules (arXiv 2209.06116): how well those of different classes answer together.

Every class has a population of candidate modules. Which candidates of all classes go best together cannot be tried out
(P^N combinations); a tournament joins neighbouring classes, then pairs of those, and so on, and keeps the best
combinations of each round.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating]
Integers = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

LEAST, MOST = 50, 500
"""How many combinations a round keeps at least, if there are so many, and at most."""

_BLOCK = 1 << 16  # pairs of combinations compared at once: so many stay in a core's cache
_BYTE = 255


def task_sizes(num_classes: int) -> list[int]:
    """Return the numbers of classes that the rounds join: 2, 4, 8, ... and last all of them."""
    sizes = []
    size = 2
    while size < num_classes:
        sizes.append(size)
        size *= 2
    return [*sizes, num_classes]


def differences(kernels: Bools) -> npt.NDArray[np.float32]:
    """Return 1 - Jaccard index of the neurons of any two candidates.

    Two candidates without any neuron count as equal.

    Args:
        kernels: (N, P, total) bool.

    Returns:
        (N, N, P, P) float32; entry [a, b, i, j] compares candidate i of class a with candidate j of class b.
    """
    classes, individuals, total = kernels.shape
    flat = kernels.reshape(-1, total).astype(np.float32)
    shared = (flat @ flat.T).astype(np.float64)  # whole numbers, exact in float32
    sizes = flat.sum(1)
    either = sizes[:, None] + sizes[None, :] - shared
    jaccard = np.divide(shared, either, out=np.ones_like(shared), where=either > 0)
    table = (1 - jaccard).astype(np.float32)
    made: npt.NDArray[np.float32] = table.reshape(classes, individuals, classes, individuals).transpose(0, 2, 1, 3)
    return made


@dataclass(frozen=True, eq=False)
class _Combinations:
    """Combinations of candidates of some classes.

    Attributes:
        classes: in the order in which their outputs stand side by side.
        members: (count, classes) candidate of each class.
        best: (count, samples) highest output.
        right: (count, samples) whether that output is the right class's.
        apart: (count,) sum of the differences over pairs of members.
        score: (count,) what the last round gave; zeros before the first.
        accuracy: (count,) likewise.
        brought_back: whether the last one had been cut, and was brought back.
    """

    classes: tuple[int, ...]
    members: Integers
    best: Floats
    right: Bools
    apart: npt.NDArray[np.float64]
    score: npt.NDArray[np.float64]
    accuracy: npt.NDArray[np.float64]
    brought_back: bool = False

    def __len__(self) -> int:
        return len(self.members)

    @property
    def diversity(self) -> npt.NDArray[np.float64]:
        """(count,) mean difference over pairs of members."""
        return self.apart / max(1, len(self.classes) * (len(self.classes) - 1) // 2)


@dataclass(frozen=True, eq=False)
class JointFitness:
    """What a tournament found.

    Attributes:
        fitness: (N, P) highest score of a surviving combination that a candidate is part of; 0 for none.
        survivors: how many combinations each join kept, in order.
        best: the candidate of each class in the best combination, (N,).
        score: of the best combination.
        accuracy: of the best combination.
        diversity: of the best combination.
        brought_back: score, accuracy and diversity of the combination of all candidates 0 if the last round had cut
            it, else None. It counts for fitness, and never as the best one.
    """

    fitness: npt.NDArray[np.float64]
    survivors: tuple[int, ...]
    best: Integers
    score: float
    accuracy: float
    diversity: float
    brought_back: tuple[float, float, float] | None

    @property
    def ensemble(self) -> Integers:
        """The fittest candidate of each class, (N,), the first of equals."""
        chosen: Integers = self.fitness.argmax(1)
        return chosen


def joint_fitness(
    outputs: Floats,
    labels: Integers,
    kernels: Bools,
    order: Sequence[int],
    thresholds: Sequence[tuple[int, float]],
    *,
    weight: float,
    alpha: float,
    keep_first: bool = False,
) -> JointFitness:
    """Let the candidates of all classes compete.

    A join of two lists of combinations forms their Cartesian product, and keeps the n most accurate, where n is how
    many reach the round's threshold, at least `LEAST` and at most `MOST`. Accuracy is that of the argmax over the
    combination's outputs (the first of equals) on the samples of its classes. The score is
    weight * accuracy + (1 - alpha) * mean difference over pairs of members. Equals keep the order in which they were
    formed.

    Args:
        outputs: (N, P, samples), each candidate's output for its own class.
        labels: (samples,) int64 in [0, N).
        kernels: (N, P, total), the neurons of each candidate.
        order: the classes in the order in which lists of them stand.
        thresholds: (classes, accuracy) per round; the last round joins all classes.
        weight: of the accuracy.
        alpha: 1 minus the weight of the diversity.
        keep_first: bring the combination of all candidates 0 back where a join has cut it.

    Raises:
        ValueError: `order` is no permutation of the classes, or the rounds do not join all of them.
    """
    num_classes, individuals, _ = outputs.shape
    if sorted(order) != list(range(num_classes)):
        raise ValueError(f"order: expected the classes 0 to {num_classes - 1}, each once, got {list(order)}")
    table = differences(kernels)
    lists = [_candidates(outputs, labels, number) for number in order]
    survivors: list[int] = []
    for _, threshold in thresholds:
        joined = []
        for left, right in _neighbours(lists):
            if right is not None:
                left = _join(left, right, labels, table, threshold, weight, alpha, keep_first)
                survivors.append(len(left))
            joined.append(left)
        lists = joined
    if len(lists) != 1:
        raise ValueError(f"thresholds: expected rounds that join all {num_classes} classes, got {list(thresholds)}")
    return _summary(lists[0], survivors, individuals)


def _candidates(outputs: Floats, labels: Integers, number: int) -> _Combinations:
    own = outputs[number]
    count = len(own)
    zeros = np.zeros(count)
    return _Combinations(
        classes=(number,),
        members=np.arange(count)[:, None],
        best=own,
        right=np.broadcast_to(labels == number, own.shape),
        apart=zeros,
        score=zeros,
        accuracy=zeros,
    )


def _neighbours(lists: Sequence[_Combinations]) -> Iterator[tuple[_Combinations, _Combinations | None]]:
    for index in range(0, len(lists), 2):
        yield lists[index], lists[index + 1] if index + 1 < len(lists) else None


def _join(
    left: _Combinations,
    right: _Combinations,
    labels: Integers,
    table: npt.NDArray[np.float32],
    threshold: float,
    weight: float,
    alpha: float,
    keep_first: bool,
) -> _Combinations:
    accuracy = _accuracies(left, right, labels)
    count = min(len(accuracy), max(LEAST, min(MOST, int((accuracy >= threshold).sum()))))
    kept = np.argsort(-accuracy, kind="stable")[:count]
    made = _chosen(left, right, kept, accuracy, table, weight, alpha)
    made = _take(made, np.argsort(-made.score, kind="stable"))
    if keep_first and not bool((made.members == 0).all(1).any()):
        firsts = np.flatnonzero(_all_first(left)[:, None] & _all_first(right)[None, :])
        made = _bring_back(made, _chosen(left, right, firsts, accuracy, table, weight, alpha))
    return made


def _all_first(combinations: _Combinations) -> Bools:
    first: Bools = (combinations.members == 0).all(1)
    return first


def _accuracies(left: _Combinations, right: _Combinations, labels: Integers) -> npt.NDArray[np.float64]:
    """(left * right,) accuracy of every combination of the two lists.

    The higher of two highest outputs is the highest of all, so a sample of a left class is answered right where the
    left combination is right and its output not below the right one's, and the other way round.
    """
    of_left, of_right = np.isin(labels, left.classes), np.isin(labels, right.classes)
    hits = _wins(left, right, of_left, strictly=False) + _wins(right, left, of_right, strictly=True).T
    samples = int(of_left.sum() + of_right.sum())
    accuracy: npt.NDArray[np.float64] = hits.ravel() / max(1, samples)
    return accuracy


def _wins(own: _Combinations, other: _Combinations, samples: Bools, *, strictly: bool) -> Integers:
    """(own, other) samples that the own combination answers right and with a higher output than the other's."""
    answers = np.where(own.right[:, samples], own.best[:, samples], np.nan)  # a wrong one is above no other
    mine, theirs = (np.ascontiguousarray(part.T) for part in (answers, other.best[:, samples]))
    compare = np.greater if strictly else np.greater_equal
    wins = np.zeros((len(own), len(other)), np.int64)
    rows = max(1, _BLOCK // max(1, len(other)))
    for start in range(0, len(own), rows):
        block = wins[start : start + rows]
        higher = np.empty(block.shape, bool)
        for first in range(0, len(mine), _BYTE):
            counts = np.zeros(block.shape, np.uint8)  # a byte a pair: fast to add to, and enough for so many samples
            for sample in range(first, min(first + _BYTE, len(mine))):
                compare(mine[sample, start : start + rows, None], theirs[sample, None], out=higher)
                counts += higher.view(np.uint8)
            block += counts
    return wins


def _chosen(
    left: _Combinations,
    right: _Combinations,
    kept: Integers,
    accuracy: npt.NDArray[np.float64],
    table: npt.NDArray[np.float32],
    weight: float,
    alpha: float,
) -> _Combinations:
    """Those of the Cartesian product whose numbers are `kept`."""
    first, second = np.divmod(kept, len(right))
    apart = left.apart[first] + right.apart[second]
    for place, one in enumerate(left.classes):
        for other_place, other in enumerate(right.classes):
            apart = apart + table[one, other][left.members[first, place], right.members[second, other_place]]
    from_left = left.best[first] >= right.best[second]
    made = _Combinations(
        classes=left.classes + right.classes,
        members=np.concatenate([left.members[first], right.members[second]], 1),
        best=np.maximum(left.best[first], right.best[second]),
        right=np.where(from_left, left.right[first], right.right[second]),
        apart=apart,
        score=np.zeros(len(kept)),
        accuracy=accuracy[kept],
    )
    score = weight * made.accuracy + (1 - alpha) * made.diversity
    return _Combinations(made.classes, made.members, made.best, made.right, apart, score, made.accuracy)


def _take(combinations: _Combinations, rows: Integers) -> _Combinations:
    return _Combinations(
        classes=combinations.classes,
        members=combinations.members[rows],
        best=combinations.best[rows],
        right=combinations.right[rows],
        apart=combinations.apart[rows],
        score=combinations.score[rows],
        accuracy=combinations.accuracy[rows],
    )


def _bring_back(combinations: _Combinations, cut: _Combinations) -> _Combinations:
    return _Combinations(
        classes=combinations.classes,
        members=np.concatenate([combinations.members, cut.members]),
        best=np.concatenate([combinations.best, cut.best]),
        right=np.concatenate([combinations.right, cut.right]),
        apart=np.concatenate([combinations.apart, cut.apart]),
        score=np.concatenate([combinations.score, cut.score]),
        accuracy=np.concatenate([combinations.accuracy, cut.accuracy]),
        brought_back=True,
    )


def _summary(last: _Combinations, survivors: Sequence[int], individuals: int) -> JointFitness:
    num_classes = len(last.classes)
    fitness = np.zeros((num_classes, individuals))
    for place, number in enumerate(last.classes):
        np.maximum.at(fitness[number], last.members[:, place], last.score)
    best = np.empty(num_classes, np.int64)
    best[list(last.classes)] = last.members[0]
    figures = [(float(last.score[row]), float(last.accuracy[row]), float(last.diversity[row])) for row in (0, -1)]
    return JointFitness(fitness, tuple(survivors), best, *figures[0], figures[1] if last.brought_back else None)
