"""Operations along axes (pooling, padding, means over positions, softmax), and norms of channels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moda.composition.rules import Builder, Elementwise, Made, Needs, Rule, Zeros, operand_grid, rank_of, whole
from moda.composition.values import Bools, Grid, all_of, all_over, any_over

__all__ = ["Along", "GroupNorm", "Norm"]


@dataclass(frozen=True)
class Along(Rule):
    """An operation along some axes: it mixes what lies along them, and treats all else by itself.

    Attributes:
        axes: per axis of the output, the axis of the input that it is; None for one that the operation works along.
        keeps_zero: zeros give zeros.
    """

    axes: tuple[int | None, ...] = ()
    keeps_zero: bool = False

    def zero(self, zeros: Zeros) -> Bools:
        """Where all of what is mixed is 0."""
        if not self.keeps_zero:
            return np.zeros(self.units, dtype=np.bool_)
        return np.array(np.broadcast_to(self._moved(zeros[self.sources[0]]), self.units))

    def _moved(self, sets: Bools) -> Bools:
        """A set of the input's units as one of the output's."""
        kept = {axis for axis in self.axes if axis is not None}
        mixed = tuple(dim for dim in range(sets.ndim) if dim not in kept)
        less = all_over(sets, mixed, keep=True) if mixed else sets
        order = [axis for axis in self.axes if axis is not None]
        taken = less.transpose([*order, *mixed]).reshape([less.shape[axis] for axis in order])
        return np.asarray(taken).reshape([1 if axis is None else taken.shape[order.index(axis)] for axis in self.axes])

    def need(self, wanted: Bools, needs: Needs) -> None:
        """Everything along the axes, of the units wanted."""
        source = self.sources[0]
        rank = rank_of(source)
        mixed = tuple(place for place, axis in enumerate(self.axes) if axis is None)
        less = any_over(wanted, mixed, keep=True) if mixed else wanted
        asked = np.ones((1,) * rank, dtype=np.bool_)
        shape = [1] * rank
        for place, axis in enumerate(self.axes):
            if axis is not None:
                shape[axis] = less.shape[place]
        order = sorted((axis, place) for place, axis in enumerate(self.axes) if axis is not None)
        asked = less.transpose([*(place for _, place in order), *mixed]).reshape(shape)
        needs.ask(source, asked)
        for other in self.sources[1:]:
            if needs.is_activation(other):
                needs.ask(other, np.ones((1,) * rank_of(other), dtype=np.bool_))

    def weights(self, needs: Needs) -> None:
        """All: they lie along the axes."""
        for source in self.sources[1:]:
            if not needs.is_activation(source):
                needs.ask_weight(source, whole(rank_of(source)))

    def grids(self, grid: Grid) -> tuple[Grid, Grid]:
        """What is taken in and given out for an output of this grid."""
        taken: list[object] = [None] * rank_of(self.sources[0])
        for place, axis in enumerate(self.axes):
            if axis is not None:
                taken[axis] = grid[place]
        given = tuple(None if axis is None else grid[place] for place, axis in enumerate(self.axes))
        return tuple(taken), given  # type: ignore[arg-type]

    def build(self, builder: Builder) -> Made:
        """Of all that lies along the axes."""
        source, *others = self.sources
        taken, given = self.grids(builder.plan.layout(self.node))
        swap = {source: builder.take(source, taken)}
        swap.update({other: builder.take(other, whole(rank_of(other))) for other in others})
        return Made(builder.call(self.node, swap), given, None if all_of(given) else self._real(builder))

    def _real(self, builder: Builder) -> Bools:
        """Along the axes everything is there."""
        wanted = builder.plan.wanted[self.node]
        mixed = tuple(place for place, axis in enumerate(self.axes) if axis is None)
        return np.broadcast_to(any_over(wanted, mixed, keep=True), wanted.shape).copy() if mixed else wanted


@dataclass(frozen=True)
class Norm(Elementwise):
    """A norm of every channel by itself: batch norm, instance norm. Its tensors have one entry a channel.

    Attributes:
        dim: where the channels are.
        updates: whether it writes to its running statistics.
    """

    dim: int = 1
    updates: bool = False

    def _vector(self, needs: Needs) -> Grid:
        return (needs.layout(self.node)[self.dim],)

    def weights(self, needs: Needs) -> None:
        """Entries of the channels that are there."""
        for source in self.sources[1:]:
            needs.ask_weight(source, self._vector(needs))

    def build(self, builder: Builder) -> Made:
        """Of the channels that are there; the others' positions are whole."""
        source, *vectors = self.sources
        grid = builder.plan.layout(self.node)
        swap = {source: builder.take(source, operand_grid(source, grid))}
        swap.update({vector: builder.take(vector, self._vector(builder.plan)) for vector in vectors})
        return Made(builder.call(self.node, swap), grid, builder.plan.wanted[self.node])


@dataclass(frozen=True)
class GroupNorm(Rule):
    """Channels in groups that share their statistics: all channels of a group that is needed are there, or 0.

    Attributes:
        groups: of the whole model.
        dim: where the channels are.
    """

    groups: int = 1
    dim: int = 1

    def _used(self, channels: Bools) -> Bools:
        """Channels of the groups that hold one of these."""
        used = channels.reshape(self.groups, -1).any(1)
        return np.repeat(used, len(channels) // self.groups)

    def _channels(self, needs: Needs) -> Bools:
        size = self.units[self.dim]
        layout = needs.layout(self.node)[self.dim]
        there = np.ones(size, dtype=np.bool_) if layout is None else np.isin(np.arange(size), layout)
        return self._used(there)

    def need(self, wanted: Bools, needs: Needs) -> None:
        """All channels of the groups."""
        other = tuple(dim for dim in range(wanted.ndim) if dim != self.dim)
        channels = self._used(any_over(wanted, other))
        shape = [1] * wanted.ndim
        shape[self.dim] = len(channels)
        needs.ask(self.sources[0], channels.reshape(shape))

    def _grid(self, needs: Needs, rank: int) -> Grid:
        channels = self._channels(needs)
        kept = None if channels.all() else np.flatnonzero(channels)
        return tuple(kept if dim == self.dim else None for dim in range(rank))

    def weights(self, needs: Needs) -> None:
        """Entries of the channels of the groups."""
        for source in self.sources[1:]:
            needs.ask_weight(source, (self._grid(needs, len(self.units))[self.dim],))

    def build(self, builder: Builder) -> Made:
        """With fewer groups."""
        source, *vectors = self.sources
        grid = self._grid(builder.plan, len(self.units))
        kept = grid[self.dim]
        swap = {source: builder.take(source, grid)}
        swap.update({vector: builder.take(vector, (kept,)) for vector in vectors})
        groups = self.groups if kept is None else len(kept) * self.groups // self.units[self.dim]
        return Made(builder.call(self.node, swap, num_groups=groups), grid)
