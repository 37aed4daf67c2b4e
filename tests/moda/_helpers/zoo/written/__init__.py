"""Forwards written by hand, one an idiom: what people write that tools which trace models get wrong."""

from __future__ import annotations

from tests.moda._helpers.zoo.entry import Entry
from tests.moda._helpers.zoo.written import axes, control, functions, outputs, state
from tests.moda._helpers.zoo.written.idiom import IDIOMS

__all__ = ["axes", "control", "entries", "functions", "outputs", "state"]


def entries() -> list[Entry]:
    """Every idiom in the zoo."""
    return list(IDIOMS)
