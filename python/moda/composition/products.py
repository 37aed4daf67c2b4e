"""Products of two activations: attention. Neurons of one side stay neurons; what is summed over is whole or 0."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import fx

from moda.composition.rules import Builder, Made, Needs, Rule, Zeros, operand_grid, rank_of
from moda.composition.values import Bools, Grid, Indices, all_over, any_over

__all__ = ["Attention", "Product"]


@dataclass(frozen=True)
class Product(Rule):
    """Batched matrix product: out[..., i, j] = sum over k of left[..., i, k] right[..., k, j].

    Attributes:
        left: an activation.
        right: an activation.
    """

    left: Any = None
    right: Any = None

    def zero(self, zeros: Zeros) -> Bools:
        """Where a whole row of the left or a whole column of the right is 0."""
        left = all_over(zeros[self.left], -1, keep=True)
        right = all_over(zeros[self.right], -2, keep=True)
        return np.asarray(np.broadcast_to(left, self.units) | np.broadcast_to(right, self.units))

    def need(self, wanted: Bools, needs: Needs) -> None:
        """Rows and columns of what is wanted, where the other side is not 0."""
        rows, columns = any_over(wanted, -1, keep=True), any_over(wanted, -2, keep=True)
        left, right = needs.zeros[self.left], needs.zeros[self.right]
        needs.ask(self.left, self._where(rows, ~np.swapaxes(all_over(right, -1, keep=True), -1, -2)))
        needs.ask(self.right, self._where(columns, ~np.swapaxes(all_over(left, -2, keep=True), -1, -2)))

    @staticmethod
    def _where(wanted: Bools, summed: Bools) -> Bools:
        one, other = np.broadcast_arrays(wanted, summed)
        both = one & other
        return np.asarray(both if both.any() else one)  # what is summed over must have something to it

    def build(self, builder: Builder) -> Made:
        """Of rows, columns and matrices that are there; what is summed over is what either side holds."""
        grid = builder.plan.layout(self.node)
        summed = self._summed(builder)
        left, right = (list(operand_grid(side, (*grid[:-2], None, None))) for side in (self.left, self.right))
        left[-2], left[-1] = grid[-2], summed
        right[-2], right[-1] = summed, grid[-1]
        swap = {self.left: builder.take(self.left, tuple(left)), self.right: builder.take(self.right, tuple(right))}
        return Made(builder.call(self.node, swap), grid, builder.plan.wanted[self.node])

    def _summed(self, builder: Builder) -> Indices | None:
        left, right = builder.made(self.left).grid[-1], builder.made(self.right).grid[-2]
        if left is None or right is None:
            return left if right is None else right
        return np.intersect1d(left, right)


@dataclass(frozen=True)
class Attention(Rule):
    """Scaled dot-product attention: every head by itself. A head whose values are 0 needs no queries and keys.

    Attributes:
        query: (..., heads, positions, size).
        key: alike.
        value: alike.
    """

    query: Any = None
    key: Any = None
    value: Any = None

    def zero(self, zeros: Zeros) -> Bools:
        """Where the values are."""
        return np.array(np.broadcast_to(all_over(zeros[self.value], -2, keep=True), self.units))

    def need(self, wanted: Bools, needs: Needs) -> None:
        """The values' own units; queries and keys of heads of which anything is wanted."""
        needs.ask(self.value, any_over(wanted, -2, keep=True))
        heads = any_over(wanted, (-2, -1), keep=True)
        for source in self.sources:
            if source is not self.value and needs.is_activation(source):
                needs.ask(source, heads if rank_of(source) == wanted.ndim else np.ones((1,) * rank_of(source), bool))

    def weights(self, needs: Needs) -> None:
        """Masks and biases of the heads that are there."""
        for source, grid in self._masks(needs).items():
            if not needs.is_activation(source):
                needs.ask_weight(source, grid)

    def _heads(self, needs: Needs) -> Grid:
        return (*needs.layout(self.node)[:-2], None, None)

    def _masks(self, needs: Needs) -> Mapping[fx.Node, Grid]:
        known = (self.query, self.key, self.value)
        return {s: operand_grid(s, self._heads(needs)[-rank_of(s) :]) for s in self.sources if s not in known}

    def build(self, builder: Builder) -> Made:
        """With fewer heads, and narrower values."""
        layout = builder.plan.layout(self.node)
        heads = self._heads(builder.plan)
        swap = {self.query: builder.take(self.query, heads), self.key: builder.take(self.key, heads)}
        swap[self.value] = builder.take(self.value, (*heads[:-1], layout[-1]))
        for source, grid in self._masks(builder.plan).items():
            swap[source] = builder.take(source, grid)
        changed: dict[str, Any] = {}
        scale_missing = self.node.kwargs.get("scale") is None
        if scale_missing and layout[-1] is not None:
            changed["scale"] = float(self._size() ** -0.5)
        given = (*heads[:-1], layout[-1])
        return Made(builder.call(self.node, swap, **changed), given, builder.plan.wanted[self.node])

    def _size(self) -> int:
        return int(self.query.meta["val"].shape[-1])
