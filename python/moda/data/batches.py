"""Loads training batches whose order and augmentation depend on (seed, epoch) and nothing else.

A training that stops after any step therefore continues with exactly the batches it would have had, however many
processes load them; no state of a random generator has to be saved.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, TensorDataset, default_collate

Samples: TypeAlias = "tuple[int, list[int]]"  # epoch, indices
Batch: TypeAlias = "tuple[Tensor, Tensor]"  # images, labels


class EpochOrder(Sampler[Samples]):
    """A process's share of every batch of an epoch, in the epoch's own random order.

    Batches are cut from the order common to all processes; process `rank` gets every `world_size`-th sample of each.
    Processes step together, and so all have the same number of batches: a last batch too small to give each a sample
    is left out in training, and joined with the one before in testing.

    Args:
        size: the number of samples in the data set.
        batch_size: the samples per batch over all processes together; it and `size` are at least `world_size`.
        seed: the seed of the order; None gives ascending order, for testing.
        rank: the index of this process.
        world_size: the number of processes.
    """

    def __init__(self, size: int, batch_size: int, seed: int | None, rank: int = 0, world_size: int = 1) -> None:
        self.size = size
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self.start = 0  # batches of this epoch that are done already

    def set_epoch(self, epoch: int) -> None:
        """Begin this epoch; in the epoch that was resumed, go on behind the batches that are done already."""
        if epoch != self.epoch:
            self.epoch, self.start = epoch, 0

    def __len__(self) -> int:
        full, rest = divmod(self.size, self.batch_size)
        return full + (rest >= self.world_size)

    def weight(self, batch: int) -> float:
        """Return the factor for this process's mean over its share that makes the processes' mean the batch's mean."""
        samples = min(self.batch_size, self.size - batch * self.batch_size)
        return len(range(self.rank, samples, self.world_size)) * self.world_size / samples

    def __iter__(self) -> Iterator[Samples]:
        order = epoch_order(self.size, self.seed, self.epoch)
        batches = list(order[: len(self) * self.batch_size].split(self.batch_size))
        if self.seed is None:
            batches[-1] = order[(len(self) - 1) * self.batch_size :]
        for indices in batches[self.start :]:
            yield self.epoch, indices[self.rank :: self.world_size].tolist()


def epoch_order(size: int, seed: int | None, epoch: int) -> Tensor:
    """Return the order of the samples in an epoch, (size,) int64."""
    if seed is None:
        return torch.arange(size)
    return torch.randperm(size, generator=torch.Generator().manual_seed(_mix(seed, epoch)))


def _mix(*numbers: int) -> int:
    """Mix several numbers into a 63-bit seed; different tuples give unrelated generators."""
    state = 0x9E3779B97F4A7C15
    for number in numbers:
        state = (state ^ number) * 0xBF58476D1CE4E5B9 % 2**64
        state ^= state >> 31
    return state >> 1


class SampleBatches(Dataset[Batch]):
    """A data set of whole batches, fetched by (epoch, indices).

    Samples of a `TensorDataset` are taken in one go. Any other data set may transform its samples at random, so each is
    drawn with the random generator seeded from (seed, epoch, index).
    """

    def __init__(self, dataset: Dataset[Any], seed: int | None) -> None:
        self.dataset = dataset
        self.seed = seed

    def __getitem__(self, samples: Samples) -> Batch:
        epoch, indices = samples
        if isinstance(self.dataset, TensorDataset):
            return cast(Batch, self.dataset[torch.tensor(indices)])
        if self.seed is None:
            return cast(Batch, tuple(default_collate([self.dataset[index] for index in indices])))
        with torch.random.fork_rng(devices=[]):
            return cast(Batch, tuple(default_collate([self._draw(epoch, index) for index in indices])))

    def _draw(self, epoch: int, index: int) -> Any:
        torch.default_generator.manual_seed(_mix(cast(int, self.seed), epoch, index))
        return self.dataset[index]


class BatchLoader(DataLoader[Batch]):
    """A data loader that knows its epoch and its place in it, and can return to them.

    Its `state_dict` counts the batches handed out. Lightning fetches none ahead of a loader of known length, so these
    are the batches trained on.
    """

    def __init__(self, dataset: Dataset[Any], order: EpochOrder, *, num_workers: int = 0, pin_memory: bool = False):
        super().__init__(
            SampleBatches(dataset, order.seed),
            sampler=order,
            batch_size=None,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=pin_memory,
            generator=torch.Generator(),  # a generator of its own, so that loading draws nothing from the global one
        )
        self.order = order
        self.done = 0

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        self.done = self.order.start
        for batch in super().__iter__():
            self.done += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return the epoch and how many of its batches are done."""
        return {"epoch": self.order.epoch, "done": self.done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on behind the batches that `state` says are done."""
        self.order.epoch, self.order.start = state["epoch"], state["done"]


class Passes:
    """A loader whose every pass is the next epoch's, for loops that do not count epochs.

    Args:
        loader: in random order; its first pass is that of its present epoch.
    """

    def __init__(self, loader: BatchLoader) -> None:
        self.loader = loader
        self._next = loader.order.epoch

    def __iter__(self) -> Iterator[Batch]:
        self.loader.order.set_epoch(self._next)
        self._next += 1
        yield from self.loader
