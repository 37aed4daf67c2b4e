"""CNNSplitter (ASE 2022, arXiv 2209.06116): a genetic search for the neurons of a network that suffice for a class.

Neurons of each layer are sorted by importance for a class and grouped; a chromosome says which groups a class's module
keeps. Modules are judged together: how well the argmax over their own logits answers, and how little they share.
Nothing is trained. The published code is bound to two networks and to files between processes; here any observed
network is searched, in arrays, with the modules of many chromosomes computed in one batched pass.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from moda.checks import Bounds, check_count, check_names, check_number, items, mapping, text
from moda.decomposition.container import Decomposition
from moda.decomposition.settings import check_fraction
from moda.files import as_path
from moda.inference import fastest_layout
from moda.methods.base import TASK, Loader, Phase, check_choice
from moda.methods.genetic import Slot, decode, first_population, mutated_genes, next_generation, published_groups
from moda.methods.importance import (
    DECIDING,
    Bools,
    PreparedSearch,
    importances,
    labels_of,
    module_outputs,
    sensitive_slots,
    sensitivities,
)
from moda.methods.search_file import read_search, write_search
from moda.methods.splitter import chosen_widths, owners_of
from moda.methods.tournament import JointFitness, joint_fitness, task_sizes
from moda.observation.taps import observe
from moda_kernels.validation import MOST_CLASSES, check_flag

Genes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class CNNSplitter:
    """CNNSplitter's settings; the defaults are the published ones for SimCNN on CIFAR-10.

    Attributes:
        generations: how many times the populations breed.
        population: candidates of each class.
        parents: of them, how many breed.
        elites: of them, how many live on.
        mutation_percent: share of a child's genes that are drawn anew, in per cent.
        alpha: weight of accuracy against 1 - alpha of diversity.
        target_accuracy: below it accuracy counts more (gamma).
        thresholds: accuracy that combinations of so many classes should reach, as {classes: accuracy}; other numbers of
            classes have the threshold of the next larger one given, or the last.
        sensitive: taps that keep more neurons in the first population; None to try every layer and choose.
        sensitive_ratios: shares of groups that these begin with.
        other_ratios: shares of groups that all others begin with.
        confidence: probability of its class from which a sample counts for importance.
        patience: generations without a better ensemble after which the search ends; None for never.
        sites: taps whose neurons are searched over; None for all of them.
        shared: taps that another one decides for, as {tap: owner}.
        seed: of the first population (NumPy) and, with 1 more, of mutations and the order of classes.
        state_file: the search is kept in this file after every generation, and goes on from there where the file holds
            one; None not to keep it. The file stays when the search has ended.
        progress: show a progress bar on standard error, if that is a terminal.

    Raises:
        ValueError: a number is out of range.
    """

    generations: int = 200
    population: int = 100
    parents: int = 50
    elites: int = 20
    mutation_percent: float = 5.0
    alpha: float = 0.9
    target_accuracy: float = 0.9
    thresholds: Mapping[int, float] = field(default_factory=lambda: {2: 0.95, 4: 0.95, 8: 0.85, 10: 0.8})
    sensitive: tuple[str, ...] | None = None
    sensitive_ratios: tuple[float, ...] = (0.6, 0.7, 0.8)
    other_ratios: tuple[float, ...] = (0.4, 0.5, 0.6, 0.7)
    confidence: float = 0.9
    patience: int | None = 20
    sites: tuple[str, ...] | None = None
    shared: Mapping[str, str] = field(default_factory=dict)
    seed: int = 1009
    progress: bool = True
    state_file: Path | None = None

    name = "cnnsplitter"

    def __post_init__(self) -> None:
        for name, least in (("generations", 0), ("population", 2), ("parents", 1), ("elites", 0)):
            check_count(name, getattr(self, name), least)
        if self.parents > self.population or self.elites >= self.population:
            raise ValueError(
                f"parents, elites: expected at most {self.population} and {self.population - 1} of a population of "
                f"{self.population}, got {self.parents} and {self.elites}"
            )
        for name in ("alpha", "target_accuracy", "confidence"):
            check_fraction(name, getattr(self, name))
        check_number("mutation_percent", self.mutation_percent, Bounds(at_least=0, at_most=100))
        self._check_choices()

    def _check_choices(self) -> None:
        if not isinstance(self.thresholds, Mapping):
            raise TypeError(f"thresholds: expected a mapping of layers to shares, got {type(self.thresholds).__name__}")
        for layers, share in self.thresholds.items():
            check_count("thresholds: a number of layers", layers)
            check_fraction(f"thresholds[{layers}]", share)
        for name in ("sensitive", "sites"):
            check_names(name, getattr(self, name))
        for name in ("sensitive_ratios", "other_ratios"):
            object.__setattr__(self, name, tuple(items(check_fraction, least=1)(name, getattr(self, name))))
        if self.patience is not None:
            check_count("patience", self.patience, least=0)
        mapping(text())("shared", self.shared)
        check_count("seed", self.seed, least=0, most=(1 << 32) - 1)
        check_flag(self.progress, "progress")
        if self.state_file is not None:
            object.__setattr__(self, "state_file", as_path("state_file", self.state_file))

    # ---- the interface of a method ---

    def prepare(self, model: nn.Module, num_classes: int, example: Any) -> PreparedSearch:
        """Freeze the network and observe it.

        Raises:
            ValueError: there are fewer than two classes, a layer of one neuron alone, or an unknown tap is named.
        """
        check_count("num_classes", num_classes, least=2, most=MOST_CLASSES)
        model.requires_grad_(False)
        model.eval()
        taps = observe(model, example=example)
        widths = chosen_widths(dict(zip(taps.names, taps.widths, strict=True)), self.sites)
        check_choice(widths, "sites")
        owners = owners_of(widths, self.shared)
        layout = fastest_layout(model, example)
        return PreparedSearch(
            model, num_classes, {}, frozen=True, taps=taps, owners=owners, widths=widths, layout=layout
        )

    def phases(self) -> list[Phase]:
        """None: nothing is trained."""
        return []

    def loss(self, prepared: PreparedSearch, outputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Cross-entropy; no phase asks for it."""
        return {TASK: nn.functional.cross_entropy(outputs, labels)}

    def epoch_ended(self, prepared: PreparedSearch, phase: Phase, validation: Loader | None) -> None:
        """Nothing has to be noted."""

    def extract(self, prepared: PreparedSearch, loader: Loader) -> Decomposition:
        """Search for the modules.

        Args:
            prepared: the network.
            loader: gives batches of (inputs, labels) to judge modules on: part of the training data that the network
                was not trained on, never the test data; the same samples in the same order each time.

        Raises:
            ValueError: the loader gives no batch, or a class has no sample.
        """
        search = self.search(prepared, loader)
        console = Console(stderr=True)
        rounds: Iterable[int] = range(search.generation, self.generations)
        if self.progress and console.is_terminal:
            rounds = track(rounds, "Searching", console=console, transient=True)
        for _ in rounds:
            if search.finished:
                break
            search.breed()
            if self.state_file is not None:
                write_search(self.state_file, search.state_dict(), self._kept(), search.orders)
        return search.decomposition()

    def search(self, prepared: PreparedSearch, loader: Loader) -> Search:
        """Begin a search (importance, sensitivity, first population and its fitness), or go on with one that is kept.

        Raises:
            ValueError: the loader gives no batch, a class has no sample, or the search that is kept is another one.
        """
        labels = labels_of(loader, prepared.num_classes)
        importance = importances(prepared, loader, self.confidence)
        orders = {tap: (-values).argsort(dim=1, stable=True).numpy() for tap, values in importance.items()}
        if self.state_file is not None and self.state_file.exists():
            kept = {slot: orders[slot] for slot in prepared.slots}
            state = read_search(self.state_file, self._kept(), kept)
            return Search(self, prepared, loader, labels, orders, state["sensitive"], state)
        sensitive = self.sensitive
        if sensitive is None:
            sensitive = tuple(sensitive_slots(sensitivities(prepared, loader, orders, DECIDING), ratios=DECIDING))
        return Search(self, prepared, loader, labels, orders, sensitive)

    def _kept(self) -> dict[str, Any]:
        """The settings that a search which goes on must share, as JSON holds them."""
        free = {"generations", "patience", "progress", "state_file"}  # they say how far it goes, and what is shown
        made: dict[str, Any] = json.loads(json.dumps(asdict(replace(self, state_file=None))))
        return {name: value for name, value in made.items() if name not in free}


