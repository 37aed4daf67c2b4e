from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moda.observation.taps import HookedModel, instrument
from tests.moda._helpers.tapping import Checkpointing, Deciding, images, spied


class Wandering(Deciding):
    """Cannot be traced; calls one ReLU twice and one on tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.linear = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(self.conv(x))
        return self.act(self.linear(x.flatten(2)[:, :, :6]))

    def greet(self) -> str:
        return "hello"


def test_hooks_see_every_call_of_an_activation_module() -> None:
    model = Wandering()
    watched = instrument(model, method="hooks")
    assert isinstance(watched, HookedModel)
    assert isinstance(watched, Wandering)
    assert watched.greet() == "hello"
    with pytest.raises(RuntimeError, match="taps: known only after the first recorded forward pass"):
        _ = watched.taps
    x = images()
    expected = spied(model, x)
    y = watched(x)
    assert watched.taps == ["act", "act_1"]
    first, second = watched.activations()
    assert torch.equal(y, model(x))
    assert torch.equal(first, expected[0])
    assert torch.equal(second, expected[1].transpose(1, 2))  # tokens behind a Linear
    with pytest.raises(RuntimeError, match="no activations recorded"):
        watched.activations()
    model(x)  # the model itself records nothing
    with pytest.raises(RuntimeError, match="no activations recorded"):
        watched.activations()
    assert not any(module._forward_hooks for module in model.modules())


def test_hooks_share_state_and_copy_deep() -> None:
    model = Wandering()
    watched = instrument(model, method="hooks")
    assert list(watched.state_dict()) == list(model.state_dict())
    assert all(p is q for p, q in zip(watched.parameters(), model.parameters(), strict=True))
    x = images()
    y = watched(x)
    y.sum().backward()
    clone = copy.deepcopy(watched)
    with pytest.raises(RuntimeError, match="no activations recorded"):
        clone.activations()
    assert len(watched.activations()) == 2
    assert torch.equal(clone(x), y)
    assert len(clone.activations()) == 2
    with pytest.raises(RuntimeError, match="no activations recorded"):
        watched.activations()


def test_hooks_record_when_the_tracer_does() -> None:
    watched = instrument(Wandering(), method="hooks")
    watched(images())
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            watched(images())
            with pytest.raises(RuntimeError, match="no activations recorded"):
                watched.activations()
            with watched.recording():
                y = watched(images())
                assert torch.equal(watched.activations()[1], y.transpose(1, 2))


def test_hooks_under_checkpointing_inside_the_model() -> None:
    watched = instrument(Checkpointing(), method="hooks")
    x = torch.randn(4, 3)
    y = watched(x)
    (seen,) = watched.activations()
    assert torch.equal(seen, y)
    (y.sum() + seen.square().sum()).backward()
    plain = copy.deepcopy(watched.block)
    plain.zero_grad()
    z = plain(x)
    (z.sum() + z.square().sum()).backward()
    torch.testing.assert_close(watched.block[0].weight.grad, plain[0].weight.grad)
    with pytest.raises(RuntimeError, match="no activations recorded"):
        watched.activations()


def test_hooks_notice_an_overwritten_activation() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Hardswish(), nn.Dropout(0.5, inplace=True))
    watched = instrument(model, method="hooks")
    watched(torch.randn(2, 3))
    with pytest.raises(RuntimeError, match="activation '1' was overwritten in place after it was recorded"):
        watched.activations()
    x = torch.randn(2, 3)
    with torch.inference_mode(), watched.recording():  # nothing tells there: it is copied
        watched(x)
        assert torch.equal(watched.activations()[0], F.hardswish(model[0](x)))
