"""MwT on whole networks, against runs of the published code."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import moda
from moda.methods.base import Method, train
from moda.methods.gates import cohesion, coupling
from moda.methods.mwt import MwT, PreparedGates, load_published_state
from moda.methods.sites import convolution_sites, find_sites, token_sites
from moda.models.rescnn import ResCNN
from moda.models.resnet import ResNet
from moda.models.simcnn import SimCNN
from moda.models.vgg import VGG
from moda.models.vit import Size, ViT

Golden = Callable[[str], dict[str, np.ndarray]]


def state_of(arrays: dict[str, np.ndarray], prefix: str = "state/") -> dict[str, Tensor]:
    return {key[len(prefix) :]: torch.tensor(value) for key, value in arrays.items() if key.startswith(prefix)}


def network(name: str, arrays: dict[str, np.ndarray]) -> nn.Module:
    """The published network's architecture at the golden data's widths, with a norm behind every gated convolution."""
    if name == "resnet":
        stem = len(arrays["state/bn1.weight"])
        return ResNet([stem * 2**i for i in range(4)], (2, 2, 2, 2), len(arrays["state/fc.bias"]), 3)
    if name == "vgg":
        return VGG(arrays["conv_cfg"].tolist(), (32, 32), 4, 3, 8)
    widths = arrays["conv_cfg"][:, 1].tolist()
    model: nn.Module
    if name == "simcnn":
        model = SimCNN(widths, (32, 32), 4, 3, 32, batch_norm=True)
        model.conv_0 = model.conv_0[0]  # the published masked networks have no norm behind the first convolution
    else:
        model = ResCNN(widths, 4, 3, 32)
        for index in range(1, 12):
            getattr(model, f"conv_{index}").append(nn.BatchNorm2d(widths[index]))
        model.conv_0 = model.conv_0[0]
    return model


class Case:
    """A published masked network, and ours with its weights and gates."""

    def __init__(self, golden: Golden, name: str) -> None:
        self.arrays = golden(f"peers/mwt_module_{name}")
        self.images = (torch.tensor(self.arrays["x_u8"]).double() - 128) / 64
        self.labels = torch.tensor(self.arrays["labels"])
        self.method = MwT(threshold=float(self.arrays["threshold"]))
        model = network(name, self.arrays).double().eval()
        self.prepared = self.method.prepare(model, 4, self.images[:2])
        load_published_state(self.prepared, state_of(self.arrays))


NETWORKS = ("vgg", "resnet", "simcnn", "rescnn")


@pytest.mark.parametrize("name", NETWORKS)
def test_gates_and_logits_are_the_published_ones(golden: Golden, name: str):
    case = Case(golden, name)
    assert [site.width for site in case.prepared.gates.sites] == case.arrays["widths"].tolist()
    logits = case.prepared.model(case.images)
    np.testing.assert_allclose(logits.detach(), case.arrays["gated64"], rtol=1e-9, atol=1e-9)
    for index, gate in enumerate(case.prepared.gates.take()):
        np.testing.assert_allclose(gate.detach(), case.arrays[f"gate64_{index:02}"], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", NETWORKS)
def test_modules_are_the_published_ones(golden: Golden, name: str):
    case = Case(golden, name)
    modules = case.method.extract(
        case.prepared, [(case.images[i : i + 5], case.labels[i : i + 5]) for i in (0, 5, 10, 15)]
    )
    masks = torch.cat(list(modules.masks.values()), 1)
    np.testing.assert_array_equal(masks, case.arrays["masks"])
    assert modules.sites == tuple(site.output for site in case.prepared.gates.sites)
    case.prepared.model(case.images)
    bits = torch.cat([gate > 0 for gate in case.prepared.gates.take()], 1)
    np.testing.assert_allclose(cohesion(bits, case.labels, masks), case.arrays["cohesion"], rtol=1e-6)
    np.testing.assert_allclose(coupling(masks), case.arrays["coupling"], rtol=1e-6)


@pytest.mark.parametrize("name", NETWORKS)
def test_modules_compute_what_the_published_ones_do(golden: Golden, name: str):
    """The network without generators, its dropped neurons at 0: what the extracted modules compute."""
    case = Case(golden, name)
    model = case.prepared.model
    modules = case.method.extract(case.prepared, [(case.images, case.labels)])
    case.prepared.gates.remove()
    taps = moda.observe(model, sites=modules.sites, example=case.images)
    for index in range(3):
        chosen = modules.select(case.arrays[f"targets_{index}"].tolist())
        kept = [chosen[name] for name in taps.names]
        with taps.replacing(lambda i, rows, kept=kept: rows * kept[i].view(1, -1, *[1] * (rows.dim() - 2))):
            body = model(case.images)
        np.testing.assert_allclose(body.detach(), case.arrays[f"body64_{index}"], rtol=1e-9, atol=1e-9)


def test_training_goes_as_the_published_one(golden: Golden):
    """Three epochs on digits, term by term and to the last weight."""
    arrays = golden("peers/mwt_training")
    rate, momentum, nesterov, epochs, alpha, beta = arrays["hyper"].tolist()
    assert nesterov == 1
    images = (torch.tensor(arrays["x_u8"]).double() / 16)[:, None].repeat(1, 3, 1, 1)
    labels = torch.tensor(arrays["labels"])
    method = MwT(alpha, beta, int(epochs), rate, momentum)
    prepared = method.prepare(network("resnet", arrays).double(), len(arrays["state/fc.bias"]), images[:2])
    load_published_state(prepared, state_of(arrays))
    batches = [(images[rows], labels[rows]) for rows in arrays["batch_idx"].tolist()]
    expected = arrays["steps64"].mean(1)
    for summary, terms in zip(train(method, prepared, batches), expected, strict=True):
        found = [summary.terms[name] for name in ("task", "cohesion", "coupling")]
        np.testing.assert_allclose(found, terms[:3], rtol=1e-7, atol=1e-8)
    final = Case.__new__(Case)
    final.prepared = copy.deepcopy(prepared)
    reference = method.prepare(network("resnet", arrays).double(), 4, images[:2])
    load_published_state(reference, state_of(arrays) | state_of(arrays, "final64/"))
    left_out = ("layer2.", "layer3.")
    for (key, mine), theirs in zip(
        prepared.model.state_dict().items(), reference.model.state_dict().values(), strict=True
    ):
        if not key.startswith(left_out):
            np.testing.assert_allclose(mine, theirs, rtol=1e-6, atol=1e-7, err_msg=key)


# ---- sites and gates ----------------------------------------------------------------------------------------------


def test_published_networks_have_the_published_sites():
    """4160 kernels in 12 layers of VGG16, 4736 in 19 of ResNet18, 26 layers of MobileNet."""
    images = torch.randn(2, 3, 32, 32)
    for name, layers, kernels in (("vgg16", 12, 4160), ("resnet18", 19, 4736), ("mobilenet", 26, None)):
        sites = convolution_sites(find_sites(moda.models.create(name), images))
        assert len(sites) == layers
        assert kernels is None or sum(site.width for site in sites) == kernels
        assert all(site.output != site.layer for site in sites)  # every one has its norm
    paths = [site.layer for site in convolution_sites(find_sites(moda.models.create("resnet18"), images))]
    assert paths[4:8] == ["layer2.0.conv1", "layer2.0.conv2", "layer2.0.downsample.0", "layer2.1.conv1"]


def test_transformers_are_gated_behind_their_first_layer(golden: Golden):
    arrays = golden("peers/nemo_vit")
    layers, hidden, heads, mlp, side, patch, classes = arrays["cfg"].tolist()
    model = ViT(Size(layers, hidden, heads, mlp, side, patch), classes, 3)
    found = find_sites(model, torch.randn(2, 3, side, side))
    assert [site.layer for site in token_sites(found)] == arrays["order"].tolist()
    assert [site.layer for site in token_sites(found, attention=False)] == arrays["order_no_attention"].tolist()
    deep = find_sites(ViT(Size(12, 4, 1, 4, 8, 4), 2, 3), torch.randn(2, 3, 8, 8))
    assert [site.layer for site in token_sites(deep)] == arrays["order_12"].tolist()


def test_a_network_is_what_it_was_when_its_gates_are_gone():
    model, images = moda.models.create("resnet18", width=0.1).eval(), torch.randn(2, 3, 16, 16)
    keys, before = list(model.state_dict()), model(images)
    prepared = MwT().prepare(model, 3, images)
    assert not torch.equal(model(images), before)
    prepared.gates.remove()
    assert list(model.state_dict()) == keys
    assert torch.equal(model(images), before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_it_is_a_method():
    assert isinstance(MwT(), Method)


def test_a_step_trains_network_and_generators():
    images, labels = torch.randn(6, 3, 16, 16), torch.tensor([0, 1, 2, 0, 1, 2])
    method = MwT(epochs=1)
    prepared = method.prepare(moda.models.create("resnet18", num_classes=3, width=0.1), 3, images)
    before = {key: value.clone() for key, value in prepared.model.state_dict().items()}
    (summary,) = train(method, prepared, [(images, labels)])
    changed = [key for key, value in prepared.model.state_dict().items() if not torch.equal(value, before[key])]
    assert any("mask_generator" in key for key in changed)
    assert "fc.weight" in changed
    assert all(np.isfinite(value) for value in summary.terms.values())


class Twice(nn.Module):
    """Its second convolution is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.second(self.first(x))).mean((2, 3))