# ---- the search ---------------------------------------------------------------------------------------------------


class Search:
    """A genetic search in progress; `breed` goes on by one generation.

    Attributes:
        generation: how many times the populations have bred.
        populations: (K, P, genes) of 0 and 1.
        joint: the fitness of the present generation.
        best_score: of the best ensemble so far: alpha times accuracy plus 1 - alpha times diversity.
        best: the chromosomes of that ensemble, (K, genes).
    """

    def __init__(
        self,
        settings: CNNSplitter,
        prepared: PreparedSearch,
        loader: Loader,
        labels: npt.NDArray[np.int64],
        orders: Mapping[str, npt.NDArray[np.int64]],
        sensitive: Sequence[str],
        state: Mapping[str, Any] | None = None,
    ) -> None:
        unknown = sorted(set(sensitive) - set(prepared.slots))
        if unknown:
            raise ValueError(f"sensitive: expected taps that decide ({', '.join(prepared.slots)}), got {unknown[0]!r}")
        self.settings, self.prepared, self.loader, self.labels = settings, prepared, loader, labels
        self.orders = {slot: orders[slot] for slot in prepared.slots}
        self.slots = [self._slot(tap, tap in set(sensitive)) for tap in prepared.slots]
        self.sensitive = tuple(sensitive)
        self._arrays = np.random.RandomState(settings.seed)
        self._draws = random.Random(settings.seed + 1)
        if state is None:
            first = first_population(settings.population, self.slots, self._arrays)
        else:
            first = np.zeros((settings.population, sum(slot.groups for slot in self.slots)), np.uint8)
        self.populations: Genes = np.repeat(first[None], prepared.num_classes, 0)
        self.generation = 0
        self.best_score = -1.0
        self.best: Genes = self.populations[:, 0].copy()
        self._since_best = 0
        self._accuracy_before: float | None = None
        self._known: dict[tuple[int, bytes], npt.NDArray[np.float32]] = {}
        if state is None:
            self.joint = self._judge()
        else:
            self.load_state_dict(state)

    def _slot(self, tap: str, sensitive: bool) -> Slot:
        neurons = self.prepared.widths[tap]
        ratios = self.settings.sensitive_ratios if sensitive else self.settings.other_ratios
        return Slot(neurons, published_groups(neurons), ratios, sensitive)

    @property
    def finished(self) -> bool:
        """Whether all generations have bred, or there was no better ensemble for too long."""
        patience = self.settings.patience
        return self.generation >= self.settings.generations or (patience is not None and self._since_best >= patience)

    def breed(self) -> None:
        """Breed the next generation, and judge it."""
        genes = self.populations.shape[2]
        self.populations = np.stack(
            [
                next_generation(
                    population,
                    fitness,
                    parents=self.settings.parents,
                    elites=self.settings.elites,
                    mutated=mutated_genes(genes, self.settings.mutation_percent),
                    generator=self._arrays,
                    draws=self._draws,
                )
                for population, fitness in zip(self.populations, self.joint.fitness, strict=True)
            ]
        )
        self.generation += 1
        self.joint = self._judge()

    def masks(self, number: int, genes: npt.ArrayLike) -> dict[str, Bools]:
        """The neurons that modules of a class keep, per tap (M, C) bool; a layer without any keeps its first one."""
        kept = decode(genes, self.slots, [self.orders[tap][number] for tap in self.prepared.slots])
        by_slot = dict(zip(self.prepared.slots, kept, strict=True))
        for mask in by_slot.values():
            mask[~mask.any(1), 0] = True
        return {tap: by_slot[owner] for tap, owner in self.prepared.owners.items()}

    def _judge(self) -> JointFitness:
        outputs, kernels = [], []
        for number, population in enumerate(self.populations):
            masks = self.masks(number, population)
            kernels.append(np.concatenate(list(masks.values()), 1))
            outputs.append(self._outputs(number, population, masks))
        joint = joint_fitness(
            np.stack(outputs),
            self.labels,
            np.stack(kernels),
            self._order(),
            self._rounds(),
            weight=self._weight(),
            alpha=self.settings.alpha,
            keep_first=self.generation > 0,
        )
        self._accuracy_before = joint.accuracy
        self._note(joint, np.stack(outputs))
        return joint

    def _outputs(self, number: int, population: Genes, masks: Mapping[str, Bools]) -> npt.NDArray[np.float32]:
        """Own-class outputs of a population; those of candidates that lived on are known."""
        keys = [(number, genes.tobytes()) for genes in population]
        fresh = [row for row, key in enumerate(keys) if key not in self._known]
        if fresh:
            chosen = {tap: mask[fresh] for tap, mask in masks.items()}
            made = module_outputs(self.prepared, chosen, [number] * len(fresh), self.loader)
            self._known |= {keys[row]: outputs for row, outputs in zip(fresh, made, strict=True)}
        outputs = np.stack([self._known[key] for key in keys])
        stale = [key for key in self._known if key[0] == number and key not in set(keys)]
        for key in stale:
            del self._known[key]
        return outputs

    def _order(self) -> list[int]:
        order = list(range(self.prepared.num_classes))
        self._draws.shuffle(order)
        return order

    def _rounds(self) -> list[tuple[int, float]]:
        known = sorted(self.settings.thresholds.items())
        last = known[-1][1] if known else 0.0
        return [
            (size, next((accuracy for classes, accuracy in known if classes >= size), last))
            for size in task_sizes(self.prepared.num_classes)
        ]

    def _weight(self) -> float:
        before = self._accuracy_before
        lack = 0.0 if before is None else max(0.0, self.settings.target_accuracy - before)
        return self.settings.alpha + lack

    def _note(self, joint: JointFitness, outputs: npt.NDArray[np.float32]) -> None:
        """Remember the ensemble of the fittest if it is the best so far."""
        rows = np.arange(len(joint.ensemble))
        chosen = outputs[rows, joint.ensemble]
        accuracy = float((chosen.argmax(0) == self.labels).mean())
        score = self.settings.alpha * accuracy + (1 - self.settings.alpha) * joint.diversity
        if score > self.best_score:
            self.best_score = score
            self.best = self.populations[rows, joint.ensemble].copy()
            self._since_best = 0
        else:
            self._since_best += 1

    def decomposition(self) -> Decomposition:
        """The modules of the best ensemble so far."""
        masks = [self.masks(number, genes[None]) for number, genes in enumerate(self.best)]
        settings = {
            "generations": self.settings.generations,
            "population": self.settings.population,
            "parents": self.settings.parents,
            "elites": self.settings.elites,
            "mutation_percent": self.settings.mutation_percent,
            "alpha": self.settings.alpha,
            "target_accuracy": self.settings.target_accuracy,
            "seed": self.settings.seed,
        }
        return Decomposition(
            {tap: torch.from_numpy(np.concatenate([mask[tap] for mask in masks])) for tap in self.prepared.owners},
            method=self.settings.name,
            settings=settings,
            combine="logit",
            metadata={"generation": self.generation, "score": self.best_score, "sensitive": list(self.sensitive)},
        )

    # ---- to stop and go on ---

    def state_dict(self) -> dict[str, Any]:
        """Everything that a later process needs to go on as this one would have, in arrays, numbers and lists."""
        return {
            "generation": self.generation,
            "populations": self.populations.copy(),
            "fitness": self.joint.fitness.copy(),
            "accuracy": self._accuracy_before,
            "best": self.best.copy(),
            "best_score": self.best_score,
            "since_best": self._since_best,
            "sensitive": self.sensitive,
            "arrays": self._arrays.get_state(legacy=False),
            "draws": self._draws.getstate(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken, of a search with the same settings, network and data."""
        if np.shape(state["populations"]) != self.populations.shape:
            raise ValueError(
                f"state: expected populations of shape {self.populations.shape}, got {np.shape(state['populations'])}"
            )
        self.generation = state["generation"]
        self.populations = np.array(state["populations"], np.uint8)
        self.best = np.array(state["best"], np.uint8)
        self.best_score = state["best_score"]
        self._since_best = state["since_best"]
        self._arrays.set_state(state["arrays"])
        self._draws.setstate(state["draws"])
        self._accuracy_before = state["accuracy"]
        self._known = {}
        self.joint = JointFitness(np.array(state["fitness"]), (), np.zeros(0, np.int64), 0.0, 0.0, 0.0, None)
