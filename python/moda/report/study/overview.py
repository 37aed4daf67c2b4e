"""Sums the study up in a few numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from moda.report.page import Row, Section, Table
from moda.report.spread import Spread
from moda.report.study.inputs import RunResults, Setting
from moda.report.study.references import Match, find
from moda.report.study.training import accuracy_gap, final_accuracy, time_ratio
from moda.report.study.words import DASH, percent_of
from moda.study.reuse import reuse_accuracy

__all__ = ["headlines", "overview", "reuse_gap"]


@dataclass(frozen=True)
class _Headline:
    """A number that every setting has, and what it means."""

    value: Callable[[Setting], Spread | None]
    form: str
    what: str
    more: str
    factor: float = 100
    digits: int = 1
    signed: bool = False


def headlines(settings: Sequence[Setting]) -> list[tuple[str, str, str]]:
    """Return (number, meaning, remark) of the numbers that matter most, from the least to the largest over the
    settings.
    """
    wanted = [
        _Headline(
            reuse_gap,
            "{}",
            "points of accuracy, composed models against standard ones",
            "on the same sub-tasks",
            digits=2,
            signed=True,
        ),
        _Headline(module_size, "{} %", "of the parameters are in a module", "mean over classes"),
        _Headline(overlap, "{} %", "of the parameters are in two modules at once", "mean over pairs of classes"),
        _Headline(time_ratio, "{}\u00d7", "the time of standard training", "wall-clock of an epoch", 1, 2),
    ]
    told = []
    for headline in wanted:
        values = [headline.factor * value.mean for setting in settings if (value := headline.value(setting))]
        if values:
            sign = "+" if headline.signed else ""
            ends = dict.fromkeys(f"{value:{sign}.{headline.digits}f}" for value in (min(values), max(values)))
            number = headline.form.format(" to ".join(ends).replace("-", "\u2212"))
            told.append((number, headline.what, headline.more))
    return told


def reuse_gap(setting: Setting) -> Spread | None:
    """Return the composed models' reuse accuracy minus the standard model's on the same sub-tasks."""
    runs = [run for run in setting.reused if all(result.standard is not None for result in run.reuse)]
    gaps = [reuse_accuracy(run.reuse) - reuse_accuracy(run.reuse, "standard") for run in runs]
    return Spread.of(gaps) if gaps else None


def mean_reuse(setting: Setting) -> Spread | None:
    """Return the mean reuse accuracy, as the paper defines it."""
    return Spread.of(reuse_accuracy(run.reuse) for run in setting.reused) if setting.reused else None


def module_size(setting: Setting) -> Spread | None:
    """Return the mean module size over classes."""
    return from_analysis(setting.analysed, "mean_size")


def overlap(setting: Setting) -> Spread | None:
    """Return the mean overlap over pairs of classes, counted as published."""
    return from_analysis(setting.analysed, "mean_overlap")


def from_analysis(runs: Sequence[RunResults], name: str) -> Spread | None:
    """Summarise a number of the runs' analyses."""
    values = [run.analysis[name] for run in runs if run.analysis]
    return Spread.of(values) if values else None


_COLUMNS = (
    "model",
    "test accuracy",
    "against standard, points",
    "reuse accuracy",
    "against standard, points",
    "module size",
    "overlap",
    "epoch time, ratio",
)
_CAPTION = (
    "Modular training, in per cent; \u00b1 is the standard deviation over seeds. Reuse accuracy: of composed models, "
    "mean over sub-task sizes, and its difference to the standard model on the same sub-tasks. Module size and "
    "overlap: shares of the whole model\u2019s parameters. Epoch time: modular over standard training."
)


def overview(settings: Sequence[Setting]) -> Section:
    """Return the table of the most important numbers."""
    rows = []
    for setting in (each for each in settings if each.modular):
        ratio = time_ratio(setting)
        cells = (
            _percent(final_accuracy(setting.modular)),
            _points(accuracy_gap(setting)),
            _percent(mean_reuse(setting)),
            _points(reuse_gap(setting)),
            _percent(module_size(setting), 1),
            _percent(overlap(setting), 1),
            DASH if ratio is None else ratio.number(2),
        )
        rows.append(Row((setting.name, *cells)))
        rows += [_reference(match) for match in find(setting.config, setting.threshold)]
    return Section("overview", "At a glance", (Table(_CAPTION, _COLUMNS, tuple(rows), emphasis=3),))


def _reference(match: Match) -> Row:
    numbers = match.numbers
    accuracy, hours, reuse = numbers["accuracy"], numbers["hours"], numbers.get("reuse_accuracy")
    gap = Spread.of([accuracy["modular"]["mean"] - accuracy["standard"]["mean"]])
    cells = (
        match.name,
        percent_of(accuracy["modular"]),
        gap.points(),
        DASH if reuse is None else f"{100 * reuse:.2f}",
        DASH,
        f"{100 * numbers['module_size']:.1f}",
        f"{100 * numbers['overlap']:.1f}",
        f"{hours['modular'] / hours['standard']:.2f}",
    )
    return Row(cells, reference=True)


def _percent(spread: Spread | None, digits: int = 2) -> str:
    return DASH if spread is None else spread.percent(digits)


def _points(spread: Spread | None) -> str:
    return DASH if spread is None else spread.points()
