"""A network with gates: mask generators beside its layers, which hooks run and apply."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moda.inference import device_of, evaluating
from moda.methods.convolutions import FastConvolutions
from moda.methods.gates import GateMasks, MaskGenerator, apply_gate, generator_for, masks_from_frequencies
from moda.methods.sites import GateSite
from moda_kernels import FiringCounter

GENERATOR = "mask_generator"
"""The name under which a layer holds its generator."""


class Gates:
    """The gates of a network, attached to the very object given; `remove` takes them away again.

    Every gated layer gets a `MaskGenerator` as a submodule named `mask_generator`, so that training, saving and moving
    the network include it.

    Args:
        model: the network.
        sites: where gates act, in the order in which they are handed over.
        convolutions: a faster way to compute the network, which ends with the gates; None for PyTorch's own.

    Raises:
        ValueError: no site is given, or a layer has a part named `mask_generator` already.
    """

    def __init__(
        self, model: nn.Module, sites: Sequence[GateSite], convolutions: FastConvolutions | None = None
    ) -> None:
        if not sites:
            raise ValueError("sites: expected at least one, got none")
        self.model = model
        self.sites = tuple(sites)
        self._gates: dict[str, Tensor] = {}
        self._convolutions = convolutions
        self._handles: list[RemovableHandle] = []
        for site in self.sites:
            if hasattr(model.get_submodule(site.layer), GENERATOR):
                raise ValueError(
                    f"model: {site.layer!r} has a part named {GENERATOR!r} already; is the model gated twice?"
                )
        for site in self.sites:
            self._attach(site)

    def _attach(self, site: GateSite) -> None:
        layer, output = self.model.get_submodule(site.layer), self.model.get_submodule(site.output)
        layer.add_module(GENERATOR, generator_for(layer).train(layer.training))
        self._handles.append(layer.register_forward_pre_hook(self._generating(site)))
        self._handles.append(output.register_forward_hook(self._applying(site)))

    def _generating(self, site: GateSite) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def generate(layer: nn.Module, args: tuple[Any, ...]) -> None:
            self._gates[site.layer] = layer.get_submodule(GENERATOR)(args[0])

        return generate

    def _applying(self, site: GateSite) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        def apply(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
            return apply_gate(output, self._gates[site.layer], features_last=site.features_last)

        return apply

    @property
    def generators(self) -> list[MaskGenerator]:
        """The generators, in the order of the sites."""
        made = []
        for site in self.sites:
            generator = self.model.get_submodule(f"{site.layer}.{GENERATOR}")
            assert isinstance(generator, MaskGenerator)
            made.append(generator)
        return made

    def take(self) -> list[Tensor]:
        """The gates of the last forward pass, per site (N, C); forgets them.

        Raises:
            RuntimeError: there are none, or a layer did not run.
        """
        if len(self._gates) != len(self.sites):
            missing = [site.layer for site in self.sites if site.layer not in self._gates]
            raise RuntimeError(f"gates: expected a forward pass that runs every gated layer, got none of {missing}")
        gates = [self._gates[site.layer] for site in self.sites]
        self._gates = {}
        return gates

    def remove(self) -> None:
        """Take generators and hooks away: the network is what it was."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._gates = {}
        if self._convolutions is not None:
            self._convolutions.remove()
        for site in self.sites:
            layer = self.model.get_submodule(site.layer)
            if hasattr(layer, GENERATOR):
                delattr(layer, GENERATOR)


def gate_masks(gates: Gates, loader: Iterable[Any], num_classes: int, threshold: float = 0.9) -> list[GateMasks]:
    """Return the neurons that each class's samples use often enough, per site, over the batches of a loader.

    A sample uses a neuron when its gate is above 0. The network runs in evaluation mode without gradients; counts are
    streamed, nothing per sample is kept.

    Args:
        gates: of the network.
        loader: gives batches of (inputs, labels).
        num_classes: K.
        threshold: share of a class's samples, see `masks_from_frequencies`.

    Raises:
        ValueError: the loader gives no batch, or a class has no samples.
    """
    counter = FiringCounter(num_classes)
    device = device_of(gates.model)
    with evaluating(gates.model), torch.no_grad():
        for inputs, labels in loader:
            gates.model(inputs.to(device))
            counter.update(gates.take(), labels.to(device))
    if not counter.counts:
        raise ValueError("loader: expected at least one batch, got none")
    empty = [number for number, size in enumerate(counter.class_sizes.tolist()) if size == 0]
    if empty:
        raise ValueError(f"loader: expected samples of every class, got none of classes {empty}")
    return [masks_from_frequencies(rate.cpu(), threshold) for rate in counter.rates]
