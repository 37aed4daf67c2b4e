"""A composed model on disk: a folder with its weights, its masks and a description; nothing in it is ever run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from moda.checks import digest, integer, items, json_value, mapping
from moda.composition.compose import ComposedModel, build
from moda.composition.slicing import Slicer
from moda.decomposition.container import check_classes
from moda.decomposition.files import check_num_classes, check_sites, described_sites
from moda.files import Format, FormatError, check_own_folder, check_tensors, format_errors, read_tensors, write_tensors
from moda.observation.taps import InstrumentedModel

__all__ = ["load_composed", "save_composed"]

COMPOSED = Format(
    "moda-composed",
    {
        "classes": items(integer(0), least=1),
        "num_classes": check_num_classes,
        "taps": check_sites,
        "weights_sha256": digest,
        "masks_sha256": digest,
        "metadata": mapping(json_value),
    },
)
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
        ValueError: the folder is of another kind: a run, a decomposition, ...
    """
    if not isinstance(composed, ComposedModel):
        raise TypeError(f"composed: expected a model made by moda.compose, got {type(composed).__name__}")
    folder = Path(folder)
    check_own_folder(folder, DESCRIPTION_FILE)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.clone() for name, tensor in composed.state_dict().items()}  # tied tensors: each its own
    description = {
        "classes": list(composed.classes),
        "num_classes": composed.num_classes,
        "taps": described_sites(composed.masks),
        "weights_sha256": write_tensors(folder / WEIGHTS_FILE, weights),
        "masks_sha256": write_tensors(folder / MASKS_FILE, composed.masks),
        "metadata": dict(metadata or {}),
    }
    COMPOSED.write(folder / DESCRIPTION_FILE, description)


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
    description = COMPOSED.read(path)
    num_classes = description["num_classes"]
    with format_errors(path):
        classes = check_classes(description["classes"], num_classes)
    widths = {tap["name"]: tap["neurons"] for tap in description["taps"]}
    shapes = {tap: (width,) for tap, width in widths.items()}
    masks = read_tensors(folder / MASKS_FILE, description["masks_sha256"], shapes)
    check_tensors(folder / MASKS_FILE, masks, shapes, torch.bool)
    weights = read_tensors(folder / WEIGHTS_FILE, description["weights_sha256"])
    try:
        plan = Slicer(model, widths, num_classes).plan({tap: masks[tap] for tap in widths}, classes)
    except ValueError as error:
        raise FormatError(f"{path}: was made from another model: {error}") from None
    composed = build(model, plan)
    expected = {name: tuple(tensor.shape) for name, tensor in composed.state_dict().items()}
    check_tensors(folder / WEIGHTS_FILE, weights, expected)
    composed.load_state_dict(weights)
    return composed
