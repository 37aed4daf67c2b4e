"""Compares standard and modular training: accuracy, time and the terms of the loss."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, median

from moda.report.curves import Line, Scale, lines
from moda.report.page import Block, Panel, Panels, Row, Section, Table, Words
from moda.report.spread import Spread
from moda.report.study.inputs import RunResults, Setting
from moda.report.study.references import Match, find
from moda.report.study.words import DASH, listed, missing, percent_of, statement
from moda.runs.config import TERMS

__all__ = ["accuracy_and_time", "accuracy_gap", "final_accuracy", "terms", "time_ratio"]


def accuracy_and_time(settings: Sequence[Setting]) -> Section:
    """Show the table and curves of test accuracy, and the wall-clock time."""
    columns = (
        "model",
        "standard",
        "modular",
        "difference, points",
        "time, standard",
        "time, modular",
        "epoch time, ratio",
    )
    rows = []
    for setting in settings:
        rows.append(_row(setting))
        rows += [_reference(match) for match in find(setting.config, setting.threshold)]
    caption = (
        "Test accuracy after the last epoch in per cent; wall-clock of the whole training, tests after each epoch "
        "included, as it was when it ran; the ratio is of the median epochs."
    )
    panels = tuple(panel for setting in settings if (panel := _accuracy_panel(setting)))
    blocks: list[Block] = [*statement(settings), Table(caption, columns, tuple(rows), emphasis=2)]
    if panels:
        text = "Test accuracy after each epoch. The axis begins where a quarter of the training is over."
        blocks.append(Panels(panels, "Test accuracy", text + _BANDS))
    blocks += [*_unfinished(settings), *_without_counterpart(settings)]
    return Section("accuracy", "Accuracy and time", tuple(blocks))


_BANDS = " Lines are means over seeds, bands reach from the least to the largest."


def final_accuracy(runs: Sequence[RunResults]) -> Spread | None:
    """Return the accuracy on the test samples after the last epoch."""
    values = [run.metrics[-1]["test_accuracy"] for run in runs if run.metrics]
    return Spread.of(values) if values else None


def accuracy_gap(setting: Setting) -> Spread | None:
    """Return modular minus standard test accuracy, seed by seed where both have the same seeds, else of the means."""
    own, other = (
        {run.config.seed: run.metrics[-1]["test_accuracy"] for run in runs if run.metrics}
        for runs in (setting.modular, setting.standard)
    )
    if not own or not other:
        return None
    if own.keys() == other.keys():
        return Spread.of(own[seed] - other[seed] for seed in own)
    return Spread.of([fmean(own.values()) - fmean(other.values())])


def time_ratio(setting: Setting) -> Spread | None:
    """Return the median epoch of modular over that of standard training, seed by seed where possible, else of the
    means.
    """
    own, other = (
        {run.config.seed: median(row["seconds"] for row in run.metrics) for run in runs if run.metrics}
        for runs in (setting.modular, setting.standard)
    )
    if not own or not other:
        return None
    if own.keys() == other.keys():
        return Spread.of(own[seed] / other[seed] for seed in own)
    return Spread.of([fmean(own.values()) / fmean(other.values())])


def _row(setting: Setting) -> Row:
    accuracies = [final_accuracy(runs) for runs in (setting.standard, setting.modular)]
    gap, ratio = accuracy_gap(setting), time_ratio(setting)
    return Row(
        (
            setting.name,
            *(DASH if value is None else value.percent() for value in accuracies),
            DASH if gap is None else gap.points(),
            *(_duration(runs) for runs in (setting.standard, setting.modular)),
            DASH if ratio is None else ratio.number(2),
        )
    )


def _duration(runs: Sequence[RunResults]) -> str:
    seconds = [sum(row["seconds"] for row in run.metrics) for run in runs if run.metrics]
    if not seconds:
        return DASH
    return duration(fmean(seconds))


def duration(seconds: float) -> str:
    """Format seconds in the unit that fits."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.2f} {unit}"
    return f"{seconds:.1f} s"


