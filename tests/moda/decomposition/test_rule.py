"""The published rule: golden masks, the floor, ties, and arguments that are refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moda.decomposition.rates import FiringRates
from moda.decomposition.rule import decompose, masks_from_rates
from moda.decomposition.settings import FiringRule
from tests.moda._helpers.decomposing import golden_layers, rates_of


@pytest.mark.parametrize("name", ["masks_k4", "masks_k10", "masks_below_min"])
@pytest.mark.parametrize("t", range(5))
def test_masks_are_the_published_ones(golden, name, t):
    z = golden(name)
    for layer in golden_layers(z):
        rates = z[f"rates_{layer}"]
        masks = masks_from_rates(torch.from_numpy(rates), float(z["tau"][t])).numpy()
        published, tied = z[f"mask_t{t}_{layer}"], z[f"ambiguous_t{t}_{layer}"]
        np.testing.assert_array_equal(masks[~tied], published[~tied])
        np.testing.assert_array_equal(masks.sum(1), z[f"k_t{t}_{layer}"])
        for k in np.flatnonzero(tied):
            np.testing.assert_array_equal(np.sort(rates[k][masks[k]]), np.sort(rates[k][published[k]]))


def test_a_class_below_the_floor_is_lifted_to_the_largest_class():
    rates = torch.tensor([[0.95, 0.92, 0.1, 0.0], [0.5, 0.2, 0.7, 0.1], [0.0, 0.91, 0.0, 0.3]])
    expected = [[True, True, False, False], [True, False, True, False], [False, True, False, False]]
    assert masks_from_rates(rates, 0.9).tolist() == expected


def test_the_threshold_is_compared_in_float32():
    nine_tenths = torch.tensor([[9 / 10, 0.95, np.nextafter(np.float32(0.9), np.float32(0))]], dtype=torch.float32)
    assert masks_from_rates(nine_tenths, 0.9).tolist() == [[True, True, False]]
    assert masks_from_rates(nine_tenths.double(), 0.9).tolist() == [[True, True, False]]


def test_ties_at_the_border_go_to_the_lower_index():
    rates = torch.tensor([[0.3, 0.5, 0.3, 0.5, 0.3, 0.3], [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]])
    assert masks_from_rates(rates, 0.9)[0].tolist() == [True, True, False, True, False, False]
    assert masks_from_rates(torch.zeros(1, 800), 0.9).nonzero().tolist() == [[0, 0], [0, 1], [0, 2], [0, 3]]


@pytest.mark.parametrize(
    ("neurons", "min_fraction", "kept"),
    [(399, 0.005, 1), (400, 0.005, 2), (512, 0.005, 2), (1024, 0.005, 5), (4096, 0.005, 20), (10, 0.25, 2), (8, 0, 1)],
)
def test_the_floor_is_a_share_of_the_neurons_and_at_least_one(neurons, min_fraction, kept):
    rates = torch.linspace(0, 0.5, neurons)[None]
    mask = masks_from_rates(rates, 0.9, min_fraction)
    assert mask[0].nonzero().flatten().tolist() == list(range(neurons - kept, neurons))


def published_rule(rates: np.ndarray, threshold: float, min_fraction: float) -> np.ndarray:
    """The rule as published: class by class, each seeing the masks repaired before it. Ties: lower index."""
    masks = rates >= np.float32(threshold)
    floor = max(1, int(min_fraction * rates.shape[1]))
    for k, mask in enumerate(masks):
        if mask.sum() < floor:
            size = max(floor, masks.sum(1).max())
            best = sorted(range(rates.shape[1]), key=lambda neuron: (-rates[k, neuron], neuron))[:size]
            masks[k] = np.isin(np.arange(rates.shape[1]), best)
    return masks


@settings(deadline=None, max_examples=60)
@given(
    classes=st.integers(1, 6),
    neurons=st.integers(1, 40),
    threshold=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
    min_fraction=st.sampled_from([0.0, 0.005, 0.2, 1.0]),
    seed=st.integers(0, 10_000),
)
def test_all_classes_at_once_is_the_rule_class_by_class(classes, neurons, threshold, min_fraction, seed):
    samples = np.random.default_rng(seed)
    rates = (samples.integers(0, 11, (classes, neurons)) / 10 * samples.choice([0, 0.5, 1], (classes, 1))).astype("f4")
    masks = masks_from_rates(torch.from_numpy(rates), threshold, min_fraction).numpy()
    np.testing.assert_array_equal(masks, published_rule(rates, threshold, min_fraction))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            (torch.zeros(2, 3, dtype=torch.int64),),
            TypeError,
            "rates: expected a floating-point tensor, got torch.int64",
        ),
        (([[0.5]],), TypeError, "rates: expected a floating-point tensor, got list"),
        ((torch.zeros(3),), ValueError, r"rates: expected shape \(classes, neurons\), got \(3,\)"),
        ((torch.zeros(0, 3),), ValueError, r"rates: expected shape \(classes, neurons\), got \(0, 3\)"),
        ((torch.full((2, 3), 1.5),), ValueError, r"rates: expected values in \[0, 1\]"),
        ((torch.full((2, 3), float("nan")),), ValueError, r"rates: expected values in \[0, 1\].* NaN"),
        ((torch.zeros(2, 3), 1.1), ValueError, r"threshold: expected a number in \[0, 1\], got 1.1"),
        ((torch.zeros(2, 3), float("nan")), ValueError, r"threshold: expected a number in \[0, 1\], got nan"),
        ((torch.zeros(2, 3), "0.9"), TypeError, r"threshold: expected a number, got str"),
        ((torch.zeros(2, 3), 0.9, -0.1), ValueError, r"min_fraction: expected a number in \[0, 1\], got -0.1"),
    ],
)
def test_bad_rates_and_numbers_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        masks_from_rates(*arguments)


def test_decompose_applies_the_rule_at_every_tap_and_says_what_it_used():
    layers = {"b": torch.tensor([[1.0, 0.5], [0.0, 0.8]]), "a": torch.tensor([[0.6, 0.8, 0.1], [0.1, 0.1, 0.7]])}
    decomposition = decompose(rates_of(layers, [10, 10]), threshold=0.75, min_fraction=0.01)
    assert list(decomposition.masks) == ["b", "a"]
    assert decomposition.sites == ("b", "a")
    assert decomposition.masks["b"].tolist() == [[True, False], [False, True]]
    assert decomposition.masks["a"].tolist() == [[False, True, False], [False, False, True]]
    assert (decomposition.method, decomposition.combine, decomposition.num_classes) == ("moda", "rows", 2)
    assert decomposition.settings == {"rule": "firing", "threshold": 0.75, "min_fraction": 0.01}
    assert FiringRule.of(decomposition.settings) == FiringRule(0.75, 0.01)
    assert decomposition.metadata == {"class_sizes": [10, 10], "empty_classes": [], "firing_threshold": 0.0}


def test_a_class_without_samples_is_an_error_unless_allowed():
    rates = rates_of({"a": torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]])}, [4, 0, 0])
    assert rates.empty_classes == [1, 2]
    with pytest.raises(ValueError, match=r"scores: expected samples of every class, got none of classes \[1, 2\]"):
        decompose(rates)
    allowed = decompose(rates, allow_empty_classes=True)
    assert allowed.masks["a"].tolist() == [[True, True, False]] * 3
    assert allowed.metadata["empty_classes"] == [1, 2]


def test_decompose_names_what_it_cannot_take():
    with pytest.raises(TypeError, match="scores: expected FiringRates from count_firings, Attributions .*, got dict"):
        decompose({"a": torch.zeros(2, 3)})
    with pytest.raises(ValueError, match=r"rates: expected the taps \['a'\] in this order, got \['b'\]"):
        FiringRates(("a",), {"b": torch.zeros(1, 1)}, {"a": torch.zeros(1, 1)}, torch.ones(1))
