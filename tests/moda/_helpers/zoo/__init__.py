"""The zoo: models of torchvision, timm and transformers, and forwards by hand, each small enough for a test."""

from __future__ import annotations

from tests.moda._helpers.zoo import timm_models, torchvision_models, transformers_models, written
from tests.moda._helpers.zoo.entry import CLASSES, Entry, tensors_of

__all__ = ["CLASSES", "FAMILIES", "ZOO", "Entry", "tensors_of"]

FAMILIES = {
    "torchvision": torchvision_models.entries(),
    "timm": timm_models.entries(),
    "transformers": transformers_models.entries(),
    "written": written.entries(),
}
"""Entries by the package they come from."""

ZOO: dict[str, Entry] = {f"{family}/{entry.name}": entry for family, entries in FAMILIES.items() for entry in entries}
"""Entries by name: `torchvision/resnet18`, `written/no_grad_block`."""
