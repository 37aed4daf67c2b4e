"""What the parts of an observed model need of the handle that `observe` gives; none of them imports the handle."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import nn

from moda.observation.activations import Known
from moda.observation.plan import Plan


class Handle(Protocol):
    """The handle of an observed model.

    Attributes:
        model: the observed model.
        known: which modules and functions are activations.
        sample_dim: the axis of samples in the inputs.
        neuron_dim: the axis of neurons, where the user says it.
    """

    model: nn.Module
    known: Known
    sample_dim: int
    neuron_dim: int | Mapping[str, int] | None
    _run: Any  # the forward pass that is on its way, a `Run`; None between passes
    _mode: Any  # a `FunctionMode`
    _after: Any  # an `After`

    @property
    def joins_norms(self) -> bool:
        """Whether a batch norm and the ReLU behind it may be one operation."""

    def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Begin a forward pass; gives its `Run`, or None where nothing is to be seen."""

    def _learn(self, training: int, plan: Plan) -> None:
        """Keep what a probe found out."""

    def _attach(self, module: nn.Module, part: Any) -> None:
        """Let a module have a part in the observation."""

    def _copied(self, model: nn.Module, memo: dict[int, Any]) -> None:
        """Observe a deep copy of the model with a handle of its own."""
