"""Loads SVHN: 73,257 + 26,032 photographed house-number digits of 32x32 (without the extra split, as published)."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from moda.data.splits import DataSplits, Transformed, require
from moda.data.vision import IMAGENET_MEAN, IMAGENET_STD, Source, small_image_transforms


def load(root: Path, *, augment: bool = True, download: bool = False) -> DataSplits:
    """Load SVHN from `<root>/train_32x32.mat` and `<root>/test_32x32.mat`.

    Args:
        root: the folder that holds the two files.
        augment: crop and flip training images at random, as published (which flips digits too).
        download: fetch the files if they are not there.

    Raises:
        FileNotFoundError: a file is not there; ValueError: it is not the published one.
        ImportError: torchvision or SciPy is missing.
    """
    data_sets = require("torchvision.datasets", "svhn", "vision")
    require("scipy.io", "svhn", "vision")
    augmented, plain = small_image_transforms("svhn", IMAGENET_MEAN, IMAGENET_STD, augment)
    splits = {}
    for split in ("train", "test"):
        url, file = data_sets.SVHN.split_list[split][:2]
        source = Source(f"SVHN ({split})", root / file, url, f"put it in {root}")
        splits[split] = source.open(partial(data_sets.SVHN, root, split=split, download=download), download)
    return DataSplits(
        train=Transformed(splits["train"], augmented),
        train_eval=Transformed(splits["train"], plain),
        test=Transformed(splits["test"], plain),
        num_classes=10,
        class_names=tuple(str(digit) for digit in range(10)),
        input_shape=(3, 32, 32),
    )
