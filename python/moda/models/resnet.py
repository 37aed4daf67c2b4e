"""ResNet with the small-image stem (3x3 convolution, no max-pooling), for images of any size."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from moda.checks import check_count
from moda.models.options import check_width, init_convolutions, scaled


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a skip connection; each ReLU call is a module of its own, so each is a tap."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Sequential | None = None
        if stride != 1:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
            )
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, inputs, H, W) to (N, outputs, ceil(H / stride), ceil(W / stride))."""
        identity = x if self.downsample is None else self.downsample(x)
        x = self.relu1(self.bn1(self.conv1(x)))
        y: Tensor = self.relu2(self.bn2(self.conv2(x)) + identity)
        return y


class ResNet(nn.Module):
    """ResNet of basic blocks in four stages; `resnet18` makes the published one.

    Args:
        widths: the neurons of the four stages; the stem has those of the first. From the second on, a stage halves the
            map.
        depths: the number of blocks in each stage.
        num_classes: the number of logits.
        in_channels: the channels of the images.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """

    def __init__(self, widths: Sequence[int], depths: Sequence[int], num_classes: int, in_channels: int) -> None:
        super().__init__()
        check_count("num_classes", num_classes)
        check_count("in_channels", in_channels)
        first, second, third, fourth = widths
        self.conv1 = nn.Conv2d(in_channels, first, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(first)
        self.relu1 = nn.ReLU()
        self.layer1 = _stage(first, first, depths[0], stride=1)
        self.layer2 = _stage(first, second, depths[1], stride=2)
        self.layer3 = _stage(second, third, depths[2], stride=2)
        self.layer4 = _stage(third, fourth, depths[3], stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(fourth, num_classes)
        init_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) images to (N, num_classes) logits."""
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits: Tensor = self.fc(self.flatten(self.avgpool(x)))
        return logits


def _stage(inputs: int, outputs: int, depth: int, stride: int) -> nn.Sequential:
    rest = [BasicBlock(outputs, outputs, 1) for _ in range(depth - 1)]
    return nn.Sequential(BasicBlock(inputs, outputs, stride), *rest)


def resnet18(num_classes: int = 10, in_channels: int = 3, width: float = 1.0) -> ResNet:
    """ResNet18 with the stem for small images, as published (also for 224 x 224 there).

    Args:
        num_classes: the number of logits.
        in_channels: the channels of the images.
        width: the multiplier of the stages' neurons (64, 128, 256, 512 at 1).

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    check_width(width)
    widths = [scaled(neurons, width) for neurons in (64, 128, 256, 512)]
    return ResNet(widths, (2, 2, 2, 2), num_classes, in_channels)
