"""CNNSplitter's chromosomes and generations, against what the published code made."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest

from moda.methods.genetic import (
    Slot,
    decode,
    first_population,
    fittest,
    group_probabilities,
    mutated_genes,
    next_generation,
    published_groups,
)

Golden = Callable[[str], dict[str, np.ndarray]]

SIMCNN = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
RESCNN = (64, 128, 128, 128, 256, 512, 512, 512, 512, 512, 512, 512)
RESCNN_SLOTS = (0, 2, 3, 4, 6, 7, 8, 10, 11)  # convolutions 1, 5 and 9 copy 3, 7 and 11
CONFIGURATIONS = {  # widths of the slots, sensitive ones, their ratios, the others' ratios
    "simcnn_cifar10": (SIMCNN, range(7), (0.6, 0.7, 0.8), (0.4, 0.5, 0.6, 0.7)),
    "rescnn_cifar10": ([RESCNN[i] for i in RESCNN_SLOTS], (0, 2, 3, 5), (0.5, 0.6, 0.7), (0.2, 0.3, 0.4)),
    "simcnn_svhn": (SIMCNN, range(7), (0.4, 0.5, 0.6), (0.1, 0.2, 0.3, 0.4)),
    "rescnn_svhn": ([RESCNN[i] for i in RESCNN_SLOTS], (2, 3, 5), (0.3, 0.4, 0.5), (0.2, 0.3)),
    "simcnn_svhn_5": (SIMCNN, range(5), (0.4, 0.5, 0.6, 0.7), (0.3, 0.4)),
    "rescnn_svhn_5": ([RESCNN[i] for i in RESCNN_SLOTS], (3, 5), (0.3, 0.4, 0.5), (0.2, 0.3)),
}


def slots_of(name: str) -> list[Slot]:
    widths, sensitive, ratios, others = CONFIGURATIONS[name]
    return [
        Slot(width, published_groups(width), ratios if index in sensitive else others, index in sensitive)
        for index, width in enumerate(widths)
    ]


def unpacked(array: np.ndarray, count: int) -> np.ndarray:
    return np.unpackbits(array, axis=1)[:, :count]


def test_groups_are_as_even_as_possible_and_larger_ones_come_first(golden: Golden):
    for width, sizes in zip((64, 128, 256, 512), golden("peers/cs_decode")["sizes"], strict=True):
        slot = Slot(width, published_groups(width))
        assert np.bincount(slot.group_of_rank()).tolist() == [size for size in sizes.tolist() if size]


def test_narrow_layers_have_a_group_per_neuron():
    assert [published_groups(width) for width in (1, 7, 10, 255, 256)] == [1, 7, 10, 10, 100]


@pytest.mark.parametrize("name", ["simcnn_cifar10", "rescnn_cifar10"])
def test_chromosomes_keep_the_published_kernels(golden: Golden, name: str):
    arrays = golden("peers/cs_decode")
    slots, widths = slots_of(name), SIMCNN if name.startswith("sim") else RESCNN
    convolutions = range(13) if name.startswith("sim") else RESCNN_SLOTS
    starts = np.cumsum([0, *widths])
    orders = [arrays[f"order_{name}"][starts[i] : starts[i + 1]] for i in convolutions]
    genes = unpacked(arrays[f"genes_{name}"], int(arrays[f"n_genes_{name}"]))
    kernels = unpacked(arrays[f"kernels_{name}"], sum(widths))
    for mask, index in zip(decode(genes, slots, orders), convolutions, strict=True):
        np.testing.assert_array_equal(mask, kernels[:, starts[index] : starts[index + 1]] == 1)


@pytest.mark.parametrize("case", [0, 1])
def test_first_populations_are_the_published_ones(golden: Golden, case: int):
    arrays = golden("peers/cs_decode")
    slots = slots_of(str(arrays[f"pop_config_{case}"]))
    expected = unpacked(arrays[f"pop_{case}"], sum(slot.groups for slot in slots))
    made = first_population(len(expected), slots, np.random.RandomState(int(arrays[f"pop_seed_{case}"])))
    np.testing.assert_array_equal(made, expected)


def test_the_published_command_s_population(golden: Golden):
    """It shuffles the 50,000 training rows with the same generator before it draws the population."""
    slots = slots_of("simcnn_cifar10")
    generator = np.random.RandomState(1009)
    generator.shuffle(list(range(50_000)))
    expected = unpacked(golden("peers/cs_decode")["real_pop"], 940)
    np.testing.assert_array_equal(first_population(20, slots, generator), expected)


def test_probabilities_of_groups(golden: Golden):
    np.testing.assert_allclose(group_probabilities(10), golden("peers/cs_decode")["prob10"], rtol=1e-12)


def test_generations_are_the_published_ones(golden: Golden):
    arrays = golden("peers/cs_ga")
    _, _, parents, elites, mutated = arrays["cfg"].tolist()
    numpy_seed, python_seed = arrays["seeds"].tolist()
    generator, draws = np.random.RandomState(numpy_seed), random.Random(python_seed)
    population = arrays["pop"][0]
    for fitness, expected, order in zip(arrays["fitness"], arrays["pop"][1:], arrays["parents"], strict=True):
        np.testing.assert_array_equal(fittest(fitness, parents), order)
        population = next_generation(
            population, fitness, parents=parents, elites=elites, mutated=mutated, generator=generator, draws=draws
        )
        np.testing.assert_array_equal(population, expected)


def test_numbers_of_mutated_genes(golden: Golden):
    for genes, percent, count in golden("peers/cs_ga")["percent"].tolist():
        assert mutated_genes(genes, percent) == count


def test_a_gene_that_is_not_one_keeps_nothing():
    (mask,) = decode([[0, 1], [2, 0]], [Slot(4, 2)], [[3, 1, 0, 2]])
    np.testing.assert_array_equal(mask, [[True, False, True, False], [False] * 4])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Slot(4, 5), r"groups: expected a number in \[1, 4\], got 5"),
        (lambda: Slot(4, 0), "groups: expected a number"),
        (lambda: Slot(4, 2, ()), r"ratios: expected shares in \[0, 1\], at least one"),
        (lambda: Slot(4, 2, (1.5,)), "ratios: expected shares"),
        (lambda: decode([[1, 1, 1]], [Slot(4, 2)], [range(4)]), r"expected shape \(individuals, 2\) and 1 orders"),
        (lambda: decode([[1, 1]], [Slot(4, 2)], []), "and 1 orders, got"),
        (lambda: _bred(parents=5), "parents, elites, mutated: expected at most 4, 3 and 6, got 5, 1, 1"),
        (lambda: _bred(elites=4), "got 2, 4, 1"),
        (lambda: _bred(mutated=7), "got 2, 1, 7"),
    ],
)
def test_bad_numbers_are_named(make: Callable[[], object], message: str):
    with pytest.raises(ValueError, match=message):
        make()


def _bred(*, parents: int = 2, elites: int = 1, mutated: int = 1) -> np.ndarray:
    return next_generation(
        np.zeros((4, 6), np.uint8),
        np.zeros(4),
        parents=parents,
        elites=elites,
        mutated=mutated,
        generator=np.random.RandomState(0),
        draws=random.Random(0),
    )
