"""What a person sees of a training that runs: a progress bar, or a few lines where there is no terminal."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_LINES = 10  # about as many in a log file, however many epochs


class TrainingProgress:
    """Shows the epoch, the share of all steps done, the time left and the last epoch's figures, on stderr.

    Args:
        label: what is being trained.
        shown: whether to show anything.
    """

    def __init__(self, label: str = "training", *, shown: bool = True) -> None:
        self.label = label
        self.shown = shown
        self._console = Console(file=sys.stderr)
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._epochs = 0

    def start(self, epochs: int, steps_per_epoch: int, steps_done: int) -> None:
        """Training begins, or goes on after `steps_done` steps."""
        self._epochs = epochs
        if not (self.shown and self._console.is_terminal):
            return
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=30),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
            console=self._console,
            refresh_per_second=4,
            transient=True,
        )
        self._task = self._bar.add_task(self.label, total=epochs * steps_per_epoch, completed=steps_done, figures="")
        self._bar.start()

    def step(self) -> None:
        """One more step is done."""
        if self._bar is not None:
            self._bar.advance(self._task)

    def epoch(self, epoch: int, figures: Mapping[str, float]) -> None:
        """Epoch number `epoch`, from 1, is done."""
        text = f"epoch {epoch}/{self._epochs}  {_summary(figures)}"
        if self._bar is not None:
            self._bar.update(self._task, figures=text)
        elif self.shown and (epoch % max(1, self._epochs // _LINES) == 0 or epoch == self._epochs):
            self._console.print(f"{self.label}: {text}", highlight=False, soft_wrap=True)

    def stop(self) -> None:
        """Training is over, for whatever reason."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _summary(figures: Mapping[str, float]) -> str:
    words = [f"loss {figures['loss']:.4f}"] if "loss" in figures else []
    words += [f"{name} {figures[name]:.3f}" for name in ("affinity", "dispersion", "compactness") if name in figures]
    words += [
        f"{name.removesuffix('_accuracy')} {100 * figures[name]:.2f} %"
        for name in ("train_accuracy", "test_accuracy")
        if name in figures
    ]
    return "  ".join(words)
