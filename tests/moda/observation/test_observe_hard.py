"""Observation where models are compiled, checkpointed, exported, transformed, differentiated twice and fed nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import moda
from moda_kernels import ModularLoss

LABELS = torch.tensor([0, 1, 0, 1])


def modules() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.GELU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(4, 2),
    )  # fmt: skip


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x)).mean((2, 3)))


MAKERS: dict[str, Callable[[], nn.Module]] = {"modules": modules, "functions": Functional}


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MAKERS[name]()


def images(count: int = 4) -> Tensor:
    return torch.randn(count, 3, 8, 8)


@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("route", ["grouped", "fused", "auto"])
@pytest.mark.parametrize("name", MAKERS)
def test_a_step_compiles_whether_the_model_was_probed_or_not(name: str, route: str, fullgraph: bool) -> None:
    torch._dynamo.reset()
    x = images()
    for probed in (False, True):
        model, other = made(name), made(name)
        taps = moda.observe(model, route=route, example=x if probed else None)
        plain = moda.observe(other, route="grouped")
        loss = ModularLoss()

        def step(x: Tensor, model=model, taps=taps, loss=loss) -> Tensor:  # type: ignore[no-untyped-def]
            return model(x).sum() + loss(taps.activations(), LABELS)

        compiled = torch.compile(step, backend="aot_eager", fullgraph=fullgraph)
        for _ in range(2):
            expected = other(x).sum() + loss(plain.activations(), LABELS)
            torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-5)
        for a, b in zip(model.buffers(), other.buffers(), strict=True):
            torch.testing.assert_close(a, b)


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.block = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3))
        self.head, self.reentrant = nn.Linear(4, 2), reentrant

    def part(self, x: Tensor) -> Tensor:
        return F.relu(self.block(x))

    def forward(self, x: Tensor) -> Tensor:
        h = self.part(x) if self.reentrant is None else checkpoint(self.part, x, use_reentrant=self.reentrant)
        return self.head(h.mean((2, 3)))


@pytest.mark.parametrize("route", ["grouped", "fused"])
@pytest.mark.parametrize("where", ["inside", "outside"])
def test_checkpointing_changes_no_gradient(where: str, route: str) -> None:
    x, results = images(), []
    for checkpointed in (False, True):
        model = Checkpointed(False if checkpointed and where == "inside" else None)
        taps = moda.observe(model, route=route)
        for _ in range(2):
            model.zero_grad()
            run = checkpointed and where == "outside"
            y = checkpoint(model, x, use_reentrant=False) if run else model(x)
            (y.sum() + ModularLoss()(taps.activations(), LABELS)).backward()
            assert not taps.recorded
        results.append([parameter.grad for parameter in model.parameters()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_a_reentrant_checkpoint_is_an_error_and_not_a_loss_without_gradient() -> None:
    model = Checkpointed(True)
    taps = moda.observe(model)
    for _ in range(2):
        model(images().requires_grad_()).sum().backward()
        with pytest.raises(RuntimeError, match="use_reentrant=False"):
            taps.activations()


@pytest.mark.parametrize("route", ["grouped", "fused", "auto"])
def test_a_gradient_penalty_is_that_of_the_plain_model(route: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))

    def penalty() -> Tensor:
        x = torch.linspace(-1, 1, 150).view(2, 3, 5, 5).requires_grad_()
        (gradient,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        (gradient.square().sum() - 1).square().backward()
        result = model[0].weight.grad
        model.zero_grad()
        return result

    expected = penalty()
    moda.observe(model, route=route)
    for _ in range(2):
        assert torch.equal(penalty(), expected)


@pytest.mark.parametrize("name", MAKERS)
def test_exported_and_traced_it_is_the_plain_model_and_records_nothing(name: str) -> None:
    x, other = images(), images()
    model, plain = made(name).eval(), made(name).eval()
    taps = moda.observe(model, example=x)
    exported = torch.export.export(model, (x,))
    assert str(exported.graph) == str(torch.export.export(plain, (x,)).graph)
    for traced in (torch.jit.trace(model, (x,)), torch.fx.symbolic_trace(model), make_fx(model)(x)):
        torch.testing.assert_close(traced(other), plain(other))
    assert not taps.recorded
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        model(mode.from_tensor(x))
    parameters = {key: value.detach() for key, value in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], image: Tensor) -> Tensor:
        return functional_call(model, parameters, (image[None],)).sum()

    vmap(grad(loss), (None, 0))(parameters, x)
    assert not taps.recorded
    assert torch.equal(model(x), plain(x))


def test_empty_batches_first_and_later() -> None:
    model = modules().eval()
    taps = moda.observe(model)
    for count in (0, 4, 0):
        model(images(count))
        assert [value.shape[0] for value in taps.activations()] == [count, count]
        assert taps.names == ("2", "4")


def test_two_passes_before_one_loss_are_an_error_or_added() -> None:
    model = modules()
    taps = moda.observe(model, route="grouped")
    a, b = images(), images(2)
    model(a)
    first = taps.activations()
    model(b)
    second = taps.activations()
    assert [value.shape[0] for value in (*first, *second)] == [4, 4, 2, 2]
    model(a)
    model(b)
    with pytest.raises(RuntimeError, match="two forward passes were recorded"):
        taps.activations()
    model.eval()
    model(a)
    with torch.no_grad():
        model(b)  # not recorded: leaves the record alone
    assert taps.activations()[0].shape[0] == 4
    with taps.adding():
        model(a)
        model(b)
    together = taps.activations()
    model(torch.cat([a, b]))
    for value, expected in zip(together, taps.activations(), strict=True):
        torch.testing.assert_close(value, expected)


def test_a_record_that_was_overwritten_is_an_error_with_its_name() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Identity())
    taps = moda.observe(model)
    model(torch.randn(2, 3))
    taps.clear()
    y = model(torch.randn(2, 3))
    with torch.no_grad():
        y.mul_(2)
    with pytest.raises(RuntimeError, match="activation '1' was overwritten in place"):
        taps.activations()


def test_channels_last_and_autocast() -> None:
    model = modules().to(memory_format=torch.channels_last).eval()
    plain = copy.deepcopy(model)
    taps = moda.observe(model)
    x = images().to(memory_format=torch.channels_last)
    for _ in range(2):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y, other = model(x), plain(x)
        assert torch.equal(y, other)
        assert torch.isfinite(ModularLoss()(taps.activations(), LABELS))


def test_lazy_modules_are_made_by_the_probe() -> None:
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(5), nn.ReLU())
    taps = moda.observe(model)
    model(images())
    assert taps.names == ("1", "4")
    assert [value.shape[1] for value in taps.activations()] == [4, 5]
