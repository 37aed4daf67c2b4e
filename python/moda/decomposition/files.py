"""Decompositions and firing rates on disk: a folder each, with tensors and a JSON description."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moda.decomposition.rates import FiringRates
from moda.files import FormatError, format_errors, read_json, read_tensors, write_json, write_tensors
from moda_kernels import __version__

FORMAT = "moda-decomposition"
FORMAT_VERSION = 1
MASKS_FILE = "masks.safetensors"
METADATA_FILE = "decomposition.json"

RATES_FORMAT = "moda-rates"
RATES_FORMAT_VERSION = 1
COUNTS_FILE = "counts.safetensors"
RATES_FILE = "rates.json"


def write_decomposition(folder: str | Path, masks: Mapping[str, Tensor], fields: Mapping[str, Any]) -> None:
    """Write masks and the fields that describe them to a folder, made if need be; the description comes last."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    digest = write_tensors(folder / MASKS_FILE, masks)
    num_classes = next(iter(masks.values())).shape[0]
    description = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "library_version": __version__,
        "num_classes": num_classes,
        "taps": [{"name": tap, "neurons": mask.shape[1]} for tap, mask in masks.items()],
        "masks_sha256": digest,
        **fields,
    }
    write_json(folder / METADATA_FILE, description)


def read_decomposition(folder: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The masks in execution order and the description that `write_decomposition` wrote.

    Raises:
        FormatError: a file is missing, malformed, of another version, or does not match the other.
    """
    folder = Path(folder)
    description = read_json(folder / METADATA_FILE, FORMAT, FORMAT_VERSION)
    with format_errors(folder / METADATA_FILE):
        shapes = _described_shapes(description)
        digest = str(description["masks_sha256"])
    tensors = read_tensors(folder / MASKS_FILE, digest)
    _check_stored_masks(folder / MASKS_FILE, tensors, shapes)
    return {tap: tensors[tap] for tap in shapes}, description


def _described_shapes(description: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Shape of each tap's mask by the description, in execution order."""
    num_classes, taps = description["num_classes"], description["taps"]
    if not isinstance(taps, list) or not all(isinstance(tap, dict) and {"name", "neurons"} <= set(tap) for tap in taps):
        raise TypeError(f'taps: expected a list of {{"name": ..., "neurons": ...}}, got {taps!r}')
    shapes = {tap["name"]: (num_classes, tap["neurons"]) for tap in taps}
    if len(shapes) != len(taps):
        raise ValueError("taps: a name occurs twice")
    return shapes


def _check_stored_masks(path: Path, tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, int]]) -> None:
    """What the description promises is what the file holds; a bool is a byte there and must be 0 or 1."""
    if set(tensors) != set(shapes):
        missing, unknown = sorted(set(shapes) - set(tensors)), sorted(set(tensors) - set(shapes))
        raise FormatError(f"{path}: taps differ from {METADATA_FILE}: missing {missing}, not described {unknown}")
    for tap, shape in shapes.items():
        mask = tensors[tap]
        if mask.dtype != torch.bool or tuple(mask.shape) != shape:
            raise FormatError(f"{path}: {tap}: expected bool {shape}, got {mask.dtype} {tuple(mask.shape)}")
        if mask.numel() and int(mask.view(torch.uint8).max()) > 1:
            raise FormatError(f"{path}: {tap}: expected bytes 0 and 1 in a bool tensor, got others")


def save_rates(rates: FiringRates, folder: str | Path, metadata: Mapping[str, Any] | None = None) -> None:
    """Write firing counts to a folder, made if need be; each file is replaced as a whole, the description last.

    Args:
        rates: what `count_firings` gave.
        folder: where to.
        metadata: what else is worth keeping, anything that JSON can hold.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    digest = write_tensors(folder / COUNTS_FILE, rates.counts)
    description = {
        "format": RATES_FORMAT,
        "format_version": RATES_FORMAT_VERSION,
        "library_version": __version__,
        "num_classes": rates.num_classes,
        "class_sizes": rates.class_sizes.tolist(),
        "firing_threshold": rates.threshold,
        "taps": [{"name": tap, "neurons": rates.counts[tap].shape[1]} for tap in rates.taps],
        "counts_sha256": digest,
        "metadata": dict(metadata or {}),
    }
    write_json(folder / RATES_FILE, description)


def load_rates(folder: str | Path) -> FiringRates:
    """Read what `save_rates` wrote; the rates are computed from the counts, to the bit as they were.

    Raises:
        FormatError (a ValueError): a file is missing, malformed, of another version, or does not match the other.
    """
    folder = Path(folder)
    path = folder / RATES_FILE
    description = read_json(path, RATES_FORMAT, RATES_FORMAT_VERSION)
    with format_errors(path):
        class_sizes = torch.tensor(description["class_sizes"], dtype=torch.int64)
        widths = {str(tap["name"]): int(tap["neurons"]) for tap in description["taps"]}
        threshold, digest = float(description["firing_threshold"]), str(description["counts_sha256"])
    counts = read_tensors(folder / COUNTS_FILE, digest)
    shapes = {tap: (len(class_sizes), width) for tap, width in widths.items()}
    if {tap: tuple(count.shape) for tap, count in counts.items()} != shapes:
        raise FormatError(f"{folder / COUNTS_FILE}: its tensors are not those that {RATES_FILE} describes")
    sizes = class_sizes.clamp_min(1).double()[:, None]
    return FiringRates(
        taps=tuple(widths),
        rates={tap: (counts[tap].double() / sizes).float() for tap in widths},
        counts={tap: counts[tap] for tap in widths},
        class_sizes=class_sizes,
        threshold=threshold,
    )


def rates_metadata(folder: str | Path) -> dict[str, Any]:
    """The metadata that was given to `save_rates`.

    Raises:
        FormatError (a ValueError): the description is missing or malformed.
    """
    metadata = read_json(Path(folder) / RATES_FILE, RATES_FORMAT, RATES_FORMAT_VERSION).get("metadata")
    if not isinstance(metadata, dict):
        raise FormatError(f'{Path(folder) / RATES_FILE}: expected an object "metadata", got {metadata!r}')
    return metadata
