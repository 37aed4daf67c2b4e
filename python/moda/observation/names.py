"""Names of taps: stable, unique, usable as keys of a file and as file names."""

from __future__ import annotations

import re
from collections.abc import Mapping

NO_ACTIVATION = (
    "model: found no call of an activation function to tap (ReLU, GELU, SiLU, Hardswish, ... as module, function "
    "or method; gates such as Sigmoid are not tapped)"
)


def nothing_tapped(skipped: Mapping[str, str]) -> str:
    """What to say of a model without taps."""
    if not skipped:
        return NO_ACTIVATION
    reasons = "; ".join(f"{name!r}: {reason}" for name, reason in list(skipped.items())[:3])
    more = f", and {len(skipped) - 3} more" if len(skipped) > 3 else ""
    return f"model: none of its activations could be tapped ({reasons}{more})"


def unique_name(path: str, taken: set[str]) -> str:
    """`path` made safe, with `_1`, `_2`, ... where it is taken; the name is added to `taken`."""
    base = name = re.sub(r"[^A-Za-z0-9_.-]", "_", path) or "activation"
    count = 0
    while name in taken:
        count += 1
        name = f"{base}_{count}"
    taken.add(name)
    return name
