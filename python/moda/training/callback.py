"""Trains somebody's own LightningModule modular through a callback, with nothing else to change."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

import lightning
from torch import Tensor, nn

from moda.checks import text
from moda.data.unpacking import check_callable, unpacked
from moda.observation.taps import Taps, observe, taps_of
from moda_kernels import ModularLoss

__all__ = ["ModularCallback"]


def labels_of(batch: Any) -> Tensor:
    """Return the labels of a batch (inputs, labels), or of a dict with "labels"."""
    return unpacked(batch)[1]


class ModularCallback(lightning.Callback):
    """Adds the modular loss to a LightningModule's own training loss.

    When the fit begins, the network under `attribute` is observed (`moda.observe`), and `training_step` returns its
    loss plus the modular one; where the module optimises by hand, the first `manual_backward` behind a forward pass of
    the network gets it. When the fit ends, or fails, both are as they were; a network that was observed already stays
    so. The three terms are logged per epoch as `affinity`, `dispersion` and `compactness`.

    Args:
        loss: the modular loss; None for the paper's weights.
        attribute: where the LightningModule keeps its network.
        labels: how to get the labels, (N,), from a batch; by default its second item, or its item "labels".

    Raises (when the fit begins):
        AttributeError: the module has no such attribute.

    Raises (in a training step):
        RuntimeError: the network did not run, ran twice, or was optimised by hand without `manual_backward`: it would
            be trained without the modular loss.

    Examples:
        >>> trainer = lightning.Trainer(callbacks=[ModularCallback(attribute="net")], logger=False)
    """

    def __init__(
        self,
        loss: ModularLoss | None = None,
        *,
        attribute: str = "model",
        labels: Callable[[Any], Tensor] = labels_of,
    ) -> None:
        if not isinstance(loss, ModularLoss | None):
            raise TypeError(f"loss: expected a ModularLoss or None, got {type(loss).__name__}")
        check_callable(labels, "labels")
        self.loss = ModularLoss() if loss is None else loss
        self.attribute: str = text()("attribute", attribute)
        self.labels = labels
        self._taps: Taps | None = None
        self._own = False  # whether the taps are the callback's, to be removed again

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Observe the network and wrap `training_step`."""
        if stage != "fit":
            return
        network = getattr(pl_module, self.attribute, None)
        if not isinstance(network, nn.Module):
            raise AttributeError(
                f"attribute: expected the name of the network in {type(pl_module).__name__}, got {self.attribute!r}"
            )
        self._restore(pl_module)
        taps = taps_of(network)
        self._own = taps is None
        self._taps = taps = taps or observe(network)
        self.loss.to(pl_module.device)
        if pl_module.automatic_optimization:
            pl_module.training_step = self._with_modular_loss(pl_module, taps)  # type: ignore[method-assign]
        else:
            self._by_hand(pl_module, taps)

    def teardown(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Put the network and `training_step` back."""
        self._restore(pl_module)

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """Put them back also where the fit fails: then Lightning does not tear down."""
        self._restore(pl_module)

    def _restore(self, pl_module: lightning.LightningModule) -> None:
        if self._taps is None:
            return
        for name in ("training_step", "manual_backward"):
            pl_module.__dict__.pop(name, None)
        self._taps.clear()
        if self._own:
            self._taps.remove()
        self._taps = None

    def _modular_loss(self, pl_module: lightning.LightningModule, taps: Taps, batch: Any) -> Tensor:
        modular: Tensor = self.loss(taps.activations(), self.labels(batch))
        terms = self.loss.last._asdict() if self.loss.last else {}
        pl_module.log_dict(terms, on_step=False, on_epoch=True)
        return modular

    def _with_modular_loss(self, pl_module: lightning.LightningModule, taps: Taps) -> Callable[..., Any]:
        training_step = pl_module.training_step

        @wraps(training_step)
        def step(batch: Any, *args: Any, **kwargs: Any) -> Any:
            taps.clear()
            output = training_step(batch, *args, **kwargs)
            if output is None:  # Lightning's way to skip a batch
                return None
            modular = self._modular_loss(pl_module, taps, batch)
            if isinstance(output, Mapping):
                return {**output, "loss": output["loss"] + modular}
            return output + modular

        return step

    def _by_hand(self, pl_module: lightning.LightningModule, taps: Taps) -> None:
        """Let the first backward pass behind a forward pass of the network have the modular loss."""
        training_step, manual_backward = pl_module.training_step, pl_module.manual_backward
        batches: list[Any] = []

        @wraps(training_step)
        def step(batch: Any, *args: Any, **kwargs: Any) -> Any:
            taps.clear()
            batches[:] = [batch]
            output = training_step(batch, *args, **kwargs)
            if taps.recorded:
                raise RuntimeError(
                    f"{type(pl_module).__name__}.training_step: the network ran, and no self.manual_backward(loss) "
                    "followed, which ModularCallback adds the modular loss to; call it in the place of loss.backward()"
                )
            return output

        @wraps(manual_backward)
        def backward(loss: Tensor, *args: Any, **kwargs: Any) -> None:
            if taps.recorded:
                loss = loss + self._modular_loss(pl_module, taps, batches[0])
            manual_backward(loss, *args, **kwargs)

        pl_module.training_step = step  # type: ignore[method-assign]
        pl_module.manual_backward = backward  # type: ignore[method-assign]
