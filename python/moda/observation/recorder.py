"""Keeps activations between a forward pass and the loss, and not a moment longer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

import torch
from torch import Tensor

Receiver: TypeAlias = "Callable[[int, Tensor], None]"  # of an activation's place in execution order, and the activation


class Recorder:
    """Holds what the taps of one model saw in its last forward pass, until `take` hands it over.

    Shared by all taps of a model. A deep copy is an empty recorder (shared by the copied taps), so that a model can
    be copied after a training step. Not thread-safe.
    """

    def __init__(self) -> None:
        self.forced = 0
        self._receiver: Receiver | None = None
        self._values: dict[int, Tensor] = {}

    def __deepcopy__(self, memo: dict[int, object]) -> Recorder:
        return type(self)()

    @property
    def recording(self) -> bool:
        """Whether a forward pass run now is recorded."""
        return self.forced > 0 or torch.is_grad_enabled()

    def note(self, index: int, value: Tensor) -> None:
        """Keep `value` as activation `index` of this forward pass, or forget the one of an earlier pass."""
        if inside_backward():  # gradient checkpointing runs the forward again; its activations are nobody's
            return
        if self._receiver is not None:
            self._receiver(index, value)
        elif self.recording:
            self._values[index] = value
        else:
            self._values.pop(index, None)

    def take(self) -> list[Tensor]:
        """The activations in execution order; forgets them. RuntimeError if there are none."""
        if not self._values:
            raise RuntimeError(
                "no activations recorded: call the model first, once for each call of activations(), with "
                "gradients enabled or inside `with model.recording():`"
            )
        values = [self._values[index] for index in sorted(self._values)]
        self.clear()
        return values

    def clear(self) -> None:
        """Forget what is recorded."""
        self._values.clear()

    @contextmanager
    def forcing(self, receiver: Receiver | None = None) -> Iterator[None]:
        """Record also where gradients are disabled; with a receiver, hand over at once instead and keep nothing."""
        if receiver is not None and not callable(receiver):
            raise TypeError(f"receiver: expected a function of (index, activation), got {type(receiver).__name__}")
        outer, self._receiver = self._receiver, receiver
        self.forced += 1
        try:
            yield
        finally:
            self.forced -= 1
            self._receiver = outer


def inside_backward() -> bool:
    """Whether this runs within a backward pass, as the recomputation of gradient checkpointing does."""
    # torch.compile cannot trace the question; what it compiles is a forward pass.
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def neurons_second(value: Tensor, neuron_dim: int) -> Tensor:
    """`value` with its neurons at dim 1: a view if they are the last of more than two dims, else as it is."""
    return value if neuron_dim == 1 or value.dim() <= 2 else value.movedim(neuron_dim, 1)
