"""Finds the checkpoints and mask files of the published code (MODA's artifact), reads and compares them.

Both are pickles. They are read with `torch.load(weights_only=True)`, which runs nothing that is in them: it builds
tensors and plain containers and refuses everything else.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moda.decomposition.container import Decomposition
from moda.decomposition.settings import FiringRule
from moda.files import LARGEST_TENSORS, FormatError, parse_torch, read_bytes
from moda.runs.config import TrainingConfig
from moda.runs.folder import RunFolder, create_model, load_data

__all__ = [
    "LayerAgreement",
    "PublishedRun",
    "agreement",
    "described",
    "find_published",
    "import_run",
    "load_published_masks",
    "load_published_weights",
]

_MODELS = {"vgg16": "vgg16", "resnet18": "resnet18", "mobilenet": "mobilenet", "lenet5": "lenet5"}
_DATA = {"svhn": "svhn", "cifar10": "cifar10", "cifar100": "cifar100", "imagenet": "imagefolder"}
_NUMBER = r"([0-9.eE+-]+)"
_SETTINGS = re.compile(
    rf"model__bs(\d+)__ep(\d+)__lr{_NUMBER}(?:__aff{_NUMBER}_dis{_NUMBER}_comp{_NUMBER})?$"
)  # fmt: skip


@dataclass(frozen=True)
class PublishedRun:
    """A checkpoint in the artifact's folders, and what their names say of it.

    Attributes:
        weights: the file `model.pt`.
        model: the name of the architecture here.
        data: the name of the data set here, or the artifact's where it has none here.
        batch_size: the samples of a training step.
        epochs: the epochs of the training.
        learning_rate: the learning rate before annealing.
        affinity: the weight of the affinity term; 0 where the name does not say.
        dispersion: the weight of the dispersion term, likewise.
        compactness: the weight of the compactness term, likewise.
    """

    weights: Path
    model: str
    data: str
    batch_size: int
    epochs: int
    learning_rate: float
    affinity: float
    dispersion: float
    compactness: float

    def masks(self, threshold: float = 0.9) -> Path:
        """Give the path of this checkpoint's mask file at a threshold; it need not exist."""
        return self.weights.with_name(f"{self.weights.name}.mod_mask.thres{threshold}.pt")

    def config(self, **settings: Any) -> TrainingConfig:
        """Give the settings of a run of ours; `settings` add to them or replace them.

        Raises:
            ValueError, TypeError: see `TrainingConfig`.
        """
        named = ("model", "data", "batch_size", "epochs", "learning_rate", "affinity", "dispersion", "compactness")
        return TrainingConfig(**{**{name: getattr(self, name) for name in named}, **settings})


def find_published(root: str | Path) -> list[PublishedRun]:
    """Find all final checkpoints under a folder laid out as the artifact's, each in its newest version by name.

    `<model>_<data>/model__bs128__ep200__lr0.05__aff1.0_dis1.0_comp0.3/v<time>/model.pt`

    Raises:
        FormatError: there is no such folder.
    """
    root = Path(root)
    if not root.is_dir():
        raise FormatError(f"{root}: no such folder")
    newest: dict[Path, Path] = {}
    for weights in sorted(root.rglob("model.pt")):
        newest[weights.parent.parent] = weights  # sorted: the last version wins
    found = [_parsed(weights) for weights in newest.values()]
    return [run for run in found if run is not None]


def described(weights: str | Path, **settings: Any) -> TrainingConfig:
    """Give the settings of a run of ours for a published checkpoint, from its folders' names and from `settings`.

    Raises:
        ValueError: the names do not say the model or the data, and `settings` do not either; or see `TrainingConfig`.
    """
    named = _parsed(Path(weights).absolute())
    if named is not None:
        return named.config(**settings)
    for name in ("model", "data"):
        if name not in settings:
            raise ValueError(f"{weights}: its folders are not named as the artifact's; say the {name}: --{name}")
    return TrainingConfig(**settings)


def _parsed(weights: Path) -> PublishedRun | None:
    """Read what the folders of a `<model>_<data>/<settings>/v<time>/model.pt` say; None for other folders."""
    settings = _SETTINGS.match(weights.parent.parent.name)
    model, _, data = weights.parent.parent.parent.name.partition("_")
    if settings is None or model not in _MODELS or not data:
        return None
    batch_size, epochs, learning_rate, *terms = settings.groups()
    affinity, dispersion, compactness = (float(term or 0) for term in terms)
    return PublishedRun(
        weights=weights,
        model=_MODELS[model],
        data=_DATA.get(data, data),
        batch_size=int(batch_size),
        epochs=int(epochs),
        learning_rate=float(learning_rate),
        affinity=affinity,
        dispersion=dispersion,
        compactness=compactness,
    )


