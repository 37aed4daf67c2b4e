"""The choice among backends, and the reasons why others cannot run.

A backend is a module with the names of `Backend` (see CONTRIBUTING.md, "How to add a backend"). It may leave out
operations that its `OPS` does not list.

`auto` takes the first of `PREFERENCE` that can run the operation on the given tensors. The environment variable
`MODA_BACKEND` stands in for `auto` in every operation that the named backend implements. A backend asked for by name
that cannot run is an error that says why: only `auto` may fall back.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from moda_kernels import closed_form, native, plain, reference, triton_kernels
from moda_kernels.batch_norm import BatchNorm
from moda_kernels.tally import Tally
from moda_kernels.validation import shown

NAMES = ("reference", "torch", "triton", "native")
PREFERENCE = ("triton", "native", "torch", "reference")


class Backend(Protocol):
    """What a backend offers. Behind a front door, arguments are valid and may be relied on."""

    @property
    def OPS(self) -> frozenset[str]:  # noqa: N802
        """Names of the operations that it implements."""

    @property
    def DTYPES(self) -> Mapping[str, frozenset[torch.dtype]]:  # noqa: N802
        """Per operation the dtypes of activations that it takes."""

    @property
    def DEVICES(self) -> Mapping[str, frozenset[str]] | None:  # noqa: N802
        """Per operation the types of devices that it runs on; None means any."""

    @property
    def READS_MEMORY(self) -> bool:  # noqa: N802
        """Whether it takes tensors by their addresses, and so only those that `plain` lets pass."""

    def unavailable(self, device: torch.device | None = None) -> str | None:
        """None if it can run (on `device`), else one line: the reason and what to do about it."""

    def grouped_losses(self, activations: Sequence[Tensor], labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(affinity, dispersion, compactness) over all layers; 0-d, in the accumulation dtype of the widest layer."""

    def weighted_losses(
        self, activations: Sequence[Tensor], labels: Tensor, weights: closed_form.Weights
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """The weighted sum of these losses, and the losses, detached; for backends that have it in fewer operations."""

    def pool(self, activations: Sequence[Tensor]) -> list[Tensor]:
        """The pooled activation of every layer."""

    def relu_pool(self, x: Tensor, inplace: bool) -> tuple[Tensor, Tensor]:
        """`relu(x)`, written over `x` if `inplace`, and its pooled activation."""

    def norm_relu_pool(self, x: Tensor, norm: BatchNorm) -> tuple[Tensor, Tensor]:
        """`activation(batch_norm(x) + residual)` and its pooled activation."""

    def class_sums(
        self, pooled: Sequence[Tensor], labels: Tensor, num_classes: int, *, normalize: bool = True
    ) -> list[Tensor]:
        """Per layer the (K, C) sum over each class's samples of the (N, C) rows, L2-normalised by default.

        `labels` are in [0, K). Not differentiable.
        """

    def count_firings(self, activations: Sequence[Tensor], labels: Tensor, threshold: float, tally: Tally) -> None:
        """Add the batch to the tally, in place.

        A neuron fires for a sample when any of its positions exceeds `threshold` in magnitude; NaN counts as firing.
        Samples whose label is outside of [0, K) are counted in `tally.invalid` alone.
        """

    def add_attributions(
        self, activations: Sequence[Tensor], gradients: Sequence[Tensor], labels: Tensor, tally: Tally
    ) -> None:
        """Add the batch to the sums, sizes and invalid labels of a tally without counts, in place.

        What is added to a class's sums is, for each of its samples, |sum over positions of activation x gradient|.
        Gradients are like the activations, in any layout.
        """


# Each module has the operations that its OPS lists; a test compares their signatures with the protocol's.
_MODULES: dict[str, Backend] = {
    "reference": cast(Backend, reference),
    "torch": closed_form,
    "triton": cast(Backend, triton_kernels),
    "native": cast(Backend, native),
}


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

    Examples:
        >>> print(backends()["torch"])
        available
    """
    reasons = {name: _MODULES[name].unavailable() for name in NAMES}
    return {name: Status(reason is None, reason or "") for name, reason in reasons.items()}


def select(operation: str, requested: str, tensors: Sequence[Tensor], beside: Sequence[Tensor] = ()) -> Backend:
    """The backend that runs `operation` on `tensors`.

    Args:
        operation: a name of `Backend.OPS`.
        requested: "auto" or a backend's name.
        tensors: activations, or pooled rows.
        beside: what goes with them, on the same device: labels, counts.

    Raises:
        ValueError: `requested` or MODA_BACKEND is no backend's name.
        BackendUnavailableError: a backend was named that cannot run this.
    """
    if isinstance(requested, str) and requested == "auto":
        # Inductor fuses the closed form itself; a call into a compiled kernel would only get in its way.
        if torch.compiler.is_compiling():
            return closed_form
        override = os.environ.get("MODA_BACKEND", "auto")
        if override == "auto" or operation not in _named(override, "MODA_BACKEND").OPS:
            return _first_that_runs(operation, tensors, beside)
        requested, source = override, "MODA_BACKEND"
    else:
        source = "backend"
    backend = _named(requested, source)
    reason = _refusal(backend, operation, tensors)
    if reason is None and backend.READS_MEMORY and (problem := plain.obstacle((*tensors, *beside))):
        reason = f'{problem}; backend="torch" can'
    if reason is not None:
        raise BackendUnavailableError(f"{source}={requested!r} cannot run {operation}: {reason}")
    return backend


def _first_that_runs(operation: str, tensors: Sequence[Tensor], beside: Sequence[Tensor]) -> Backend:
    if plain.is_traced() or plain.obstacle((*tensors, *beside)):
        return closed_form
    for name in PREFERENCE:
        backend = _MODULES[name]
        if operation in backend.OPS and _refusal(backend, operation, tensors) is None:
            return backend
    raise BackendUnavailableError(f"no backend runs {operation} on {tensors[0].device}")  # pragma: no cover


def _refusal(backend: Backend, operation: str, tensors: Sequence[Tensor]) -> str | None:
    """Why the backend cannot run `operation` on `tensors`; None if it can. It is cheap: every step asks it."""
    if operation not in backend.OPS:
        return f"it does not implement it (it has: {', '.join(sorted(backend.OPS))})"
    device = tensors[0].device
    if backend.DEVICES is not None and device.type not in backend.DEVICES[operation]:
        where = " and ".join(sorted(backend.DEVICES[operation]))
        return f"it runs on {where} tensors, got a tensor on {device}"
    taken = backend.DTYPES[operation]
    for tensor in tensors:
        if tensor.dtype not in taken:
            names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in taken))
            return f"it takes {names}, got {str(tensor.dtype).removeprefix('torch.')}"
    return backend.unavailable(device)


def check_backend(backend: Any) -> None:
    """Check that this is "auto" or a backend's name; whether it can run is known when there are tensors.

    Raises:
        TypeError, ValueError: it is neither.
    """
    if not (isinstance(backend, str) and backend == "auto"):
        _named(backend, "backend")


def _named(name: Any, source: str) -> Backend:
    expected = f"{source}: expected one of 'auto', {', '.join(map(repr, NAMES))}"
    if not isinstance(name, str):
        raise TypeError(f"{expected}, got {type(name).__name__}")
    if name not in NAMES:
        raise ValueError(f"{expected}, got {shown(name)}")
    return _MODULES[name]
