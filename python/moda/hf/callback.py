"""Trains a model of Hugging Face transformers modular through a callback of its Trainer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from typing import Any

from torch import Tensor, nn

from moda.data.unpacking import check_callable
from moda.observation.taps import Taps, observe, taps_of
from moda_kernels import ModularLoss

if find_spec("transformers") is None:
    raise ImportError(
        "moda.hf needs transformers, which is not installed: pip install 'transformers[torch]'", name="transformers"
    )
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

__all__ = ["ModularTrainerCallback"]


class ModularTrainerCallback(TrainerCallback):
    """Adds the modular loss to the loss that a model computes while a `transformers.Trainer` trains it.

    From the beginning of the training to its end the model is observed (`moda.observe`), and the `loss` that it puts
    out in training mode, given `labels`, has the modular loss added: with the mixed precision, the accumulation and
    the processes of the Trainer. Where the Trainer divides losses by `num_items_in_batch`, the modular loss of a batch
    is weighed by the share of those items. The last batch's terms are `callback.loss.last`.

    Args:
        loss: the modular loss; None for the paper's weights.
        labels: how to get the labels, (N,), one for each sample, from the model's keyword arguments; by default those
            called "labels".

    Raises (in a forward pass):
        ValueError: there is not one label for each sample, or the model's output has no loss.

    Examples:
        >>> from moda.hf import ModularTrainerCallback
        >>> callback = ModularTrainerCallback()  # of Trainer(model=model, ..., callbacks=[callback])
    """

    def __init__(
        self, loss: ModularLoss | None = None, *, labels: Callable[[Mapping[str, Any]], Tensor] | None = None
    ) -> None:
        if not isinstance(loss, ModularLoss | None):
            raise TypeError(f"loss: expected a ModularLoss or None, got {type(loss).__name__}")
        check_callable(labels, "labels")
        self.loss = ModularLoss() if loss is None else loss
        self.labels = labels
        self._taps: Taps | None = None
        self._own = False  # whether the taps are the callback's, to be removed again

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Observe the model."""
        self._restore()  # of a training that failed
        model: nn.Module = kwargs["model"]
        taps = taps_of(model)
        self._own = taps is None
        self._taps = taps = taps or observe(model)
        self.loss.to(args.device)
        taps.after_recording(partial(self._with_modular_loss, model, taps))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the model as it was."""
        self._restore()

    def _restore(self) -> None:
        if self._taps is None:
            return
        self._taps.after_recording(None)
        self._taps.clear()
        if self._own:
            self._taps.remove()
        self._taps = None

    def _with_modular_loss(
        self, model: nn.Module, taps: Taps, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        if not model.training:
            taps.clear()
            return output
        labels = self._labels_of(kwargs)
        loss = output.get("loss") if isinstance(output, Mapping) else None
        if loss is None:
            raise ValueError(
                f"{type(model).__name__}: expected an output with the model's own loss, for the modular loss to be "
                f"added to, got {sorted(output) if isinstance(output, Mapping) else type(output).__name__}; the data "
                "needs labels and the model return_dict=True"
            )
        modular: Tensor = self.loss(taps.activations(), labels)
        items = kwargs.get("num_items_in_batch")
        if items is not None:  # losses are summed over the batches of a step, each with its share
            modular = modular * ((kwargs["labels"] != -100).sum() / items)
        output["loss"] = loss + modular
        return output

    def _labels_of(self, kwargs: Mapping[str, Any]) -> Tensor:
        labels = kwargs.get("labels") if self.labels is None else self.labels(kwargs)
        if not isinstance(labels, Tensor) or labels.dim() != 1 or labels.is_floating_point():
            given = (
                "none" if labels is None else f"{getattr(labels, 'dtype', type(labels))} of shape {tuple(labels.shape)}"
            )
            raise ValueError(
                f"labels: expected one integer for each sample, (N,), got {given}; "
                "ModularTrainerCallback(labels=...) says how to get them from the model's keyword arguments"
            )
        return labels
