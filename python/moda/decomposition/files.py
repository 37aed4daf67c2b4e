"""Decompositions and firing rates on disk: a folder each, with tensors and a JSON description."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moda.checks import Check, digest, integer, items, json_value, mapping, number, one_of, record, text
from moda.decomposition.rates import FiringRates
from moda.decomposition.scores import ActivationShares, Attributions, NeuronScores, check_scores
from moda.files import (
    Format,
    FormatError,
    as_path,
    check_own_folder,
    check_tensors,
    format_errors,
    read_tensors,
    sha256_of_bytes,
    tensor_bytes,
)

MASKS_FILE = "masks.safetensors"
METADATA_FILE = "decomposition.json"
HEADS_FILE = "heads.safetensors"
COUNTS_FILE = "counts.safetensors"
RATES_FILE = "rates.json"
SCORES_FILE = "scores.safetensors"
SCORES_DESCRIPTION_FILE = "scores.json"

MOST_CLASSES = 1 << 20
MOST_NEURONS = 1 << 24

check_num_classes = integer(1, MOST_CLASSES)
_entries = items(record({"name": text(empty=True), "neurons": integer(1, MOST_NEURONS)}), least=1)


def check_sites(name: str, value: Any) -> list[dict[str, Any]]:
    """A list of sites or taps in execution order, each with its name and its number of neurons; no name twice."""
    sites: list[dict[str, Any]] = _entries(name, value)
    names = [site["name"] for site in sites]
    if len(set(names)) != len(names):
        twice = next(site for site in names if names.count(site) > 1)
        raise ValueError(f"{name}: expected every name once, got {twice!r} twice")
    return sites


def described_sites(masks: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """What `check_sites` takes, of tensors whose last dimension is the neurons."""
    return [{"name": name, "neurons": mask.shape[-1]} for name, mask in masks.items()]


def _from_version_1(entries: dict[str, Any]) -> dict[str, Any]:
    """Version 1 knew the published rule alone, and called sites taps."""
    rule = {"rule": "firing", "threshold": entries["threshold"], "min_fraction": entries["min_fraction"]}
    return {**entries, "method": "moda", "settings": rule, "combine": "rows", "sites": entries["taps"]}


_free: Check = mapping(json_value)
DECOMPOSITION = Format(
    "moda-decomposition",
    {
        "num_classes": check_num_classes,
        "method": text(),
        "settings": _free,
        "combine": text(),
        "sites": check_sites,
        "masks_sha256": digest,
        "metadata": _free,
    },
    {"heads_sha256": digest},
    version=2,
    upgrades={1: _from_version_1},
)
RATES = Format(
    "moda-rates",
    {
        "num_classes": check_num_classes,
        "class_sizes": items(integer(0), least=1, most=MOST_CLASSES),
        "firing_threshold": number(0),
        "taps": check_sites,
        "counts_sha256": digest,
        "metadata": _free,
    },
)


_scores_entries: dict[str, Check] = {
    "num_classes": check_num_classes,
    "class_sizes": items(integer(0), least=1, most=MOST_CLASSES),
    "taps": check_sites,
    "scores_sha256": digest,
    "metadata": _free,
}
SCORES: dict[str, Format] = {
    "attribution": Format("moda-attributions", {**_scores_entries, "target": text()}),
    "share": Format("moda-activation-shares", _scores_entries),
}
"""By the rule that the scores are for."""


def write_decomposition(
    folder: str | Path, masks: Mapping[str, Tensor], entries: Mapping[str, Any], heads: Mapping[str, Tensor]
) -> None:
    """Write masks, heads if there are any, and with the entries what describes them, to a folder, made if need be."""
    folder = as_path("folder", folder)
    check_own_folder(folder, METADATA_FILE)
    files = {MASKS_FILE: tensor_bytes(masks)}
    described = {
        "num_classes": next(iter(masks.values())).shape[0],
        **entries,
        "sites": described_sites(masks),
        "masks_sha256": sha256_of_bytes(files[MASKS_FILE]),
    }
    if heads:
        files[HEADS_FILE] = tensor_bytes(heads)
        described["heads_sha256"] = sha256_of_bytes(files[HEADS_FILE])
    DECOMPOSITION.write_with(folder / METADATA_FILE, described, files)
    if not heads:
        (folder / HEADS_FILE).unlink(missing_ok=True)


def read_decomposition(folder: str | Path) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """The masks in execution order, the heads (none if there are none) and the entries that were written.

    Raises:
        FormatError: a file is missing, malformed, of an unknown version, or does not match the other.
    """
    folder = as_path("folder", folder)
    described = DECOMPOSITION.read(folder / METADATA_FILE)
    shapes = {site["name"]: (described["num_classes"], site["neurons"]) for site in described["sites"]}
    masks = read_tensors(folder / MASKS_FILE, described["masks_sha256"], shapes)
    check_tensors(folder / MASKS_FILE, masks, shapes, torch.bool)
    heads: dict[str, Tensor] = {}
    if "heads_sha256" in described:
        heads = read_tensors(folder / HEADS_FILE, described["heads_sha256"])
    return {site: masks[site] for site in shapes}, heads, described


def masks_sha256(folder: str | Path) -> str:
    """The SHA-256 of a decomposition's masks, in hex, as its description has it.

    Raises:
        FormatError: the description is missing or malformed.
    """
    digest: str = DECOMPOSITION.read(Path(folder) / METADATA_FILE)["masks_sha256"]
    return digest


def save_rates(rates: FiringRates, folder: str | Path, metadata: Mapping[str, Any] | None = None) -> None:
    """Write firing counts to a folder, made if need be; what was there is replaced whole or not at all.

    Args:
        rates: what `count_firings` gave.
        folder: where to.
        metadata: what else is worth keeping, anything that JSON can hold.
    """
    folder = as_path("folder", folder)
    if not isinstance(rates, FiringRates):
        raise TypeError(f"rates: expected FiringRates, got {type(rates).__name__}")
    check_own_folder(folder, RATES_FILE)
    counts = tensor_bytes(rates.counts)
    described = {
        "num_classes": rates.num_classes,
        "class_sizes": rates.class_sizes.tolist(),
        "firing_threshold": rates.threshold,
        "taps": described_sites(rates.counts),
        "counts_sha256": sha256_of_bytes(counts),
        "metadata": {} if metadata is None else metadata,
    }
    RATES.write_with(folder / RATES_FILE, described, {COUNTS_FILE: counts})


def load_rates(folder: str | Path) -> FiringRates:
    """Read what `save_rates` wrote; the rates are computed from the counts, to the bit as they were.

    Raises:
        FormatError (a ValueError): a file is missing, malformed, of another version, or does not match the other.
    """
    folder = as_path("folder", folder)
    described = RATES.read(folder / RATES_FILE)
    num_classes, class_sizes = described["num_classes"], torch.tensor(described["class_sizes"], dtype=torch.int64)
    with format_errors(folder / RATES_FILE):
        if len(class_sizes) != num_classes:
            raise ValueError(f"class_sizes: expected one of each of {num_classes} classes, got {len(class_sizes)}")
    shapes = {tap["name"]: (num_classes, tap["neurons"]) for tap in described["taps"]}
    counts = read_tensors(folder / COUNTS_FILE, described["counts_sha256"], shapes)
    check_tensors(folder / COUNTS_FILE, counts, shapes, torch.int64)
    for tap, count in counts.items():
        if bool(((count < 0) | (count > class_sizes[:, None])).any()):
            raise FormatError(f"{folder / COUNTS_FILE}: {tap}: expected counts from 0 to the class's size, got others")
    sizes = class_sizes.clamp_min(1).double()[:, None]
    return FiringRates(
        taps=tuple(shapes),
        rates={tap: (counts[tap].double() / sizes).float() for tap in shapes},
        counts={tap: counts[tap] for tap in shapes},
        class_sizes=class_sizes,
        threshold=described["firing_threshold"],
    )


def rates_metadata(folder: str | Path) -> dict[str, Any]:
    """The metadata that was given to `save_rates`.

    Raises:
        FormatError (a ValueError): the description is missing or malformed.
    """
    metadata: dict[str, Any] = RATES.read(as_path("folder", folder) / RATES_FILE)["metadata"]
    return metadata


def save_scores(scores: NeuronScores, folder: str | Path, metadata: Mapping[str, Any] | None = None) -> None:
    """Write attributions or activation shares to a folder, made if need be.

    What was there is replaced whole or not at all.

    Args:
        scores: what `attribute` or `activation_shares` gave.
        folder: where to.
        metadata: what else is worth keeping, anything that JSON can hold.
    """
    folder = as_path("folder", folder)
    if not isinstance(scores, NeuronScores):
        raise TypeError(f"scores: expected Attributions or ActivationShares, got {type(scores).__name__}")
    check_own_folder(folder, SCORES_DESCRIPTION_FILE)
    stored = tensor_bytes(scores.scores)
    described = {
        "num_classes": scores.num_classes,
        "class_sizes": scores.class_sizes.tolist(),
        **scores.described(),
        "taps": described_sites(scores.scores),
        "scores_sha256": sha256_of_bytes(stored),
        "metadata": {} if metadata is None else metadata,
    }
    SCORES[scores.rule].write_with(folder / SCORES_DESCRIPTION_FILE, described, {SCORES_FILE: stored})


def load_scores(folder: str | Path, rule: str) -> tuple[NeuronScores, dict[str, Any]]:
    """What `save_scores` wrote for a rule, "attribution" or "share": the scores and the metadata.

    Raises:
        FormatError (a ValueError): a file is missing, malformed, of another kind or version, or does not match the
            other.
    """
    folder = as_path("folder", folder)
    one_of(SCORES)("rule", rule)
    described = SCORES[rule].read(folder / SCORES_DESCRIPTION_FILE)
    num_classes, class_sizes = described["num_classes"], torch.tensor(described["class_sizes"], dtype=torch.int64)
    with format_errors(folder / SCORES_DESCRIPTION_FILE):
        if len(class_sizes) != num_classes:
            raise ValueError(f"class_sizes: expected one of each of {num_classes} classes, got {len(class_sizes)}")
    shapes = {tap["name"]: (num_classes, tap["neurons"]) for tap in described["taps"]}
    stored = read_tensors(folder / SCORES_FILE, described["scores_sha256"], shapes)
    check_tensors(folder / SCORES_FILE, stored, shapes, torch.float32)
    with format_errors(folder / SCORES_FILE):
        check_scores(stored)
    scores = {tap: stored[tap] for tap in shapes}
    if rule == "share":
        return ActivationShares(scores, class_sizes), described["metadata"]
    return Attributions(scores, class_sizes, described["target"]), described["metadata"]
