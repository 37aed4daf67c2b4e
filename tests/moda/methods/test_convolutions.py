"""Convolutions of a training step with channels last, against PyTorch's own."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from moda.methods import MwT
from moda.methods.convolutions import FastConvolutions, weight_gradient
from moda.models import create

GEOMETRIES = [
    ((3, 3), (1, 1), (1, 1), (1, 1)),
    ((3, 3), (2, 2), (1, 1), (1, 1)),
    ((1, 1), (1, 1), (0, 0), (1, 1)),
    ((1, 1), (2, 2), (0, 0), (1, 1)),
    ((5, 3), (1, 2), (2, 0), (1, 1)),
    ((3, 3), (1, 1), (2, 3), (2, 3)),
    ((2, 4), (3, 1), (0, 1), (1, 2)),
]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("size", "stride", "padding", "dilation"), GEOMETRIES)
def test_the_gradient_of_a_weight_is_autograds(size, stride, padding, dilation, layout: torch.memory_format):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 4, 11, 9, generator=generator, dtype=torch.float64).contiguous(memory_format=layout)
    weight = torch.randn(6, 4, *size, generator=generator, dtype=torch.float64).requires_grad_()
    y = torch.nn.functional.conv2d(x, weight, None, stride, padding, dilation)
    gradient = torch.randn(y.shape, generator=generator, dtype=torch.float64).contiguous(memory_format=layout)
    (expected,) = torch.autograd.grad(y, weight, gradient)
    found = weight_gradient(x, gradient, weight.shape, stride, padding, dilation)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_samples_are_multiplied_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch):
    x, gradient = torch.randn(7, 4, 6, 6, dtype=torch.float64), torch.randn(7, 3, 6, 6, dtype=torch.float64)
    geometry = (torch.Size((3, 4, 3, 3)), (1, 1), (1, 1), (1, 1))
    whole = weight_gradient(x, gradient, *geometry)
    monkeypatch.setattr("moda.methods.convolutions._WINDOW_BYTES", 3 * 36 * 36 * 8)
    torch.testing.assert_close(weight_gradient(x, gradient, *geometry), whole, rtol=1e-12, atol=1e-12)


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.Softplus(),
        nn.Conv2d(6, 12, 1, stride=2),  # PyTorch's own gradient of this weight breaks memory with channels last
        nn.Softplus(),
        nn.Conv2d(12, 8, 3, bias=False),
        nn.Flatten(),
        nn.Linear(8 * 4, 3),
    )


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    model(x).square().mean().backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def test_a_step_is_that_of_the_network_and_the_network_comes_back():
    model, x = small(), torch.randn(4, 3, 8, 8)
    before = copy.deepcopy(model)
    parameters = list(model.parameters())
    fast = FastConvolutions(model, x, anywhere=True)
    assert repr(model) == repr(before)
    assert model[0](x.contiguous(memory_format=torch.channels_last)).grad_fn.name() == "_ConvolutionBackward"
    torch.testing.assert_close(model(x), before(x), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients(model, x), gradients(before, x), rtol=1e-4, atol=1e-6)
    twin = copy.deepcopy(model)
    torch.testing.assert_close(gradients(twin, x), gradients(before, x), rtol=1e-4, atol=1e-6)
    assert all(parameter.grad.is_contiguous() for parameter in model.parameters())
    fast.remove()
    assert [type(layer) for layer in model] == [type(layer) for layer in before]
    assert all(found is kept for found, kept in zip(model.parameters(), parameters, strict=True))
    assert not model._forward_pre_hooks
    torch.testing.assert_close(model(x), before(x), rtol=0, atol=0)


def test_parts_of_a_network_may_be_frozen():
    model, x = small(), torch.randn(4, 3, 8, 8)
    before = copy.deepcopy(model)
    FastConvolutions(model, x, anywhere=True)
    for network in (model, before):
        network[0].bias.requires_grad_(False)
        network[4].weight.requires_grad_(False)
    torch.testing.assert_close(gradients(model, x), gradients(before, x), rtol=1e-4, atol=1e-6)


def test_other_dtypes_and_transforms_go_pytorchs_way():
    model, x = small(), torch.randn(4, 3, 8, 8)
    FastConvolutions(model, x, anywhere=True)
    per_sample = torch.func.vmap(lambda image: model(image[None]))(x)
    torch.testing.assert_close(per_sample[:, 0], model(x), rtol=1e-5, atol=1e-6)
    x = x.double()
    torch.testing.assert_close(gradients(model.double(), x), gradients(small().double(), x), rtol=1e-9, atol=1e-12)
    assert model[0](x).grad_fn.name() != "_ConvolutionBackward"


class Viewing(nn.Module):
    """Takes channels first alone."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(16, 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y.view(len(y), -1)


@pytest.mark.parametrize(
    "model",
    [
        Viewing(),
        nn.Sequential(nn.Conv2d(16, 16, 3, groups=2)),
        nn.Sequential(nn.Conv2d(16, 8, 3), nn.Conv2d(8, 8, 3, padding="same")),
        nn.Sequential(nn.Conv2d(16, 8, 3, padding=1, padding_mode="reflect")),
        nn.Sequential(nn.Flatten(), nn.Linear(16 * 36, 2)),
    ],
)
def test_other_networks_stay_as_they_are(model: nn.Module):
    types = [type(module) for module in model.modules()]
    FastConvolutions(model, torch.randn(2, 16, 6, 6), anywhere=True)
    assert [type(module) for module in model.modules()] == types
    assert not model._forward_pre_hooks


def test_the_probe_leaves_statistics_as_they_are():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).train()
    before = copy.deepcopy(model.state_dict())
    FastConvolutions(model, torch.randn(2, 3, 6, 6), anywhere=True)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert model[1].training


def test_a_gated_network_is_computed_so_until_its_gates_are_gone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX2")
    model, images = create("small_vgg", num_classes=3, image_size=8), torch.randn(4, 3, 8, 8)
    prepared = MwT().prepare(model, 3, images)
    assert len(model._forward_pre_hooks) == 1
    prepared.gates.remove()
    assert not model._forward_pre_hooks
    assert all(type(module) is nn.Conv2d for module in model.modules() if isinstance(module, nn.Conv2d))
