"""SimCNN: thirteen plain 3x3 convolutions and three linear layers, of MwT, GradSplitter and CNNSplitter."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from moda.checks import check_count
from moda.models.options import (
    add_convolution,
    check_share,
    check_width,
    convolution_of,
    init_by_outputs,
    scaled,
)

_WIDTHS = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
_POOLED = frozenset({1, 3, 6, 9, 12})  # the convolutions that a 2x2 max-pooling follows
_REDUCTION = 2 ** len(_POOLED)


class SimCNN(nn.Module):
    """SimCNN of any widths; `simcnn` makes the published ones.

    Args:
        widths: the neurons of the thirteen convolutions.
        hidden: the neurons of the two hidden linear layers.
        num_classes: the number of logits.
        in_channels: the channels of the images.
        image_size: the height and width of the images, at least 32.
        batch_norm: whether a batch norm follows every convolution. The keys are then those of GradSplitter's
            checkpoints (`conv_0.0.weight`), otherwise those of MwT's and CNNSplitter's (`conv_0.weight`).
        dropout: the probability of dropout before both hidden linear layers, in [0, 1).

    Raises:
        TypeError, ValueError: an argument is not as above.
    """

    def __init__(
        self,
        widths: Sequence[int],
        hidden: Sequence[int],
        num_classes: int,
        in_channels: int,
        image_size: int,
        *,
        batch_norm: bool = False,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        if len(widths) != len(_WIDTHS) or len(hidden) != 2:
            raise ValueError(
                f"widths, hidden: expected {len(_WIDTHS)} and 2 numbers, got {len(widths)} and {len(hidden)}"
            )
        check_count("num_classes", num_classes)
        check_count("in_channels", in_channels)
        check_count("image_size", image_size, least=_REDUCTION)
        self.dropout = check_share("dropout", dropout)
        for index, (inputs, outputs) in enumerate(zip((in_channels, *widths), widths, strict=False)):
            add_convolution(self, index, inputs, outputs, batch_norm=batch_norm)
        first, second = hidden
        self.fc_13 = nn.Linear(widths[-1] * (image_size // _REDUCTION) ** 2, first)
        self.relu_13 = nn.ReLU()
        self.fc_14 = nn.Linear(first, second)
        self.relu_14 = nn.ReLU()
        self.fc_15 = nn.Linear(second, num_classes)
        init_by_outputs(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, image_size, image_size) images to (N, num_classes) logits."""
        for index in range(len(_WIDTHS)):
            x = convolution_of(self, index, x)
            if index in _POOLED:
                x = F.max_pool2d(x, 2)
        x = F.dropout(x.flatten(1), self.dropout, self.training)
        x = F.dropout(self.relu_13(self.fc_13(x)), self.dropout, self.training)
        logits: Tensor = self.fc_15(self.relu_14(self.fc_14(x)))
        return logits


def simcnn(
    num_classes: int = 10,
    in_channels: int = 3,
    width: float = 1.0,
    image_size: int = 32,
    *,
    batch_norm: bool = False,
    dropout: float = 0.5,
) -> SimCNN:
    """SimCNN as published: plain with hidden layers of 512 (MwT, CNNSplitter), or normed with 4096 (GradSplitter).

    Args:
        num_classes: the number of logits.
        in_channels: the channels of the images.
        width: the multiplier of the hidden layers' neurons.
        image_size: the height and width of the images, at least 32.
        batch_norm: whether a batch norm follows every convolution.
        dropout: the probability of dropout before both hidden linear layers, in [0, 1).

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    check_width(width)
    hidden = scaled(4096 if batch_norm else 512, width)
    widths = [scaled(neurons, width) for neurons in _WIDTHS]
    return SimCNN(
        widths, (hidden, hidden), num_classes, in_channels, image_size, batch_norm=batch_norm, dropout=dropout
    )
