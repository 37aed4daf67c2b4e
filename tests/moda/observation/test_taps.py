"""Which calls are tapped, by what names, and what the taps record and overwrite."""

from __future__ import annotations

import copy
import gc
import re
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import models

from moda.observation.taps import observe
from tests.moda._helpers.tapping import Lambda, images, small_cnn, spied

ZOO = {
    "resnet18": (17, 32, ("relu", "layer1.0.relu", "layer1.0.relu_1", "layer1.1.relu", "layer1.1.relu_1")),
    "densenet121": (121, 32, ("features.relu0", "features.denseblock1.denselayer1.relu1")),
    "mobilenet_v3_small": (33, 32, ("features.0.2", "features.1.block.0.2", "features.1.block.1.activation")),
}


@pytest.mark.parametrize("name", ZOO)
def test_activations_of_a_zoo_model_are_what_its_activation_functions_give(name: str) -> None:
    count, size, first_names = ZOO[name]
    model = models.get_model(name, num_classes=5).eval()
    x = images(2, size)
    expected = spied(model, x)
    taps = observe(model, route="grouped")
    model(x)
    seen = taps.activations()
    assert len(seen) == len(taps.names) == len(set(taps.names)) == count
    assert taps.names[: len(first_names)] == first_names
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+", name) for name in taps.names)
    assert all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True))


def test_gradients_through_activations_equal_those_of_hooks() -> None:
    torch.manual_seed(3)
    model = models.resnet18(num_classes=3).double()
    plain, taps = copy.deepcopy(model), observe(model, route="grouped")
    x = images(2, 32).double()
    y = model(x)
    loss = y.logsumexp(1).sum() + sum((a.abs().mean() * (i + 1) for i, a in enumerate(taps.activations())))
    loss.backward()
    outputs: list[Tensor] = []
    for module in plain.modules():
        if isinstance(module, nn.ReLU):
            module.register_forward_hook(lambda _m, _i, out: outputs.append(out))
    y = plain(x)
    other = y.logsumexp(1).sum() + sum((a.abs().mean() * (i + 1) for i, a in enumerate(outputs)))
    other.backward()
    torch.testing.assert_close(loss, other, rtol=1e-10, atol=1e-10)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-8, atol=1e-8)


FORMS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "F.relu": ("relu", F.relu),
    "F.relu inplace": ("relu", lambda x: F.relu(x, inplace=True)),
    "F.relu inplace by position": ("relu", lambda x: F.relu(x, True)),
    "F.relu_": ("relu", F.relu_),
    "torch.relu": ("relu", torch.relu),
    "torch.relu_": ("relu", torch.relu_),
    "method": ("relu", lambda x: x.relu()),
    "method in place": ("relu", lambda x: x.relu_()),
    "keyword": ("relu", lambda x: F.relu(input=x)),
    "relu6": ("relu6", F.relu6),
    "leaky_relu": ("leaky_relu", lambda x: F.leaky_relu(x, 0.2, inplace=True)),
    "elu": ("elu", F.elu),
    "selu": ("selu", torch.selu_),
    "celu": ("celu", F.celu),
    "gelu": ("gelu", lambda x: F.gelu(x, approximate="tanh")),
    "silu": ("silu", lambda x: F.silu(x, inplace=True)),
    "mish": ("mish", F.mish),
    "hardswish": ("hardswish", F.hardswish),
    "softplus": ("softplus", F.softplus),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_an_activation_function_is_tapped(form: str) -> None:
    name, function = FORMS[form]
    model = Lambda(function)
    x = images()
    expected = function(model.conv(x))
    taps = observe(model, route="grouped")
    y = model(x)
    (seen,) = taps.activations()
    assert taps.names == (name,)
    assert torch.equal(seen, expected)
    assert torch.equal(y, expected.flatten(1))


@pytest.mark.parametrize(
    "kind", [nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus]
)
def test_activation_modules_are_tapped(kind: type[nn.Module]) -> None:
    model = nn.Sequential(nn.Linear(3, 4), kind(), nn.Linear(4, 2))
    x = torch.randn(5, 3)
    expected = model[1](model[0](x))
    taps = observe(model)
    model(x)
    (seen,) = taps.activations()
    assert taps.names == ("1",)
    assert torch.equal(seen, expected)


def test_gates_are_no_taps() -> None:
    gates = nn.Sequential(nn.Linear(3, 3), nn.Sigmoid(), nn.Hardsigmoid(), nn.Tanh(), nn.Softmax(1))
    with pytest.raises(ValueError, match="model: found no call of an activation function to tap"):
        observe(gates, example=torch.randn(2, 3))


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 3, 1)
        self.relu = nn.ReLU()
        self.add_module("a/b c", nn.ReLU())
        self.block = Lambda(F.relu)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.relu(self.first(x)) - 1)
        return self.block(self.relu(self._modules["a/b c"](x) - 1))


def test_names_are_paths_made_unique_and_safe() -> None:
    for _ in range(2):
        assert observe(Named(), example=images()).names == ("relu", "relu_1", "a_b_c", "relu_2", "block.relu")


