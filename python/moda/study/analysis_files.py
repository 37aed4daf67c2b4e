"""The analysis of a run as a file: sizes, overlaps, layers, class similarity, and what they were computed from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moda.composition.measure import mean_over_pairs, overlap_matrix
from moda.files import read_json, write_json
from moda.runs.finished import FinishedRun
from moda.study.analysis import analyze, class_similarities
from moda_kernels import __version__

__all__ = ["analyze_run", "read_analysis", "write_analysis"]

FORMAT = "moda-analysis"
FORMAT_VERSION = 1


def analyze_run(finished: FinishedRun) -> dict[str, Any]:
    """Everything about a decomposed run's modules, as `analysis.json` holds it (docs/file_formats.md).

    Raises:
        FormatError (a ValueError): the run is not decomposed, or holds no firing rates.
    """
    decomposition = finished.decomposition()
    analysis = analyze(finished.model, decomposition, finished.rates())
    parameters = overlap_matrix(finished.model, decomposition, counting="parameters")
    similarity = class_similarities(finished.model, finished.loader(finished.data.test), decomposition.num_classes)
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "library_version": __version__,
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
    write_json(path, analysis)


def read_analysis(path: Path) -> dict[str, Any]:
    """Read what `write_analysis` wrote.

    Raises:
        FormatError (a ValueError): the file is missing, malformed or of another version.
    """
    return read_json(path, FORMAT, FORMAT_VERSION)
