"""Opens a finished training run for study: its data, its model, its firing rates and its modules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from moda.data import DataSplits
from moda.data.batches import BatchLoader, EpochOrder
from moda.decomposition.container import Decomposition
from moda.decomposition.counting import count_firings
from moda.decomposition.files import MASKS_FILE, METADATA_FILE, load_rates, rates_metadata, save_rates
from moda.decomposition.rates import FiringRates
from moda.decomposition.rule import decompose
from moda.files import FormatError, sha256_of
from moda.observation.taps import InstrumentedModel, instrument
from moda.runs.config import DecompositionSettings
from moda.runs.folder import RunFolder, load_data
from moda.runs.lock import locked

__all__ = ["FinishedRun", "checked_device", "decompose_run"]

WEIGHTS = "weights_sha256"


@dataclass(frozen=True, eq=False)
class FinishedRun:
    """A finished run; `open` makes it.

    Attributes:
        run: the run folder.
        data: the data set that it was trained on.
        model: the trained model, instrumented, in evaluation mode.
    """

    run: RunFolder
    data: DataSplits
    model: InstrumentedModel

    @classmethod
    def open(cls, folder: str | Path, device: str = "auto") -> FinishedRun:
        """Open the run in a folder, with its model on a device; "auto" means a GPU if there is one.

        Raises:
            FormatError (a ValueError): the folder holds no finished run.
            ValueError: there is no such device.
            FileNotFoundError, ImportError: the data set, or a package that it needs, is missing.
        """
        run = RunFolder.open(folder)
        run.load_weights()  # before the data: a run that is not finished is the likelier mistake
        data = load_data(run.config)
        return cls(run, data, instrument(run.load_model(data)).to(checked_device(device)))

    @property
    def rates_folder(self) -> Path:
        """The folder of the firing rates."""
        return self.run.path / "rates"

    @property
    def weights_sha256(self) -> str:
        """The SHA-256 of the weights file, in hex."""
        return sha256_of(self.run.weights)

    def rates(self) -> FiringRates:
        """Read the firing rates that `moda decompose` wrote.

        Raises:
            FormatError: there are none, or they were made from other weights.
        """
        if not self.rates_folder.exists():
            raise FormatError(f"{self.run.path}: holds no firing rates; make them with: moda decompose {self.run.path}")
        self._check_weights(self.rates_folder, rates_metadata(self.rates_folder))
        return load_rates(self.rates_folder)

    def decomposition(self) -> Decomposition:
        """Read the modules that `moda decompose` wrote.

        Raises:
            FormatError: there are none, or they were made from other weights.
        """
        if not self.run.decomposition.exists():
            raise FormatError(f"{self.run.path}: is not decomposed yet; do it with: moda decompose {self.run.path}")
        decomposition = Decomposition.load(self.run.decomposition)
        self._check_weights(self.run.decomposition / METADATA_FILE, decomposition.metadata)
        return decomposition

    def provenance(self) -> dict[str, Any]:
        """Say what results about the modules follow from: how they were made, and the hashes of weights and masks."""
        decomposition = self.decomposition()
        return {
            **decomposition.settings,
            "method": decomposition.method,
            "model": self.run.config.model,
            "data": self.run.config.data,
            "augmented": bool(decomposition.metadata.get("augmented", False)),
            WEIGHTS: self.weights_sha256,
            "masks_sha256": sha256_of(self.run.decomposition / MASKS_FILE),
        }

    def loader(self, dataset: Dataset[Any]) -> BatchLoader:
        """Give the batches of a data set in ascending order."""
        return BatchLoader(dataset, EpochOrder(len(dataset), self.run.config.batch_size, None))  # type: ignore[arg-type]

    def _check_weights(self, path: Path, metadata: Mapping[str, Any]) -> None:
        made_from = metadata.get(WEIGHTS, self.weights_sha256)  # older folders do not say
        if made_from != self.weights_sha256:
            raise FormatError(
                f"{path}: was made from other weights than {self.run.weights}; "
                f"make it again with: moda decompose {self.run.path}"
            )


def decompose_run(
    finished: FinishedRun,
    threshold: float = DecompositionSettings.threshold,
    min_fraction: float = DecompositionSettings.min_fraction,
    *,
    backend: str = "auto",
    augmented: bool = False,
    progress: bool = True,
) -> Decomposition:
    """Count firings on the training data, decompose the model, and write both to the run's folder.

    Args:
        finished: the run.
        threshold: the firing rate from which a neuron is kept.
        min_fraction: the least share of a layer's neurons that a class keeps.
        backend: the backend that counts firings.
        augmented: whether to count on augmented images, as the published code does.
        progress: whether to show a progress bar.

    Raises:
        ValueError: an argument is out of range, or a class has no sample.
    """
    loader = finished.loader(finished.data.for_firing_rates(augmented=augmented))
    rates = count_firings(finished.model, loader, finished.data.num_classes, backend=backend, progress=progress)
    made = decompose(rates, threshold, min_fraction)
    origin = {WEIGHTS: finished.weights_sha256, "augmented": augmented}
    decomposition = replace(made, metadata={**made.metadata, **origin})
    with locked(finished.run.path):
        save_rates(rates, finished.rates_folder, origin)
        decomposition.save(finished.run.decomposition)
    return decomposition


def checked_device(name: str) -> torch.device:
    """Give a device of this machine by name; "auto" means a GPU if there is one.

    Raises:
        ValueError: there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device: {name!r} cannot be used here: {reason}") from None
    return device
