"""Shows how the results move with the threshold and with the weights of the terms."""

from __future__ import annotations

from collections.abc import Sequence

from moda.decomposition.settings import BudgetRule
from moda.report.curves import Line, Scale, lines
from moda.report.page import Block, Panel, Panels, Row, Section, Table, Words
from moda.report.spread import Spread
from moda.report.study.inputs import Setting
from moda.report.study.references import Match, find_sweep
from moda.report.study.words import DASH, missing
from moda.runs.config import TERMS
from moda.study.sweep import SWEPT, SweepPoint

__all__ = ["sweeps"]

Points = dict[float, list[SweepPoint]]


def sweeps(settings: Sequence[Setting]) -> Section:
    """Show curves and a table for every setting that was varied."""
    intro = (
        "Reuse accuracy is the mean over sub-task sizes of composed models\u2019 accuracy, on a random choice of "
        "sub-tasks. The threshold is the firing rate from which a neuron is kept, epsilon the share of a class\u2019s "
        "attributions or activations that is dropped; a sweep of either trains nothing. A "
        "sweep of a weight trains the model anew for each value and decomposes it at the same threshold."
    )
    blocks: list[Block] = [Words(intro)]
    for setting in settings:
        blocks += _rules(setting)
    for parameter in SWEPT:
        for setting in settings:
            points = _points(setting, parameter)
            if points:
                blocks += _sweep(setting, parameter, points)
    modular = [setting for setting in settings if setting.modular]
    lacking = [s for s in modular if not _points(s, "threshold")]
    blocks += missing("the sweep of the threshold", lacking, "moda sweep RUN")
    if not any(_points(setting, name) for setting in modular for name in TERMS):
        command = "moda sweep RUN --affinity paper --dispersion paper --compactness paper"
        blocks += missing("sweeps of the weights", modular, command)
    return Section("sweeps", "Threshold and weights", tuple(blocks))


_RULES = {"threshold": "firing rates", "attribution": "attributions", "share": "shares of activation"}
_OF_RULES = ("threshold", *BudgetRule.NAMES)
"""Parameters that choose neurons of one trained model: its weights and terms are the same at every value."""


def _rules(setting: Setting) -> list[Block]:
    """Show what composed models keep in accuracy at each size, all rules in one figure."""
    drawn = []
    colours = dict(zip(_RULES, ("standard", "composed", "modular"), strict=True))
    for parameter, name in _RULES.items():
        points = sorted(_points(setting, parameter).values(), key=_mean_size)
        if points:
            accuracies = [Spread.of(p.reuse_accuracy for p in each) for each in points]
            sizes = [100 * _mean_size(each) for each in points]
            drawn.append(Line(name, sizes, accuracies, colours[parameter], points=True))
    if len(drawn) < 2:  # one rule has its own figure
        return []
    key, along = f"{setting.key}-rules", "module size, % of the parameters"
    panel = lines(key, "Reuse accuracy by size of a module", drawn, Scale("accuracy, %", 100), along)
    return [Panels((panel,), f"{setting.name}: what modules are chosen by")]


def _mean_size(points: Sequence[SweepPoint]) -> float:
    return sum(point.module_size for point in points) / len(points)


def _points(setting: Setting, parameter: str) -> Points:
    """Return the points of all runs by value, for the values that every run with this sweep has."""
    tables = [{p.value: p for p in run.sweeps[parameter]} for run in setting.modular if run.sweeps.get(parameter)]
    if not tables:
        return {}
    return {value: [table[value] for table in tables] for value in sorted(set.intersection(*map(set, tables)))}