def test_a_hook_of_a_relu_fires_and_is_seen() -> None:
    model = small_cnn()
    model[2].register_forward_hook(lambda _m, _i, out: out * 2)
    taps = observe(model)
    x = images()
    model(x)
    torch.testing.assert_close(taps.activations()[0], 2 * F.relu(copy.deepcopy(model[1]).train()(model[0](x))))


def test_activations_are_handed_over_once() -> None:
    taps = observe(small_cnn(), route="grouped")
    taps.model(images())
    assert [tuple(a.shape) for a in taps.activations()] == [(4, 6, 6, 6), (4, 5, 4, 4), (4, 7)]
    with pytest.raises(RuntimeError, match=r"no activations recorded: .* inside `with taps\.recording\(\):`"):
        taps.activations()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_only_recording_records(mode: Callable[[], object]) -> None:
    taps = observe(small_cnn())
    with mode():
        taps.model(images())
        assert not taps.recorded
        with taps.recording(), taps.recording():
            taps.model(images())
            assert len(taps.activations()) == 3
        taps.model(images())
        assert not taps.recorded


def test_activations_die_with_the_step() -> None:
    taps = observe(small_cnn(), example=images())
    gc.collect()
    gc.disable()  # by reference counting alone: no cycle may hold them
    try:
        loss = taps.model(images()).sum()
        seen = taps.activations()
        alive = [weakref.ref(a) for a in seen]
        loss = loss + sum(a.abs().mean() for a in seen)
        loss.backward()
        del loss, seen
        assert [ref() for ref in alive] == [None] * 3
    finally:
        gc.enable()


def test_a_receiver_gets_every_activation_at_once_and_nothing_is_kept() -> None:
    taps = observe(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2), nn.ReLU()))
    x, received = torch.randn(5, 3), list[tuple[int, Tensor]]()
    with torch.no_grad(), taps.recording(lambda index, activation: received.append((index, activation))):
        taps.model(x)
        with taps.recording():  # an inner block keeps again
            taps.model(x)
        expected = taps.activations()
        assert not taps.recorded
    assert [index for index, _ in received] == [0, 1]
    assert all(torch.equal(mine, theirs) for (_, mine), theirs in zip(received, expected, strict=True))
    message = r"receiver: expected a function of \(index, activation\), got int"
    with pytest.raises(TypeError, match=message), taps.recording(3):  # type: ignore[arg-type]
        pass


# ---- overwriting ----------------------------------------------------------------------------------------------


class Spare(nn.Module):
    """ReLUs whose input somebody else sees, and two whose input nobody does; notes what they are given."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.flat, self.linear = nn.Flatten(), nn.Linear(4, 4)
        self.given: list[Tensor] = []

    def rectified(self, x: Tensor) -> Tensor:
        self.given.append(x.detach().clone())
        y = F.relu(x)
        self.overwritten.append(x.data_ptr() == y.data_ptr())
        return y

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        self.overwritten: list[bool] = []
        given = self.rectified(x)  # the caller's
        y = F.relu(self.norm(self.conv(given)))  # spare
        kept = self.conv(given)  # used again below
        z = y + self.rectified(kept) + kept
        rows = self.flat(z.mean((2, 3)))
        return rows, self.linear(self.rectified(rows))  # returned, and a view


def test_overwriting_changes_only_what_nobody_else_sees() -> None:
    torch.manual_seed(0)
    model, x = Spare().eval(), torch.randn(2, 3, 5, 5)
    given = x.clone()
    with torch.no_grad():
        expected = model(x)
        taps = observe(model, example=x)
        with taps.recording():
            model(given)
        seen = taps.activations()
        with taps.overwriting(), taps.recording():
            found = model(given)
        for mine, theirs in zip([*found, *taps.activations()], [*expected, *seen], strict=True):
            assert torch.equal(mine, theirs)
        assert model.overwritten == [False, False, False]
    assert torch.equal(given, x)


def test_a_relu_overwrites_what_was_made_for_it_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU()).eval(), torch.randn(2, 3)
    taps, made = observe(model, example=x), list[Tensor]()
    linear = F.linear

    def noting(*args: Tensor) -> Tensor:
        made.append(linear(*args))
        return made[-1]

    monkeypatch.setattr(F, "linear", noting)
    with torch.no_grad():
        y = model(x)
        assert y.data_ptr() != made[-1].data_ptr()
        with taps.overwriting():
            again = model(x)
        assert again.data_ptr() == made[-1].data_ptr()
    assert torch.equal(y, again)


def test_global_hooks_see_values_as_they_were() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    nn.init.constant_(model[0].bias, -9.0)
    taps, seen = observe(model, example=torch.zeros(2, 3)), list[Tensor]()

    def look(module: nn.Module, _inputs: object, output: Tensor) -> None:
        if isinstance(module, nn.Linear):
            seen.append(output)

    with nn.modules.module.register_module_forward_hook(look), torch.no_grad(), taps.overwriting():
        model(torch.zeros(2, 3))
    assert (seen[0] == -9).all()
