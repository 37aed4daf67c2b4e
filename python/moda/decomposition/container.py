"""All modules of a model: which neurons each class keeps at every site."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moda.checks import json_value
from moda.decomposition.files import METADATA_FILE, read_decomposition, write_decomposition
from moda.decomposition.heads import check_heads
from moda.decomposition.settings import Combine, check_combine, check_settings
from moda.files import format_errors
from moda_kernels.validation import shown


@dataclass(frozen=True, eq=False)
class Decomposition:
    """All modules of a model: per site and class, the neurons that the class keeps.

    >>> modules = Decomposition({"relu": torch.tensor([[True, False, True], [False, True, True]])})
    >>> modules.num_classes, modules.sites
    (2, ('relu',))
    >>> modules.select([0, 1])["relu"].tolist()
    [True, True, True]

    Attributes:
        masks: per site, in execution order, (K, C) bool. Every tap is a site.
        method: how the modules were made; "moda" by default.
        settings: of the method, anything that JSON can hold, e.g. `FiringRule(0.9).settings()`; empty where they are
            not known.
        combine: how the outputs of modules become those of a composition, see `moda.decomposition.settings.Combine`.
        metadata: what else is worth knowing (class sizes, empty classes), anything that JSON can hold.
        heads: where modules answer with a probability, the tensors of the classes' heads, see
            `moda.decomposition.heads`; else none.

    Raises:
        TypeError, ValueError: an attribute is not as above.
    """

    masks: Mapping[str, Tensor]
    method: str = "moda"
    settings: Mapping[str, Any] = field(default_factory=dict)
    combine: Combine = "rows"
    metadata: Mapping[str, Any] = field(default_factory=dict)
    heads: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_masks(self.masks)
        check_combine(self.combine)
        if not isinstance(self.heads, Mapping):
            raise TypeError(f"heads: expected a mapping of names to tensors, got {type(self.heads).__name__}")
        if (self.combine == "probability") != bool(self.heads):
            wanted = "heads" if self.combine == "probability" else "no heads"
            raise ValueError(f"heads: expected {wanted} where outputs combine by {self.combine!r}")
        object.__setattr__(self, "heads", check_heads(self.heads, self.num_classes) if self.heads else {})
        object.__setattr__(self, "masks", dict(self.masks))
        object.__setattr__(self, "settings", check_settings(self.method, self.settings))
        object.__setattr__(self, "metadata", _checked_metadata(self.metadata))

    @property
    def num_classes(self) -> int:
        """K."""
        return next(iter(self.masks.values())).shape[0]

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the sites in execution order."""
        return tuple(self.masks)

    def __repr__(self) -> str:
        neurons = sum(mask.shape[1] for mask in self.masks.values())
        settings = "".join(f", {name}={value!r}" for name, value in self.settings.items())
        return (
            f"Decomposition(num_classes={self.num_classes}, sites={len(self.masks)}, neurons={neurons}, "
            f"method={self.method!r}{settings})"
        )

    def select(self, classes: Iterable[int]) -> dict[str, Tensor]:
        """Per site (C,) bool: the neurons that at least one of the classes keeps.

        Raises:
            TypeError, ValueError: see `check_classes`.
        """
        chosen = check_classes(classes, self.num_classes)
        return {site: mask[chosen].any(0) for site, mask in self.masks.items()}

    def save(self, folder: str | Path) -> None:
        """Write the decomposition to a folder, made if need be: `masks.safetensors` and `decomposition.json`.

        Heads, where there are any, go to `heads.safetensors`. The JSON holds the SHA-256 of the others. A decomposition
        that was there is replaced whole or not at all, whenever a crash comes.
        """
        description = {
            "method": self.method,
            "settings": self.settings,
            "combine": self.combine,
            "metadata": self.metadata,
        }
        write_decomposition(folder, self.masks, description, self.heads)

    @classmethod
    def load(cls, folder: str | Path) -> Decomposition:
        """Read what `save` wrote, or an earlier version of it.

        Raises:
            FormatError (a ValueError): a file is missing, malformed, of an unknown version, or does not match the
                other; the message names the file and says what is wrong.
        """
        masks, heads, described = read_decomposition(folder)
        with format_errors(Path(folder) / METADATA_FILE):
            names = ("method", "settings", "combine", "metadata")
            return cls(masks, **{name: described[name] for name in names}, heads=heads)


def check_decomposition(decomposition: object) -> None:
    """Refuse what is no decomposition.

    Raises:
        TypeError: it is something else.
    """
    if not isinstance(decomposition, Decomposition):
        raise TypeError(f"decomposition: expected a moda.Decomposition, got {type(decomposition).__name__}")


def chosen_classes(decomposition: Decomposition, classes: Iterable[int]) -> list[int]:
    """Classes of a decomposition as a list, in the order given.

    Raises:
        TypeError, ValueError: see `check_decomposition` and `check_classes`.
    """
    check_decomposition(decomposition)
    return check_classes(classes, decomposition.num_classes)


def check_classes(classes: Iterable[int], num_classes: int) -> list[int]:
    """The classes as a list, in the order given.

    Raises:
        TypeError: not a sequence of integers.
        ValueError: none, one twice, or one outside [0, num_classes).

    Examples:
        >>> check_classes((2, 0), num_classes=3)
        [2, 0]
    """
    chosen = _indices(classes)
    if chosen is None:
        raise TypeError(f"classes: expected a sequence of class indices, got {shown(classes)}")
    if not chosen:
        raise ValueError("classes: expected at least one class, got none")
    unknown = sorted({c for c in chosen if not 0 <= c < num_classes})
    if unknown:
        raise ValueError(f"classes: expected classes in [0, {num_classes}), got {_listed(unknown)}")
    twice = sorted({c for c in chosen if chosen.count(c) > 1})
    if twice:
        raise ValueError(f"classes: expected every class once, got {_listed(twice)} more than once")
    return chosen


def _listed(classes: list[int]) -> str:
    """Classes as an error shows them: a few of them, none of any length."""
    return f"[{', '.join(map(shown, classes[:10]))}{', ...' if len(classes) > 10 else ''}]"


def _indices(classes: Any) -> list[int] | None:
    """The classes as integers, None if they are none; a bool is no class, nor is a string a sequence of them."""
    try:
        given = None if isinstance(classes, str | bytes | Mapping) else list(classes)
        if given is None or any(isinstance(each, bool) for each in given):
            return None
        return [operator.index(each) for each in given]
    except TypeError:
        return None


def _check_masks(masks: Mapping[str, Tensor]) -> None:
    if not isinstance(masks, Mapping):
        raise TypeError(f"masks: expected a mapping of site names to masks, got {type(masks).__name__}")
    if not masks:
        raise ValueError("masks: expected at least one site, got none")
    num_classes = None
    for site, mask in masks.items():
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise TypeError(
                f"masks[{site!r}]: expected a bool tensor, got {getattr(mask, 'dtype', type(mask).__name__)}"
            )
        if mask.dim() != 2 or 0 in mask.shape:
            raise ValueError(f"masks[{site!r}]: expected shape (classes, neurons), got {tuple(mask.shape)}")
        num_classes = num_classes or mask.shape[0]
        if mask.shape[0] != num_classes:
            raise ValueError(
                f"masks[{site!r}]: expected {num_classes} classes as in the first site, got {mask.shape[0]}"
            )


def _checked_metadata(metadata: Any) -> dict[str, Any]:
    if not isinstance(metadata, Mapping):
        raise TypeError(f"metadata: expected an object, got {type(metadata).__name__}")
    values: dict[str, Any] = json_value("metadata", metadata)
    return values
