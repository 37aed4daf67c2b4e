"""Makes the graph of a composed model from a plan."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

from moda.composition.activations import as_module
from moda.composition.kept import Kept
from moda.composition.planning import GraphPlan, is_effect, output_of
from moda.composition.rules import Made, Tap
from moda.composition.values import (
    TAP,
    Grid,
    Indices,
    any_over,
    is_free,
    is_tensor,
    same,
    shape_of,
    size_of,
    spread,
)

__all__ = ["GraphBuilder", "Pieces"]

aten = torch.ops.aten


class Pieces:
    """What the graphs of a composed model share besides parameters.

    Attributes:
        constants: tensors by name: indices that values are picked by, and constants of the model.
        modules: activation modules by name.
    """

    def __init__(self, taken: set[str]) -> None:
        self.taken = taken
        self.constants: dict[str, Tensor] = {}
        self.modules: dict[str, nn.Module] = {}
        self._home = "_composition"
        while any(name.startswith(f"{self._home}.") for name in taken):  # of a composed model that is composed
            self._home += "_"
        self._indices: dict[tuple[bytes, tuple[int, ...], str], str] = {}

    def index(self, values: Indices | np.ndarray[Any, Any]) -> str:
        """The name of a tensor with these values."""
        key = values.tobytes(), values.shape, str(values.dtype)
        if key not in self._indices:
            self._indices[key] = f"{self._home}.index_{len(self._indices)}"
            self.constants[self._indices[key]] = torch.from_numpy(values.copy())
        return self._indices[key]


class GraphBuilder:
    """Builds one graph.

    Args:
        plan: of the graph.
        kept: what the composed model keeps of each parameter and buffer.
        pieces: what its graphs share.
        taps: their names, in order.
    """

    def __init__(self, plan: GraphPlan, kept: Mapping[str, Kept], pieces: Pieces, taps: Sequence[str]) -> None:
        self.plan = plan
        self.kept = kept
        self.pieces = pieces
        self.taps = taps
        self.graph = fx.Graph()
        self._made: dict[fx.Node, Made] = {}
        self._sizes: dict[fx.Node, Any] = {}
        self._taken: dict[tuple[Any, tuple[bytes, ...]], Any] = {}
        self._parts: dict[tuple[fx.Node, Any], Any] = {}
        self._device: Any = None

    def build(self) -> fx.Graph:
        """The graph: inputs and outputs as in the whole model's, rows of the classes picked."""
        reader = self.plan.reader
        for node in reader.graph.nodes:
            if node.op == "placeholder":
                self._made[node] = Made(self.graph.placeholder(str(node.target)), (None,) * len(shape_of(node)))
        for node in reader.graph.nodes:
            if node in reader.sizes:
                self._sizes[node] = self._size(node)
            elif node in reader.rules and node.op != "placeholder" and self._is_built(node):
                self._made[node] = self._build(node)
        self.graph.output([self._output(place, value) for place, value in enumerate(output_of(reader.graph))])
        _remove_dead(self.graph)
        self.graph.lint()
        return self.graph

    def _is_built(self, node: fx.Node) -> bool:
        return self.plan.is_used(node) or self.plan.is_empty(node)

    def _build(self, node: fx.Node) -> Made:
        if node.op == "get_attr":
            return self._leaf(node)
        if self.plan.is_empty(node):
            grid = self.plan.layout(node)
            return Made(self.zeros(node, grid), grid, np.zeros_like(self.plan.wanted[node]))
        return self.plan.reader.rules[node].build(self)

    def zeros(self, node: fx.Node, grid: Grid) -> Any:
        """Zeros in place of these positions of a node, for inputs of any size."""
        value = node.meta["val"]
        sizes = [
            self._of_inputs(size) if positions is None else len(positions)
            for size, positions in zip(value.shape, grid, strict=True)
        ]
        like = self._of_dtype(value.dtype)
        if like is not None:
            return self.graph.call_function(aten.new_zeros.default, (like, sizes))
        first = next(node for node in self.graph.nodes if node.op == "placeholder")
        return self.graph.call_function(aten.new_zeros.default, (first, sizes), {"dtype": value.dtype})

    def _of_dtype(self, dtype: torch.dtype) -> Any:
        """An input, else a parameter, of this precision: what is made like it follows a cast of the model."""
        for op in ("placeholder", "get_attr"):
            for node, made in self._made.items():
                if node.op == op and is_tensor(node) and node.meta["val"].dtype == dtype:
                    return made.node
        return None

    def _leaf(self, node: fx.Node) -> Made:
        kept = self.kept[str(node.target)]
        axes = tuple(kept.along(dim) for dim in range(len(shape_of(node))))
        return Made(self.graph.create_node("get_attr", str(node.target)), axes)

    def _output(self, place: int, value: Any) -> Any:
        if not isinstance(value, fx.Node):
            return value
        if value in self._sizes:
            return self._sizes[value]
        grid: list[Indices | None] = [None] * len(shape_of(value))
        if place in self.plan.pick.places:
            classes = self.plan.pick.classes
            every = np.array_equal(classes, np.arange(self.plan.pick.num_classes))
            grid[self.plan.pick.places[place]] = None if every else classes
        return self.take(value, tuple(grid))

    def _size(self, node: fx.Node) -> Any:
        """A size that follows the input."""
        if node.target is aten.sym_size.int:
            source, dim = node.args
            assert isinstance(source, fx.Node)
            made = self._made.get(source)
            if made is None or self.plan.is_empty(source):
                return self._of_inputs(node.meta["val"])
            return self.graph.call_function(aten.sym_size.int, (made.node, dim))
        return self.graph.create_node("call_function", node.target, self._plain(node.args, {}), dict(node.kwargs))

    def _of_inputs(self, size: Any) -> Any:
        """The size of a value that is not built, from those of the inputs."""
        if isinstance(size, int):
            return size
        tracer = fx.proxy.GraphAppendingTracer(self.graph)
        known: dict[Any, fx.Proxy] = {}
        for node, made in self._made.items():
            if node.op != "placeholder" or not is_tensor(node):
                continue
            for dim, length in enumerate(node.meta["val"].shape):
                symbol = None if isinstance(length, int) else length.node.expr
                if symbol is not None and symbol.is_symbol and symbol not in known:
                    known[symbol] = fx.Proxy(self.graph.call_function(aten.sym_size.int, (made.node, dim)), tracer)
        if not size.node.expr.free_symbols <= set(known):
            return size_of(size)
        computed = sympy_interp(PythonReferenceAnalysis, known, size.node.expr)
        return computed.node if isinstance(computed, fx.Proxy) else int(computed)

    # -- what rules use

    def made(self, source: fx.Node) -> Made:
        """What was made of a node."""
        return self._made[source]

    def take(self, source: fx.Node, grid: Grid) -> Any:
        """A value with exactly these positions of a source; what the source lacks is 0."""
        if self.plan.is_empty(source):
            return self.zeros(source, grid)
        made = self._made[source]
        masked = self._lacking(source, made, grid)
        key = (
            made.node,
            (*(b"" if p is None else p.tobytes() for p in grid), b"" if masked is None else masked.tobytes()),
        )
        if key not in self._taken:
            taken = self._take(source, made, grid)
            if masked is not None:
                mask = self._following(masked, source, taken)
                taken = self.graph.call_function(aten.where.ScalarOther, (mask, taken, 0.0))
            self._taken[key] = taken
        return self._taken[key]

    def _lacking(self, source: fx.Node, made: Made, grid: Grid) -> np.ndarray[Any, Any] | None:
        """Which of these positions are held but mean nothing, and cannot be left out axis by axis."""
        if made.real is None:
            return None
        rank = len(grid)
        held = np.ones((1,) * rank, dtype=np.bool_)
        shape = shape_of(source)
        real = spread(made.real, made.real.shape)
        taken = real
        for dim, positions in enumerate(grid):
            if positions is not None and real.shape[dim] > 1:
                taken = np.take(taken, positions, axis=dim)
        for dim, positions in enumerate(made.grid):
            if positions is not None:
                there = np.isin(np.arange(shape[dim]), positions)
                if grid[dim] is not None:
                    there = there[grid[dim]]
                held = held & _axis(there, dim, rank)
        clear = _clear_axes(taken)
        lacking = held & ~taken
        for dim, empty in clear.items():
            if is_free(source, dim):
                continue
            lacking = lacking & ~_axis(empty, dim, rank)
        if not lacking.any():
            return None
        return np.asarray(~np.broadcast_to(~taken & held, np.broadcast_shapes(taken.shape, held.shape)))

    def _following(self, mask: np.ndarray[Any, Any], source: fx.Node, taken: fx.Node) -> Any:
        """A mask as a value of the graph, for inputs of any size.

        An axis that grows with the input, heads of all samples say, is folded of axes along which the mask varies and
        of one, which grows, along which it does not.
        """
        small: list[int] = []
        expanded: list[Any] = []
        merged: list[Any] = []
        for dim, length in enumerate(source.meta["val"].shape):
            size = mask.shape[dim]
            folds = None if isinstance(length, int) or size == 1 else _folds(mask, dim)
            if folds is None:
                small, expanded, merged = [*small, size], [*expanded, size], [*merged, size]
                continue
            before, after = folds
            first = np.arange(before)[:, None] * (size // before) + np.arange(after)
            mask = np.take(mask, first.ravel(), axis=dim)
            grown = self.graph.call_function(aten.sym_size.int, (taken, dim))
            times = self.graph.call_function(operator.floordiv, (grown, before * after))
            small, expanded, merged = [*small, before, 1, after], [*expanded, before, times, after], [*merged, grown]
        value: Any = self.constant(mask.reshape(small))
        if len(small) == len(merged):
            return value
        value = self.graph.call_function(aten.expand.default, (value, expanded))
        return self.graph.call_function(aten.reshape.default, (value, merged))

    def _take(self, source: fx.Node, made: Made, grid: Grid) -> Any:
        value, shape = made.node, shape_of(source) if is_tensor(source) else ()
        for dim, asked in enumerate(grid):
            there = made.grid[dim]
            if made.real is not None and not is_free(source, dim):
                there = self._without_empty(made, there, dim, shape[dim])
            value = self._along(value, dim, len(grid), there, made.grid[dim], asked, shape[dim])
        return value

    @staticmethod
    def _without_empty(made: Made, there: Indices | None, dim: int, size: int) -> Indices | None:
        """Positions along an axis at which anything is real."""
        assert made.real is not None
        if made.real.shape[dim] == 1:
            return there
        real = any_over(made.real, tuple(other for other in range(made.real.ndim) if other != dim))
        if there is None:
            return None if real.all() else np.flatnonzero(real)
        return there[real[there]]

    def _along(
        self,
        value: Any,
        dim: int,
        rank: int,
        real: Indices | None,
        held: Indices | None,
        asked: Indices | None,
        size: int,
    ) -> Any:
        """Bring positions along one axis in place.

        Args:
            value: holds the positions `held`, of which `real` mean something.
            dim: the axis.
            rank: number of axes.
            real: positions that mean something.
            held: positions that are there.
            asked: positions wanted.
            size: of the axis in the whole value.
        """
        if same(real, asked) and same(held, asked):
            return value
        every = np.arange(size)
        real = every if real is None else real
        held = every if held is None else held
        asked = every if asked is None else asked
        if np.array_equal(held, asked) and np.array_equal(np.sort(real), np.sort(held)):
            return value
        place = np.full(size, len(held), dtype=np.int64)
        place[held] = np.arange(len(held))
        place[np.setdiff1d(every, real)] = len(held)
        wanted = place[asked]
        if (wanted == len(held)).any():
            padding = [0, 0] * (rank - dim)
            padding[-1] = 1
            value = self.graph.call_function(aten.constant_pad_nd.default, (value, padding))
            total = len(held) + 1
        else:
            total = len(held)
        if np.array_equal(wanted, np.arange(total)):
            return value
        if len(wanted) and np.array_equal(wanted, np.arange(wanted[0], wanted[0] + len(wanted))):
            bounds = (int(wanted[0]), int(wanted[-1]) + 1)
            return self.graph.call_function(aten.slice.Tensor, (value, dim, *bounds))
        return self.graph.call_function(aten.index_select.default, (value, dim, self.constant(wanted)))

    def constant(self, values: np.ndarray[Any, Any]) -> Any:
        """A tensor of the composed model with these values."""
        return self.graph.create_node("get_attr", self.pieces.index(values))

    def emit(self, target: Any, *args: Any, **kwargs: Any) -> Any:
        """Call an operation."""
        return self.graph.call_function(target, tuple(args), kwargs)

    def call(self, node: fx.Node, swap: Mapping[fx.Node, Any], **changed: Any) -> Any:
        """Call what `node` calls with arguments replaced."""
        module = self._activation(node)
        if module is not None:
            return self.graph.call_module(module, (next(iter(swap.values())),))
        target: Any = node.target
        args, kwargs = list(self._plain(node.args, swap)), dict(self._plain(node.kwargs, swap))
        schema = getattr(target, "_schema", None)
        for name, value in changed.items():
            place = next((i for i, a in enumerate(schema.arguments) if a.name == name), None) if schema else None
            new = self._plain(value, swap)
            if place is not None and place < len(args):
                args[place] = new
            else:
                kwargs[name] = new
        if kwargs.get("device") is not None:
            kwargs["device"] = self._where()
        kwargs.pop("pin_memory", None)
        made = self.graph.call_function(target, tuple(args), kwargs)
        if "autocast" in node.meta:
            made.meta["autocast"] = node.meta["autocast"]
        return made

    def part(self, through: fx.Node, swap: Mapping[fx.Node, Any], node: fx.Node) -> Any:
        """One of the results of a call that is made once."""
        key = through, tuple(swap.values())
        if key not in self._parts:
            self._parts[key] = self.call(through, swap)
        return self.graph.call_function(node.target, (self._parts[key], node.args[1]))  # type: ignore[arg-type]

    def _plain(self, argument: Any, swap: Mapping[fx.Node, Any]) -> Any:
        """An argument in terms of the new graph."""
        if isinstance(argument, fx.Node):
            if argument in swap:
                return swap[argument]
            if argument in self._sizes:
                return self._sizes[argument]
            if argument.graph is self.graph:
                return argument
            return self._made[argument].node
        if isinstance(argument, list | tuple):
            return type(argument)(self._plain(item, swap) for item in argument)
        if isinstance(argument, Mapping):
            return {key: self._plain(item, swap) for key, item in argument.items()}
        return argument

    def _where(self) -> Any:
        """The device of the input, where the model named one."""
        if self._device is None:
            first = next(node for node in self.graph.nodes if node.op == "placeholder")
            self._device = self.graph.call_function(torch.ops.prim.device.default, (first,))
        return self._device

    def _activation(self, node: fx.Node) -> str | None:
        """The name of the module that takes the place of an activation function: its tap's, or that of the model's."""
        module = as_module(node)
        if module is None:
            return None
        taps = [user for user in node.users if user.target is TAP]
        if taps:
            rule = self.plan.reader.rules[taps[0]]
            assert isinstance(rule, Tap)
            name = self.taps[rule.index]
        elif isinstance(module, nn.Tanh | nn.Sigmoid):  # gates, which are no activations
            return None
        else:
            name = str(node.meta.get("path", ""))
            name = "" if name in self.taps else name  # a part of an activation that is tapped as a whole
        if not name or name in self.pieces.taken or any(t.startswith(f"{name}.") for t in self.pieces.taken):
            return None
        known = self.pieces.modules.setdefault(name, module)
        return name if repr(known) == repr(module) else None


def _axis(positions: np.ndarray[Any, Any], dim: int, rank: int) -> np.ndarray[Any, Any]:
    shape = [1] * rank
    shape[dim] = -1
    return positions.reshape(shape)


def _clear_axes(real: np.ndarray[Any, Any]) -> dict[int, np.ndarray[Any, Any]]:
    """Per axis the positions at which nothing is real: they are left out axis by axis."""
    found = {}
    for dim, size in enumerate(real.shape):
        if size > 1:
            found[dim] = ~any_over(real, tuple(other for other in range(real.ndim) if other != dim))
    return found


def _remove_dead(graph: fx.Graph) -> None:
    """Calls that nobody uses, except those that write to buffers."""
    for node in reversed(graph.nodes):
        if node.users or node.op in ("placeholder", "output") or is_effect(node):
            continue
        if node.op == "call_function" and _has_state(node):
            continue
        graph.erase_node(node)


def _has_state(node: fx.Node) -> bool:
    name = getattr(getattr(node.target, "_overloadpacket", None), "__name__", "")
    return name in ("batch_norm", "instance_norm")


def _folds(values: np.ndarray[Any, Any], dim: int) -> tuple[int, int] | None:
    """How long the axes before and after the one are along which values of a folded axis repeat themselves.

    Of all such foldings the one with the fewest values; None if there is none.
    """
    length = values.shape[dim]
    rows = np.moveaxis(values, dim, 0).reshape(length, -1)
    whole = [size for size in range(1, length) if length % size == 0]
    for before, after in sorted(((b, a) for b in whole for a in whole if length % (b * a) == 0), key=prod):
        parts = rows.reshape(before, -1, after, rows.shape[1])
        if parts.shape[1] > 1 and (parts == parts[:, :1]).all():
            return before, after
    return None
