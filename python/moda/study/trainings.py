"""Trains what studies need: what is missing is made, and what was stopped goes on."""

from __future__ import annotations

from pathlib import Path

from moda.runs.config import RUNTIME_SETTINGS, TrainingConfig
from moda.runs.finished import FinishedRun
from moda.runs.folder import RunFolder

__all__ = ["check_same", "trained"]


def trained(folder: Path, config: TrainingConfig, device: str = "auto", *, progress: bool = True) -> FinishedRun:
    """Open the run in a folder; it is trained first if it is not yet, from where it stopped.

    Raises:
        ValueError: the folder holds a run with other settings, or the settings do not go together.
    """
    started = (folder / "config.json").exists()
    if not (started and RunFolder.open(folder).finished):
        from moda.training.loop import train
        from moda.training.progress import TrainingProgress

        label = f"{folder.parent.name}/{folder.name}"
        train(config, folder, resume=started, progress=TrainingProgress(label, shown=progress))
    else:
        check_same(folder, RunFolder.open(folder).config, config)
    return FinishedRun.open(folder, device)


def check_same(folder: Path, there: TrainingConfig, wanted: TrainingConfig) -> None:
    """Raise ValueError if the run in a folder has other settings than those that are wanted."""
    for name, value in wanted.to_dict().items():
        found = there.to_dict()[name]
        if found != value and name not in RUNTIME_SETTINGS:
            raise ValueError(
                f"{folder}: holds a run with {name}={found!r}, this study needs {value!r}; use another folder"
            )
