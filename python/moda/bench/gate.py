"""The gate before the clock: what a contender computes is compared with float64, and a wrong one is not timed.

Errors are relative to the largest element of the expected tensor, element by element: one wrong element is enough.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Room for float32 sums over 1e5 positions in any order; a half-precision gradient is rounded to 8 or 11 bits.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}


def difference(name: str, got: Tensor, expected: Tensor, tolerance: float, noise: float = 0.0) -> str:
    """Return "" if `got` is within `tolerance` of `expected`, else one line about the worst element.

    `noise` is an absolute error that is accepted, for tensors whose true value may be zero.
    """
    if got.shape != expected.shape:
        return f"{name}: shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    got, expected = got.detach(), expected.detach()
    error = (got.double() - expected.double()).abs()
    scale = float(expected.abs().amax()) or 1.0
    worst = float(error.amax())
    if worst <= tolerance * scale + noise:  # `not <=` also catches NaN
        return ""
    index = int(error.nan_to_num(torch.inf).argmax())
    found, wanted = float(got.flatten()[index]), float(expected.flatten()[index])
    return f"{name}: got {found:.6g}, expected {wanted:.6g} (off by {worst / scale:.1e} of the largest)"


def first_difference(
    name: str, got: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float, noise: float = 0.0
) -> str:
    """Return the `difference` of the first pair of tensors that differ."""
    if len(got) != len(expected):
        return f"{name}: {len(got)} tensors, expected {len(expected)}"
    for index, (mine, theirs) in enumerate(zip(got, expected, strict=True)):
        problem = difference(f"{name}[{index}]", mine, theirs, tolerance, noise)
        if problem:
            return problem
    return ""
