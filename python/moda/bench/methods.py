"""Suite "methods": a step, an epoch or a generation of other modularization methods, and the published algorithm."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moda import models
from moda.bench import gate, inputs, published
from moda.bench.case import Case, Contender
from moda.bench.clock import Budget, Timed
from moda.methods import CNNSplitter, GradSplitter, MwT, NeMo
from moda.methods.base import TASK
from moda.methods.cnnsplitter import Search
from moda.methods.gated import Gates
from moda.methods.gradsplitter import KEPT, PreparedSplitter
from moda.methods.mwt import PreparedGates
from moda.methods.tournament import joint_fitness

STANDARD, PUBLISHED, OURS = "standard", "published", "ours"
_TOLERANCE = 1e-2
"""Of the gradients of masks and heads: the same sums in another order."""
_GATED_TOLERANCE = 5e-2
"""Of the length of a gated network's gradients. The norms of 13 layers, over few samples, multiply what convolutions
round, and a ReLU whose input is 0 but for rounding changes single elements by a lot."""
_CHECKED_SAMPLES = 16
_CHECKED_BATCHES = 6
"""Of which a step must be right on one, as in the suite "step": the input of a ReLU may be 0 but for rounding."""
_CLASSES = 10


@dataclass(frozen=True)
class MethodInputs:
    """The model, images and samples of a case.

    Attributes:
        model: the architecture.
        batch: the samples of a step.
        image_size: the height and width of images.
        device: where it runs.
        width: the multiplier of hidden widths.
        population: for CNNSplitter, the candidates of each class.
        samples: for CNNSplitter, the samples that they are judged on; for GradSplitter, those of an epoch.
        trained: for CNNSplitter, whether the network can tell the classes apart, so that many combinations are accurate
            enough to be kept.
    """

    model: str
    batch: int
    image_size: int
    device: torch.device
    width: float = 1.0
    population: int = 100
    samples: int = 256
    trained: bool = False

    def network(self) -> nn.Module:
        """Make the network."""
        torch.manual_seed(0)
        made = models.create(self.model, num_classes=_CLASSES, width=self.width, image_size=self.image_size)
        return made.to(self.device)

    def parameters(self) -> dict[str, int | float | str]:
        """Describe the case."""
        return {"model": self.model, "batch": self.batch, "image_size": self.image_size, "width": self.width}


# ---- steps of methods with gates ----------------------------------------------------------------------------------

Loss = Callable[[PreparedGates, Tensor, Tensor], Tensor]


def gated_step_case(method: MwT | NeMo, about: MethodInputs, budget: Budget) -> Case:
    """Compare whole steps: standard training, the gated network with the published losses, and with ours."""
    return Case(
        suite="methods",
        name=f"{method.name} step {about.model} {about.image_size} px batch {about.batch}",
        baseline=PUBLISHED,
        build=lambda: _gated_contenders(method, about),
        budget=budget,
        parameters=about.parameters(),
    )


def _gated_contenders(method: MwT | NeMo, about: MethodInputs) -> list[Contender]:
    prepared = method.prepare(about.network(), _CLASSES, inputs.images(2, about.image_size, about.device))
    plain = about.network()
    sites = prepared.gates.sites
    gated = PreparedGates(plain, _CLASSES, {}, gates=Gates(plain, sites))  # convolutions are PyTorch's own
    plain.load_state_dict(prepared.model.state_dict())
    steps = {
        PUBLISHED: _GatedStep(about, gated, lambda own, z, y: _published_loss(method, own, z, y)),
        OURS: _GatedStep(about, prepared, lambda own, z, y: _our_loss(method, own, z, y)),
    }

    def check() -> str:
        problem = ""
        for batch in range(_CHECKED_BATCHES):
            wanted, found = (steps[name].gradients(batch) for name in (PUBLISHED, OURS))
            problem = _far_apart(found, wanted)
            if not problem:
                return ""
        return problem

    made = [Contender(STANDARD, {"step": Timed(_then(_StandardStep(about)))})]
    made += [
        Contender(name, {"step": Timed(_then(step))}, check if name == OURS else lambda: "")
        for name, step in steps.items()
    ]
    return made


def _far_apart(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> str:
    """Say which gradient is further from the expected one than rounding explains; empty if none is."""
    noise = 1e-5 * max(float(gradient.abs().amax()) for gradient in wanted)
    for index, (mine, expected) in enumerate(zip(found, wanted, strict=True)):
        apart = float((mine - expected).norm() / expected.norm())
        if float(expected.abs().amax()) > noise and not apart <= _GATED_TOLERANCE:
            return f"gradients[{index}]: {apart:.1e} of the expected one's length away from it"
    return ""


def _then(step: Callable[[], None]) -> Callable[[object], None]:
    return lambda _: step()


def _published_loss(method: MwT | NeMo, prepared: PreparedGates, logits: Tensor, labels: Tensor) -> Tensor:
    gates = prepared.gates.take()
    task = F.cross_entropy(logits, labels)
    if isinstance(method, MwT):
        cohesion, coupling = published.mwt_losses(gates, labels)
        return task + method.cohesion * cohesion + method.coupling * coupling
    gates[0] = torch.ones_like(gates[0])
    return task + method.contrast * published.nemo_loss(gates, labels, method.temperature)


def _our_loss(method: MwT | NeMo, prepared: PreparedGates, logits: Tensor, labels: Tensor) -> Tensor:
    weights = method.phases()[0].weights
    terms = method.loss(prepared, logits, labels)
    return torch.stack([weights[name] * term for name, term in terms.items()]).sum()


class _GatedStep:
    """A step that repeats on the same batch."""

    def __init__(self, about: MethodInputs, prepared: PreparedGates, loss: Loss) -> None:
        self.about, self.prepared, self.loss = about, prepared, loss
        self.images = inputs.images(about.batch, about.image_size, about.device)
        self.labels = inputs.labels(about.batch, _CLASSES, about.device)
        prepared.model.train()
        self.optimizer = torch.optim.SGD(prepared.model.parameters(), lr=1e-4, momentum=0.9)

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        self.loss(self.prepared, self.prepared.model(self.images), self.labels).backward()
        self.optimizer.step()

    def gradients(self, batch: int) -> list[Tensor]:
        """Of a step on a batch of few samples that leaves weights and statistics as they are."""
        about, state = self.about, copy.deepcopy(self.prepared.model.state_dict())
        skipped = batch * _CHECKED_SAMPLES
        images = inputs.images(skipped + _CHECKED_SAMPLES, about.image_size, about.device)[skipped:]
        labels = inputs.labels(_CHECKED_SAMPLES, _CLASSES, about.device)
        self.optimizer.zero_grad()
        torch.manual_seed(1)
        self.loss(self.prepared, self.prepared.model(images), labels).backward()
        found = [p.grad.clone() for p in self.prepared.model.parameters() if p.grad is not None]
        self.prepared.model.load_state_dict(state)
        return found


class _StandardStep:
    """A step without gates."""

    def __init__(self, about: MethodInputs) -> None:
        self.model = about.network().train()
        self.images = inputs.images(about.batch, about.image_size, about.device)
        self.labels = inputs.labels(about.batch, _CLASSES, about.device)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-4, momentum=0.9)

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(self.images), self.labels).backward()
        self.optimizer.step()


# ---- an epoch of GradSplitter -------------------------------------------------------------------------------------


def splitter_epoch_case(about: MethodInputs, budget: Budget) -> Case:
    """Compare an epoch of masks and heads: the classes one after the other, and all in one pass."""
    return Case(
        suite="methods",
        name=f"gradsplitter epoch {about.model} {about.image_size} px",
        baseline=PUBLISHED,
        build=lambda: _splitter_contenders(about),
        budget=budget,
        parameters=about.parameters() | {"samples": about.samples},
    )


def _splitter_contenders(about: MethodInputs) -> list[Contender]:
    method, network = GradSplitter(), _used(about.network()).eval()
    prepared = method.prepare(network, _CLASSES, inputs.images(2, about.image_size, about.device))
    ours = prepared.splitter
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for mask in ours.masks:  # two thirds of the neurons are kept
            mask.copy_(torch.randn(mask.shape, generator=generator) + 0.4)
    layers = [*network.features, network.flatten, *network.classifier]  # type: ignore[misc]
    heads = [ours.heads.of_class(number) for number in range(_CLASSES)]
    plain = published.SplitterNetwork(layers, [ours.mask(tap) for tap in ours.owners], heads)
    epochs = {
        PUBLISHED: _SplitterEpoch(about, plain, lambda p, y: _splitter_loss(p, y, plain.kept_share(), method.weight)),
        OURS: _SplitterEpoch(about, ours, lambda p, y: _our_splitter_loss(method, prepared, p, y)),
    }

    def check() -> str:
        epochs[PUBLISHED].backward()
        epochs[OURS].backward()
        wanted = [torch.stack([masks[place].grad for masks in plain.masks]) for place in range(len(ours.masks))]  # type: ignore[index]
        own = [list(head.parameters()) for head in plain.heads]
        wanted += [torch.stack([parameters[place].grad for parameters in own]) for place in range(len(own[0]))]  # type: ignore[misc]
        found = [parameter.grad for parameter in [*ours.masks, *ours.heads.parameters()]]
        return gate.first_difference("gradients", found, wanted, _TOLERANCE, 1e-6)

    return [
        Contender(name, {"epoch": Timed(_then(epoch))}, check if name == OURS else lambda: "")
        for name, epoch in epochs.items()
    ]


def _used(network: nn.Module) -> nn.Module:
    """The network with statistics of its norms as training leaves them: different for each neuron."""
    generator = torch.Generator().manual_seed(1)
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d):
            assert norm.running_mean is not None
            assert norm.running_var is not None
            norm.running_mean.uniform_(-0.3, 0.3, generator=generator)
            norm.running_var.uniform_(0.5, 1.5, generator=generator)
    return network


def _splitter_loss(probabilities: Tensor, labels: Tensor, kept: Tensor, weight: float) -> Tensor:
    return F.cross_entropy(probabilities, labels) + weight * kept


def _our_splitter_loss(
    method: GradSplitter, prepared: PreparedSplitter, probabilities: Tensor, labels: Tensor
) -> Tensor:
    terms = method.loss(prepared, probabilities, labels)
    return terms[TASK] + method.weight * terms[KEPT]


class _SplitterEpoch:
    """An epoch that trains masks and heads."""

    def __init__(self, about: MethodInputs, splitter: nn.Module, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.splitter, self.loss = splitter, loss
        images = inputs.images(about.samples, about.image_size, about.device)
        labels = inputs.labels(about.samples, _CLASSES, about.device)
        self.batches = list(zip(images.split(about.batch), labels.split(about.batch), strict=True))
        self.optimizer = torch.optim.Adam(splitter.parameters(), lr=1e-6)

    def __call__(self) -> None:
        for images, labels in self.batches:
            self.optimizer.zero_grad()
            self.loss(self.splitter(images), labels).backward()
            self.optimizer.step()

    def backward(self) -> None:
        """Leave the gradients of the first batch with the parameters."""
        images, labels = self.batches[0]
        self.optimizer.zero_grad()
        self.loss(self.splitter(images), labels).backward()


# ---- a generation of CNNSplitter ----------------------------------------------------------------------------------


def generation_case(about: MethodInputs, budget: Budget) -> Case:
    """Compare the judging of a generation: candidate by candidate and combination by combination, and in arrays.

    As published, every candidate is a network of its own that is cut out and run.
    """
    return Case(
        suite="methods",
        name=f"cnnsplitter generation {about.model} {about.image_size} px, {about.population} candidates",
        baseline=PUBLISHED,
        build=lambda: _generation_contenders(about),
        budget=budget,
        parameters=about.parameters() | {"population": about.population, "samples": about.samples},
    )


def _generation_contenders(about: MethodInputs) -> list[Contender]:
    half, fifth = about.population // 2, about.population // 5
    method = CNNSplitter(1, about.population, half, fifth, sensitive=(), progress=False, patience=None)
    network = about.network()
    images = inputs.images(about.samples, about.image_size, about.device)
    labels = inputs.labels(about.samples, _CLASSES, about.device)
    if about.trained:
        images = _learnt(network, images, labels)
    loader = list(zip(images.split(about.batch), labels.split(about.batch), strict=True))
    prepared = method.prepare(network, _CLASSES, images[:2])
    search = method.search(prepared, loader)
    judged = _Judged(search)

    def check() -> str:
        wanted, found = judged.published(), judged.ours()
        if np.allclose(wanted, found, rtol=1e-5, atol=1e-6):
            return ""
        return f"fitness differs by {np.abs(wanted - found).max():.3g}"

    ours = Timed(lambda _: judged.ours(), judged.forget)
    return [
        Contender(PUBLISHED, {"generation": Timed(lambda _: judged.published())}),
        Contender(OURS, {"generation": ours}, check),
    ]


def _learnt(network: nn.Module, noise: Tensor, labels: Tensor) -> Tensor:
    """Images with a pattern for each class, which the network is trained to tell apart."""
    patterns = inputs.images(_CLASSES, noise.shape[-1], noise.device)
    images = patterns[labels] + noise.flip(0)
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    for _ in range(20):
        for part, wanted in zip(images.split(64), labels.split(64), strict=True):
            optimizer.zero_grad()
            F.cross_entropy(network(part), wanted).backward()
            optimizer.step()
    return images


class _Judged:
    """The judging of a search's present populations, a fifth of which lived on from the generation before."""

    def __init__(self, search: Search) -> None:
        self.search = search
        self.order = list(range(_CLASSES))
        search.breed()
        self._known = dict(search._known)

    def _rounds(self) -> Sequence[tuple[int, float]]:
        return self.search._rounds()

    def forget(self) -> None:
        """What is known is what the generation before knew: the elites."""
        elites = self.search.settings.elites
        kept = {
            (number, genes.tobytes())
            for number, population in enumerate(self.search.populations)
            for genes in population[:elites]
        }
        self.search._known = {key: value for key, value in self._known.items() if key in kept}

    def ours(self) -> np.ndarray:
        """The fitness as our search computes it."""
        outputs, kernels = [], []
        for number, population in enumerate(self.search.populations):
            masks = self.search.masks(number, population)
            kernels.append(np.concatenate(list(masks.values()), 1))
            outputs.append(self.search._outputs(number, population, masks))
        alpha = self.search.settings.alpha
        found = joint_fitness(
            np.stack(outputs),
            self.search.labels,
            np.stack(kernels),
            self.order,
            self._rounds(),
            weight=alpha,
            alpha=alpha,
        )
        return found.fitness

    def published(self) -> np.ndarray:
        """The fitness as the published algorithm computes it."""
        search = self.search
        outputs, kernels = [], []
        for number, population in enumerate(search.populations):
            masks, rows = search.masks(number, population), range(len(population))
            kernels.append(np.concatenate(list(masks.values()), 1))
            outputs.append(np.stack([self._cut(number, [mask[row] for mask in masks.values()]) for row in rows]))
        alpha = search.settings.alpha
        return published.joint_fitness(
            np.stack(outputs), search.labels, np.stack(kernels), self.order, self._rounds(), alpha, alpha
        )

    def _cut(self, number: int, masks: Sequence[np.ndarray]) -> np.ndarray:
        """The outputs for its class of a candidate that is cut out."""
        network = self.search.prepared.model
        layers = [*network.features, network.flatten, *network.classifier]  # type: ignore[misc]
        module = published.cut(layers, masks)
        with torch.no_grad():
            return torch.cat([module(part)[:, number] for part, _ in self.search.loader]).numpy()


def method_cases(device: torch.device, quick: bool, step: Budget) -> list[Case]:
    """Return the cases of the suite."""
    about = MethodInputs("vgg16", 32 if quick else 128, 32, device, width=0.25 if quick else 1.0)
    small = MethodInputs("small_vgg", 64, 8, device, samples=128 if quick else 1024, population=10 if quick else 40)
    once = Budget(least=3, most=5, seconds=20.0, warmups=1)
    few = replace(small, samples=64 if quick else 256, trained=not quick)
    twice = Budget(least=1, most=2, seconds=20.0, warmups=0)  # the published tournament takes long
    return [
        gated_step_case(MwT(), about, step),
        gated_step_case(NeMo(), about, step),
        splitter_epoch_case(small, once),
        generation_case(few, once if quick else twice),
    ]
