"""What each operation of a traced model does with channels.

A *channel* is a neuron of the tensor a node puts out: an index along the channel axis, after flattening a feature.
`moda.graph_reader` gives every node a `Rule`, which answers three questions:

- `zero`: which output channels are exactly 0, given which input channels are;
- `need`: which input channels the wanted output channels depend on;
- `route`: which channels, in which order, it takes in and gives out once sliced, and what is kept of its tensors.

An operation that is not known to treat channels one by one is `Whole`: it is given all channels, dropped ones as
zeros, and keeps all its parameters. So slicing is exact whatever the model holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod

import numpy as np
from numpy.typing import NDArray
from torch import fx

Bools = NDArray[np.bool_]
Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Layout:
    """How a value holds its channels.

    Attributes:
        width: number of channels; None if they are not followed: the value is as in the whole model.
        axis: 1, or -1 where that may be another axis (outputs of `Linear` on inputs of unknown rank).
        ndim: rank, if known.
        positions: positions per channel, if the graph says so.
    """

    width: int | None = None
    axis: int = 1
    ndim: int | None = None
    positions: int | None = None


@dataclass(frozen=True)
class Kept:
    """Which part of a tensor stays: `tensor[rows][:, columns]`; None is all of them."""

    rows: Indices | None = None
    columns: Indices | None = None

    def count(self, shape: Sequence[int]) -> int:
        """Number of elements kept of a tensor of this shape."""
        sizes = list(shape)
        for dim, indices in enumerate((self.rows, self.columns)):
            if indices is not None:
                sizes[dim] = len(indices)
        return prod(sizes)


@dataclass(frozen=True)
class Route:
    """Channels an operation takes from each input and gives out, in this order, and what stays of its tensors."""

    inputs: tuple[Indices, ...]
    output: Indices | None
    kept: dict[str, Kept] = field(default_factory=dict)


@dataclass(frozen=True)
class Rule:
    """An operation on values whose channels are followed.

    Attributes:
        layout: of the output.
        inputs: the nodes whose channels it works on.
        widths: channels it expects from each input.
        axis: where it expects them in an input whose channels are not followed.
    """

    layout: Layout
    inputs: tuple[fx.Node, ...] = ()
    widths: tuple[int, ...] = ()
    axis: int = 1

    def zero(self, inputs: list[Bools]) -> Bools:
        """Output channels that are exactly 0 where these input channels are; asked only if a width is known."""
        raise NotImplementedError

    def need(self, wanted: Bools) -> list[Bools]:
        """Channels of each input that the wanted output channels depend on."""
        raise NotImplementedError

    def route(self, wanted: Indices, given: list[Indices]) -> Route:
        """How the wanted output channels are made; `given` is what each input has to offer."""
        raise NotImplementedError


@dataclass(frozen=True)
class Look(Rule):
    """A look at a value that does not see its channels: its batch size, an extent in space, its dtype."""

    def need(self, wanted: Bools) -> list[Bools]:
        """Nothing."""
        return []

    def route(self, wanted: Indices, given: list[Indices]) -> Route:
        """The value as it is."""
        return Route((), None)


@dataclass(frozen=True)
class Whole(Rule):
    """Anything that may mix channels: takes every channel and gives a value that is not followed.

    Attributes:
        tensors: its parameters and buffers, all of which stay.
    """

    tensors: tuple[str, ...] = ()

    def need(self, wanted: Bools) -> list[Bools]:
        """Everything."""
        return [np.ones(width, dtype=np.bool_) for width in self.widths]

    def route(self, wanted: Indices, given: list[Indices]) -> Route:
        """All channels, in the order of the whole model."""
        return Route(tuple(np.arange(width) for width in self.widths), None, {name: Kept() for name in self.tensors})


@dataclass(frozen=True)
class Contraction(Rule):
    """Convolution or linear layer, in any number of groups (a depthwise convolution has as many as channels).

    A kept output channel keeps its filter even where nothing but zeros comes in, as published for MobileNet.
    Within groups the weight is one block of rows times one block of columns, so every kept group has the same number
    of rows and the same columns; where masks differ between groups the smaller ones are filled up.
    """

    weight: str = ""
    bias: str | None = None
    groups: int = 1

    @property
    def outputs(self) -> int:
        """Output channels of the whole layer."""
        assert self.layout.width is not None
        return self.layout.width

    def zero(self, inputs: list[Bools]) -> Bools:
        """No channel: a sum is not known to be 0."""
        return np.zeros(self.outputs, dtype=np.bool_)

    def need(self, wanted: Bools) -> list[Bools]:
        """All channels of the groups that hold a wanted one."""
        used = wanted.reshape(self.groups, -1).any(1)
        return [np.repeat(used, self.widths[0] // self.groups)]

    def route(self, wanted: Indices, given: list[Indices]) -> Route:
        """Rows of the wanted channels, columns of the given ones."""
        rows, columns, taken = self._blocks(wanted, given[0])
        kept = {self.weight: Kept(rows, columns)}
        if self.bias is not None:
            kept[self.bias] = Kept(rows)
        return Route((taken,), rows, kept)

    def _blocks(self, wanted: Indices, given: Indices) -> tuple[Indices, Indices, Indices]:
        """Rows and columns of the weight, and the input channels they are multiplied with."""
        if self.groups == 1:
            return wanted, given, given
        depth, height = self.widths[0] // self.groups, self.outputs // self.groups
        used = np.unique(wanted // height)
        columns = np.unique(given[np.isin(given // depth, used)] % depth)
        if not columns.size:
            columns = np.zeros(1, dtype=np.int64)
        taken = (used[:, None] * depth + columns).ravel()
        return _equal_rows(wanted, used, height), columns, taken


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
class PerChannel(Rule):
    """An operation on every channel by itself: activations, norms over a batch, pooling, dropout, taps.

    Attributes:
        keeps_zero: a channel of zeros stays one.
        tensors: the operation's tensors with one entry per channel.
        others: its tensors that stay whole.
        tap: name of the tap, if it is one.
    """

    keeps_zero: bool = True
    tensors: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    tap: str | None = None

    def zero(self, inputs: list[Bools]) -> Bools:
        """Those of the input, if they stay 0."""
        return inputs[0] if self.keeps_zero else np.zeros_like(inputs[0])

    def need(self, wanted: Bools) -> list[Bools]:
        """The same channels."""
        return [wanted]

    def route(self, wanted: Indices, given: list[Indices]) -> Route:
        """The same channels in and out."""
        taken = _in_given_order(wanted, given[0])
        kept = {name: Kept(taken) for name in self.tensors} | {name: Kept() for name in self.others}
        return Route((taken,), taken, kept)


@dataclass(frozen=True)
class Elementwise(Rule):
    """Sum or product of values with the same channels (an input of width 1 is broadcast)."""

    product: bool = False

    def zero(self, inputs: list[Bools]) -> Bools:
        """A product is 0 where any factor is, a sum where all terms are."""
        wide = np.broadcast_arrays(*inputs)
        return np.asarray(np.logical_or.reduce(wide) if self.product else np.logical_and.reduce(wide))

    def need(self, wanted: Bools) -> list[Bools]:
        """The same channels of every input."""
        return [wanted if width == len(wanted) else np.asarray([wanted.any()]) for width in self.widths]

    def route(self, wanted: Indices, given: list[Indices]) -> Route:
        """The same channels of every input and of the output."""
        taken = _in_given_order(wanted, given[0])
        single = np.zeros(1, dtype=np.int64)
        return Route(tuple(taken if width == self.layout.width else single for width in self.widths), taken)


@dataclass(frozen=True)
class Concat(Rule):
    """Channels of the inputs side by side."""

    @property
    def _ends(self) -> Indices:
        return np.cumsum(self.widths)

    def zero(self, inputs: list[Bools]) -> Bools:
        """Those of the inputs."""
        return np.concatenate(inputs)

    def need(self, wanted: Bools) -> list[Bools]:
        """Each input's part."""
        return list(np.split(wanted, self._ends[:-1]))

    def route(self, wanted: Indices, given: list[Indices]) -> Route:
        """Each input as it is given, if any of it is wanted: one selection behind is cheaper than one per input."""
        starts = self._ends - self.widths
        parts = []
        for start, end, offered in zip(starts, self._ends, given, strict=True):
            used = bool(((wanted >= start) & (wanted < end)).any())
            parts.append(offered if used else offered[:0])
        return Route(tuple(parts), np.concatenate([part + start for part, start in zip(parts, starts, strict=True)]))


@dataclass(frozen=True)
class Flatten(Rule):
    """Every channel becomes as many features as it has positions, in channel-major order."""

    positions: int = 1

    def zero(self, inputs: list[Bools]) -> Bools:
        """All features of the input's."""
        return np.repeat(inputs[0], self.positions)

    def need(self, wanted: Bools) -> list[Bools]:
        """Channels of which any feature is wanted."""
        return [np.asarray(wanted.reshape(-1, self.positions).any(1))]

    def route(self, wanted: Indices, given: list[Indices]) -> Route:
        """All features of the channels of which any is wanted."""
        taken = _in_given_order(np.unique(wanted // self.positions), given[0])
        return Route((taken,), (taken[:, None] * self.positions + np.arange(self.positions)).ravel())


def _in_given_order(wanted: Indices, given: Indices) -> Indices:
    """`wanted`, in the order of `given` if that holds the same channels: then nothing needs to be moved."""
    return given if np.array_equal(np.sort(given), np.sort(wanted)) else wanted
