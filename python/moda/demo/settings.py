"""Declares what the demo can be asked to do."""

from __future__ import annotations

from dataclasses import dataclass

from moda.runs.config import DecompositionSettings
from moda.settings import Settings, setting


@dataclass(frozen=True)
class DemoSettings(Settings, command="demo"):
    """What the demo does."""

    seeds: tuple[int, ...] = setting(
        (0,), help="The seeds, each of one pair of trainings.", at_least=0, entry="seed", commands=()
    )
    epochs: int = setting(40, help="The epochs of each training.", at_least=1)
    batch_size: int = setting(64, help="The samples of a step: half the paper's, as the digits are few.", at_least=1)
    threshold: float = setting(
        DecompositionSettings.threshold,
        help="The firing rate from which a neuron is kept.",
        at_least=0,
        at_most=1,
        commands=(),
    )
    subtask_sizes: tuple[int, ...] = setting(
        (2, 3, 5, 10), help="The numbers of classes of sub-tasks.", entry="size", commands=()
    )
    samples: int = setting(
        20, help="The sub-tasks of each size; all of them where there are fewer.", at_least=1, commands=()
    )
