"""docs/file_formats.md and docs/study.md say what the study's commands write."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path

import pytest

from moda.decomposition import files as decomposition_files
from moda.study import analysis_files, replacement, reuse_run, sweep
from moda.study import digits as study
from moda.study.analysis import LayerAnalysis
from moda.study.analysis_files import analyze_run, write_analysis
from moda.study.digits import StudySettings
from moda.study.replacement import ReplacementResult, write_replacements
from moda.study.reuse import COLUMNS
from moda.study.reuse_run import run_reuse
from tests.moda._helpers.studying import make_run

DOCS = Path(__file__).parents[3] / "docs"
PAGE = (DOCS / "file_formats.md").read_text(encoding="utf-8")


def first_column(table: str) -> set[str]:
    rows = table.lstrip("\n").split("\n\n", 1)[0].splitlines()[2:]
    return {name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])}


def behind(words: str, page: str = PAGE) -> str:
    return page.split(words, 1)[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run with everything that the commands write to it."""
    finished = make_run(tmp_path_factory.mktemp("runs") / "run")
    write_analysis(finished.run.path / "analysis.json", analyze_run(finished))
    run_reuse(finished, [(0, 1)], finished.run.path / "reuse.csv", progress=False)
    hashes = [letter * 64 for letter in "abc"]
    result = ReplacementResult("a", "b", "calibrate", 1, "1", 5, "final", (0.5, 1.0), (0.5, 0.0), *hashes)
    write_replacements(finished.run.path / "replacement.json", [result])
    study._describe(finished.run.path, StudySettings(), finished=False)
    return finished.run.path


@pytest.mark.parametrize(
    ("file", "words", "kind"),
    [
        ("rates/rates.json", "\n`rates.json`:\n", decomposition_files.RATES.name),
        ("analysis.json", "\n`analysis.json`:\n", analysis_files.ANALYSIS.name),
        ("replacement.json", "\n`replacement.json`:\n", replacement.REPLACEMENTS.name),
        ("reuse.json", "The note (`reuse.json`, `sweep_<parameter>.json`):\n", reuse_run.KIND),
    ],
)
def test_entries(folder, file, words, kind):
    value = json.loads((folder / file).read_text())
    assert first_column(behind(words)) == set(value)
    assert value["format"] == kind
    assert f"| `{kind}` | {value['format_version']} |" in PAGE


def test_entries_of_a_study(folder):
    value = json.loads((folder / "study.json").read_text())
    page = (DOCS / "study.md").read_text(encoding="utf-8")
    assert first_column(behind("`study.json` says what there is:\n", page)) == set(value)
    assert f"| `study.json` | `{value['format']}` | {value['format_version']} |" in PAGE


def test_columns():
    assert first_column(behind("`reuse.csv` has one row per sub-task. All figures are shares in [0, 1]:\n")) == set(
        COLUMNS
    )
    assert first_column(behind("has one row per value, ascending:\n")) == set(sweep.COLUMNS)


def test_what_stands_in_the_entries(folder):
    note = json.loads((folder / "reuse.json").read_text())
    described = behind("what the rows follow from:").split("\n", 1)[0]
    assert set(note["source"]) <= set(re.findall(r"`(\w+)`", described))
    described = behind("of a finished reuse table:").split("\n", 1)[0]
    assert set(note["summary"]) | set(note["summary"]["by_size"][0]) == set(re.findall(r"`(\w+)`", described))
    result = json.loads((folder / "replacement.json").read_text())["results"][0]
    assert set(result) <= set(re.findall(r"`(\w+)`", behind("A result has").split("\n\n", 1)[0]))
    layers = behind("| `layers` | list of objects |").split("\n", 1)[0]
    assert {field.name for field in fields(LayerAnalysis)} <= set(re.findall(r"`(\w+)`", layers))
