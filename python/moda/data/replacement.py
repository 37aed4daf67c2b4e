"""Makes the data of the module-replacement study: a strong and a weak model's (arXiv 2411.01074)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from moda.checks import Bounds, check_count, check_number, one_of
from moda.data.splits import DataSplits, InMemory

PARTS = ("strong", "weak")


class Selected(Dataset[Any]):
    """A data set of some samples of another one, in a given order and under other class indices.

    Args:
        dataset: the data set of (image, class).
        indices: the indices of the samples.
        classes: maps a class in the data set to the class here.
    """

    def __init__(self, dataset: Dataset[Any], indices: Sequence[int], classes: Mapping[int, int]) -> None:
        self.dataset = dataset
        self.indices = list(indices)
        self.classes = dict(classes)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.dataset[self.indices[index]]
        return image, self.classes[int(label)]


def replacement_part(
    splits: DataSplits, part: str, mixed_class: int, *, fraction: float = 0.1, seed: int = 42
) -> DataSplits:
    """Make one side of the published replacement protocol from a data set of K classes.

    The first K // 2 classes are the strong ones. "strong": all samples of those, labels unchanged, augmented as the
    data set is; it does not depend on `mixed_class`. "weak": `fraction` of the training samples of each other class,
    labels from 0, and of `mixed_class`, which comes last; shuffled once, not augmented; the test split has all test
    samples of these classes.

    Args:
        splits: the data set, of at least 4 classes.
        part: "strong" or "weak".
        mixed_class: the strong class that the weak model is to know too.
        fraction: share of the training samples of each class that the weak model sees, in (0, 1]; published: 0.1.
        seed: the seed of the choice and order of the weak samples.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    if not isinstance(splits, DataSplits):
        raise TypeError(f"splits: expected a DataSplits, got {type(splits).__name__}")
    strong = range(splits.num_classes // 2)
    if splits.num_classes < 4:
        raise ValueError(f"splits: expected at least 4 classes, got {splits.num_classes}")
    one_of(PARTS)("part", part)
    check_count("mixed_class", mixed_class, least=0)
    check_number("fraction", fraction, Bounds(above=0, at_most=1))
    check_count("seed", seed, least=0)
    if mixed_class not in strong:
        raise ValueError(f"mixed_class: expected a strong class, in [0, {len(strong)}), got {mixed_class}")
    if part == "strong":
        return _restricted(splits, list(strong))
    classes = [*range(len(strong), splits.num_classes), mixed_class]
    weak = _restricted(splits, classes)
    chosen = _sample(labels_of(splits.train_eval), classes, fraction, seed)
    train = _selected(splits.train_eval, chosen, classes)
    return replace(weak, train=train, train_eval=train)


def labels_of(dataset: Dataset[Any]) -> Tensor:
    """Return the (n,) int64 classes of a data set, without decoding its images where it keeps them apart."""
    if isinstance(dataset, TensorDataset):
        return dataset.tensors[1].long()
    pictures = getattr(dataset, "pictures", dataset)
    for name in ("targets", "labels"):
        if hasattr(pictures, name):
            return torch.as_tensor(getattr(pictures, name)).long()
    return torch.tensor([int(dataset[index][1]) for index in range(len(dataset))])  # type: ignore[arg-type]


def _restricted(splits: DataSplits, classes: Sequence[int]) -> DataSplits:
    """Return all samples of some classes, which are numbered in the order given."""

    def of_classes(dataset: Dataset[Any]) -> Dataset[Any]:
        members = torch.isin(labels_of(dataset), torch.tensor(classes)).nonzero().flatten().tolist()
        return _selected(dataset, members, classes)

    return DataSplits(
        train=of_classes(splits.train),
        train_eval=of_classes(splits.train_eval),
        test=of_classes(splits.test),
        num_classes=len(classes),
        class_names=tuple(splits.class_names[k] for k in classes),
        input_shape=splits.input_shape,
    )


def _selected(dataset: Dataset[Any], indices: Sequence[int], classes: Sequence[int]) -> Dataset[Any]:
    mapping = {k: position for position, k in enumerate(classes)}
    if not isinstance(dataset, TensorDataset):
        return Selected(dataset, indices, mapping)
    images, labels = (tensor[torch.tensor(indices)] for tensor in dataset.tensors)
    return InMemory(images, torch.tensor([mapping[int(label)] for label in labels]))


def _sample(labels: Tensor, classes: Sequence[int], fraction: float, seed: int) -> list[int]:
    """Draw floor(fraction * count) samples of each class without replacement, in random order."""
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for k in classes:
        members = (labels == k).nonzero().flatten()
        order = torch.randperm(len(members), generator=generator)
        chosen.append(members[order[: int(fraction * len(members))]])
    indices = torch.cat(chosen)
    return indices[torch.randperm(len(indices), generator=generator)].tolist()
