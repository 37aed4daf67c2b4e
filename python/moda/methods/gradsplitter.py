"""GradSplitter (arXiv 2311.04438): one module per class, from masks of a trained, frozen network learnt by descent.

Phases alternate between training masks with heads, and heads alone. After every epoch the modules are kept; `extract`
takes those of the epoch with the fewest neurons among the epochs that lose at most a point of validation accuracy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moda.checks import Bounds, check_count, check_names, check_number, mapping, text
from moda.decomposition.container import Decomposition
from moda.inference import device_of, evaluating, fastest_layout
from moda.methods.base import TASK, Loader, Phase, Prepared, check_choice
from moda.methods.folding import folded_norms
from moda.methods.splitter import PUBLISHED_HIDDEN, Splitter
from moda.observation.taps import Taps, observe

KEPT = "kept share"
"""The term of the loss that counts the neurons that modules keep."""

_CYCLE = 5 + 2  # epochs of masks with heads, then of heads alone


@dataclass(frozen=True, eq=False)
class EpochModules:
    """The modules after an epoch.

    Attributes:
        epoch: counted over all phases, from 0.
        accuracy: on the validation data, of the argmax over the modules' probabilities, the mean over batches as
            published; None without validation data.
        neurons: how many neurons a module keeps, the mean over classes.
        masks: per tap (K, C) bool, as they were trained: a layer may be empty.
        state: of masks and heads.
    """

    epoch: int
    accuracy: float | None
    neurons: float
    masks: Mapping[str, Tensor]
    state: Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class PreparedSplitter(Prepared):
    """A frozen network with masks and heads for every class.

    Attributes:
        taps: of the frozen network.
        splitter: masks and heads, over a copy of the network with its batch norms folded where that can be.
        base_accuracy: of the frozen network on the validation data, once an epoch has ended.
        history: the modules after every epoch.
    """

    taps: Taps = field(kw_only=True)
    splitter: Splitter = field(kw_only=True)
    base_accuracy: list[float] = field(default_factory=list, kw_only=True)
    history: list[EpochModules] = field(default_factory=list, kw_only=True)


@dataclass(frozen=True)
class GradSplitter:
    """GradSplitter's settings; the defaults are the published ones.

    Attributes:
        head_epochs: epochs in which heads are trained, before all else.
        epochs: epochs after those, in cycles of 5 with masks and 2 without.
        head_rate: learning rate of the first phase; a tenth of it is that of the later phases of heads.
        mask_rate: learning rate of masks and heads together.
        weight: of the share of neurons kept, while masks are trained.
        tolerance: how much of the network's validation accuracy the chosen epoch may lose, as a share.
        sites: taps whose neurons are masked; None for all of them. The published networks' linear layers are not.
        shared: taps that use the masks of another one, as {tap: owner}.
        hidden: hidden neurons of a head.
        classes_at_once: for how many classes the network runs in one pass; None for all.

    Raises:
        ValueError: a number is out of range.
    """

    head_epochs: int = 5
    epochs: int = 140
    head_rate: float = 0.01
    mask_rate: float = 0.001
    weight: float = 0.1
    tolerance: float = 0.01
    sites: tuple[str, ...] | None = None
    shared: Mapping[str, str] = field(default_factory=dict)
    hidden: int = PUBLISHED_HIDDEN
    classes_at_once: int | None = None

    name = "gradsplitter"

    def __post_init__(self) -> None:
        for name in ("head_epochs", "epochs", "hidden"):
            check_count(name, getattr(self, name))
        for name in ("head_rate", "mask_rate"):
            check_number(name, getattr(self, name), Bounds(above=0))
        for name in ("weight", "tolerance"):
            check_number(name, getattr(self, name), Bounds(at_least=0))
        check_names("sites", self.sites)
        mapping(text())("shared", self.shared)
        if self.classes_at_once is not None:
            check_count("classes_at_once", self.classes_at_once)

    def prepare(self, model: nn.Module, num_classes: int, example: Any) -> PreparedSplitter:
        """Freeze the network, observe it, and give every class masks and a head.

        Args:
            model: a trained network; afterwards its parameters require no gradients, and it is in evaluation mode.
            num_classes: K, at least 2.
            example: a batch of inputs.

        Raises:
            ValueError: there are fewer than two classes, no neurons to mask or a single one at a tap, or outputs that
                are not (N, logits).
        """
        model.requires_grad_(False)
        model.eval()
        folded = folded_norms(model, example)
        taps = observe(model, example=example)
        with torch.no_grad():
            logits = model(example)
        if not isinstance(logits, Tensor) or logits.dim() != 2:
            raise ValueError("model: expected logits of shape (N, classes) as its output")
        splitter = Splitter(
            taps if folded is None else observe(folded, example=example),
            num_classes,
            logits=logits.shape[1],
            sites=self.sites,
            shared=self.shared,
            hidden=self.hidden,
            classes_at_once=self.classes_at_once,
            layout=fastest_layout(model, example),
        ).to(logits.dtype)
        check_choice({tap: splitter.mask(tap).shape[1] for tap in splitter.owners}, "sites")
        groups = {"masks": list(splitter.masks.parameters()), "heads": list(splitter.heads.parameters())}
        return PreparedSplitter(splitter, num_classes, groups, frozen=True, taps=taps, splitter=splitter)

    def phases(self) -> list[Phase]:
        """Heads alone, then cycles of masks with heads and heads alone; each phase begins with a fresh Adam."""
        alone = Phase("heads", self.head_epochs, partial(torch.optim.Adam, lr=self.head_rate), {TASK: 1.0}, ("heads",))
        made = [alone]
        left = self.epochs
        while left > 0:
            count = min(left, 5)
            adam = partial(torch.optim.Adam, lr=self.mask_rate)
            made.append(Phase("modularize", count, adam, {TASK: 1.0, KEPT: self.weight}, ("masks", "heads")))
            left -= count
            count = min(left, _CYCLE - 5)
            if count > 0:
                adam = partial(torch.optim.Adam, lr=0.1 * self.head_rate)
                made.append(Phase("heads", count, adam, {TASK: 1.0}, ("heads",)))
            left -= count
        return made

    def loss(self, prepared: PreparedSplitter, outputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Cross-entropy with the probabilities as logits, and the share of neurons kept."""
        return {TASK: nn.functional.cross_entropy(outputs, labels), KEPT: prepared.splitter.kept_share()}

    def epoch_ended(self, prepared: PreparedSplitter, phase: Phase, validation: Loader | None) -> None:
        """Keep the modules and their figures."""
        splitter = prepared.splitter
        masks = {tap: splitter.mask(tap).detach() > 0 for tap in splitter.owners}
        if validation is not None and not prepared.base_accuracy:
            prepared.base_accuracy.append(_accuracy(prepared.taps.model, validation))
        prepared.history.append(
            EpochModules(
                epoch=len(prepared.history),
                accuracy=None if validation is None else _accuracy(splitter, validation),
                neurons=float(sum(mask.sum() for mask in masks.values())) / prepared.num_classes,
                masks=masks,
                state={name: value.detach().clone() for name, value in splitter.state_dict().items()},
            )
        )

    def extract(self, prepared: PreparedSplitter, loader: Loader) -> Decomposition:
        """The modules of the chosen epoch; of the last one without validation data. The data is not needed.

        Raises:
            ValueError: nothing was trained yet.
        """
        chosen = self.choose(prepared)
        prepared.splitter.load_state_dict(dict(chosen.state))
        settings = {
            "head_epochs": self.head_epochs,
            "epochs": self.epochs,
            "head_rate": self.head_rate,
            "mask_rate": self.mask_rate,
            "weight": self.weight,
            "tolerance": self.tolerance,
        }
        return Decomposition(
            prepared.splitter.module_masks(),
            method=self.name,
            settings=settings,
            combine="probability",
            metadata={"epoch": chosen.epoch, "validation_accuracy": chosen.accuracy},
            heads=prepared.splitter.heads.tensors(),
        )

    def choose(self, prepared: PreparedSplitter) -> EpochModules:
        """The epoch to take: the fewest neurons among those that lose at most `tolerance`, the first of equals.

        Where every epoch loses more, it is the most accurate one.

        Raises:
            ValueError: nothing was trained yet.
        """
        if not prepared.history:
            raise ValueError("prepared: expected a training, got none; run its phases first")
        scored = [(epoch, epoch.accuracy) for epoch in prepared.history if epoch.accuracy is not None]
        if not scored:
            return prepared.history[-1]
        least = prepared.base_accuracy[0] - self.tolerance
        good = [epoch for epoch, accuracy in scored if accuracy >= least]
        if good:
            return min(good, key=lambda epoch: epoch.neurons)
        return max(scored, key=lambda pair: pair[1])[0]


def _accuracy(model: nn.Module, loader: Loader) -> float:
    """The mean over batches of the share of samples whose highest output is the right one."""
    shares = list(_shares(model, loader))
    return sum(shares) / max(1, len(shares))


def _shares(model: nn.Module, loader: Loader) -> Iterator[float]:
    device = device_of(model)
    with evaluating(model), torch.no_grad():
        for inputs, labels in loader:
            outputs = model(inputs.to(device))
            yield float((outputs.argmax(1) == labels.to(device)).float().mean())


def published_shared(model_name: str) -> dict[str, str]:
    """Return which taps share masks in a published network, as {tap: owner}: those whose outputs are added.

    Args:
        model_name: a name of `moda.models.NAMES`; networks without a published list share nothing.
    """
    pairs: dict[str, Sequence[tuple[int, int]]] = {"rescnn": ((3, 1), (7, 5), (11, 9))}
    return {f"relu_{tap}": f"relu_{owner}" for tap, owner in pairs.get(model_name, ())}
