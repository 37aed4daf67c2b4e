"""Which channels of every value, and which part of every parameter, the composition of some classes keeps.

A channel is kept where some consumer needs it and it is not 0 throughout. Planning reads no weight and builds
nothing, so that sizes and overlaps of many modules are cheap.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor, fx

from moda.composition.channels import Bools, Flatten, Indices, Kept, PerChannel, Route, Rule
from moda.composition.graph_reader import GraphReader, called
from moda.decomposition.container import Decomposition, check_classes
from moda.observation.taps import InstrumentedModel

__all__ = ["Alignment", "Plan", "Slicer", "check_model", "plan"]


@dataclass(frozen=True)
class Alignment:
    """Channels of one value put in the order another operation takes them in; what is not there is 0.

    Attributes:
        source: positions, in the value given, of the channels that are taken.
        target: their positions in the result.
        width: channels of the result.
        axis: channel axis.
    """

    source: Indices
    target: Indices
    width: int
    axis: int

    def key(self) -> tuple[bytes, bytes, int, int]:
        """Equal for equal alignments."""
        return self.source.tobytes(), self.target.tobytes(), self.width, self.axis


@dataclass(frozen=True)
class Plan:
    """What a composition keeps of a model.

    Attributes:
        classes: in the order of the composed model's outputs.
        num_classes: of the whole model.
        masks: per tap (C,) bool, the neurons kept by at least one of the classes.
        kept: per entry of the model's state_dict the part that is kept; entries that are not listed are dropped.
        routes: per node of `graph` the channels it takes in and gives out.
        alignments: (node, its input) -> how that input's channels are brought in place, where they have to be.
        graph: the model's graph as it was analysed.
    """

    classes: tuple[int, ...]
    num_classes: int
    masks: dict[str, Tensor]
    kept: dict[str, Kept]
    routes: dict[fx.Node, Route]
    alignments: dict[tuple[fx.Node, fx.Node], Alignment]
    graph: fx.Graph


class Slicer:
    """Plans compositions of one model; reads its graph once.

    Args:
        model: `moda.instrument(model)`.
        tap_widths: neurons per tap.
        num_classes: K, the number of logits.

    Raises:
        TypeError: `model` is not an instrumented (traced) model.
        ValueError: taps or logits of the model are not those given, or it writes into parts of tensors; the message
            says which.
    """

    def __init__(self, model: InstrumentedModel, tap_widths: Mapping[str, int], num_classes: int) -> None:
        check_model(model, tap_widths, num_classes)
        self.graph = _live_graph(model)
        self.rules = GraphReader(model, self.graph, tap_widths, num_classes).rules
        self.output = next(node for node in self.graph.nodes if node.op == "output")

    @classmethod
    def of(cls, model: InstrumentedModel, decomposition: Decomposition) -> Slicer:
        """For the taps and classes of a decomposition."""
        widths = {tap: mask.shape[1] for tap, mask in decomposition.masks.items()}
        return cls(model, widths, decomposition.num_classes)

    def plan(self, masks: Mapping[str, Tensor], classes: Sequence[int]) -> Plan:
        """The composition that keeps these neurons and classes.

        Args:
            masks: per tap (C,) bool.
            classes: valid class indices, in the order the outputs are to have.
        """
        chosen = np.asarray(classes, dtype=np.int64)
        kept_neurons = {tap: mask.cpu().numpy() for tap, mask in masks.items()}
        zeros = self._zeros(kept_neurons)
        wanted = self._wanted(zeros, kept_neurons, chosen)
        return self._routes(zeros, wanted, chosen, {tap: mask.cpu() for tap, mask in masks.items()})

    def _zeros(self, masks: Mapping[str, Bools]) -> dict[fx.Node, Bools]:
        """Per followed value, the channels that are 0 whatever the input."""
        zeros: dict[fx.Node, Bools] = {}
        for node, rule in self.rules.items():
            if rule.layout.width is None:
                continue
            inputs = [
                zeros[u] if u in zeros else np.zeros(width, dtype=np.bool_)
                for u, width in zip(rule.inputs, rule.widths, strict=True)
            ]
            zeros[node] = rule.zero(inputs)
            if isinstance(rule, PerChannel) and rule.tap:
                zeros[node] = zeros[node] | ~masks[rule.tap]
        return zeros

    def _wanted(
        self, zeros: Mapping[fx.Node, Bools], masks: Mapping[str, Bools], classes: Indices
    ) -> dict[fx.Node, Bools]:
        """Per followed value, the channels that it is to deliver: needed and not 0, at least one.

        Where nothing remains, the first channel that was asked for holds the place; consumers are given 0 for it.
        """
        wanted = {node: np.zeros_like(zero) for node, zero in zeros.items()}
        wanted[self.output][classes] = True
        for node, rule in reversed(self.rules.items()):
            if node in wanted and node is not self.output:
                wanted[node] = _some(wanted[node], zeros[node])
            for u, need in zip(rule.inputs, rule.need(wanted.get(node, _NOTHING)), strict=True):
                if u in wanted:
                    wanted[u] |= need
        return wanted

    def _routes(
        self,
        zeros: Mapping[fx.Node, Bools],
        wanted: Mapping[fx.Node, Bools],
        classes: Indices,
        masks: dict[str, Tensor],
    ) -> Plan:
        origin = self._origin_of_logits()
        routes: dict[fx.Node, Route] = {}
        alignments: dict[tuple[fx.Node, fx.Node], Alignment] = {}
        kept: dict[str, Kept] = {}
        for node, rule in self.rules.items():
            order = np.flatnonzero(wanted.get(node, _NOTHING))
            if node is origin:
                order = classes[np.isin(classes, order)]
            given = [_given(routes[u], width) for u, width in zip(rule.inputs, rule.widths, strict=True)]
            routes[node] = Route((classes,), classes) if node is self.output else rule.route(order, given)
            kept.update(routes[node].kept)
            for u, offered, taken in zip(rule.inputs, given, routes[node].inputs, strict=True):
                empty = u in zeros and bool(zeros[u][offered].all())
                alignment = _align(offered, taken, empty, self._axis(rule, u))
                if alignment is not None:
                    alignments[node, u] = alignment
        return Plan(tuple(classes.tolist()), len(wanted[self.output]), masks, kept, routes, alignments, self.graph)

    def _axis(self, rule: Rule, value: fx.Node) -> int:
        layout = self.rules[value].layout
        return rule.axis if layout.width is None else layout.axis

    def _origin_of_logits(self) -> fx.Node:
        """The node that may deliver the classes in the caller's order, so that nothing has to be moved behind it."""
        node = self.rules[self.output].inputs[0]
        while (
            len(node.users) == 1
            and isinstance(rule := self.rules[node], PerChannel | Flatten)
            and (not isinstance(rule, Flatten) or rule.positions == 1)
        ):
            node = rule.inputs[0]
        return node