IMAGES = torch.randn(2, 3, 8, 8)


def _gated_twice() -> PreparedGates:
    model = moda.models.create("resnet18", width=0.05)
    MwT().prepare(model, 3, IMAGES)
    return MwT().prepare(model, 3, IMAGES)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MwT(cohesion=-1), "cohesion: expected a finite number of at least 0, got -1"),
        (lambda: MwT(epochs=0), "epochs: expected at least 1, got 0"),
        (lambda: MwT(learning_rate=float("inf")), "learning_rate: expected a finite number greater than 0, got inf"),
        (lambda: MwT(momentum=1.0), r"momentum: expected a finite number of at least 0 and less than 1, got 1.0"),
        (lambda: MwT(threshold=0), r"threshold: expected a finite number greater than 0 and of at most 1, got 0"),
        (
            lambda: MwT().prepare(nn.Sequential(nn.Flatten(), nn.Linear(192, 3)), 3, IMAGES),
            "model: expected at least two conv",
        ),
        (lambda: MwT().prepare(Twice(), 3, IMAGES), "model: expected at least two convolutions"),
        (lambda: MwT().prepare(Twice(), 1, IMAGES), "num_classes: expected at least 2, got 1"),
        (lambda: MwT(layers=("second",)).prepare(Twice(), 3, IMAGES), "layers: expected .* got 'second'"),
        (_gated_twice, "is the model gated twice"),
    ],
)
def test_bad_arguments_are_named(make: Callable[[], object], message: str):
    with pytest.raises(ValueError, match=message):
        make()


def test_gates_are_handed_over_once():
    prepared = MwT().prepare(moda.models.create("resnet18", width=0.05), 3, IMAGES)
    prepared.model(IMAGES)
    assert len(prepared.gates.take()) == 19
    with pytest.raises(RuntimeError, match="gates: expected a forward pass that runs every gated layer"):
        prepared.gates.take()


def test_a_class_without_samples_is_said():
    method = MwT()
    prepared = method.prepare(moda.models.create("resnet18", width=0.05), 3, IMAGES)
    with pytest.raises(ValueError, match=r"loader: expected samples of every class, got none of classes \[1, 2\]"):
        method.extract(prepared, [(IMAGES, torch.tensor([0, 0]))])
    with pytest.raises(ValueError, match="loader: expected at least one batch, got none"):
        method.extract(prepared, [])
