"""Backend "triton": the modular losses, pooling, relu_pool, norm_relu_pool, class sums and attributions in Triton.

One file per kernel; grouped.py strings the kernels of the losses together, ops.py shows them to PyTorch. Importing this
module imports neither Triton nor a kernel: both come with the first call.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor

from moda_kernels import _norm_ops
from moda_kernels.batch_norm import BatchNorm
from moda_kernels.closed_form import Weights
from moda_kernels.tally import Tally

_INSTALLED = find_spec("triton") is not None  # looked up at import, because torch.compile cannot trace it
_FLOATS = frozenset({torch.float16, torch.bfloat16, torch.float32})
_OLDEST = (8, 0)  # older GPUs have no bfloat16 arithmetic, and the tests do not compile for them

OPS = frozenset(
    {"grouped_losses", "weighted_losses", "pool", "relu_pool", "norm_relu_pool", "class_sums", "add_attributions"}
)
DTYPES: Mapping[str, frozenset[torch.dtype]] = dict.fromkeys(OPS, _FLOATS)
READS_MEMORY = True
DEVICES: Mapping[str, frozenset[str]] | None = dict.fromkeys(OPS, frozenset({"cuda"}))


def unavailable(device: torch.device | None = None) -> str | None:
    """None if the kernels can run (on `device`, or on any), else the reason in one line. Starts no CUDA context."""
    if not _INSTALLED:
        return "Triton is not installed; it comes with PyTorch's CUDA builds, or `pip install triton`"
    if device is not None and device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None  # Triton's interpreter: for tests
    if device is not None and device.type != "cuda":
        return f"Triton kernels run on NVIDIA GPUs, not on {device.type}"
    if not torch.cuda.is_available():
        return "no CUDA device is visible to PyTorch"
    return _too_old(device.index) if device is not None and torch.cuda.is_initialized() else None


@lru_cache
def _too_old(index: int | None) -> str | None:
    capability = torch.cuda.get_device_capability(index)
    if capability >= _OLDEST:
        return None
    return f"needs compute capability {_OLDEST[0]}.{_OLDEST[1]}, the device has {capability[0]}.{capability[1]}"


def grouped_losses(activations: Sequence[Tensor], labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(affinity, dispersion, compactness) over all layers, 0-d float32; differentiable once."""
    from moda_kernels.triton_kernels import ops

    return ops.grouped_losses(activations, labels)


def weighted_losses(
    activations: Sequence[Tensor], labels: Tensor, weights: Weights
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """The weighted sum of the losses, differentiable once, and the losses, which are not differentiable."""
    from moda_kernels.triton_kernels import ops

    return ops.weighted_losses(activations, labels, weights)


def pool(activations: Sequence[Tensor]) -> list[Tensor]:
    """The pooled activation of every layer, (N, C) float32; differentiable once."""
    from moda_kernels.triton_kernels import ops

    return ops.pool(activations)


def relu_pool(x: Tensor, inplace: bool) -> tuple[Tensor, Tensor]:
    """relu(x) and its pooled activation (N, C) float32; differentiable once."""
    from moda_kernels.triton_kernels import ops

    return ops.relu_pool(x, inplace)


def norm_relu_pool(x: Tensor, norm: BatchNorm) -> tuple[Tensor, Tensor]:
    """`activation(batch_norm(x) + residual)` and its pooled activation; differentiable twice, traced once."""
    from moda_kernels.triton_kernels import norm as kernels

    return _norm_ops.norm_relu_pool(kernels, x, norm)


def class_sums(pooled: Sequence[Tensor], labels: Tensor, num_classes: int, *, normalize: bool = True) -> list[Tensor]:
    """Per layer the (K, C) float32 sums over each class's samples of the rows, L2-normalised unless told otherwise."""
    from moda_kernels.triton_kernels import segment_sums as kernels

    return kernels.class_sums(pooled, labels, num_classes, normalize=normalize)


def add_attributions(activations: Sequence[Tensor], gradients: Sequence[Tensor], labels: Tensor, tally: Tally) -> None:
    """Contract of `moda_kernels.backends.Backend.add_attributions`, in float32."""
    from moda_kernels.triton_kernels import attribution

    attribution.add_attributions(activations, gradients, labels, tally)
