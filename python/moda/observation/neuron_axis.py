"""Which axis of an activation holds its neurons.

Behind a convolution, batch, group or instance norm the neurons are dim 1; behind `Linear`, `Bilinear`,
`Embedding`, attention, a recurrent layer, or a layer or RMS norm over one axis they are the last dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from moda.observation.calls import called, module_of

_SECOND_MODULES = (_ConvNd, _NormBase, nn.GroupNorm)
_LAST_MODULES = (nn.Linear, nn.Bilinear, nn.Embedding, nn.EmbeddingBag, nn.MultiheadAttention, nn.RNNBase)
_SECOND_FUNCTIONS: frozenset[object] = frozenset((
    F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d, F.batch_norm,
    F.instance_norm, F.group_norm, torch.batch_norm, torch.group_norm, torch.instance_norm,
))  # fmt: skip
_LAST_FUNCTIONS: frozenset[object] = frozenset((F.linear, F.bilinear, F.embedding, F.multi_head_attention_forward))
_PERMUTATIONS = ("permute", "transpose", "swapaxes", "swapdims")
# Behind these an axis of the input is no axis of the output.
_REMAKES_AXES = frozenset((
    "flatten", "unflatten", "reshape", "view", "view_as", "reshape_as", "mean", "sum", "amax", "amin", "einsum",
    "matmul", "bmm",
))  # fmt: skip


def neuron_dim(value: fx.Node, modules: nn.Module) -> int:
    """Dim of the neurons in `value`: 1, -1 (the last), or another negative dim.

    Walks up from the value through element-wise operations, pooling and dropout to the nearest operation with
    neurons of its own; follows permutations on the way; 1 where nothing is found.
    """
    pending = [value]
    permutations: dict[fx.Node, list[fx.Node]] = {value: []}  # between a node and `value`, the upper one first
    for node in pending:
        dim = _own_neuron_dim(node, modules)
        if dim is not None:
            return _follow(dim, permutations[node])
        name = called(node)
        if node.op in ("call_function", "call_method") and name in _REMAKES_AXES:
            continue
        moved = [node] if name in _PERMUTATIONS else []
        for source in node.all_input_nodes:
            if source not in permutations:
                permutations[source] = [*moved, *permutations[node]]
                pending.append(source)
    return 1


def module_neuron_dim(module: nn.Module | None) -> int | None:
    """Where the output of this module has its neurons; None if it has none of its own."""
    if isinstance(module, _SECOND_MODULES):
        return 1
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return -1 if len(module.normalized_shape) == 1 else None
    return -1 if isinstance(module, _LAST_MODULES) else None


def _own_neuron_dim(node: fx.Node, modules: nn.Module) -> int | None:
    if node.op == "call_module":
        return module_neuron_dim(module_of(node, modules))
    if node.op != "call_function":
        return None
    if node.target in _SECOND_FUNCTIONS:
        return 1
    if node.target in (F.layer_norm, F.rms_norm):
        shape = node.args[1] if len(node.args) > 1 else node.kwargs.get("normalized_shape")
        return -1 if isinstance(shape, Sequence) and len(shape) == 1 else None
    return -1 if node.target in _LAST_FUNCTIONS else None


def _follow(dim: int, permutations: Sequence[fx.Node]) -> int:
    """Where dim 1 or -1 ends up after the permutations."""
    for node in permutations:
        order = _axis_order(node)
        if order:
            place = order.index(dim % len(order))
            dim = place if place == 1 else place - len(order)
    return dim


def _axis_order(node: fx.Node) -> list[int]:
    """Where each axis of a permute or transpose comes from; [] if that is not known before the call."""
    given = list(node.args[1:]) or [value for key, value in node.kwargs.items() if key != "input"]
    if len(given) == 1 and isinstance(given[0], Sequence):
        given = list(given[0])
    axes = [axis for axis in given if isinstance(axis, int)]
    if not axes or len(axes) != len(given):
        return []
    if called(node) == "permute":
        return [axis % len(axes) for axis in axes]
    rank = max(3, max(axes) + 1, -min(axes))  # a transpose does not tell: (N, C, T) unless its axes need more
    order = list(range(rank))
    first, second = axes
    order[first], order[second] = order[second], order[first]
    return order
