"""A composed model on disk: a folder with its tensors and a description; nothing in it is ever run.

The description holds the graphs as lists of operations of ATen, each of which is checked when it is read.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moda.checks import Check, digest, flag, integer, items, json_value, mapping, one_of, optional, record, text
from moda.composition.composed import ComposedModel, Facts, Route, parameters_of
from moda.composition.conditions import check_condition
from moda.composition.ensemble import ClassHead, Ensemble
from moda.composition.graphs import describe, module_of, module_settings, restore
from moda.composition.report import Layer
from moda.decomposition.container import check_classes
from moda.decomposition.files import HEADS_FILE, check_num_classes, check_sites, described_sites
from moda.decomposition.heads import HEAD_TENSORS, check_heads
from moda.files import (
    NEXT,
    Format,
    FormatError,
    as_path,
    check_own_folder,
    check_tensors,
    format_errors,
    meant,
    read_tensors,
    sha256_of,
    sha256_of_bytes,
    tensor_bytes,
)
from moda.structure import Structure

__all__ = ["load_composed", "metadata_of", "save_composed"]

_sizes = items(items(optional(integer(0))))
_route = record(
    {"graph": json_value, "inputs": json_value, "outputs": json_value, "fixed": _sizes, "conditions": items(text())}
)
_LAYER: dict[str, Check] = {
    "name": text(empty=True), "neurons": integer(0), "of": integer(0), "parameters": integer(0), "whole": integer(0),
    "why": text(empty=True),
}  # fmt: skip
_tensor = record({
    "name": text(), "kind": one_of(("parameter", "buffer", "constant")), "same_as": text(), "trainable": flag,
    "shape": items(integer(0)),
})  # fmt: skip
COMPOSED = Format(
    "moda-composed",
    {
        "classes": items(integer(0), least=1),
        "num_classes": check_num_classes,
        "class_names": optional(items(text(empty=True))),
        "taps": check_sites,
        "tensors": items(_tensor),
        "modules": mapping(json_value),
        "routes": mapping(_route, least=1),
        "training": flag,
        "frozen": items(text(empty=True)),
        "layers": items(record(_LAYER)),
        "whole_parameters": integer(0),
        "refused": mapping(text(empty=True, longest=1 << 16)),
        "weights_sha256": digest,
        "masks_sha256": digest,
        "metadata": mapping(json_value),
    },
    version=2,
)
ENSEMBLE = Format(
    "moda-ensemble",
    {
        "classes": items(integer(0), least=1),
        "num_classes": check_num_classes,
        "combine": one_of(("logit", "probability")),
        "members_sha256": items(digest, least=1),
        "metadata": mapping(json_value),
    },
    {"heads_sha256": digest},
)
WEIGHTS_FILE = "model.safetensors"
MASKS_FILE = "masks.safetensors"
DESCRIPTION_FILE = "composed.json"
ENSEMBLE_FILE = "ensemble.json"


def save_composed(
    composed: ComposedModel | Ensemble, folder: str | Path, metadata: Mapping[str, Any] | None = None
) -> None:
    """Write a model made by `moda.compose`: tensors in safetensors, the rest in JSON.

    An ensemble has a folder of its own for each of its modules.

    Args:
        composed: the model; it may have been trained since.
        folder: made if need be; a model that was there is replaced whole or not at all.
        metadata: what else is worth keeping (the source run), anything that JSON can hold.

    Raises:
        TypeError: `composed` was not made by `moda.compose`.
        ValueError: it calls an operation that a file cannot describe, or the folder is of another kind: a run, ...
    """
    folder = as_path("folder", folder)
    kept = {} if metadata is None else mapping(json_value)("metadata", metadata)
    if isinstance(composed, Ensemble):
        _save_ensemble(composed, folder, kept)
        return
    if not isinstance(composed, ComposedModel):
        raise TypeError(f"composed: expected a model made by moda.compose, got {type(composed).__name__}")
    routes = {mode: _described(route) for mode, route in composed.routes.items()}
    check_own_folder(folder, DESCRIPTION_FILE)
    tensors = parameters_of(composed)
    first: dict[int, str] = {}
    for name, tensor in tensors.items():
        first.setdefault(id(tensor), name)
    persistent = set(composed.state_dict())
    facts = composed.facts
    weights = tensor_bytes({name: tensors[name] for name in first.values()})
    masks = tensor_bytes(composed.masks)
    description = {
        "classes": list(composed.classes),
        "num_classes": composed.num_classes,
        "class_names": None if facts.class_names is None else list(facts.class_names),
        "taps": described_sites(composed.masks),
        "tensors": [
            {
                "name": name,
                "kind": "parameter" if isinstance(t, nn.Parameter) else "buffer" if name in persistent else "constant",
                "same_as": first[id(t)],
                "trainable": t.requires_grad,
                "shape": list(t.shape),
            }
            for name, t in tensors.items()
        ],
        "modules": {name: module_settings(module) for name, module in composed.activations().items()},
        "routes": routes,
        "training": composed.training,
        "frozen": list(composed.frozen),
        "layers": [vars(layer) for layer in facts.layers],
        "whole_parameters": facts.parameters,
        "refused": dict(facts.refused),
        "weights_sha256": sha256_of_bytes(weights),
        "masks_sha256": sha256_of_bytes(masks),
        "metadata": kept,
    }
    COMPOSED.write_with(folder / DESCRIPTION_FILE, description, {WEIGHTS_FILE: weights, MASKS_FILE: masks})


def _save_ensemble(ensemble: Ensemble, folder: Path, metadata: dict[str, Any]) -> None:
    check_own_folder(folder, ENSEMBLE_FILE)
    folder.mkdir(parents=True, exist_ok=True)
    description: dict[str, Any] = {
        "classes": list(ensemble.classes),
        "num_classes": ensemble.num_classes,
        "combine": "probability" if len(ensemble.heads) else "logit",
        "members_sha256": [],
        "metadata": metadata,
    }
    files = {}
    if len(ensemble.heads):
        states = [head.state_dict() for head in ensemble.heads]
        files[HEADS_FILE] = tensor_bytes({name: torch.stack([one[name] for one in states]) for name in HEAD_TENSORS})
        description["heads_sha256"] = sha256_of_bytes(files[HEADS_FILE])
    _place_members(folder)
    try:
        for number, member in zip(ensemble.classes, ensemble.members, strict=True):
            assert isinstance(member, ComposedModel)
            with meant(_waiting(folder, number), _member(folder, number)):
                save_composed(member, _waiting(folder, number))
            description["members_sha256"].append(sha256_of(_waiting(folder, number) / DESCRIPTION_FILE))
        ENSEMBLE.write_with(folder / ENSEMBLE_FILE, description, files)
    finally:
        _place_members(folder)
    if not files:
        (folder / HEADS_FILE).unlink(missing_ok=True)


def _place_members(folder: Path) -> None:
    """Put the members in their places that wait and are what the description is of; drop all others.

    From the moment at which a description is written its members hold, wherever they are: `_found` looks for them.
    """
    with suppress(FormatError):  # of no description, or of a damaged one, there are no members
        described = ENSEMBLE.read(folder / ENSEMBLE_FILE)
        for number, expected in zip(described["classes"], described["members_sha256"], strict=False):
            place, waiting = _member(folder, number), _waiting(folder, number)
            if _holds(waiting, expected) and not _holds(place, expected):
                shutil.rmtree(place, ignore_errors=True)
                with meant(waiting, place):
                    waiting.rename(place)
        kept = [_member(folder, number) for number in described["classes"]]
        for place in folder.glob("module-*"):
            if place not in kept and (place / DESCRIPTION_FILE).is_file():
                shutil.rmtree(place)
    for waiting in folder.glob(_waiting(folder, "*").name):
        shutil.rmtree(waiting)


def _member(folder: Path, number: int) -> Path:
    return folder / f"module-{number}"


def _waiting(folder: Path, number: int | str) -> Path:
    """Where a member is until the description is written."""
    return folder / f".module-{number}{NEXT}"


def _found(folder: Path, number: int, expected: str) -> Path:
    """The folder of a member, in its place or waiting for it.

    Raises:
        FormatError: neither is there that the description is of.
    """
    for place in (_member(folder, number), _waiting(folder, number)):
        if _holds(place, expected):
            return place
    inner = _member(folder, number) / DESCRIPTION_FILE
    raise FormatError(f"{inner}: is not the module that {folder / ENSEMBLE_FILE} describes")


def _holds(folder: Path, expected: str) -> bool:
    """Whether a folder holds the composed model whose description has this SHA-256."""
    return (folder / DESCRIPTION_FILE).is_file() and sha256_of(folder / DESCRIPTION_FILE) == expected


def _load_ensemble(folder: Path) -> Ensemble:
    path = folder / ENSEMBLE_FILE
    description = ENSEMBLE.read(path)
    with format_errors(path):
        classes = check_classes(description["classes"], description["num_classes"])
        if len(description["members_sha256"]) != len(classes):
            raise ValueError(f"members_sha256: expected one of each of {len(classes)} classes")
        if (description["combine"] == "probability") != ("heads_sha256" in description):
            raise ValueError(f"heads_sha256: does not go with outputs that combine by {description['combine']!r}")
    members = []
    for number, expected in zip(classes, description["members_sha256"], strict=True):
        members.append(load_composed(_found(folder, number, expected)))
    heads: list[nn.Module] = []
    if "heads_sha256" in description:
        tensors = read_tensors(folder / HEADS_FILE, description["heads_sha256"])
        with format_errors(folder / HEADS_FILE):
            checked = check_heads(tensors, len(classes))
        heads = [ClassHead({name: tensor[row] for name, tensor in checked.items()}) for row in range(len(classes))]
    return Ensemble(members, heads, classes, description["num_classes"])


def metadata_of(folder: str | Path) -> dict[str, Any]:
    """The metadata that were given to `save_composed`.

    Raises:
        FormatError (a ValueError): the description is missing or malformed.
    """
    folder = as_path("folder", folder)
    ensemble = (folder / ENSEMBLE_FILE).exists()
    described = ENSEMBLE.read(folder / ENSEMBLE_FILE) if ensemble else COMPOSED.read(folder / DESCRIPTION_FILE)
    metadata: dict[str, Any] = described["metadata"]
    return metadata


def _described(route: Route) -> dict[str, Any]:
    return {
        "graph": describe(route.graph),
        "inputs": route.inputs.describe(),
        "outputs": route.outputs.describe(),
        "fixed": [list(sizes) for sizes in route.fixed],
        "conditions": list(route.conditions),
    }


def load_composed(folder: str | Path) -> ComposedModel | Ensemble:
    """Read what `save_composed` wrote, onto the CPU.

    Args:
        folder: as given to `save_composed`.

    Raises:
        FormatError (a ValueError): a file is missing, malformed or of another version; the message names the file and
            says what is wrong.
    """
    folder = as_path("folder", folder)
    if (folder / ENSEMBLE_FILE).exists():
        return _load_ensemble(folder)
    path = folder / DESCRIPTION_FILE
    description = COMPOSED.read(path)
    with format_errors(path):
        classes = check_classes(description["classes"], description["num_classes"])
        _check_names(description, path)
        routes = {mode: _route_of(entry) for mode, entry in description["routes"].items()}
        modules = {name: module_of(settings) for name, settings in description["modules"].items()}
    shapes = {tap["name"]: (tap["neurons"],) for tap in description["taps"]}
    masks = read_tensors(folder / MASKS_FILE, description["masks_sha256"], shapes)
    check_tensors(folder / MASKS_FILE, masks, shapes, torch.bool)
    stored = {
        entry["name"]: tuple(entry["shape"]) for entry in description["tensors"] if entry["name"] == entry["same_as"]
    }
    weights = read_tensors(folder / WEIGHTS_FILE, description["weights_sha256"], stored)
    check_tensors(folder / WEIGHTS_FILE, weights, stored)
    names = description["class_names"]
    facts = Facts(
        classes=tuple(classes),
        num_classes=description["num_classes"],
        masks={tap: masks[tap] for tap in shapes},
        class_names=None if names is None else tuple(names),
        layers=tuple(Layer(**{name: layer[name] for name in _LAYER}) for layer in description["layers"]),
        parameters=description["whole_parameters"],
        refused=description["refused"],
    )
    with format_errors(path):
        return _assembled(description, weights, modules, routes, facts)


def _check_names(description: Mapping[str, Any], path: Path) -> None:
    """Every tensor and module that a graph takes is described, under a name that is a name."""
    tensors = {entry["name"] for entry in description["tensors"]}
    for entry in description["tensors"]:
        if entry["same_as"] not in tensors:
            raise FormatError(f"{path}: tensor {entry['name']!r} is the same as {entry['same_as']!r}, which is missing")
    twice = len(description["tensors"]) - len(tensors)
    if twice:
        raise FormatError(f"{path}: tensors: expected every name once, got {twice} of them more often")
    for mode in description["routes"]:
        if mode not in ("train", "eval"):
            raise FormatError(f"{path}: routes: expected 'train' and 'eval', got {mode!r:.80}")
    mode = "train" if description["training"] else "eval"
    if mode not in description["routes"]:
        raise FormatError(f"{path}: routes: expected {mode!r}, the mode that the model is in, which is missing")
    names = description["class_names"]
    if names is not None and len(names) != description["num_classes"]:
        raise FormatError(f"{path}: class_names: expected {description['num_classes']} names, got {len(names)}")


def _route_of(entry: Mapping[str, Any]) -> Route:
    fixed = tuple(tuple(sizes) for sizes in entry["fixed"])
    graph = restore(entry["graph"])
    inputs, outputs = Structure.of(entry["inputs"]), Structure.of(entry["outputs"])
    count = sum(node.op == "placeholder" for node in graph.nodes)
    given = next(iter(reversed(graph.nodes))).args[0]
    if count != len(list(inputs.paths())) or count != len(fixed):
        raise ValueError("routes: a graph has other inputs than are described")
    if not isinstance(given, list | tuple) or len(given) != len(list(outputs.paths())):
        raise ValueError("routes: a graph has other outputs than are described")
    if [part.kind for part in inputs.parts] != ["list", "dict"]:
        raise ValueError("routes: inputs: expected a list of positional arguments and a dict of those by keyword")
    conditions = tuple(entry["conditions"])
    for condition in conditions:
        check_condition(condition, fixed)
    return Route(graph, inputs, outputs, fixed, conditions)


def _assembled(
    description: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    modules: Mapping[str, nn.Module],
    routes: Mapping[str, Route],
    facts: Facts,
) -> ComposedModel:
    made: dict[str, Tensor] = {}
    for entry in description["tensors"]:
        tensor = weights[entry["same_as"]]
        if entry["kind"] == "parameter" and entry["same_as"] not in made:
            tensor = nn.Parameter(tensor, requires_grad=entry["trainable"])
        made[entry["name"]] = made.get(entry["same_as"], tensor)
    for route in routes.values():
        for node in route.graph.nodes:
            known = made if node.op == "get_attr" else modules if node.op == "call_module" else None
            if known is not None and node.target not in known:
                raise ValueError(f"routes: a graph takes {node.target!r}, which is not described")
    persistent = {entry["name"] for entry in description["tensors"] if entry["kind"] != "constant"}
    composed = ComposedModel(made, persistent, modules, routes, facts, training=description["training"])
    composed.freeze(description["frozen"])
    return composed
