"""The taps of a model as composition uses them, whichever way it is observed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from moda.composition.capture import Example
from moda.observation.instrumented import InstrumentedModel, Tap
from moda.observation.taps import Taps, observing

__all__ = ["Observed", "example_of", "observed"]

Function = Callable[[int, Tensor], Tensor]


class Observed(Protocol):
    """What composition needs of the taps of a model."""

    @property
    def model(self) -> nn.Module:
        """The observed model."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the taps in execution order, in the mode that the model is in."""

    @property
    def widths(self) -> tuple[int, ...]:
        """Neurons of each tap, where they are known."""

    @property
    def probed(self) -> bool:
        """Whether names are known."""

    def name_of(self, index: int) -> str:
        """The name of a tap."""

    def marking(self) -> Any:
        """A context in which every tap puts a marker into the graph."""

    def replacing(self, function: Function) -> Any:
        """A context in which `function(index, activation)` takes each activation's place."""


class _Instrumented:
    """The taps of an instrumented model."""

    def __init__(self, model: InstrumentedModel) -> None:
        self.model = model
        self.example = getattr(model, "example", None)

    widths: tuple[int, ...] = ()
    probed = True

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.model.taps)

    def name_of(self, index: int) -> str:
        return self.model.taps[index]

    @contextmanager
    def _hooked(self, function: Callable[[Tap, Tensor], Tensor]) -> Iterator[None]:
        with ExitStack() as undo:
            for module in self.model.modules():
                if isinstance(module, Tap):
                    handle = module.register_forward_hook(lambda tap, _args, output: function(tap, output))
                    undo.callback(handle.remove)
            yield

    def marking(self) -> Any:
        return self._hooked(lambda tap, x: torch.ops.moda.tap(x, tap.index, tap.neuron_dim))

    def replacing(self, function: Function) -> Any:
        def replaced(tap: Tap, x: Tensor) -> Tensor:
            return function(tap.index, x.movedim(tap.neuron_dim, 1)).movedim(1, tap.neuron_dim)

        return self._hooked(replaced)


@contextmanager
def observed(model: nn.Module | Taps, taps: Taps | None = None) -> Iterator[Observed]:
    """The taps of a model inside this block; a model that was not observed before is not afterwards.

    With `taps`, those that an earlier block made are used again.

    Raises:
        TypeError: `model` is neither a module nor the taps of one.
    """
    if isinstance(model, InstrumentedModel):
        yield _Instrumented(model)
        return
    with observing(model, taps) as present:
        yield present


def example_of(taps: Observed, given: Any) -> Example:
    """The example to compose with: the one given, or the one that the probe kept; of at least two samples.

    Raises:
        ValueError: there is none.
    """
    kept = getattr(taps, "example", None)
    if given is None and kept is None:
        raise ValueError(
            "example: expected an input of the model (a tensor, a tuple of positional arguments or a dict of keyword "
            "arguments), as the model was not observed while it ran; pass example="
        )
    example = Example(*kept) if given is None and kept is not None else Example.of(given)
    _, tensors = example.flat()
    if tensors and all(x.dim() and x.shape[0] == 1 for x in tensors):
        return Example(*torch.utils._pytree.tree_map(_twice, (example.args, dict(example.kwargs))))
    return example


def _twice(value: Any) -> Any:
    return torch.cat([value, value]) if isinstance(value, Tensor) else value
