"""Masked models: the user's own model runs, dropped neurons are 0, and the columns of the classes are picked."""

from __future__ import annotations

import copy
import io
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moda
from moda.observation.taps import taps_of


class Net(nn.Module):
    """Convolution, tokens and a head; activations by module, by function and in place."""

    def __init__(self, how: str = "tensor") -> None:
        super().__init__()
        self.how = how
        self.conv, self.relu = nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True)
        self.tokens, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> object:
        self.relu(x := self.conv(x))
        x = F.gelu(self.tokens(x.flatten(2).transpose(1, 2)))
        logits = self.head(x.mean(1))
        if self.how == "dict":
            return {"logits": logits, "hidden": x}
        if self.how == "tuple":
            return logits, x
        return Output(logits, x) if self.how == "fields" else logits


@dataclass
class Output:
    logits: Tensor
    hidden: Tensor


def by_hand(net: Net, x: Tensor, masks: dict[str, Tensor]) -> Tensor:
    x = F.relu(net.conv(x)) * masks["relu"].view(1, -1, 1, 1)
    x = F.gelu(net.tokens(x.flatten(2).transpose(1, 2))) * masks["gelu"]
    return net.head(x.mean(1))


def modules(seed: int = 0) -> moda.Decomposition:
    generator = torch.Generator().manual_seed(seed)
    return moda.Decomposition({"relu": torch.rand(3, 4, generator=generator) < 0.5,
                               "gelu": torch.rand(3, 6, generator=generator) < 0.5})  # fmt: skip


@pytest.mark.parametrize("observed", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_it_is_what_multiplying_by_hand_gives(observed: bool, training: bool) -> None:
    net, x, decomposition = Net().train(training), torch.randn(5, 3, 8, 8), modules()
    taps = moda.observe(net) if observed else None
    masked = moda.mask(net, decomposition, [2, 0])
    plain = copy.deepcopy(net)
    expected = by_hand(net, x, decomposition.select([2, 0]))[:, [2, 0]]
    for _ in range(2):
        y = masked(x)
        torch.testing.assert_close(y, expected)
        assert taps_of(net) is taps
        assert torch.equal(net(x), plain(x))
    y.square().sum().backward()
    gradients = [p.grad for p in net.parameters()]
    want = torch.autograd.grad(expected.square().sum(), list(net.parameters()))
    for got, wanted in zip(gradients, want, strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("how", ["dict", "tuple", "fields"])
def test_outputs_of_other_forms(how: str) -> None:
    net, x, decomposition = Net(how), torch.randn(5, 3, 8, 8), modules()
    masked = moda.mask(net, decomposition, [1], output=0 if how == "tuple" else None)
    y = masked(x)
    logits = y["logits"] if how == "dict" else y[0] if how == "tuple" else y.logits
    expected = by_hand(net, x, decomposition.select([1]))[:, [1]]
    torch.testing.assert_close(logits, expected)


def test_it_can_be_copied_and_saved_and_knows_its_classes() -> None:
    net, x = Net(), torch.randn(2, 3, 8, 8)
    masked = moda.mask(net, modules(), [2, 0])
    y = masked(x)
    file = io.BytesIO()
    torch.save(masked, file)
    file.seek(0)
    for made in (copy.deepcopy(masked), torch.load(file, weights_only=False)):
        assert torch.equal(made(x), y)
        assert made.classes == (2, 0)
        assert made.num_classes == 3


def test_it_can_be_exported() -> None:
    net, x = Net().eval(), torch.randn(2, 3, 8, 8)
    masked = moda.mask(net, modules(), [2, 0]).eval()
    y = masked(x)
    exported = torch.export.export(masked, (x,))
    torch.testing.assert_close(exported.module()(x), y)


def test_another_models_decomposition_is_named() -> None:
    net, x = Net(), torch.randn(2, 3, 8, 8)
    other = moda.Decomposition({"relu": torch.ones(3, 4, dtype=torch.bool), "a": torch.ones(3, 6, dtype=torch.bool)})
    with pytest.raises(ValueError, match=r"decomposition: .* it lacks \['gelu'\], and the model lacks \['a'\]"):
        moda.mask(net, other, [0])(x)
    wide = moda.Decomposition({"relu": torch.ones(3, 5, dtype=torch.bool), "gelu": torch.ones(3, 6, dtype=torch.bool)})
    moda.observe(net, example=x)
    with pytest.raises(ValueError, match="decomposition: tap 'relu' has masks of 5 neurons, but the model has 4 there"):
        moda.mask(net, wide, [0])
    few = moda.Decomposition({name: masks[:2] for name, masks in modules().masks.items()})
    with pytest.raises(ValueError, match="decomposition: has 2 classes, but the model puts out 3 logits"):
        moda.mask(net, few, [0])(x)
