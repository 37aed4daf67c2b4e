"""Batch norm and ReLU as one operation: where it is used, where the plain road is taken, and that numbers stay."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

import moda
from moda.observation import taps as taps_module
from moda.observation.deferred import Deferred, defer_module
from moda_kernels import ModularLoss, backends, native
from moda_kernels.batch_norm import BatchNorm

pytestmark = pytest.mark.skipif(not backends()["native"], reason="needs the native extension")


@pytest.fixture(autouse=True)
def fused(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Norms are fused whatever their size; the list has an entry per fused call, whether it had a residual."""
    calls: list[bool] = []
    run = native.norm_relu_pool

    def counted(x: Tensor, norm: BatchNorm) -> tuple[Tensor, Tensor]:
        calls.append(norm.residual is not None)
        return run(x, norm)

    monkeypatch.setattr(native, "norm_relu_pool", counted)
    monkeypatch.setattr(taps_module, "NORMS_FUSED_FROM_BYTES", 0)
    return calls


class Net(nn.Module):
    """A convolution and a norm, what `between` does with the norm's result, and a layer behind it."""

    def __init__(self, between: Callable[..., Tensor], norm: nn.Module | None = None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6) if norm is None else norm
        self.relu = nn.ReLU()
        self.inplace = nn.ReLU(inplace=True)
        self.relu6, self.hardswish = nn.ReLU6(inplace=True), nn.Hardswish()
        self.silu, self.gelu = nn.SiLU(inplace=True), nn.GELU()
        self.other = nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 4)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        y = self.between(self, self.norm(x), x)
        return self.head(y.mean((2, 3)))


