"""Operations that only move data: they are run on numbers of units, and where these land is read off."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from moda.composition.rules import Builder, Made, Needs, Rule, Zeros, operand_grid, rank_of, whole
from moda.composition.values import (
    Bools,
    Grid,
    Indices,
    Shape,
    all_of,
    along,
    any_over,
    any_to,
    holds_tensors,
    is_free,
    numbered,
    shape_of,
    size_of,
    units_by_label,
)

__all__ = ["Concat", "Labels", "Move", "Stack", "read_move"]

Run = Callable[[Mapping[fx.Node, Tensor], Mapping[str, Any]], Tensor]
"""Runs an operation on tensors in the place of its sources, with some of its arguments changed."""


@dataclass(frozen=True)
class Labels:
    """Where the units of an output come from; operations that are alike share it.

    Attributes:
        taken: per unit of the output, the number of the unit it is a copy of (units of all inputs, one after the
            other), or -1 for a constant.
        fill: per unit of the output the constant.
        total: units of all inputs.
    """

    taken: NDArray[np.int64]
    fill: NDArray[np.float64]
    total: int

    @cached_property
    def constant(self) -> Bools | None:
        """Which units are constants; None if none is."""
        constant = self.taken < 0
        return constant if constant.any() else None

    @cached_property
    def zero(self) -> Bools:
        """Which units are 0 whatever the inputs are."""
        return np.asarray((self.taken < 0) & (self.fill == 0))

    @cached_property
    def used(self) -> Bools:
        """Which units of the inputs there are copies of."""
        return self.sources(self.taken.ravel())

    def copies(self, flat: Bools, constant: Bools) -> Bools:
        """A set of the inputs' units as one of the output's, with these of its constants."""
        if not flat.size:
            return constant
        copied = flat[self.taken]  # -1 takes the last one, for which a constant is put in
        return copied if self.constant is None else np.where(self.constant, constant, copied)

    def sources(self, numbers: NDArray[np.int64]) -> Bools:
        """The units with these numbers; constants are none."""
        sources = np.zeros(self.total + 1, dtype=np.bool_)
        sources[numbers] = True
        return sources[:-1]


@dataclass(frozen=True)
class Move(Rule):
    """An operation whose output holds elements of its inputs, and perhaps a constant.

    Attributes:
        of: the inputs that are activations.
        labels: where the units of the output come from; inputs are those in `of`.
        run: the operation.
        sizes: names of arguments that are lists of the output's sizes.
        through: the call whose result has several parts, if `node` picks one of them.
    """

    of: tuple[fx.Node, ...] = ()
    labels: Labels = field(default_factory=lambda: Labels(np.zeros(0, dtype=np.int64), np.zeros(0), 0))
    run: Run | None = None
    sizes: tuple[str, ...] = ()
    through: fx.Node | None = None

    @property
    def sources(self) -> list[fx.Node]:
        """The tensors that the operation is given."""
        return Rule(self.through or self.node).sources

    def _of_units(self, sets: Sequence[Bools], constant: Bools) -> Bools:
        """A set of the inputs' units as one of the output's."""
        flat = np.concatenate([one.ravel() for one in sets]) if sets else np.zeros(0, dtype=np.bool_)
        return self.labels.copies(flat, constant)

    def zero(self, zeros: Zeros) -> Bools:
        """Where the inputs are."""
        sets = [zeros[source] for source in self.of]
        return self._of_units(sets, self.labels.zero) if any(one.any() for one in sets) else self.labels.zero

    def need(self, wanted: Bools, needs: Needs) -> None:
        """What the wanted units are copies of."""
        asked = self.labels.used if wanted.all() else self.labels.sources(self.labels.taken[wanted])
        start = 0
        for source in self.of:
            units = needs.zeros[source].shape
            mine = asked[start : start + prod(units)]
            if len(self.of) > 1 or not mine.any():  # each is given, whatever of it is wanted
                mine = mine.copy()
                mine[:1] = True
            needs.ask(source, mine.reshape(units))
            start += prod(units)

    def weights(self, needs: Needs) -> None:
        """All."""
        for source in self.sources:
            if not needs.is_activation(source):
                needs.ask_weight(source, whole(rank_of(source)))

    def build(self, builder: Builder) -> Made:
        """As it is where its sizes can be adapted; else by picking along one axis; else of the whole, with zeros."""
        if len(self.of) == 1 and len(self.sources) == 1:
            made = builder.made(self.of[0])
            if all_of(made.grid):
                return Made(self._native(builder, made.node, {}), whole(rank_of(self.node)), self._real(made))
            found = self._adapted(builder, made) or self._picked(builder, made)
            if found is not None:
                return found
        swap = {source: builder.take(source, whole(rank_of(source))) for source in self.sources}
        node = self._call(builder, swap, {})
        return Made(node, whole(rank_of(self.node)), builder.plan.wanted[self.node])

    def _real(self, made: Made) -> Bools | None:
        return None if made.real is None else self._of_units([made.real], np.ones(self.units, dtype=np.bool_))

    def _native(self, builder: Builder, value: Any, changed: Mapping[str, Any]) -> Any:
        return self._call(builder, {self.of[0]: value}, changed)

    def _call(self, builder: Builder, swap: Mapping[fx.Node, Any], changed: Mapping[str, Any]) -> Any:
        if self.through is None:
            return builder.call(self.node, swap, **changed)
        return builder.part(self.through, swap, self.node)

    def _adapted(self, builder: Builder, made: Made) -> Made | None:
        """The operation itself, if on what is there it gives a grid of its whole output."""
        source, shape = self.of[0], shape_of(self.of[0])
        units = builder.plan.zeros[source].shape
        there = np.ones(units, dtype=np.bool_)
        for dim, positions in enumerate(made.grid):
            if positions is not None:
                there &= _on(positions, units[dim], dim, len(units))
        given = self._of_units([there], np.ones(self.units, dtype=np.bool_))
        grid = grid_of(self.node, given)
        if grid is None:
            return None
        changed = {name: self._sizes(name, grid) for name in self.sizes}
        expected = restrict(torch.from_numpy(self._expected()).expand(shape_of(self.node)), grid)
        numbers = restrict(numbered(units, shape, 1), made.grid)
        try:
            result = self.run({source: numbers}, changed) if self.run else None
        except (RuntimeError, ValueError, IndexError, TypeError):
            return None
        if result is None or result.shape != expected.shape or not torch.equal(result, expected):
            return None
        if self.through is not None and changed:
            return None
        return Made(self._native(builder, made.node, changed), grid, self._real(made))

    def _expected(self) -> NDArray[np.float64]:
        return np.where(self.labels.taken >= 0, self.labels.taken + 1.0, self.labels.fill)

    def _sizes(self, name: str, grid: Grid) -> list[Any]:
        sizes = list(argument(self.node, name))
        first = len(grid) - len(sizes)  # of unflatten, sizes are those of some axes: they are told apart by their sum
        if name == "sizes" and packet_of(self.node) == "unflatten":
            first = int(argument(self.node, "dim")) % (len(grid) - len(sizes) + 1)
        for place in range(len(sizes)):
            positions = grid[first + place]
            if positions is not None:
                sizes[place] = len(positions)
        return sizes

    def _picked(self, builder: Builder, made: Made) -> Made | None:
        """Positions along one axis, if that is all that the operation does."""
        source = self.of[0]
        before, after = shape_of(source), shape_of(self.node)
        cut = [dim for dim, positions in enumerate(made.grid) if positions is not None]
        units = builder.plan.zeros[source].shape
        if len(cut) != 1 or prod(units) != units[cut[0]] or self.labels.constant is not None:
            return None
        (dim,) = cut
        if len(before) == len(after):
            return self._picked_along(builder, dim)
        single = len(after) == len(before) - 1 and self.labels.taken.size == 1
        if (
            not single
            or before[:dim] + before[dim + 1 :] != after
            or not self._moves_as(lambda x: x.select(dim, int(self.labels.taken.ravel()[0])), before)
        ):
            return None
        grid: list[Indices | None] = [None] * len(before)
        grid[dim] = self.labels.taken.ravel()
        value = builder.emit(torch.ops.aten.select.int, builder.take(source, tuple(grid)), dim, 0)
        return Made(value, whole(len(after)), builder.plan.wanted[self.node])

    def _picked_along(self, builder: Builder, dim: int) -> Made | None:
        source, shape = self.of[0], shape_of(self.of[0])
        if prod(self.units) != self.units[dim] or self.units[dim] != shape_of(self.node)[dim]:
            return None
        positions = self.labels.taken.ravel()
        if not self._moves_as(lambda x: x.index_select(dim, torch.from_numpy(positions)), shape):
            return None
        grid = builder.plan.layout(self.node)
        asked: list[Indices | None] = [None] * len(shape)
        asked[dim] = positions if grid[dim] is None else positions[grid[dim]]
        return Made(builder.take(source, tuple(asked)), grid, builder.plan.wanted[self.node])

    def _moves_as(self, other: Callable[[Tensor], Tensor], shape: Shape) -> bool:
        places = torch.arange(prod(shape), dtype=torch.float64).view(shape)
        moved = self.run({self.of[0]: places}, {}) if self.run else places
        expected = other(places)
        return moved.shape == expected.shape and torch.equal(moved, expected)


def packet_of(node: fx.Node) -> str:
    """Name of the operation that a node calls, without its overload."""
    target: Any = node.target
    packet = getattr(target, "_overloadpacket", None)
    return str(getattr(packet, "__name__", getattr(target, "__name__", "")))


def argument(node: fx.Node, name: str, default: Any = None) -> Any:
    """An argument of a call by its name."""
    schema = getattr(node.target, "_schema", None)
    if name in node.kwargs:
        return node.kwargs[name]
    for place, known in enumerate(schema.arguments if schema else ()):
        if known.name == name:
            if place < len(node.args):
                return node.args[place]
            return known.default_value if known.has_default_value() else default
    return default


def grid_of(node: fx.Node, units: Bools) -> Grid | None:
    """The smallest grid that holds these units; None where that would cut an axis whose size follows the input."""
    grid: list[Indices | None] = []
    for dim in range(units.ndim):
        there = along(units, dim)
        if len(there) == 1 or there.all():
            grid.append(None)
        elif is_free(node, dim):
            return None
        else:
            grid.append(np.flatnonzero(there))
    return tuple(grid)


def restrict(x: Tensor, grid: Grid) -> Tensor:
    """The positions of a grid."""
    for dim, positions in enumerate(grid):
        if positions is not None:
            x = x.index_select(dim, torch.from_numpy(positions))
    return x


def _on(positions: Indices, size: int, dim: int, rank: int) -> Bools:
    there = np.zeros(size, dtype=np.bool_)
    there[positions if size > 1 else 0] = True
    shape = [1] * rank
    shape[dim] = size
    return there.reshape(shape)


def read_move(
    node: fx.Node,
    run: Run,
    of: Sequence[fx.Node],
    units: Mapping[fx.Node, Shape],
    others: Sequence[fx.Node] = (),
    sizes: tuple[str, ...] = (),
    through: fx.Node | None = None,
    known: dict[Any, Labels] | None = None,
) -> Move | None:
    """The rule of an operation that moves data; None if it does more than that.

    Args:
        node: the call, or what picks a part of its result.
        run: runs it.
        of: its inputs that are activations.
        units: of those.
        others: inputs that are not.
        sizes: see `Move`.
        through: see `Move`.
        known: what calls have done that were read before: layers of a network are alike.
    """
    labels: Labels | None
    if all(prod(units[source]) == 1 for source in of) and len(of) == 1 and not others:
        ones = (1,) * rank_of(node)
        labels = Labels(np.zeros(ones, dtype=np.int64), np.ones(ones), 1)
        return Move(node, ones, of=tuple(of), labels=labels, run=run, sizes=sizes, through=through)
    key = None if others or known is None else _call_of(node, through, of, units)
    labels = known.get(key) if known is not None and key is not None else None
    if labels is None:
        labels = _labels(node, run, of, units, others)
        if labels is None:
            return None
        if known is not None and key is not None:
            known[key] = labels
    return Move(node, labels.taken.shape, of=tuple(of), labels=labels, run=run, sizes=sizes, through=through)


def _call_of(
    node: fx.Node, through: fx.Node | None, of: Sequence[fx.Node], units: Mapping[fx.Node, Shape]
) -> Any | None:
    """What a call does, equal for calls that do the same; None if it is given other tensors, too."""
    call = through or node

    def plain(argument: Any) -> Any:
        if isinstance(argument, fx.Node):
            if argument in of:
                return "units", of.index(argument), shape_of(argument), units[argument]
            if holds_tensors(argument):
                raise LookupError
            return size_of(argument.meta["val"])
        if isinstance(argument, list | tuple):
            return tuple(plain(item) for item in argument)
        return argument

    try:
        key = (call.target, plain(call.args), tuple((name, plain(value)) for name, value in call.kwargs.items()))
        place = None if through is None else plain(node.args[1])
        hash((key, place))
    except (LookupError, TypeError):
        return None
    return key, place


def _labels(
    node: fx.Node, run: Run, of: Sequence[fx.Node], units: Mapping[fx.Node, Shape], others: Sequence[fx.Node]
) -> Labels | None:
    """Read off by running the operation on numbers of units, twice, with others the second time."""
    total = sum(prod(units[source]) for source in of)
    shift = float(2 * total + 7)
    results = []
    for offset in (1.0, 1.0 + shift):
        start, values = offset, {}
        for source in of:
            values[source] = numbered(units[source], shape_of(source)) + start
            start += prod(units[source])
        values.update({other: torch.full(shape_of(other), 0.5, dtype=torch.float64) for other in others})
        try:
            results.append(run(values, {}))
        except (RuntimeError, ValueError, IndexError, TypeError):
            return None
    first, second = results
    if not isinstance(first, Tensor) or tuple(first.shape) != shape_of(node):
        return None
    moved = (second - first) == shift
    if not bool((moved | (second == first)).all()):
        return None
    labels = torch.where(moved, first - 1.0, -1.0 - 1.0 * (first != 0))
    if bool(((labels != labels.round()) | (labels >= total)).any()):
        return None
    shape = units_by_label(labels)
    less = labels[tuple(slice(None) if size > 1 else slice(0, 1) for size in shape)] if labels.dim() else labels
    fill = torch.where(moved, torch.ones_like(first), first)
    fill = fill[tuple(slice(None) if size > 1 else slice(0, 1) for size in shape)] if labels.dim() else fill
    taken = np.maximum(less.numpy().astype(np.int64), -1)
    constants = np.broadcast_to(1.0, taken.shape) if bool((fill == 1).all()) else fill.numpy().copy()
    return Labels(taken, constants, total)  # the whole tensors are not kept


@dataclass(frozen=True)
class Joined(Rule):
    """Values side by side.

    Attributes:
        parts: the values, in order.
        dim: the axis of the output along which they lie.
    """

    parts: tuple[fx.Node, ...] = ()
    dim: int = 0

    def _sets(self, zeros: Zeros) -> list[Bools]:
        return [
            self._placed(zeros[part] if part in zeros else np.zeros((1,) * rank_of(part), dtype=np.bool_))
            for part in self.parts
        ]

    def _placed(self, sets: Bools) -> Bools:
        """A part's set with the axes of the output."""
        return sets

    def _extent(self, part: fx.Node) -> int:
        raise NotImplementedError

    def zero(self, zeros: Zeros) -> Bools:
        """Where the parts are."""
        spread = []
        for part, sets in zip(self.parts, self._sets(zeros), strict=True):
            shape = list(self.units)
            shape[self.dim] = self._extent(part) if self.units[self.dim] > 1 else 1
            spread.append(np.broadcast_to(sets, shape))
        if self.units[self.dim] > 1:
            return np.concatenate(spread, axis=self.dim)
        return np.asarray(np.logical_and.reduce(spread))

    def _split(self, sets: Bools) -> list[Bools]:
        if self.units[self.dim] == 1:
            return [sets] * len(self.parts)
        ends = np.cumsum([self._extent(part) for part in self.parts])
        return list(np.split(sets, ends[:-1], axis=self.dim))

    def need(self, wanted: Bools, needs: Needs) -> None:
        """Each part's units."""
        for part, sets in zip(self.parts, self._split(wanted), strict=True):
            if needs.is_activation(part):
                needs.ask(part, self._lifted(sets))

    def _lifted(self, sets: Bools) -> Bools:
        """A part's share of a set, with the part's axes."""
        return sets

    def _real(self, builder: Builder) -> Bools:
        return builder.plan.wanted[self.node]

    def weights(self, needs: Needs) -> None:
        """All of parts that are parameters."""
        for part in self.parts:
            if not needs.is_activation(part):
                needs.ask_weight(part, whole(rank_of(part)))


