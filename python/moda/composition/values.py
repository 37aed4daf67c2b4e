"""Values of a graph and their neurons.

A value that depends on the model's input (an *activation*) has *units*: parts that are kept or dropped as one. They
are described by a shape that broadcasts to the value's own: `(1, C, 1, 1)` says that each of C channels is a unit,
`(1, 1, 1, 1)` that the value is one unit, `(1, 2, C // 2, 1, 1)` that channels lie along two axes. Sets of units are
arrays of bools of that shape. Parameters, and what is computed of them alone, are followed axis by axis.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from moda.observation.marker import mark

TAP = mark._opoverload
"""The operator that marks taps in a captured graph."""
Bools = NDArray[np.bool_]
Indices = NDArray[np.int64]
Shape = tuple[int, ...]
Grid = tuple["Indices | None", ...]
"""Per axis the positions that are there, in order; None is all of them."""


_SIZES: WeakKeyDictionary[Any, dict[Any, int]] = WeakKeyDictionary()
"""Per graph that was captured (by what holds its symbols) the numbers that stand for its symbols."""


def let_sizes_be(environment: Any, sizes: Mapping[Any, int]) -> None:
    """Plan with these numbers for the symbols of a graph, instead of those of the example."""
    _SIZES[environment] = dict(sizes)


def size_of(size: Any) -> int:
    """A size that planning works with: of the example, or as `let_sizes_be` has it."""
    if isinstance(size, int):
        return size
    known = _SIZES.get(size.node.shape_env)
    if known is None:
        return int(size.node.hint)
    expression = size.node.expr
    if expression not in known:
        known[expression] = int(expression.xreplace(known))
    return known[expression]


def symbols_of(size: Any) -> set[Any]:
    """The symbols in a size: none in one that is a number."""
    return set() if isinstance(size, int | float | bool) else set(size.node.expr.free_symbols)


def symbols_of_inputs(graph: fx.Graph) -> set[Any]:
    """Symbols that are sizes of inputs themselves: what is made of them can be computed before anything else."""
    inputs = [node for node in graph.nodes if node.op == "placeholder" and is_tensor(node)]
    sizes = [size for node in inputs for size in node.meta["val"].shape if not isinstance(size, int)]
    return {size.node.expr for size in sizes if size.node.expr.is_symbol}


def value_of(node: fx.Node) -> Tensor:
    """The fake tensor that a node gives; of several the first."""
    value: Any = node.meta["val"]
    return value[0] if isinstance(value, tuple | list) else value  # type: ignore[no-any-return]


def is_tensor(node: Any) -> bool:
    """Whether a node gives one tensor."""
    return isinstance(node, fx.Node) and isinstance(node.meta.get("val"), Tensor)


def holds_tensors(node: fx.Node) -> bool:
    """Whether a node gives a tensor, or several."""
    return isinstance(node.meta.get("val"), Tensor | tuple | list)


def shape_of(node: fx.Node) -> Shape:
    """Sizes that planning works with."""
    return tuple(size_of(size) for size in value_of(node).shape)


def is_free(node: fx.Node, dim: int) -> bool:
    """Whether the size along `dim` follows the input; one that the model asked for as a number does not."""
    size: Any = value_of(node).shape[dim]
    return not (isinstance(size, int) or size.node.expr.is_number)


def any_over(sets: Bools, axis: int | tuple[int, ...], keep: bool = False) -> Bools:
    """Whether there is anything along some axes."""
    return np.asarray(np.any(sets, axis=axis, keepdims=keep))


def all_over(sets: Bools, axis: int | tuple[int, ...], keep: bool = False) -> Bools:
    """Whether there is everything along some axes."""
    return np.asarray(np.all(sets, axis=axis, keepdims=keep))


def any_to(sets: Bools, units: Shape) -> Bools:
    """`sets`, its axes counted from the last one, as a set of these units: one is in it if any part of it is."""
    missing = len(units) - sets.ndim
    wide = sets.reshape((1,) * missing + sets.shape) if missing > 0 else sets
    if missing < 0:
        wide = any_over(wide, tuple(range(-missing)))
    reduced = tuple(dim for dim, unit in enumerate(units) if unit == 1 and wide.shape[dim] > 1)
    if reduced:
        wide = any_over(wide, reduced, keep=True)
    return np.array(np.broadcast_to(wide, units))


def spread(sets: Bools, units: Shape) -> Bools:
    """A set of an operand's units as one of the result's, to which they broadcast."""
    missing = len(units) - sets.ndim
    return np.broadcast_to(sets.reshape((1,) * missing + sets.shape), units)


def along(sets: Bools, dim: int) -> Bools:
    """(size,): whether there is anything at each position of an axis."""
    return any_over(sets, tuple(other for other in range(sets.ndim) if other != dim))


def on_axis(positions: Bools, dim: int, rank: int) -> Bools:
    """A set of positions along one axis of `rank`."""
    shape = [1] * rank
    shape[dim] = -1
    return positions.reshape(shape)


def same(one: Indices | None, other: Indices | None) -> bool:
    """Whether two selections are the same, in the same order."""
    return one is other or (one is not None and other is not None and np.array_equal(one, other))


def all_of(grid: Grid) -> bool:
    """Whether a grid leaves nothing out."""
    return all(positions is None for positions in grid)


def units_by_label(labels: Tensor) -> Shape:
    """The axes along which labels vary."""
    return tuple(
        1 if size <= 1 or bool((labels == labels.narrow(dim, 0, 1)).all()) else size
        for dim, size in enumerate(labels.shape)
    )


def numbered(units: Shape, shape: Sequence[int], start: int = 0) -> Tensor:
    """Each unit's number at each of its places."""
    return torch.arange(start, start + prod(units), dtype=torch.float64).view(units).expand(*shape)
