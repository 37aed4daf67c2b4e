"""Taps at the outputs of modules that methods act on, in place of activations."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import moda
from moda.models.resnet import ResNet
from moda.models.vit import Size, ViT
from moda.observation.taps import taps_of

RESNET_SITES = ("layer2.0.bn1", "layer2.0.bn2", "layer2.0.downsample.1")


def resnet() -> ResNet:
    return ResNet((4, 6, 8, 10), (1, 1, 1, 1), 3, 3)


def test_the_named_modules_are_tapped_and_no_activation():
    model, images = resnet(), torch.randn(2, 3, 8, 8)
    taps = moda.observe(model, sites=RESNET_SITES, example=images)
    assert taps.names == ("layer2.0.downsample.1", "layer2.0.bn1", "layer2.0.bn2")  # in execution order
    assert taps.widths == (6, 6, 6)
    model(images).sum().backward()
    assert [tuple(value.shape) for value in taps.activations()] == [(2, 6, 4, 4)] * 3


def test_outputs_stay_those_of_the_plain_model():
    model, images = resnet(), torch.randn(4, 3, 8, 8)
    plain = copy.deepcopy(model)
    moda.observe(model, sites=RESNET_SITES)
    for _ in range(2):
        torch.testing.assert_close(model(images), plain(images), rtol=0, atol=0)
    for (name, mine), (_, other) in zip(model.named_buffers(), plain.named_buffers(), strict=True):
        assert torch.equal(mine, other), name


def test_what_takes_a_site_s_place_is_what_the_model_goes_on_with():
    model, images = resnet().eval(), torch.randn(2, 3, 8, 8)
    taps = moda.observe(model, sites=["layer2.0.bn1"], example=images)
    with taps.replacing(lambda _, rows: rows * 0):
        masked = model(images)
    expected = copy.deepcopy(model)
    taps_of(expected).remove()
    nn.init.zeros_(expected.layer2[0].bn1.weight)
    nn.init.zeros_(expected.layer2[0].bn1.bias)
    torch.testing.assert_close(masked, expected(images))


def test_linear_layers_of_tokens_have_their_neurons_last():
    model, images = ViT(Size(2, 12, 3, 24, 8, 4), 3, 3), torch.randn(2, 3, 8, 8)
    path = "vit.encoder.layer.1"
    sites = [f"{path}.attention.attention.query", f"{path}.intermediate.dense", f"{path}.output.dense"]
    taps = moda.observe(model, sites=sites, example=images)
    assert taps.names == tuple(sites)
    assert taps.widths == (12, 24, 12)
    seen: list[Tensor] = []
    with torch.no_grad(), taps.recording(lambda _, rows: seen.append(rows)):
        model(images)
    assert [tuple(rows.shape) for rows in seen] == [(2, 12, 5), (2, 24, 5), (2, 12, 5)]


def test_copies_have_the_same_sites():
    model, images = resnet(), torch.randn(2, 3, 8, 8)
    moda.observe(model, sites=RESNET_SITES, example=images)
    copied = copy.deepcopy(model)
    copied(images)
    assert taps_of(copied).names == taps_of(model).names


@pytest.mark.parametrize(
    ("sites", "error", "message"),
    [
        (["layer9"], ValueError, "sites: expected paths of modules of the model, got 'layer9'"),
        ([""], ValueError, "sites: expected paths of modules of the model, got ''"),
        ("conv1", TypeError, "sites: expected a sequence of module paths, got the string 'conv1'"),
    ],
)
def test_bad_sites_are_named(sites: list[str], error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        moda.observe(resnet(), sites=sites)
