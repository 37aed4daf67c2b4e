"""Keeps activations between a forward pass and the loss, and not a moment longer."""

from __future__ import annotations

import torch
from torch import Tensor

from moda_kernels.marks import is_pooled, mark_pooled

NONE_RECORDED = (
    "no activations recorded: call the observed model first, once for each call of activations(), with gradients "
    "enabled or inside `with taps.recording():` (under gradient checkpointing with use_reentrant=False)"
)


class Record:
    """Holds what the taps of one model saw since the last `take`. Not thread-safe."""

    def __init__(self) -> None:
        self.values: dict[int, Tensor] = {}
        self.versions: dict[int, int] = {}
        self.earlier: list[dict[int, Tensor]] = []  # of passes that are to be added up
        self.adding = False
        self.problem = ""

    def begin(self) -> None:
        """A forward pass that is recorded begins."""
        if not self.values:
            return
        if self.adding:
            self.earlier.append(self.values)
            self.values = {}
            return
        self.problem = (
            "two forward passes were recorded since the last call of activations(): call it once for each of them, or "
            "run them inside `with taps.adding():`, which appends the samples of one to those of the other"
        )
        self.values.clear()
        self.versions.clear()

    def note(self, index: int, value: Tensor, version: int) -> None:
        """Keep an activation."""
        self.values[index] = value
        self.versions[index] = version

    def abandon(self) -> None:
        """The forward pass ended before its end: nothing of it is kept."""
        self.values, self.versions, self.problem = {}, {}, ""

    def take(self, names: tuple[str, ...]) -> list[Tensor]:
        """The activations in execution order; forgets them."""
        if self.problem:
            problem = self.problem
            self.clear()
            raise RuntimeError(problem)
        if not self.values:
            raise RuntimeError(NONE_RECORDED)
        values, versions, earlier = self.values, self.versions, self.earlier
        self.values, self.versions, self.earlier = {}, {}, []
        if not torch.compiler.is_compiling():
            for index, version in versions.items():  # none where it was compiled
                value = values[index]
                if (value._version if value.requires_grad else version_of(value)) != version:
                    raise RuntimeError(
                        f"activation {names[index]!r} was overwritten in place after it was recorded, in a way that "
                        "the first forward pass did not show; make the operation that follows it work out of place "
                        "(inplace=False)"
                    )
        if earlier:
            return _added([*earlier, values])
        return [values[index] for index in sorted(values)]

    def clear(self) -> None:
        """Forget what is recorded."""
        self.values, self.versions, self.earlier, self.problem = {}, {}, [], ""


def _added(passes: list[dict[int, Tensor]]) -> list[Tensor]:
    indices = sorted(passes[0])
    if any(sorted(values) != indices for values in passes):
        raise RuntimeError("forward passes that are added up called different activations; read each by itself")
    joined = []
    for index in indices:
        parts = [values[index] for values in passes]
        value = torch.cat(parts)
        if any(is_pooled(part) for part in parts):
            mark_pooled(value)
        joined.append(value)
    return joined


def version_of(value: Tensor) -> int:
    """How often the tensor was overwritten; 0 for inference tensors, which do not tell."""
    return 0 if value.is_inference() else value._version


def inside_backward() -> bool:
    """Whether this runs within a backward pass, as the recomputation of gradient checkpointing does."""
    # torch.compile cannot trace the question; what it compiles is a forward pass.
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
