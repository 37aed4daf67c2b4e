"""Finds other people's numbers to set beside ours, and says how far the settings agree. The numbers are in
references.json.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from moda.report.study.inputs import DATA_NAMES, MODEL_NAMES
from moda.runs.config import TERMS, TrainingConfig
from moda.study.replacement import current_strategy

__all__ = ["Match", "find", "find_replacement", "find_sweep", "references"]

_WORDS = {
    "batch_size": "samples per step",
    "learning_rate": "learning rate",
    **{name: f"weight of {name}" for name in TERMS},
}
PAPER_DATA = "CIFAR10, CIFAR100, SVHN and ImageNet"


@cache
def references() -> list[dict[str, Any]]:
    """Return the content of references.json: the paper, then the published code on digits. Accuracies and sizes are
    shares.
    """
    listed: list[dict[str, Any]] = json.loads(
        files(__package__).joinpath("references.json").read_text(encoding="utf-8")
    )
    return listed


@dataclass(frozen=True, eq=False)
class Match:
    """Other people's numbers for the same model and data.

    Attributes:
        name: whose numbers they are.
        short: a short form of the name, to stand beside a line.
        numbers: the entry of references.json.
        differences: where the settings differ, ours first; empty where they agree.
    """

    name: str
    short: str
    numbers: dict[str, Any]
    differences: tuple[str, ...]

    @property
    def statement(self) -> str:
        """Return a sentence that says how far the settings agree."""
        if not self.differences:
            return f"{self.name}: the same setting."
        return f"{self.name}: the same model and data, but here {', '.join(self.differences)}."


def find(config: TrainingConfig, threshold: float | None = None) -> list[Match]:
    """Return the reference numbers for the model and data of the given settings."""
    return _find(config, threshold, "models")


def find_sweep(config: TrainingConfig, parameter: str) -> list[Match]:
    """Return the reference numbers of the same sweep."""
    return [
        match for match in _find(config, None, "sweeps", varied=parameter) if match.numbers["parameter"] == parameter
    ]


def _find(config: TrainingConfig, threshold: float | None, kind: str, varied: str = "") -> list[Match]:
    return [
        Match(
            reference["name"], reference["short"], entry, _differences(config, threshold, reference["settings"], varied)
        )
        for reference in references()
        for entry in reference[kind]
        if (entry["model"], entry["data"]) == (config.model, config.data)
    ]


def find_replacement(config: TrainingConfig, strong: str, weak: str, checkpoint: str, strategy: str) -> list[Match]:
    """Numbers of the same replacement; `config` is that of a weak training."""
    wanted = {
        "data": config.data,
        "strong_model": strong,
        "weak_model": weak,
        "checkpoint": checkpoint,
    }
    return [
        Match(reference["name"], reference["short"], entry, _differences(config, None, reference["settings"]))
        for reference in references()
        for entry in reference["replacement"]
        if all(entry[name] == value for name, value in wanted.items())
        and current_strategy(entry["strategy"]) == current_strategy(strategy)
    ]


def _differences(
    config: TrainingConfig, threshold: float | None, settings: dict[str, Any], varied: str = ""
) -> tuple[str, ...]:
    # a standard training has no weights of terms to compare
    left_out = {varied} if config.modular else {varied, *TERMS}
    ours: dict[str, Any] = {n: getattr(config, n) for n in settings if hasattr(config, n) and n not in left_out}
    if threshold is not None:
        ours["threshold"] = threshold
    if "image_size" in settings:
        ours["image_size"] = config.data_options.get("image_size", settings["image_size"])
    return tuple(
        f"{_WORDS.get(name, name.replace('_', ' '))} {value:g} instead of {settings[name]:g}"
        for name, value in ours.items()
        if value != settings[name]
    )


def from_paper(config: TrainingConfig, threshold: float | None) -> tuple[str, ...]:
    """Return where the setting differs from the paper's, ours first, including model and data; empty if it does not."""
    paper = references()[0]
    data = DATA_NAMES.get(config.data, config.data)
    known = [entry for entry in paper["models"] if entry["model"] == config.model]
    differences = (
        [] if known else [f"{MODEL_NAMES.get(config.model, config.model)}, which the paper does not decompose"]
    )
    if not any(entry["data"] == config.data for entry in paper["models"]):
        size = config.data_options.get("image_size", 8 if config.data == "digits" else None)
        shape = f" of {size} \u00d7 {size}" if size else ""
        differences.append(f"{data}{shape} instead of {PAPER_DATA}")
    return (*differences, *_differences(config, threshold, paper["settings"]))
