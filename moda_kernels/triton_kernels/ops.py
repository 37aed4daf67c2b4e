"""The Triton operations as PyTorch sees them: `torch.library` ops (schema, fake, autograd) and the way around them.

Under `torch.compile` and `torch.export` the ops of the namespace `moda_kernels` are traced whole. In eager mode a call
goes straight to an `autograd.Function` that runs the same code, past the dispatcher's Python layers (their cost:
docs/kernels.md).

Every operation is differentiable once. A second derivative is an error that says what to use (`moda_kernels.once`).
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from moda_kernels.closed_form import Weights, summed
from moda_kernels.once import once_only, refuse_second_backward, relu_pool_gradient
from moda_kernels.plain import is_traced, resolved
from moda_kernels.triton_kernels import grouped
from moda_kernels.triton_kernels.grouped import Saved
from moda_kernels.triton_kernels.layouts import arrange, gradient_like
from moda_kernels.triton_kernels.relu_pool_backward import launch_relu_pool_backward
from moda_kernels.triton_kernels.relu_pool_forward import launch_relu_pool


def grouped_losses(activations: Sequence[Tensor], labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(affinity, dispersion, compactness) over all layers, 0-d float32."""
    if is_traced():
        outputs = torch.ops.moda_kernels.modular_losses(list(activations), labels)
        return outputs[0], outputs[1], outputs[2]
    losses: tuple[Tensor, Tensor, Tensor] = _GroupedLosses.apply(labels, *activations)  # type: ignore[no-untyped-call]
    return losses


