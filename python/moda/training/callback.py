"""Modular training of somebody's own LightningModule: a callback, and nothing else to change."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

import lightning
from torch import Tensor, nn

from moda.observation.taps import InstrumentedModel, instrument
from moda_kernels import ModularLoss

__all__ = ["ModularCallback"]


def second_item(batch: Any) -> Tensor:
    """The labels of a batch (inputs, labels)."""
    labels: Tensor = batch[1]
    return labels


class ModularCallback(lightning.Callback):
    """Adds the modular loss to a LightningModule's own training loss.

    When the fit begins, the network under `attribute` is replaced by `moda.instrument(network, route="auto")`, which
    shares its parameters and its state_dict keys, and `training_step` returns its loss plus the modular one. When
    the fit ends, both are as they were; the trained network can then be instrumented, decomposed and composed as any
    other. The three terms are logged per epoch as `affinity`, `dispersion` and `compactness`.

    Args:
        loss: the modular loss; None for the paper's weights.
        attribute: where the LightningModule keeps its network.
        labels: how to get the labels, (N,), from a batch; by default its second item.

    Raises (when the fit begins):
        AttributeError: the module has no such attribute.
        TracingError: the network cannot be traced.

    Example:
        >>> trainer = lightning.Trainer(callbacks=[ModularCallback(attribute="net")], logger=False)
    """

    def __init__(
        self,
        loss: ModularLoss | None = None,
        *,
        attribute: str = "model",
        labels: Callable[[Any], Tensor] = second_item,
    ) -> None:
        self.loss = ModularLoss() if loss is None else loss
        self.attribute = attribute
        self.labels = labels
        self._network: nn.Module | None = None

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Instrument the network and wrap `training_step`."""
        if stage != "fit":
            return
        network = getattr(pl_module, self.attribute, None)
        if not isinstance(network, nn.Module):
            raise AttributeError(
                f"attribute: expected the name of the network in {type(pl_module).__name__}, got {self.attribute!r}"
            )
        model = instrument(network, route="auto")
        self._network = network
        setattr(pl_module, self.attribute, model)
        self.loss.to(pl_module.device)
        pl_module.training_step = self._with_modular_loss(pl_module, model)  # type: ignore[method-assign]

    def teardown(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Put the network and `training_step` back."""
        if self._network is None:
            return
        self._network.train(pl_module.training)
        setattr(pl_module, self.attribute, self._network)
        del pl_module.training_step
        self._network = None

    def _with_modular_loss(self, pl_module: lightning.LightningModule, model: InstrumentedModel) -> Callable[..., Any]:
        training_step = pl_module.training_step

        @wraps(training_step)
        def step(batch: Any, *args: Any, **kwargs: Any) -> Any:
            output = training_step(batch, *args, **kwargs)
            if output is None:  # Lightning's way to skip a batch
                return None
            modular = self.loss(model.activations(), self.labels(batch))
            terms = self.loss.last._asdict() if self.loss.last else {}
            pl_module.log_dict(terms, on_step=False, on_epoch=True)
            if isinstance(output, Mapping):
                return {**output, "loss": output["loss"] + modular}
            return output + modular

        return step