@dataclass(frozen=True)
class Concat(Joined):
    """Values one after the other along an axis. Each part as it is given: one selection behind is cheaper than many."""

    def _extent(self, part: fx.Node) -> int:
        return shape_of(part)[self.dim]

    def build(self, builder: Builder) -> Made:
        """Of the parts of which anything is wanted."""
        layout = list(builder.plan.layout(self.node))
        wanted = self._split(builder.plan.wanted[self.node])
        used = [bool(sets.any()) for sets in wanted]
        parts: list[Any] = []
        positions, real, start, cut = [], [], 0, False
        for part, mine, use in zip(self.parts, wanted, used, strict=True):
            extent = self._extent(part)
            if use or (not any(used) and not parts):
                grid = list(layout)
                held = builder.made(part)
                grid[self.dim] = held.grid[self.dim]
                parts.append(builder.take(part, tuple(grid)))
                along_part = grid[self.dim]
                cut |= along_part is not None
                positions.append((np.arange(extent) if along_part is None else along_part) + start)
                real.append(mine if held.real is None else mine | self._held(held.real, mine.shape))
            else:
                cut = True
                real.append(mine)
            start += extent
        layout[self.dim] = np.concatenate(positions) if cut else None
        if self.units[self.dim] == 1 and cut:
            raise AssertionError("parts of one unit are never cut")
        value = parts[0] if len(parts) == 1 else builder.emit(torch.ops.aten.cat.default, parts, self.dim)
        joined = np.concatenate(real, axis=self.dim) if self.units[self.dim] > 1 else self._real(builder)
        return Made(value, tuple(layout), joined)

    @staticmethod
    def _held(real: Bools, shape: tuple[int, ...]) -> Bools:
        return (
            any_to(real, shape)
            if all(r in (1, s) for r, s in zip(real.shape, shape, strict=True))
            else np.zeros(shape, dtype=np.bool_)
        )


@dataclass(frozen=True)
class Stack(Joined):
    """Values side by side along an axis of their own."""

    def _extent(self, part: fx.Node) -> int:
        return 1

    def _placed(self, sets: Bools) -> Bools:
        return np.expand_dims(sets, self.dim)

    def _lifted(self, sets: Bools) -> Bools:
        return any_over(sets, self.dim)

    def build(self, builder: Builder) -> Made:
        """Of the parts that are there, each with the same positions."""
        layout = builder.plan.layout(self.node)
        kept = layout[self.dim]
        grid = layout[: self.dim] + layout[self.dim + 1 :]
        places = range(len(self.parts)) if kept is None else kept.tolist()
        values = [builder.take(self.parts[place], operand_grid(self.parts[place], grid)) for place in places]
        return Made(builder.emit(torch.ops.aten.stack.default, values, self.dim), layout, self._real(builder))
