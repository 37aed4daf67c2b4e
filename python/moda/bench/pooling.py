"""Suite "relu_pool": ReLU that pools on the way, against ReLU alone, at one tensor's shape."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from moda.bench import gate
from moda.bench.case import Case, Contender
from moda.bench.clock import Budget, Timed
from moda.bench.compiled import compile_problem, compiled
from moda_kernels import BackendUnavailableError, closed_form, relu_pool
from moda_kernels.backends import select

RELU = "ReLU alone"
_BACKENDS = ("torch", "triton", "native")


def pooling_case(
    shape: tuple[int, ...], device: torch.device, budget: Budget, *, dtype: torch.dtype, compiling: bool
) -> Case:
    """Compare ReLU with pooling by every backend with ReLU alone, for a (N, C, H, W) tensor."""
    values, pooled = math.prod(shape) * dtype.itemsize, shape[0] * shape[1] * 4
    # Forward reads x and writes y and the pooled rows; backward reads y, dy and the rows' gradient and writes dx.
    moved = {"forward": 2 * values + pooled, "backward": 3 * values + pooled, "both": 5 * values + 2 * pooled}
    return Case(
        suite="relu_pool",
        name=f"{'x'.join(map(str, shape))} {str(dtype).removeprefix('torch.')}",
        baseline=RELU,
        build=lambda: _contenders(shape, device, dtype, compiling),
        budget=budget,
        moved=moved,
        parameters={"bytes": values},
    )


Function = Callable[[Tensor], tuple[Tensor, ...]]


def _contenders(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype, compiling: bool) -> list[Contender]:
    x = torch.randn(shape, device=device, dtype=dtype).requires_grad_()
    found = [_contender(RELU, lambda x: (torch.relu(x),), x)]
    for backend in _BACKENDS:
        try:
            select("relu_pool", backend, [x])
        except BackendUnavailableError as error:
            found.append(Contender(backend, skipped=str(error)))
            continue
        found.append(_contender(backend, lambda x, backend=backend: relu_pool(x, backend=backend), x))  # type: ignore[misc]
    if compiling:
        name, problem = "torch, compiled", compile_problem(device.type)
        function = None if problem else compiled(lambda x: relu_pool(x, backend="torch"))
        found.append(_contender(name, function, x) if function else Contender(name, skipped=problem))
    return found


def _contender(name: str, function: Function, x: Tensor) -> Contender:
    gradients = [torch.randn_like(x), torch.randn(x.shape[:2], device=x.device)]

    def forward(_: object = None) -> tuple[Tensor, ...]:
        return function(x)

    def backward(outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(outputs, x, gradients[: len(outputs)])

    def check() -> str:
        outputs = forward()
        (dx,) = backward(outputs)
        return _problem(x, outputs, dx, gradients)

    phases = {
        "forward": Timed(forward),
        "backward": Timed(backward, prepare=forward),
        "both": Timed(lambda _: backward(forward())),
    }
    return Contender(name, phases, check)


def _problem(x: Tensor, outputs: tuple[Tensor, ...], dx: Tensor, gradients: list[Tensor]) -> str:
    """Compare with the closed form in float64; return what differs, or ""."""
    wide = x.detach().double().requires_grad_()
    expected = closed_form.relu_pool(wide, inplace=False)[: len(outputs)]
    upstream = [gradient.double() for gradient in gradients[: len(outputs)]]
    (expected_dx,) = torch.autograd.grad(expected, wide, upstream)
    if not torch.equal(outputs[0].double(), expected[0]):
        return "y: is not relu(x)"
    pooled = gate.first_difference("pooled", outputs[1:], expected[1:], gate.TOLERANCES[torch.float32])
    return pooled or gate.difference("dx", dx, expected_dx, gate.TOLERANCES[dx.dtype])
