"""Opens a finished training run for study: its data, its model, its firing rates and its modules."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset, Subset

from moda.checks import one_of
from moda.data import DataSplits
from moda.data.batches import BatchLoader, EpochOrder
from moda.decomposition.attribution import attribute
from moda.decomposition.container import Decomposition
from moda.decomposition.counting import activation_shares, count_firings
from moda.decomposition.files import (
    METADATA_FILE,
    load_rates,
    load_scores,
    masks_sha256,
    rates_metadata,
    save_rates,
    save_scores,
)
from moda.decomposition.rates import FiringRates
from moda.decomposition.rule import decompose
from moda.decomposition.scores import Attributions, NeuronScores
from moda.decomposition.settings import RULES, FiringRule
from moda.files import FormatError, sha256_of
from moda.hints import command_line
from moda.methods.mwt import PreparedGates
from moda.observation.taps import Taps, observe
from moda.runs.config import DecompositionSettings
from moda.runs.folder import RunFolder, load_data
from moda.runs.gated import method_of
from moda.runs.lock import locked

__all__ = ["FinishedRun", "checked_device", "decompose_run", "kept_apart", "run_scores"]

WEIGHTS = "weights_sha256"
HELD_OUT = 5
"""One training sample in so many is kept apart where something is chosen."""
_SCORES_FOLDERS = {"attribution": "attributions", "share": "shares"}


@dataclass(frozen=True, eq=False)
class FinishedRun:
    """A finished run; `open` makes it.

    Attributes:
        run: the run folder.
        data: the data set that it was trained on.
        taps: of the trained model, which is in evaluation mode; without the gates that it was trained with.
        gates: of a copy of the model with its gates, where its method trains some.
    """

    run: RunFolder
    data: DataSplits
    taps: Taps
    gates: PreparedGates | None = None

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
        images = torch.randn(2, *data.input_shape, generator=torch.Generator().manual_seed(0))
        images = images.to(checked_device(device))
        if not run.config.gated:
            model = run.load_model(data).to(images.device).eval()
            return cls(run, data, observe(model, route="grouped", example=images))
        bare, gates = run.load_gated(data), run.load_gated(data)
        bare.gates.remove()
        gates.model.to(images.device)
        sites = [site.output for site in gates.gates.sites]
        return cls(run, data, observe(bare.model.to(images.device).eval(), sites=sites, example=images), gates)

    @property
    def model(self) -> nn.Module:
        """The trained model, without gates."""
        return self.taps.model

    @property
    def whole(self) -> nn.Module:
        """The trained model as it was trained: with its gates, where its method trains some."""
        return self.model if self.gates is None else self.gates.model

    @property
    def rates_folder(self) -> Path:
        """The folder of the firing rates."""
        return self.run.path / "rates"

    def scores_folder(self, rule: str) -> Path:
        """Folder of the attributions, or of the activation shares."""
        return self.run.path / _SCORES_FOLDERS[rule]

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
            hint = command_line("decompose", self.run.path)
            raise FormatError(f"{self.run.path}: holds no firing rates; make them with: {hint}")
        self._check_weights(self.rates_folder, rates_metadata(self.rates_folder))
        return load_rates(self.rates_folder)

    def scores(self, rule: str) -> NeuronScores:
        """The attributions (rule "attribution") or activation shares ("share") that `moda decompose` wrote.

        Raises:
            FormatError: there are none, or they are of other weights.
        """
        folder = self.scores_folder(rule)
        if not folder.exists():
            hint = command_line("decompose", self.run.path, "--rule", rule)
            raise FormatError(f"{self.run.path}: holds no {folder.name}; make them with: {hint}")
        scores, metadata = load_scores(folder, rule)
        self._check_weights(folder, metadata)
        return scores

    def decomposition(self) -> Decomposition:
        """Read the modules that `moda decompose` wrote.

        Raises:
            FormatError: there are none, or they were made from other weights.
        """
        if not self.run.decomposition.exists():
            hint = command_line("decompose", self.run.path)
            raise FormatError(f"{self.run.path}: is not decomposed yet; do it with: {hint}")
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
            "masks_sha256": masks_sha256(self.run.decomposition),
        }

    def loader(self, dataset: Dataset[Any]) -> BatchLoader:
        """Give the batches of a data set in ascending order."""
        return BatchLoader(dataset, EpochOrder(len(dataset), self.run.config.batch_size, None))  # type: ignore[arg-type]

    def _check_weights(self, path: Path, metadata: Mapping[str, Any]) -> None:
        made_from = metadata.get(WEIGHTS, self.weights_sha256)  # older folders do not say
        if made_from != self.weights_sha256:
            raise FormatError(
                f"{path}: was made from other weights than {self.run.weights}; "
                f"make it again with: {command_line('decompose', self.run.path)}"
            )


def decompose_run(
    finished: FinishedRun,
    threshold: float | None = None,
    min_fraction: float | None = None,
    *,
    rule: str = DecompositionSettings.rule,
    epsilon: float | str | None = None,
    tolerance: float | None = None,
    target: str | None = None,
    backend: str = "auto",
    augmented: bool = False,
    progress: bool = True,
) -> Decomposition:
    """Count or score neurons on the training data, decompose the model, and write both to the run's folder.

    With epsilon="auto" one training sample in `HELD_OUT` is kept apart: the scores are of the others, and epsilon is
    chosen on those kept apart. (The training saw them all.)

    Args:
        finished: the run.
        threshold: with rule="firing" the firing rate from which a neuron is kept; 0.9 unless given.
        min_fraction: with rule="firing" the least share of a layer's neurons that a class keeps; 0.005 unless given.
        rule: "firing", "share" or "attribution".
        epsilon: with the other rules the share of the scores that is dropped, 0.05 unless given, or "auto".
        tolerance: with epsilon="auto" the percentage points that modules of two classes may lose, 0.5 unless given.
        target: with rule="attribution" a name of `moda.decomposition.targets.TARGETS`, "margin" unless given.
        backend: the backend that counts.
        augmented: whether to count on augmented images, as the published code does.
        progress: whether to show a progress bar.

    Raises:
        TypeError: an argument does not go with the rule.
        ValueError: an argument is out of range, or a class has no sample.
    """
    one_of(RULES)("rule", rule)
    if finished.gates is not None:
        given = {"min_fraction": min_fraction, "epsilon": epsilon, "tolerance": tolerance, "target": target}
        return _decompose_gated(finished, rule, threshold, given, augmented=augmented)
    if target is not None and rule != Attributions.rule:
        raise TypeError(f"target: goes with rule={Attributions.rule!r}, got it with rule={rule!r}")
    origin = {WEIGHTS: finished.weights_sha256, "augmented": augmented}
    samples = finished.data.for_firing_rates(augmented=augmented)
    held_out = None
    if epsilon == "auto" and rule != FiringRule.NAME:
        samples, held_out = kept_apart(samples)
    scores = _scored(finished, rule, finished.loader(samples), target or "margin", backend, progress)
    made = decompose(
        scores,
        threshold,
        min_fraction,
        epsilon=_epsilon(epsilon),
        model=None if held_out is None else finished.model,
        loader=None if held_out is None else finished.loader(held_out),
        tolerance=tolerance,
        progress=progress,
    )
    decomposition = replace(made, metadata={**made.metadata, **origin})
    with locked(finished.run.path):
        _save_scored(finished, scores, origin)
        decomposition.save(finished.run.decomposition)
    return decomposition


def _decompose_gated(
    finished: FinishedRun, rule: str, threshold: float | None, others: Mapping[str, Any], *, augmented: bool
) -> Decomposition:
    """Decompose a run by how often classes use its gates."""
    assert finished.gates is not None
    method = method_of(finished.run.config, *([] if threshold is None else [threshold]))
    wrong = [name for name, value in others.items() if value is not None]
    if rule != DecompositionSettings.rule or wrong:
        raise TypeError(
            f"{wrong[0] if wrong else 'rule'}: has no meaning for gates of {method.name}; threshold alone decides there"
        )
    loader = finished.loader(finished.data.for_firing_rates(augmented=augmented))
    made = method.extract(finished.gates, loader)
    origin = {WEIGHTS: finished.weights_sha256, "augmented": augmented}
    decomposition = replace(made, metadata={**made.metadata, **origin})
    with locked(finished.run.path):
        decomposition.save(finished.run.decomposition)
    return decomposition


def run_scores(finished: FinishedRun, rule: str, *, progress: bool = True) -> NeuronScores:
    """The attributions or activation shares in the run's folder; made and kept there if there are none.

    Raises:
        FormatError: those in the folder are malformed, or of other weights.
    """
    if not finished.scores_folder(rule).exists():
        loader = finished.loader(finished.data.for_firing_rates())
        made = _scored(finished, rule, loader, "margin", "auto", progress)
        with locked(finished.run.path):
            _save_scored(finished, made, {WEIGHTS: finished.weights_sha256, "augmented": False})
    return finished.scores(rule)


def _save_scored(finished: FinishedRun, scores: FiringRates | NeuronScores, origin: Mapping[str, Any]) -> None:
    if isinstance(scores, FiringRates):
        save_rates(scores, finished.rates_folder, origin)
    else:
        save_scores(scores, finished.scores_folder(scores.rule), origin)


def _scored(
    finished: FinishedRun, rule: str, loader: Iterable[Any], target: str, backend: str, progress: bool
) -> FiringRates | NeuronScores:
    classes = finished.data.num_classes
    if rule == FiringRule.NAME:
        return count_firings(finished.taps, loader, classes, backend=backend, progress=progress)
    if rule == Attributions.rule:
        return attribute(finished.taps, loader, classes, target=target, backend=backend, progress=progress)
    return activation_shares(finished.taps, loader, classes, backend=backend, progress=progress)


def kept_apart(samples: Dataset[Any]) -> tuple[Subset[Any], Subset[Any]]:
    """All samples but one in `HELD_OUT`, and those, by which something is chosen."""
    indices = range(len(samples))  # type: ignore[arg-type]
    rest = [index for index in indices if index % HELD_OUT]
    return Subset(samples, rest), Subset(samples, list(indices[::HELD_OUT]))


def _epsilon(given: float | str | None) -> Any:
    """A number, "auto" or None.

    Raises:
        ValueError: text that is neither.
    """
    if not isinstance(given, str) or given == "auto":
        return given
    try:
        return float(given)
    except ValueError:
        raise ValueError(f"epsilon: expected a number in [0, 1] or 'auto', got {given!r}") from None


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
