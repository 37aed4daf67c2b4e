"""Convolutions of a training step on a CPU: images with channels last, gradients of weights as matrix products.

Layouts and orders of summation alone differ from PyTorch's own step: results differ by rounding. With channels last
oneDNN's convolutions need no copies into a layout of their own. Its gradient of weights takes up to twice as long as
the matrix products that it comes to, where vectors have 256 bits (AVX2); with channels last it is never asked for here,
because it writes beyond its memory for some shapes (PyTorch 2.13: 1x1, stride 2, from 6 to 12 channels).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.conv import _ConvNd
from torch.utils.hooks import RemovableHandle

from moda.inference import evaluating, fastest_layout

_WINDOW_BYTES = 1 << 21
"""Of the windows that are laid out at once: they stay in a cache until they are multiplied."""


class FastConvolutions:
    """A convolutional network that is trained with channels last; `remove` makes it what it was.

    Inputs are converted when the network is called. The objects, their parameters and the layout of these stay. A
    network stays as it is where it has a convolution of another kind (with groups, padded by reflection, ...), or does
    not take channels last because it views features flat.

    Args:
        model: the network.
        example: a batch of inputs.
        anywhere: change the network also where PyTorch's own way may be the faster one: not on a CPU with AVX2.
    """

    def __init__(self, model: nn.Module, example: Any, *, anywhere: bool = False) -> None:
        self._changed: list[nn.Conv2d] = []
        self._handle: RemovableHandle | None = None
        if not (anywhere or torch.backends.cpu.get_cpu_capability() == "AVX2") or not _takes_products(model):
            return
        with evaluating(model):
            if fastest_layout(model, example) != torch.channels_last:
                return
        self._handle = model.register_forward_pre_hook(_channels_last)
        for module in model.modules():
            if type(module) is nn.Conv2d:
                module.__class__ = _Conv2d
                self._changed.append(module)

    def remove(self) -> None:
        """Make the network what it was."""
        if self._handle is not None:
            self._handle.remove()
        self._handle = None
        for module in self._changed:
            module.__class__ = nn.Conv2d
        self._changed = []


def _takes_products(model: nn.Module) -> bool:
    """Whether all convolutions of a network are plain ones."""
    layers = [module for module in model.modules() if isinstance(module, _ConvNd)]
    return bool(layers) and all(
        type(layer) is nn.Conv2d
        and layer.groups == 1
        and layer.padding_mode == "zeros"
        and not isinstance(layer.padding, str)
        for layer in layers
    )


def _channels_last(_model: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(value.contiguous(memory_format=torch.channels_last) if _is_plain(value) else value for value in args)


class _Conv2d(nn.Conv2d):
    """A convolution whose weight has its gradient from matrix products."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not (_is_plain(input) and weight.requires_grad and torch.is_grad_enabled()):
            plain: Tensor = super()._conv_forward(input, weight, bias)
            return plain
        made: Tensor = _Convolution.apply(input, weight, bias, self.stride, self.padding, self.dilation)  # type: ignore[no-untyped-call]
        return made

    def _get_name(self) -> str:
        return "Conv2d"


def _is_plain(x: Any) -> bool:
    """Whether this is an image of float32 on a CPU, computed eagerly as it is, and nobody looks on."""
    return (
        type(x) is Tensor
        and x.dim() == 4
        and x.dtype == torch.float32
        and x.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._are_functorch_transforms_active()
    )


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any
    ) -> Tensor:
        weight = weight.contiguous(memory_format=torch.channels_last)
        ctx.save_for_backward(x, weight)
        ctx.geometry = (stride, padding, dilation)
        return F.conv2d(x, weight, bias, stride, padding, dilation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        stride, padding, dilation = ctx.geometry
        of_x = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            wanted = (True, False, False)
            of_x, _, _ = torch.ops.aten.convolution_backward(
                gradient, x, weight, None, stride, padding, dilation, False, (0, 0), 1, wanted
            )
        if ctx.needs_input_grad[1]:
            of_weight = weight_gradient(x, gradient, weight.shape, stride, padding, dilation)
        if ctx.needs_input_grad[2]:
            of_bias = gradient.sum((0, 2, 3))
        return of_x, of_weight, of_bias, None, None, None


def weight_gradient(
    x: Tensor,
    gradient: Tensor,
    shape: torch.Size,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> Tensor:
    """Return the gradient of a convolution's weight, as products of the gradient with the windows of the input.

    Args:
        x: (N, C, H, W), the convolution's input.
        gradient: (N, K, H', W'), of its output.
        shape: (K, C, height, width) of the weight.
        stride: of the convolution, as the others.
        padding: zeros at each side.
        dilation: steps between the weight's positions.
    """
    outputs, channels, height, width = shape
    samples, _, rows, columns = gradient.shape
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, padding[1], padding[1], padding[0], padding[0]))
    of_sample, *of_position, of_channel = padded.stride()
    steps = [of_position[axis] * stride[axis] for axis in (0, 1)]
    within = [of_position[axis] * dilation[axis] for axis in (0, 1)]
    windows = padded.as_strided(
        (samples, rows, columns, height, width, channels), (of_sample, *steps, *within, of_channel)
    )
    flat = gradient.permute(0, 2, 3, 1).reshape(samples, rows * columns, outputs)
    size = height * width * channels
    made = x.new_zeros(outputs, size)
    together = max(1, _WINDOW_BYTES // (rows * columns * size * x.element_size()))
    for begin in range(0, samples, together):
        part = windows[begin : begin + together].reshape(-1, size)
        made.addmm_(flat[begin : begin + together].flatten(0, 1).T, part)
    return made.view(outputs, height, width, channels).permute(0, 3, 1, 2)
