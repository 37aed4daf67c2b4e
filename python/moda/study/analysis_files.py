"""Writes and reads the analysis of a run: sizes, overlaps, layers, class similarity, and what they follow from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moda.checks import integer, items, json_value, mapping, number, record, text
from moda.composition.measure import mean_over_pairs, overlap_matrix
from moda.files import Format, as_path, format_errors
from moda.runs.finished import FinishedRun
from moda.study.analysis import analyze, class_similarities

__all__ = ["analyze_run", "check_analysis", "read_analysis", "write_analysis"]

ROUNDING = 1e-3
"""By which a mean of cosines in float32 may leave [-1, 1]."""

_share = number(0)
_cosines = items(items(number(-1 - ROUNDING, 1 + ROUNDING)))
ANALYSIS = Format(
    "moda-analysis",
    {
        "source": mapping(json_value),
        "class_names": items(text(empty=True), least=1),
        "mean_size": _share,
        "mean_overlap": _share,
        "mean_overlap_parameters": _share,
        "sizes": items(_share, least=1),
        "overlaps": items(items(_share), least=1),
        "layers": items(
            record(
                {
                    "tap": text(empty=True),
                    "neurons": integer(1),
                    "dead": integer(0),
                    "shared_by_all": integer(0),
                    "module_share": number(0, 1),
                    "overlap": number(0, 1),
                    "jaccard": number(0, 1),
                }
            )
        ),
        "similarity": mapping(_cosines),
    },
    largest=1 << 30,
)


def analyze_run(finished: FinishedRun) -> dict[str, Any]:
    """Compute everything that `analysis.json` says of a decomposed run's modules (docs/file_formats.md).

    Raises:
        FormatError (a ValueError): the run is not decomposed, or holds no firing rates.
    """
    decomposition = finished.decomposition()
    analysis = analyze(finished.taps, decomposition, finished.rates())
    parameters = overlap_matrix(finished.taps, decomposition, counting="parameters")
    similarity = class_similarities(finished.taps, finished.loader(finished.data.test), decomposition.num_classes)
    return {
        "source": finished.provenance(),
        "class_names": list(finished.data.class_names),
        "mean_overlap_parameters": mean_over_pairs(parameters),
        **analysis.to_dict(),
        "similarity": {tap: matrix.double().tolist() for tap, matrix in similarity.items()},
    }


def write_analysis(path: Path, analysis: dict[str, Any]) -> None:
    """Write what `analyze_run` gave, atomically.

    Raises:
        ValueError: a similarity is undefined because a class has no test samples, so that JSON has no word for it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    ANALYSIS.write(path, analysis)


def check_analysis(path: Path, source: dict[str, Any]) -> None:
    """Raise ValueError if a file holds the analysis of other modules than those that `source` tells of.

    One of the same modules would be written again as it is.
    """
    if path.exists() and read_analysis(path)["source"] != source:
        raise ValueError(f"{path}: holds the analysis of other modules; replace it with --force")


def read_analysis(path: str | Path) -> dict[str, Any]:
    """Read what `write_analysis` wrote.

    Raises:
        FormatError (a ValueError): the file is missing, malformed or of another version.
    """
    path = as_path("path", path)
    analysis = ANALYSIS.read(path)
    with format_errors(path):
        _check_sizes(analysis)
    return analysis


def _check_sizes(analysis: Mapping[str, Any]) -> None:
    """There is a size for each class, and in each matrix a number for each two of them; taps come once each."""
    classes = len(analysis["class_names"])
    if len(analysis["sizes"]) != classes:
        raise ValueError(f"sizes: expected {classes} numbers, one for each class, got {len(analysis['sizes'])}")
    matrices = {f"similarity[{tap!r}]": matrix for tap, matrix in analysis["similarity"].items()}
    for name, matrix in {"overlaps": analysis["overlaps"], **matrices}.items():
        if [len(row) for row in matrix] != [classes] * classes:
            raise ValueError(f"{name}: expected {classes} lists of {classes} numbers")
    taps = [layer["tap"] for layer in analysis["layers"]]
    if len(set(taps)) != len(taps):
        raise ValueError("layers: expected every tap once")
    for index, layer in enumerate(analysis["layers"]):
        for name in ("dead", "shared_by_all"):
            integer(0, layer["neurons"])(f"layers[{index}].{name}", layer[name])
