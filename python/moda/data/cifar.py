"""Loads CIFAR-10 and CIFAR-100: 50,000 + 10,000 photographs of 32x32."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from moda.data.splits import DataSplits, Transformed, require
from moda.data.vision import Source, small_image_transforms


def load_cifar10(root: Path, *, augment: bool = True, download: bool = False) -> DataSplits:
    """Load CIFAR-10 from `<root>/cifar-10-batches-py`; the options are those of `load_cifar100`."""
    data_sets = require("torchvision.datasets", "cifar10", "vision")
    mean, std = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)
    transforms = small_image_transforms("cifar10", mean, std, augment)
    return _load("CIFAR-10", data_sets.CIFAR10, root, transforms, download)


def load_cifar100(root: Path, *, augment: bool = True, download: bool = False) -> DataSplits:
    """Load CIFAR-100 with its 100 fine classes from `<root>/cifar-100-python`.

    Args:
        root: the folder that holds it.
        augment: crop and flip training images at random, as published.
        download: fetch it if it is not there.

    Raises:
        FileNotFoundError: it is not there; ValueError: its files are not the published ones.
        ImportError: torchvision is missing.
    """
    data_sets = require("torchvision.datasets", "cifar100", "vision")
    mean, std = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
    transforms = small_image_transforms("cifar100", mean, std, augment)
    return _load("CIFAR-100", data_sets.CIFAR100, root, transforms, download)


def _load(title: str, kind: Any, root: Path, transforms: tuple[Any, Any], download: bool) -> DataSplits:
    source = Source(title, root / kind.base_folder, kind.url, f"unpack it in {root}")
    train = source.open(partial(kind, root, train=True, download=download), download)
    test = source.open(partial(kind, root, train=False), download)
    augmented, plain = transforms
    return DataSplits(
        train=Transformed(train, augmented),
        train_eval=Transformed(train, plain),
        test=Transformed(test, plain),
        num_classes=len(train.classes),
        class_names=tuple(train.classes),
        input_shape=(3, 32, 32),
    )
