"""Loads data sets by name: the offline digits, and the published ones through torchvision."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from moda.checks import one_of
from moda.data import cifar, digits, imagefolder, svhn
from moda.data.replacement import replacement_part
from moda.data.splits import DataSplits
from moda.files import as_path
from moda.lazy import submodules

__all__ = ["NAMES", "DataSplits", "load"]

_LOADERS: dict[str, Callable[..., DataSplits]] = {
    "digits": digits.load,
    "cifar10": cifar.load_cifar10,
    "cifar100": cifar.load_cifar100,
    "svhn": svhn.load,
    "imagefolder": imagefolder.load,
}

NAMES: tuple[str, ...] = tuple(_LOADERS)
"""What `load` knows."""


def load(name: str, root: str | Path = "data", **options: Any) -> DataSplits:
    """Load a data set by name.

    Args:
        name: one of `NAMES`.
        root: the folder that holds it; `digits` needs none.
        options: the data set's own options: `seed`, `channels`, `image_size` for digits; `augment`, `download` for
            cifar10, cifar100 and svhn; `class_list`, `image_size`, `augment` for imagefolder. Every data set takes
            `replacement`, a mapping of the arguments of `moda.data.replacement.replacement_part`, for one side of that
            study.

    Raises:
        ValueError: the name is unknown, an option is out of range, or what lies in `root` is not the data set.
        TypeError: the data set has no such option, or it is of the wrong type.
        FileNotFoundError: the data set is not in `root`; the message says what to put where.
        ImportError: a package that it needs is missing; the message says which.
    """
    one_of(NAMES)("name", name)
    replacement = options.pop("replacement", None)
    loader = _LOADERS[name]
    known = [option for option in inspect.signature(loader).parameters if option != "root"]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise TypeError(f"options: {name} takes {', '.join(known)}, got {', '.join(unknown)}")
    splits = loader(as_path("root", root).expanduser(), **options)
    return splits if replacement is None else _replacement(splits, replacement)


def _replacement(splits: DataSplits, arguments: Any) -> DataSplits:
    known = set(inspect.signature(replacement_part).parameters) - {"splits"}
    if not isinstance(arguments, Mapping) or not {"part", "mixed_class"} <= set(arguments) <= known:
        raise TypeError(
            f"replacement: expected a mapping with part and mixed_class of {sorted(known)}, got {arguments!r:.200}"
        )
    return replacement_part(splits, **arguments)


__getattr__ = submodules(__name__)