def plan(model: InstrumentedModel, decomposition: Decomposition, classes: Iterable[int]) -> Plan:
    """What `moda.compose(model, decomposition, classes)` keeps of the model.

    Raises:
        TypeError: `model` is not an instrumented (traced) model, or `classes` is no sequence of integers.
        ValueError: no class, one twice or an unknown one; or the decomposition is not one of this model.
    """
    chosen = check_classes(classes, decomposition.num_classes)
    return Slicer.of(model, decomposition).plan(decomposition.select(chosen), chosen)


_NOTHING = np.zeros(0, dtype=np.bool_)


def _some(need: Bools, zero: Bools) -> Bools:
    """What is needed and not 0; if that is nothing, the first channel that is needed, or the first of all."""
    wanted = need & ~zero
    if not wanted.any():
        wanted[int(need.argmax())] = True
    return wanted


def _given(route: Route, width: int) -> Indices:
    """The channels that a value physically has."""
    return np.arange(width) if route.output is None else route.output


def _align(given: Indices, taken: Indices, empty: bool, axis: int) -> Alignment | None:
    """How to make `taken` from `given`, of which nothing counts if it is `empty`; None if they are the same."""
    if not empty and np.array_equal(given, taken):
        return None
    given = given[:0] if empty else given
    place = np.full(max(given.max(initial=0), taken.max(initial=0)) + 1, -1, dtype=np.int64)
    place[given] = np.arange(len(given))
    target = np.flatnonzero(place[taken] >= 0)
    return Alignment(place[taken[target]], target, len(taken), axis)


def check_model(model: InstrumentedModel, tap_widths: Mapping[str, int], num_classes: int) -> None:
    """Refuse a model that is not traced, whose taps are not those of `tap_widths`, or that gives more than logits."""
    if not isinstance(model, InstrumentedModel):
        raise TypeError(f"model: expected an instrumented model, moda.instrument(model), got {type(model).__name__}")
    missing = [tap for tap in model.taps if tap not in tap_widths]
    unknown = [tap for tap in tap_widths if tap not in model.taps]
    if missing or unknown:
        raise ValueError(
            f"decomposition: its taps are not those of the model: it lacks {missing}, and the model lacks {unknown}"
        )
    output = next(node for node in model.graph.nodes if node.op == "output").args[0]
    if not isinstance(output, fx.Node):
        raise ValueError(
            f"model: expected one tensor of logits (N, {num_classes}) as its output, got {type(output).__name__}"
        )


def _live_graph(model: InstrumentedModel) -> fx.Graph:
    """A copy of the graph without dead code. (Values overwritten in place go by their newest name already.)"""
    graph = copy.deepcopy(model.graph)
    for node in graph.nodes:
        if called(node) == "setitem" or "out" in node.kwargs:
            raise ValueError(
                f"model: {node.meta.get('source') or node}: writes into a part of a tensor or into `out=`, which "
                "cannot be followed; write it without (torch.where, torch.cat)"
            )
    for node in reversed(graph.nodes):
        if not node.users and node.op not in ("placeholder", "output"):
            graph.erase_node(node)
    return graph
