"""docs/study: the archive holds what the page needs, and the table beside it says what is in the archive."""

from __future__ import annotations

import zipfile
from pathlib import Path
from statistics import fmean

import pytest

from moda.report.study import read_inputs
from moda.report.study.inputs import Inputs
from moda.study.reuse import reuse_accuracy

FOLDER = Path(__file__).parents[3] / "docs" / "study"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Inputs:
    folder = tmp_path_factory.mktemp("numbers") / "study"
    with zipfile.ZipFile(FOLDER / "numbers.zip") as archive:
        archive.extractall(folder)
    return read_inputs([folder])


def test_the_archive_holds_every_run_and_replacement(inputs):
    assert len(inputs.runs) == 24
    assert all(len(run.metrics) == 40 for run in inputs.runs)
    modular = [run for setting in inputs.settings for run in setting.modular]
    assert all(len(run.reuse) == 1013 and run.analysis for run in modular)
    assert sorted(len(points) for run in modular for points in run.sweeps.values()) == [5, 6, 6, 6]
    assert sorted(len(replacement.results) for replacement in inputs.replacements) == [20, 20]


def test_the_table_of_the_readme_is_of_the_archive(inputs):
    rows = [row.split("|") for row in (FOLDER / "README.md").read_text(encoding="utf-8").splitlines() if row[:1] == "|"]
    told = {row[1].split(",")[0].strip(): [float(cell) for cell in row[3:9]] for row in rows[2:]}
    names = {
        "small_vgg": "small VGG",
        "lenet5": "LeNet5",
        "resnet18": "ResNet18 x 0.25",
        "mobilenet": "MobileNet x 0.25",
    }
    for setting in inputs.settings:
        last = [fmean(run.metrics[-1]["test_accuracy"] for run in runs) for runs in (setting.standard, setting.modular)]
        reuse = [fmean(reuse_accuracy(run.reuse, name) for run in setting.modular) for name in ("composed", "standard")]
        shares = [100 * value for value in (*last, *reuse)]
        modules = [fmean(run.analysis[name] for run in setting.modular) for name in ("mean_size", "mean_overlap")]
        row = told[names[setting.config.model]]
        assert row[:4] == pytest.approx(shares, abs=0.00501)
        assert row[4:] == pytest.approx(modules, abs=0.000501)
