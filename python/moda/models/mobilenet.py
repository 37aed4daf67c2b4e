"""MobileNet (the first one): thirteen blocks of a depthwise and a pointwise convolution, for images of any size."""

from __future__ import annotations

from torch import Tensor, nn

from moda.models.options import check_count, check_width, init_convolutions, init_linears, scaled

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
        """(N, inputs, H, W) -> (N, outputs, ceil(H / stride), ceil(W / stride))."""
        x = self.relu1(self.bn1(self.conv1(x)))
        y: Tensor = self.relu2(self.bn2(self.conv2(x)))
        return y


class MobileNet(nn.Module):
    """See `mobilenet`."""

    def __init__(self, num_classes: int, in_channels: int, width: float) -> None:
        super().__init__()
        neurons = scaled(_STEM, width)
        self.conv1 = nn.Conv2d(in_channels, neurons, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(neurons)
        self.relu1 = nn.ReLU()
        blocks: list[nn.Module] = []
        for outputs, stride in _BLOCKS:
            blocks.append(DepthwiseBlock(neurons, scaled(outputs, width), stride))
            neurons = scaled(outputs, width)
        self.layers = nn.Sequential(*blocks)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.linear = nn.Linear(neurons, num_classes)
        init_convolutions(self)
        init_linears(self)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, num_classes) logits."""
        x = self.layers(self.relu1(self.bn1(self.conv1(x))))
        logits: Tensor = self.linear(self.flatten(self.avgpool(x)))
        return logits


def mobilenet(num_classes: int = 10, in_channels: int = 3, width: float = 1.0) -> MobileNet:
    """MobileNet with a stem of stride 1, as published.

    Args:
        num_classes: logits.
        in_channels: channels of the images.
        width: multiplier of the hidden layers' neurons (32 in the stem to 1024 at the end at 1).

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    check_count("num_classes", num_classes)
    check_count("in_channels", in_channels)
    return MobileNet(num_classes, in_channels, check_width(width))
