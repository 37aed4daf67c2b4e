"""Modular training by every route and backend, in the conditions people train in, against the published loss.

Each condition trains the same network twice for a few steps: plain loop with the published formulas over activations that
forward hooks catch, and `observe` + `ModularLoss`. Losses of every step and final weights must agree to the dtype's tolerance.
"""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import moda
from moda.observation.taps import taps_of
from moda_kernels import ModularLoss, backends
from moda_kernels.reference import published_losses

CLASSES, STEPS = 4, 3
ROUTES = ["grouped", "fused", "auto"]
BACKENDS = ["torch", *(["native"] if backends()["native"] else []), "auto"]
DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.gpu)]


class Net(nn.Module):
    """Both kinds of layer, an in-place ReLU, a skip connection, a functional ReLU and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.conv2 = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
        self.hidden = nn.Linear(8 * 16, 16)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv1(x)
        x = F.max_pool2d(F.relu(self.conv2(x) + x), 2)
        return self.head(F.relu(self.hidden(x.flatten(1))))


def batches(device, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    for _ in range(STEPS):
        x = torch.randn(12, 3, 8, 8, generator=generator).to(device, dtype)
        yield x, torch.randint(CLASSES, (12,), generator=generator).to(device)


def optimizer_of(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)


def published_step(net, x, y):
    """Cross-entropy plus the published losses over what each ReLU gave, by plain code."""
    seen = []
    relu, net_relu = F.relu, net.conv1[2]

    def spy(value, inplace=False):
        seen.append(relu(value))
        return seen[-1]

    hook = net_relu.register_forward_hook(lambda module, args, output: seen.append(output.clone()))
    F.relu = torch.nn.functional.relu = spy
    net_relu.inplace = False
    try:
        logits = net(x)
    finally:
        F.relu = torch.nn.functional.relu = relu
        net_relu.inplace = True
        hook.remove()
    activations = seen[1:] if len(seen) == 4 else seen  # nn.ReLU calls F.relu: caught twice
    terms = published_losses(activations, y)
    return F.cross_entropy(logits.float() if logits.dtype != torch.float64 else logits, y) + sum(
        w * t for w, t in zip((1, 1, 0.3), terms, strict=True)
    )


def fast_step(taps, loss, x, y):
    logits = taps.model(x)
    logits = logits.float() if logits.dtype != torch.float64 else logits
    return F.cross_entropy(logits, y) + loss(taps.activations(), y)


def train(net, step, device, dtype, autocast=None, scaler=None):
    optimizer, losses = optimizer_of(net), []
    for x, y in batches(device, dtype):
        optimizer.zero_grad()
        with torch.autocast(device, dtype=autocast or torch.bfloat16, enabled=autocast is not None):
            value = step(x, y)
        losses.append(value.item())
        if scaler is None:
            value.backward()
            optimizer.step()
        else:
            scaler.scale(value).backward()
            scaler.step(optimizer)
            scaler.update()
    return losses, {key: value.detach().double() for key, value in net.state_dict().items()}


def make_net(device, dtype):
    torch.manual_seed(0)
    return Net().to(device, dtype)


def assert_same(got, expected, tolerance):
    assert got[0] == pytest.approx(expected[0], rel=tolerance, abs=tolerance)
    for key, value in expected[1].items():
        torch.testing.assert_close(got[1][key], value, rtol=tolerance, atol=tolerance, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-5)])
def test_plain_loop(route, backend, device, dtype, tolerance):
    reference, net = make_net(device, dtype), make_net(device, dtype)
    expected = train(reference, lambda x, y: published_step(reference, x, y), device, dtype)
    taps, loss = moda.observe(net, route=route), ModularLoss(backend=backend)
    got = train(net, lambda x, y: fast_step(taps, loss, x, y), device, dtype)
    assert_same(got, expected, tolerance)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_autocast(route, half, device):
    reference, net = make_net(device, torch.float32), make_net(device, torch.float32)

    def scaler():
        return torch.amp.GradScaler(device, init_scale=256.0) if half == torch.float16 else None

    expected = train(reference, lambda x, y: published_step(reference, x, y), device, torch.float32, half, scaler())
    taps, loss = moda.observe(net, route=route), ModularLoss()
    got = train(net, lambda x, y: fast_step(taps, loss, x, y), device, torch.float32, half, scaler())
    assert_same(got, expected, 3e-2 if half == torch.bfloat16 else 1e-2)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("route", ROUTES)
def test_channels_last(route, device):
    reference, net = make_net(device, torch.float64), make_net(device, torch.float64)
    expected = train(reference, lambda x, y: published_step(reference, x, y), device, torch.float64)
    net = net.to(memory_format=torch.channels_last)
    taps, loss = moda.observe(net, route=route), ModularLoss()
    got = train(
        net, lambda x, y: fast_step(taps, loss, x.to(memory_format=torch.channels_last), y), device, torch.float64
    )
    assert_same(got, expected, 1e-10)


@pytest.mark.parametrize("route", ROUTES)
def test_gradient_accumulation(route):
    """Gradients of two batches add up before a step: what autograd accumulates, not what a kernel overwrites."""
    reference, net = make_net("cpu", torch.float64), make_net("cpu", torch.float64)
    taps, loss = moda.observe(net, route=route), ModularLoss()
    for x, y in itertools.islice(batches("cpu", torch.float64), 2):
        published_step(reference, x, y).backward()
        fast_step(taps, loss, x, y).backward()
    for mine, theirs in zip(net.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("route", ROUTES)
def test_gradient_checkpointing(route):
    reference, net = make_net("cpu", torch.float64), make_net("cpu", torch.float64)
    taps, loss = moda.observe(net, route=route), ModularLoss()
    (x, y), *_ = batches("cpu", torch.float64)
    logits = torch.utils.checkpoint.checkpoint(net, x, use_reentrant=False)
    value = F.cross_entropy(logits, y) + loss(taps.activations(), y)
    expected = published_step(reference, x, y)
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    value.backward()
    expected.backward()
    for mine, theirs in zip(net.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-9, atol=1e-11)
    with pytest.raises(RuntimeError, match="no activations recorded"):  # recomputation left nothing alive
        taps.activations()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("route", ROUTES)
def test_compiled_step_without_a_graph_break(route, backend, device):
    reference, net = make_net(device, torch.float64), make_net(device, torch.float64)
    expected = train(reference, lambda x, y: published_step(reference, x, y), device, torch.float64)
    taps, loss = moda.observe(net, route=route), ModularLoss()
    step = torch.compile(lambda x, y: fast_step(taps, loss, x, y), fullgraph=True, backend=backend)
    assert_same(train(net, step, device, torch.float64), expected, 1e-9)


@pytest.mark.compiles
def test_compiled_by_inductor_on_the_cpu():
    reference, net = make_net("cpu", torch.float32), make_net("cpu", torch.float32)
    expected = train(reference, lambda x, y: published_step(reference, x, y), "cpu", torch.float32)
    taps, loss = moda.observe(net), ModularLoss()
    step = torch.compile(lambda x, y: fast_step(taps, loss, x, y), fullgraph=True)
    assert_same(train(net, step, "cpu", torch.float32), expected, 1e-4)


@pytest.mark.gpu
@pytest.mark.compiles
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_reduce_overhead(route, backend):
    reference, net = make_net("cuda", torch.float32), make_net("cuda", torch.float32)
    expected = train(reference, lambda x, y: published_step(reference, x, y), "cuda", torch.float32)
    taps, loss = moda.observe(net, route=route), ModularLoss(backend=backend)
    step = torch.compile(lambda x, y: fast_step(taps, loss, x, y), fullgraph=True, mode="reduce-overhead")
    assert_same(train(net, step, "cuda", torch.float32), expected, 1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("route", ROUTES)
def test_cuda_graph_of_the_whole_step(route):
    """Forward, loss, backward and optimiser in one captured graph; replayed, it trains as the eager loop does."""
    eager, captured = make_net("cuda", torch.float32), make_net("cuda", torch.float32)
    data = list(batches("cuda"))
    x, y = (tensor.clone() for tensor in data[0])

    def step(taps, loss, optimizer, inputs, labels):
        optimizer.zero_grad(set_to_none=False)
        value = fast_step(taps, loss, inputs, labels)
        value.backward()
        optimizer.step()
        return value

    taps, loss, optimizer = moda.observe(captured, route=route), ModularLoss(), optimizer_of(captured)
    start = copy.deepcopy(captured.state_dict())
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(taps, loss, optimizer, x, y)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value = step(taps, loss, optimizer, x, y)
    captured.load_state_dict(start)
    for state in optimizer.state.values():
        state["momentum_buffer"].zero_()
    taps_e, loss_e, optimizer_e = moda.observe(eager, route=route), ModularLoss(), optimizer_of(eager)
    for inputs, labels in data:
        x.copy_(inputs)
        y.copy_(labels)
        graph.replay()
        expected = step(taps_e, loss_e, optimizer_e, inputs, labels)
        assert value.item() == pytest.approx(expected.item(), rel=1e-4)


def test_moving_average_and_evaluation():
    """A deep copy in mid-training is a model of its own; evaluation records nothing and leaves training alone."""
    net = make_net("cpu", torch.float64)
    taps, loss = moda.observe(net, route="auto"), ModularLoss()
    average = copy.deepcopy(net)
    optimizer = optimizer_of(net)
    for x, y in batches("cpu", torch.float64):
        optimizer.zero_grad()
        fast_step(taps, loss, x, y).backward()
        optimizer.step()
        with torch.no_grad():
            for slow, fast in zip(average.parameters(), net.parameters(), strict=True):
                slow.lerp_(fast, 0.5)
        net.eval()
        with torch.no_grad():
            net(x)
        net.train()
    untouched = make_net("cpu", torch.float64)
    expected = train(untouched, lambda x, y: published_step(untouched, x, y), "cpu", torch.float64)[1]
    torch.testing.assert_close(
        dict(net.named_parameters())["head.weight"].detach(), expected["head.weight"], rtol=1e-9, atol=1e-11
    )
    assert not torch.equal(average.head.weight, net.head.weight)
    x, y = next(batches("cpu", torch.float64))
    assert fast_step(taps_of(average), loss, x, y).item() != fast_step(taps, loss, x, y).item()


def test_what_a_backend_calls_is_no_call_of_the_model(monkeypatch):
    """Backend torch computes a fused ReLU by ReLU functions, which are tapped where the model calls them."""
    nets = [make_net("cpu", torch.float64) for _ in range(2)]
    x, y = next(batches("cpu", torch.float64))
    counts = []
    for net, backend in zip(nets, ("auto", "torch"), strict=True):
        monkeypatch.setenv("MODA_BACKEND", backend)
        taps = moda.observe(net, route="fused", example=x)
        fast_step(taps, ModularLoss(), x, y).backward()
        net(x)
        counts.append(len(taps.activations()))
    assert counts == [3, 3]
    for expected, got in zip(*(net.parameters() for net in nets), strict=True):
        torch.testing.assert_close(got.grad, expected.grad, rtol=1e-10, atol=1e-12)
