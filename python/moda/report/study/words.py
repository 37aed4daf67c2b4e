"""Writes the sentences that several sections of the study's page share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moda.report.page import Block, Words
from moda.report.study.inputs import DATA_NAMES, Setting
from moda.report.study.references import find

__all__ = ["DASH", "listed", "missing", "percent_of", "statement"]

DASH = "\u2013"


def listed(names: Sequence[str]) -> str:
    """Join names into a part of a sentence."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def missing(what: str, settings: Sequence[Setting], command: str, how: str = "") -> list[Block]:
    """Return a line that says what is not shown for which settings, and which command makes it; none if nothing is
    missing.
    """
    if not settings:
        return []
    return [
        Words(f"Not shown: {what} of {listed([s.name for s in settings])}. To make it: `{command}`{how}.", note=True)
    ]


def statement(settings: Sequence[Setting]) -> list[Block]:
    """Say which reference numbers stand beside ours and what differs, and for which data there are none."""
    told = []
    for setting in settings:
        told += [f"{setting.name} stands beside {match.statement}" for match in find(setting.config, setting.threshold)]
    without = [s.config.data for s in settings if "the paper" not in [match.name for match in find(s.config)]]
    if without:
        data = listed([DATA_NAMES.get(name, name) for name in dict.fromkeys(without)])
        told.append(
            f"The paper has no numbers for these models on {data}: "
            "[what differs, and what it reports on its own data](#paper)."
        )
    return [Words(" ".join(told), note=True)] if told else []


def percent_of(value: dict[str, Any]) -> str:
    """Format a mean and a spread of references.json in per cent."""
    text = f"{100 * value['mean']:.2f}"
    return text if value["spread"] is None else f"{text}\u00a0\u00b1\u00a0{100 * value['spread']:.2f}"
