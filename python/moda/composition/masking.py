"""The whole model with the dropped neurons at 0: what composing has to equal, and possible for every model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moda.composition.ensemble import Ensemble, ensemble
from moda.composition.observed import check_taps, names_every_tap, observed
from moda.decomposition.container import Decomposition, chosen_classes
from moda.observation.taps import Taps
from moda.outputs import Output, check_output, pick

__all__ = ["MaskedModel", "mask"]


class MaskedModel(nn.Module):
    """Made by `mask`: runs the user's own model, with dropped neurons at 0, and gives the outputs of some classes.

    Attributes:
        classes: class indices, in the order of the outputs.
        num_classes: of the whole model.
        masks: per site of the decomposition (C,) bool: the neurons kept.
        every: whether each tap of the model is to be a site.
    """

    def __init__(
        self,
        model: nn.Module,
        masks: Mapping[str, Tensor],
        classes: Iterable[int],
        num_classes: int,
        output: Output = None,
        every: bool = True,
    ) -> None:
        super().__init__()
        self.training = model.training
        self.model = model
        self.masks = dict(masks)
        self.classes = tuple(classes)
        self.num_classes = num_classes
        self.output = output
        self.every = every
        self._taps: Taps | None = None  # of a model that is observed inside calls alone
        self._factors: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's own forward, with the columns of the classes alone where its output has one for each class."""
        with observed(self.model, self.masks, self._taps) as taps:
            self._taps = None if taps.lasting else taps
            if taps.probed:
                self._check(taps)
            with taps.replacing(self._masked(taps)):
                output = self.model(*args, **kwargs)
            self._check(taps)
        return pick(output, self.classes, self.num_classes, self.output)

    def _check(self, taps: Taps) -> None:
        check_taps(taps.names, taps.widths, {name: len(mask) for name, mask in self.masks.items()}, self.every)

    def _masked(self, taps: Taps) -> Any:
        def masked(index: int, activation: Tensor) -> Tensor:
            name = taps.name_of(index)
            if name not in self.masks or len(self.masks[name]) != activation.shape[1]:
                return activation  # said below, when all taps are known
            factor = self._factor(name, activation)
            return activation * factor.view([-1] + [1] * (activation.dim() - 2))

        return masked

    def _factor(self, name: str, like: Tensor) -> Tensor:
        key = name, like.dtype, like.device
        if key not in self._factors:
            with torch.inference_mode(False):
                self._factors[key] = self.masks[name].to(device=like.device, dtype=like.dtype)
        return self._factors[key]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_taps": None, "_factors": {}}

    def extra_repr(self) -> str:
        """Classes and how many neurons they keep."""
        kept = sum(int(mask.sum()) for mask in self.masks.values())
        return f"classes={self.classes}, neurons={kept} of {sum(len(mask) for mask in self.masks.values())}"


def mask(
    model: nn.Module, decomposition: Decomposition, classes: Iterable[int], *, output: Output = None
) -> MaskedModel | Ensemble:
    """The whole model with every neuron that none of the classes keeps at 0, and the outputs of the classes.

    Modules that do not unite, see `decomposition.combine`, are masked each by itself and stand side by side.

    It holds `model` itself, which is as it is outside of calls of the masked one.

    Args:
        model: any module.
        decomposition: modules of this model.
        classes: class indices, each once; the outputs (N, len(classes)) are in this order.
        output: which of several outputs are logits, by key or place; by default those called "logits", or those with a
            column for each class.

    Raises:
        TypeError: `model` is no module, `decomposition` is none, or `classes` is no sequence of integers.
        ValueError: no class, one twice or an unknown one; or, at the latest when the masked model is called: taps,
            neurons or number of classes of the decomposition are not those of the model.
    """
    chosen = chosen_classes(decomposition, classes)
    check_output(output)
    if decomposition.combine != "rows":
        return ensemble(decomposition, chosen, lambda rows, wanted: mask(model, rows, wanted, output=output))
    every = names_every_tap(decomposition)
    with observed(model, decomposition.sites) as taps:
        masked = MaskedModel(taps.model, decomposition.select(chosen), chosen, decomposition.num_classes, output, every)
        if taps.probed:
            masked._check(taps)
    return masked
