"""Shows a person how a training goes: a progress bar, or a few lines where there is no terminal."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

_SHORT = ("loss", "test_accuracy")  # beside a bar, in 80 columns
_LONG = ("loss", "affinity", "dispersion", "compactness", "train_accuracy", "test_accuracy")
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
        """Note that training begins, or goes on after `steps_done` steps."""
        self._epochs = epochs
        if not (self.shown and self._console.is_terminal):
            return
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=16),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
            console=self._console,
            refresh_per_second=4,
            transient=True,
        )
        self._task = self._bar.add_task(self.label, total=epochs * steps_per_epoch, completed=steps_done, figures="")
        self._bar.start()

    def step(self) -> None:
        """Note that one more step is done."""
        if self._bar is not None:
            self._bar.advance(self._task)

    def epoch(self, epoch: int, figures: Mapping[str, float]) -> None:
        """Note that epoch number `epoch`, counted from 1, is done."""
        if self._bar is not None:
            text = f"epoch {epoch}/{self._epochs}  {_summary(figures, _SHORT)}"
            self._bar.update(self._task, figures=text)
        elif self.shown and (epoch % max(1, self._epochs // _LINES) == 0 or epoch == self._epochs):
            text = f"{self.label}: epoch {epoch}/{self._epochs}  {_summary(figures, _LONG)}"
            self._console.print(text, highlight=False, soft_wrap=True)

    def note(self, text: str) -> None:
        """Say something about the training, in a line of its own."""
        if self.shown:
            self._console.print(f"{self.label}: {text}", highlight=False, markup=False, soft_wrap=True)

    def stop(self) -> None:
        """Note that training is over, for whatever reason."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _summary(figures: Mapping[str, float], names: Sequence[str]) -> str:
    words = []
    for name in names:
        if name in figures:
            short, is_share = name.removesuffix("_accuracy"), name.endswith("_accuracy")
            words.append(f"{short} {100 * figures[name]:.2f} %" if is_share else f"{short} {figures[name]:.4f}")
    return "  ".join(words)
