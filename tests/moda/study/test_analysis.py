from __future__ import annotations

import json
from itertools import combinations

import pytest
import torch

import moda
from moda.study.analysis import analyze, class_similarities
from moda_kernels import class_similarity

CLASSES = 5


def make_rates(taps, classes, images=None):
    images = torch.randn(4 * classes, 3, 8, 8) if images is None else images
    labels = torch.arange(len(images)) % classes
    return moda.count_firings(taps, [(images, labels)], classes, progress=False)


@pytest.fixture(scope="module")
def study():
    torch.manual_seed(0)
    taps = moda.observe(moda.models.small_vgg(num_classes=CLASSES, width=0.25).eval())
    rates = make_rates(taps, CLASSES)
    torch.manual_seed(1)
    masks = {tap: torch.rand(rate.shape) < 0.5 for tap, rate in rates.rates.items()}
    return taps, moda.Decomposition(masks), rates


def test_figures_by_hand(study):
    taps, decomposition, rates = study
    analysis = analyze(taps, decomposition, rates)
    pairs = list(combinations(range(CLASSES), 2))
    sizes = [moda.measure.size(taps, decomposition, [k]) for k in range(CLASSES)]
    overlaps = [moda.measure.overlap(taps, decomposition, a, b) for a, b in pairs]
    assert analysis.sizes.tolist() == sizes
    assert analysis.mean_size == pytest.approx(sum(sizes) / CLASSES, rel=1e-12)
    assert analysis.mean_overlap == pytest.approx(sum(overlaps) / len(pairs), rel=1e-12)
    assert [layer.tap for layer in analysis.layers] == list(taps.names)
    for layer in analysis.layers:
        kept = [set(mask.nonzero().flatten().tolist()) for mask in decomposition.masks[layer.tap]]
        assert layer.neurons == decomposition.masks[layer.tap].shape[1]
        assert layer.shared_by_all == len(set.intersection(*kept))
        assert layer.dead == sum(not fired for fired in rates.counts[layer.tap].sum(0).tolist())
        assert layer.module_share == pytest.approx(sum(map(len, kept)) / CLASSES / layer.neurons)
        shared = [len(kept[a] & kept[b]) for a, b in pairs]
        assert layer.overlap == pytest.approx(sum(shared) / len(pairs) / layer.neurons)
        either = [len(kept[a] | kept[b]) for a, b in pairs]
        assert layer.jaccard == pytest.approx(sum(s / e for s, e in zip(shared, either, strict=True)) / len(pairs))
    assert json.loads(json.dumps(analysis.to_dict()))["sizes"] == sizes


def test_dead_neurons_and_empty_modules():
    taps = moda.observe(moda.models.small_vgg(num_classes=2, width=0.25).eval())
    rates = make_rates(taps, 2, torch.zeros(4, 3, 8, 8))
    masks = {tap: torch.zeros(rate.shape, dtype=torch.bool) for tap, rate in rates.rates.items()}
    layers = analyze(taps, moda.Decomposition(masks), rates).layers
    for layer in layers:
        assert layer.dead == sum(rate == 0 for rate in rates.rates[layer.tap][0].tolist())
        assert (layer.jaccard, layer.overlap, layer.module_share, layer.shared_by_all) == (0, 0, 0, 0)
    assert sum(layer.dead for layer in layers) > 0


def test_hundred_classes_of_a_full_size_model():
    # Walking over sets of its 34 million parameters, pair by pair, would take hours and not end inside the test's time.
    taps = moda.observe(moda.models.vgg16(num_classes=100, image_size=32).eval())
    images = torch.randn(100, 3, 32, 32)
    rates = make_rates(taps, 100, images)
    torch.manual_seed(0)
    decomposition = moda.Decomposition({tap: torch.rand(rate.shape) < 0.3 for tap, rate in rates.rates.items()})
    analysis = analyze(taps, decomposition, rates)
    assert analysis.overlaps.shape == (100, 100)
    assert analysis.overlaps[3, 7].item() == moda.measure.overlap(taps, decomposition, 3, 7)


def test_class_similarities_of_a_data_set(study):
    taps, _, _ = study
    images, labels = torch.randn(20, 3, 8, 8), torch.arange(20) % CLASSES
    loader = [(images[:12], labels[:12]), (images[12:], labels[12:])]
    similarities = class_similarities(taps, loader, CLASSES)
    with taps.recording(), torch.no_grad():
        taps.model(images)
    expected = class_similarity(taps.activations(), labels, CLASSES)
    assert list(similarities) == list(taps.names)
    for one, two in zip(similarities.values(), expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_rates_of_another_model_are_refused(study):
    taps, decomposition, _ = study
    other = moda.observe(moda.models.lenet5(num_classes=CLASSES).eval())
    rates = make_rates(other, CLASSES, torch.randn(CLASSES, 3, 32, 32))
    with pytest.raises(ValueError, match="rates: expected the taps of the decomposition"):
        analyze(taps, decomposition, rates)