def load_published_weights(path: str | Path) -> dict[str, Tensor]:
    """Read the state_dict in a published `model.pt` onto the CPU.

    Raises:
        FormatError (a ValueError): it is missing, holds anything that would have to be run, or is no state_dict.
    """
    value = parse_torch(Path(path), read_bytes(Path(path), LARGEST_TENSORS))
    if not isinstance(value, Mapping) or not value or not all(isinstance(tensor, Tensor) for tensor in value.values()):
        raise FormatError(f"{path}: expected a state_dict (names and tensors), got {_kind(value)}")
    return {str(name): tensor for name, tensor in value.items()}


def load_published_masks(path: str | Path, taps: Sequence[str]) -> Decomposition:
    """Read the modules in a published mask file, which holds `{class: [bool tensor per layer]}`.

    Args:
        path: the file, `model.pt.mod_mask.thres<threshold>.pt`; the threshold is taken from its name.
        taps: `moda.observe(model, example=...).names`; the file has the layers in the same order, without names.

    Raises:
        FormatError (a ValueError): it is missing, holds anything that would have to be run, or is no such file, or has
            another number of layers.
    """
    value = parse_torch(Path(path), read_bytes(Path(path), LARGEST_TENSORS))
    if not isinstance(value, Mapping) or sorted(value) != list(range(len(value))) or not value:
        raise FormatError(f"{path}: expected a mask per class 0, 1, ..., got {_kind(value)}")
    for k in range(len(value)):
        if not isinstance(value[k], Sequence) or len(value[k]) != len(taps):
            raise FormatError(f"{path}: class {k}: expected {len(taps)} masks, one per tap, got {_kind(value[k])}")
    try:
        masks = {
            tap: torch.stack([torch.as_tensor(value[k][layer]) for k in range(len(value))])
            for layer, tap in enumerate(taps)
        }
        threshold = re.search(r"\.mod_mask\.thres([0-9.]+)\.pt$", Path(path).name)
        rule = FiringRule(float(threshold[1])) if threshold else FiringRule()
        return Decomposition(masks, settings=rule.settings(), metadata={"published": Path(path).name})
    except (TypeError, ValueError, RuntimeError) as error:
        raise FormatError(f"{path}: {' '.join(str(error).split())}") from None


def _kind(value: Any) -> str:
    size = f" of {len(value)}" if hasattr(value, "__len__") else ""
    return f"{type(value).__name__}{size}"


def import_run(weights: str | Path, folder: str | Path, config: TrainingConfig) -> RunFolder:
    """Make a run folder of a published checkpoint, so that every command works on it.

    Args:
        weights: the published `model.pt`.
        folder: the run folder, new or empty.
        config: the settings of its training, which decide architecture and data.

    Raises:
        FormatError (a ValueError): the file is not as `load_published_weights` wants it, or of another architecture.
        ValueError: the folder is not empty.
        FileNotFoundError, ImportError: the data set is missing.
    """
    state = load_published_weights(weights)
    model = create_model(config, load_data(config))
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise FormatError(f"{weights}: not the weights of {config.model}: {reason}") from None
    run = RunFolder.create(folder, config)
    run.save_weights(model.state_dict())
    return run


@dataclass(frozen=True)
class LayerAgreement:
    """What two decompositions have in common at one tap.

    Attributes:
        tap: the name of the tap.
        agreement: the share of (class, neuron) entries that are the same.
        only_first: the number of entries that only the first keeps.
        only_second: the number of entries that only the second keeps.
        both: the number of entries that both keep.
    """

    tap: str
    agreement: float
    only_first: int
    only_second: int
    both: int


def agreement(first: Decomposition, second: Decomposition) -> list[LayerAgreement]:
    """Say how far two decompositions of one model are the same, tap by tap.

    Raises:
        ValueError: they are not of one model.
    """
    described = [{tap: tuple(mask.shape) for tap, mask in one.masks.items()} for one in (first, second)]
    if described[0] != described[1]:
        raise ValueError(
            f"second: expected the taps, classes and neurons of the first, {described[0]}, got {described[1]}"
        )
    return [_agreement(tap, mask, second.masks[tap]) for tap, mask in first.masks.items()]


def _agreement(tap: str, first: Tensor, second: Tensor) -> LayerAgreement:
    return LayerAgreement(
        tap=tap,
        agreement=float((first == second).double().mean()),
        only_first=int((first & ~second).sum()),
        only_second=int((second & ~first).sum()),
        both=int((first & second).sum()),
    )
