"""Suites "decomposition" and "composition": counting firings over a pass, and what the smaller model gains."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moda import models
from moda.bench import gate, inputs
from moda.bench.case import Case, Contender
from moda.bench.clock import Budget, Timed
from moda.composition import measure
from moda.composition.compose import compose
from moda.composition.masking import mask
from moda.decomposition.container import Decomposition
from moda.decomposition.counting import count_firings
from moda.observation.taps import observe
from moda_kernels import BackendUnavailableError
from moda_kernels.backends import select

PLAIN, FULL = "plain inference", "full model"
_CLASSES = 10
_BATCHES = 4
_BACKENDS = ("reference", "torch", "triton", "native")


@dataclass(frozen=True)
class PassInputs:
    """The model and batches of a case."""

    model: str
    batch: int
    image_size: int
    device: torch.device

    def make(self) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
        """Return the model in evaluation mode and a loader of a few batches."""
        torch.manual_seed(0)
        model = models.create(self.model, num_classes=_CLASSES, image_size=self.image_size).to(self.device).eval()
        batch = (
            inputs.images(self.batch, self.image_size, self.device),
            inputs.labels(self.batch, _CLASSES, self.device),
        )
        return model, [batch] * _BATCHES

    @property
    def parameters(self) -> dict[str, int | float | str]:
        """The description stored in the results."""
        return {"model": self.model, "batch": self.batch, "image_size": self.image_size}

    @property
    def name(self) -> str:
        """The description stored in the results."""
        return f"{self.model} {self.image_size} px batch {self.batch}"


def decomposition_case(about: PassInputs, budget: Budget) -> Case:
    """Compare `moda.count_firings` by every backend with the same pass without counting."""
    return Case(
        suite="decomposition",
        name=about.name,
        baseline=PLAIN,
        build=lambda: _counters(about),
        budget=budget,
        keeps_memory=True,
        parameters={**about.parameters, "batches": _BATCHES},
    )


def _counters(about: PassInputs) -> list[Contender]:
    model, loader = about.make()

    @torch.no_grad()
    def infer(_: object) -> None:
        for images, _labels in loader:
            model(images)

    taps = observe(copy.deepcopy(model), route="grouped", example=loader[0][0][:2])

    def count(backend: str) -> list[Tensor]:
        rates = count_firings(taps, loader, _CLASSES, backend=backend, progress=False)
        return list(rates.counts.values())

    expected = functools.cache(lambda: count("reference"))
    found = [Contender(PLAIN, {"pass": Timed(infer)})]
    for backend in _BACKENDS:
        try:
            select("count_firings", backend, [loader[0][0]])
        except BackendUnavailableError as error:
            found.append(Contender(backend, skipped=str(error)))
            continue
        found.append(_counter(backend, functools.partial(count, backend), expected))
    return found


def _counter(name: str, count: Callable[[], list[Tensor]], expected: Callable[[], list[Tensor]]) -> Contender:
    def check() -> str:
        return gate.first_difference("counts", count(), expected(), 0)

    return Contender(name, {"pass": Timed(lambda _: count())}, check)


def composition_case(about: PassInputs, kept: tuple[float, ...], budget: Budget) -> Case:
    """Time inference by models composed of random modules that keep a given share of every tap's neurons."""
    return Case(
        suite="composition",
        name=about.name,
        baseline=FULL,
        build=lambda: _composed_models(about, kept),
        budget=budget,
        parameters={**about.parameters, "modules": "random"},
    )


def _composed_models(about: PassInputs, kept: tuple[float, ...]) -> list[Contender]:
    model, loader = about.make()
    images = loader[0][0]
    found = [Contender(FULL, {"inference": _inference(model, images)}, flops=measure.flops(model, images[:1]))]
    with observe(model, example=images[:2]) as taps:
        widths = dict(zip(taps.names, taps.widths, strict=True))
    for share in kept:
        found.append(_composed(f"{share:.0%} of neurons", model, _random_decomposition(widths, share), images))
    return found


def _random_decomposition(neurons: dict[str, int], share: float) -> Decomposition:
    """Draw a random `share` of each tap's neurons, the same for every class."""
    generator = torch.Generator().manual_seed(3)
    masks = {}
    for tap, count in neurons.items():
        chosen = torch.randperm(count, generator=generator)[: max(1, round(share * count))]
        masks[tap] = torch.zeros(count, dtype=torch.bool).index_fill(0, chosen, True).expand(_CLASSES, count).clone()
    return Decomposition(masks)


def _composed(name: str, model: nn.Module, decomposition: Decomposition, images: Tensor) -> Contender:
    classes = list(range(_CLASSES))
    composed = compose(model, decomposition, classes, example=images[:2]).eval()

    @torch.no_grad()
    def check() -> str:
        masked = mask(model, decomposition, classes).eval()
        return gate.difference("logits", composed(images), masked(images), gate.TOLERANCES[torch.float32])

    flops = measure.flops(composed, images[:1])
    return Contender(name, {"inference": _inference(composed, images)}, check, flops=flops)


def _inference(model: nn.Module, images: Tensor) -> Timed:
    @torch.no_grad()
    def infer(_: object) -> None:
        model(images)

    return Timed(infer)
