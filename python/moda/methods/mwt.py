"""MwT, modularizing while training (arXiv 2306.09376): gates of samples of one class become alike, of others unlike.

Cohesion is 1 minus the mean cosine of the gates of two samples of one class, and coupling the mean cosine of the gates
of two samples of different classes, each the mean over layers. They are the affinity and the dispersion of this
package's kernels with gates in the place of pooled activations.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from moda.checks import Bounds, check_count, check_names, check_number
from moda.decomposition.container import Decomposition
from moda.methods.base import TASK, Loader, Phase, Prepared, check_choice, check_trainable
from moda.methods.convolutions import FastConvolutions
from moda.methods.gated import GENERATOR, Gates, gate_masks
from moda.methods.sites import GateSite, convolution_sites, find_sites
from moda_kernels import modular_losses
from moda_kernels.validation import MOST_CLASSES

COHESION, COUPLING = "cohesion", "coupling"


@dataclass(frozen=True, eq=False)
class PreparedGates(Prepared):
    """A network with gates.

    Attributes:
        gates: of the network.
    """

    gates: Gates = field(kw_only=True)


@dataclass(frozen=True)
class MwT:
    """MwT's settings; the defaults are the published ones.

    Attributes:
        cohesion: weight of the cohesion term (alpha).
        coupling: weight of the coupling term (beta).
        epochs: passes over the training data.
        learning_rate: of SGD with Nesterov momentum, annealed along a cosine to 0, for the network and the generators.
        momentum: of SGD.
        threshold: share of a class's samples that must use a neuron for the class to keep it.
        layers: paths of the convolutions that are gated; None for all but the first.

    Raises:
        ValueError: a number is out of range.
    """

    cohesion: float = 0.5
    coupling: float = 1.5
    epochs: int = 200
    learning_rate: float = 0.05
    momentum: float = 0.9
    threshold: float = 0.9
    layers: tuple[str, ...] | None = None

    name = "mwt"

    def __post_init__(self) -> None:
        for name in ("cohesion", "coupling"):
            check_number(name, getattr(self, name), Bounds(at_least=0))
        check_training(self.epochs, self.learning_rate, self.momentum)
        check_number("threshold", self.threshold, Bounds(above=0, at_most=1))
        check_names("layers", self.layers)

    def prepare(self, model: nn.Module, num_classes: int, example: Any) -> PreparedGates:
        """Give every convolution but the first a gate, behind the norm that follows it.

        Raises:
            ValueError: there are fewer than two classes, no convolution to gate, a layer that is not called once or has
                a single neuron, or the network is frozen.
        """
        check_count("num_classes", num_classes, least=2, most=MOST_CLASSES)
        check_trainable(model, self.name)
        found = find_sites(model, example)
        sites = convolution_sites(found) if self.layers is None else named(found, self.layers)
        check_choice({site.layer: site.width for site in sites}, "layers")
        return gated(model, num_classes, sites, example)

    def phases(self) -> list[Phase]:
        """One phase: everything is trained together."""
        weights = {TASK: 1.0, COHESION: self.cohesion, COUPLING: self.coupling}
        return [sgd_phase("train", self.epochs, self.learning_rate, self.momentum, weights)]

    def loss(self, prepared: PreparedGates, outputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Cross-entropy, cohesion and coupling.

        A batch without a pair of samples of one class has cohesion 0, and one without a pair of different classes
        coupling 0, both without gradient (the published code logs NaN there, and has the same gradients).
        """
        losses = modular_losses(prepared.gates.take(), labels)
        return {TASK: F.cross_entropy(outputs, labels), COHESION: losses.affinity, COUPLING: losses.dispersion}

    def epoch_ended(self, prepared: PreparedGates, phase: Phase, validation: Loader | None) -> None:
        """Nothing has to be noted."""

    def extract(self, prepared: PreparedGates, loader: Loader) -> Decomposition:
        """The neurons that at least `threshold` of a class's samples use, by one pass over the training data.

        Warns where a class never uses a layer: it keeps one neuron there.
        """
        settings = {
            "cohesion": self.cohesion,
            "coupling": self.coupling,
            "epochs": self.epochs,
            "learning_rate": self.learning_rate,
            "momentum": self.momentum,
        }
        return decomposition_of_gates(prepared, loader, self.name, self.threshold, settings)


# ---- what methods with gates share --------------------------------------------------------------------------------


def check_training(epochs: int, learning_rate: float, momentum: float) -> None:
    """Raise TypeError or ValueError unless these can be settings of a training."""
    check_count("epochs", epochs)
    check_number("learning_rate", learning_rate, Bounds(above=0))
    check_number("momentum", momentum, Bounds(at_least=0, below=1))


