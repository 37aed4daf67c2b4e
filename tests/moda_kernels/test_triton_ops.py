"""The registered ops: opcheck, whole-graph compilation, and the same bits with and without the dispatcher."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moda_kernels import closed_form, modular_losses, pool, relu_pool, triton_kernels
from moda_kernels.triton_kernels import ops
from tests.moda_kernels._helpers.triton_oracle import DEVICES, leaves, make_layers

pytestmark = pytest.mark.parametrize("device", DEVICES)

# Static shapes and eager differentiation cover schema, registration and fakes; a symbolic batch size is traced below.
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")


@pytest.fixture
def triton_on(device, monkeypatch):
    """Lets the front doors choose Triton on the device under test."""
    monkeypatch.setattr(triton_kernels, "DEVICES", dict.fromkeys(triton_kernels.OPS, frozenset({device})))
    yield device
    torch._dynamo.reset()


def _layers(device):
    layers = leaves(make_layers([(3, 2, 2), (5,), (4, 3, 3)], 4, torch.float32, device))
    layers[2] = layers[2].detach().to(memory_format=torch.channels_last).requires_grad_()
    return layers


def _labels(device):
    return torch.tensor([0, 1, 0, 2], device=device)


@pytest.mark.parametrize("name", ["modular_losses", "pool", "relu_pool"])
def test_opcheck(name, device):
    layers = _layers(device)
    arguments = {
        "modular_losses": (layers, _labels(device)),
        "pool": ([layers[0], layers[2]],),
        "relu_pool": (layers[2],),
    }[name]
    torch.library.opcheck(getattr(torch.ops.moda_kernels, name), arguments, test_utils=CHECKS)


def test_opcheck_of_backward(device):
    """The ops that backward calls: schema and fakes, in layouts whose gradients are not contiguous."""
    layers = [layer.detach() for layer in _layers(device)]
    saved = torch.ops.moda_kernels.modular_losses(layers, _labels(device))[3:]
    upstream = [torch.ones((), device=device) for _ in range(3)]
    checks = ("test_schema", "test_faketensor")
    arguments = (layers, saved, upstream, [True, False, True])
    torch.library.opcheck(torch.ops.moda_kernels.modular_losses_backward, arguments, test_utils=checks)
    spatial = [layers[0], layers[2]]
    pooled = [torch.ones(layer.shape[:2], device=device) for layer in spatial]
    torch.library.opcheck(torch.ops.moda_kernels.pool_backward, (spatial, pooled), test_utils=checks)
    for dy, dpooled in ((layers[2], pooled[1]), (None, pooled[1]), (layers[2], None)):
        arguments = (layers[2], dy, dpooled)
        torch.library.opcheck(torch.ops.moda_kernels.relu_pool_backward, arguments, test_utils=checks)


def test_ops_and_eager_agree_to_the_bit(device):
    layers, twins = _layers(device), _layers(device)
    for twin, layer in zip(twins, layers, strict=True):
        twin.data.copy_(layer.data)
    labels = torch.tensor([0, 1, 0, 2], device=device)
    through = torch.ops.moda_kernels.modular_losses(layers, labels)[:3]
    around = ops.grouped_losses(twins, labels)
    for a, b in zip(through, around, strict=True):
        assert torch.equal(a, b)
    gradients = torch.autograd.grad(2 * through[0] + through[2], layers)
    for a, b in zip(gradients, torch.autograd.grad(2 * around[0] + around[2], twins), strict=True):
        assert torch.equal(a, b)


class Net(nn.Module):
    """Two taps that pool while they rectify, one layer pooled by the losses, one (N, C) layer."""

    def __init__(self, inplace):
        super().__init__()
        self.first, self.second, self.third = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 6, 3), nn.Linear(6 * 4, 5)
        self.inplace = inplace

    def forward(self, x, labels):
        y, pooled = relu_pool(self.first(x), inplace=self.inplace, backend="triton")
        z = torch.relu(self.second(y))
        hidden = torch.relu(self.third(z.flatten(1)))
        again = pool([y], backend="triton")[0]
        losses = modular_losses([pooled, z, hidden, again], labels, backend="triton")
        return hidden.sum() * 0.01 + losses.affinity + 0.5 * losses.dispersion + 0.3 * losses.compactness


@pytest.mark.parametrize("inplace", [False, True])
def test_compiles_whole(inplace, triton_on):
    device = triton_on
    net = Net(inplace).to(device)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    for samples in (4, 6):  # the second traces a symbolic batch size
        x, labels = torch.randn(samples, 1, 6, 6, device=device), torch.arange(samples, device=device) % 2
        eager, traced = net(x, labels), compiled(x, labels)
        torch.testing.assert_close(traced, eager, rtol=1e-6, atol=1e-7)
        expected = torch.autograd.grad(eager, list(net.parameters()))
        for got, wanted in zip(torch.autograd.grad(traced, list(net.parameters())), expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-7)


def test_compiled_gradients_go_where_they_are_wanted(triton_on):
    device = triton_on
    labels = torch.tensor([0, 0, 1, 1], device=device)

    def loss(first, second):
        return sum(modular_losses([first, second], labels, backend="triton"))

    first, second = make_layers([(3, 2, 2), (5,)], 4, torch.float32, device)
    second.requires_grad_()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(first, second).backward()
    exact = second.detach().double().requires_grad_()
    sum(closed_form.grouped_losses([first.double(), exact], labels)).backward()
    torch.testing.assert_close(second.grad.double(), exact.grad, rtol=1e-5, atol=1e-7)
    assert first.grad is None