def _sweep(setting: Setting, parameter: str, points: Points) -> list[Block]:
    matches = find_sweep(setting.config, parameter)
    along = _along(parameter)
    prefix = f"{setting.key}-sweep-{parameter}"
    title = f"{setting.name}: {along}"
    accuracy = [
        _line(points, "test_accuracy", "all classes", "standard"),
        _line(points, "modular_accuracy", "whole", "modular"),
        _line(points, "reuse_accuracy", "composed", "composed"),
    ]
    if parameter in _OF_RULES:
        accuracy = accuracy[1:]  # the whole model is the same at every value
    cost = [_line(points, "module_size", "module size", "modular"), _line(points, "overlap", "overlap", "composed")]
    for match in matches:
        accuracy += _reference(match, "reuse_accuracy", "composed") + _reference(match, "test_accuracy", "standard")
        cost += _reference(match, "module_size", "modular")
    panels = [
        lines(f"{prefix}-accuracy", "Accuracy", accuracy, Scale("accuracy, %", 100), along),
        lines(f"{prefix}-size", "Size and overlap of modules", cost, Scale("% of the parameters", 100, low=0), along),
    ]
    terms = _terms(points)
    if parameter not in _OF_RULES and terms:
        panels.append(_terms_panel(prefix, terms, along))
    return [Panels(tuple(panels), title), _table(title, parameter, points, matches)]


def _along(parameter: str) -> str:
    if parameter in BudgetRule.NAMES:
        return f"epsilon of {_RULES[parameter]}"
    return "threshold" if parameter == "threshold" else f"weight of {parameter}"


def _line(points: Points, figure: str, name: str, colour: str) -> Line:
    return Line(
        name,
        list(points),
        [Spread.of(getattr(p, figure) for p in each) for each in points.values()],
        colour,
        points=True,
    )


def _terms(points: Points) -> list[Line]:
    colours = dict(zip(TERMS, ("modular", "composed", "muted"), strict=True))
    drawn = []
    for name in TERMS:
        known = {value: each for value, each in points.items() if all(getattr(p, name) is not None for p in each)}
        if known:
            drawn.append(_line(known, name, name, colours[name]))
    return drawn


def _terms_panel(prefix: str, terms: Sequence[Line], along: str) -> Panel:
    return lines(f"{prefix}-terms", "Terms after training", terms, Scale("mean over samples", low=0), along)


def _reference(match: Match, figure: str, colour: str) -> list[Line]:
    values = match.numbers.get(figure)
    if values is None:
        return []
    return [Line(match.short, match.numbers["value"], [Spread.of([v]) for v in values], colour, dashed=True)]


_SHARES = {
    "reuse accuracy": "reuse_accuracy",
    "whole model, same sub-tasks": "modular_accuracy",
    "test accuracy": "test_accuracy",
    "module size": "module_size",
    "overlap": "overlap",
}


def _table(title: str, parameter: str, points: Points, matches: Sequence[Match]) -> Table:
    rows = []
    for name, figure in _SHARES.items():
        if parameter in _OF_RULES and figure == "test_accuracy":
            continue
        digits = 1 if figure in ("module_size", "overlap") else 2
        rows.append(
            Row((name, *(Spread.of(getattr(p, figure) for p in each).percent(digits) for each in points.values())))
        )
        rows += [
            _reference_row(match, name, figure, list(points), 100, digits)
            for match in matches
            if figure in match.numbers
        ]
    for line in _terms(points) if parameter not in _OF_RULES else []:
        known = dict(zip(line.x, line.y, strict=True))
        rows.append(Row((line.name, *(known[value].number(3) if value in known else DASH for value in points))))
        rows += [
            _reference_row(match, line.name, line.name, list(points), 1, 3)
            for match in matches
            if line.name in match.numbers
        ]
    said = "".join(f" {match.statement[0].upper()}{match.statement[1:]}" for match in matches)
    terms = "" if parameter in _OF_RULES else ", terms as they are"
    caption = f"{title}. Accuracies, size and overlap in per cent{terms}.{said}"
    return Table(
        caption,
        ("epsilon" if parameter in BudgetRule.NAMES else parameter, *(f"{value:g}" for value in points)),
        tuple(rows),
        emphasis="reuse accuracy",
    )


def _reference_row(match: Match, name: str, figure: str, values: Sequence[float], factor: float, digits: int) -> Row:
    known = dict(zip(match.numbers["value"], match.numbers[figure], strict=True))
    cells = (f"{factor * known[value]:.{digits}f}" if value in known else DASH for value in values)
    return Row((f"{name}, {match.name}", *cells), reference=True)
