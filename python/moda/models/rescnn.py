"""ResCNN: twelve 3x3 convolutions with three skip connections, of MwT, GradSplitter and CNNSplitter."""

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

_WIDTHS = (64, 128, 128, 128, 256, 512, 512, 512, 512, 512, 512, 512)
_POOLED = frozenset({1, 4, 5, 8, 9})  # the convolutions that a 2x2 max-pooling follows
_SOURCES = {3: 1, 7: 5, 11: 9}  # a convolution, and the one whose pooled output is added to its own
_REDUCTION = 2 ** len(_POOLED)


class ResCNN(nn.Module):
    """ResCNN of any widths; `rescnn` makes the published ones.

    The (pooled) output of convolutions 1, 5 and 9 is added to the rectified output of convolutions 3, 7 and 11; no ReLU
    follows the addition.

    Args:
        widths: the neurons of the twelve convolutions; 1 and 3, 5 and 7, 9 and 11 have as many.
        num_classes: the number of logits.
        in_channels: the channels of the images.
        image_size: the height and width of the images, at least 32.
        batch_norm: whether a batch norm follows every convolution. The linear layer's keys are then those of
            GradSplitter's checkpoints (`fc_12.weight`), otherwise those of MwT's and CNNSplitter's
            (`classifier.2.weight`).
        dropout: the probability of dropout before the linear layer, in [0, 1).

    Raises:
        TypeError, ValueError: an argument is not as above.
    """

    def __init__(
        self,
        widths: Sequence[int],
        num_classes: int,
        in_channels: int,
        image_size: int,
        *,
        batch_norm: bool = False,
        dropout: float = 0.4,
    ) -> None:
        super().__init__()
        if len(widths) != len(_WIDTHS) or any(widths[last] != widths[first] for last, first in _SOURCES.items()):
            raise ValueError(f"widths: expected 12 numbers, equal where outputs are added, got {tuple(widths)}")
        check_count("num_classes", num_classes)
        check_count("in_channels", in_channels)
        check_count("image_size", image_size, least=_REDUCTION)
        check_share("dropout", dropout)
        for index, (inputs, outputs) in enumerate(zip((in_channels, *widths), widths, strict=False)):
            add_convolution(self, index, inputs, outputs, batch_norm=batch_norm, nested=True)
        features = widths[-1] * (image_size // _REDUCTION) ** 2
        self.batch_norm = batch_norm
        if batch_norm:
            self.dropout = nn.Dropout(dropout)
            self.fc_12 = nn.Linear(features, num_classes)
        else:
            self.classifier = nn.Sequential(nn.Flatten(), nn.Dropout(dropout), nn.Linear(features, num_classes))
        init_by_outputs(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, image_size, image_size) images to (N, num_classes) logits."""
        sources: dict[int, Tensor] = {}
        for index in range(len(_WIDTHS)):
            x = convolution_of(self, index, x)
            if index in _POOLED:
                x = F.max_pool2d(x, 2)
            if index in _SOURCES:
                x = x + sources.pop(_SOURCES[index])
            if index in _SOURCES.values():
                sources[index] = x
        logits: Tensor = self.fc_12(self.dropout(x.flatten(1))) if self.batch_norm else self.classifier(x)
        return logits


def rescnn(
    num_classes: int = 10,
    in_channels: int = 3,
    width: float = 1.0,
    image_size: int = 32,
    *,
    batch_norm: bool = False,
    dropout: float = 0.4,
) -> ResCNN:
    """ResCNN as published: without batch norm (MwT with a dropout of 0.5, CNNSplitter), or with it (GradSplitter).

    Args:
        num_classes: the number of logits.
        in_channels: the channels of the images.
        width: the multiplier of the hidden layers' neurons.
        image_size: the height and width of the images, at least 32.
        batch_norm: whether a batch norm follows every convolution.
        dropout: the probability of dropout before the linear layer, in [0, 1).

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    check_width(width)
    widths = [scaled(neurons, width) for neurons in _WIDTHS]
    return ResCNN(widths, num_classes, in_channels, image_size, batch_norm=batch_norm, dropout=dropout)
