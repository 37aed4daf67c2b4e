"""Finished runs: what belongs to other weights, or is missing, is named."""

from __future__ import annotations

import pytest
import torch

import moda
from moda.files import FormatError
from moda.runs.finished import FinishedRun, checked_device, decompose_run
from tests.moda._helpers.studying import make_run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "run")


def test_cut_stores_what_any_threshold_needs(finished):
    rates = finished.rates()
    loader = finished.loader(finished.data.train_eval)
    fresh = moda.count_firings(finished.model, loader, 10, progress=False)
    assert all(torch.equal(rates.counts[tap], fresh.counts[tap]) for tap in fresh.taps)
    decomposition = finished.decomposition()
    assert decomposition.metadata["augmented"] is False
    assert decomposition.metadata["weights_sha256"] == finished.weights_sha256
    for tap, mask in moda.decompose(rates).masks.items():
        assert torch.equal(mask, decomposition.masks[tap])


def test_rates_and_modules_of_other_weights_are_refused(tmp_path):
    finished = make_run(tmp_path / "run")
    state = finished.run.load_weights()
    state["classifier.2.bias"] += 1
    finished.run.save_weights(state)
    for read in (finished.rates, finished.decomposition):
        with pytest.raises(FormatError, match="was made from other weights than .* make it again with: moda decompose"):
            read()
    again = FinishedRun.open(finished.run.path, "cpu")
    decompose_run(again, progress=False)
    assert again.provenance()["weights_sha256"] == again.weights_sha256


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(FormatError, match="none: no such folder"):
        FinishedRun.open(tmp_path / "none")
    bare = make_run(tmp_path / "run", decomposed=False)
    with pytest.raises(FormatError, match="is not decomposed yet; do it with: moda decompose"):
        bare.decomposition()
    with pytest.raises(FormatError, match="holds no firing rates; make them with: moda decompose"):
        bare.rates()
    bare.run.weights.unlink()
    with pytest.raises(FormatError, match="its training is not finished"):
        FinishedRun.open(bare.run.path)


@pytest.mark.parametrize("name", ["abacus", "cuda:77"])
def test_devices_that_are_not_there(name):
    with pytest.raises(ValueError, match=f"device: '{name}' cannot be used here: "):
        checked_device(name)


@pytest.mark.parametrize("rule", ["attribution", "share"])
def test_runs_by_other_rules(tmp_path, rule):
    finished = make_run(tmp_path / "run", decomposed=False)
    with pytest.raises(FormatError, match=f"holds no .*; make them with: moda decompose .* --rule {rule}"):
        finished.scores(rule)
    made = decompose_run(finished, rule=rule, epsilon="0.1", progress=False)
    assert made.settings == finished.decomposition().settings == {"rule": rule, "epsilon": 0.1}
    assert finished.provenance()["epsilon"] == 0.1
    fresh = moda.decompose(finished.scores(rule), epsilon=0.1)
    assert all(torch.equal(mask, made.masks[tap]) for tap, mask in fresh.masks.items())
    composed = moda.compose(finished.model, made, [0, 1])
    assert sum(p.numel() for p in composed.parameters()) < sum(p.numel() for p in finished.model.parameters())


def test_epsilon_is_chosen_on_samples_that_are_not_scored(tmp_path):
    finished = make_run(tmp_path / "run", decomposed=False)
    made = decompose_run(finished, rule="attribution", epsilon="auto", tolerance=50, progress=False)
    told = made.metadata["epsilon_auto"]
    samples = len(finished.data.train_eval)
    assert told["samples"] == -(-samples // 5)
    assert int(finished.scores("attribution").class_sizes.sum()) == samples - told["samples"]
    assert made.settings["epsilon"] == told["epsilon"]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"rule": "taste"}, ValueError, "rule: expected one of firing, share, attribution, got 'taste'"),
        ({"epsilon": 0.1}, TypeError, "epsilon: goes with attributions or activation shares"),
        ({"epsilon": "auto"}, TypeError, "epsilon: goes with attributions or activation shares"),
        ({"rule": "share", "threshold": 0.5}, TypeError, "threshold: goes with firing rates"),
        ({"rule": "share", "target": "logit"}, TypeError, "target: goes with rule='attribution'"),
        ({"rule": "share", "epsilon": "small"}, ValueError, "epsilon: expected a number in .0, 1. or 'auto', got 'small'"),
        ({"rule": "share", "tolerance": 1}, TypeError, "tolerance: goes with epsilon"),
    ],
)  # fmt: skip
def test_arguments_that_do_not_go_with_the_rule(finished, arguments, error, message):
    with pytest.raises(error, match=message):
        decompose_run(finished, **arguments, progress=False)
