"""Where gates act: the convolutions and linear layers of a network, each with the norm behind it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moda.inference import evaluating

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.GroupNorm)


@dataclass(frozen=True)
class GateSite:
    """A layer whose neurons a method gates.

    Attributes:
        layer: path of the convolution or linear layer.
        output: path of the module whose output is gated: the norm behind the layer, or the layer itself.
        width: how many neurons.
        features_last: whether neurons are the last axis of the output (linear layers), not the second.
    """

    layer: str
    output: str
    width: int
    features_last: bool


def find_sites(model: nn.Module, example: Any) -> list[GateSite]:
    """Find all convolutions and linear layers that a forward pass calls once, in the order of their registration.

    The norm that reads a layer's output is part of its site. The pass runs in evaluation mode, without gradients.

    Args:
        model: the network.
        example: a batch of inputs, given to the network as its one argument.
    """
    layers = {path: module for path, module in model.named_modules() if isinstance(module, (*CONVOLUTIONS, nn.Linear))}
    norms = {path: module for path, module in model.named_modules() if isinstance(module, _NORMS)}
    outputs: dict[str, list[Tensor]] = {path: [] for path in layers}
    normed: dict[str, str] = {}
    handles = [module.register_forward_hook(_noting(outputs[path])) for path, module in layers.items()]
    handles += [module.register_forward_pre_hook(_reading(path, outputs, normed)) for path, module in norms.items()]
    try:
        with evaluating(model), torch.no_grad():
            model(example)
    finally:
        for handle in handles:
            handle.remove()
    return [
        GateSite(path, normed.get(path, path), _width(layers[path]), isinstance(layers[path], nn.Linear))
        for path, seen in outputs.items()
        if len(seen) == 1
    ]


def _noting(seen: list[Tensor]) -> Callable[[nn.Module, Any, Tensor], None]:
    return lambda _module, _args, output: seen.append(output)


def _reading(
    path: str, outputs: dict[str, list[Tensor]], normed: dict[str, str]
) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def read(_module: nn.Module, args: tuple[Any, ...]) -> None:
        for layer, seen in outputs.items():
            if any(args[0] is output for output in seen):
                normed[layer] = path

    return read


def _width(layer: nn.Module) -> int:
    width: int = layer.weight.shape[0]  # type: ignore[index, assignment]
    return width


def convolution_sites(sites: Iterable[GateSite]) -> list[GateSite]:
    """Return the sites that MwT gates: all convolutions but the first one.

    Raises:
        ValueError: there are none.
    """
    chosen = [site for site in sites if not site.features_last][1:]
    if not chosen:
        raise ValueError("model: expected at least two convolutions, of which all but the first are gated")
    return chosen


def token_sites(sites: Iterable[GateSite], *, attention: bool = True) -> list[GateSite]:
    """Return the sites that NeMo gates in a Transformer: the linear layers of all encoder layers but the first.

    Encoder layers are the numbered parts of the model's longest list of modules that have linear layers inside.

    Args:
        sites: the network's sites, in order.
        attention: whether query, key and value are gated too, as in the published runs.

    Raises:
        ValueError: there are none.
    """
    linear = [site for site in sites if site.features_last]
    numbered: dict[str, dict[int, list[GateSite]]] = {}
    for site in linear:
        parts = site.layer.split(".")
        place = next((index for index, part in enumerate(parts) if part.isdigit()), None)
        if place is not None and place + 1 < len(parts):
            stack = ".".join(parts[:place])
            numbered.setdefault(stack, {}).setdefault(int(parts[place]), []).append(site)
    longest = max(numbered, key=lambda name: len(numbered[name]), default="")
    chosen = [
        site
        for _, own in sorted(numbered.get(longest, {}).items())[1:]
        for site in own
        if (attention or site.layer.rpartition(".")[2] not in ("query", "key", "value"))
    ]
    if not chosen:
        raise ValueError("model: expected at least two encoder layers in a list, of which all but the first are gated")
    return chosen
