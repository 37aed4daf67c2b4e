"""VGG with batch norm: plain stacks of 3x3 convolutions, flattened into hidden linear layers without pooling."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from moda.checks import check_count
from moda.models.options import check_width, init_convolutions, init_linears, scaled

POOL = -1
"""In a plan of convolution widths: 2x2 max-pooling."""

_VGG16 = (64, 64, POOL, 128, 128, POOL, 256, 256, 256, POOL, 512, 512, 512, POOL, 512, 512, 512, POOL)
_SMALL = (32, 32, POOL, 64, 64, POOL)


class VGG(nn.Module):
    """VGG of any plan; `vgg16` and `small_vgg` make two of them.

    Args:
        plan: the neurons of the convolutions in order, with `POOL` for a 2x2 max-pooling.
        hidden: the neurons of the hidden linear layers.
        num_classes: the number of logits.
        in_channels: the channels of the images.
        image_size: the height and width of the images, at least 2 to the number of poolings.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """

    def __init__(
        self, plan: Sequence[int], hidden: Sequence[int], num_classes: int, in_channels: int, image_size: int
    ) -> None:
        super().__init__()
        poolings = sum(neurons == POOL for neurons in plan)
        check_count("num_classes", num_classes)
        check_count("in_channels", in_channels)
        check_count("image_size", image_size, least=2**poolings)
        side = image_size // 2**poolings
        channels = [neurons for neurons in plan if neurons != POOL][-1]
        self.features = _features(plan, in_channels)
        self.flatten = nn.Flatten()
        self.classifier = _classifier([channels * side * side, *hidden, num_classes])
        init_convolutions(self)
        init_linears(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, image_size, image_size) images to (N, num_classes) logits."""
        logits: Tensor = self.classifier(self.flatten(self.features(x)))
        return logits


def _features(plan: Sequence[int], in_channels: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for neurons in plan:
        if neurons == POOL:
            layers.append(nn.MaxPool2d(2))
            continue
        layers += [nn.Conv2d(in_channels, neurons, 3, padding=1), nn.BatchNorm2d(neurons), nn.ReLU()]
        in_channels = neurons
    return nn.Sequential(*layers)


def _classifier(sizes: Sequence[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def vgg16(num_classes: int = 10, in_channels: int = 3, width: float = 1.0, image_size: int = 32) -> VGG:
    """VGG16 with batch norm and two hidden linear layers of 4096, no dropout, as published.

    Args:
        num_classes: the number of logits.
        in_channels: the channels of the images.
        width: the multiplier of the hidden layers' neurons.
        image_size: the height and width of the images, at least 32; published ones are 32 and 224.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    return _scaled_vgg(_VGG16, (4096, 4096), num_classes, in_channels, width, image_size)


def small_vgg(num_classes: int = 10, in_channels: int = 3, width: float = 1.0, image_size: int = 8) -> VGG:
    """The demo's VGG for the 8x8 digits: four convolutions, one hidden linear layer, 100,138 parameters.

    Args:
        num_classes: the number of logits.
        in_channels: the channels of the images.
        width: the multiplier of the hidden layers' neurons (32, 32, 64, 64, 128 at 1).
        image_size: the height and width of the images, at least 4.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    return _scaled_vgg(_SMALL, (128,), num_classes, in_channels, width, image_size)


def _scaled_vgg(
    plan: Sequence[int], hidden: Sequence[int], num_classes: int, in_channels: int, width: float, image_size: int
) -> VGG:
    check_width(width)
    plan = [neurons if neurons == POOL else scaled(neurons, width) for neurons in plan]
    return VGG(plan, [scaled(neurons, width) for neurons in hidden], num_classes, in_channels, image_size)
