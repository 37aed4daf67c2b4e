"""The dtype in which every backend takes sums."""

from __future__ import annotations

import torch


def accumulation(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32
