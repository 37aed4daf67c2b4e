"""Which epsilon is chosen, against masked models one pair at a time."""

from __future__ import annotations

import re
from itertools import combinations

import pytest
import torch
from torch import nn

import moda
from moda.decomposition.choice import choose_epsilon, partners
from moda.decomposition.scores import Attributions
from moda.decomposition.settings import BudgetRule

CLASSES = 4


def fitted():
    """A small network that tells four clusters apart, and samples of them."""
    generator = torch.Generator().manual_seed(1)
    centres = 2 * torch.randn(CLASSES, 6, generator=generator)
    labels = torch.arange(80) % CLASSES
    x = centres[labels] + torch.randn(80, 6, generator=generator)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 12), nn.GELU(), nn.Linear(12, CLASSES))
    optimiser = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(40):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(x), labels).backward()
        optimiser.step()
    return model.eval(), [(x[:50], labels[:50]), (x[50:], labels[50:])]


def test_the_curve_is_that_of_masked_models():
    model, loader = fitted()
    scores = moda.attribute(model, loader, CLASSES, progress=False)
    choice = choose_epsilon(scores, model, loader, candidates=(0.5, 0.1, 0.3), tolerance=1.0, progress=False)
    x, labels = (torch.cat(parts) for parts in zip(*loader, strict=True))
    assert [point.epsilon for point in choice.curve] == [0.1, 0.3, 0.5]
    assert choice.samples == 80
    for point in choice.curve:
        modules = moda.decompose(scores, epsilon=point.epsilon)
        wholes, parts = [], []
        for pair in combinations(range(CLASSES), 2):
            member = torch.isin(labels, torch.tensor(pair))
            right = (labels[member] == pair[1]).long()
            wholes.append((model(x[member])[:, pair].argmax(1) == right).double().mean())
            masked = moda.mask(model, modules, pair)
            parts.append((masked(x[member]).argmax(1) == right).double().mean())
        whole, part = (100 * float(torch.stack(values).mean()) for values in (wholes, parts))
        assert (point.model, point.modules) == (pytest.approx(whole), pytest.approx(part))
        assert point.loss == pytest.approx(whole - part)
        assert point.kept == pytest.approx(float(torch.cat(list(modules.masks.values()), 1).float().mean()))
    fitting = [point.epsilon for point in choice.curve if point.loss <= 1]
    assert choice.epsilon == max(fitting, default=0.0)
    assert 0 < len(fitting) < 3, "the test wants a choice to be made"


def test_auto_says_what_it_did(capsys):
    model, loader = fitted()
    scores = moda.activation_shares(model, loader, CLASSES, progress=False)
    modules = moda.decompose(scores, epsilon="auto", model=model, loader=loader, tolerance=2)
    told = modules.metadata["epsilon_auto"]
    assert BudgetRule.of(modules.settings) == BudgetRule("share", told["epsilon"])
    printed = capsys.readouterr().err
    assert f"epsilon {told['epsilon']:g}: at most 2 points lost on 80 samples" in printed
    assert len([line for line in printed.splitlines() if "keeps" in line]) == len(told["curve"])
    assert torch.equal(modules.masks["1"], moda.decompose(scores, epsilon=told["epsilon"]).masks["1"])


def test_an_untouched_model_loses_nothing():
    model, loader = fitted()
    scores = moda.attribute(model, loader, CLASSES, progress=False)
    choice = choose_epsilon(scores, model, loader, candidates=(0.9,), tolerance=0, progress=False)
    assert choice.curve[0].loss > 0
    assert choice.epsilon == 0
    assert all(mask.any(1).all() for mask in moda.decompose(scores, epsilon=choice.epsilon).masks.values())


@pytest.mark.parametrize("classes", [1, 2, 5, 10, 11, 24, 100])
def test_partners_are_symmetric(classes):
    """A pair is scored by the samples of both its classes."""
    distances = partners(classes)
    assert len(set(distances)) == len(distances) == (classes - 1 if classes <= 10 else 8)
    assert {classes - distance for distance in distances} == set(distances)
    assert all(0 < distance < classes for distance in distances)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"candidates": ()}, ValueError, "candidates: expected at least one epsilon, got none"),
        ({"candidates": (2,)}, ValueError, "candidates: expected a number in [0, 1], got 2"),
        ({"tolerance": -1}, ValueError, "tolerance: expected percentage points of at least 0, got -1"),
        ({"tolerance": "small"}, TypeError, "tolerance: expected a number of percentage points, got str"),
        ({"loader": [(torch.ones(2, 6), torch.tensor([0, 1]))]}, ValueError,
         "loader: expected samples of every class, got none of classes [2, 3]"),
        ({"scores": Attributions({"x": torch.ones(4, 3)}, torch.ones(4, dtype=torch.int64))}, ValueError,
         "scores: expected the taps of the model ('1', '3'), got ('x',)"),
    ],
)  # fmt: skip
def test_bad_input_is_named(arguments, error, message):
    model, loader = fitted()
    given = {"scores": moda.activation_shares(model, loader, CLASSES, progress=False), "loader": loader, **arguments}
    with pytest.raises(error, match=re.escape(message)):
        choose_epsilon(given.pop("scores"), model, given.pop("loader"), progress=False, **given)
    with pytest.raises(
        TypeError,
        match=re.escape('loader: expected the batches of training data that are kept apart with epsilon="auto"'),
    ):
        moda.decompose(moda.activation_shares(model, loader, CLASSES, progress=False), epsilon="auto", model=model)


def test_arguments_go_with_their_scores():
    model, loader = fitted()
    rates = moda.count_firings(model, loader, CLASSES, progress=False)
    scores = moda.attribute(model, loader, CLASSES, progress=False)
    for make, message in (
        (lambda: moda.decompose(scores, 0.9), "threshold: goes with firing rates, got it with attributions"),
        (lambda: moda.decompose(scores, min_fraction=0.1), "min_fraction: goes with firing rates, got it with attributions"),
        (lambda: moda.decompose(rates, epsilon=0.1), "epsilon: goes with attributions or activation shares, got it with firing rates"),
        (lambda: moda.decompose(rates, model=model), "model: goes with attributions or activation shares, got it with firing rates"),
        (lambda: moda.decompose(scores, epsilon=0.1, tolerance=1), 'tolerance: goes with epsilon="auto", got it with epsilon=0.1'),
    ):  # fmt: skip
        with pytest.raises(TypeError, match=re.escape(message)):
            make()
    assert moda.decompose(scores).settings == {"rule": "attribution", "epsilon": 0.05}
    assert moda.decompose(rates).settings == {"rule": "firing", "threshold": 0.9, "min_fraction": 0.005}