def images(samples: int = 5) -> Tensor:
    return torch.randn(samples, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def step(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The output of a forward pass, and gradients and buffers afterwards."""
    model.zero_grad()
    y = model(x)
    (y * torch.arange(1.0, 5.0)).square().sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return y.detach(), found | {name: buffer.clone() for name, buffer in model.named_buffers()}


def compare(model: nn.Module, other: nn.Module, x: Tensor, *, exactly: bool = False) -> None:
    (y, numbers), (z, others) = step(model, x), step(other, x)
    torch.testing.assert_close(y, z, rtol=0 if exactly else 1e-4, atol=0 if exactly else 1e-5)
    assert numbers.keys() == others.keys()
    for name, number in numbers.items():
        # A convolution's bias in front of a norm has a gradient of rounding noise.
        atol = 0 if exactly else 1e-4 * max(1.0, float(others["head.weight"].abs().max()))
        torch.testing.assert_close(number, others[name], rtol=0 if exactly else 1e-3, atol=atol, msg=name)


def twins(between: Callable[..., Tensor], **settings: object) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model = Net(between, **settings).train()  # type: ignore[arg-type]
    return model, copy.deepcopy(model)


def add_in_place(net: Net, z: Tensor, x: Tensor) -> Tensor:
    z += x
    return net.inplace(z)


FUSED = {
    "module": (lambda net, z, x: net.relu(z), False),
    "module in place": (lambda net, z, x: net.inplace(z), False),
    "function": (lambda net, z, x: F.relu(z), False),
    "function in place": (lambda net, z, x: F.relu(z, inplace=True), False),
    "torch": (lambda net, z, x: torch.relu(z), False),
    "method": (lambda net, z, x: z.relu(), False),
    "method in place": (lambda net, z, x: z.relu_(), False),
    "sum": (lambda net, z, x: net.relu(z + x), True),
    "sum from the other side": (lambda net, z, x: F.relu(x + z), True),
    "torch.add": (lambda net, z, x: net.relu(torch.add(x, z)), True),
    "sum in place": (add_in_place, True),
    "method sum in place": (lambda net, z, x: net.inplace(z.add_(x)), True),
    "two norms": (lambda net, z, x: net.relu(z + net.other(x)), True),
    "ReLU6": (lambda net, z, x: net.relu6(z), False),
    "Hardswish": (lambda net, z, x: net.hardswish(z), False),
    "SiLU": (lambda net, z, x: net.silu(z), False),
    "GELU": (lambda net, z, x: net.gelu(z), False),
    "relu6": (lambda net, z, x: F.relu6(z), False),
    "hardswish in place": (lambda net, z, x: F.hardswish(z, True), False),
    "silu": (lambda net, z, x: F.silu(z), False),
    "gelu": (lambda net, z, x: F.gelu(z, approximate="none"), False),
    "sum, ReLU6": (lambda net, z, x: net.relu6(z + x), True),
    "asked for its shape": (lambda net, z, x: net.relu(z) if z.shape == x.shape and z.dim() == 4 else z, False),
}


@pytest.mark.parametrize("between", FUSED)
def test_fused_and_the_same_to_rounding(between: str, fused: list[bool]):
    function, residual = FUSED[between]
    plain, model = twins(function)
    taps = moda.accelerate(model, example=images(2))
    for _ in range(2):
        compare(model, plain, images())
    assert fused == [residual] * 2
    taps.remove()
    compare(model, plain, images())
    assert len(fused) == 2
    assert type(model.norm) is nn.BatchNorm2d


class NormAndActivation(nn.BatchNorm2d):
    """A norm with its activation inside, as timm has them, calls the function."""

    def __init__(self, activation: nn.Module, **settings: object) -> None:
        super().__init__(6, **settings)  # type: ignore[arg-type]
        self.drop, self.activation = nn.Identity(), activation

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        numbers = (self.running_mean, self.running_var, self.weight, self.bias)
        x = F.batch_norm(x, *numbers, training=self.training or self.running_mean is None, eps=self.eps, momentum=0.2)
        return self.activation(self.drop(x))


class NormOfFunctions(NormAndActivation):
    def forward(self, x: Tensor) -> Tensor:
        x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1, self.eps)
        return F.relu6(x)


CALLING = {
    "SiLU": lambda: NormAndActivation(nn.SiLU(inplace=True)),
    "ReLU": lambda: NormAndActivation(nn.ReLU()),
    "no running statistics": lambda: NormAndActivation(nn.GELU(), track_running_stats=False),
    "functions": lambda: NormOfFunctions(nn.Identity()),
}


@pytest.mark.parametrize("norm", CALLING)
def test_norms_that_are_called_as_functions(norm: str, fused: list[bool]):
    plain, model = twins(lambda net, z, x: z, norm=CALLING[norm]())
    kind = type(model.norm)
    taps = moda.accelerate(model, example=images(2))
    for _ in range(2):
        compare(model, plain, images())
    assert len(fused) == 2
    compare(copy.deepcopy(model), copy.deepcopy(plain), images())
    assert len(fused) == 3
    taps.remove()
    assert type(model.norm) is kind
    plain.load_state_dict(model.state_dict())
    compare(model, plain, images(), exactly=True)
    assert len(fused) == 3


def test_norms_called_as_functions_that_do_something_else_later_are_plain(fused: list[bool]):
    for change in (
        lambda net: setattr(net.norm, "activation", nn.ELU()),
        lambda net: setattr(net.norm, "drop", nn.Dropout(0.0)),
        lambda net: setattr(net.norm, "drop", nn.Sigmoid()),
        lambda net: net.norm.activation.register_forward_hook(lambda *_: None),
        lambda net: net.eval(),
    ):
        plain, model = twins(lambda net, z, x: z, norm=NormAndActivation(nn.SiLU()))
        moda.accelerate(model, example=images(2))
        for net in (plain, model):
            change(net)
        compare(model, plain, images(), exactly=True)
    assert not fused


def test_a_module_that_calls_several_norms_as_functions_is_left_alone(fused: list[bool]):
    def between(net: Net, z: Tensor, x: Tensor) -> Tensor:
        first = F.relu(F.batch_norm(x, None, None, training=True))
        return first + F.relu(F.batch_norm(x + 1, None, None, training=True))

    plain, model = twins(between)
    moda.accelerate(model, example=images(2))
    compare(model, plain, images(), exactly=True)
    assert not fused


@pytest.mark.parametrize("between", ["module", "function in place", "sum in place", "ReLU6", "SiLU", "gelu"])
def test_observed_with_the_loss(between: str, fused: list[bool]):
    plain, model = twins(FUSED[between][0])
    labels = torch.tensor([0, 1, 0, 1, 2])

    def losses(net: nn.Module, taps: moda.Taps) -> dict[str, Tensor]:
        net.zero_grad()
        y = net(images())
        (F.cross_entropy(y, labels) + ModularLoss()(taps.activations(), labels)).backward()
        return {"y": y.detach()} | {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}

    taps, exact = moda.observe(model, example=images(2)), moda.observe(plain, fuse_norms=False)
    ours, theirs = losses(model, taps), losses(plain, exact)
    assert len(fused) == 1
    assert taps.names == exact.names
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("route", ["grouped", "fused", "auto"])
def test_without_it_an_observed_model_is_the_plain_one_bit_for_bit(route: str, fused: list[bool]):
    plain, model = twins(FUSED["sum"][0])
    moda.observe(model, route=route, fuse_norms=False, example=images(2))
    compare(model, plain, images(), exactly=True)
    assert not fused


NORMS = {
    "cumulative": (lambda: nn.BatchNorm2d(6, momentum=None), torch.float32),
    "no affine": (lambda: nn.BatchNorm2d(6, affine=False), torch.float32),
    "no running statistics": (lambda: nn.BatchNorm2d(6, track_running_stats=False), torch.float32),
    "large eps": (lambda: nn.BatchNorm2d(6, eps=0.5, momentum=0.3), torch.float32),
    "float64": (lambda: nn.BatchNorm2d(6), torch.float64),
}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_settings_of_norms_and_layouts(norm: str, memory_format: torch.memory_format, fused: list[bool]):
    make, dtype = NORMS[norm]
    plain, model = (net.to(dtype) for net in twins(FUSED["sum"][0], norm=make()))
    moda.accelerate(model, example=images(2).to(dtype))
    for _ in range(3):
        compare(model, plain, images().to(dtype).contiguous(memory_format=memory_format))
    assert len(fused) == 3


@pytest.mark.parametrize(
    ("kind", "shape"), [(nn.BatchNorm1d, (9, 4)), (nn.BatchNorm1d, (5, 4, 7)), (nn.BatchNorm3d, (3, 4, 2, 3, 2))]
)
def test_other_dimensions(kind: type, shape: tuple[int, ...], fused: list[bool]):
    model = nn.Sequential(kind(4), nn.ReLU()).train()
    plain = copy.deepcopy(model)
    taps = moda.observe(model, example=torch.randn(shape))
    x = torch.randn(shape)
    y = model(x)
    (recorded,) = taps.activations()
    torch.testing.assert_close(y, plain(x), rtol=1e-5, atol=1e-5)
    expected = y if len(shape) == 2 else y.flatten(2).mean(2)
    torch.testing.assert_close(recorded, expected)
    assert len(fused) == 1


def test_autocast(fused: list[bool]):
    plain, model = twins(FUSED["sum"][0])
    moda.accelerate(model, example=images(2))
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = model(images()), plain(images())
    torch.testing.assert_close(y, expected, rtol=3e-2, atol=3e-2)
    torch.testing.assert_close(model.norm.running_var, plain.norm.running_var, rtol=1e-4, atol=1e-5)
    assert len(fused) == 1


@pytest.mark.parametrize("between", FUSED)
@pytest.mark.parametrize("route", ["auto", "grouped"])
def test_where_activations_are_replaced_in_evaluation_too(between: str, route: str, fused: list[bool]):
    function, residual = FUSED[between]
    plain, model = twins(function)
    step(plain, images())
    model.load_state_dict(plain.state_dict())
    taps = moda.observe(model.eval(), route=route)
    plain.eval()
    with taps.replacing(lambda _index, activation: activation * 2):
        doubled = model(images())
    assert not fused
    with taps.replacing(lambda _index, activation: activation * 2, fuse_norms=True):
        model(images())  # which may be the first pass that looks for norms
    del fused[:]
    with taps.replacing(lambda _index, activation: activation * 2, fuse_norms=True):
        torch.testing.assert_close(model(images()), doubled, rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            assert torch.equal(model(images()), doubled)
    assert fused == ([residual] if route == "auto" else [])
    with taps.replacing(lambda _index, activation: activation, fuse_norms=True):
        compare(model, plain, images())
    compare(model, plain, images(), exactly=True)  # and all else in evaluation is the plain model


@pytest.mark.parametrize("route", ["auto", "grouped"])
def test_attributions_are_those_of_the_plain_model(route: str, fused: list[bool]):
    plain, model = twins(FUSED["sum in place"][0])
    batches = [(images(4), torch.tensor([0, 1, 2, 3]))] * 3
    exact = moda.attribute(moda.observe(plain, fuse_norms=False), batches, 4, progress=False)
    assert not fused
    if route == "auto":
        moda.observe(model)
    found = moda.attribute(model, batches, 4, progress=False)
    assert fused == [True] * 2  # the first pass looks for norms
    for name, scores in exact.scores.items():
        torch.testing.assert_close(found.scores[name], scores, rtol=1e-4, atol=1e-6, msg=name)


def running_mean(net: Net, z: Tensor, x: Tensor) -> Tensor:
    net.norm.running_mean.zero_()
    return net.relu(z)


def test_norms_whose_running_statistics_the_model_writes_are_left_alone(fused: list[bool]):
    plain, model = twins(running_mean)
    taps = moda.observe(model.eval())
    for _ in range(2):
        with taps.replacing(lambda _index, activation: activation, fuse_norms=True):
            assert torch.equal(model(images()), plain.eval()(images()))
    assert not fused


def test_a_gradient_penalty(fused: list[bool]):
    plain, model = twins(FUSED["sum"][0])
    moda.accelerate(model, example=images(2))

    def penalty(net: nn.Module) -> list[Tensor]:
        x = images().requires_grad_()
        (gradient,) = torch.autograd.grad(net(x).square().sum(), x, create_graph=True)
        return list(torch.autograd.grad(gradient.square().sum(), [net.conv.weight, net.norm.weight]))

    for ours, theirs in zip(penalty(model), penalty(plain), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max()))
    assert len(fused) == 1


# ---- where the plain road is taken: bit for bit the plain model ---


def hooked(place: str, register: str) -> Callable[[nn.Module], object]:
    def change(model: nn.Module) -> object:
        return getattr(getattr(model, place), register)(lambda *_: None)

    return change


def replace_forward(model: nn.Module) -> None:
    model.norm.forward = type(model.norm).forward.__get__(model.norm)


def replace_norm(model: nn.Module) -> None:
    model.norm = nn.BatchNorm2d(6)


def replace_relu(model: nn.Module) -> None:
    model.relu = nn.ReLU6()


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    **{
        f"{register} of {place}": hooked(place, register)
        for place in ("norm", "relu")
        for register in ("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook")
    },
    "another forward": replace_forward,
    "another norm": replace_norm,
    "another activation": replace_relu,
    "frozen norm": lambda model: model.norm.eval(),
    "evaluation": lambda model: model.eval(),
    "all hooked": lambda model: register_module_forward_hook(lambda *_: None),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_has_changed_since_takes_the_plain_road(change: str, fused: list[bool]):
    plain, model = twins(FUSED["module"][0])
    moda.accelerate(model, example=images(2))
    compare(model, plain, images())
    plain.load_state_dict(model.state_dict())
    assert len(fused) == 1
    handles = [CHANGES[change](net) for net in (model, plain)]
    try:
        compare(model, plain, images(), exactly=True)
    finally:
        for handle in handles:
            if hasattr(handle, "remove"):
                handle.remove()
    assert len(fused) == 1


class Watching(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def under_mode(model: nn.Module) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        with Watching():
            return model(x)

    return run


def under_saving(model: nn.Module) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            return model(x)

    return run


@pytest.mark.parametrize(
    "run", [under_mode, under_saving, lambda model: lambda x: checkpoint(model, x, use_reentrant=False)]
)
def test_passes_that_others_look_at_take_the_plain_road(run, fused: list[bool]):
    plain, model = twins(FUSED["sum"][0])
    moda.accelerate(model, example=images(2))
    results = []
    for net in (model, plain):
        y = run(net)(images())
        y.square().sum().backward()
        results.append([y.detach(), *[p.grad for p in net.parameters() if p.grad is not None], *net.buffers()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert not fused


def test_compiled_models_take_the_plain_road(fused: list[bool]):
    plain, model = twins(FUSED["sum"][0])
    moda.accelerate(model, example=images(2))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(images()), plain(images()))
    assert not fused


def other_users(net: Net, z: Tensor, x: Tensor) -> Tensor:
    return net.relu(z) + z


def by_view(net: Net, z: Tensor, x: Tensor) -> Tensor:
    return net.relu(z.view(z.shape))


def after_scaling(net: Net, z: Tensor, x: Tensor) -> Tensor:
    return net.relu(2 * z)


def broadcast(net: Net, z: Tensor, x: Tensor) -> Tensor:
    return net.relu(z + x.mean((2, 3), keepdim=True))


def weighted(net: Net, z: Tensor, x: Tensor) -> Tensor:
    return net.relu(torch.add(z, x, alpha=2))


def overwritten_input(net: Net, z: Tensor, x: Tensor) -> Tensor:
    with torch.no_grad():
        x.data.add_(1)
    return net.relu(z)


def twice(net: Net, z: Tensor, x: Tensor) -> Tensor:
    return net.relu(net.norm(F.relu(z)))


def other_activation(net: Net, z: Tensor, x: Tensor) -> Tensor:
    return F.elu(z)


def approximated(net: Net, z: Tensor, x: Tensor) -> Tensor:
    return F.gelu(z, approximate="tanh")


def module_approximated(net: Net, z: Tensor, x: Tensor) -> Tensor:
    net.gelu.approximate = "tanh"
    return net.gelu(z)


def other_bounds(net: Net, z: Tensor, x: Tensor) -> Tensor:
    net.relu6.max_val = 1.0
    return net.relu6(z)


def overwritten_summand(net: Net, z: Tensor, x: Tensor) -> Tensor:
    added = x + 1
    y = net.silu(z + added)
    with torch.no_grad():
        added.mul_(2)  # the sum is what SiLU keeps
    return y


def statistics_read(net: Net, z: Tensor, x: Tensor) -> Tensor:
    spread = net.norm.running_var.mean().sqrt()
    return net.relu(z) * spread


@pytest.mark.parametrize(
    "between",
    [
        other_users, by_view, after_scaling, broadcast, weighted, twice, other_activation, statistics_read,
        approximated, module_approximated, other_bounds, overwritten_summand,
    ],
)  # fmt: skip
def test_norms_that_feed_more_or_something_else_are_left_alone(between, fused: list[bool]):
    plain, model = twins(between)
    moda.accelerate(model, example=images(2))
    compare(model, plain, images(), exactly=True)
    assert not fused


@pytest.mark.parametrize(
    "between",
    [other_users, by_view, after_scaling, broadcast, weighted, other_activation, approximated, module_approximated],
)
def test_control_flow_gets_the_plain_numbers(between, fused: list[bool]):
    """The first pass shows a norm that feeds a ReLU alone; the passes after it do something else."""
    plain, model = twins(FUSED["module"][0])
    moda.accelerate(model, example=images(2))
    for net in (model, plain):
        net.between = between
    for _ in range(2):
        compare(model, plain, images())
    assert fused == ([False] * 2 if between is other_users else [])  # its ReLU asks first


def drop(net: Net, z: Tensor, x: Tensor) -> Tensor:
    return net.relu(x)


def kept(net: Net, z: Tensor, x: Tensor) -> Tensor:
    net.__dict__["kept"] = z
    return F.silu(z)


def kept_summand(net: Net, z: Tensor, x: Tensor) -> Tensor:
    net.__dict__["kept"] = z
    return net.silu(z + x)


def test_a_gradient_of_a_result_that_is_gone_is_an_error_not_lost():
    _, model = twins(kept)
    moda.accelerate(model, example=images(2))
    loss = model(images()).sum()
    for ask in (lambda z: z.retain_grad(), lambda z: z.register_hook(print), lambda z: torch.autograd.grad(loss, z)):
        with pytest.raises(RuntimeError, match="gradient of a batch norm's result is asked for.*fuse_norms=False"):
            ask(model.kept)
    assert torch.equal(model.kept.relu(), model.kept.clamp_min(0))  # its values are there all the same


def test_a_result_that_the_activation_overwrote_has_its_gradient(fused: list[bool]):
    def overwritten(net: Net, z: Tensor, x: Tensor) -> Tensor:
        net.__dict__["kept"] = z
        F.relu(z, inplace=True)
        return z

    plain, model = twins(overwritten)
    moda.accelerate(model, example=images(2))
    gradients = [torch.autograd.grad(net(images()).square().sum(), net.kept)[0] for net in (model, plain)]
    torch.testing.assert_close(*gradients)
    assert len(fused) == 1


def test_a_gradient_of_a_result_that_was_computed_is_the_plain_one(fused: list[bool]):
    plain, model = twins(kept_summand)
    moda.accelerate(model, example=images(2))
    gradients = [torch.autograd.grad(net(images()).square().sum(), net.kept)[0] for net in (model, plain)]
    assert torch.equal(*gradients)
    assert not fused


class Both(Net):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        z = self.norm(self.conv(x))
        return F.silu(z), z


def test_results_that_leave_the_model_in_the_first_pass_are_left_alone(fused: list[bool]):
    model = Both(F.relu).train()
    moda.accelerate(model, example=images(2))
    y, z = model(images())
    assert torch.equal(y, F.silu(z))
    assert torch.autograd.grad(y.sum(), z)[0].shape == z.shape
    assert not fused


def test_results_that_hooks_see_in_the_first_pass_are_left_alone(fused: list[bool]):
    seen: list[Tensor] = []
    pair = twins(lambda net, z, x: F.silu(net.pool(z)))
    for net in pair:
        net.pool = nn.Identity()
        net.pool.register_forward_hook(lambda module, args, output: seen.append(output))
    plain, model = pair
    moda.accelerate(model, example=images(2))
    del seen[:]
    losses = [net(images()).square().sum() for net in (model, plain)]
    assert torch.equal(*losses)
    assert torch.equal(*[torch.autograd.grad(loss, z)[0] for loss, z in zip(losses, seen, strict=True)])
    assert not fused


def test_a_pass_that_fails_counts_its_batch():
    def stopping(net: Net, z: Tensor, x: Tensor) -> Tensor:
        if net.__dict__.get("stops"):
            raise StopIteration
        return F.relu(z)

    plain, model = twins(stopping)
    moda.accelerate(model, example=images(2))
    for net in (plain, model):
        net.__dict__["stops"] = True
        with pytest.raises(StopIteration):
            net(images())
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), plain.buffers(), strict=True))


def test_a_childs_norm_is_not_taken_for_its_parents(fused: list[bool]):
    def between(net: Net, z: Tensor, x: Tensor) -> Tensor:
        y = net.other(F.silu(F.batch_norm(x, None, None, training=True)))
        spread = net.other.running_var.mean()  # that they are read here keeps the child's norm plain
        return F.relu(y) * spread

    plain, model = twins(between)
    moda.accelerate(model, example=images(2))
    compare(model, plain, images())
    assert fused == [False]


def test_activations_that_are_overwritten_or_take_other_arguments(fused: list[bool]):
    def halved(net: Net, z: Tensor, x: Tensor) -> Tensor:
        return net.relu6(z + x).mul_(0.5)

    plain, model = twins(halved)
    moda.accelerate(model, example=images(2))
    compare(model, plain, images(), exactly=True)
    assert not fused
    plain, model = twins(lambda net, z, x: F.silu(z))
    moda.accelerate(model, example=images(2))
    model.between = lambda net, z, x: torch._C._nn.silu(z, out=torch.empty_like(x))
    with pytest.raises(RuntimeError, match="don't support automatic differentiation"):
        model(images())


def test_a_bias_may_change_before_backward_and_gradients_may_come_in_batches(fused: list[bool]):
    for activation in (F.relu, F.relu6, F.hardswish, F.silu, F.gelu):
        plain, model = twins(lambda net, z, x, activation=activation: activation(z))
        moda.accelerate(model, example=images(2))
        gradients = []
        for net in (model, plain):
            y = net(images())
            with torch.no_grad():
                net.norm.bias.add_(1)
            gradients.append(torch.autograd.grad(y.square().sum(), net.norm.bias)[0])
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)
        jacobians = [torch.autograd.functional.jacobian(net, images(2), vectorize=True) for net in (model, plain)]
        torch.testing.assert_close(*jacobians, rtol=1e-4, atol=1e-5)
    assert len(fused) == 10


def test_a_result_that_nobody_reads_still_counts_for_the_statistics():
    plain, model = twins(FUSED["module"][0])
    moda.accelerate(model, example=images(2))
    for net in (model, plain):
        net.between = drop
    compare(model, plain, images(), exactly=True)


class Features(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.relu = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()
        self.early = False

    def forward(self, x: Tensor) -> object:
        z = self.norm(self.conv(x))
        return {"early": z} if self.early else self.relu(z)


def test_a_result_that_leaves_the_model_is_a_plain_tensor():
    model = Features().train()
    moda.accelerate(model, example=images(2))
    model.early = True
    z = model(images())["early"]
    assert type(z) is Tensor
    expected = F.batch_norm(model.conv(images()), None, None, model.norm.weight, model.norm.bias, True)
    assert torch.equal(z, expected)
    assert z.requires_grad


def test_hooks_of_modules_around_it_see_plain_numbers(fused: list[bool]):
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), nn.ReLU()).train()
    plain = copy.deepcopy(model)
    moda.accelerate(model, example=images(2))
    kept: list[list[Tensor]] = [[], []]
    for net, seen in zip((model, plain), kept, strict=True):
        net[0].register_forward_hook(lambda _module, _args, output, seen=seen: seen.append(output))
        net(images()).sum().backward()
    (ours,), (theirs,) = kept
    assert torch.equal(ours * 1, theirs)
    assert torch.equal(torch.stack([ours])[0], theirs)
    torch.testing.assert_close(model[0][1].running_var, plain[0][1].running_var)
    assert fused == [False]


# ---- the deferred result itself ---


def deferred() -> tuple[Deferred, Tensor, nn.BatchNorm2d, nn.BatchNorm2d]:
    """A norm's deferred result and the plain one of its twin; the norms."""
    norm = nn.BatchNorm2d(3).train()
    plain = copy.deepcopy(norm)
    made = defer_module(norm, images())
    assert made is not None
    return made[0], plain(images()), norm, plain


def saved_and_loaded(value: Tensor) -> Tensor:
    file = io.BytesIO()
    torch.save(value.detach(), file)
    file.seek(0)
    return torch.load(file)


@pytest.mark.parametrize(
    "use",
    [
        lambda z: z * 2,
        lambda z: z.data,
        lambda z: z.detach(),
        lambda z: torch.cat([z, z]),
        lambda z: z[1:, :, ::2],
        lambda z: torch.from_numpy(z.detach().numpy()),
        lambda z: copy.deepcopy(z.detach()),
        saved_and_loaded,
        lambda z: F.interpolate(z, scale_factor=2),
        lambda z: torch.ops.aten.relu(z),
        lambda z: z.mul_(3),
        lambda z: z.to(torch.float64),
        lambda z: torch.tensor(z.tolist()),
        lambda z: torch.jit.script(nn.Sigmoid())(z * 1),
        lambda z: torch.tensor([len(str(z)), len(z), z.shape[0], z.stride()[0], z.numel(), int(z.is_contiguous())]),
    ],
)
def test_whatever_is_done_with_it_gives_the_plain_result(use: Callable[[Tensor], Tensor]):
    value, expected, _, _ = deferred()
    assert torch.equal(use(value), use(expected))


def test_it_has_the_plain_gradient_though_it_is_asked_without_one():
    value, expected, norm, plain = deferred()
    with torch.no_grad():
        value.mean()
    with torch.inference_mode():
        value.mean()
    assert value.requires_grad
    (ours,) = torch.autograd.grad((value * value).sum(), norm.weight)
    (theirs,) = torch.autograd.grad((expected * expected).sum(), plain.weight)
    assert torch.equal(ours, theirs)


def test_it_counts_once_however_often_it_is_read():
    value, expected, norm, plain = deferred()
    total = value + torch.ones_like(expected)
    assert torch.equal(total * 1, expected + 1)
    assert torch.equal(value * 1, expected)
    for ours, theirs in zip(norm.buffers(), plain.buffers(), strict=True):
        assert torch.equal(ours, theirs)


class Identity(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 1

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def test_a_function_of_the_users_own_raises_and_does_not_lose_the_gradient():
    value, _, _, _ = deferred()
    with pytest.raises(RuntimeError, match="fuse_norms=False"):
        Identity.apply(value).sum().backward()


def test_what_it_is_computed_from_must_not_change():
    value, _, norm, _ = deferred()
    with torch.no_grad():
        norm.weight.mul_(2)
    with pytest.raises(RuntimeError, match="overwritten in place.*fuse_norms=False"):
        value * 1


# ---- the handle ---


def test_accelerated_models_can_be_counted_copied_and_saved(fused: list[bool]):
    plain, model = twins(FUSED["module"][0])
    taps = moda.accelerate(model)
    model(images())
    rates = moda.count_firings(model, [(images(), torch.tensor([0, 1, 0, 1, 0]))], num_classes=2)
    assert {name: rate.shape for name, rate in rates.rates.items()} == {"relu": (2, 6)}
    with pytest.raises(RuntimeError, match="accelerated"):
        taps.activations()
    with pytest.raises(ValueError, match="accelerated already"):
        moda.observe(model)
    copied = copy.deepcopy(model)
    copied.train()(images())
    model.train()(images())
    assert len(fused) == 2
    file = io.BytesIO()
    torch.save(model.norm, file)
    file.seek(0)
    assert type(torch.load(file, weights_only=False)) is nn.BatchNorm2d
    taps.remove()
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]


def test_only_large_activations_are_fused(monkeypatch: pytest.MonkeyPatch, fused: list[bool]):
    monkeypatch.setattr(taps_module, "NORMS_FUSED_FROM_BYTES", 5 * 6 * 64 * 4)
    _, model = twins(FUSED["module"][0])
    moda.accelerate(model, example=images(2))
    model(images(4))
    assert not fused
    model(images(5))
    assert len(fused) == 1


def test_arguments():
    with pytest.raises(TypeError, match="fuse_norms: expected True or False, got int"):
        moda.observe(nn.ReLU(), fuse_norms=1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="model: expected"):
        moda.accelerate(3)  # type: ignore[arg-type]
    replacing = moda.observe(nn.ReLU()).replacing
    with (
        pytest.raises(TypeError, match="fuse_norms: expected True or False, got str"),
        replacing(print, fuse_norms="x"),
    ):
        pass


def test_one_value_per_neuron_is_pytorchs_error():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.ReLU()).train()
    moda.accelerate(model, example=torch.randn(4, 3))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        model(torch.randn(1, 3))


def test_empty_batches_and_nan(fused: list[bool]):
    plain, model = twins(FUSED["module"][0])
    moda.accelerate(model, example=images(2))
    assert model(images(0)).shape == plain(images(0)).shape == (0, 4)
    assert not fused
    for net in (plain, model):
        for buffer in net.buffers():
            buffer.zero_()
    x = images()
    x[0, 0, 0, 0] = torch.nan
    ours, theirs = step(model, x), step(plain, x)
    assert len(fused) == 1
    assert torch.equal(ours[0].isnan(), theirs[0].isnan())
    for name, value in theirs[1].items():
        assert torch.equal(ours[1][name].isnan(), value.isnan()), name
