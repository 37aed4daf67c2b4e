"""Suite "norm": batch norm, activation and pooling as one operation, against PyTorch's, at one tensor's shape."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from moda.bench import gate
from moda.bench.case import Case, Contender
from moda.bench.clock import Budget, Timed
from moda_kernels import BackendUnavailableError, norm_relu_pool
from moda_kernels.backends import select

NORM = "batch norm, ReLU"
_KINKS, _NEAR = (-3.0, 0.0, 3.0, 6.0), 1e-5
_BACKENDS = ("torch", "triton", "native")

# Everything that a contender is called with: x, residual or None, weight, bias, running mean and variance.
Inputs = tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor, Tensor]
Function = Callable[[Inputs], tuple[Tensor, ...]]


def norm_case(
    shape: tuple[int, ...],
    device: torch.device,
    budget: Budget,
    *,
    dtype: torch.dtype,
    residual: bool = False,
    activation: str = "relu",
) -> Case:
    """Batch norm (training), activation and pooling of (N, C, H, W) by every backend, against PyTorch's, not pooled.

    With `residual`, one is added before the activation, as at the end of a residual block.
    """
    values, pooled = math.prod(shape) * dtype.itemsize, shape[0] * shape[1] * 4
    # Forward reads x twice and writes y; backward reads x and dy twice and writes dx. A residual is read, and its
    # gradient is written; for the mask backward reads y, and the second time the residual's gradient in place of dy.
    forward, backward = (4, 7) if residual else (3, 5)
    moved = {"forward": forward * values + pooled, "backward": backward * values + pooled}
    name = ["x".join(map(str, shape)), str(dtype).removeprefix("torch.")]
    name += ["residual"] * residual + [activation] * (activation != "relu")
    return Case(
        suite="norm",
        name=" ".join(name),
        baseline=_baseline(activation),
        build=lambda: _contenders(shape, device, dtype, residual, activation),
        budget=budget,
        moved=moved | {"both": sum(moved.values())},
        parameters={"bytes": values, "residual": int(residual)},
    )


def _baseline(activation: str) -> str:
    return NORM if activation == "relu" else f"batch norm, {activation}"


def _contenders(
    shape: tuple[int, ...], device: torch.device, dtype: torch.dtype, residual: bool, activation: str
) -> list[Contender]:
    x = torch.randn(shape, device=device, dtype=dtype).requires_grad_()
    beside = torch.randn_like(x).requires_grad_() if residual else None
    weight, bias, mean, var = (torch.full(shape[1:2], value, device=device) for value in (0.8, 0.1, 0.0, 1.0))
    inputs = (x, beside, weight.requires_grad_(), bias.requires_grad_(), mean, var)
    plain = partial(_plain, activation=activation)
    found = [_contender(_baseline(activation), lambda given: (plain(given),), inputs, plain)]
    for backend in _BACKENDS:
        try:
            select("norm_relu_pool", backend, [x])
        except BackendUnavailableError as error:
            found.append(Contender(backend, skipped=str(error)))
            continue
        found.append(_contender(backend, partial(_fused, backend=backend, activation=activation), inputs, plain))
    return found


def _plain(inputs: Inputs, activation: str) -> Tensor:
    z = _normalized(inputs)
    y: Tensor = torch.relu_(z) if activation == "relu" else getattr(F, activation)(z)
    return y


def _normalized(inputs: Inputs) -> Tensor:
    x, residual, weight, bias, mean, var = inputs
    z = F.batch_norm(x, mean, var, weight, bias, training=True)
    return z if residual is None else z.add_(residual)


def _fused(inputs: Inputs, backend: str, activation: str) -> tuple[Tensor, Tensor]:
    x, residual, weight, bias, mean, var = inputs
    return norm_relu_pool(
        x, mean, var, weight, bias, residual=residual, training=True, activation=activation, backend=backend
    )


def _contender(name: str, function: Function, inputs: Inputs, plain: Callable[[Inputs], Tensor]) -> Contender:
    x = inputs[0]
    leaves = [tensor for tensor in inputs[:4] if tensor is not None]
    gradients = [torch.randn_like(x), torch.randn(x.shape[:2], device=x.device)]

    def forward(_: object = None) -> tuple[Tensor, ...]:
        return function(inputs)

    def backward(outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(outputs, leaves, gradients[: len(outputs)])

    def check() -> str:
        outputs = forward()
        return _problem(inputs, outputs, backward(outputs), gradients, plain)

    phases = {
        "forward": Timed(forward),
        "backward": Timed(backward, prepare=forward),
        "both": Timed(lambda _: backward(forward())),
    }
    return Contender(name, phases, check)


def _problem(
    inputs: Inputs,
    outputs: tuple[Tensor, ...],
    found: tuple[Tensor, ...],
    gradients: list[Tensor],
    plain: Callable[[Inputs], Tensor],
) -> str:
    """Against PyTorch in float64."""
    wide: list[Tensor | None] = [
        None if tensor is None else tensor.detach().double().requires_grad_(tensor.requires_grad) for tensor in inputs
    ]
    y = plain(tuple(wide))  # type: ignore[arg-type]
    expected = (y, y.abs().mean((2, 3)))[: len(outputs)]
    leaves = [tensor for tensor in wide[:4] if tensor is not None]
    upstream = [gradient.double() for gradient in gradients[: len(outputs)]]
    tolerance = gate.TOLERANCES[inputs[0].dtype]
    right = list(torch.autograd.grad(expected, leaves, upstream))
    # Where the activation has a kink, a gradient passes or does not by the rounding of its input.
    with torch.no_grad():
        z = _normalized(tuple(wide))  # type: ignore[arg-type]
    kinked = torch.stack([(z - kink).abs() < _NEAR for kink in _KINKS]).any(0)
    ours = [gradient.masked_fill(kinked, 0) if gradient.shape == z.shape else gradient for gradient in found]
    right = [gradient.masked_fill(kinked, 0) if gradient.shape == z.shape else gradient for gradient in right]
    # The gradients of weight and bias are sums of terms of either sign.
    noise = 1e-6 * (inputs[0].numel() / inputs[0].shape[1]) ** 0.5
    return gate.first_difference("outputs", outputs, expected, tolerance) or gate.first_difference(
        "gradients", ours, right, tolerance, noise
    )
