"""Shows sub-task reuse: composed models against the whole ones, by number of classes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from moda.report.curves import Line, Scale, lines
from moda.report.page import Block, Panel, Panels, Row, Section, Table, Words
from moda.report.spread import Spread
from moda.report.study.inputs import RunResults, Setting
from moda.report.study.references import Match, find
from moda.report.study.words import DASH, missing, statement
from moda.study.reuse import ReuseResult, by_size

__all__ = ["reuse"]

MOST_COLUMNS = 12
_LABELS = {"standard": "standard", "modular": "modular", "composed": "composed"}
_INTRO = (
    "A sub-task is a set of classes. Three models are tested on the test samples of its classes, with only its "
    "classes competing: the standard model, the whole modular model, and the model composed of the classes\u2019 "
    "modules, which was not fine-tuned. Size and FLOPs are those of the composed model, relative to the whole one."
)


def reuse(settings: Sequence[Setting]) -> Section:
    """Show curves and the paper's tables."""
    shown = [setting for setting in settings if setting.reused]
    blocks: list[Block] = [Words(_INTRO), *statement([s for s in settings if s.modular])]
    if shown:
        blocks.append(Panels(tuple(_accuracy(s) for s in shown), "Accuracy by number of classes", _over_seeds(shown)))
        text = "Parameters and FLOPs of composed models in per cent of the whole model\u2019s."
        blocks.append(Panels(tuple(_cost(s) for s in shown), "Size and FLOPs by number of classes", text))
        blocks += [_table(setting) for setting in shown]
        blocks += [_extremes(shown)]
    lacking = [setting for setting in settings if setting.modular and not setting.reused]
    blocks += missing("sub-tasks", lacking, "moda reuse RUN --standard STANDARD_RUN")
    alone = [s for s in shown if any(result.standard is None for run in s.reused for result in run.reuse)]
    blocks += missing("the standard model on sub-tasks", alone, "moda reuse RUN --standard STANDARD_RUN")
    return Section("reuse", "Reuse: models composed of modules", tuple(blocks))


def _over_seeds(shown: Sequence[Setting]) -> str:
    several = any(len(setting.reused) > 1 for setting in shown)
    bands = " Bands reach from the least to the largest of the seeds\u2019 means." if several else ""
    return f"Mean over the sub-tasks of each size, in per cent.{bands}"


def _line(setting: Setting, figure: str, name: str, colour: str, *, dashed: bool = False) -> Line | None:
    """Return a line of the composed models' figure by number of classes, over the runs that have it."""
    tables = [by_size(run.reuse) for run in setting.reused]
    tables = [table for table in tables if all(getattr(mean, figure) is not None for mean in table.values())]
    if not tables:
        return None
    sizes = sorted(set.intersection(*(set(table) for table in tables)))
    values = [Spread.of(getattr(table[size], figure) for table in tables) for size in sizes]
    return Line(name, sizes, values, colour, dashed=dashed, points=len(sizes) <= MOST_COLUMNS)


def _reference_line(match: Match, figure: str, name: str, colour: str) -> Line | None:
    numbers = match.numbers.get("reuse", {})
    if figure not in numbers:
        return None
    return Line(name, numbers["classes"], [Spread.of([value]) for value in numbers[figure]], colour, dashed=True)


def _accuracy(setting: Setting) -> Panel:
    drawn = [_line(setting, name, name, name) for name in ("standard", "modular", "composed")]
    for match in find(setting.config, setting.threshold):
        drawn.append(_reference_line(match, "composed", match.short, "composed"))
    scale = Scale("accuracy, %", 100)
    return lines(f"{setting.key}-reuse", setting.name, [line for line in drawn if line], scale, "classes")


def _cost(setting: Setting) -> Panel:
    drawn = [_line(setting, "size", "size", "modular"), _line(setting, "flops", "FLOPs", "composed")]
    for match in find(setting.config, setting.threshold):
        drawn.append(_reference_line(match, "size", match.short, "modular"))
        drawn.append(_reference_line(match, "flops", match.short, "composed"))
    known = [line for line in drawn if line]
    least = 85 * min(band.low for line in known for band in line.y)
    scale = Scale("% of the whole model, logarithmic", 100, logarithmic=True, low=least, high=115)
    return lines(f"{setting.key}-cost", setting.name, known, scale, "classes")


# ---- tables ---------------------------------------------------------------------------------------------------------

