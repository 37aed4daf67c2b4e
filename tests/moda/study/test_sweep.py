from __future__ import annotations

import re

import pytest
import torch

import moda
from moda.files import FormatError
from moda.runs.folder import RunFolder
from moda.runs.metrics import read_metrics
from moda.study import sweep
from moda.study.analysis import analyze
from moda.study.reuse import TestSet, evaluate_subtasks, reuse_accuracy
from moda.study.sweep import read_sweep, sweep_epsilon, sweep_threshold, sweep_weight
from tests.moda._helpers.studying import make_run

TASKS = [(0, 1), (4, 7), (2, 3, 8)]


@pytest.fixture
def finished(tmp_path):
    return make_run(tmp_path / "run")


def test_thresholds_are_cut_from_the_stored_rates(finished, monkeypatch):
    monkeypatch.setattr("moda.runs.finished.count_firings", None)  # counting again would fail
    points = sweep_threshold(finished, [0.9, 0.3], TASKS, progress=False)
    rates, test = finished.rates(), TestSet.of(finished.data.test)
    assert [point.value for point in points] == [0.3, 0.9]
    for point in points:
        decomposition = moda.decompose(rates, point.value)
        analysis = analyze(finished.model, decomposition, rates)
        results = list(evaluate_subtasks(finished.model, decomposition, TASKS, test, progress=False))
        assert point.module_size == pytest.approx(analysis.mean_size, rel=1e-12)
        assert point.overlap == pytest.approx(analysis.mean_overlap, rel=1e-12)
        assert point.reuse_accuracy == pytest.approx(reuse_accuracy(results), rel=1e-12)
        assert point.modular_accuracy == pytest.approx(reuse_accuracy(results, "modular"), rel=1e-12)
        assert point.composed_size == pytest.approx(reuse_accuracy(results, "size"), rel=1e-12)
        assert (point.tasks, point.affinity, point.dispersion) == (3, 0.25, 0.5)
        loader = finished.loader(finished.data.test)
        assert point.test_accuracy == moda.measure.accuracy(finished.model, loader)
    assert points[0].module_size > points[1].module_size


@pytest.mark.parametrize("rule", ["attribution", "share"])
def test_epsilons_are_of_scores_made_once(finished, rule, monkeypatch):
    points = sweep_epsilon(finished, rule, [0.3, 0.02], TASKS, progress=False)
    assert [point.value for point in points] == [0.02, 0.3]
    monkeypatch.setattr("moda.runs.finished.attribute", None)  # scoring again would fail
    monkeypatch.setattr("moda.runs.finished.activation_shares", None)
    assert sweep_epsilon(finished, rule, [0.02, 0.1, 0.3], TASKS, progress=False)[::2] == points
    for point in points:
        modules = moda.decompose(finished.scores(rule), epsilon=point.value)
        sizes = moda.measure.module_sizes(finished.model, modules)
        assert point.module_size == pytest.approx(float(sizes.mean()), rel=1e-12)
    assert points[0].module_size > points[1].module_size
    assert finished.decomposition().settings["rule"] == "firing"  # the run's own modules are left alone


def test_a_sweep_goes_on(finished, monkeypatch):
    sweep_threshold(finished, [0.9], TASKS, progress=False)
    measured = []
    measure = sweep._measure
    monkeypatch.setattr(sweep, "_measure", lambda *arguments: measured.append(arguments[2]) or measure(*arguments))
    points = sweep_threshold(finished, [0.5, 0.9, 0.5], TASKS, progress=False)
    assert measured == [0.5]
    assert read_sweep(finished.run.path / "sweep_threshold.csv") == points
    with pytest.raises(FormatError, match="subtasks_sha256 is "):
        sweep_threshold(finished, [0.5], TASKS[:2], progress=False)


def test_weights_are_trained_in_folders_of_their_own(finished):
    points = sweep_weight(finished, "affinity", [1.0, 0.0], TASKS, device="cpu", progress=False)
    assert [point.value for point in points] == [0, 1]
    trained = RunFolder.open(finished.run.path / "sweeps" / "affinity-0")
    config = finished.run.config
    assert trained.config == config.changed(affinity=0.0)
    assert not (finished.run.path / "sweeps" / "affinity-1").exists()  # the run itself
    own = moda.Decomposition.load(trained.decomposition)
    model, example = trained.load_model(finished.data), torch.zeros(2, *finished.data.input_shape)
    sizes = [moda.measure.size(model, own, [k], example=example) for k in range(10)]
    assert points[0].module_size == pytest.approx(sum(sizes) / 10, rel=1e-12)
    assert points[0].dispersion == pytest.approx(read_metrics(trained.metrics)[-1]["dispersion"], rel=1e-6)
    weights = trained.weights.read_bytes()
    torch.manual_seed(9)
    assert sweep_weight(finished, "affinity", [0.0, 1.0], TASKS, device="cpu", progress=False) == points
    assert trained.weights.read_bytes() == weights


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f: sweep_threshold(f, [0.5, 1.5], TASKS), "threshold: expected numbers in [0, 1], got 1.5"),
        (lambda f: sweep_epsilon(f, "share", [2], TASKS), "share: expected numbers in [0, 1], got 2"),
        (lambda f: sweep_epsilon(f, "firing", [0.1], TASKS), "rule: expected one of share, attribution, got 'firing'"),
        (lambda f: sweep_weight(f, "momentum", [1], TASKS), "weight: expected one of affinity, dispersion, compactness, got 'momentum'"),
        (lambda f: sweep_weight(f, "affinity", [-1], TASKS), "affinity: expected finite numbers of at least 0, got -1"),
    ],
)  # fmt: skip
def test_bad_input_is_named(finished, call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call(finished)


def test_malformed_tables_are_refused(tmp_path):
    path = tmp_path / "sweep_threshold.csv"
    path.write_text(",".join(sweep.COLUMNS) + "\n" + ",".join("x" * len(sweep.COLUMNS)) + "\n")
    with pytest.raises(FormatError, match="value: expected a number, got 'x'"):
        read_sweep(path)
