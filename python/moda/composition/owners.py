"""Operations that own neurons: convolutions, linear layers, products with a parameter, lookups, recurrent layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx

from moda.composition.rules import Builder, Made, Needs, Rule, Whole, Zeros, rank_of, whole
from moda.composition.values import Bools, Grid, Indices, all_over, any_over, on_axis, shape_of

__all__ = ["Bilinear", "Contraction", "Convolution", "Lookup", "Recurrent"]


def at(grid: Grid, dim: int) -> Grid:
    """Only what the grid says of one axis."""
    return tuple(positions if place == dim else None for place, positions in enumerate(grid))


def constant(builder: Builder, node: fx.Node, grid: Grid, bias: Any, dim: int) -> Any:
    """What a layer gives for nothing but zeros: its bias, along axis `dim`, everywhere."""
    value = builder.zeros(node, grid)
    if bias is None:
        return value
    behind = rank_of(node) - 1 - dim % rank_of(node)
    if behind:
        bias = builder.emit(torch.ops.aten.reshape.default, bias, [-1, *[1] * behind])
    return builder.emit(torch.ops.aten.add.Tensor, value, bias)


@dataclass(frozen=True)
class Contraction(Rule):
    """A product that sums over one axis of an activation: a linear layer, a matrix product with a parameter.

    Attributes:
        x: the activation.
        weight: the parameter, or what is computed of parameters.
        bias: added to the output, if any.
        dim: the axis of `x` that is summed over.
        out_dim: the axis of the output that the parameter makes.
        rows: the axis of the parameter that makes outputs.
        columns: its axis that is summed over.
    """

    x: Any = None
    weight: Any = None
    bias: Any = None
    dim: int = -1
    out_dim: int = -1
    rows: int = 0
    columns: int = 1

    def zero(self, zeros: Zeros) -> Bools:
        """Where all that is summed over is 0, if nothing is added."""
        if self.bias is not None:
            return np.zeros(self.units, dtype=np.bool_)
        return np.array(np.broadcast_to(all_over(zeros[self.x], self.dim, keep=True), self.units))

    def need(self, wanted: Bools, needs: Needs) -> None:
        """All inputs of the outputs that are wanted (other axes are those of the input)."""
        asked = any_over(wanted, self.out_dim % wanted.ndim, keep=True)
        if self.dim % rank_of(self.x) != self.out_dim % wanted.ndim:  # the axis of outputs is not where inputs lie
            asked = np.ones((1,) * rank_of(self.x), dtype=np.bool_)
        needs.ask(self.x, asked)

    def _parts(self, needs: Needs) -> tuple[Indices | None, Indices | None]:
        rows = needs.layout(self.node)[self.out_dim]
        columns = needs.layout(self.x)[self.dim]
        return rows, columns

    def _weight(self, rows: Indices | None, columns: Indices | None) -> Grid:
        grid: list[Indices | None] = [None] * rank_of(self.weight)
        if self.rows is not None and rank_of(self.weight) > 1:
            grid[self.rows] = rows
        grid[self.columns] = columns
        return tuple(grid)

    def weights(self, needs: Needs) -> None:
        """Rows of the outputs, columns of the inputs."""
        rows, columns = self._parts(needs)
        if not needs.is_empty(self.x):
            needs.ask_weight(self.weight, self._weight(rows, columns))
        if self.bias is not None:
            needs.ask_weight(self.bias, self._bias(rows))

    def _bias(self, rows: Indices | None) -> Grid:
        shape = shape_of(self.bias)
        return tuple(rows if dim == len(shape) - 1 and size > 1 else None for dim, size in enumerate(shape))

    def build(self, builder: Builder) -> Made:
        """Of the inputs that are there."""
        rows, columns = self._parts(builder.plan)
        given: list[Indices | None] = [None] * rank_of(self.node)
        if given:
            given[self.out_dim] = rows
        if builder.plan.is_empty(self.x):
            bias = None if self.bias is None else builder.take(self.bias, self._bias(rows))
            return Made(
                constant(builder, self.node, tuple(given), bias, self.out_dim), tuple(given), self._real(builder)
            )
        taken: list[Indices | None] = [None] * rank_of(self.x)
        taken[self.dim] = columns
        swap = {self.x: builder.take(self.x, tuple(taken))}
        swap[self.weight] = builder.take(self.weight, self._weight(rows, columns))
        if self.bias is not None:
            swap[self.bias] = builder.take(self.bias, self._bias(rows))
        return Made(builder.call(self.node, swap), tuple(given), self._real(builder))

    def _real(self, builder: Builder) -> Bools:
        wanted = builder.plan.wanted[self.node]
        dim = self.out_dim % wanted.ndim if wanted.ndim else 0
        other = tuple(place for place in range(wanted.ndim) if place != dim)
        return np.broadcast_to(any_over(wanted, other, keep=True), wanted.shape).copy() if other else wanted


@dataclass(frozen=True)
class Convolution(Rule):
    """A convolution, transposed or not, in any number of groups (a depthwise one has as many as channels).

    A kept neuron keeps its filter even where nothing but zeros comes in, as published for MobileNet; outputs that are
    no neurons, of a depthwise convolution before another layer, are 0 then, if there is no bias. Where nothing at all
    comes in, neurons of groups are given one channel of zeros; any other convolution is its bias. Within
    groups the weight is one block of rows times one block of columns, so every kept group has the same number of rows
    and the same columns; where masks differ between groups the smaller ones are filled up.

    Attributes:
        x: the activation.
        weight: the parameter, or what is computed of parameters.
        bias: added to the output, if any.
        groups: into which channels are divided.
        dim: the axis of channels.
        transposed: whether it is a transposed convolution.
        neurons: whether its outputs are neurons: there is one group, or a tap follows behind norms and functions of
            elements at most.
    """

    x: Any = None
    weight: Any = None
    bias: Any = None
    groups: int = 1
    dim: int = 1
    transposed: bool = False
    neurons: bool = True

    @property
    def inputs(self) -> int:
        """Input channels of the whole layer."""
        return shape_of(self.x)[self.dim]

    @property
    def outputs(self) -> int:
        """Output channels of the whole layer."""
        return shape_of(self.node)[self.dim]

    def zero(self, zeros: Zeros) -> Bools:
        """Outputs of groups into which nothing but zeros comes, unless they have a bias or are neurons of groups."""
        if (self.neurons and self.groups > 1) or self.bias is not None:
            return np.zeros(self.units, dtype=np.bool_)
        given = all_over(zeros[self.x], tuple(dim for dim in range(zeros[self.x].ndim) if dim != self.dim))
        empty = np.broadcast_to(given, (self.inputs,)).reshape(self.groups, -1).all(1)
        return on_axis(np.repeat(empty, self.outputs // self.groups), self.dim, len(self.units))

    def need(self, wanted: Bools, needs: Needs) -> None:
        """All channels of the groups that hold a wanted one."""
        if self.groups > 1 and self.neurons:
            needs.hold(self.x)
        other = tuple(dim for dim in range(wanted.ndim) if dim != self.dim)
        used = any_over(wanted, other).reshape(self.groups, -1).any(1)
        needs.ask(self.x, on_axis(np.repeat(used, self.inputs // self.groups), self.dim, rank_of(self.x)))

    def _blocks(self, needs: Needs) -> tuple[Indices | None, Indices | None, Indices | None]:
        """Rows and columns of the weight, and the input channels they are multiplied with."""
        wanted, given = needs.layout(self.node)[self.dim], needs.layout(self.x)[self.dim]
        if self.groups == 1:
            return wanted, given, given
        if wanted is None and given is None:
            return None, None, None
        wanted = np.arange(self.outputs) if wanted is None else wanted
        given = np.arange(self.inputs) if given is None else given
        depth, height = self.inputs // self.groups, self.outputs // self.groups
        used = np.unique(wanted // height)
        columns = np.unique(given[np.isin(given // depth, used)] % depth)
        if not columns.size:
            columns = np.zeros(1, dtype=np.int64)
        taken = (used[:, None] * depth + columns).ravel()
        if len(wanted) > 1 and not (np.diff(wanted) > 0).all():
            wanted = np.sort(wanted)
        return _equal_rows(wanted, used, height), columns, taken

    def _weight_grid(self, rows: Indices | None, columns: Indices | None) -> Grid:
        """Of the parameter: (outputs, inputs / groups, ...), or (inputs, outputs / groups, ...) where transposed."""
        rest = (None,) * (rank_of(self.weight) - 2)
        return (rows, columns, *rest)

    def _cut(self, needs: Needs) -> tuple[Grid, Indices | None, Indices | None]:
        """Of the parameter, the channels given out and those taken in."""
        rows, columns, taken = self._blocks(needs)
        if not self.transposed:
            return self._weight_grid(rows, columns), rows, taken
        if self.groups == 1:
            return self._weight_grid(columns, rows), rows, taken
        if taken is None or rows is None:
            return self._weight_grid(None, None), None, None
        depth, height = self.inputs // self.groups, self.outputs // self.groups
        used = np.unique(rows // height)
        taken = (used[:, None] * depth + np.arange(depth)).ravel()
        rows = (used[:, None] * height + np.arange(height)).ravel()
        return self._weight_grid(taken, None), rows, taken

    def weights(self, needs: Needs) -> None:
        """Filters of the outputs, columns of the inputs."""
        grid, rows, _ = self._cut(needs)
        if not needs.is_empty(self.x):
            needs.ask_weight(self.weight, grid)
        if self.bias is not None:
            needs.ask_weight(self.bias, (rows,))

    def build(self, builder: Builder) -> Made:
        """With the channels that are there."""
        grid, rows, taken = self._cut(builder.plan)
        given: list[Indices | None] = [None] * rank_of(self.node)
        given[self.dim] = rows
        wanted = builder.plan.wanted[self.node]
        if builder.plan.is_empty(self.x):
            bias = None if self.bias is None else builder.take(self.bias, (rows,))
            return Made(constant(builder, self.node, tuple(given), bias, self.dim), tuple(given), wanted)
        channels: list[Indices | None] = [None] * rank_of(self.x)
        channels[self.dim] = taken
        swap = {self.x: builder.take(self.x, tuple(channels)), self.weight: builder.take(self.weight, grid)}
        if self.bias is not None:
            swap[self.bias] = builder.take(self.bias, (rows,))
        changed: dict[str, Any] = {}
        if self.groups > 1 and taken is not None:
            changed["groups"] = len(np.unique(taken // (self.inputs // self.groups)))
        return Made(builder.call(self.node, swap, **changed), tuple(given), wanted)


def _equal_rows(wanted: Indices, used: Indices, height: int) -> Indices:
    """The wanted rows of each used group, filled up with others of the group to the number of the largest one."""
    blocks = [wanted[wanted // height == group] for group in used]
    size = max(map(len, blocks))
    filled = []
    for group, block in zip(used, blocks, strict=True):
        others = np.setdiff1d(np.arange(group * height, (group + 1) * height), block)
        filled.append(np.sort(np.concatenate([block, others[: size - len(block)]])))
    return np.concatenate(filled)


@dataclass(frozen=True)
class Lookup(Rule):
    """Rows of a table by index: embedding, bag of embeddings. Neurons are its columns."""

    weight: Any = None

    def need(self, wanted: Bools, needs: Needs) -> None:
        """All of the indices."""
        for source in self.sources:
            if needs.is_activation(source):
                needs.ask(source, np.ones((1,) * rank_of(source), dtype=np.bool_))

    def _grid(self, needs: Needs) -> Grid:
        return None, needs.layout(self.node)[-1]

    def weights(self, needs: Needs) -> None:
        """Columns of the neurons."""
        for source in self.sources:
            if source is self.weight:
                needs.ask_weight(source, self._grid(needs))
            elif not needs.is_activation(source):
                needs.ask_weight(source, whole(rank_of(source)))

    def build(self, builder: Builder) -> Made:
        """Of a narrower table."""
        grid = self._grid(builder.plan)
        swap = {
            source: builder.take(source, whole(rank_of(source))) for source in self.sources if source is not self.weight
        }
        swap[self.weight] = builder.take(self.weight, grid)
        given = at(builder.plan.layout(self.node), len(self.units) - 1)
        return Made(builder.call(self.node, swap), given, builder.plan.wanted[self.node])


@dataclass(frozen=True)
class Recurrent(Whole):
    """A recurrent layer: the columns of its first layer's input weights go with the inputs; states stay whole.

    Attributes:
        x: the input, neurons at its last axis.
        columns: the weights of the first layer, one a direction.
    """

    x: Any = None
    columns: tuple[fx.Node, ...] = ()

    def _taken(self, needs: Needs) -> Grid:
        return at(needs.layout(self.x), rank_of(self.x) - 1)

    def weights(self, needs: Needs) -> None:
        """All but the columns of inputs that are not there."""
        for source in self.sources:
            if source in self.columns:
                needs.ask_weight(source, (None, self._taken(needs)[-1]))
            elif not needs.is_activation(source):
                needs.ask_weight(source, whole(rank_of(source)))

    def build(self, builder: Builder) -> Made:
        """Of a narrower input."""
        taken = self._taken(builder.plan)
        swap = {source: builder.take(source, whole(rank_of(source))) for source in self.sources
                if source is not self.x and source not in self.columns}  # fmt: skip
        swap[self.x] = builder.take(self.x, taken)
        swap.update({weight: builder.take(weight, (None, taken[-1])) for weight in self.columns})
        return Made(builder.call(self.node, swap), whole(rank_of(self.node)))


@dataclass(frozen=True)
class Bilinear(Rule):
    """A product of two activations with a parameter (outputs, first inputs, second inputs)."""

    first: Any = None
    second: Any = None
    weight: Any = None
    bias: Any = None

    def need(self, wanted: Bools, needs: Needs) -> None:
        """All of both inputs."""
        for source in (self.first, self.second):
            needs.ask(source, any_over(wanted, -1, keep=True))

    def _grids(self, needs: Needs) -> dict[fx.Node, Grid]:
        rows = needs.layout(self.node)[-1]
        first, second = (at(needs.layout(s), rank_of(s) - 1) for s in (self.first, self.second))
        grids: dict[fx.Node, Grid] = {self.weight: (rows, first[-1], second[-1])}
        if self.bias is not None:
            grids[self.bias] = (rows,)
        return grids

    def weights(self, needs: Needs) -> None:
        """Rows of the outputs, both kinds of columns."""
        for source, grid in self._grids(needs).items():
            needs.ask_weight(source, grid)

    def build(self, builder: Builder) -> Made:
        """Of the inputs that are there."""
        grids = self._grids(builder.plan)
        for source in (self.first, self.second):
            grids[source] = at(builder.plan.layout(source), rank_of(source) - 1)
        swap = {source: builder.take(source, grid) for source, grid in grids.items()}
        given = at(builder.plan.layout(self.node), len(self.units) - 1)
        wanted = builder.plan.wanted[self.node]
        return Made(builder.call(self.node, swap), given, wanted)
