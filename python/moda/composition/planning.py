"""Which units of every value, and which part of every parameter, the composition of some classes keeps.

1. Forwards: which units are exactly 0 in the masked model. Source: a tap's mask.
2. Backwards: which units anybody needs. Source: the chosen outputs.
3. A value holds the units that are needed and not 0; parameters keep what these take. A value of which nothing is left
   is *empty*: zeros stand for it, and nothing is computed.

Both graphs of a model, of evaluation and of training, are planned; a parameter keeps what either needs. Planning reads
no weight and builds nothing, so that sizes and overlaps of many modules are cheap.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import fx

from moda.composition.functional import writes
from moda.composition.kept import Kept
from moda.composition.reader import Reader
from moda.composition.rules import Elementwise, Tap, rank_of
from moda.composition.spatial import Norm
from moda.composition.values import (
    Bools,
    Grid,
    Indices,
    Shape,
    along,
    any_to,
    is_free,
    is_tensor,
    on_axis,
    same,
    shape_of,
    symbols_of,
    symbols_of_inputs,
)

__all__ = ["GraphPlan", "Pick", "merged"]


@dataclass(frozen=True)
class Pick:
    """Outputs of which only some classes are given out.

    Attributes:
        places: which of the graph's outputs, and the axis of classes of each.
        classes: in the order they are given out.
        num_classes: of the whole model.
    """

    places: Mapping[int, int]
    classes: Indices
    num_classes: int


class GraphPlan:
    """The plan of one graph.

    Args:
        reader: its rules.
        masks: per tap, in the order of indices, (C,) bool: the neurons kept.
        pick: the outputs wanted.
        extra: units needed besides, by node.
    """

    def __init__(
        self, reader: Reader, masks: Sequence[Bools], pick: Pick, extra: Mapping[fx.Node, Bools] | None = None
    ) -> None:
        self.reader = reader
        self.pick = pick
        self.zeros: dict[fx.Node, Bools] = {}
        self.needed: dict[fx.Node, Bools] = {}
        self.wanted: dict[fx.Node, Bools] = {}
        self.asked: dict[fx.Node, list[Grid]] = {}
        self.empty: set[fx.Node] = set()
        self.held: set[fx.Node] = {value for value in output_of(reader.graph) if isinstance(value, fx.Node)}
        self._known_sizes = symbols_of_inputs(reader.graph)
        self._layouts: dict[fx.Node, Grid] = {}
        self._orders: dict[fx.Node, int] = {}
        self._uniform: dict[tuple[Shape, bool], Bools] = {}
        self._find_zeros(masks)
        self._find_needs(extra or {})
        self._order_classes()
        self._find_weights()

    # -- what rules ask and say

    def is_activation(self, node: fx.Node) -> bool:
        """Whether a node depends on the input."""
        return node in self.reader.activations

    def ask(self, source: fx.Node, units: Bools) -> None:
        """Say that these units of an activation are needed."""
        mine = any_to(units, self.zeros[source].shape)
        held = self.needed.get(source)
        self.needed[source] = mine if held is None else held | mine

    def ask_weight(self, source: fx.Node, grid: Grid) -> None:
        """Say that this part of a parameter is needed."""
        self.asked.setdefault(source, []).append(grid)

    def hold(self, source: fx.Node) -> None:
        """Say that an activation is to be computed even where all that is needed of it is 0."""
        self.held.add(source)

    def is_empty(self, node: fx.Node) -> bool:
        """Whether an activation is 0 wherever it is needed, so that zeros stand for it."""
        return node in self.empty

    def layout(self, node: fx.Node) -> Grid:
        """The smallest grid that holds the wanted units; classes in their order."""
        found = self._layouts.get(node)
        if found is None:
            found = self._layouts[node] = self._make_layout(node)
        return found

    def _make_layout(self, node: fx.Node) -> Grid:
        wanted = self.wanted[node]
        grid: list[Indices | None] = []
        for dim in range(wanted.ndim):
            there = along(wanted, dim)
            if len(there) == 1 or is_free(node, dim):
                grid.append(None)
                continue
            positions = np.flatnonzero(there)
            if self._orders.get(node) == dim:
                grid.append(self.pick.classes[np.isin(self.pick.classes, positions)])
            else:
                grid.append(None if there.all() else positions)
        return tuple(grid)

    def needed_grid(self, node: fx.Node) -> Grid:
        """What is needed of a parameter, or of what is computed of parameters."""
        return merged(self.asked.get(node, []), shape_of(node) if is_tensor(node) else ())

    def is_used(self, node: fx.Node) -> bool:
        """Whether a node is to be computed: anybody needs anything of it, and it is not empty."""
        if node in self.empty:
            return False
        return node in self.asked or bool(self.needed.get(node, _NOTHING).any())

    # -- the three passes

    def _find_zeros(self, masks: Sequence[Bools]) -> None:
        for node, rule in self.reader.rules.items():
            if node not in self.reader.activations:
                continue
            zero = rule.zero(self.zeros)
            if isinstance(rule, Tap):
                shape = [1] * len(rule.units)
                shape[rule.dim] = -1
                zero = zero | ~masks[rule.index].reshape(shape)
            self.zeros[node] = self._shared(zero)

    def _find_needs(self, extra: Mapping[fx.Node, Bools]) -> None:
        for place, value in enumerate(output_of(self.reader.graph)):
            if isinstance(value, fx.Node) and value in self.zeros:
                self.ask(value, self._chosen(value, place) if place in self.pick.places else _ALL)
        for node in self.reader.sizes:
            if node.target is _SIZE and symbols_of(node.meta["val"]) <= self._known_sizes:
                continue  # computed of the sizes of inputs
            for source in node.all_input_nodes:
                if source in self.zeros and source.op != "placeholder":
                    self.ask(source, _first(self.zeros[source].shape))
        for node, units in extra.items():
            self.ask(node, units)
        for node in reversed(self.reader.rules):
            if node not in self.zeros:
                continue
            need = self.needed.get(node)
            if need is None or not need.any():
                self.wanted[node] = self._shared(np.zeros(self.zeros[node].shape, dtype=np.bool_))
                continue
            need = self.needed[node] = self._shared(need)
            self.wanted[node] = self._shared(_some(need, self.zeros[node]))
            if self._is_nothing(node, need):
                self.empty.add(node)
            elif node.op == "get_attr":
                self.ask_weight(node, (None,) * rank_of(node))
            elif node.op != "placeholder":
                self.reader.rules[node].need(self.wanted[node], self)

    def _shared(self, sets: Bools) -> Bools:
        """The same set; of those that hold nothing, or everything, one is kept for each shape."""
        first = bool(sets.flat[0]) if sets.size else False
        if not (sets.all() if first else not sets.any()):
            return sets
        sets.setflags(write=False)
        return self._uniform.setdefault((sets.shape, first), sets)

    def _is_nothing(self, node: fx.Node, need: Bools) -> bool:
        """Whether zeros can stand for a node: nothing else is needed of it, and their sizes can be told."""
        if node.op != "call_function" or node in self.held or not is_tensor(node) or (need & ~self.zeros[node]).any():
            return False
        rule = self.reader.rules[node]
        if isinstance(rule, Norm) and rule.updates:
            return False
        return all(symbols_of(size) <= self._known_sizes for size in node.meta["val"].shape)

    def _chosen(self, value: fx.Node, place: int) -> Bools:
        chosen = np.zeros(self.pick.num_classes, dtype=np.bool_)
        chosen[self.pick.classes] = True
        return on_axis(chosen, self.pick.places[place], rank_of(value))

    def _order_classes(self) -> None:
        """Let the layer that makes the outputs give them in the caller's order, so that nothing is moved behind it."""
        outputs = output_of(self.reader.graph)
        for place, dim in self.pick.places.items():
            node = outputs[place]
            while isinstance(node, fx.Node) and len(node.users) == 1 and node in self.zeros:
                rule = self.reader.rules[node]
                if self.zeros[node].shape[dim] != self.pick.num_classes or (
                    np.prod(self.zeros[node].shape) != self.pick.num_classes
                ):
                    break
                self._orders[node] = dim
                if not (isinstance(rule, Elementwise) and len(rule.sources) == 1) or isinstance(rule, Norm):
                    break
                node = rule.sources[0]

    def _find_weights(self) -> None:
        rules = self.reader.rules
        for node in rules:
            if node in self.zeros and node.op == "call_function" and self.is_used(node):
                rules[node].weights(self)
        for value in output_of(self.reader.graph):
            if isinstance(value, fx.Node) and value not in self.zeros and value in rules:
                self.ask_weight(value, (None,) * rank_of(value))
        self._ask_on()
        for node in rules:  # what the model writes to by itself
            if node not in self.zeros and is_effect(node) and self._has_a_use(node):
                self.ask_weight(node, (None,) * rank_of(node))
        self._ask_on()

    def _ask_on(self) -> None:
        """From what is computed of parameters to parameters."""
        for node in reversed(self.reader.rules):
            if node not in self.zeros and node in self.asked and node.op != "get_attr":
                self.reader.rules[node].weights(self)

    def _has_a_use(self, effect: fx.Node) -> bool:
        """Whether anything of the module whose buffer is written to is used."""
        homes = {str(leaf.target).rpartition(".")[0] for leaf in leaves_of(effect)}
        beside = [n for n in self.reader.rules if n.op == "get_attr" and str(n.target).rpartition(".")[0] in homes]
        others = [node for node in beside if node not in self.reader.written]
        return not others or any(node in self.asked for node in others)

    def states(self) -> dict[str, list[Grid]]:
        """What is asked of every parameter and buffer."""
        return {str(node.target): grids for node, grids in self.asked.items() if node.op == "get_attr"}

    def mismatches(self, kept: Mapping[str, Kept]) -> dict[fx.Node, Bools]:
        """Norms that write to running statistics of which more is kept than they use: the channels they lack."""
        found: dict[fx.Node, Bools] = {}
        for node, rule in self.reader.rules.items():
            if not isinstance(rule, Norm) or not rule.updates or not self.is_used(node):
                continue
            mine = self.layout(node)[rule.dim]
            for source in rule.sources[1:]:
                if source.op == "get_attr" and not same(kept[str(source.target)].along(0), mine):
                    size = rule.units[rule.dim]
                    positions = kept[str(source.target)].along(0)
                    channels = np.ones(size, dtype=np.bool_)
                    if positions is not None:
                        channels = np.isin(np.arange(size), positions)
                    shape = [1] * len(rule.units)
                    shape[rule.dim] = -1
                    found[node] = channels.reshape(shape)
        return found


