"""What the demo is asked to do."""

from __future__ import annotations

from dataclasses import dataclass

from moda.checks import check_count


@dataclass(frozen=True)
class DemoSettings:
    """What the demo does.

    Attributes:
        seeds: one pair of trainings each.
        epochs: of each training.
        batch_size: samples per step: half the paper's, as the digits are few.
        threshold: firing rate from which a neuron is kept.
        subtask_sizes: numbers of classes.
        samples: sub-tasks of each size, or all where there are fewer.
    """

    seeds: tuple[int, ...] = (0,)
    epochs: int = 40
    batch_size: int = 64
    threshold: float = 0.9
    subtask_sizes: tuple[int, ...] = (2, 3, 5, 10)
    samples: int = 20

    def __post_init__(self) -> None:
        if not self.seeds:
            raise ValueError("seeds: expected at least one seed, got none")
        for name in ("epochs", "batch_size", "samples"):
            check_count(name, getattr(self, name))
