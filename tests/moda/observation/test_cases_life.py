"""An observed model stays the user's: hooks, attributes, names, copies, files, exports, compilers."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

import moda
from moda.observation.taps import taps_of
from moda_kernels import ModularLoss
from tests.moda._helpers.observing import Trace

IMAGES, LABELS = torch.linspace(-1, 1, 4 * 3 * 64).view(4, 3, 8, 8).sin(), torch.tensor([0, 1, 0, 1])


class Block(nn.Module):
    """An activation module, a function, and things of the user's own."""

    note = "of the class"

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()
        self.head, self.extra = nn.Linear(8, 3), {"kept": [1, 2]}

    def features(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.gelu(self.features(x)).mean((2, 3)))


HOOKS = [
    "register_forward_hook",
    "register_forward_pre_hook",
    "register_full_backward_hook",
    "register_full_backward_pre_hook",
]


@pytest.mark.parametrize("route", ["auto", "grouped"])
@pytest.mark.parametrize("register", HOOKS)
@pytest.mark.parametrize("part", ["", "act", "conv", "head"])
@pytest.mark.parametrize("probed", [True, False])
def test_hooks_added_later_run_and_can_be_taken_away(part: str, register: str, route: Any, probed: bool) -> None:
    model = Block()
    taps = moda.observe(model, route=route, example=IMAGES if probed else None)
    calls: list[str] = []
    handle = getattr(model.get_submodule(part), register)(lambda *_: calls.append(part))
    x = IMAGES.clone().requires_grad_()
    model(x).sum().backward()
    taps.activations()
    assert calls == [part]
    handle.remove()
    model(x).sum().backward()
    taps.activations()
    assert calls == [part]


@pytest.mark.parametrize("route", ["auto", "grouped", "fused"])
def test_a_hook_that_changes_what_the_activation_gives(route: Any) -> None:
    model = Block().eval()
    taps = moda.observe(model, route=route, example=IMAGES)
    model.act.register_forward_hook(lambda _module, _args, output: output * 2)
    wanted = model.head(F.gelu(2 * F.relu(model.norm(model.conv(IMAGES)))).mean((2, 3)))
    assert torch.equal(model(IMAGES), wanted)
    taps.clear()


def test_what_the_class_and_the_object_have_is_still_there() -> None:
    model = Block()
    taps = moda.observe(model, example=IMAGES)
    assert type(model).__name__ == "Block"
    assert isinstance(model, Block)
    assert isinstance(model.act, nn.ReLU)
    assert model.note == "of the class"
    assert model.extra == {"kept": [1, 2]}
    assert torch.equal(model.features(IMAGES), model.act(model.norm(model.conv(IMAGES))))
    assert list(model.state_dict()) == list(Block().state_dict())
    assert repr(model) == repr(Block())
    assert [name for name, _ in model.named_modules()] == [name for name, _ in Block().named_modules()]
    taps.remove()


@pytest.mark.parametrize("move", ["torch.save", "pickle", "state_dict"])
def test_saved_it_is_the_plain_model(move: str) -> None:
    model = Block().eval()
    moda.observe(model, example=IMAGES)
    if move == "state_dict":
        back = Block().eval()
        back.load_state_dict(model.state_dict())
    elif move == "pickle":
        back = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        back = torch.load(file, weights_only=False)
    assert type(back) is Block
    assert type(back.act) is nn.ReLU
    assert Trace(back) == Trace(Block().eval())
    assert torch.equal(back(IMAGES), model(IMAGES))


def test_a_moving_average_of_the_model_has_its_own_taps() -> None:
    model = Block()
    taps = moda.observe(model, example=IMAGES)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    with torch.no_grad():
        model.conv.weight.add_(1)
    average.update_parameters(model)
    average.update_parameters(model)
    own = taps_of(average.module)
    assert own is not None
    assert own is not taps
    average(IMAGES)
    model(IMAGES)
    assert len(own.activations()) == len(taps.activations()) == 2


def test_a_copy_lives_on_when_the_original_is_plain_again() -> None:
    model = Block().eval()
    taps = moda.observe(model, example=IMAGES)
    clone = copy.deepcopy(model)
    taps.remove()
    assert Trace(model) == Trace(Block().eval())
    assert torch.equal(clone(IMAGES), model(IMAGES))
    own = taps_of(clone)
    assert own is not None
    assert len(own.activations()) == 2
    assert taps_of(model) is None


def test_observing_twice_is_an_error_and_observing_again_is_none() -> None:
    model = Block()
    taps = moda.observe(model)
    with pytest.raises(ValueError, match="observed already"):
        moda.observe(model)
    with pytest.raises(ValueError, match="observed already"):
        moda.observe(nn.Sequential(model))
    taps.remove()
    taps.remove()
    with pytest.raises(KeyError), moda.observe(model) as again:  # noqa: PT012
        model(IMAGES)
        assert again.names == ("act", "gelu")
        raise KeyError
    assert Trace(model) == Trace(Block())


