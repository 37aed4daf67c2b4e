"""Which implementation runs, and why the others cannot.

A backend is a module that offers some of the operations below under these names (see CONTRIBUTING.md, "How to add a
backend"):

    OPS            frozenset of the names of the operations it implements
    DTYPES         operation -> dtypes of activations it takes
    DEVICES        operation -> device types it runs on; None: any
    unavailable(device) -> None if it can run there, else one line: the reason and what to do about it

    grouped_losses(activations, segments) -> (affinity, dispersion, compactness)
    pool(activations) -> [pooled activation of each layer]
    relu_pool(x, inplace) -> (relu(x), pooled)
    norm_relu_pool(x, norm) -> (relu(batch_norm(x) + residual), pooled); norm is a BatchNorm
    class_sums(pooled, labels, num_classes, *, normalize=True) -> [(K, C) sums over each class of each layer's rows]
    count_firings(activations, labels, threshold, counts, class_sizes, invalid, sums=()) -> None (in place, no graph)

`auto` takes the first of `PREFERENCE` that can run the operation on the given tensors. The environment variable
`MODA_BACKEND` stands in for `auto` in every operation that the named backend implements. A backend asked for by name
that cannot run is an error that says why: only `auto` may fall back.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moda_kernels import closed_form, reference

NAMES = ("reference", "torch", "triton", "native")
PREFERENCE = ("triton", "native", "torch", "reference")

_modules: dict[str, Any] = {"torch": closed_form, "reference": reference}


class BackendUnavailableError(RuntimeError):
    """A backend was asked for by name, and it cannot run; the message says why."""


@dataclass(frozen=True)
class Status:
    """Whether a backend can run on this machine. True when it can; printed, it gives the reason when it cannot."""

    available: bool
    reason: str = ""

    def __bool__(self) -> bool:
        return self.available

    def __str__(self) -> str:
        return "available" if self.available else self.reason


def backends() -> dict[str, Status]:
    """Every backend's name and whether it can run on this machine, with the reason when it cannot.

    Example:
        >>> print(moda_kernels.backends()["torch"])
        available
    """
    status = {}
    for name in NAMES:
        reason = _module(name).unavailable()
        status[name] = Status(reason is None, reason or "")
    return status


def select(operation: str, requested: str, tensors: Sequence[Tensor]) -> Any:
    """The backend module that runs `operation` on `tensors`.

    Raises:
        ValueError: `requested` or MODA_BACKEND is no backend's name.
        BackendUnavailableError: a backend was named that cannot run this.
    """
    if requested == "auto":
        # Inductor fuses the closed form itself; a call into a compiled kernel would only get in its way.
        if torch.compiler.is_compiling():
            return _module("torch")
        override = os.environ.get("MODA_BACKEND", "auto")
        if override == "auto" or operation not in _named(override, "MODA_BACKEND").OPS:
            return _first_that_runs(operation, tensors)
        requested, source = override, "MODA_BACKEND"
    else:
        source = "backend"
    module = _named(requested, source)
    reason = _refusal(module, operation, tensors)
    if reason is not None:
        raise BackendUnavailableError(f"{source}={requested!r} cannot run {operation}: {reason}")
    return module


def _first_that_runs(operation: str, tensors: Sequence[Tensor]) -> Any:
    for name in PREFERENCE:
        module = _module(name)
        if operation in module.OPS and _refusal(module, operation, tensors) is None:
            return module
    raise BackendUnavailableError(f"no backend runs {operation} on {tensors[0].device}")  # pragma: no cover


def _refusal(module: Any, operation: str, tensors: Sequence[Tensor]) -> str | None:
    """Why `module` cannot run `operation` on `tensors`; None if it can. Cheap: it is on the path of every step."""
    if operation not in module.OPS:
        return f"it does not implement it (it has: {', '.join(sorted(module.OPS))})"
    device = tensors[0].device
    if module.DEVICES is not None and device.type not in module.DEVICES[operation]:
        where = " and ".join(sorted(module.DEVICES[operation]))
        return f"it runs on {where} tensors, got a tensor on {device}"
    taken = module.DTYPES[operation]
    for tensor in tensors:
        if tensor.dtype not in taken:
            names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in taken))
            return f"it takes {names}, got {str(tensor.dtype).removeprefix('torch.')}"
    reason: str | None = module.unavailable(device)
    return reason


def _named(name: str, source: str) -> Any:
    if name not in NAMES:
        raise ValueError(f"{source}: expected one of 'auto', {', '.join(map(repr, NAMES))}, got {name!r}")
    return _module(name)


def _module(name: str) -> Any:
    """The backend's module, imported at first use: importing Triton is slow, and most machines have no use for it.

    Plain import statements, because `torch.compile` can trace those; once only, because they are slow in every step.
    """
    if name not in _modules:
        if name == "triton":
            from moda_kernels import triton_kernels as module
        else:
            from moda_kernels import native as module  # type: ignore[no-redef]
        _modules[name] = module
    return _modules[name]
