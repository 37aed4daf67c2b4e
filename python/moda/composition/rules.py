"""What an operation does with the units of its values, and how it is done with some of them absent.

`moda.composition.reader` gives every node of a captured graph a `Rule`. Of nodes that depend on the input it answers:

- `zero`: which units of the output are exactly 0, given which of the inputs are;
- `need`: which units of the inputs the wanted units of the output depend on;
- `weights`: which part of its parameters it needs then;
- `build`: how it is computed of inputs that lack some of their units.

An operation that is not known is `Whole`: it is given everything, dropped units as zeros, and keeps all its
parameters. So composition is exact whatever the model holds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch import fx

from moda.composition.values import Bools, Grid, Shape, any_to, holds_tensors, is_tensor, shape_of

__all__ = ["Builder", "Made", "Needs", "Rule", "Unary", "Weights", "Whole", "WholeWeight"]

Zeros = Mapping[fx.Node, Bools]


class Needs(Protocol):
    """What is known while a composition is planned."""

    @property
    def zeros(self) -> Mapping[fx.Node, Bools]:
        """Per activation the units that are 0."""

    @property
    def wanted(self) -> Mapping[fx.Node, Bools]:
        """Per activation the units that it is to hold."""

    def ask(self, source: fx.Node, units: Bools) -> None:
        """Say that these units of an activation are needed (any shape that broadcasts against it)."""

    def ask_weight(self, source: fx.Node, grid: Grid) -> None:
        """Say that this part of a parameter, or of what is computed of parameters, is needed."""

    def hold(self, source: fx.Node) -> None:
        """Say that an activation is to be computed even where all that is needed of it is 0."""

    def is_activation(self, node: fx.Node) -> bool:
        """Whether a node depends on the input."""

    def is_empty(self, node: fx.Node) -> bool:
        """Whether an activation is 0 wherever it is needed, so that zeros stand for it."""

    def layout(self, node: fx.Node) -> Grid:
        """The smallest grid that holds the wanted units of an activation."""

    def needed_grid(self, node: fx.Node) -> Grid:
        """The part of a computed parameter that is needed."""


@dataclass(frozen=True)
class Made:
    """A value of the composed graph.

    Attributes:
        node: that computes it.
        grid: the positions of the whole value that it holds, per axis.
        real: the units that it holds as they should be; anything else in it means nothing, and stands for 0. None
            says that all is as it should be.
    """

    node: Any
    grid: Grid
    real: Bools | None = None


class Builder(Protocol):
    """Makes the composed graph."""

    @property
    def plan(self) -> Needs:
        """What is built."""

    def made(self, source: fx.Node) -> Made:
        """What was made of a node."""

    def take(self, source: fx.Node, grid: Grid) -> Any:
        """A value with exactly these positions of a source; what the source lacks is 0."""

    def zeros(self, node: fx.Node, grid: Grid) -> Any:
        """Zeros in place of these positions of a node."""

    def call(self, node: fx.Node, swap: Mapping[fx.Node, Any], **changed: Any) -> Any:
        """Call what `node` calls with arguments replaced: nodes by `swap`, arguments by their names."""

    def emit(self, target: Any, *args: Any, **kwargs: Any) -> Any:
        """Call another operation."""

    def part(self, through: fx.Node, swap: Mapping[fx.Node, Any], node: fx.Node) -> Any:
        """What `node` picks of the results of a call that is made once."""


@dataclass(frozen=True)
class Rule:
    """An operation.

    Attributes:
        node: the call.
        units: of its output; of parameters an empty shape.
        why: why it was kept whole, if it was.
    """

    node: fx.Node
    units: Shape = ()
    why: str = ""

    @property
    def sources(self) -> list[fx.Node]:
        """The tensors it is given."""
        return [source for source in self.node.all_input_nodes if holds_tensors(source)]

    def zero(self, zeros: Zeros) -> Bools:
        """Units that are 0 whatever the input."""
        return np.zeros(self.units, dtype=np.bool_)

    def need(self, wanted: Bools, needs: Needs) -> None:
        """Ask for units of the inputs."""
        raise NotImplementedError

    def weights(self, needs: Needs) -> None:
        """Ask for parts of parameters."""

    def build(self, builder: Builder) -> Made:
        """Compute it."""
        raise NotImplementedError


def whole(rank: int) -> Grid:
    """All positions."""
    return (None,) * rank


def rank_of(node: fx.Node) -> int:
    """Number of axes."""
    return len(shape_of(node)) if is_tensor(node) else 0


@dataclass(frozen=True)
class Whole(Rule):
    """Anything: is given everything, and gives one unit."""

    def need(self, wanted: Bools, needs: Needs) -> None:
        """Everything, if anything is wanted."""
        for source in self.sources:
            if needs.is_activation(source):
                needs.ask(source, np.ones((1,) * max(1, rank_of(source)), dtype=np.bool_))

    def weights(self, needs: Needs) -> None:
        """All of them."""
        for source in self.sources:
            if not needs.is_activation(source):
                needs.ask_weight(source, whole(rank_of(source)))

    def build(self, builder: Builder) -> Made:
        """With everything."""
        swap = {source: builder.take(source, whole(rank_of(source))) for source in self.sources}
        return Made(builder.call(self.node, swap), whole(rank_of(self.node)))


@dataclass(frozen=True)
class WholeWeight(Whole):
    """Parameters, constants, and what is computed of them by operations of any kind."""

    def need(self, wanted: Bools, needs: Needs) -> None:
        """Nothing of activations."""


@dataclass(frozen=True)
class Weights(Rule):
    """An operation on parameters alone that treats positions one by one (axis by axis, if `axes` says where they go).

    Attributes:
        axes: per tensor it is given and axis of it, the axis of the output along which the same positions lie; None
            where all positions are needed.
    """

    axes: Mapping[fx.Node, Sequence[int | None]] | None = None

    def weights(self, needs: Needs) -> None:
        """The same positions."""
        for source, grid in self._grids(needs.needed_grid(self.node)).items():
            needs.ask_weight(source, grid)

    def build(self, builder: Builder) -> Made:
        """With the positions that are needed."""
        grid = builder.plan.needed_grid(self.node)
        swap = {source: builder.take(source, part) for source, part in self._grids(grid).items()}
        return Made(builder.call(self.node, swap), self._given(grid))

    def _given(self, grid: Grid) -> Grid:
        """Positions that are there afterwards: all along an axis of the output that comes from no axis of an input."""
        if self.axes is None:
            return grid
        moved = {axis for axes in self.axes.values() for axis in axes}
        return tuple(positions if axis in moved else None for axis, positions in enumerate(grid))

    def _grids(self, grid: Grid) -> dict[fx.Node, Grid]:
        if self.axes is not None:
            return {s: tuple(None if a is None else grid[a] for a in axes) for s, axes in self.axes.items()}
        return {source: operand_grid(source, grid) for source in self.sources}


def operand_grid(source: fx.Node, grid: Grid) -> Grid:
    """The positions of an operand that broadcasts to a value with these positions."""
    shape = shape_of(source)
    first = len(grid) - len(shape)
    return tuple(None if size == 1 else grid[first + dim] for dim, size in enumerate(shape))


@dataclass(frozen=True)
class Elementwise(Rule):
    """An operation on elements by themselves, of any number of operands that broadcast against each other.

    Attributes:
        product: the output is 0 where any operand is.
        keeps_zero: the output is 0 where all operands that are activations are.
        divided: the operand that is divided by the other one, if they are a quotient of activations.
    """

    product: bool = False
    keeps_zero: bool = False
    divided: fx.Node | None = None

    def zero(self, zeros: Zeros) -> Bools:
        """By what it does with zeros."""
        sets = [np.broadcast_to(_padded(zeros[s], len(self.units)), self.units) for s in self.sources if s in zeros]
        if self.product:
            return np.asarray(np.logical_or.reduce(sets))
        if self.keeps_zero:
            return np.asarray(np.logical_and.reduce(sets))
        if self.divided is not None:
            return self._quotient(zeros, self.divided)
        return np.zeros(self.units, dtype=np.bool_)

    def _quotient(self, zeros: Zeros, divided: fx.Node) -> Bools:
        """0 by anything that is not: where all is divided that there is, by a norm of it, 0 / 0 may be meant."""
        if zeros[divided].all():
            return np.zeros(self.units, dtype=np.bool_)
        sets = {s: np.broadcast_to(_padded(zeros[s], len(self.units)), self.units) for s in self.sources}
        (divisor,) = (sets[source] for source in self.sources if source is not divided)
        return np.asarray(sets[divided] & ~divisor)

    def need(self, wanted: Bools, needs: Needs) -> None:
        """The same units of every operand."""
        for source in self.sources:
            if needs.is_activation(source):
                needs.ask(source, wanted)

    def weights(self, needs: Needs) -> None:
        """The positions that are there."""
        grid = needs.layout(self.node)
        for source in self.sources:
            if not needs.is_activation(source):
                needs.ask_weight(source, operand_grid(source, grid))

    def build(self, builder: Builder) -> Made:
        """Of operands brought to the same positions."""
        grid = builder.plan.layout(self.node)
        swap = {source: builder.take(source, operand_grid(source, grid)) for source in self.sources}
        return Made(builder.call(self.node, swap), grid, builder.plan.wanted[self.node])


def _padded(sets: Bools, rank: int) -> Bools:
    return sets.reshape((1,) * (rank - sets.ndim) + sets.shape)


@dataclass(frozen=True)
class Unary(Elementwise):
    """An operation on the elements of one activation: works on what it is given, more than is wanted included."""

    def build(self, builder: Builder) -> Made:
        """Of the input as it is given, if that holds all that is wanted."""
        (source,) = self.sources
        wanted = builder.plan.wanted[self.node]
        made = builder.made(source)
        if made.real is None or not (wanted & ~made.real).any():
            real = None if made.real is None else self._real(made.real, builder)
            return Made(self._compute(builder, made.node), made.grid, real)
        grid = builder.plan.layout(self.node)
        return Made(self._compute(builder, builder.take(source, grid)), grid, wanted)

    def _real(self, given: Bools, builder: Builder) -> Bools:
        return given

    def _compute(self, builder: Builder, value: Any) -> Any:
        return builder.call(self.node, {self.sources[0]: value})


@dataclass(frozen=True)
class Tap(Unary):
    """Drops the neurons that a mask drops.

    Attributes:
        index: of the tap.
        dim: where the neurons are.
    """

    index: int = 0
    dim: int = 1

    def need(self, wanted: Bools, needs: Needs) -> None:
        """The same units."""
        needs.ask(self.sources[0], wanted)

    def build(self, builder: Builder) -> Made:
        """The input itself: what is masked is not real any more."""
        (source,) = self.sources
        made = builder.made(source)
        zeros = builder.plan.zeros[self.node]
        given = np.ones(self.units, dtype=np.bool_) if made.real is None else any_to(made.real, self.units)
        return Made(made.node, made.grid, given & ~zeros)
