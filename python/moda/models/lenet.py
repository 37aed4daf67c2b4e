"""LeNet5: two convolutions and three linear layers, no norms; the weak model of module replacement."""

from __future__ import annotations

from torch import Tensor, nn

from moda.checks import check_count
from moda.models.options import check_width, scaled


class LeNet5(nn.Module):
    """The network that `lenet5` makes."""

    def __init__(self, num_classes: int, in_channels: int, width: float, image_size: int) -> None:
        super().__init__()
        first, second, third, fourth = (scaled(neurons, width) for neurons in (6, 16, 120, 84))
        side = ((image_size - 4) // 2 - 4) // 2
        self.conv1 = nn.Conv2d(in_channels, first, 5)
        self.relu1 = nn.ReLU()
        self.pool1 = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(first, second, 5)
        self.relu2 = nn.ReLU()
        self.pool2 = nn.MaxPool2d(2)
        self.flatten = nn.Flatten()
        self.fc1 = nn.Linear(second * side * side, third)
        self.relu3 = nn.ReLU()
        self.fc2 = nn.Linear(third, fourth)
        self.relu4 = nn.ReLU()
        self.fc3 = nn.Linear(fourth, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, image_size, image_size) images to (N, num_classes) logits."""
        x = self.pool1(self.relu1(self.conv1(x)))
        x = self.pool2(self.relu2(self.conv2(x)))
        x = self.relu3(self.fc1(self.flatten(x)))
        logits: Tensor = self.fc3(self.relu4(self.fc2(x)))
        return logits


def lenet5(num_classes: int = 10, in_channels: int = 3, width: float = 1.0, image_size: int = 32) -> LeNet5:
    """LeNet5 with ReLU and max-pooling; PyTorch's default initialisation, as published.

    Args:
        num_classes: the number of logits.
        in_channels: the channels of the images.
        width: the multiplier of the hidden layers' neurons (6, 16, 120, 84 at 1).
        image_size: the height and width of the images, at least 16; the published one is 32.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    check_count("num_classes", num_classes)
    check_count("in_channels", in_channels)
    check_count("image_size", image_size, least=16)
    return LeNet5(num_classes, in_channels, check_width(width), image_size)
