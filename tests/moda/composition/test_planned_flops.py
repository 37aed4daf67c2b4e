from __future__ import annotations

import pytest
import torch
from torch import nn

import moda
from moda.composition.compose import plan
from moda.composition.composer import composer_of
from moda.composition.observed import observed
from moda.composition.planned_flops import PlannedFlops
from tests.moda._helpers.composing import random_modules, watched, widths


class Tied(nn.Module):
    """One convolution called twice, grouped: its weight costs twice, and less per channel."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.both = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.relus = nn.ModuleList(nn.ReLU() for _ in range(3))
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.relus[0](self.stem(x))
        for relu in (self.relus[1], self.relus[2]):
            x = relu(self.both(x))
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize(
    ("make", "size"),
    [
        (lambda: moda.models.small_vgg(num_classes=4, width=0.25), 8),
        (lambda: moda.models.lenet5(num_classes=4), 32),
        (lambda: moda.models.resnet18(num_classes=4, width=0.125), 16),
        (lambda: moda.models.mobilenet(num_classes=4, width=0.125), 16),
        (Tied, 8),
    ],
)
def test_the_plan_costs_what_the_composed_model_costs(make, size):
    torch.manual_seed(0)
    model, example = watched(make().eval(), torch.randn(2, 3, size, size)), torch.randn(1, 3, size, size)
    decomposition = random_modules(widths(model, example), 4, 0.4)
    costs = planned(model, decomposition, example)
    assert costs.exact
    assert costs.whole == moda.measure.flops(model, example)
    for task in [(0,), (1, 3), (0, 1, 2, 3)]:
        composed = moda.compose(model, decomposition, task)
        assert costs.of(plan(model, decomposition, task)) == moda.measure.flops(composed, example)
        assert costs.of(plan(model, decomposition, task)) < costs.whole


def planned(model, decomposition, example):
    with observed(model, decomposition.sites) as taps:
        return PlannedFlops(composer_of(taps, decomposition), example)


class Similar(nn.Module):
    """A product of activations, whose cost no weight tells."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.relu, self.second = nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)

    def forward(self, x):
        hidden = self.relu(self.first(x))
        return self.second(torch.matmul(torch.matmul(hidden, hidden.t()), hidden))


def test_other_operations_cannot_be_planned():
    model = watched(Similar().eval(), torch.randn(2, 6))
    decomposition = random_modules(widths(model, torch.randn(2, 6)), 4, 0.4)
    costs = planned(model, decomposition, torch.randn(2, 6))
    assert not costs.exact
    assert costs.whole == moda.measure.flops(model, torch.randn(2, 6))
    with pytest.raises(ValueError, match="its operations cannot be counted from a plan"):
        costs.of(None)
