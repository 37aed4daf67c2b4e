"""What one model of the zoo is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn

Inputs = tuple[tuple[Any, ...], dict[str, Any]]

CLASSES = 5


@dataclass(frozen=True)
class Entry:
    """A model by name: how it is made, what goes in, and where its logits come out."""

    name: str
    family: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int, Generator], Inputs]
    """Positional and keyword arguments of a forward pass with that many samples."""
    num_classes: int = CLASSES
    output: str | int | None = None
    """Key, attribute or place of the logits in what the model returns; None where it returns them alone."""

    def made(self) -> nn.Module:
        """The model, with the same weights each time."""
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            return self.build()

    def samples(self, batch: int, seed: int = 0) -> Inputs:
        """Arguments of a forward pass, the same each time."""
        return self.inputs(batch, torch.Generator().manual_seed(seed))

    def logits(self, output: Any) -> Tensor:
        """The logits `(N, num_classes, ...)` in what the model returned."""
        if self.output is None or isinstance(output, Tensor):  # some give them alone in eval mode
            return output
        if isinstance(self.output, str) and not isinstance(output, Mapping):
            return getattr(output, self.output)
        return output[self.output]


def tensors_of(value: Any) -> list[Tensor]:
    """Every tensor in a nest of dicts, sequences and dataclasses, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [tensor for part in value.values() for tensor in tensors_of(part)]
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [tensor for part in value for tensor in tensors_of(part)]
    if is_dataclass(value):
        return [tensor for field in fields(value) for tensor in tensors_of(getattr(value, field.name))]
    return []


def images(size: int, channels: int = 3) -> Callable[[int, Generator], Inputs]:
    """Random square images."""

    def make(batch: int, generator: Generator) -> Inputs:
        return (torch.randn(batch, channels, size, size, generator=generator),), {}

    return make


def vectors(*shape: int) -> Callable[[int, Generator], Inputs]:
    """Random samples of that shape."""

    def make(batch: int, generator: Generator) -> Inputs:
        return (torch.randn(batch, *shape, generator=generator),), {}

    return make
