"""Firing rates on disk: a folder with the counts and a description, from which any threshold can be cut later."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from moda.decomposition.container import FiringRates
from moda.files import FormatError, read_json, read_tensors, write_json, write_tensors
from moda_kernels import __version__

__all__ = ["load_rates", "rates_metadata", "save_rates"]

FORMAT = "moda-rates"
FORMAT_VERSION = 1
COUNTS_FILE = "counts.safetensors"
DESCRIPTION_FILE = "rates.json"


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
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "library_version": __version__,
        "num_classes": rates.num_classes,
        "class_sizes": rates.class_sizes.tolist(),
        "firing_threshold": rates.threshold,
        "taps": [{"name": tap, "neurons": rates.counts[tap].shape[1]} for tap in rates.taps],
        "counts_sha256": digest,
        "metadata": dict(metadata or {}),
    }
    write_json(folder / DESCRIPTION_FILE, description)


def load_rates(folder: str | Path) -> FiringRates:
    """Read what `save_rates` wrote; the rates are computed from the counts, to the bit as they were.

    Raises:
        FormatError (a ValueError): a file is missing, malformed, of another version, or does not match the other.
    """
    folder = Path(folder)
    path = folder / DESCRIPTION_FILE
    description = read_json(path, FORMAT, FORMAT_VERSION)
    try:
        class_sizes = torch.tensor(description["class_sizes"], dtype=torch.int64)
        widths = {str(tap["name"]): int(tap["neurons"]) for tap in description["taps"]}
        threshold, digest = float(description["firing_threshold"]), str(description["counts_sha256"])
    except KeyError as error:
        raise FormatError(f"{path}: entry {error} is missing") from None
    except (TypeError, ValueError) as error:
        raise FormatError(f"{path}: {error}") from None
    counts = read_tensors(folder / COUNTS_FILE, digest)
    shapes = {tap: (len(class_sizes), width) for tap, width in widths.items()}
    if {tap: tuple(count.shape) for tap, count in counts.items()} != shapes:
        raise FormatError(f"{folder / COUNTS_FILE}: its tensors are not those that {DESCRIPTION_FILE} describes")
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
    metadata = read_json(Path(folder) / DESCRIPTION_FILE, FORMAT, FORMAT_VERSION).get("metadata")
    if not isinstance(metadata, dict):
        raise FormatError(f'{Path(folder) / DESCRIPTION_FILE}: expected an object "metadata", got {metadata!r}')
    return metadata