def weighted_losses(
    activations: Sequence[Tensor], labels: Tensor, weights: Weights
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """The weighted sum of the losses, and the losses, not differentiable."""
    if is_traced():
        return summed(grouped_losses(activations, labels), weights)
    total, affinity, dispersion, compactness = _WeightedLosses.apply(labels, weights, *activations)  # type: ignore[no-untyped-call]
    return total, (affinity, dispersion, compactness)


def pool(activations: Sequence[Tensor]) -> list[Tensor]:
    """The pooled activation of every layer, (N, C) float32; a float32 (N, C) layer is returned as it is."""
    layers = [activation for activation in activations if grouped.needs_pooling(activation)]
    if not layers:
        return list(activations)
    compiling = is_traced()
    pooled = iter(torch.ops.moda_kernels.pool(layers) if compiling else _Pool.apply(*layers))  # type: ignore[no-untyped-call]
    return [next(pooled) if grouped.needs_pooling(activation) else activation for activation in activations]


def relu_pool(x: Tensor, inplace: bool) -> tuple[Tensor, Tensor]:
    """relu(x) and its pooled activation (N, C) float32."""
    if is_traced():
        y, pooled = torch.ops.moda_kernels.relu_pool(x)
        return (x.copy_(y) if inplace else y), pooled
    result: tuple[Tensor, Tensor] = _ReluPool.apply(x, inplace)  # type: ignore[no-untyped-call]
    return result


class _SavedLosses(NamedTuple):
    """What the backward pass of the losses reads."""

    saved: Saved
    activations: tuple[Tensor, ...]

    @staticmethod
    def of(saved_tensors: Sequence[Tensor]) -> _SavedLosses:
        """The fields from a context's saved tensors, which hold them one after the other."""
        count = len(Saved._fields)
        return _SavedLosses(Saved(*saved_tensors[:count]), tuple(saved_tensors[count:]))


# --- eager: autograd.Function around the launches ---------------------------------------------------------------------


class _GroupedLosses(Function):
    @staticmethod
    def forward(ctx: Any, labels: Tensor, *activations: Tensor) -> tuple[Tensor, ...]:
        return _forward(ctx, labels, grouped.UNWEIGHTED, activations)[1:]

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        affinity, dispersion, compactness = (0.0 if gradient is None else 1.0 for gradient in upstream)
        given = [gradient for gradient in upstream if gradient is not None]
        if not given:
            return (None,) * len(ctx.needs_input_grad)
        scalars = [given[0] if gradient is None else gradient for gradient in upstream]
        weights = affinity, dispersion, compactness
        return None, *_backward(ctx, ctx.needs_input_grad[1:], scalars, weights)


class _WeightedLosses(Function):
    @staticmethod
    def forward(ctx: Any, labels: Tensor, weights: Weights, *activations: Tensor) -> tuple[Tensor, ...]:
        losses = _forward(ctx, labels, weights, activations)
        ctx.mark_non_differentiable(*losses[1:])
        ctx.weights = weights
        return losses

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return (None,) * len(ctx.needs_input_grad)
        return None, None, *_backward(ctx, ctx.needs_input_grad[2:], [upstream] * 3, ctx.weights)


def _forward(ctx: Any, labels: Tensor, weights: Weights, activations: Sequence[Tensor]) -> tuple[Tensor, ...]:
    losses, saved = grouped.losses_forward(activations, labels, weights)
    ctx.save_for_backward(*saved, *activations)
    ctx.set_materialize_grads(False)
    ctx.rectified = [grouped.is_rectified(activation) for activation in activations]
    ctx.given = [weakref.ref(activation) for activation in activations] if any(ctx.rectified) else []
    return losses


def _backward(
    ctx: Any, wanted: Sequence[bool], upstream: Sequence[Tensor], weights: Weights
) -> tuple[Tensor | None, ...]:
    saved, activations = _SavedLosses.of(ctx.saved_tensors)
    with torch.no_grad():
        gradients = grouped.losses_backward(activations, saved, _scalars(upstream), wanted, weights, _unseen(ctx))
    return once_only(gradients, [*activations, *upstream])


def _unseen(ctx: Any) -> list[bool]:
    """Which layers' gradients go to a ReLU's backward pass, and to nobody else."""
    if not any(ctx.rectified) or not _goes_to_all_leaves(ctx):
        return [False] * len(ctx.rectified)
    alive = [reference() for reference in ctx.given]  # to which hooks may have come since
    return [of and (x is None or grouped.is_rectified(x)) for of, x in zip(ctx.rectified, alive, strict=True)]


def _goes_to_all_leaves(node: Any) -> bool:
    """Whether this backward pass is like `loss.backward()`, not to tensors that were named, as activations may be."""
    waiting = [node]
    for _ in range(_NODES_TO_A_LEAF):
        if not waiting:
            break
        node = waiting.pop()
        if hasattr(node, "variable"):
            try:
                return torch._C._will_engine_execute_node(node)
            except RuntimeError:  # a leaf among those that torch.autograd.grad was given
                return False
        waiting += [following for following, _ in node.next_functions if following is not None]
    return False


_NODES_TO_A_LEAF = 64  # a layer's parameters are a few steps away


def _scalars(upstream: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    affinity, dispersion, compactness = (resolved(gradient).float() for gradient in upstream)
    return affinity, dispersion, compactness


class _Pool(Function):
    @staticmethod
    def forward(ctx: Any, *activations: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*activations)
        ctx.set_materialize_grads(False)
        return tuple(grouped.pool_forward(activations))

    @staticmethod
    def backward(ctx: Any, *dpooled: Tensor | None) -> tuple[Tensor | None, ...]:
        activations = ctx.saved_tensors
        wanted = [i for i, gradient in enumerate(dpooled) if gradient is not None and ctx.needs_input_grad[i]]
        gradients: list[Tensor | None] = [None] * len(activations)
        with torch.no_grad():
            rows = [resolved(gradient) for i in wanted if (gradient := dpooled[i]) is not None]
            for i, gradient in zip(wanted, grouped.pool_backward([activations[i] for i in wanted], rows), strict=True):
                gradients[i] = gradient
        return once_only(gradients, [*activations, *dpooled])


class _ReluPool(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, inplace: bool) -> tuple[Tensor, Tensor]:
        arranged, layout = arrange(x)
        overwrite = inplace or arranged is not x
        y = arranged if overwrite else torch.empty_like(arranged)
        pooled = launch_relu_pool(arranged, y, layout)
        if inplace:
            y = x if arranged is x else x.copy_(y)
            ctx.mark_dirty(x)
        ctx.save_for_backward(y)
        ctx.set_materialize_grads(False)
        return y, pooled

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dpooled: Tensor | None) -> tuple[Tensor | None, None]:
        (y,) = ctx.saved_tensors
        if dy is None and dpooled is None:
            return None, None
        if torch.is_grad_enabled():
            return relu_pool_gradient(y, dy, dpooled), None
        return _relu_pool_backward(y, dy, dpooled), None


def _relu_pool_backward(y: Tensor, dy: Tensor | None, dpooled: Tensor | None) -> Tensor:
    y, layout = arrange(y)
    if dy is not None:
        dy = resolved(dy)
        if dy.stride() != y.stride() or dy.dtype != y.dtype:
            dy = torch.empty_like(y).copy_(dy)
    rows = None if dpooled is None else resolved(dpooled).contiguous()
    return launch_relu_pool_backward(y, dy, rows, layout)


# --- torch.library: the same launches behind schemas ------------------------------------------------------------------
#
# Ops may not return their inputs, so what a caller of the ops above gets unchanged stays outside of them.


@torch.library.custom_op(
    "moda_kernels::modular_losses",
    mutates_args=(),
    schema="(Tensor[] activations, Tensor labels) -> Tensor[]",
)
def modular_losses_op(activations: Sequence[Tensor], labels: Tensor) -> list[Tensor]:
    """[affinity, dispersion, compactness, *Saved]."""
    losses, saved = grouped.losses_forward(activations, labels)
    return [*losses[1:], *saved]


@modular_losses_op.register_fake
def _(activations: Sequence[Tensor], labels: Tensor) -> list[Tensor]:
    losses = [activations[0].new_empty((), dtype=torch.float32) for _ in range(3)]
    return losses + list(grouped.empty_saved(activations))


@torch.library.custom_op(
    "moda_kernels::modular_losses_backward",
    mutates_args=(),
    schema="(Tensor[] activations, Tensor[] saved, Tensor[] upstream, bool[] wanted) -> Tensor[]",
)
def modular_losses_backward_op(
    activations: Sequence[Tensor], saved: Sequence[Tensor], upstream: Sequence[Tensor], wanted: Sequence[bool]
) -> list[Tensor]:
    """Gradients of the wanted layers, in order."""
    gradients = grouped.losses_backward(activations, Saved(*saved), _scalars(upstream), wanted)
    return [gradient for gradient in gradients if gradient is not None]


@modular_losses_backward_op.register_fake
def _(
    activations: Sequence[Tensor], saved: Sequence[Tensor], upstream: Sequence[Tensor], wanted: Sequence[bool]
) -> list[Tensor]:
    return [gradient_like(layer) for layer, want in zip(activations, wanted, strict=True) if want]


def _losses_setup(ctx: Any, inputs: tuple[Any, ...], output: Sequence[Tensor]) -> None:
    activations, _ = inputs
    ctx.wanted = [layer.requires_grad for layer in activations]
    ctx.save_for_backward(*output[3:], *activations)


def _losses_autograd(ctx: Any, gradients: Sequence[Tensor | None]) -> tuple[list[Tensor | None], None]:
    saved, activations = _SavedLosses.of(ctx.saved_tensors)
    upstream = [saved.pooled.new_zeros(()) if gradient is None else gradient for gradient in gradients[:3]]
    results = iter(torch.ops.moda_kernels.modular_losses_backward(list(activations), list(saved), upstream, ctx.wanted))
    return [next(results) if want else None for want in ctx.wanted], None


modular_losses_op.register_autograd(_losses_autograd, setup_context=_losses_setup)
modular_losses_backward_op.register_autograd(refuse_second_backward)


@torch.library.custom_op("moda_kernels::pool", mutates_args=(), schema="(Tensor[] activations) -> Tensor[]")
def pool_op(activations: Sequence[Tensor]) -> list[Tensor]:
    """Pooled rows of layers that are not their own pool."""
    return grouped.pool_forward(activations)


@pool_op.register_fake
def _(activations: Sequence[Tensor]) -> list[Tensor]:
    return [layer.new_empty(layer.shape[:2], dtype=torch.float32) for layer in activations]


@torch.library.custom_op(
    "moda_kernels::pool_backward", mutates_args=(), schema="(Tensor[] activations, Tensor[] dpooled) -> Tensor[]"
)
def pool_backward_op(activations: Sequence[Tensor], dpooled: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of the layers."""
    return grouped.pool_backward(activations, dpooled)


@pool_backward_op.register_fake
def _(activations: Sequence[Tensor], dpooled: Sequence[Tensor]) -> list[Tensor]:
    return [gradient_like(layer) for layer in activations]


def _pool_setup(ctx: Any, inputs: tuple[Any, ...], output: Sequence[Tensor]) -> None:
    ctx.save_for_backward(*inputs[0])
    ctx.wanted = [layer.requires_grad for layer in inputs[0]]


def _pool_autograd(ctx: Any, dpooled: Sequence[Tensor | None]) -> list[Tensor | None]:
    wanted = [i for i, gradient in enumerate(dpooled) if gradient is not None and ctx.wanted[i]]
    gradients: list[Tensor | None] = [None] * len(dpooled)
    if wanted:
        layers = [ctx.saved_tensors[i] for i in wanted]
        for i, gradient in zip(
            wanted, torch.ops.moda_kernels.pool_backward(layers, [dpooled[i] for i in wanted]), strict=True
        ):
            gradients[i] = gradient
    return gradients


pool_op.register_autograd(_pool_autograd, setup_context=_pool_setup)
pool_backward_op.register_autograd(refuse_second_backward)


@torch.library.custom_op("moda_kernels::relu_pool", mutates_args=(), schema="(Tensor x) -> (Tensor, Tensor)")
def relu_pool_op(x: Tensor) -> tuple[Tensor, Tensor]:
    """relu(x) and its pooled activation."""
    arranged, layout = arrange(x)
    y = gradient_like(arranged)
    return y, launch_relu_pool(arranged, y, layout)


@relu_pool_op.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    return gradient_like(x), x.new_empty(x.shape[:2], dtype=torch.float32)


@torch.library.custom_op(
    "moda_kernels::relu_pool_backward", mutates_args=(), schema="(Tensor y, Tensor? dy, Tensor? dpooled) -> Tensor"
)
def relu_pool_backward_op(y: Tensor, dy: Tensor | None, dpooled: Tensor | None) -> Tensor:
    """Gradient of x."""
    return _relu_pool_backward(y, dy, dpooled)


@relu_pool_backward_op.register_fake
def _(y: Tensor, dy: Tensor | None, dpooled: Tensor | None) -> Tensor:
    return gradient_like(y)


def _relu_pool_setup(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[0])
    ctx.set_materialize_grads(False)


def _relu_pool_autograd(ctx: Any, dy: Tensor | None, dpooled: Tensor | None) -> Tensor | None:
    if dy is None and dpooled is None:
        return None
    dx: Tensor = torch.ops.moda_kernels.relu_pool_backward(ctx.saved_tensors[0], dy, dpooled)
    return dx


relu_pool_op.register_autograd(_relu_pool_autograd, setup_context=_relu_pool_setup)
relu_pool_backward_op.register_autograd(refuse_second_backward)
