"""Labels become segments: which samples of a batch are of one class, worked out once per batch.

A *segment* is the set of samples of one class inside a batch. Everything the modular loss needs of the labels is
here, as tensors on the labels' own device and without a host synchronisation: the number of segments stays a device
value, so every per-segment array has room for N segments (each sample its own class) and is empty beyond the last
one. Memory therefore follows the batch, never the number of classes of the data set.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Segments(NamedTuple):
    """The samples of each class in a batch of N. Segments are numbered by ascending label.

    Operators of `torch.library` take the fields as a list of tensors, in this order.

    Attributes:
        order: (N,) int64, samples sorted by class, in batch order inside a class.
        offsets: (N + 1,) int64, segment g is `order[offsets[g]:offsets[g + 1]]`; N beyond the last segment.
        segment: (N,) int64, the segment of each sample.
        same_pairs: () int64, number of pairs i < j of one class.
        diff_pairs: () int64, number of pairs i < j of two classes.
    """

    order: Tensor
    offsets: Tensor
    segment: Tensor
    same_pairs: Tensor
    diff_pairs: Tensor

    @staticmethod
    def from_labels(labels: Tensor) -> Segments:
        """Segments of `labels`, (N,) of any integers: only equality matters."""
        samples = labels.shape[0]
        ordered, order = labels.long().sort(stable=True)
        starts = torch.ones_like(ordered)
        starts[1:] = ordered[1:] != ordered[:-1]
        ordinal = starts.cumsum(0) - 1
        segment = torch.empty_like(ordinal).scatter(0, order, ordinal)
        sizes = torch.zeros_like(ordinal).scatter_add(0, ordinal, torch.ones_like(ordinal))
        offsets = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
        same_pairs = (sizes * (sizes - 1)).sum() // 2
        diff_pairs = samples * (samples - 1) // 2 - same_pairs
        return Segments(order, offsets, segment, same_pairs, diff_pairs)