_SIZE = torch.ops.aten.sym_size.int
_NOTHING = np.zeros(0, dtype=np.bool_)
_ALL = np.ones((), dtype=np.bool_)


def is_effect(node: fx.Node) -> bool:
    """Whether a call writes to a buffer of the model."""
    return node.op == "call_function" and writes(node)


def leaves_of(node: fx.Node) -> list[fx.Node]:
    """The parameters and buffers that a call is given, directly or as views."""
    found = []
    for source in node.all_input_nodes:
        while source.op == "call_function" and len(source.all_input_nodes) == 1:
            source = source.all_input_nodes[0]
        if source.op == "get_attr":
            found.append(source)
    return found


def output_of(graph: fx.Graph) -> list[object]:
    """What a graph gives out."""
    node = next(iter(reversed(graph.nodes)))
    return list(node.args[0])


def merged(grids: Iterable[Grid], shape: Shape) -> Grid:
    """The smallest grid that holds all of these; the order is theirs where they agree, else ascending."""
    grids = list(grids)
    axes: list[Indices | None] = []
    for dim, size in enumerate(shape):
        parts = [grid[dim] for grid in grids if len(grid) > dim]
        if not parts:
            axes.append(None)
        elif all(same(part, parts[0]) for part in parts):
            axes.append(parts[0])
        elif any(part is None for part in parts):
            axes.append(None)
        else:
            united = np.unique(np.concatenate([part for part in parts if part is not None]))
            axes.append(None if len(united) == size else united)
    return tuple(axes)


def _some(need: Bools, zero: Bools) -> Bools:
    """What is needed and not 0; if that is nothing, the first unit that is needed, which then stands for 0."""
    wanted = need & ~zero
    if not wanted.any():
        wanted.flat[int(need.argmax())] = True
    return wanted


def _first(units: Shape) -> Bools:
    first = np.zeros(units, dtype=np.bool_)
    first.flat[0] = True
    return first