def test_removed_between_forward_and_backward() -> None:
    plain = Block()
    model = copy.deepcopy(plain)
    taps = moda.observe(model)
    outputs = model(IMAGES)
    taps.remove()
    outputs.square().sum().backward()
    plain(IMAGES).square().sum().backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


@pytest.mark.parametrize("probed", [True, False])
def test_removed_within_a_forward_pass(probed: bool) -> None:
    plain, model = _twins(True)
    taps = moda.observe(model, fuse_norms=False, example=IMAGES if probed else None)
    hook = model.conv.register_forward_hook(lambda *_: taps.remove())
    assert torch.equal(model(IMAGES), plain(IMAGES))
    hook.remove()
    assert torch.equal(model(IMAGES), plain(IMAGES))
    assert Trace(model) == Trace(plain)


@pytest.mark.parametrize("act", [nn.GELU(), nn.ReLU(inplace=True), nn.Identity()], ids=repr)
def test_an_activation_module_is_exchanged_while_the_model_is_observed(act: nn.Module) -> None:
    model = Block().eval()
    taps = moda.observe(model, example=IMAGES)
    model.act = act
    wanted = model.head(F.gelu(act(model.norm(model.conv(IMAGES)))).mean((2, 3)))
    assert torch.equal(model(IMAGES), wanted)
    taps.clear()
    taps.remove()
    assert torch.equal(model(IMAGES), wanted)


NAMES = [
    "activations",
    "taps",
    "names",
    "graph",
    "code",
    "classes",
    "class",
    "import",
    "_logits",
    "remove",
    "0",
    "3x3",
    "a-b",
    'q"t',
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", [nn.ReLU, lambda: nn.Sequential(nn.Linear(8, 8), nn.SiLU())])
def test_any_name_of_a_submodule(name: str, kind: Callable[[], nn.Module]) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)
            self.add_module(name, kind())

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self._modules[name](torch.relu(self.a(x))))  # type: ignore[misc]

    model, x = Named(), torch.linspace(-1, 1, 24).view(4, 6)
    wanted = model(x)
    with moda.observe(model) as taps:
        assert torch.equal(model(x), wanted)
        assert len(taps.activations()) == 2
        assert len(set(taps.names)) == 2


# -- tracing, exporting, tensors without memory


def export(model: nn.Module) -> Callable[..., Any]:
    return torch.export.export(model, (IMAGES,)).module()


def trace(model: nn.Module) -> Callable[..., Any]:
    return torch.jit.trace(model, IMAGES)


def proxies(model: nn.Module) -> Callable[..., Any]:
    return make_fx(model)(IMAGES)


def fake(model: nn.Module) -> Callable[..., Any]:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        model(mode.from_tensor(IMAGES))
    return model


def flops(model: nn.Module) -> Callable[..., Any]:
    with FlopCounterMode(display=False) as counter:
        model(IMAGES)
    assert counter.get_total_flops() > 0
    return model


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("probed", [True, False])
@pytest.mark.parametrize("route", ["auto", "grouped", "fused"])
@pytest.mark.parametrize("way", [export, trace, proxies, fake, flops], ids=lambda way: way.__name__)
def test_exported_and_traced_it_is_the_plain_model(way: Any, route: Any, probed: bool) -> None:
    model = Block().eval()
    wanted, other = model(IMAGES), model(IMAGES * 0.5)
    taps = moda.observe(model, route=route, example=IMAGES if probed else None)
    made = way(model)
    assert torch.allclose(made(IMAGES), wanted, atol=1e-6)
    assert torch.allclose(made(IMAGES * 0.5), other, atol=1e-6)
    taps.clear()
    assert torch.equal(model(IMAGES), wanted)
    assert all(type(activation) is Tensor for activation in taps.activations())


def test_tensors_without_memory_are_seen_wherever_they_are_given() -> None:
    class OfDict(Block):
        def forward(self, batch: dict[str, list[Tensor]]) -> Tensor:
            return super().forward(batch["images"][0])

    model = OfDict().eval()
    taps = moda.observe(model, example=({"images": [IMAGES]},))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        images = mode.from_tensor(IMAGES)
    model({"images": [images]})  # such a tensor brings its mode along
    assert not taps.recorded


# -- functional transforms


def test_functional_calls_and_gradients_of_functions() -> None:
    model = Block().eval()
    parameters = {name: value.detach() for name, value in model.named_parameters()}

    def loss(values: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, values, (x,)).square().sum()

    wanted = torch.func.grad(loss)(parameters, IMAGES)
    each = torch.vmap(torch.func.grad(lambda p, x: loss(p, x[None])), (None, 0))(parameters, IMAGES)
    for route in ("auto", "grouped", "fused"):
        with moda.observe(model, route=route, example=IMAGES):  # type: ignore[arg-type]
            got = torch.func.grad(loss)(parameters, IMAGES)
            got_each = torch.vmap(torch.func.grad(lambda p, x: loss(p, x[None])), (None, 0))(parameters, IMAGES)
        assert all(torch.equal(got[name], wanted[name]) for name in wanted)
        assert all(torch.allclose(got_each[name], each[name], atol=1e-6) for name in each)


