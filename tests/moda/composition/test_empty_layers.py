"""Layers of which nothing is left: zeros stand for what they gave, and what only fed on them is its bias."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moda.composition import measure
from moda.composition.compose import ComposedModel, compose
from moda.composition.files import load_composed, save_composed
from moda.composition.masking import mask
from moda.decomposition.container import Decomposition
from tests.moda._helpers.composing import lively, random_modules, watched, widths


class Branches(nn.Module):
    """A branch of convolutions beside a skip, tokens of what is left, and a head; every layer with a bias but one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1, bias=False)
        self.outer, self.norm = nn.Conv2d(6, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.hidden, self.head = nn.Linear(4, 8), nn.Linear(8, 3)
        self.a, self.b, self.c, self.d = nn.ReLU(), nn.ReLU(), nn.ReLU(), nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(self.stem(x))
        x = self.c(x + self.norm(self.outer(self.b(self.inner(x)))))
        tokens = self.d(self.hidden(x.flatten(2).transpose(1, 2)))
        return self.head(tokens.mean(1))


def composed_without(model: nn.Module, x: Tensor, taps: Sequence[str]) -> tuple[ComposedModel, nn.Module]:
    """Composed and masked with the first half of every tap's neurons, and none of these taps'."""
    masks = {}
    for tap, count in widths(watched(model, x), x).items():
        masks[tap] = ((torch.arange(count) < count // 2) & (tap not in taps)).repeat(3, 1)
    decomposition = Decomposition(masks)
    composed = compose(model, decomposition, [2, 0])
    assert isinstance(composed, ComposedModel)
    assert measure.size(model, decomposition, [2, 0]) == sizes(composed)["all"] / sizes(model)["all"]
    return composed, mask(model, decomposition, [2, 0])


def sizes(model: nn.Module) -> Mapping[str, int]:
    found: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        for key in ("all", name.partition(".")[0]):
            found[key] = found.get(key, 0) + parameter.numel()
    return found


@pytest.mark.parametrize(
    ("taps", "left"),
    [
        (("b",), {"stem": 56, "outer": 2, "norm": 4, "hidden": 12, "head": 10}),  # inner goes, outer is its bias
        (("a",), {"outer": 2, "norm": 4, "hidden": 12, "head": 10}),  # inner has no bias: it gives zeros, too
        (("c",), {"hidden": 4, "head": 10}),
        (("d",), {"head": 2}),
    ],
)
def test_layers_that_nothing_is_left_of_go(taps, left):
    model, x = lively(Branches()), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    composed, masked = composed_without(model, x, taps)
    assert {name: count for name, count in sizes(composed).items() if name != "all"} == left
    for training, samples, side in ((False, 5, 6), (False, 2, 9), (True, 3, 6)):
        other = torch.randn(samples, 3, side, side, dtype=torch.float64)
        expected = masked.train(training)(other)
        torch.testing.assert_close(composed.train(training)(other), expected, rtol=1e-9, atol=1e-9)


def test_a_model_without_some_of_its_layers_is_cast_saved_trained_and_exported(tmp_path):
    model, x = lively(Branches()).float(), torch.randn(2, 3, 6, 6)
    composed, masked = composed_without(model, x, ("a", "b"))
    expected = masked(x)
    torch.testing.assert_close(composed.double()(x.double()), expected.double(), rtol=1e-4, atol=1e-5)
    save_composed(composed.float(), tmp_path / "composed")
    torch.testing.assert_close(load_composed(tmp_path / "composed")(x), expected, rtol=1e-5, atol=1e-6)
    program = torch.export.export(composed, (x,))
    torch.testing.assert_close(program.module()(x), expected, rtol=1e-5, atol=1e-6)
    F.cross_entropy(composed.train()(x), torch.tensor([0, 1])).backward()
    assert all(parameter.grad is not None for parameter in composed.parameters())


class Normalised(nn.Module):
    """Divides by a norm over neurons: 0 where the numerator is."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.head = nn.Linear(5, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.hidden(x))
        return self.head(F.normalize(x, dim=1) + x / (1 + x.norm(dim=1, keepdim=True)))


@pytest.mark.parametrize("share", [0.4, 0.0])
def test_dropped_neurons_that_are_divided_stay_dropped(share):
    model, x = lively(Normalised()), torch.randn(4, 5, dtype=torch.float64)
    decomposition = random_modules(widths(watched(model, x), x), 3, share)
    composed = compose(model, decomposition, [1, 2])
    torch.testing.assert_close(composed(x), mask(model, decomposition, [1, 2])(x), rtol=1e-9, atol=1e-9)
    kept = int(composed.masks["relu"].sum())
    assert composed.get_parameter("head.bias").shape == (2,)
    if share:
        assert composed.get_parameter("head.weight").shape == (2, kept)


class Separable(nn.Module):
    """A depthwise and a grouped convolution whose neurons are tapped, as in MobileNet and ResNeXt."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.depth = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8), nn.SiLU())
        self.group = nn.Sequential(nn.Conv2d(8, 8, 1, groups=4, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.group(self.depth(self.first(x))).mean((2, 3)))


def test_filters_that_nothing_comes_in_to_go_unless_as_published():
    model, x = lively(Separable()), torch.randn(2, 3, 5, 5, dtype=torch.float64)
    kept = {"first.2": [0, 1, 2], "depth.2": [1, 2, 3, 4], "group.2": [0, 3, 7]}
    masks = {tap: torch.isin(torch.arange(8), torch.tensor(places)).repeat(3, 1) for tap, places in kept.items()}
    taps = watched(model, x)
    decomposition = Decomposition(masks)
    published = compose(taps, decomposition, [0, 2])
    lean = compose(taps, decomposition, [0, 2], published=False)
    expected = {training: mask(taps, decomposition, [0, 2]).train(training)(x) for training in (False, True)}
    for made, filters, groups in ((published, 3, 3), (lean, 2, 2)):
        assert made.get_parameter("depth.0.weight").shape == (filters, 1, 3, 3)
        assert made.get_parameter("depth.1.weight").shape == (3,)  # what they give is a constant, which counts
        assert made.get_parameter("group.0.weight").shape == (groups, 2, 1, 1)
        for training, logits in expected.items():
            torch.testing.assert_close(made.train(training)(x), logits, rtol=1e-9, atol=1e-9)
    for call in (compose, measure.size):
        with pytest.raises(TypeError, match="published: expected a bool, got str"):
            call(taps, decomposition, [0, 2], published="no")
    size = measure.size(taps, decomposition, [0, 2], published=False)
    assert size == sizes(lean)["all"] / sizes(model)["all"] < measure.size(taps, decomposition, [0, 2])
