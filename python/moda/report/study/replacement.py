"""Shows module replacement: weak models before and after a strong model's module took over one of their classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

from moda.report.curves import Change, changes
from moda.report.page import Block, Panel, Panels, Row, Section, Table, Words
from moda.report.spread import Spread
from moda.report.study.inputs import DATA_NAMES, MODEL_NAMES, Replacement
from moda.report.study.references import find_replacement
from moda.report.study.words import DASH
from moda.runs.config import RUNTIME_SETTINGS
from moda.study.replacement import STRATEGIES, ReplacementResult

__all__ = ["replacement"]

NAMES = {"calibrate": "MODA", "normalize": "CNNSplitter"}
COLOURS = {"calibrate": "modular", "normalize": "composed"}
_Group = tuple[str, str, str]  # weak model, checkpoint, strong model


def replacement(studies: Sequence[Replacement]) -> Section:
    """Show what the replaced class gained, and what the others lost or gained."""
    intro = (
        "A weak model knows five classes and a sixth, the target, of which a strong model has a module. The "
        "module\u2019s output takes the target\u2019s place: MODA trains one linear layer over both, CNNSplitter "
        "only rescales. Shown is the accuracy on the target class and the mean over the five others."
    )
    blocks: list[Block] = [Words(intro)]
    if not studies:
        blocks.append(
            Words("Not shown: no replacement study was given. To make one: `moda replace FOLDER`.", note=True)
        )
    for number, study in enumerate(_merged(studies)):
        blocks += _study(study, number)
    return Section("replacement", "Replacement of a class", tuple(blocks))


def _merged(studies: Sequence[Replacement]) -> list[Replacement]:
    """Merge studies of the same weak models with different strong ones, as the paper's table does."""
    merged: list[Replacement] = []
    for study in studies:
        for index, other in enumerate(merged):
            if _weak(study) == _weak(other) and _groups(study).keys().isdisjoint(_groups(other)):
                merged[index] = replace(other, results=[*other.results, *study.results])
                break
        else:
            merged.append(study)
    return merged


def _weak(study: Replacement) -> dict[str, Any]:
    """Return what identifies a weak training, whichever class is mixed in."""
    settings = {name: value for name, value in study.config.to_dict().items() if name not in RUNTIME_SETTINGS}
    mixed = {**study.config.data_options.get("replacement", {}), "mixed_class": None}
    return {**settings, "data_options": {**study.config.data_options, "replacement": mixed}}


def _groups(study: Replacement) -> dict[_Group, list[ReplacementResult]]:
    groups: dict[_Group, list[ReplacementResult]] = {}
    for result in study.results:
        groups.setdefault((result.weak_model, result.checkpoint, result.strong_model), []).append(result)
    return groups


def _study(study: Replacement, number: int) -> list[Block]:
    groups = _groups(study)
    panels = tuple(_panel(f"r{number}-{index}", key, each) for index, (key, each) in enumerate(groups.items()))
    data = DATA_NAMES.get(study.config.data, study.config.data)
    heading = f"Replacement on {data}"
    caption = "Accuracy on the target class in per cent: hollow before, filled after."
    return [Panels(panels, heading, caption), _table(study, groups, data)]


def _title(key: _Group) -> str:
    weak, checkpoint, strong = key
    return f"{checkpoint} {MODEL_NAMES.get(weak, weak)} with {MODEL_NAMES.get(strong, strong)}"


def _upper(text: str) -> str:
    return text[0].upper() + text[1:]


def _panel(name: str, key: _Group, results: Sequence[ReplacementResult]) -> Panel:
    classes = _classes(results)
    drawn = []
    for strategy in STRATEGIES:
        found = {result.mixed_class: result.target for result in results if result.strategy == strategy}
        if found.keys() == classes.keys():
            before, after = zip(*(found[k] for k in classes), strict=True)
            drawn.append(Change(NAMES[strategy], before, after, COLOURS[strategy]))
    return changes(name, _upper(_title(key)), list(classes.values()), drawn, "accuracy on the target, %")


def _classes(results: Sequence[ReplacementResult]) -> dict[int, str]:
    return {r.mixed_class: r.class_name for r in sorted(results, key=lambda r: r.mixed_class)}


def _table(study: Replacement, groups: dict[_Group, list[ReplacementResult]], data: str) -> Table:
    """Return the paper's Table 1: weak model with strong model and strategy by class, "target | others"."""
    classes = _classes(study.results)
    rows, said = [], dict[str, None]()
    for key, results in groups.items():
        for strategy in STRATEGIES:
            own = {result.mixed_class: result for result in results if result.strategy == strategy}
            if not own:
                continue
            gains = {k: (r.target[1] - r.target[0], r.others[1] - r.others[0]) for k, r in own.items()}
            rows.append(Row((f"{_title(key)}, {NAMES[strategy]}", *_cells(gains, list(classes)))))
            weak, checkpoint, strong = key
            for match in find_replacement(study.config, strong, weak, checkpoint, strategy):
                theirs = {k: (g["target"], g["others"]) for k, g in enumerate(match.numbers["gains"])}
                rows.append(Row((match.name, *_cells(theirs, list(classes))), reference=True))
                said[match.statement] = None
    about = " ".join(said) or f"The paper has no numbers for these models on {data}."
    caption = f"After replacement minus before, in percentage points: target | others. {_upper(about)}"
    return Table(caption, ("weak with strong model", *classes.values(), "mean"), tuple(rows), emphasis=len(classes) + 1)


def _cells(gains: dict[int, tuple[float, float]], classes: Sequence[int]) -> list[str]:
    cells = [_pair(gains[k]) if k in gains else DASH for k in classes]
    known = [gains[k] for k in classes if k in gains]
    return [*cells, _pair((fmean(t for t, _ in known), fmean(o for _, o in known))) if known else DASH]


def _pair(gains: tuple[float, float]) -> str:
    return " | ".join(Spread.of([gain]).points(1) for gain in gains)
