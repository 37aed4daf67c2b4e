"""The law of composition, checked: a composed model is handed out only where it gives what the masked one gives."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from moda.composition.capture import Example
from moda.composition.composed import ComposedModel
from moda.composition.movers import argument, packet_of
from moda.inference import whole_float32
from moda.observation.taps import Taps
from moda.outputs import Output, pick
from moda.structure import flatten, flatten_output

__all__ = ["SLACK", "agree", "changes", "check", "in_mode", "is_random", "nudge", "plain_attributes", "untouched"]

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""Largest difference that rounding explains, relative to the largest output, by dtype."""
SLACK = 30.0
"""How much more than the model's own change under the smallest changes of its activations rounding may add up to."""


@contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """The model in a mode; as it is, frozen parts included, if it is in that mode already."""
    modes = [(module, module.training) for module in model.modules()]
    if model.training != training:
        model.train(training)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def untouched(*models: nn.Module) -> Iterator[None]:
    """Afterwards buffers, plain attributes and random state are as before."""
    modules = [module for model in models for module in model.modules()]
    buffers = [(module._buffers, dict(module._buffers)) for module in modules if isinstance(module._buffers, dict)]
    held = [(buffer, buffer.clone()) for model in models for buffer in model.buffers()]
    attributes = [(module, plain_attributes(module)) for module in modules]
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            for module, values in attributes:
                vars(module).update(values)
            for own, before in buffers:
                own.update(before)
            for buffer, value in held:
                buffer.copy_(value)


_PLAIN = (bool, int, float, complex, str, type(None), Tensor)


def plain_attributes(module: nn.Module) -> dict[str, Any]:
    """A module's own attributes that are numbers, texts or tensors, and neither parameters nor buffers nor its mode."""
    return {name: value for name, value in vars(module).items() if isinstance(value, _PLAIN) and name != "training"}


def check(
    composed: ComposedModel, taps: Taps, example: Example, names: Mapping[str, Sequence[str]], output: Output = None
) -> None:
    """Compare a composed model with the masked one on an example, in each mode in which it gives the same twice.

    Raises:
        RuntimeError: they differ by more than rounding; this is a mistake of composition, and nothing is handed out.
    """
    model = taps.model
    if any(tensor.device.type == "meta" for tensor in model.parameters()):
        return
    for mode, route in composed.routes.items():
        if is_random(route.graph):
            continue
        training = mode == "train"
        with in_mode(model, training), in_mode(composed, training), untouched(model, composed), whole_float32():
            factors = [composed.facts.masks[name] for name in names[mode]]
            expected = _masked(taps, example, factors, composed, output)
            got = _tensors(composed(*example.args, **example.kwargs))
            error, allowed = _difference(got, expected)
            if error > allowed:
                again = _masked(taps, _nudged(example), factors, composed, output, nudging=True)
                allowed = max(allowed, SLACK * _difference(again, expected)[0])
        if not error <= allowed:
            raise RuntimeError(
                f"compose: the composed model differs from the masked one by {error:.3g} of the largest output in "
                f"{mode} mode, more than the {allowed:.3g} that rounding explains; nothing is handed out. Report "
                "the model, please; moda.mask gives the masked one"
            )


def _masked(
    taps: Taps,
    example: Example,
    factors: Sequence[Tensor],
    composed: ComposedModel,
    output: Output,
    *,
    nudging: bool = False,
) -> list[Tensor]:
    """The masked model's outputs; with `nudging` every activation is changed by about its rounding, too."""

    def masked(index: int, activation: Tensor) -> Tensor:
        factor = factors[index].to(device=activation.device, dtype=activation.dtype)
        kept = activation * factor.view([-1] + [1] * (activation.dim() - 2))
        return nudge(kept) if nudging else kept

    with untouched(taps.model), taps.replacing(masked):
        value = taps.model(*example.args, **example.kwargs)
    return _tensors(pick(value, composed.classes, composed.num_classes, output))


def _tensors(value: Any) -> list[Tensor]:
    return [x.detach().clone() for x in flatten(value, "output")[1] if isinstance(x, Tensor)]


def changes(module: nn.Module, attributes: Mapping[str, Any], buffers: Mapping[str, Any]) -> list[str]:
    """Names of what a module has put something else in place of, compared with what it had."""
    found = []
    for before, now in ((attributes, plain_attributes(module)), (buffers, module._buffers)):
        for name, value in now.items():
            same = name in before and (before[name] is value or (_is_number(value) and before[name] == value))
            found += [] if same else [name]
    return found


def _is_number(value: Any) -> bool:
    return not isinstance(value, Tensor)


def agree(one: Any, other: Any) -> bool:
    """Whether two outputs of a model are the same, up to rounding."""
    error, allowed = _difference(flatten_output(one)[1], flatten_output(other)[1])
    return error <= allowed


def _difference(got: Sequence[Tensor], expected: Sequence[Tensor]) -> tuple[float, float]:
    """The largest difference relative to the largest output, and what rounding explains."""
    error, allowed = 0.0, 0.0
    for one, other in zip(got, expected, strict=True):
        if one.shape != other.shape:
            return float("inf"), 0.0
        allowed = max(allowed, TOLERANCE.get(other.dtype, 0.0))
        if not other.numel():
            continue
        alike = (one == other) | (one.isnan() & other.isnan())
        finite = other[other.isfinite()].abs()
        scale = float(finite.max()) if finite.numel() else 1.0
        apart = (one.double() - other.double()).abs().masked_fill(alike, 0)
        error = max(error, float(apart.nan_to_num(float("inf")).max()) / max(scale, 1e-30))
    return error, allowed


def _nudged(example: Example) -> Example:
    """With every number changed by about its rounding."""
    return Example(*torch.utils._pytree.tree_map(nudge, (example.args, dict(example.kwargs))))


def nudge(value: Any) -> Any:
    """A tensor with every number changed by about its rounding."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return value * (1 + torch.finfo(value.dtype).eps * (torch.randint_like(value, 2) * 2 - 1))


def is_random(graph: fx.Graph) -> bool:
    """Whether two runs may differ."""
    for node in graph.nodes:
        name = packet_of(node) if node.op == "call_function" else ""
        if name.startswith(("rand", "bernoulli", "multinomial", "normal", "uniform", "poisson", "exponential")):
            return True
        drops = "dropout" in name and bool(argument(node, "train", argument(node, "training", True)))
        if drops and float(argument(node, "p", 0.5)) > 0:
            return True
        if name == "rrelu" and bool(argument(node, "training", False)):
            return True
        if name == "scaled_dot_product_attention" and float(argument(node, "dropout_p", 0.0)) > 0:
            return True
    return False
