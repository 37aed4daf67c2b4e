"""Searches a finished run for modules with a method that trains no model: GradSplitter or CNNSplitter."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from moda.data.batches import BatchLoader, EpochOrder, Passes
from moda.decomposition.container import Decomposition
from moda.inference import device_of
from moda.methods import CNNSplitter, GradSplitter, modularize
from moda.runs.finished import FinishedRun, kept_apart
from moda.settings import Settings, setting

__all__ = ["SEARCHING", "SearchSettings", "search_run"]

SEARCHING = (GradSplitter.name, CNNSplitter.name)
"""Methods that search a trained model for modules."""
_GRADSPLITTER, _CNNSPLITTER = "GradSplitter", "CNNSplitter"


@dataclass(frozen=True)
class SearchSettings(Settings, command="modularize"):
    """How a trained model is searched for modules. The defaults are the published ones."""

    method: str = setting(GradSplitter.name, help=f"The method: {' or '.join(SEARCHING)}.", choices=SEARCHING)
    head_epochs: int = setting(
        GradSplitter.head_epochs,
        help="The epochs in which heads alone are trained first.",
        at_least=1,
        panel=_GRADSPLITTER,
    )
    epochs: int = setting(
        GradSplitter.epochs,
        help="The epochs after those, in cycles of 5 with masks and 2 without.",
        at_least=1,
        panel=_GRADSPLITTER,
    )
    head_rate: float = setting(
        GradSplitter.head_rate,
        help="The learning rate of the first epochs; behind them it is a tenth.",
        above=0,
        panel=_GRADSPLITTER,
    )
    mask_rate: float = setting(
        GradSplitter.mask_rate,
        help="The learning rate while masks are trained. A mask begins at 1 and drops its neuron at 0, so that some "
        "1 / rate steps have to agree on that.",
        above=0,
        panel=_GRADSPLITTER,
    )
    weight: float = setting(
        GradSplitter.weight, help="The weight of the share of neurons kept.", at_least=0, panel=_GRADSPLITTER
    )
    tolerance: float = setting(
        GradSplitter.tolerance,
        help="The share of accuracy that the chosen epoch may lose.",
        at_least=0,
        panel=_GRADSPLITTER,
    )
    classes_at_once: int | None = setting(
        None, help="For how many classes the model runs in one pass; all if not given.", at_least=1, panel=_GRADSPLITTER
    )
    generations: int = setting(
        CNNSplitter.generations, help="How many times the candidates breed.", at_least=0, panel=_CNNSPLITTER
    )
    population: int = setting(
        CNNSplitter.population,
        help="The candidates of each class; half of them breed and a fifth lives on.",
        at_least=5,
        panel=_CNNSPLITTER,
    )
    mutation_percent: float = setting(
        CNNSplitter.mutation_percent,
        help="The share of a child's genes that are drawn anew, in per cent.",
        at_least=0,
        at_most=100,
        panel=_CNNSPLITTER,
    )
    alpha: float = setting(
        CNNSplitter.alpha,
        help="The weight of accuracy against that of diversity.",
        at_least=0,
        at_most=1,
        panel=_CNNSPLITTER,
    )
    patience: int = setting(
        20, help="The search ends after so many generations without a better ensemble.", at_least=1, panel=_CNNSPLITTER
    )
    seed: int | None = setting(
        None,
        help="The seed of the search; the published one, or with gradsplitter the run's, if not given.",
        at_least=0,
    )

    def searching(self, state_file: Path | None = None) -> GradSplitter | CNNSplitter:
        """Make the method; CNNSplitter keeps its search in the file."""
        if self.method == GradSplitter.name:
            return GradSplitter(
                self.head_epochs,
                self.epochs,
                self.head_rate,
                self.mask_rate,
                weight=self.weight,
                tolerance=self.tolerance,
                classes_at_once=self.classes_at_once,
            )
        return CNNSplitter(
            self.generations,
            self.population,
            self.population // 2,
            self.population // 5,
            self.mutation_percent,
            self.alpha,
            patience=self.patience,
            seed=CNNSplitter.seed if self.seed is None else self.seed,
            state_file=state_file,
        )


def search_run(finished: FinishedRun, settings: SearchSettings, state_file: Path | None = None) -> Decomposition:
    """Search a trained model for modules; samples kept apart choose among epochs or candidates.

    The decomposition's metadata have the hash of the weights, and the seconds that the search took since it was begun
    or went on.

    Args:
        finished: the run.
        settings: the method and its settings.
        state_file: CNNSplitter keeps its search there, and goes on from there. It stays; remove it once the modules are
            written.

    Raises:
        ValueError: the method does not fit the model, or the file is of another search.
    """
    samples = finished.data.train_eval
    part, held_out = kept_apart(samples)
    model = finished.run.load_model(finished.data).to(device_of(finished.model))
    config = finished.run.config
    since = time.perf_counter()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed if settings.seed is None else settings.seed)
        method: Any = settings.searching(state_file)
        made = modularize(
            model,
            method,
            Passes(BatchLoader(part, EpochOrder(len(part), config.batch_size, config.seed))),
            finished.data.num_classes,
            validation=BatchLoader(held_out, EpochOrder(len(held_out), config.batch_size, None)),
        ).decomposition
    seconds = time.perf_counter() - since
    origin = {"weights_sha256": finished.weights_sha256, "augmented": False, "seconds": seconds}
    return replace(made, metadata={**made.metadata, **origin})
