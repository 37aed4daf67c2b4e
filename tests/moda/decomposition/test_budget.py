"""One budget for all layers, against a loop by hand."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st

from moda.decomposition.budget import masks_from_scores, masks_from_shares
from moda.decomposition.scores import ActivationShares, Attributions


def by_hand(shares, epsilon):
    """Take the largest until enough is held; then the best of a layer that has none."""
    classes = next(iter(shares.values())).shape[0]
    masks = {tap: torch.zeros_like(given, dtype=torch.bool) for tap, given in shares.items()}
    for k in range(classes):
        entries = [
            (-given[k, c].item(), i, c, tap)
            for i, (tap, given) in enumerate(shares.items())
            for c in range(given.shape[1])
        ]
        total, held = sum(-share for share, *_ in entries), 0.0
        for share, _, c, tap in sorted(entries):
            if held >= (1 - epsilon) * total - 1e-12 * total:
                break
            masks[tap][k, c] = True
            held -= share
        for tap, given in shares.items():
            if not masks[tap][k].any():
                masks[tap][k, given[k].tolist().index(max(given[k].tolist()))] = True
    return masks


@settings(max_examples=80, deadline=None, derandomize=True)
@drawn(data=st.data())
def test_the_fewest_neurons_that_hold_enough(data):
    classes = data.draw(st.integers(1, 4))
    torch.manual_seed(data.draw(st.integers(0, 999)))
    levels = data.draw(st.sampled_from([2, 4, 1000]))  # few levels: many ties
    scores = {
        f"tap{i}": torch.randint(0, levels, (classes, data.draw(st.integers(1, 12)))).float()
        for i in range(data.draw(st.integers(1, 4)))
    }
    epsilon = data.draw(st.sampled_from([0.0, 0.05, 0.1, 0.25, 0.5, 1.0]))
    given = Attributions(scores, torch.ones(classes, dtype=torch.int64))
    masks = masks_from_scores(given, epsilon)
    expected = by_hand(given.shares, epsilon)
    for tap in scores:
        assert torch.equal(masks[tap], expected[tap]), (tap, scores, epsilon)


def test_layers_share_one_budget():
    """The even layer is nearly all needed; of the uneven one, one neuron holds nearly all."""
    shares = {"even": torch.full((1, 4), 0.25), "uneven": torch.tensor([[0.97, 0.01, 0.01, 0.01]])}
    masks = masks_from_shares(shares, 0.05)
    assert masks["even"].tolist() == [[True] * 4]
    assert masks["uneven"].tolist() == [[True, False, False, False]]


@pytest.mark.parametrize(("epsilon", "kept"), [(0.1, 9), (0.3, 7), (0.0, 10)])
def test_equal_shares_are_cut_to_the_digit(epsilon, kept):
    """Ten times 0.1 is not 1 in float64; nine of them hold 0.9 all the same, and the first of equal ones are kept."""
    mask = masks_from_shares({"a": torch.full((1, 10), 0.1)}, epsilon)["a"]
    assert mask[0].tolist() == [True] * kept + [False] * (10 - kept)


def test_scale_of_a_layer_does_not_matter():
    scores = {"a": torch.rand(3, 7), "b": torch.rand(3, 5)}
    sizes = torch.ones(3, dtype=torch.int64)
    one = masks_from_scores(ActivationShares(scores, sizes), 0.2)
    other = masks_from_scores(ActivationShares({"a": scores["a"] * 1024, "b": scores["b"]}, sizes), 0.2)
    assert all(torch.equal(one[tap], other[tap]) for tap in scores)


def test_a_layer_without_scores_keeps_its_first_neuron_and_is_told():
    scores = {"a": torch.tensor([[0.0, 0.0], [0.0, 1.0], [0.0, 0.0]]), "b": torch.ones(3, 2)}
    given = Attributions(scores, torch.tensor([5, 5, 0]))
    assert given.empty_layers == {"a": [0]}  # class 2 has no sample: it is an empty class
    assert given.empty_classes == [2]
    assert masks_from_scores(given, 0.05)["a"].tolist() == [[True, False], [False, True], [True, False]]


SIZES = torch.tensor([1, 1])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: masks_from_shares({}, 0.1), ValueError, "shares: expected at least one tap, got none"),
        (lambda: masks_from_shares({"a": torch.ones(2, 2)}, 1.5), ValueError, "epsilon: expected a number in [0, 1], got 1.5"),
        (lambda: masks_from_shares({"a": torch.ones(2, 2)}, "much"), TypeError, "epsilon: expected a number, got str"),
        (lambda: masks_from_shares({"a": torch.ones(2, 2).long()}), TypeError, "shares['a']: expected a floating-point tensor, got torch.int64"),
        (lambda: masks_from_shares({"a": torch.ones(2)}), ValueError, "shares['a']: expected shape (classes, neurons), got (2,)"),
        (lambda: masks_from_scores(Attributions({"a": torch.tensor([[1.0], [float("nan")]])}, SIZES)), ValueError,
         "scores['a']: expected finite numbers, got NaN or infinity"),
        (lambda: masks_from_scores(Attributions({"a": torch.tensor([[1.0], [float("inf")]])}, SIZES)), ValueError,
         "scores['a']: expected finite numbers, got NaN or infinity"),
        (lambda: masks_from_scores(Attributions({"a": torch.tensor([[1.0], [-2.0]])}, SIZES)), ValueError,
         "scores['a']: expected numbers of at least 0, got -2"),
        (lambda: Attributions({}, SIZES), ValueError, "scores: expected at least one tap, got none"),
        (lambda: Attributions({"a": torch.ones(2, 0)}, SIZES), ValueError, "scores['a']: expected shape (2, neurons), got (2, 0)"),
        (lambda: Attributions({"a": torch.ones(3, 4)}, SIZES), ValueError, "scores['a']: expected shape (2, neurons), got (3, 4)"),
    ],
)  # fmt: skip
def test_bad_input_is_named(make, error, message):
    with pytest.raises(error, match=re.escape(message)):
        make()
