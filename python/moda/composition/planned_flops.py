"""FLOPs of a composed model from its plan, without building or running it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

from moda.composition.slicing import Plan
from moda.inference import evaluating
from moda.observation.taps import InstrumentedModel

__all__ = ["PlannedFlops"]

_COUNTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class PlannedFlops:
    """What `moda.measure.flops` counts, for the composition that a plan describes.

    A convolution or linear layer costs a fixed number of operations per element of its weight, whatever part of it is
    kept. So one counted run of the whole model prices every composition, to the operation.

    Args:
        model: the whole model, instrumented.
        example: one input.

    Attributes:
        whole: operations of the whole model.
        exact: whether convolutions and linear layers are all that costs. If not (say, attention), `of` cannot tell.
    """

    def __init__(self, model: InstrumentedModel, example: Tensor) -> None:
        with evaluating(model), torch.no_grad():
            counts = _Counter(model)
            counts.run(example)
        modules = dict(model.named_modules())
        self.whole = sum(counts.flops.values())
        self.exact = True
        self._prices: dict[str, int] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for node, flops in counts.flops.items():
            module = modules.get(str(node.target)) if node.op == "call_module" else None
            if not isinstance(module, _COUNTED) or flops % module.weight.numel():
                self.exact = False
                continue
            name = f"{node.target}.weight"
            self._shapes[name] = tuple(module.weight.shape)
            self._prices[name] = self._prices.get(name, 0) + flops // module.weight.numel()

    def of(self, plan: Plan) -> int:
        """Operations of the composition.

        Raises:
            ValueError: something else than convolutions and linear layers costs (not `exact`).
        """
        if not self.exact:
            raise ValueError("model: its operations cannot be counted from a plan; compose it and use measure.flops")
        kept = {name: plan.kept[name] for name in self._prices if name in plan.kept}
        return sum(self._prices[name] * part.count(self._shapes[name]) for name, part in kept.items())


class _Counter(fx.Interpreter):
    """Runs a traced model and notes each operation's FLOPs."""

    def __init__(self, model: fx.GraphModule) -> None:
        super().__init__(model)
        self.flops: dict[fx.Node, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        with FlopCounterMode(display=False) as counter:
            result = super().run_node(n)
        if counter.get_total_flops():
            self.flops[n] = int(counter.get_total_flops())
        return result
