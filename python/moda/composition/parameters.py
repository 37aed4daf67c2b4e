"""What is computed of parameters alone: weight norm, low-rank updates, standardised weights, parts of packed weights.

Such a value is needed axis by axis, as a parameter is. Its rule says which positions of what it is computed of are
needed then, so that parametrised weights are cut as plain ones are.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from moda.composition.functional import writes
from moda.composition.movers import argument, packet_of
from moda.composition.rules import Builder, Made, Needs, Rule, Weights, WholeWeight, rank_of
from moda.composition.values import Grid, Indices, Shape, is_tensor, shape_of

__all__ = ["parameter_rule"]

aten = torch.ops.aten

_REDUCTIONS = frozenset((
    "mean", "sum", "amax", "amin", "std", "var", "norm", "linalg_vector_norm", "logsumexp", "prod", "nansum",
))  # fmt: skip
_MIXERS = frozenset(("softmax", "log_softmax", "_softmax", "_log_softmax", "cumsum", "cumprod", "sort"))
_VIEWS = frozenset((
    "t", "transpose", "permute", "numpy_T", "mT", "mH", "matrix_H", "adjoint", "swapaxes", "swapdims", "movedim",
    "moveaxis", "slice", "select", "narrow", "split", "split_with_sizes", "chunk", "tensor_split", "unbind", "expand",
    "unsafe_split", "unsafe_chunk", "hsplit", "vsplit", "broadcast_to", "squeeze", "unsqueeze",
))  # fmt: skip
_RESHAPES = frozenset(("reshape", "view", "flatten", "unflatten", "_unsafe_view"))


def parameter_rule(node: fx.Node, pointwise: bool) -> Rule:
    """The rule of a call that is given parameters, and what is computed of them, alone.

    Args:
        node: gives a tensor.
        pointwise: whether it works on elements by themselves.
    """
    if writes(node) or not is_tensor(node):
        return WholeWeight(node)
    if node.target is operator.getitem:
        return _part(node)
    packet, sources = packet_of(node), _tensors(node)
    if not sources:
        return WholeWeight(node)
    if pointwise:
        return Weights(node)
    if packet in _VIEWS:
        return _view(node, sources[0]) or WholeWeight(node)
    if packet in _RESHAPES:
        return _reshape(node, sources[0]) or WholeWeight(node)
    if packet in ("cat", "concat", "concatenate"):
        return _joined(node) or WholeWeight(node)
    axes = _axes(node, packet, sources)
    return WholeWeight(node) if axes is None else Weights(node, axes=axes)


def _tensors(node: fx.Node) -> list[fx.Node]:
    return [source for source in node.all_input_nodes if is_tensor(source)]


def _static(node: fx.Node) -> bool:
    return all(isinstance(size, int) for size in node.meta["val"].shape)


# ---- axis by axis -----------------------------------------------------------------------------------------------


def _axes(node: fx.Node, packet: str, sources: Sequence[fx.Node]) -> dict[fx.Node, Sequence[int | None]] | None:
    """Per tensor and axis of it the axis of the output along which the same positions lie, see `Weights`."""
    first, rank = sources[0], rank_of(sources[0])
    if packet == "_weight_norm":
        dim = int(argument(node, "dim"))
        return {source: _only(dim, rank_of(source)) for source in sources}
    if packet in _REDUCTIONS and len(sources) == 1:
        return _reduced(node, first)
    if packet in _MIXERS and len(sources) == 1:
        return {first: _but([int(argument(node, "dim", -1))], rank)}
    if packet in ("layer_norm", "rms_norm") and len(sources) == 1:
        count = len(argument(node, "normalized_shape"))
        return {first: _but(range(rank - count, rank), rank)}
    if packet in ("batch_norm", "instance_norm") and rank > 1:
        return {first: _only(1, rank), **dict.fromkeys(sources[1:], (1,))}
    if packet in ("linear", "matmul", "mm"):
        return _contracted(node, packet)
    if packet == "embedding":
        weight = argument(node, "weight")
        others = {source: (None,) * rank_of(source) for source in sources if source is not weight}
        return {**others, weight: (None, rank_of(node) - 1)}
    if packet in ("pad", "constant_pad_nd"):
        padded = argument(node, "pad")
        return {first: _but([rank - 1 - place // 2 for place, size in enumerate(padded) if size], rank)}
    return None


def _only(dim: int, rank: int) -> tuple[int | None, ...]:
    return tuple(place if place == dim else None for place in range(rank))


def _but(dims: Sequence[int], rank: int) -> tuple[int | None, ...]:
    mixed = {dim % rank for dim in dims}
    return tuple(None if place in mixed else place for place in range(rank))


def _reduced(node: fx.Node, source: fx.Node) -> dict[fx.Node, Sequence[int | None]] | None:
    rank, dims = rank_of(source), argument(node, "dim")
    if dims is None or dims == []:
        return {source: (None,) * rank}
    chosen = {int(dim) % rank for dim in (dims if isinstance(dims, list | tuple) else [dims])}
    kept = [dim for dim in range(rank) if dim not in chosen]
    if bool(argument(node, "keepdim", False)):
        return {source: _but(list(chosen), rank)}
    return {source: tuple(kept.index(dim) if dim in kept else None for dim in range(rank))}


def _contracted(node: fx.Node, packet: str) -> dict[fx.Node, Sequence[int | None]] | None:
    """Of a product of two matrices: rows of the left one, columns of the right one."""
    left, right, *bias = (value for value in node.args if isinstance(value, fx.Node))
    rank = rank_of(node)
    if left is right or rank_of(left) != rank or rank_of(right) != 2 or rank < 2:
        return None
    last = rank - 1
    axes: dict[fx.Node, Sequence[int | None]] = {left: (*range(last), None)}
    axes[right] = (last, None) if packet == "linear" else (None, last)
    axes.update(dict.fromkeys(bias, (last,)))
    return axes


# ---- views ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _View(Rule):
    """A part of a tensor, with its axes in another order: slice, select, split, permute, expand, ...

    Attributes:
        source: the tensor.
        axes: per axis of the output the axis of the source that it is; None for one that the source lacks.
        taken: per axis of the source the positions that there are in the whole output; of an axis that the output
            lacks, one.
    """

    source: Any = None
    axes: tuple[int | None, ...] = ()
    taken: tuple[Indices, ...] = ()

    def _asked(self, grid: Grid) -> Grid:
        asked: list[Indices] = list(self.taken)
        for place, axis in enumerate(self.axes):
            positions = grid[place]
            if axis is not None and positions is not None:
                asked[axis] = asked[axis][positions]
        sizes = shape_of(self.source)
        return tuple(
            None if len(positions) == size and (positions == np.arange(size)).all() else positions
            for positions, size in zip(asked, sizes, strict=True)
        )

    def weights(self, needs: Needs) -> None:
        """The same positions."""
        needs.ask_weight(self.source, self._asked(needs.needed_grid(self.node)))

    def build(self, builder: Builder) -> Made:
        """The positions themselves; then axes in order."""
        needed = builder.plan.needed_grid(self.node)
        grid = tuple(None if axis is None else needed[place] for place, axis in enumerate(self.axes))
        value = builder.take(self.source, self._asked(grid))
        mapped = [axis for axis in self.axes if axis is not None]
        order = [*mapped, *(dim for dim in range(len(self.taken)) if dim not in mapped)]
        if order != list(range(len(order))):
            value = builder.emit(aten.permute.default, value, order)
        shape = shape_of(self.node)
        sizes = [size if positions is None else len(positions) for size, positions in zip(shape, grid, strict=True)]
        if len(mapped) != len(order) or len(mapped) != len(sizes):
            flat = [1 if axis is None else size for axis, size in zip(self.axes, sizes, strict=True)]
            value = builder.emit(aten.reshape.default, value, flat)
        if any(axis is None and size > 1 for axis, size in zip(self.axes, sizes, strict=True)):
            value = builder.emit(aten.expand.default, value, sizes)
        return Made(value, grid)


def _part(node: fx.Node) -> Rule:
    """One of several results."""
    call, place = node.args
    if isinstance(call, fx.Node) and isinstance(place, int) and packet_of(call) in _VIEWS and _tensors(call):
        return _view(node, _tensors(call)[0], call, place) or WholeWeight(node)
    return WholeWeight(node)


def _view(node: fx.Node, source: fx.Node, call: fx.Node | None = None, place: int | None = None) -> Rule | None:
    """Read off strides: an axis of the output is the axis of the source by whose stride it goes on."""
    if not _static(node) or not _static(source):
        return None
    sizes = shape_of(source)
    strides = [prod(size + 1 for size in sizes[dim + 1 :]) for dim in range(len(sizes))]
    result = _called(call or node, source, torch.empty_strided(sizes, strides, device="meta"))
    view = result[place] if place is not None else result
    if not isinstance(view, Tensor) or tuple(view.shape) != shape_of(node):
        return None
    offset, start = int(view.storage_offset()), []
    for stride in strides:
        start.append(offset // stride)
        offset %= stride
    taken = [np.asarray([first], dtype=np.int64) for first in start]
    axes: list[int | None] = []
    for size, stride in zip(view.shape, view.stride(), strict=True):
        axis = next((dim for dim, own in enumerate(strides) if size > 1 and stride and stride // own), None)
        if axis is not None and (stride % strides[axis] or axis in axes):
            return None  # a diagonal
        axes.append(axis)
        if axis is not None:
            taken[axis] = start[axis] + stride // strides[axis] * np.arange(size, dtype=np.int64)
    return _View(node, source=source, axes=tuple(axes), taken=tuple(taken))


def _called(node: fx.Node, source: fx.Node, value: Tensor) -> Any:
    """What a call gives for another tensor in place of its only one."""
    target: Any = node.target
    return target(*(value if given is source else given for given in node.args), **node.kwargs)


# ---- shapes -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Reshape(Rule):
    """The same numbers in another shape.

    Attributes:
        source: the tensor.
        axes: per axis of the source the axis of the output that it is; None for one that is joined or split.
    """

    source: Any = None
    axes: tuple[int | None, ...] = ()

    def _asked(self, grid: Grid) -> Grid:
        return tuple(None if axis is None else grid[axis] for axis in self.axes)

    def weights(self, needs: Needs) -> None:
        """The same positions of axes that stay; all of the others."""
        needs.ask_weight(self.source, self._asked(needs.needed_grid(self.node)))

    def build(self, builder: Builder) -> Made:
        """With sizes of what is there."""
        needed = builder.plan.needed_grid(self.node)
        grid = tuple(positions if place in self.axes else None for place, positions in enumerate(needed))
        value = builder.take(self.source, self._asked(grid))
        shape: Shape = shape_of(self.node)
        sizes = [size if positions is None else len(positions) for size, positions in zip(shape, grid, strict=True)]
        return Made(builder.emit(aten.reshape.default, value, sizes), grid)


def _reshape(node: fx.Node, source: fx.Node) -> Rule | None:
    """An axis stays one where as many numbers lie before it, and as many are along it, as there were."""
    if not _static(node) or not _static(source) or not prod(shape_of(source)):
        return None
    before, after = shape_of(source), shape_of(node)
    places = {(prod(after[:place]), size): place for place, size in enumerate(after) if size > 1}
    axes = tuple(places.get((prod(before[:dim]), size)) for dim, size in enumerate(before))
    return _Reshape(node, source=source, axes=axes)


# ---- side by side -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Joined(Rule):
    """Tensors one after the other.

    Attributes:
        parts: in order.
        dim: the axis.
    """

    parts: tuple[fx.Node, ...] = ()
    dim: int = 0

    def _grids(self, grid: Grid) -> Mapping[int, Grid]:
        """Per part of which anything is needed, what."""
        positions, start, found = grid[self.dim], 0, {}
        for place, part in enumerate(self.parts):
            size = shape_of(part)[self.dim]
            own = None
            if positions is not None:
                own = positions[(positions >= start) & (positions < start + size)] - start
            start += size
            if own is None or own.size:
                found[place] = tuple(own if dim == self.dim else other for dim, other in enumerate(grid))
        return found

    def weights(self, needs: Needs) -> None:
        """Of each part its own positions."""
        for place, grid in self._grids(_ascending(needs.needed_grid(self.node), self.dim)).items():
            needs.ask_weight(self.parts[place], grid)

    def build(self, builder: Builder) -> Made:
        """Of the parts that are needed."""
        grid = _ascending(builder.plan.needed_grid(self.node), self.dim)
        values = [builder.take(self.parts[place], part) for place, part in self._grids(grid).items()]
        return Made(values[0] if len(values) == 1 else builder.emit(aten.cat.default, values, self.dim), grid)


def _ascending(grid: Grid, dim: int) -> Grid:
    positions = grid[dim]
    return tuple(np.sort(positions) if place == dim and positions is not None else p for place, p in enumerate(grid))


def _joined(node: fx.Node) -> Rule | None:
    parts: Any = node.args[0]
    if not all(is_tensor(part) and rank_of(part) == rank_of(node) and _static(part) for part in parts):
        return None
    return _Joined(node, parts=tuple(parts), dim=int(argument(node, "dim", 0)) % rank_of(node))
