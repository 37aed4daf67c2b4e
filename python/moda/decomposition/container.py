"""All modules of a model: which neurons each class keeps at every tap."""

from __future__ import annotations

import json
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moda.decomposition.files import METADATA_FILE, read_decomposition, write_decomposition
from moda.files import format_errors


@dataclass(frozen=True, eq=False)
class Decomposition:
    """All modules of a model: per tap and class, the neurons that the class keeps.

    Attributes:
        masks: per tap, in execution order, (K, C) bool.
        threshold: rate from which neurons were kept.
        min_fraction: the least share of a layer's neurons that a class keeps.
        metadata: what else is worth knowing (class sizes, empty classes), anything that JSON can hold.

    Raises:
        TypeError, ValueError: the masks are not as above.
    """

    masks: dict[str, Tensor]
    threshold: float = 0.9
    min_fraction: float = 0.005
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_fraction("threshold", self.threshold)
        check_fraction("min_fraction", self.min_fraction)
        _check_masks(self.masks)
        _check_metadata(self.metadata)
        object.__setattr__(self, "masks", dict(self.masks))
        object.__setattr__(self, "metadata", dict(self.metadata))

    @property
    def num_classes(self) -> int:
        """K."""
        return next(iter(self.masks.values())).shape[0]

    @property
    def taps(self) -> tuple[str, ...]:
        """Tap names in execution order."""
        return tuple(self.masks)

    def __repr__(self) -> str:
        neurons = sum(mask.shape[1] for mask in self.masks.values())
        return (
            f"Decomposition(num_classes={self.num_classes}, taps={len(self.masks)}, neurons={neurons}, "
            f"threshold={self.threshold:g}, min_fraction={self.min_fraction:g})"
        )

    def select(self, classes: Iterable[int]) -> dict[str, Tensor]:
        """Per tap (C,) bool: the neurons that at least one of the classes keeps.

        Raises:
            TypeError, ValueError: see `check_classes`.
        """
        chosen = check_classes(classes, self.num_classes)
        return {tap: mask[chosen].any(0) for tap, mask in self.masks.items()}

    def save(self, folder: str | Path) -> None:
        """Write the decomposition to a folder, made if need be: `masks.safetensors` and `decomposition.json`.

        Each file is replaced as a whole, the masks first; the JSON holds the masks' SHA-256, so a crash between the
        two is seen by `load`.
        """
        fields = {"threshold": self.threshold, "min_fraction": self.min_fraction, "metadata": self.metadata}
        write_decomposition(folder, self.masks, fields)

    @classmethod
    def load(cls, folder: str | Path) -> Decomposition:
        """Read what `save` wrote.

        Raises:
            FormatError (a ValueError): a file is missing, malformed, of another version, or does not match the other;
                the message names the file and says what is wrong.
        """
        masks, fields = read_decomposition(folder)
        with format_errors(Path(folder) / METADATA_FILE):
            return cls(masks, fields["threshold"], fields["min_fraction"], fields["metadata"])


def check_fraction(name: str, value: float) -> None:
    """Raise TypeError or ValueError unless `value`, the argument `name`, is a number in [0, 1]."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name}: expected a number in [0, 1], got {type(value).__name__}")
    if not 0 <= value <= 1:
        raise ValueError(f"{name}: expected a number in [0, 1], got {value}")


def check_classes(classes: Iterable[int], num_classes: int) -> list[int]:
    """The classes as a list, in the order given.

    Raises:
        TypeError: not a sequence of integers.
        ValueError: none, one twice, or one outside [0, num_classes).
    """
    if isinstance(classes, (int, str)):
        raise TypeError(f"classes: expected a sequence of class indices, got {classes!r}")
    try:
        chosen = [operator.index(c) for c in classes]
    except TypeError:
        raise TypeError(f"classes: expected a sequence of class indices, got {classes!r}") from None
    if not chosen:
        raise ValueError("classes: expected at least one class, got none")
    unknown = sorted({c for c in chosen if not 0 <= c < num_classes})
    if unknown:
        raise ValueError(f"classes: expected classes in [0, {num_classes}), got {unknown}")
    twice = sorted({c for c in chosen if chosen.count(c) > 1})
    if twice:
        raise ValueError(f"classes: expected every class once, got {twice} more than once")
    return chosen


def _check_masks(masks: Mapping[str, Tensor]) -> None:
    if not isinstance(masks, Mapping):
        raise TypeError(f"masks: expected a mapping of tap names to masks, got {type(masks).__name__}")
    if not masks:
        raise ValueError("masks: expected at least one tap, got none")
    num_classes = None
    for tap, mask in masks.items():
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise TypeError(
                f"masks[{tap!r}]: expected a bool tensor, got {getattr(mask, 'dtype', type(mask).__name__)}"
            )
        if mask.dim() != 2 or 0 in mask.shape:
            raise ValueError(f"masks[{tap!r}]: expected shape (classes, neurons), got {tuple(mask.shape)}")
        num_classes = num_classes or mask.shape[0]
        if mask.shape[0] != num_classes:
            raise ValueError(f"masks[{tap!r}]: expected {num_classes} classes as in the first tap, got {mask.shape[0]}")


def _check_metadata(metadata: Any) -> None:
    if not isinstance(metadata, Mapping):
        raise TypeError(f"metadata: expected an object, got {type(metadata).__name__}")
    try:
        json.dumps(dict(metadata), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise TypeError(f"metadata: expected only what JSON can hold: {error}") from None
