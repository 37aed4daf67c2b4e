"""FLOPs of a composed model from its plan, without building or running it."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.flop_counter import FlopCounterMode

from moda.composition.composed import parameters_of
from moda.composition.composer import Composer, Plan
from moda.composition.kept import Kept
from moda.composition.owners import Contraction, Convolution
from moda.composition.planning import GraphPlan
from moda.composition.rules import Rule
from moda.composition.values import Bools, Grid, holds_tensors, shape_of
from moda.inference import device_of

__all__ = ["PlannedFlops"]


class PlannedFlops:
    """What `moda.measure.flops` counts, for the composition that a plan describes.

    A convolution, linear layer or product with a parameter costs a fixed number of operations per element of the
    parameter, whatever part of it is used. So one counted run of the whole model's graph prices every composition, to
    the operation.

    Args:
        composer: of the model.
        example: one input.

    Attributes:
        whole: operations of the whole model.
        exact: whether such layers are all that costs. If not (say, attention), `of` cannot tell.
    """

    def __init__(self, composer: Composer, example: Tensor) -> None:
        reader = composer.readers["eval"]
        tensors = {**parameters_of(composer.model), **composer.captured["eval"].constants}
        counts = _count(reader.graph, tensors, example.to(device_of(composer.model)))
        self.whole = sum(counts.values())
        self.exact = True
        self._prices: dict[Rule, tuple[float, tuple[int, ...]]] = {}
        for node, flops in counts.items():
            rule = reader.rules[node]
            if not isinstance(rule, Convolution | Contraction) or flops % prod(shape_of(rule.weight)):
                self.exact = False
                continue
            shape = shape_of(rule.weight)
            self._prices[rule] = flops // prod(shape), shape

    def of(self, plan: Plan) -> int:
        """Operations of the composition.

        Raises:
            ValueError: something else than layers with weights costs (not `exact`).
        """
        if not self.exact:
            raise ValueError("model: its operations cannot be counted from a plan; compose it and use measure.flops")
        graph = plan.graphs["eval"]
        total = 0.0
        for rule, (price, shape) in self._prices.items():
            if graph.is_used(rule.node):
                asked = _Asked(graph)
                rule.weights(asked)
                grid = asked.grids.get(rule.weight)  # type: ignore[attr-defined]
                total += 0 if grid is None else price * Kept(grid).count(shape)
        return int(total)


class _Asked:
    """Notes what one operation needs of parameters."""

    def __init__(self, plan: GraphPlan) -> None:
        self.zeros: Mapping[fx.Node, Bools] = plan.zeros
        self.wanted: Mapping[fx.Node, Bools] = plan.wanted
        self.is_activation = plan.is_activation
        self.is_empty = plan.is_empty
        self.layout = plan.layout
        self.needed_grid = plan.needed_grid
        self.grids: dict[fx.Node, Grid] = {}

    def ask(self, source: fx.Node, units: Bools) -> None:
        """Activations are of no interest."""

    def hold(self, source: fx.Node) -> None:
        """Activations are of no interest."""

    def ask_weight(self, source: fx.Node, grid: Grid) -> None:
        """Note it."""
        self.grids[source] = grid


def _count(graph: fx.Graph, tensors: Mapping[str, Tensor], example: Tensor) -> dict[fx.Node, int]:
    """Run a graph and count each operation."""
    values: dict[fx.Node, Any] = {}
    flops: dict[fx.Node, int] = {}
    with torch.no_grad():
        for node in graph.nodes:
            if node.op == "placeholder":
                values[node] = example
            elif node.op == "get_attr":
                values[node] = tensors[str(node.target)]
            elif node.op == "call_function":
                with FlopCounterMode(display=False) as counter:
                    target: Any = node.target
                    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: values[n])
                    values[node] = target(*args, **kwargs)
                if counter.get_total_flops() and holds_tensors(node):
                    flops[node] = int(counter.get_total_flops())
    return flops
