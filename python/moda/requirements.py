"""Asks for optional packages before anything is made that would be left behind where one is missing."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

__all__ = ["check_lightning", "lightning_problem"]

LIGHTNING = (2, 6)
"""The first Lightning whose every strategy reads a checkpoint with `weights_only=True` if asked to.

Earlier ones run what is in the file where weights are shared out.
"""


def check_lightning() -> None:
    """Check that training can begin.

    Raises:
        ImportError: Lightning is missing, or too old to be safe; the message says how to install it.
    """
    if (problem := lightning_problem()) is not None:
        raise ImportError(problem)


def lightning_problem() -> str | None:
    """Say why Lightning cannot be used and what to do about it; None where it can."""
    found = _installed("lightning")
    if found is None:
        return "training needs Lightning, which is not installed: pip install 'moda-kernels[train]'"
    numbers = re.match(r"(\d+)\.(\d+)", found)
    if numbers is None or tuple(map(int, numbers.groups())) < LIGHTNING:
        wanted = ".".join(map(str, LIGHTNING))
        return (
            f"training needs Lightning {wanted} or later, as earlier ones run code from checkpoints; {found} is "
            f"installed: pip install 'lightning>={wanted}'"
        )
    return None


def _installed(package: str) -> str | None:
    """The version of a package that can be imported; None where there is none."""
    if find_spec(package) is None:
        return None
    try:
        return version(package)
    except PackageNotFoundError:
        return None
