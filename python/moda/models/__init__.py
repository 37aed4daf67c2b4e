"""Makes the published architectures, with the published checkpoints' state_dict keys, and a small one for the demo."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from moda.checks import check_count, one_of
from moda.lazy import submodules
from moda.models.incecnn import incecnn
from moda.models.lenet import lenet5
from moda.models.mobilenet import mobilenet
from moda.models.rescnn import rescnn
from moda.models.resnet import resnet18
from moda.models.simcnn import simcnn
from moda.models.vgg import small_vgg, vgg16
from moda.models.vit import deit_small, vit_small

__all__ = [
    "NAMES",
    "create",
    "deit_small",
    "incecnn",
    "lenet5",
    "mobilenet",
    "rescnn",
    "resnet18",
    "simcnn",
    "small_vgg",
    "vgg16",
    "vit_small",
]

_OF_ONE_SIZE: dict[str, Callable[..., nn.Module]] = {
    "lenet5": lenet5,
    "vgg16": vgg16,
    "small_vgg": small_vgg,
    "simcnn": simcnn,
    "simcnn_bn": partial(simcnn, batch_norm=True),  # GradSplitter's
    "rescnn": rescnn,
    "vit_small": vit_small,
    "deit_small": deit_small,
}
_OF_ANY_SIZE: dict[str, Callable[..., nn.Module]] = {
    "resnet18": resnet18,
    "mobilenet": mobilenet,
    "incecnn": incecnn,
}

MOST_PARAMETERS = 1 << 31
"""What `create` makes at most: 8 GiB of weights, some hundred times the largest published model here."""
WIDE, LARGE = 2, 512
"""Width, and image size, classes and channels, above which models are counted before they are made."""
LARGEST = 1 << 24
"""Of a size: with larger ones the shapes of tensors leave the range of integers."""

NAMES: tuple[str, ...] = (*_OF_ONE_SIZE, *_OF_ANY_SIZE)
"""What `create` knows."""


def create(
    name: str, *, num_classes: int = 10, in_channels: int = 3, width: float = 1.0, image_size: int | None = None
) -> nn.Module:
    """Create a freshly initialised model by name.

    Args:
        name: one of `NAMES`.
        num_classes: the number of logits.
        in_channels: the channels of the images.
        width: the multiplier of the hidden layers' neurons.
        image_size: the height and width of the images; None means the model's own. Models that end in adaptive
            pooling (resnet18, mobilenet, incecnn) are the same for all sizes.

    Raises:
        ValueError: the name is unknown, a number out of range, or the model would have more than `MOST_PARAMETERS`.
        TypeError: an argument is of the wrong type.

    Examples:
        >>> import torch
        >>> model = create("small_vgg", num_classes=4, width=0.25)
        >>> model(torch.zeros(2, 3, 8, 8)).shape
        torch.Size([2, 4])
    """
    one_of(NAMES)("name", name)
    check_count("num_classes", num_classes, most=LARGEST)
    check_count("in_channels", in_channels, most=LARGEST)
    if image_size is not None:
        check_count("image_size", image_size, most=LARGEST)
    options: dict[str, Any] = {"num_classes": num_classes, "in_channels": in_channels, "width": width}
    if name in _OF_ONE_SIZE and image_size is not None:
        options["image_size"] = image_size
    make = _OF_ANY_SIZE.get(name) or _OF_ONE_SIZE[name]
    if _may_be_large(width, WIDE) or any(_may_be_large(size, LARGE) for size in (image_size, num_classes, in_channels)):
        _check_size(make, options)
    return make(**options)


def _may_be_large(value: Any, usual: int) -> bool:
    return isinstance(value, int | float) and value > usual


def _check_size(make: Callable[..., nn.Module], options: dict[str, Any]) -> None:
    """Count the parameters of a model that takes no memory: the numbers may be those of a file from elsewhere."""
    width = options["width"]
    sizes = {size: value for size, value in options.items() if size != "width"}
    name = "width" if _may_be_large(width, WIDE) else max(sizes, key=lambda size: int(sizes[size]))
    expected = f"{name}: expected a model of at most {MOST_PARAMETERS:,} parameters, got {options[name]}"
    if _may_be_large(width, MOST_PARAMETERS) and width < math.inf:  # tensors cannot even have such shapes
        raise ValueError(expected)
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in make(**options).parameters())
    if count > MOST_PARAMETERS:
        raise ValueError(f"{expected}, with which it has {count:,}")


__getattr__ = submodules(__name__)
