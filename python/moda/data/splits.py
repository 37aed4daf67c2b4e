"""Defines what a data set consists of, and the views of it that training and counting need."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

Sample = tuple[Tensor, int]


@dataclass(frozen=True)
class DataSplits:
    """A data set, ready for training. Samples are (image, class): float32 (C, H, W) and an int in [0, num_classes).

    Attributes:
        train: the training split, augmented where the data set is.
        train_eval: the training split seen as the test split is: not augmented, the same every time.
        test: the test split.
        num_classes: the number of classes, K.
        class_names: the K names.
        input_shape: (C, H, W).
    """

    train: Dataset[Any]
    train_eval: Dataset[Any]
    test: Dataset[Any]
    num_classes: int
    class_names: tuple[str, ...]
    input_shape: tuple[int, int, int]

    def for_firing_rates(self, *, augmented: bool = False) -> Dataset[Any]:
        """Return the split to count firings over.

        By default it is not augmented, so that a decomposition is a function of model and data. With `augmented` it is
        the
        split that training sees, as in the published code, whose rates are one random draw.
        """
        return self.train if augmented else self.train_eval


class InMemory(TensorDataset):
    """A data set whose images are one tensor.

    Args:
        images: (N, C, H, W) float32.
        labels: (N,) int64.
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        super().__init__(images, labels)

    def __getitem__(self, index: Any) -> Any:
        """Return image and class (an int) for an int, images and classes of a whole batch for a tensor of indices."""
        images, labels = (tensor[index] for tensor in self.tensors)
        return images, labels if labels.dim() else int(labels)


class Transformed(Dataset[Sample]):
    """A data set of (picture, class) with a transform of the pictures; several may share one data set."""

    def __init__(self, pictures: Any, transform: Callable[[Any], Tensor]) -> None:
        self.pictures = pictures
        self.transform = transform

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> Sample:
        picture, label = self.pictures[index]
        return self.transform(picture), int(label)


def require(module: str, data_set: str, extra: str) -> Any:
    """Import and return a module that only some data sets need.

    Raises:
        ImportError: it cannot be imported; the message says what to install.
    """
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"data set {data_set!r} needs {package}, which cannot be imported ({error}); "
            f"install it: pip install moda-kernels[{extra}]"
        ) from error
    except RuntimeError as error:  # torchvision's words when it was built for another torch
        raise ImportError(
            f"data set {data_set!r} needs {package}, which does not fit the torch that is installed ({error}); "
            "install both from one release and one index"
        ) from error
