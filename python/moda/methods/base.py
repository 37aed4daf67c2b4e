"""The interface that every modularization method has, and the loop that runs one.

A method *prepares* a network (attaches taps, gates, masks), goes through training *phases* with a loss of named terms,
and *extracts* one module per class. A method that searches after training has no phases.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from moda.data.unpacking import unpacked
from moda.decomposition.container import Decomposition
from moda.inference import device_of

Loader: TypeAlias = "Iterable[Any]"
MakeOptimizer: TypeAlias = "Callable[[list[nn.Parameter]], Optimizer]"
MakeSchedule: TypeAlias = "Callable[[Optimizer, int], LRScheduler]"

TASK = "task"
"""The name of the task's own term, which every loss has."""


@dataclass(frozen=True)
class Phase:
    """A part of a training.

    Attributes:
        name: the phase's name.
        epochs: passes over the training data, at least 1.
        optimizer: makes the optimiser from the parameters that are trained.
        weights: the weight of each term of the loss; terms that are not named have weight 0.
        trained: the groups of parameters that are trained; all others stay as they are.
        schedule: makes the learning-rate schedule from the optimiser and the number of epochs, stepped after each one;
            None for a constant rate.
    """

    name: str
    epochs: int
    optimizer: MakeOptimizer
    weights: Mapping[str, float]
    trained: tuple[str, ...] = ("model",)
    schedule: MakeSchedule | None = None

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise ValueError(f"epochs: expected at least 1, got {self.epochs}")


@dataclass(frozen=True, eq=False)
class Prepared:
    """A network that a method has prepared.

    Attributes:
        model: what is called in a training step, with the batch's inputs.
        num_classes: K.
        groups: the parameters that a phase may train, by the names that phases use.
        frozen: whether the network underneath stays in evaluation mode while the phases run.
    """

    model: nn.Module
    num_classes: int
    groups: Mapping[str, Sequence[nn.Parameter]]
    frozen: bool = False


PreparedT = TypeVar("PreparedT", bound=Prepared)


@runtime_checkable
class Method(Protocol[PreparedT]):
    """A way to get one module per class out of a network."""

    @property
    def name(self) -> str:
        """The method's name, as decompositions carry it."""

    def prepare(self, model: nn.Module, num_classes: int, example: Any) -> PreparedT:
        """Prepare a network; `example` is a batch of its inputs.

        Raises:
            TypeError, ValueError: the method does not fit the network; the message says what to do.
        """

    def phases(self) -> Sequence[Phase]:
        """The phases of the training; none for a method that searches after training."""

    def loss(self, prepared: PreparedT, outputs: Any, labels: Tensor) -> dict[str, Tensor]:
        """Named scalar terms of a batch's loss, `TASK` among them; `outputs` is what `prepared.model` gave."""

    def epoch_ended(self, prepared: PreparedT, phase: Phase, validation: Loader | None) -> None:
        """Take note of an epoch's end."""

    def extract(self, prepared: PreparedT, loader: Loader) -> Decomposition:
        """One module per class, from the training data."""


def check_trainable(model: nn.Module, method: str) -> None:
    """Raise ValueError where a method that trains the network is given a frozen one."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            f"model: {method} trains the network, but none of its parameters requires gradients; call "
            "model.requires_grad_(True), or take a method that searches a trained network (GradSplitter, CNNSplitter)"
        )


def check_choice(widths: Mapping[str, int], argument: str) -> None:
    """Raise ValueError where a site has a single neuron, of which nothing can be left out.

    Args:
        widths: neurons by site.
        argument: of the method, which says what its sites are.
    """
    single = [site for site, width in widths.items() if width < 2]
    if single:
        raise ValueError(
            f"model: {single[0]!r} has a single neuron, so that nothing can be chosen there; leave it out, naming the "
            f"others with {argument}="
        )


@dataclass(frozen=True)
class EpochSummary:
    """What an epoch of a phase came to.

    Attributes:
        phase: the phase's name.
        epoch: counted over all phases, from 0.
        terms: the mean of each term over the epoch's steps.
    """

    phase: str
    epoch: int
    terms: Mapping[str, float]


@dataclass
class _Means:
    """Sums of terms, kept on their device."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    steps: int = 0

    def add(self, terms: Mapping[str, Tensor]) -> None:
        for name, term in terms.items():
            value = term.detach()
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.steps += 1

    def result(self) -> dict[str, float]:
        return {name: float(value) / max(1, self.steps) for name, value in self.sums.items()}


def train(
    method: Method[PreparedT], prepared: PreparedT, loader: Loader, validation: Loader | None = None
) -> Iterator[EpochSummary]:
    """Run a method's phases, epoch by epoch: every item is what an epoch came to, and asking for the next one goes on.

    Args:
        method: the method.
        prepared: what its `prepare` gave.
        loader: gives batches of (inputs, labels), the same number in every epoch.
        validation: what the method may choose by, never the test data.
    """
    epoch = 0
    for phase in method.phases():
        trained = [parameter for group in phase.trained for parameter in prepared.groups[group]]
        optimizer = phase.optimizer(trained)
        schedule = None if phase.schedule is None else phase.schedule(optimizer, phase.epochs)
        with _training_only(prepared, trained):
            for _ in range(phase.epochs):
                means = _Means()
                prepared.model.train(not prepared.frozen)
                for batch in loader:
                    means.add(step(method, prepared, phase, optimizer, batch))
                if schedule is not None:
                    schedule.step()
                method.epoch_ended(prepared, phase, validation)
                yield EpochSummary(phase.name, epoch, means.result())
                epoch += 1


def step(
    method: Method[PreparedT], prepared: PreparedT, phase: Phase, optimizer: Optimizer, batch: Any
) -> dict[str, Tensor]:
    """Take one step of a phase on a batch of (inputs, labels); gives the terms before the update."""
    device = device_of(prepared.model)
    inputs, labels = unpacked(batch)
    optimizer.zero_grad()
    terms = method.loss(prepared, inputs.to(device).into(prepared.model), labels.to(device))
    weighted = [phase.weights[name] * term for name, term in terms.items() if phase.weights.get(name)]
    torch.stack(weighted).sum().backward()
    optimizer.step()
    return terms


@contextmanager
def _training_only(prepared: Prepared, trained: Sequence[nn.Parameter]) -> Iterator[None]:
    """Inside, of all the groups' parameters only those of a phase require gradients."""
    chosen = {id(parameter) for parameter in trained}
    every = {id(parameter): parameter for group in prepared.groups.values() for parameter in group}
    still = [p for number, p in every.items() if number not in chosen and p.requires_grad]
    for parameter in still:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in still:
            parameter.requires_grad_(True)
