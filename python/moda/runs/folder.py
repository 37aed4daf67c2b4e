"""The folder of a training run.

    config.json          what was trained, with a format version
    metrics.csv          one row per epoch
    steps.csv            one row per logged step
    model.safetensors    the final weights, under the model's own state_dict keys
    checksums.json       SHA-256 of weights and checkpoints
    decomposition/       the modules, once `moda decompose` or `moda modularize` has run
    search.json          a search of `moda modularize` that was stopped
    checkpoints/         last.ckpt, from which training resumes
    tensorboard/         if asked for

See docs/file_formats.md. Nothing in it is ever unpickled.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from moda import data as datasets
from moda import models
from moda.checks import json_value, one_of
from moda.data import DataSplits
from moda.files import Format, FormatError, as_path, format_errors, is_temporary, parse_tensors, tensor_bytes
from moda.hints import command_line
from moda.methods.mwt import PreparedGates
from moda.runs.checksums import read_checked, write_checked
from moda.runs.config import TrainingConfig
from moda.runs.gated import with_gates

RUN = Format("moda-run", {}, {"training": json_value})


@dataclass(frozen=True)
class RunFolder:
    """A run's folder and its settings; `create` and `open` make it."""

    path: Path
    config: TrainingConfig

    @classmethod
    def create(cls, path: str | Path, config: TrainingConfig) -> RunFolder:
        """Make the folder and write config.json.

        Raises:
            ValueError: `path` is a file, or a folder that holds anything already.
        """
        folder = as_path("path", path)
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder}: expected a folder, found a file")
        if (folder / "config.json").exists():
            raise ValueError(f"{folder}: holds a run already; resume it, or choose another folder")
        if folder.exists() and not all(map(is_temporary, folder.iterdir())):
            raise ValueError(f"{folder}: is not empty and holds no run; choose another folder")
        folder.mkdir(parents=True, exist_ok=True)
        RUN.write(folder / "config.json", {"training": config.to_dict()})
        return cls(folder, config)

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """Open the run in an existing folder.

        Raises:
            FormatError (a ValueError): there is no such folder, or its config.json is missing or malformed.
        """
        folder = as_path("path", path)
        if not folder.is_dir():
            raise FormatError(f"{folder}: no such folder")
        if not (folder / "config.json").exists():
            hint = command_line("train", folder)
            raise FormatError(f"{folder}: holds no run (it has no config.json); make one with: {hint}")
        settings = RUN.read(folder / "config.json").get("training")
        if not isinstance(settings, dict):
            raise FormatError(f'{folder / "config.json"}: expected an object "training", got {settings!r:.80}')
        with format_errors(folder / "config.json"):
            return cls(folder, TrainingConfig.from_dict(settings))

    @property
    def metrics(self) -> Path:
        """The table with a row for every epoch."""
        return self.path / "metrics.csv"

    @property
    def steps(self) -> Path:
        """The table with a row for every logged step."""
        return self.path / "steps.csv"

    @property
    def weights(self) -> Path:
        """The file of the final weights."""
        return self.path / "model.safetensors"

    @property
    def decomposition(self) -> Path:
        """The folder of the modules."""
        return self.path / "decomposition"

    @property
    def search(self) -> Path:
        """The file of a search that was stopped."""
        return self.path / "search.json"

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def last_checkpoint(self) -> Path:
        """The checkpoint that training resumes from."""
        return self.checkpoints / "last.ckpt"

    @property
    def finished(self) -> bool:
        """Whether the training has come to its end."""
        return self.weights.exists()

    def save_weights(self, state: dict[str, Tensor], path: Path | None = None) -> None:
        """Write weights to `path` in this folder, or as the final ones, and note their SHA-256."""
        write_checked(self.path, path or self.weights, tensor_bytes(state))

    def load_weights(self, path: Path | None = None) -> dict[str, Tensor]:
        """Read the weights in `path`, or the final ones, onto the CPU.

        Raises:
            FormatError (a ValueError): the training is not finished, or the file is malformed or not the one that was
                written.
        """
        if path is None and not self.finished:
            raise FormatError(
                f"{self.path}: its training is not finished (no {self.weights.name}); "
                f"finish it with: {command_line('train', self.path, '--resume')}"
            )
        path = path or self.weights
        return parse_tensors(path, read_checked(self.path, path))

    def load_model(self, data: DataSplits) -> nn.Module:
        """Make the trained model, on the CPU and in evaluation mode; `data` is what it was trained on.

        It is plain, or has the gates that its method has trained.

        Raises:
            FormatError (a ValueError): as `load_weights`, or the weights are of another model.
        """
        if self.config.gated:
            return self.load_gated(data).model
        weights = self._checked_weights(data)
        model = create_model(self.config, data)
        model.load_state_dict(weights)
        return model.eval()

    def load_gated(self, data: DataSplits) -> PreparedGates:
        """Make the trained model of a method that trains gates, with them; see `load_model`."""
        weights = self._checked_weights(data)
        with torch.random.fork_rng(devices=[]):  # generators draw initial values, which are replaced
            prepared = with_gates(self.config, data, create_model(self.config, data))
        prepared.model.load_state_dict(weights)
        prepared.model.eval()
        return prepared

    def _checked_weights(self, data: DataSplits) -> dict[str, Tensor]:
        weights = self.load_weights()
        self._check_shapes(weights, data)
        return weights

    def _check_shapes(self, weights: dict[str, Tensor], data: DataSplits) -> None:
        """Compare with a model that takes no memory: the settings of a file from elsewhere may ask for any size."""
        with torch.device("meta"):
            try:
                model = create_model(self.config, data)
            except ValueError as error:  # a model that cannot be, or of more than memory
                raise FormatError(f"{self.path / 'config.json'}: {error}") from error
            if self.config.gated:
                with_gates(self.config, data, model)
            expected = model.state_dict()
        shapes = [{name: tuple(tensor.shape) for name, tensor in state.items()} for state in (weights, expected)]
        wrong = sorted(
            name for name in {**shapes[0], **shapes[1]} if shapes[0].get(name, ...) != shapes[1].get(name, ...)
        )
        if wrong:
            got, wanted = (one.get(wrong[0], "none") for one in shapes)
            raise FormatError(
                f"{self.weights}: not the weights of {self.config.model}: {wrong[0]}: expected {wanted}, got {got}"
            )


def load_data(config: TrainingConfig) -> DataSplits:
    """Load the data set that the settings name.

    Raises:
        ValueError, TypeError, FileNotFoundError, ImportError: see `moda.data.load`.
    """
    one_of(datasets.NAMES)("data", config.data)
    options = dict(config.data_options)
    if config.data == "digits":  # comes without a split of its own
        options.setdefault("seed", config.seed)
    root = {} if config.data_root is None else {"root": config.data_root}
    return datasets.load(config.data, **root, **options)


def create_model(config: TrainingConfig, data: DataSplits) -> nn.Module:
    """Make the model that the settings name, freshly initialised, for the images and classes of `data`.

    Raises:
        ValueError, TypeError: see `moda.models.create`.
    """
    one_of(models.NAMES)("model", config.model)
    channels, height, _ = data.input_shape
    return models.create(
        config.model,
        num_classes=data.num_classes,
        in_channels=channels,
        width=config.width,
        image_size=height,
    )
