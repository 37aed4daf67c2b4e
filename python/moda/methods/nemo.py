"""NeMo: gates on convolutions or on a Transformer's linear layers, trained with a contrastive loss.

Convolutional networks have the gates of MwT. In a Transformer query, key, value, attention output and both layers of
each MLP are gated, a gate being shared by all tokens of a sample; the first encoder layer and the classifier are not.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moda.checks import Bounds, check_count, check_names, check_number
from moda.decomposition.container import Decomposition
from moda.methods.base import TASK, Loader, Phase, check_choice, check_trainable
from moda.methods.contrastive import contrastive_loss, distillation_loss
from moda.methods.mwt import PreparedGates, check_training, decomposition_of_gates, gated, named, sgd_phase
from moda.methods.sites import GateSite, convolution_sites, find_sites, token_sites
from moda_kernels.validation import MOST_CLASSES, check_flag

CONTRAST = "contrast"


class TaughtLogits(NamedTuple):
    """What a distilled network and its teacher say of a batch.

    Attributes:
        logits: (N, K) of the class token's classifier.
        distilled: (N, K) of the distillation token's classifier.
        teacher: (N, K) of the teacher, without gradient.
    """

    logits: Tensor
    distilled: Tensor
    teacher: Tensor


class Taught(nn.Module):
    """A distilled network beside its teacher: in training it gives `TaughtLogits`, in evaluation its own logits.

    Args:
        network: gives the logits of both its classifiers when called with `separate=True`, as `moda.models.vit.DeiT`.
        teacher: gives logits; it stays in evaluation mode, and is no part of this module.
    """

    def __init__(self, network: nn.Module, teacher: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.__dict__["teacher"] = teacher.eval()

    def forward(self, x: Tensor) -> Tensor | TaughtLogits:
        """Map inputs to `TaughtLogits` in training mode, else to logits."""
        if not self.training:
            logits: Tensor = self.network(x)
            return logits
        own, distilled = self.network(x, separate=True)
        with torch.no_grad():
            taught = self.__dict__["teacher"](x)
        return TaughtLogits(own, distilled, taught)


@dataclass(frozen=True)
class NeMo:
    """NeMo's settings.

    Attributes:
        contrast: weight of the contrastive term (alpha); published settings go from 0.06 for ViT-S to 1.3 for SimCNN.
        temperature: of the contrastive term; published: 0.2 in the scripts, 0.3 by default.
        epochs: passes over the training data.
        learning_rate: of SGD with Nesterov momentum, annealed along a cosine to 0, for the network and the generators.
        momentum: of SGD.
        threshold: share of a class's samples that must use a neuron for the class to keep it.
        attention: whether query, key and value of a Transformer are gated too.
        layers: paths of the layers that are gated; None for the published choice: convolutions but the first, or,
            where a network has fewer than two convolutions, the linear layers of its encoder layers but the first.
        teacher: a trained network whose logits a distilled network (`moda.models.deit_small`) learns from beside the
            labels; None for any other network.
        published: leave the first gated convolution out of the contrastive term, as the published code does for
            convolutional networks: it counts as a layer whose gates are all 1, which adds a constant.

    Raises:
        ValueError: a number is out of range.
    """

    contrast: float = 0.5
    temperature: float = 0.2
    epochs: int = 200
    learning_rate: float = 0.05
    momentum: float = 0.9
    threshold: float = 0.9
    attention: bool = True
    layers: tuple[str, ...] | None = None
    teacher: nn.Module | None = None
    published: bool = True

    name = "nemo"

    def __post_init__(self) -> None:
        check_number("contrast", self.contrast, Bounds(at_least=0))
        check_number("temperature", self.temperature, Bounds(above=0))
        check_training(self.epochs, self.learning_rate, self.momentum)
        check_number("threshold", self.threshold, Bounds(above=0, at_most=1))
        check_names("layers", self.layers)
        for name in ("attention", "published"):
            check_flag(getattr(self, name), name)
        if not isinstance(self.teacher, nn.Module | None):
            raise TypeError(f"teacher: expected a torch.nn.Module or None, got {type(self.teacher).__name__}")

    def prepare(self, model: nn.Module, num_classes: int, example: Any) -> PreparedGates:
        """Give convolutions, or a Transformer's linear layers, a gate.

        Raises:
            ValueError: there are fewer than two classes, no layer to gate or one of a single neuron, or the network is
                frozen.
        """
        check_count("num_classes", num_classes, least=2, most=MOST_CLASSES)
        check_trainable(model, self.name)
        sites = self._sites(find_sites(model, example))
        check_choice({site.layer: site.width for site in sites}, "layers")
        prepared = gated(model, num_classes, sites, example)
        return prepared if self.teacher is None else replace(prepared, model=Taught(model, self.teacher))

    def _sites(self, found: list[GateSite]) -> list[GateSite]:
        if self.layers is not None:
            return named(found, self.layers)
        convolutions = [site for site in found if not site.features_last]
        return convolution_sites(found) if len(convolutions) > 1 else token_sites(found, attention=self.attention)

    def phases(self) -> list[Phase]:
        """One phase: everything is trained together."""
        weights = {TASK: 1.0, CONTRAST: self.contrast}
        return [sgd_phase("train", self.epochs, self.learning_rate, self.momentum, weights)]

    def loss(self, prepared: PreparedGates, outputs: Any, labels: Tensor) -> dict[str, Tensor]:
        """The task's loss and the contrastive one."""
        gates = prepared.gates.take()
        if self.published and not prepared.gates.sites[0].features_last:
            gates[0] = torch.ones_like(gates[0])
        if isinstance(outputs, TaughtLogits):
            task = distillation_loss(outputs.logits, outputs.distilled, outputs.teacher, labels)
        else:
            task = F.cross_entropy(outputs, labels)
        return {TASK: task, CONTRAST: contrastive_loss(gates, labels, self.temperature)}

    def epoch_ended(self, prepared: PreparedGates, phase: Phase, validation: Loader | None) -> None:
        """Nothing has to be noted."""

    def extract(self, prepared: PreparedGates, loader: Loader) -> Decomposition:
        """The neurons that at least `threshold` of a class's samples use, by one pass over the training data.

        Warns where a class never uses a layer: it keeps one neuron there. (The published code keeps random neurons in
        convolutional networks, and all of them in Transformers.)
        """
        settings = {
            "contrast": self.contrast,
            "temperature": self.temperature,
            "epochs": self.epochs,
            "learning_rate": self.learning_rate,
            "momentum": self.momentum,
            "attention": self.attention,
        }
        return decomposition_of_gates(prepared, loader, self.name, self.threshold, settings)
