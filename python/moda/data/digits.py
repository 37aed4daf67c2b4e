"""Loads scikit-learn's handwritten digits: 1797 real 8x8 images that come with the package, so no network is needed."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from moda.checks import check_count
from moda.data.splits import DataSplits, InMemory, require

MOST_SEED = (1 << 32) - 1
MOST_VALUES = 1 << 18
"""Numbers of an image at most: all images are in memory, 2 GiB with so many."""


def load(root: object, *, seed: int = 0, channels: int = 3, image_size: int = 8) -> DataSplits:
    """Load the digits with values in [0, 1], split 80/20 with equal shares of every class.

    Args:
        root: not used.
        seed: the seed of the split, in [0, 2^32).
        channels: the number of times the grey channel is repeated.
        image_size: the height and width; images are resized bilinearly unless it is 8.

    Raises:
        TypeError, ValueError: an argument is not as above.
        ImportError: scikit-learn is missing.
    """
    check_count("seed", seed, least=0, most=MOST_SEED)
    check_count("channels", channels)
    check_count("image_size", image_size)
    if channels * image_size**2 > MOST_VALUES:
        raise ValueError(
            f"image_size: expected images of at most {MOST_VALUES:,} values, got {channels} channels of {image_size} x "
            f"{image_size} pixels"
        )
    data_sets = require("sklearn.datasets", "digits", "train")
    selection = require("sklearn.model_selection", "digits", "train")
    digits = data_sets.load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    if image_size != images.shape[-1]:
        images = F.interpolate(images, size=(image_size, image_size), mode="bilinear", align_corners=False)
    images = images.repeat(1, channels, 1, 1)
    labels = torch.tensor(digits.target, dtype=torch.int64)
    indices = range(len(labels))
    train, test = selection.train_test_split(indices, test_size=0.2, stratify=digits.target, random_state=seed)
    train_split = InMemory(images[train], labels[train])
    return DataSplits(
        train=train_split,
        train_eval=train_split,
        test=InMemory(images[test], labels[test]),
        num_classes=10,
        class_names=tuple(str(digit) for digit in range(10)),
        input_shape=(channels, image_size, image_size),
    )
