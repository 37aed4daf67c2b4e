"""The page of a comparison of methods: what each came to, beside the papers' numbers for the same model and data."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from importlib.resources import files
from typing import Any, TypeAlias

from moda.report.page import Block, Row, Section, Table, Words, render
from moda.report.spread import Spread
from moda.study.comparison import MethodFigures
from moda_kernels import __version__

__all__ = ["comparison_page"]

_Shown: TypeAlias = "Callable[[Iterable[float | None]], str]"
NAMES = {"moda": "MODA", "mwt": "MwT", "nemo": "NeMo", "gradsplitter": "GradSplitter", "cnnsplitter": "CNNSplitter"}
_MEASURES = (
    "Accuracies are on test samples. A module's size is the parameters of one class's composed module over those of "
    "the whole model, the mean over classes; neurons kept are counted at the layers that the method acts on. Two "
    "modules overlap in the parameters that both keep, over those of the whole model, the mean over pairs. Sizes, "
    "neurons and FLOPs of several classes are those of the composed model: of united modules (MODA, MwT, NeMo) what "
    "two share counts once, of modules side by side (GradSplitter, CNNSplitter) every time, heads included. Gates are "
    "in no module. A gain is the change in accuracy of a weak model when a module takes over one of its classes, in "
    "percentage points, the mean over classes: by a layer trained on all logits (calibrated), or with the module's "
    'output min-max normalised over held-out samples of the class; "on the class" is the gain on its own samples. '
    "Times are wall-clock on one machine."
)


@cache
def papers_numbers() -> list[dict[str, Any]]:
    """Return the papers' numbers by method, model and data; accuracies are shares by number of classes."""
    listed: list[dict[str, Any]] = json.loads(
        files("moda.report").joinpath("comparison.json").read_text(encoding="utf-8")
    )
    return listed


def comparison_page(found: Sequence[MethodFigures], title: str | None = None) -> str:
    """Return the page as HTML that needs no other file."""
    groups: dict[tuple[str, str], list[MethodFigures]] = {}
    for figures in found:
        groups.setdefault((figures.model, figures.data), []).append(figures)
    sections = [_section(model, data, members) for (model, data), members in groups.items()]
    sections.append(Section("measures", "What the numbers are", (Words(_MEASURES),)))
    names = ", ".join(dict.fromkeys(NAMES.get(figures.method, figures.method) for figures in found))
    return render(
        "study.html",
        title=title or "Modularization methods compared",
        subtitle=f"{names} on the same data, with the same measures and machine.",
        headlines=(),
        sections=sections,
        drawings={},
        made_by="moda compare",
        method="Methods: MODA, arXiv 2411.01074; MwT, 2306.09376; GradSplitter, 2311.04438; CNNSplitter, 2209.06116.",
        version=__version__,
    )


def _section(model: str, data: str, found: Sequence[MethodFigures]) -> Section:
    blocks: list[Block] = [_by_method("What each method came to.", _COLUMNS, found), *_by_size(model, data, found)]
    if any(one.calibrated is not None for one in found):
        blocks.append(_by_method("In a replacement: what a weak model gains, in percentage points.", _GAINS, found))
    seeds = sorted({figures.seed for figures in found})
    words = (
        f"Means over {len(seeds)} seeds \u00b1 standard deviations."
        if len(seeds) > 1
        else f"One training of each, seed {seeds[0]}."
    )
    return Section(f"{model}-{data}", f"{model} on {data}", (Words(words), *blocks))


def _methods(found: Iterable[MethodFigures]) -> dict[str, list[MethodFigures]]:
    made: dict[str, list[MethodFigures]] = {}
    for figures in found:
        made.setdefault(figures.method, []).append(figures)
    return made


_Column: TypeAlias = "tuple[str, Callable[[MethodFigures], float | None], _Shown]"


def _by_method(caption: str, columns: Sequence[_Column], found: Sequence[MethodFigures]) -> Table:
    rows = tuple(
        Row((NAMES.get(method, method), *(shown(map(value, members)) for _, value, shown in columns)))
        for method, members in _methods(found).items()
    )
    return Table(caption, ("method", *(name for name, _, _ in columns)), rows)


def _by_size(model: str, data: str, found: Sequence[MethodFigures]) -> list[Block]:
    blocks: list[Block] = []
    counts = sorted({size.classes for figures in found for size in figures.sizes})
    for count in counts:
        rows = []
        for method, members in _methods(found).items():
            sizes = [size for figures in members for size in figures.sizes if size.classes == count]
            if not sizes:
                continue
            cells = [_shares(getattr(size, name) for size in sizes) for name in _SHARES]
            rows.append(Row((NAMES.get(method, method), *cells, _seconds(size.seconds for size in sizes))))
            rows += _papers(method, model, data, count)
        tasks = max(size.tasks for figures in found for size in figures.sizes if size.classes == count)
        drawn = "one sub-task" if tasks == 1 else f"means over {tasks} sub-tasks"
        caption = f"Models of {count} classes, composed of their modules: {drawn}."
        columns = (
            "method",
            "whole, restricted",
            "composed",
            "fine-tuned",
            "size",
            "neurons kept",
            "FLOPs",
            "fine-tuning",
        )
        blocks.append(Table(caption, columns, tuple(rows)))
    return blocks


_SHARES = ("whole", "before", "after", "size", "kept", "flops")


def _papers(method: str, model: str, data: str, count: int) -> list[Row]:
    rows = []
    for entry in papers_numbers():
        if (entry["method"], entry["model"], entry["data"]) == (method, model, data) and count in entry["classes"]:
            place = entry["classes"].index(count)
            values = [entry[name][place] if name in entry else None for name in _SHARES]
            rows.append(Row((entry["name"], *(_shares([value]) for value in values), ""), reference=True))
    return rows


def _spread(values: Iterable[float | None]) -> Spread | None:
    """Over the seeds that have the figure; None where none has."""
    known = [value for value in values if value is not None]
    return Spread.of(known) if known else None


def _shares(values: Iterable[float | None]) -> str:
    spread = _spread(values)
    return "" if spread is None else f"{spread.percent(1)} %"


def _points(values: Iterable[float | None]) -> str:
    spread = _spread(values)
    return "" if spread is None else spread.points(1)


def _seconds(values: Iterable[float | None]) -> str:
    spread = _spread(values)
    return "" if spread is None else f"{spread.mean:.1f} s"


_COLUMNS: tuple[_Column, ...] = (
    ("whole model", lambda one: one.accuracy, _shares),
    ("standard model", lambda one: one.standard, _shares),
    ("module size", lambda one: one.module_size, _shares),
    ("neurons kept", lambda one: one.kept, _shares),
    ("overlap", lambda one: one.overlap, _shares),
    ("training", lambda one: one.train_seconds, _seconds),
    ("modularizing", lambda one: one.modularize_seconds, _seconds),
)
_GAINS: tuple[_Column, ...] = (
    ("calibrated", lambda one: one.calibrated, _points),
    ("on the class", lambda one: one.calibrated_class, _points),
    ("normalised", lambda one: one.normalized, _points),
    ("on the class", lambda one: one.normalized_class, _points),
)
