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
