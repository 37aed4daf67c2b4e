"""The study of rules as one file: what every training came to, with the sizes of its modules (rules_study.py)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

import moda
from benchmarks.rules_networks import NETWORKS, Parts, parts
from benchmarks.rules_study import SCORES, Trained, trainings
from moda.composition.measure import module_sizes
from moda.decomposition.container import Decomposition
from moda.decomposition.files import load_rates, load_scores
from moda.files import parse_json, read_bytes, write_json

RULES = ("firing", *SCORES)
KEPT_BY_SMALL_IMAGES, KEPT_BY_LARGE_IMAGES, POINTS = 1 / 2, 1 / 3, 0.5
"""The goals: a module by attribution over one by the published rule, and the percentage points that it may lose."""


def read(path: Path) -> list[dict[str, Any]]:
    """The trainings in a file of `write`."""
    trained: list[dict[str, Any]] = parse_json(path, read_bytes(path, 1 << 24))["trainings"]
    return trained


def write(path: Path, entries: Sequence[dict[str, Any]]) -> None:
    """Keep what `collect` gave."""
    write_json(path, {"trainings": list(entries)})


def merged(kept: Sequence[dict[str, Any]], new: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The entries of both, in the study's order; the new one where a training is in both."""

    def key(entry: dict[str, Any]) -> tuple[Any, ...]:
        return entry["network"], entry["modular"], entry["seed"]

    by_key = {key(entry): entry for entry in (*kept, *new)}
    return [by_key[of] for of in ((run.name, run.modular, run.seed) for run in trainings()) if of in by_key]


def collect(out: Path) -> list[dict[str, Any]]:
    """What is measured under `out`, with sizes; they are measured once and kept in a file beside the accuracies."""
    entries = []
    for run in trainings():
        entry = run.results(out)
        if entry is None:
            continue
        file = run.folder(out) / "sizes.json"
        if not file.exists():
            write_json(file, _sizes(run, out, parts(run.network.image_size, run.seed), entry))
        sizes = parse_json(file, read_bytes(file, 1 << 20))
        for name, values in entry["rules"].items():
            values["size"] = sizes["rules"][name]["size"]
            for point, size in zip(values.get("held_out", []), sizes["rules"][name].get("curve", []), strict=True):
                point["size"] = size
        entries.append({**entry, "parameters": sizes["parameters"], "least": sizes["least"]})
    return entries


def _sizes(run: Trained, out: Path, data: Parts, entry: dict[str, Any]) -> dict[str, Any]:
    """Mean shares of the parameters in a one-class module: by every rule, along its curve, and the least possible."""
    model = run.model(out, data)
    folder = run.folder(out)
    images = data.test.tensors[0][:2]

    def size(modules: Decomposition) -> float:
        return float(module_sizes(model, modules, example=images).mean())

    rates = load_rates(folder / "firing")
    published = moda.decompose(rates)
    rules: dict[str, Any] = {"firing": {"size": size(published)}}
    for name in SCORES:
        scores, _ = load_scores(folder / name, name)
        values = entry["rules"][name]
        curve = [size(moda.decompose(scores, epsilon=point["epsilon"])) for point in values["held_out"]]
        rules[name] = {"size": size(moda.decompose(scores, epsilon=values["epsilon"])), "curve": curve}
    least = Decomposition({tap: _one(mask) for tap, mask in published.masks.items()})
    return {"parameters": _parameters(model), "least": size(least), "rules": rules}


def _one(mask: Tensor) -> Tensor:
    """A mask that keeps one neuron."""
    return torch.zeros_like(mask).index_fill(1, torch.tensor(0), value=True)


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@dataclass(frozen=True)
class Summary:
    """The seeds of one network and training.

    Attributes:
        entries: of `collect`, one per seed.
    """

    entries: Sequence[dict[str, Any]]

    @property
    def name(self) -> str:
        return str(self.entries[0]["network"])

    @property
    def training(self) -> str:
        return "modular" if self.entries[0]["modular"] else "standard"

    @property
    def seeds(self) -> list[int]:
        return [entry["seed"] for entry in self.entries]

    def mean(self, of: Callable[[dict[str, Any]], float]) -> float:
        """Over the seeds."""
        return fmean(of(entry) for entry in self.entries)

    def size(self, rule: str) -> float:
        """The share of the parameters in a one-class module."""
        return self.mean(lambda entry: entry["rules"][rule]["size"])

    def lost(self, rule: str, classes: int) -> float:
        """Points between the whole model and the modules of so many classes."""

        def points(entry: dict[str, Any]) -> float:
            accuracies = entry["rules"][rule]["accuracies"][str(classes)]
            return float(accuracies["model"] - accuracies["modules"])

        return self.mean(points)

    def epsilons(self, rule: str) -> list[float]:
        """Those chosen, seed by seed."""
        return [entry["rules"][rule]["epsilon"] for entry in self.entries]

    def curve(self, rule: str) -> list[tuple[float, float, float]]:
        """Epsilon, size and points that pairs lose on held-out samples, where all seeds have it; means over them."""
        curves = [{point["epsilon"]: point for point in entry["rules"][rule]["held_out"]} for entry in self.entries]
        common = sorted(set.intersection(*map(set, curves)))
        return [(value, *(fmean(of[value][name] for of in curves) for name in ("size", "loss"))) for value in common]

    @property
    def goal(self) -> float:
        """What a module by attribution may be, over one by the published rule."""
        return KEPT_BY_LARGE_IMAGES if NETWORKS[self.name].image_size >= 48 else KEPT_BY_SMALL_IMAGES

    @property
    def ratio(self) -> float:
        """The size by attribution over the one by the published rule."""
        return self.size("attribution") / self.size("firing")

    @property
    def worst(self) -> float:
        """The most points that attribution loses, of 2, 5 and 10 classes."""
        return max(self.lost("attribution", classes) for classes in (2, 5, 10))

    @property
    def small_enough(self) -> bool:
        """Whether the goal for the size is reached."""
        return self.ratio <= self.goal

    @property
    def good_enough(self) -> bool:
        """Whether the goal for the accuracy is reached."""
        return self.worst <= POINTS or math.isclose(self.worst, POINTS)


def summaries(entries: Sequence[dict[str, Any]]) -> list[Summary]:
    """One for every network and training that was measured, in the study's order."""
    found = []
    for name in NETWORKS:
        for modular in (True, False):
            mine = [entry for entry in entries if (entry["network"], entry["modular"]) == (name, modular)]
            if mine:
                found.append(Summary(sorted(mine, key=lambda entry: int(entry["seed"]))))
    return found


def missing(entries: Sequence[dict[str, Any]]) -> list[Trained]:
    """The trainings of the study that are not among the entries."""
    done = {(entry["network"], entry["modular"], entry["seed"]) for entry in entries}
    return [run for run in trainings() if (run.name, run.modular, run.seed) not in done]