_Value = Callable[[ReuseResult], "float | None"]
_ROWS: tuple[tuple[str, _Value, int, str], ...] = (
    ("standard", lambda mean: mean.standard, 2, ""),
    ("modular, whole", lambda mean: mean.modular, 2, ""),
    ("composed", lambda mean: mean.composed, 2, ""),
    (
        "composed \u2212 standard, points",
        lambda mean: None if mean.standard is None else mean.composed - mean.standard,
        2,
        "+",
    ),
    ("size", lambda mean: mean.size, 1, ""),
    ("FLOPs", lambda mean: mean.flops, 1, ""),
)


def _table(setting: Setting) -> Table:
    tables = [by_size(run.reuse) for run in setting.reused]
    sizes = _columns(sorted(set.intersection(*(set(table) for table in tables))))
    rows = [Row(("sub-tasks", *(_count(setting.reused, size) for size in sizes)))]
    matches = [match for match in find(setting.config, setting.threshold) if "reuse" in match.numbers]
    for name, value, digits, sign in _ROWS:
        cells = [_cell([value(table[size]) for table in tables], digits, sign) for size in sizes]
        if any(cell != DASH for cell in cells):
            rows.append(Row((name, *cells)))
        rows += [
            _reference_row(match, name, digits, sizes) for match in matches if _KEYS.get(name) in match.numbers["reuse"]
        ]
    caption = f"{setting.name}: accuracies, sizes and FLOPs in per cent, by number of classes."
    return Table(caption, ("classes", *map(str, sizes)), tuple(rows), emphasis="composed")


_KEYS = {"standard": "standard", "composed": "composed", "size": "size", "FLOPs": "flops"}


def _reference_row(match: Match, name: str, digits: int, sizes: Sequence[int]) -> Row:
    numbers: dict[str, Any] = match.numbers["reuse"]
    values = dict(zip(numbers["classes"], numbers[_KEYS[name]], strict=True))
    cells = (f"{100 * values[size]:.{digits}f}" if size in values else DASH for size in sizes)
    return Row((f"{name}, {match.name}", *cells), reference=True)


def _columns(sizes: list[int]) -> list[int]:
    """Return all sizes if they are few, else the paper's: multiples of ten, and the ends."""
    if len(sizes) <= MOST_COLUMNS:
        return sizes
    tens = [size for size in sizes if size % 10 == 0]
    return tens if 2 <= len(tens) <= MOST_COLUMNS else sizes[:: -(-len(sizes) // MOST_COLUMNS)]


def _count(runs: Sequence[RunResults], size: int) -> str:
    counts = sorted({sum(len(result.classes) == size for result in run.reuse) for run in runs})
    return str(counts[0]) if len(counts) == 1 else f"{counts[0]}{DASH}{counts[-1]}"


def _cell(values: Sequence[float | None], digits: int, sign: str) -> str:
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return DASH
    spread = Spread.of(known)
    mean = spread.points(digits) if sign else spread.percent(digits)
    return mean.split("\u00a0")[0]  # a column per size leaves no room for the deviation, which the figure shows


def _extremes(shown: Sequence[Setting]) -> Table:
    """Show how single sub-tasks fare, which a mean hides."""
    rows = []
    for setting in shown:
        gaps = [
            (result.composed - result.standard, result, run)
            for run in setting.reused
            for result in run.reuse
            if result.standard is not None
        ]
        if not gaps:
            continue
        worst, result, run = min(gaps, key=lambda gap: gap[0])
        mean = Spread.of(gap for gap, _, _ in gaps).mean
        within = sum(round(gap, 9) >= -0.01 for gap, _, _ in gaps) / len(gaps)
        classes = _classes(result, run)
        cells = (
            str(len(gaps)),
            _signed(mean),
            f"{100 * within:.1f} %",
            _signed(worst),
            f"{classes}; seed {run.config.seed}",
        )
        rows.append(Row((setting.name, *cells)))
    caption = (
        "Composed against standard model, sub-task by sub-task and seed by seed, in percentage points. The last "
        "columns are the sub-task that lost most."
    )
    columns = ("model", "sub-tasks \u00d7 seeds", "mean", "at most 1 point lost", "worst", "its classes")
    return Table(caption, columns, tuple(rows), emphasis=3)


def _classes(result: ReuseResult, run: RunResults) -> str:
    names = run.analysis["class_names"] if run.analysis else None
    told = [str(k) if names is None else names[k] for k in result.classes]
    return ", ".join(told[:3]) + (f" and {len(told) - 3} more" if len(told) > 3 else "")


def _signed(value: float) -> str:
    return Spread.of([value]).points()
