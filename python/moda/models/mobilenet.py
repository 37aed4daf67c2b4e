"""MobileNet (the first one): thirteen blocks of a depthwise and a pointwise convolution, for images of any size."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from moda.checks import check_count
from moda.models.options import check_width, init_convolutions, init_linears, scaled

_STEM = 32
_BLOCKS = (
    (64, 1),
    (128, 2),
    (128, 1),
    (256, 2),
    (256, 1),
    (512, 2),
    (512, 1),
    (512, 1),
    (512, 1),
    (512, 1),
    (512, 1),
    (1024, 2),
    (1024, 1),
)
"""Neurons of the pointwise convolution and stride of the depthwise one, block by block."""


class DepthwiseBlock(nn.Module):
    """A depthwise 3x3 and a pointwise convolution, each with batch norm and ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, inputs, 3, stride=stride, padding=1, groups=inputs, bias=False)
        self.bn1 = nn.BatchNorm2d(inputs)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(inputs, outputs, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, inputs, H, W) to (N, outputs, ceil(H / stride), ceil(W / stride))."""
        x = self.relu1(self.bn1(self.conv1(x)))
        y: Tensor = self.relu2(self.bn2(self.conv2(x)))
        return y


class MobileNet(nn.Module):
    """MobileNet of any plan; `mobilenet` makes the published one.

    Args:
        stem: the neurons of the first convolution.
        blocks: each block's neurons (of the pointwise convolution) and stride (of the depthwise one).
        num_classes: the number of logits.
        in_channels: the channels of the images.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """

    def __init__(self, stem: int, blocks: Sequence[tuple[int, int]], num_classes: int, in_channels: int) -> None:
        super().__init__()
        check_count("num_classes", num_classes)
        check_count("in_channels", in_channels)
        widths = [stem, *(neurons for neurons, _ in blocks)]
        strides = [stride for _, stride in blocks]
        self.conv1 = nn.Conv2d(in_channels, stem, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.relu1 = nn.ReLU()
        self.layers = nn.Sequential(
            *(DepthwiseBlock(*ends, stride) for ends, stride in zip(pairwise(widths), strides, strict=True))
        )
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.linear = nn.Linear(widths[-1], num_classes)
        init_convolutions(self)
        init_linears(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) images to (N, num_classes) logits."""
        x = self.layers(self.relu1(self.bn1(self.conv1(x))))
        logits: Tensor = self.linear(self.flatten(self.avgpool(x)))
        return logits


def mobilenet(num_classes: int = 10, in_channels: int = 3, width: float = 1.0) -> MobileNet:
    """MobileNet with a stem of stride 1, as published.

    Args:
        num_classes: the number of logits.
        in_channels: the channels of the images.
        width: the multiplier of the hidden layers' neurons (32 in the stem to 1024 at the end at 1).

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    check_width(width)
    blocks = [(scaled(neurons, width), stride) for neurons, stride in _BLOCKS]
    return MobileNet(scaled(_STEM, width), blocks, num_classes, in_channels)
