"""norm_relu_pool by compiled kernels: eager autograd, and the operators for `torch.compile`.

The kernels are those of csrc/cpu/norm_relu_pool.h on the CPU, of triton_kernels/norm.py on a GPU. The operators
`torch.ops.moda_kernels.norm_relu_pool` and its backward take those of the device. They change no tensor: running
statistics come back as a result, and the caller copies them to where they belong.
"""

# No `from __future__ import annotations`: torch.library reads the annotations to infer the schemas.

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from moda_kernels import _native_calls as calls
from moda_kernels import closed_form
from moda_kernels.batch_norm import RECTIFIERS, BatchNorm
from moda_kernels.once import refuse_second_backward, relu_pool_gradient
from moda_kernels.plain import is_batch, is_traced
from moda_kernels.precision import accumulation


class Kernels(Protocol):
    """Compiled kernels of one kind of device."""

    def dense(self, x: Tensor) -> Tensor:
        """The activation, copied if it lies in a way that the kernels do not take."""

    def norm_relu_pool_forward(self, x: Tensor, norm: BatchNorm) -> tuple[Tensor, Tensor | None, Tensor]:
        """Results for a dense x (pooled is None for a matrix), and what backward needs, (4, C); running statistics
        are updated in place.
        """

    def norm_relu_pool_backward(
        self,
        x: Tensor,
        kept: Tensor | None,
        saved: Tensor,
        dy: Tensor | None,
        dpooled: Tensor | None,
        training: bool,
        activation: str,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Gradients of x, of the residual (where `kept` is there), and of weight and bias, (2, C).

        `kept` is there if there was a residual: y where the activation rectifies, and else the residual.
        """


def norm_relu_pool(kernels: Kernels, x: Tensor, norm: BatchNorm) -> tuple[Tensor, Tensor]:
    """`activation(batch_norm(x) + residual)` and its pooled activation; differentiable twice, as an operator once."""
    x = kernels.dense(x)
    if is_traced():
        y, pooled = _through_operator(x, norm)
    else:
        arguments = (norm.residual, norm.weight, norm.bias, norm, kernels)
        y, pooled = _NormReluPool.apply(x, *arguments)  # type: ignore[no-untyped-call]
    return y, closed_form.pooled_activation(y) if x.dim() == 2 else pooled


def _through_operator(x: Tensor, norm: BatchNorm) -> tuple[Tensor, Tensor]:
    statistics = (norm.running_mean, norm.running_var)
    settings = (norm.training, norm.momentum, norm.eps, norm.activation)
    y, pooled, _, running_mean, running_var = operator(x, norm.residual, norm.weight, norm.bias, *statistics, *settings)
    if norm.training and norm.running_mean is not None and norm.running_var is not None:
        norm.running_mean.copy_(running_mean)
        norm.running_var.copy_(running_var)
    return y, pooled


class _NormReluPool(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        norm: BatchNorm,
        kernels: Kernels,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)
        y, pooled, saved = kernels.norm_relu_pool_forward(x, norm)
        ctx.kernels, ctx.training, ctx.eps, ctx.activation = kernels, norm.training, norm.eps, norm.activation
        # Like batch norm, this keeps the weight: a change of it before backward is an error. The bias is for a graph.
        ctx.bias, ctx.bias_version = bias, None if bias is None else bias._version
        ctx.save_for_backward(x, saved, weight, _kept(residual, y, norm.activation))
        return y, pooled

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dpooled: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None and dpooled is None:
            return (None,) * 6
        with_graph = torch.is_grad_enabled()
        if with_graph or is_batch(dy) or is_batch(dpooled):  # of which plain PyTorch takes both
            with torch.enable_grad():
                return *_gradients_by_pytorch(ctx, dy, dpooled, with_graph), None, None
        x, saved, weight, kept = ctx.saved_tensors
        dx, dresidual, parameters = ctx.kernels.norm_relu_pool_backward(
            x, kept, saved, dy, dpooled, ctx.training, ctx.activation
        )
        dweight = None if weight is None else parameters[0].to(weight.dtype)
        dbias = None if ctx.bias is None else parameters[1].to(ctx.bias.dtype)
        return dx, dresidual, dweight, dbias, None, None


def _kept(residual: Tensor | None, y: Tensor, activation: str) -> Tensor | None:
    """What backward needs beside x, if there is a residual."""
    return None if residual is None else y if activation in RECTIFIERS else residual


def _gradients_by_pytorch(
    ctx: Any, dy: Tensor | None, dpooled: Tensor | None, create_graph: bool
) -> tuple[Tensor | None, ...]:
    """Gradients of x, residual, weight and bias in operations of PyTorch."""
    if ctx.activation in RECTIFIERS:
        return _through_mask(ctx, dy, dpooled, create_graph)
    x, saved, weight, kept = ctx.saved_tensors
    bias = ctx.bias
    if bias is not None and bias._version != ctx.bias_version:
        raise RuntimeError("bias: was modified by an inplace operation, and a graph of the gradient needs what it was")
    leaves = _leaves(x, kept, weight, bias)
    x, residual, weight, bias = leaves
    norm = BatchNorm(
        *_statistics(ctx, saved, weight), weight, bias, residual, ctx.training, 0.0, _eps(ctx), ctx.activation
    )
    given = zip(closed_form.norm_relu_pool(x, norm), (dy, dpooled), strict=True)
    results, upstream = zip(*[pair for pair in given if pair[1] is not None], strict=True)
    present = [leaf for leaf in leaves if leaf is not None]
    gradients = iter(torch.autograd.grad(results, present, upstream, create_graph=create_graph))
    return tuple(None if leaf is None else next(gradients) for leaf in leaves)


def _through_mask(ctx: Any, dy: Tensor | None, dpooled: Tensor | None, create_graph: bool) -> tuple[Tensor | None, ...]:
    """The same where the activation's gradient is 0 or 1, and no function of x."""
    given, saved, weight, y = ctx.saved_tensors
    x, weight = leaves = _leaves(given, weight)
    mean, _, scale, bias = (numbers.view(-1, *[1] * (x.dim() - 2)) for numbers in saved.detach().unbind())
    with torch.set_grad_enabled(create_graph):
        z = (x.to(saved.dtype) - mean) * scale + bias if y is None else y.to(saved.dtype)  # positive exactly where y is
        passes = z.sign() if ctx.activation == "relu" else z.sign().masked_fill(z.to(x.dtype) >= 6, 0)
        g = relu_pool_gradient(passes.to(x.dtype), dy, dpooled)
    running = _statistics(ctx, saved, weight)
    normalized = F.batch_norm(x, *running, weight, training=ctx.training, momentum=0.0, eps=_eps(ctx))
    present = [leaf for leaf in leaves if leaf is not None]
    dx, *dweight = torch.autograd.grad(normalized, present, g, create_graph=create_graph)
    over = (0, *range(2, x.dim()))
    dbias = None if ctx.bias is None else g.sum(over, dtype=saved.dtype).to(ctx.bias.dtype)
    return dx, None if y is None else g, dweight[0] if dweight else None, dbias


def _leaves(*tensors: Tensor | None) -> list[Any]:
    """The tensors as leaves of what is computed from them here, whatever they were computed from, or share."""
    return [None if x is None else x.view_as(x) if x.requires_grad else x.detach().requires_grad_() for x in tensors]


def _statistics(ctx: Any, saved: Tensor, weight: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The running statistics that forward used; None for both where it took the batch's."""
    if ctx.training:
        return None, None
    dtype = saved.dtype if weight is None else weight.dtype
    return saved[0].to(dtype), saved[1].pow(-2).to(dtype)  # eps is in there


def _eps(ctx: Any) -> float:
    """What goes with `_statistics`."""
    return ctx.eps if ctx.training else 0.0


def _kernels_for(x: Tensor) -> Kernels:
    if x.device.type == "cpu":
        return calls
    from moda_kernels.triton_kernels import norm  # imports Triton, which need not be there

    return norm


@torch.library.custom_op("moda_kernels::norm_relu_pool", mutates_args=())
def operator(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y, pooled, what backward needs, and the running statistics after the batch.

    x is dense. What is not there comes back empty: pooled of an (N, C) activation, running statistics nobody keeps.
    """
    mean, var = (None if kept is None else kept.clone() for kept in (running_mean, running_var))
    norm = BatchNorm(mean, var, weight, bias, residual, training, momentum, eps, activation)
    y, pooled, saved = _kernels_for(x).norm_relu_pool_forward(x, norm)
    return (
        y,
        x.new_empty(0) if pooled is None else pooled,
        saved,
        x.new_empty(0) if mean is None else mean,
        x.new_empty(0) if var is None else var,
    )


@operator.register_fake
def _(x: Tensor, _residual: Any, _weight: Any, _bias: Any, running_mean: Any, running_var: Any, *_settings: Any) -> Any:
    dtype, neurons = accumulation(x.dtype), x.shape[1]
    pooled = x.new_empty(0) if x.dim() == 2 else x.new_empty((x.shape[0], neurons), dtype=dtype)
    mean, var = (x.new_empty(0) if kept is None else kept.new_empty(neurons) for kept in (running_mean, running_var))
    return torch.empty_like(x), pooled, x.new_empty((4, neurons), dtype=dtype), mean, var


@torch.library.custom_op("moda_kernels::norm_relu_pool_backward", mutates_args=())
def operator_backward(
    x: Tensor,
    kept: Tensor | None,
    saved: Tensor,
    dy: Tensor | None,
    dpooled: Tensor | None,
    training: bool,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, of the residual (empty if there was none), and of weight and bias: (2, C)."""
    dx, dresidual, parameters = _kernels_for(x).norm_relu_pool_backward(
        x, kept, saved, dy, dpooled, training, activation
    )
    return dx, x.new_empty(0) if dresidual is None else dresidual, parameters


@operator_backward.register_fake
def _(
    x: Tensor, kept: Tensor | None, saved: Tensor, _dy: Any, _dpooled: Any, _training: bool, _activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    dresidual = x.new_empty(0) if kept is None else torch.empty_like(x)
    return torch.empty_like(x), dresidual, saved.new_empty((2, x.shape[1]))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, residual, weight, bias, _, _, training, _, _, activation = inputs
    y, _, saved, mean, var = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(saved, mean, var)
    ctx.training, ctx.activation, ctx.matrix = training, activation, x.dim() == 2
    ctx.dtypes = tuple(None if tensor is None else tensor.dtype for tensor in (weight, bias))
    ctx.save_for_backward(x, saved, _kept(residual, y, activation))


def _differentiate(ctx: Any, dy: Tensor | None, dpooled: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    x, saved, kept = ctx.saved_tensors
    dpooled = None if ctx.matrix else dpooled
    if dy is None and dpooled is None:
        return (None,) * 10
    dx, dresidual, parameters = operator_backward(x, kept, saved, dy, dpooled, ctx.training, ctx.activation)
    dweight, dbias = (
        None if dtype is None else gradient.to(dtype)
        for dtype, gradient in zip(ctx.dtypes, parameters.unbind(), strict=True)
    )
    return dx, None if kept is None else dresidual, dweight, dbias, *[None] * 6


operator.register_autograd(_differentiate, setup_context=_save)
operator_backward.register_autograd(refuse_second_backward)
