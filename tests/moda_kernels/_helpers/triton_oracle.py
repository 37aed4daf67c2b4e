"""What the tests of the Triton kernels share: devices, batches, and the three-way comparison.

On a machine without a GPU the kernels run in Triton's interpreter on CPU tensors; with one, the same tests run on it
(they are marked `gpu` there).
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from moda_kernels import closed_form, triton_kernels

_INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"

DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(not _INTERPRETING, reason="needs TRITON_INTERPRET=1")),
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(_INTERPRETING, reason="interpreting")]),
]

HALF = (torch.float16, torch.bfloat16)
EPS32 = torch.finfo(torch.float32).eps


def assert_three_way(kernel: Tensor, same_dtype: Tensor, truth: Tensor, what: str, ulps: float = 4) -> None:
    """The kernel errs, element by element, no more than PyTorch in the same dtype plus `ulps` units in the last place:
    of the element in the dtype of the result, and of the largest element in float32, in which sums are taken.
    """
    kernel, same_dtype, truth = (tensor.detach().double().cpu() for tensor in (kernel, same_dtype, truth))
    assert kernel.shape == truth.shape, f"{what}: shape {tuple(kernel.shape)}, expected {tuple(truth.shape)}"
    allowed = (same_dtype - truth).abs() + ulps * EPS32 * truth.abs().max() + 1e-30
    excess = (kernel - truth).abs() - allowed
    excess = torch.where(kernel.isnan() | truth.isnan(), torch.inf, excess)
    worst = int(excess.argmax())
    at = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), truth.shape)) if truth.dim() else ()
    message = f"{what}: at {at} truth {truth[at].item():.9g}, PyTorch {same_dtype[at].item():.9g}, kernel"
    assert not (excess > 0).any(), f"{message} {kernel[at].item():.9g}, allowed error {allowed[at].item():.3g}"


def rounded(truth: Tensor, dtype: torch.dtype) -> Tensor:
    """The float64 truth as the dtype would hold it, in float64: a result in half precision cannot be nearer."""
    return truth.to(dtype).double()


def make_layers(shapes: Sequence[tuple[int, ...]], samples: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    """Post-ReLU activations (about half of the values zero), (N, *shape) each."""
    return [torch.randn(samples, *shape).relu().to(dtype).to(device) for shape in shapes]


def leaves(layers: Sequence[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    """Copies that require gradients, in the same layout."""
    return [layer.detach().clone().to(dtype or layer.dtype).requires_grad_() for layer in layers]


def three_ways(layers: Sequence[Tensor], labels: Tensor, weights: Sequence[float] = (1.3, -0.7, 0.3)):
    """Losses and gradients of: kernels, PyTorch in the same dtype, float64. Upstream gradients are not one."""
    results = []
    for module, dtype in ((triton_kernels, None), (closed_form, None), (closed_form, torch.float64)):
        inputs = leaves(layers, dtype)
        losses = module.grouped_losses(inputs, labels)
        gradients = torch.autograd.grad(sum(w * term for w, term in zip(weights, losses, strict=True)), inputs)
        results.append((losses, gradients))
    return results
