"""InceCNN: three plain convolutions and three groups of parallel ones, GradSplitter's network with branches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moda.checks import check_count
from moda.models.options import add_convolution, check_share, check_width, convolution_of, scaled

_STEM = (64, 128, 256)
_GROUPS = ((256, 256, 64), (512, 512, 64), (512, 512, 64))
_KERNELS = (1, 3, 5)  # of the parallel convolutions of a group


class InceCNN(nn.Module):
    """InceCNN of any widths; `incecnn` makes the published one.

    Args:
        stem: the neurons of the three plain 3x3 convolutions; a 2x2 max-pooling follows them.
        groups: the neurons of the parallel 1x1, 3x3 and 5x5 convolutions of each of the three groups. A 2x2 max-pooling
            follows all but the last.
        num_classes: the number of logits.
        in_channels: the channels of the images.
        dropout: the probability of dropout before the linear layer, in [0, 1).

    Raises:
        TypeError, ValueError: an argument is not as above.
    """

    def __init__(
        self,
        stem: Sequence[int],
        groups: Sequence[Sequence[int]],
        num_classes: int,
        in_channels: int,
        *,
        dropout: float = 0.4,
    ) -> None:
        super().__init__()
        if len(stem) != 3 or [len(group) for group in groups] != [3, 3, 3]:
            raise ValueError(f"stem, groups: expected 3 and 3 times 3 numbers, got {tuple(stem)} and {tuple(groups)}")
        check_count("num_classes", num_classes)
        check_count("in_channels", in_channels)
        check_share("dropout", dropout)
        inputs = in_channels
        for index, outputs in enumerate(stem):
            add_convolution(self, index, inputs, outputs, batch_norm=True)
            inputs = outputs
        for place, group in enumerate(groups):
            for branch, (outputs, kernel) in enumerate(zip(group, _KERNELS, strict=True)):
                add_convolution(self, 3 + 3 * place + branch, inputs, outputs, kernel, batch_norm=True)
            inputs = sum(group)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(dropout)
        self.fc_12 = nn.Linear(inputs, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) images, H and W at least 8, to (N, num_classes) logits."""
        for index in range(3):
            x = convolution_of(self, index, x)
        for place in range(3):
            x = F.max_pool2d(x, 2)
            x = torch.cat([convolution_of(self, 3 + 3 * place + branch, x) for branch in range(3)], 1)
        logits: Tensor = self.fc_12(self.dropout(self.avgpool(x).flatten(1)))
        return logits


def incecnn(num_classes: int = 10, in_channels: int = 3, width: float = 1.0, *, dropout: float = 0.4) -> InceCNN:
    """InceCNN with batch norm, as published, for images of any size from 8x8 on.

    Args:
        num_classes: the number of logits.
        in_channels: the channels of the images.
        width: the multiplier of the hidden layers' neurons.
        dropout: the probability of dropout before the linear layer, in [0, 1).

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    check_width(width)
    stem = [scaled(neurons, width) for neurons in _STEM]
    groups = [[scaled(neurons, width) for neurons in group] for group in _GROUPS]
    return InceCNN(stem, groups, num_classes, in_channels, dropout=dropout)
