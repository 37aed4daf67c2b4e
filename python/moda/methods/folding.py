"""Frozen batch norms folded into the convolutions and linear layers in front of them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from moda.methods.sites import GateSite, find_sites

_TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-3}
"""How far outputs may move, over the largest one: rounding, far below what a norm in the wrong place does."""


def folded_norms(model: nn.Module, example: Any) -> nn.Module | None:
    """Return a copy of a network in evaluation mode in which frozen batch norms are part of the layer in front of them.

    A batch norm with running statistics is a factor and a summand per neuron. The copy computes the same but for
    rounding, which is looked at: on `example` its outputs are the network's.

    Args:
        model: the network, in evaluation mode, without parameters that require gradients; it is left alone.
        example: a batch of inputs, given to the network as its one argument.

    Returns:
        the copy; None where there is no norm to fold, or one cannot be (what it reads is read elsewhere too, or its
        layer is used more than once).
    """
    if not any(isinstance(module, _BatchNorm) for module in model.modules()):
        return None
    made = copy.deepcopy(model)
    folded = [site for site in find_sites(made, example) if _fold(made, site)]
    return made if folded and _agree(model, made, example) else None


def _fold(model: nn.Module, site: GateSite) -> bool:
    layer, norm = model.get_submodule(site.layer), model.get_submodule(site.output)
    if not isinstance(norm, _BatchNorm) or norm.running_mean is None or norm.running_var is None:
        return False
    fused = fuse_linear_bn_weights if site.features_last else fuse_conv_bn_weights
    assert isinstance(layer.weight, Tensor)
    statistics = (norm.running_mean, norm.running_var, norm.eps)
    weight, bias = fused(layer.weight, layer.bias, *statistics, norm.weight, norm.bias)  # type: ignore[arg-type]
    layer.weight, layer.bias = weight.requires_grad_(False), bias.requires_grad_(False)
    parent, _, name = site.output.rpartition(".")
    setattr(model.get_submodule(parent), name, nn.Identity())
    return True


def _agree(model: nn.Module, folded: nn.Module, example: Any) -> bool:
    with torch.no_grad():
        expected, found = model(example), folded(example)
    if not isinstance(expected, Tensor) or expected.dtype not in _TOLERANCES:
        return False
    allowed = _TOLERANCES[expected.dtype] * expected.abs().amax()
    return bool(((found - expected).abs() <= allowed).all())
