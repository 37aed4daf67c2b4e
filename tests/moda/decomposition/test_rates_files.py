from __future__ import annotations

import json
import re

import pytest
import torch

import moda
from moda.decomposition.rates_files import load_rates, rates_metadata, save_rates
from moda.files import FormatError
from moda.runs.finished import FinishedRun, checked_device, cut
from tests.moda._helpers.studying import make_run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "run")


def counted(finished):
    loader = finished.loader(finished.data.train_eval)
    return moda.count_firings(finished.model, loader, 10, progress=False)


def test_rates_come_back_to_the_bit(finished, tmp_path):
    rates = counted(finished)
    save_rates(rates, tmp_path, {"augmented": True})
    loaded = load_rates(tmp_path)
    assert loaded.taps == rates.taps
    assert torch.equal(loaded.class_sizes, rates.class_sizes)
    assert loaded.threshold == rates.threshold
    for tap in rates.taps:
        assert torch.equal(loaded.rates[tap], rates.rates[tap])
        assert torch.equal(loaded.counts[tap], rates.counts[tap])
    assert rates_metadata(tmp_path) == {"augmented": True}


def test_cut_stores_what_any_threshold_needs(finished):
    rates = finished.rates()
    fresh = counted(finished)
    assert all(torch.equal(rates.counts[tap], fresh.counts[tap]) for tap in fresh.taps)
    decomposition = finished.decomposition()
    assert decomposition.metadata["augmented"] is False
    assert decomposition.metadata["weights_sha256"] == finished.weights_sha256
    for tap, mask in moda.decompose(rates).masks.items():
        assert torch.equal(mask, decomposition.masks[tap])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("class_sizes"), "entry 'class_sizes' is missing"),
        (lambda d: d.update(class_sizes="x"), "rates.json: "),
        (lambda d: d.update(format_version=9), "expected format_version 1, got 9"),
        (lambda d: d.update(counts_sha256="0"), "counts.safetensors: its SHA-256 is"),
        (lambda d: d["taps"].reverse(), None),
        (lambda d: d["taps"].pop(), "its tensors are not those that rates.json describes"),
    ],
)
def test_malformed_folders_are_refused(finished, tmp_path, change, message):
    save_rates(finished.rates(), tmp_path)
    path = tmp_path / "rates.json"
    description = json.loads(path.read_text())
    change(description)
    path.write_text(json.dumps(description))
    if message is None:
        assert load_rates(tmp_path).taps == tuple(reversed(finished.model.taps))
        return
    with pytest.raises(FormatError, match=re.escape(message)):
        load_rates(tmp_path)


def test_metadata_must_be_an_object(finished, tmp_path):
    save_rates(finished.rates(), tmp_path)
    path = tmp_path / "rates.json"
    path.write_text(path.read_text().replace('"metadata": {}', '"metadata": []'))
    with pytest.raises(FormatError, match='expected an object "metadata"'):
        rates_metadata(tmp_path)


# ---- the run they belong to ---------------------------------------------------------------------------------------


def test_rates_and_modules_of_other_weights_are_refused(tmp_path):
    finished = make_run(tmp_path / "run")
    state = finished.run.load_weights()
    state["classifier.2.bias"] += 1
    finished.run.save_weights(state)
    for read in (finished.rates, finished.decomposition):
        with pytest.raises(FormatError, match="was made from other weights than .* make it again with: moda decompose"):
            read()
    again = FinishedRun.open(finished.run.path, "cpu")
    cut(again, progress=False)
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