def named(found: Sequence[Any], layers: Sequence[str]) -> list[Any]:
    """Return the sites of the named layers, in the order of the names.

    Raises:
        ValueError: a name is no layer that a forward pass calls once.
    """
    sites = {site.layer: site for site in found}
    unknown = [layer for layer in layers if layer not in sites]
    if unknown:
        raise ValueError(
            f"layers: expected convolutions or linear layers that a forward pass calls once, got {unknown[0]!r}"
        )
    return [sites[layer] for layer in layers]


def gated(model: nn.Module, num_classes: int, sites: Sequence[GateSite], example: Any) -> PreparedGates:
    """Return a gated network, its parameters and its generators' in groups of their own.

    Where convolutions are gated, they are computed in the way that is fastest for training on a CPU.
    """
    of_tokens = all(site.features_last for site in sites)
    gates = Gates(model, sites, None if of_tokens else FastConvolutions(model, example))
    generators = [parameter for generator in gates.generators for parameter in generator.parameters()]
    own = {id(parameter) for parameter in generators}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in own]
    return PreparedGates(model, num_classes, {"model": rest, "generators": generators}, gates=gates)


def sgd_phase(name: str, epochs: int, learning_rate: float, momentum: float, weights: dict[str, float]) -> Phase:
    """Return a phase that trains network and generators by SGD with Nesterov momentum, annealed along a cosine."""
    return Phase(
        name,
        epochs,
        partial(torch.optim.SGD, lr=learning_rate, momentum=momentum, nesterov=momentum > 0),
        weights,
        ("model", "generators"),
        lambda optimizer, count: CosineAnnealingLR(optimizer, count),
    )


def decomposition_of_gates(
    prepared: PreparedGates, loader: Loader, method: str, threshold: float, settings: dict[str, Any]
) -> Decomposition:
    """Return the modules that follow from how often classes use neurons."""
    found = gate_masks(prepared.gates, loader, prepared.num_classes, threshold)
    sites = prepared.gates.sites
    unused = {site.layer: list(layer.unused) for site, layer in zip(sites, found, strict=True) if layer.unused}
    if unused:
        warnings.warn(
            f"some classes never use a layer and keep one neuron of it: {unused}; train longer, or with a smaller "
            "weight of coupling",
            stacklevel=3,
        )
    return Decomposition(
        {site.output: layer.masks for site, layer in zip(sites, found, strict=True)},
        method=method,
        settings={**settings, "threshold": threshold},
        metadata={"unused": unused},
    )


def load_published_state(prepared: PreparedGates, state: Mapping[str, Tensor]) -> None:
    """Load a published checkpoint of a masked network of MwT or NeMo into a gated one.

    A published block holds convolution, norm and generator (`x.conv.*`, `x.bn.*`, `x.mask_generator.*`); blocks are
    taken in the order of the gated sites. All other tensors go to the network's own of the same
    name, or else of the same place.

    Args:
        prepared: a gated network of the same architecture.
        state: the published state.

    Raises:
        ValueError: the state does not fit the network.
    """
    model = prepared.model
    own = model.state_dict()
    blocks = list(dict.fromkeys(key.split(".conv.")[0] for key in state if ".conv." in key))
    if len(blocks) != len(prepared.gates.sites):
        raise ValueError(f"state: expected {len(prepared.gates.sites)} gated blocks, got {len(blocks)}")
    renamed: dict[str, Tensor] = {}
    for block, site in zip(blocks, prepared.gates.sites, strict=True):
        places = {"conv": site.layer, "bn": site.output, GENERATOR: f"{site.layer}.{GENERATOR}"}
        for part, place in places.items():
            prefix = f"{block}.{part}."
            renamed |= {
                f"{place}.{key[len(prefix) :]}": value for key, value in state.items() if key.startswith(prefix)
            }
    others = {key: value for key, value in state.items() if not key.startswith(tuple(f"{block}." for block in blocks))}
    renamed |= {key: value for key, value in others.items() if key in own}
    unnamed = [value for key, value in others.items() if key not in own]
    free = [key for key in own if key not in renamed]
    if len(unnamed) != len(free):
        raise ValueError(f"state: expected tensors for {free}, got {[key for key in others if key not in own]}")
    renamed |= dict(zip(free, unnamed, strict=True))
    wrong = [key for key, value in renamed.items() if key not in own or own[key].shape != value.shape]
    if wrong:
        raise ValueError(f"state: expected the shapes of the network, got another at {wrong[0]!r}")
    model.load_state_dict(renamed)
