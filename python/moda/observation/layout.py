"""Where an activation has its samples and its neurons, and the way to `(N, C, *positions)` and back."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Axes of an activation.

    Attributes:
        dims: how many axes it has.
        samples: the axis along which samples lie.
        neurons: the axis along which neurons lie.
        folded: whether several rows along `samples` belong to each sample (windows, frames).
        outermost: whether the rows of one sample follow each other; else samples follow each other, and again.
        plain: whether the activation is as it is `(N, C, *positions)`.
    """

    dims: int
    samples: int = 0
    neurons: int = 1
    folded: bool = False
    outermost: bool = True
    plain: bool = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "plain", self.samples == 0 and self.neurons == 1 and not self.folded)

    def rows(self, value: Tensor, count: int) -> Tensor:
        """A view `(count, C, *positions)` of an activation of `count` samples."""
        if self.plain:
            return value
        if not self.folded:
            return value.permute(self._order(self.dims, self.samples, self.neurons))
        sizes = (count, value.shape[self.samples] // max(count, 1))
        unfolded: Tensor = value.unflatten(self.samples, sizes if self.outermost else sizes[::-1])
        return unfolded.permute(self._unfolded_order())

    def back(self, rows: Tensor) -> Tensor:
        """An activation out of what `rows` gave."""
        if self.plain:
            return rows
        order = self._unfolded_order() if self.folded else self._order(self.dims, self.samples, self.neurons)
        moved = rows.permute([order.index(axis) for axis in range(len(order))])
        return moved.flatten(self.samples, self.samples + 1) if self.folded else moved

    def _unfolded_order(self) -> list[int]:
        samples = self.samples if self.outermost else self.samples + 1
        neurons = self.neurons + 1 if self.neurons > self.samples else self.neurons
        return self._order(self.dims + 1, samples, neurons)

    @staticmethod
    def _order(dims: int, samples: int, neurons: int) -> list[int]:
        return [samples, neurons, *(axis for axis in range(dims) if axis not in (samples, neurons))]