# -- compilers


@pytest.mark.parametrize("fullgraph", [True, False])
@pytest.mark.parametrize("route", ["auto", "grouped"])
def test_compiled_steps_give_the_eager_numbers(route: Any, fullgraph: bool) -> None:
    torch._dynamo.reset()
    model = Block().eval()
    taps, loss = moda.observe(model, route=route, example=IMAGES), ModularLoss(backend="torch")

    def step(x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        outputs = model(x)
        return outputs, outputs.square().sum() + loss(taps.activations(), labels)

    compiled = torch.compile(step, fullgraph=fullgraph, backend="aot_eager")
    for x, labels in ((IMAGES, LABELS), (torch.cat([IMAGES, -IMAGES]), torch.cat([LABELS, LABELS]))):
        results = []
        for each in (step, compiled):
            model.zero_grad(set_to_none=True)
            outputs, total = each(x, labels)
            total.backward()
            results.append([outputs, total, *(p.grad for p in model.parameters())])
        assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(*results, strict=True))
    torch._dynamo.reset()


def test_what_is_compiled_is_the_plain_model_again_after_remove() -> None:
    torch._dynamo.reset()
    model = Block().eval()
    wanted = model(IMAGES)
    taps = moda.observe(model, example=IMAGES)
    compiled = torch.compile(model, backend="eager")
    assert torch.allclose(compiled(IMAGES), wanted, atol=1e-6)
    assert len(taps.activations()) == 2
    taps.remove()
    assert torch.allclose(compiled(IMAGES), wanted, atol=1e-6)
    assert torch.allclose(torch.compile(model, fullgraph=True, backend="eager")(IMAGES), wanted, atol=1e-6)
    torch._dynamo.reset()


class Calls(TorchFunctionMode):
    """Notes what is called, and puts a number in the place of every ReLU of a module."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(getattr(func, "__name__", str(func)))
        result = func(*args, **(kwargs or {}))
        return result * 2 if func is F.relu else result


@pytest.mark.parametrize("route", ["auto", "grouped", "fused"])
@pytest.mark.parametrize("training", [True, False])
def test_modes_of_the_users_see_every_call(route: Any, training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moda.observation.taps.NORMS_FUSED_FROM_BYTES", 0)
    plain, model = _twins(training)
    with Calls() as calls:
        wanted = plain(IMAGES)
    taps = moda.observe(model, route=route, example=IMAGES)
    with Calls() as observed:
        got = model(IMAGES)
    assert torch.equal(got, wanted)
    called = [name for name in observed.names if name in calls.names]  # observation asks tensors of its own besides
    assert [name for name in called if name in ("relu", "gelu", "conv2d")] == ["conv2d", "relu", "gelu"]
    activation, _ = taps.activations()
    assert torch.equal(activation, 2 * F.relu(plain.norm(plain.conv(IMAGES))))


def _twins(training: bool) -> tuple[Block, Block]:
    model = Block().train(training)
    return model, copy.deepcopy(model)


@pytest.mark.parametrize("route", ["auto", "grouped", "fused"])
@pytest.mark.parametrize("training", [True, False])
def test_a_device_for_new_tensors_is_no_mode_that_sees_calls(route: Any, training: bool) -> None:
    model = Block().train(training)
    taps = moda.observe(model, route=route, fuse_norms=False, example=IMAGES)
    model(IMAGES)
    shapes = [activation.shape for activation in taps.activations()]
    with torch.device("cpu"):
        model(IMAGES)
    assert [activation.shape for activation in taps.activations()] == shapes


REPLACED: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "forward of a class": (nn.ReLU, "forward", lambda module, x: x.clamp(min=0) * 2),
    "function of a class": (F, "relu", lambda x, inplace=False: x.clamp(min=0) * 2),
    "norm of a class": (nn.BatchNorm2d, "forward", lambda module, x: x * 3),
    "call of all modules": (
        nn.Module,
        "__call__",
        lambda module, *args: module._wrapped_call_impl(*args) * (2 if isinstance(module, nn.ReLU) else 1),
    ),
}


@pytest.mark.parametrize("route", ["auto", "grouped", "fused"])
@pytest.mark.parametrize("name", REPLACED)
def test_what_somebody_puts_in_the_place_of_pytorch_s_own_runs(
    name: str, route: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moda.observation.taps.NORMS_FUSED_FROM_BYTES", 0)
    plain, model = _twins(True)
    with moda.observe(model, route=route, example=IMAGES) as taps:
        monkeypatch.setattr(*REPLACED[name])
        assert torch.equal(model(IMAGES), plain(IMAGES))
        taps.clear()
