"""Which part of a parameter stays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from moda.composition.values import Grid, Indices

__all__ = ["Kept"]


@dataclass(frozen=True)
class Kept:
    """What stays of a tensor: along each axis the positions listed, in their order; None is all of them."""

    axes: Grid = ()

    def along(self, dim: int) -> Indices | None:
        """Positions along an axis."""
        return self.axes[dim] if dim < len(self.axes) else None

    @property
    def rows(self) -> Indices | None:
        """Positions along the first axis."""
        return self.along(0)

    @property
    def columns(self) -> Indices | None:
        """Positions along the second axis."""
        return self.along(1)

    def shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of what stays of a tensor of this shape."""
        return tuple(
            size if (positions := self.along(dim)) is None else len(positions) for dim, size in enumerate(shape)
        )

    def count(self, shape: Sequence[int]) -> int:
        """Number of elements that stay of a tensor of this shape."""
        return prod(self.shape(shape))

    def of(self, tensor: Tensor) -> Tensor:
        """A view or copy of what stays."""
        part = tensor
        for dim, positions in enumerate(self.axes):
            if positions is not None:
                part = part.index_select(dim, torch.from_numpy(positions).to(tensor.device))
        return part
