"""Not built yet: replaced as the kernels land."""

from __future__ import annotations

from collections.abc import Mapping

import torch

OPS: frozenset[str] = frozenset()
DTYPES: Mapping[str, frozenset[torch.dtype]] = {}
DEVICES: Mapping[str, frozenset[str]] | None = {}


def unavailable(device: torch.device | None = None) -> str | None:
    """Always, for now."""
    return "not built"
