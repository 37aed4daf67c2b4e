"""Shows the modules: sizes, overlaps, layers, and the similarity of classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from moda.report.curves import Line, Scale, bars, heat_map, lines
from moda.report.page import Block, Panel, Panels, Row, Section, Table, Words
from moda.report.spread import Spread
from moda.report.study.inputs import RunResults, Setting
from moda.report.study.overview import from_analysis
from moda.report.study.references import Match, find
from moda.report.study.words import DASH, missing, statement

__all__ = ["modules", "similarities"]

MOST_BARS = 20
_COMMAND = "moda analyze RUN"


def modules(settings: Sequence[Setting]) -> Section:
    """Show sizes and overlaps of modules, and what they share in every layer."""
    shown = [setting for setting in settings if setting.analysed]
    intro = (
        "A module is what the model keeps for one class: neurons that fire for most of its samples. Overlap is what "
        "two modules share, counted as published: all of their parameters and batch-norm statistics, over the "
        "parameters of the whole model."
    )
    blocks: list[Block] = [Words(intro), *statement([s for s in settings if s.modular])]
    if shown:
        blocks.append(_table(shown))
        caption = (
            "By class; every pair of classes, on the diagonal the module itself; layer by layer, from the input to "
            "the output, the share of neurons that two modules share, and that a module keeps; neurons that never "
            "fire, and that every module keeps. Means over seeds."
        )
        blocks += [Panels(_panels(s), s.name, caption if s is shown[0] else "") for s in shown]
        blocks.append(Words(_early_to_late(shown)))
    blocks += missing("modules", [s for s in settings if s.modular and not s.analysed], _COMMAND)
    return Section("modules", "Modules: size, overlap, layers", tuple(blocks))


def _table(shown: Sequence[Setting]) -> Table:
    rows = []
    for setting in shown:
        rows.append(_row(setting.name, setting.analysed))
        plain = [run for run in setting.standard if run.analysis]
        if plain:
            rows.append(_row(f"{setting.name}, standard training cut alike", plain))
        rows += [row for match in find(setting.config, setting.threshold) for row in _references(match)]
    columns = (
        "model",
        "module size",
        "overlap",
        "overlap, parameters alone",
        "dead neurons",
        "neurons in every module",
    )
    caption = "Mean module size and overlap in per cent of the parameters; neurons in per cent of all hidden ones."
    return Table(caption, columns, tuple(rows), emphasis=1)


def _row(name: str, runs: Sequence[RunResults]) -> Row:
    figures = [from_analysis(runs, key) for key in ("mean_size", "mean_overlap", "mean_overlap_parameters")]
    shares = [Spread.of(_neurons(run, key) for run in runs if run.analysis) for key in ("dead", "shared_by_all")]
    return Row((name, *(DASH if value is None else value.percent(1) for value in (*figures, *shares))))


def _neurons(run: RunResults, key: str) -> float:
    layers = _layers(run)
    return float(sum(layer[key] for layer in layers) / sum(layer["neurons"] for layer in layers))


def _layers(run: RunResults) -> list[dict[str, Any]]:
    layers: list[dict[str, Any]] = (run.analysis or {})["layers"]
    return layers


def _references(match: Match) -> list[Row]:
    numbers = match.numbers
    kinds = [(match.name, "module_size", "overlap")]
    if "standard_module_size" in numbers:
        kinds.append((f"{match.name}, standard training cut alike", "standard_module_size", "standard_overlap"))
    return [
        Row((name, f"{100 * numbers[size]:.1f}", f"{100 * numbers[overlap]:.1f}", DASH, DASH, DASH), reference=True)
        for name, size, overlap in kinds
    ]


# ---- figures --------------------------------------------------------------------------------------------------------


def _panels(setting: Setting) -> tuple[Panel, ...]:
    names = [str(name) for name in (setting.analysed[0].analysis or {})["class_names"]]
    matrix = _mean_matrix([(run.analysis or {})["overlaps"] for run in setting.analysed])
    return (
        _sizes(setting, names),
        heat_map(f"{setting.key}-overlap", "Overlap of modules", names, matrix, "% of the parameters", half=True),
        _by_layer(setting, "sharing", "Kept and shared", (("overlap", "shared"), ("module_share", "kept"))),
        _by_layer(setting, "idle", "Dead, and in every module", (("dead", "dead"), ("shared_by_all", "in every"))),
    )


def _sizes(setting: Setting, names: Sequence[str]) -> Panel:
    columns = [
        Spread.of(values) for values in zip(*((r.analysis or {})["sizes"] for r in setting.analysed), strict=True)
    ]
    unit = "% of the parameters"
    if len(names) <= MOST_BARS:
        return bars(f"{setting.key}-sizes", "Module of each class", names, columns, unit)
    ranked = sorted(columns, key=lambda spread: spread.mean, reverse=True)
    line = Line("size", range(1, len(ranked) + 1), ranked, "modular")
    return lines(f"{setting.key}-sizes", "Modules, largest first", [line], Scale(unit, 100, low=0), "module")


def _by_layer(setting: Setting, name: str, title: str, figures: Sequence[tuple[str, str]]) -> Panel:
    drawn = []
    for kind, runs in (("modular", setting.analysed), ("standard", [r for r in setting.standard if r.analysis])):
        for index, (key, label) in enumerate(figures):
            if runs:
                told = label if kind == "modular" else f"{label}, std."
                drawn.append(_layer_line(runs, key, told, kind, dashed=index == 1))
    scale = Scale("% of the layer\u2019s neurons", 100, low=0, high=103)
    return lines(f"{setting.key}-{name}", title, drawn, scale, "layer")


def _layer_line(runs: Sequence[RunResults], key: str, label: str, colour: str, *, dashed: bool) -> Line:
    rows = [[_share(layer, key) for layer in _layers(run)] for run in runs]
    values = [Spread.of(each) for each in zip(*rows, strict=True)]
    return Line(label, range(1, len(values) + 1), values, colour, dashed=dashed, points=len(values) <= 10)


def _share(layer: dict[str, Any], key: str) -> float:
    value = layer[key]
    return float(value / layer["neurons"]) if key in ("dead", "shared_by_all") else float(value)


def _mean_matrix(matrices: Sequence[Any]) -> np.ndarray:
    mean: np.ndarray = np.mean([np.array(matrix, dtype=float) for matrix in matrices], axis=0)
    return mean


def _early_to_late(shown: Sequence[Setting]) -> str:
    """Put the paper's claim into numbers that early layers are shared and late ones are not."""
    told = []
    for setting in shown:
        overlaps = [[layer["overlap"] for layer in _layers(run)] for run in setting.analysed]
        third = max(1, len(overlaps[0]) // 3)
        early, late = (
            Spread.of(float(np.mean(each[part])) for each in overlaps) for part in (slice(third), slice(-third, None))
        )
        told.append(f"{setting.name} {100 * early.mean:.0f} % and {100 * late.mean:.0f} %")
    return (
        "The paper\u2019s picture is that modules share their early layers and part in the late ones. Two modules "
        f"share, of the neurons in the first and in the last third of the layers: {'; '.join(told)}."
    )


# ---- similarity of classes ------------------------------------------------------------------------------------------


def similarities(settings: Sequence[Setting]) -> Section:
    """Show how similar the classes are in each layer."""
    shown = [setting for setting in settings if setting.analysed]
    blocks: list[Block] = [
        Words(
            "Mean cosine similarity between the activations of test samples of two classes: 100 is the same "
            "direction, 0 has no neuron in common. Affinity is to raise it within a class, dispersion to lower it "
            "between classes. Maps show the first, a middle and the last hidden layer; means over seeds."
        )
    ]
    for setting in shown:
        blocks.append(Panels(_similarity_panels(setting), setting.name))
    blocks += missing("similarity", [s for s in settings if s.modular and not s.analysed], _COMMAND)
    plain = [s for s in shown if not any(run.analysis for run in s.standard)]
    blocks += missing(
        "the same after standard training", plain, "moda decompose STANDARD_RUN && moda analyze STANDARD_RUN"
    )
    return Section("similarity", "How alike classes look", tuple(blocks))


def _similarity_panels(setting: Setting) -> tuple[Panel, ...]:
    names = [str(name) for name in (setting.analysed[0].analysis or {})["class_names"]]
    own = _similarity(setting.analysed)
    drawn = _similarity_lines(own, "modular", "within", "between")
    plain = [run for run in setting.standard if run.analysis]
    if plain:
        drawn += _similarity_lines(_similarity(plain), "standard", "within, std.", "between, std.")
    scale = Scale("cosine similarity, %", 100, low=0, high=103)
    curve = lines(f"{setting.key}-similar", "Within and between classes", drawn, scale, "layer")
    layers = list(dict.fromkeys((0, len(own) // 2, len(own) - 1)))
    maps = [
        heat_map(
            f"{setting.key}-similar-{index}",
            f"Layer {index + 1} of {len(own)}",
            names,
            own[index][0],
            "cosine, %",
            half=True,
        )
        for index in layers
    ]
    return curve, *maps


def _similarity(runs: Sequence[RunResults]) -> list[tuple[np.ndarray, list[np.ndarray]]]:
    """Return each layer's mean over runs, and each run's."""
    tables = [list((run.analysis or {})["similarity"].values()) for run in runs]
    each = [[np.array(matrix, dtype=float) for matrix in layer] for layer in zip(*tables, strict=True)]
    return [(_mean_matrix(matrices), matrices) for matrices in each]


def _similarity_lines(
    layers: Sequence[tuple[np.ndarray, list[np.ndarray]]], colour: str, within: str, between: str
) -> list[Line]:
    x, few = range(1, len(layers) + 1), len(layers) <= 10
    inside = [Spread.of(float(np.diag(m).mean()) for m in matrices) for _, matrices in layers]
    outside = [Spread.of(float(m[~np.eye(len(m), dtype=bool)].mean()) for m in matrices) for _, matrices in layers]
    return [Line(within, x, inside, colour, points=few), Line(between, x, outside, colour, dashed=True, points=few)]
