"""The joint fitness of modules, against the published recorder and against trying all combinations."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import numpy as np
import pytest

from moda.methods import tournament
from moda.methods.tournament import JointFitness, differences, joint_fitness, task_sizes

Golden = Callable[[str], dict[str, np.ndarray]]


def published(golden: Golden, case: int) -> tuple[dict[str, np.ndarray], JointFitness]:
    arrays = {
        name.removesuffix(f"_{case}"): array
        for name, array in golden("peers/cs_fitness").items()
        if name.endswith(f"_{case}")
    }
    weight, alpha = arrays["weights"].tolist()
    rounds = [(int(size), accuracy) for size, accuracy in arrays["thresholds"]]
    generation = int(arrays["n"][3])
    found = joint_fitness(
        arrays["outputs"],
        arrays["labels"],
        arrays["kernels"],
        arrays["order"].tolist(),
        rounds,
        weight=weight,
        alpha=alpha,
        keep_first=generation > 0,
    )
    return arrays, found


@pytest.mark.parametrize("case", [0, 1, 2])
def test_the_published_recorder_finds_the_same(golden: Golden, case: int):
    arrays, found = published(golden, case)
    assert found.survivors == tuple(arrays["survivors"].tolist())
    np.testing.assert_allclose(found.fitness, arrays["fitness"], rtol=1e-6)
    np.testing.assert_array_equal(found.ensemble, arrays["ensemble"])
    np.testing.assert_allclose((found.score, found.accuracy, found.diversity), arrays["best"], rtol=1e-6)
    if "appended" in arrays:
        assert found.brought_back is not None
        np.testing.assert_allclose(found.brought_back, arrays["appended"], rtol=1e-6)
    else:
        assert found.brought_back is None


@pytest.mark.parametrize("case", [0, 1, 2])
def test_differences_are_the_published_ones(golden: Golden, case: int):
    arrays = golden("peers/cs_fitness")
    table = differences(arrays[f"kernels_{case}"])
    for a, b in zip(*np.triu_indices(len(table), 1), strict=True):
        np.testing.assert_array_equal(table[a, b], arrays[f"diff_{case}"][a, b])


def test_candidates_without_neurons_count_as_equal():
    kernels = np.zeros((2, 1, 3), bool)
    assert differences(kernels)[0, 1, 0, 0] == 0
    kernels[1, 0, 0] = True
    assert differences(kernels)[0, 1, 0, 0] == 1


@pytest.mark.parametrize("num_classes", [2, 3, 4])
def test_few_candidates_are_all_tried(num_classes: int):
    """With so few that no round cuts, fitness is the best over all combinations, each evaluated by itself."""
    generator = np.random.default_rng(num_classes)
    outputs = generator.integers(0, 3, (num_classes, 2, 30)).astype(np.float32)  # many ties
    labels = generator.integers(0, num_classes, 30)
    kernels = generator.random((num_classes, 2, 12)) < 0.5
    order = generator.permutation(num_classes).tolist()
    rounds = [(size, 1.0) for size in task_sizes(num_classes)]
    found = joint_fitness(outputs, labels, kernels, order, rounds, weight=0.9, alpha=0.9)
    expected = np.zeros((num_classes, 2))
    for members in product(range(2), repeat=num_classes):
        columns = np.stack([outputs[number, members[number]] for number in order])
        accuracy = float((np.array(order)[columns.argmax(0)] == labels).mean())
        sets = [set(np.flatnonzero(kernels[number, members[number]])) for number in range(num_classes)]
        apart = [
            1 - len(sets[a] & sets[b]) / len(sets[a] | sets[b])
            for a, b in zip(*np.triu_indices(num_classes, 1), strict=True)
        ]
        score = 0.9 * accuracy + 0.1 * float(np.mean(apart))
        for number, member in enumerate(members):
            expected[number, member] = max(expected[number, member], score)
    np.testing.assert_allclose(found.fitness, expected, rtol=1e-6)
    np.testing.assert_allclose(found.score, expected.max(), rtol=1e-6)


def test_blocks_of_comparisons_do_not_change_the_result(golden: Golden, monkeypatch: pytest.MonkeyPatch):
    _, whole = published(golden, 2)
    monkeypatch.setattr(tournament, "_BLOCK", 1)
    _, pieces = published(golden, 2)
    np.testing.assert_array_equal(whole.fitness, pieces.fitness)


def test_rounds_double_and_end_with_all_classes():
    assert [task_sizes(n) for n in (1, 2, 3, 5, 10, 16)] == [
        [1], [2], [2, 3], [2, 4, 5], [2, 4, 8, 10], [2, 4, 8, 16],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("order", "rounds", "message"),
    [
        ([0, 0, 1], [(2, 0.5), (3, 0.5)], "order: expected the classes 0 to 2, each once, got"),
        ([0, 1, 2], [(2, 0.5)], "thresholds: expected rounds that join all 3 classes"),
    ],
)
def test_bad_arguments_are_named(order: list[int], rounds: list[tuple[int, float]], message: str):
    outputs, kernels = np.zeros((3, 1, 4), np.float32), np.ones((3, 1, 2), bool)
    with pytest.raises(ValueError, match=message):
        joint_fitness(outputs, np.zeros(4, np.int64), kernels, order, rounds, weight=1, alpha=0.9)