def _reference(match: Match) -> Row:
    accuracy, hours = match.numbers["accuracy"], match.numbers["hours"]
    gap = accuracy["modular"]["mean"] - accuracy["standard"]["mean"]
    cells = (
        match.name,
        percent_of(accuracy["standard"]),
        percent_of(accuracy["modular"]),
        Spread.of([gap]).points(),
        duration(3600 * hours["standard"]),
        duration(3600 * hours["modular"]),
        f"{hours['modular'] / hours['standard']:.2f}",
    )
    return Row(cells, reference=True)


def _unfinished(settings: Sequence[Setting]) -> list[Block]:
    """Name the runs that have not reached their last epoch yet, whose numbers are not those of the setting."""
    runs = {id(run): run for setting in settings for run in (*setting.modular, *setting.standard)}.values()
    told = [
        f"{r.label} ({len(r.metrics)} of {r.config.epochs} epochs)" for r in runs if len(r.metrics) < r.config.epochs
    ]
    if not told:
        return []
    return [Words(f"Not finished: {listed(told)}. To go on: `moda train RUN --resume`.", note=True)]


def _without_counterpart(settings: Sequence[Setting]) -> list[Block]:
    return [
        *missing(
            "a standard run",
            [s for s in settings if not s.standard],
            "moda train STANDARD_RUN --standard",
            ", with the same other settings",
        ),
        *missing(
            "a modular run", [s for s in settings if not s.modular], "moda train RUN", ", with the same other settings"
        ),
    ]


# ---- curves ---------------------------------------------------------------------------------------------------------


def _accuracy_panel(setting: Setting) -> Panel | None:
    drawn = _both(setting, "test_accuracy")
    if not drawn:
        return None
    settled = [band.low for line in drawn for band in line.y[len(line.y) // 4 :]]
    low = 100 * min(settled)
    high = 100 * max(band.high for line in drawn for band in line.y)
    room = 0.06 * (high - low) or 1.0
    scale = Scale("test accuracy, %", 100, low=low - room, high=high + room)
    return lines(f"{setting.key}-accuracy", setting.name, drawn, scale, "epoch")


def terms(settings: Sequence[Setting]) -> Section:
    """Show curves of every term of the loss."""
    blocks: list[Block] = []
    for setting in settings:
        panels = tuple(panel for name in ("cross_entropy", *TERMS) if (panel := _term_panel(setting, name)))
        if panels:
            blocks.append(Panels(panels, setting.name))
    intro = (
        "Means over the training samples of each epoch, the modular terms without their weights. Affinity falls as "
        "samples of one class fire the same neurons, dispersion as those of different classes fire different ones, "
        "compactness "
        "as fewer neurons fire. Standard training does not compute the modular terms." + _BANDS
    )
    blocks.insert(0, Words(intro))
    blocks += missing(
        "its epochs", [s for s in settings if not any(r.metrics for r in (*s.modular, *s.standard))], "moda train RUN"
    )
    return Section("training", "Training, term by term", tuple(blocks))


def _term_panel(setting: Setting, name: str) -> Panel | None:
    drawn = _both(setting, name)
    if not drawn:
        return None
    title = name.replace("_", "-")
    logarithmic = name == "cross_entropy" and all(band.low > 0 for line in drawn for band in line.y)
    scale = Scale(
        "logarithmic" if logarithmic else "mean over samples", logarithmic=logarithmic, low=None if logarithmic else 0.0
    )
    return lines(f"{setting.key}-{name}", title, drawn, scale, "epoch")


def _both(setting: Setting, column: str) -> list[Line]:
    drawn = (over_epochs(setting.standard, column, "standard"), over_epochs(setting.modular, column, "modular"))
    return [line for line in drawn if line]


def over_epochs(runs: Sequence[RunResults], column: str, kind: str) -> Line | None:
    """Return a column of the epochs' table over all runs that have it, up to the last epoch that all have reached."""
    rows = [[row for row in run.metrics if column in row] for run in runs]
    rows = [each for each in rows if each]
    if not rows:
        return None
    shared = range(min(map(len, rows)))
    epochs = [rows[0][index]["epoch"] for index in shared]
    return Line(kind, epochs, [Spread.of(each[index][column] for each in rows) for index in shared], kind)
