"""A composed model on disk: a folder with its weights, its masks and a description; nothing in it is ever run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moda.composition.compose import ComposedModel, build
from moda.composition.slicing import Slicer
from moda.decomposition.container import check_classes
from moda.files import FormatError, read_json, read_tensors, write_json, write_tensors
from moda.observation.taps import InstrumentedModel
from moda_kernels import __version__

__all__ = ["load_composed", "save_composed"]

FORMAT = "moda-composed"
FORMAT_VERSION = 1
WEIGHTS_FILE = "model.safetensors"
MASKS_FILE = "masks.safetensors"
DESCRIPTION_FILE = "composed.json"


def save_composed(composed: ComposedModel, folder: str | Path, metadata: Mapping[str, Any] | None = None) -> None:
    """Write a model made by `moda.compose`: weights and masks in safetensors, the rest in JSON.

    Args:
        composed: the model; it may have been trained since.
        folder: made if need be; each file in it is replaced as a whole, the description last.
        metadata: what else is worth keeping (source run, class names), anything that JSON can hold.

    Raises:
        TypeError: `composed` was not made by `moda.compose`.
    """
    if not isinstance(composed, ComposedModel):
        raise TypeError(f"composed: expected a model made by moda.compose, got {type(composed).__name__}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.clone() for name, tensor in composed.state_dict().items()}  # tied tensors: each its own
    description = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "library_version": __version__,
        "classes": list(composed.classes),
        "num_classes": composed.num_classes,
        "taps": [{"name": tap, "neurons": len(keep)} for tap, keep in composed.masks.items()],
        "weights_sha256": write_tensors(folder / WEIGHTS_FILE, weights),
        "masks_sha256": write_tensors(folder / MASKS_FILE, composed.masks),
        "metadata": dict(metadata or {}),
    }
    write_json(folder / DESCRIPTION_FILE, description)


def load_composed(folder: str | Path, model: InstrumentedModel) -> ComposedModel:
    """Read what `save_composed` wrote.

    Args:
        folder: as given to `save_composed`.
        model: `moda.instrument` of a model of the same architecture as the composed one was made from. It gives the
            structure, device and train/eval mode; its weights do not matter.

    Raises:
        FormatError (a ValueError): a file is missing, malformed, of another version or of another model; the message
            names the file and says what is wrong.
        TypeError: `model` is not an instrumented (traced) model.
    """
    folder = Path(folder)
    path = folder / DESCRIPTION_FILE
    description = read_json(path, FORMAT, FORMAT_VERSION)
    try:
        num_classes = int(description["num_classes"])
        classes = check_classes(description["classes"], num_classes)
        widths = {str(tap["name"]): int(tap["neurons"]) for tap in description["taps"]}
        digests = [str(description[name]) for name in ("masks_sha256", "weights_sha256")]
    except KeyError as error:
        raise FormatError(f"{path}: entry {error} is missing") from None
    except (TypeError, ValueError) as error:
        raise FormatError(f"{path}: {error}") from None
    masks = read_tensors(folder / MASKS_FILE, digests[0])
    _require_shapes(folder / MASKS_FILE, masks, {tap: (width,) for tap, width in widths.items()}, torch.bool)
    weights = read_tensors(folder / WEIGHTS_FILE, digests[1])
    try:
        plan = Slicer(model, widths, num_classes).plan({tap: masks[tap] for tap in widths}, classes)
    except ValueError as error:
        raise FormatError(f"{path}: was made from another model: {error}") from None
    composed = build(model, plan)
    expected = {name: tuple(tensor.shape) for name, tensor in composed.state_dict().items()}
    _require_shapes(folder / WEIGHTS_FILE, weights, expected)
    composed.load_state_dict(weights)
    return composed


def _require_shapes(
    path: Path, tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype | None = None
) -> None:
    if tensors.keys() != shapes.keys():
        missing, unknown = sorted(shapes.keys() - tensors.keys()), sorted(tensors.keys() - shapes.keys())
        raise FormatError(f"{path}: expected other tensors: missing {missing}, unknown {unknown}")
    for name, shape in shapes.items():
        tensor = tensors[name]
        if tuple(tensor.shape) != shape or (dtype and tensor.dtype != dtype):
            kind = f"{dtype} " if dtype else ""
            raise FormatError(f"{path}: {name}: expected {kind}{shape}, got {tensor.dtype} {tuple(tensor.shape)}")
