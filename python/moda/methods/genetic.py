"""The genetic search of CNNSplitter (arXiv 2209.06116): chromosomes of neuron groups and their generations.

A chromosome decides for every group of neurons whether a module keeps it. Groups hold neurons of one layer (a *slot*)
that follow one another in order of importance. Draws come from NumPy's legacy generator and from Python's `random` in
the order of the published code, so that a search with its seeds repeats its populations.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

_WIDE = 256  # neurons from which a layer has more groups
_FEW_GROUPS, _MANY_GROUPS = 10, 100


def published_groups(neurons: int) -> int:
    """Return the number of groups of a layer: 10, or 100 from 256 neurons on; never more than it has neurons."""
    return min(neurons, _FEW_GROUPS if neurons < _WIDE else _MANY_GROUPS)


@dataclass(frozen=True)
class Slot:
    """A layer whose neurons a chromosome decides on.

    Attributes:
        neurons: the number of neurons.
        groups: the number of groups. Their sizes are as even as possible, and larger ones come first.
        ratios: the shares of groups that an individual of the first population may keep, each in [0, 1].
        sensitive: whether the slot is drawn for in the first round of an individual's draws.

    Raises:
        ValueError: a number is out of range.
    """

    neurons: int
    groups: int
    ratios: tuple[float, ...] = (1.0,)
    sensitive: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.groups <= self.neurons:
            raise ValueError(f"groups: expected a number in [1, {self.neurons}], got {self.groups}")
        if not self.ratios or not all(0 <= ratio <= 1 for ratio in self.ratios):
            raise ValueError(f"ratios: expected shares in [0, 1], at least one, got {self.ratios}")

    def group_of_rank(self) -> Integers:
        """Return the group of the neuron at each rank of importance, (neurons,) int64."""
        sizes = [len(part) for part in np.array_split(np.arange(self.neurons), self.groups)]
        return np.repeat(np.arange(self.groups), sizes)


def decode(genes: npt.ArrayLike, slots: Sequence[Slot], orders: Sequence[npt.ArrayLike]) -> list[Bools]:
    """Return which neurons chromosomes keep.

    Args:
        genes: (individuals, genes), the slots' genes side by side; a gene of 1 keeps its group.
        slots: the layers.
        orders: per slot the neurons in order of importance, (neurons,), most important first.

    Returns:
        Per slot (individuals, neurons) bool.

    Raises:
        ValueError: the number of genes or of orders does not fit the slots.
    """
    genes = np.asarray(genes)
    total = sum(slot.groups for slot in slots)
    if genes.ndim != 2 or genes.shape[1] != total or len(orders) != len(slots):
        raise ValueError(
            f"genes, orders: expected shape (individuals, {total}) and {len(slots)} orders, got {genes.shape} and "
            f"{len(orders)}"
        )
    kept, start = [], 0
    for slot, order in zip(slots, orders, strict=True):
        own = genes[:, start : start + slot.groups] == 1
        mask = np.zeros((len(genes), slot.neurons), bool)
        mask[:, np.asarray(order)] = own[:, slot.group_of_rank()]
        kept.append(mask)
        start += slot.groups
    return kept


def first_population(size: int, slots: Sequence[Slot], generator: np.random.RandomState) -> npt.NDArray[np.uint8]:
    """Draw the first population.

    Per individual, first for all sensitive slots and then for the others: a ratio of the slot's at random, then that
    share of its groups without replacement, with probabilities proportional to exp((groups - 1 - i) / 10) for group i.

    Returns:
        (size, genes) uint8 of 0 and 1.
    """
    starts = np.cumsum([0, *(slot.groups for slot in slots)])
    population = np.zeros((size, starts[-1]), np.uint8)
    drawn = [index for index, slot in enumerate(slots) if slot.sensitive]
    drawn += [index for index, slot in enumerate(slots) if not slot.sensitive]
    for individual in population:
        for index in drawn:
            slot = slots[index]
            count = int(slot.groups * generator.choice(slot.ratios))
            chosen = generator.choice(slot.groups, count, replace=False, p=group_probabilities(slot.groups))
            individual[starts[index] + chosen] = 1
    return population


def group_probabilities(groups: int) -> Floats:
    """Return the probability of each group to be drawn, (groups,): more important groups are likelier."""
    weights = np.exp((groups - 1 - np.arange(groups)) / 10)
    probabilities: Floats = weights / weights.sum()
    return probabilities


def mutated_genes(genes: int, percent: float) -> int:
    """Return how many genes of a child are drawn anew: floor(percent of the genes), at least 1."""
    return max(1, int(percent * genes / 100))


def fittest(fitness: npt.ArrayLike, count: int) -> Integers:
    """Return the individuals of highest fitness, (count,) int64, of equals the higher index first."""
    fitness = np.asarray(fitness)
    by_fitness = np.argsort(fitness, kind="stable")[::-1][:count]
    return by_fitness.astype(np.int64)


def next_generation(
    population: npt.NDArray[np.uint8],
    fitness: npt.ArrayLike,
    *,
    parents: int,
    elites: int,
    mutated: int,
    generator: np.random.RandomState,
    draws: random.Random,
) -> npt.NDArray[np.uint8]:
    """Breed the next population.

    The `elites` fittest are copied unchanged to the front. Child c takes its genes before a random point from parent
    c mod P and those from the point on from parent (c + 1) mod P, P being the number of parents, and then `mutated`
    distinct genes become random bits, half of which change on average.

    Args:
        population: (individuals, genes) of 0 and 1.
        fitness: (individuals,).
        parents: how many of the fittest become parents.
        elites: how many of the fittest live on.
        mutated: genes of a child that are drawn anew.
        generator: draws the crossover points.
        draws: draws the mutations.

    Returns:
        (individuals, genes) uint8.

    Raises:
        ValueError: a number does not fit the population.
    """
    individuals, genes = population.shape
    if not (1 <= parents <= individuals and 0 <= elites < individuals and 1 <= mutated <= genes):
        raise ValueError(
            f"parents, elites, mutated: expected at most {individuals}, {individuals - 1} and {genes}, got {parents}, "
            f"{elites}, {mutated}"
        )
    order = fittest(fitness, individuals)
    mothers, count = order[:parents], individuals - elites
    children = np.empty((count, genes), np.uint8)
    for child in range(count):
        point = int(generator.randint(0, genes))
        first, second = mothers[child % parents], mothers[(child + 1) % parents]
        children[child, :point] = population[first, :point]
        children[child, point:] = population[second, point:]
    for child in children:
        for gene in draws.sample(range(genes), mutated):
            child[gene] = draws.choice((0, 1))
    return np.concatenate([population[order[:elites]], children])
