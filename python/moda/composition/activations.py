"""Activation functions as modules: a composed model calls them so, to be observed by the same names."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from moda.composition.movers import argument, packet_of

__all__ = ["MODULES", "as_module"]

MODULES: dict[str, tuple[type[nn.Module], dict[str, str]]] = {
    "relu": (nn.ReLU, {}),
    "relu6": (nn.ReLU6, {}),
    "leaky_relu": (nn.LeakyReLU, {"negative_slope": "negative_slope"}),
    "elu": (nn.ELU, {"alpha": "alpha"}),
    "selu": (nn.SELU, {}),
    "celu": (nn.CELU, {"alpha": "alpha"}),
    "gelu": (nn.GELU, {"approximate": "approximate"}),
    "silu": (nn.SiLU, {}),
    "mish": (nn.Mish, {}),
    "hardswish": (nn.Hardswish, {}),
    "softplus": (nn.Softplus, {"beta": "beta", "threshold": "threshold"}),
    "hardtanh": (nn.Hardtanh, {"min_val": "min_val", "max_val": "max_val"}),
    "tanh": (nn.Tanh, {}),
    "sigmoid": (nn.Sigmoid, {}),
}
"""Per operation the module, and its settings by the operation's own names of them."""


def as_module(node: fx.Node) -> nn.Module | None:
    """The module that does what a call does; None if there is none."""
    found = MODULES.get(packet_of(node))
    if found is None or len(node.all_input_nodes) != 1 or "autocast" in node.meta:
        return None
    kind, settings = found
    values: dict[str, Any] = {own: argument(node, name) for own, name in settings.items()}
    if packet_of(node) == "elu" and (argument(node, "scale", 1) != 1 or argument(node, "input_scale", 1) != 1):
        return None
    if packet_of(node) == "hardtanh" and (values["min_val"], values["max_val"]) == (0.0, 6.0):
        return nn.ReLU6()
    return kind(**values)
