"""The user's own code always runs: calls and settings that differ from those of the first forward pass, compared with the plain
model, bit for bit. What one forward can hold is in the zoo; here is what happens between one forward and the next."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moda
from moda_kernels import ModularLoss
from tests.moda._helpers.observing import Trace, assert_same_pass, one_pass

X, Y = torch.linspace(-1, 1, 24).view(4, 6), torch.tensor([0, 1, 0, 1])
IMAGES = torch.linspace(-1, 1, 4 * 3 * 64).view(4, 3, 8, 8).sin()


class Optional(nn.Module):
    """Every kind of argument with a default."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3)
        self.frozen = False

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        scale: float = 1.0,
        *,
        how: str = "relu",
        rounds: int = 1,
        norm: bool = True,
        features: bool = False,
    ) -> Any:
        with torch.set_grad_enabled(not self.frozen and torch.is_grad_enabled()):
            h = F.relu(self.a(x))
        for _ in range(rounds):
            h = getattr(F, how)(h - 0.05)
        if norm:
            h = self.norm(h)
        if mask is not None:
            h = h * mask
        logits = self.b(h * scale)
        return {"logits": logits, "features": h} if features else logits


CALLS: dict[str, dict[str, Any]] = {
    "a mask": {"mask": torch.linspace(0, 1, 8)},
    "another number": {"scale": 0.25},
    "another function": {"how": "gelu"},
    "more rounds": {"rounds": 3},
    "no rounds": {"rounds": 0},
    "a branch left out": {"norm": False},
    "another kind of output": {"features": True},
}


@pytest.mark.parametrize("route", ["auto", "grouped"])
@pytest.mark.parametrize("call", CALLS)
def test_a_later_call_with_other_arguments_is_the_plain_model_s(call: str, route: Any) -> None:
    plain, model = twins(Optional)
    taps = moda.observe(model, route=route)
    for arguments in ({}, CALLS[call], {}):
        wanted = one_pass(plain, ((X,), arguments), 0)
        assert_same_pass(one_pass(model, ((X,), arguments), 0, lambda: check_loss(taps, model)), wanted)


@pytest.mark.parametrize("first", CALLS)
def test_a_first_call_with_other_arguments_says_nothing_about_later_ones(first: str) -> None:
    plain, model = twins(Optional)
    taps = moda.observe(model)
    for arguments in (CALLS[first], {}, CALLS[first]):
        wanted = one_pass(plain, ((X,), arguments), 0)
        assert_same_pass(one_pass(model, ((X,), arguments), 0, lambda: check_loss(taps, model)), wanted)


def freeze(model: Any) -> None:
    model.frozen = True


def freeze_weights(model: Any) -> None:
    model.a.requires_grad_(False)


def load(model: nn.Module) -> None:
    model.load_state_dict({name: value * 0.5 for name, value in model.state_dict().items()})


def overwrite(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)


def reassign(model: Any) -> None:
    model.a.weight = nn.Parameter(torch.full_like(model.a.weight, 0.1))


CHANGES = [freeze, freeze_weights, load, overwrite, reassign, nn.Module.eval]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_the_model_changes_after_the_first_forward(change: Callable[[nn.Module], Any]) -> None:
    plain, model = twins(Optional)
    taps = moda.observe(model)
    for changing in (False, True, False):
        if changing:
            change(plain), change(model)
        wanted = one_pass(plain, ((X,), {}), 0)
        assert_same_pass(one_pass(model, ((X,), {}), 0, lambda: check_loss(taps, model)), wanted)


class Convolutional(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3), nn.GELU(),
            nn.Dropout(0.2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3),
        )  # fmt: skip


INPUTS: dict[str, Tensor] = {
    "more samples": torch.cat([IMAGES, IMAGES * 2]),
    "one sample": IMAGES[:1],
    "larger images": F.interpolate(IMAGES, 12),
    "channels last": IMAGES.to(memory_format=torch.channels_last),
    "not contiguous": IMAGES.transpose(2, 3),
    "a gradient wanted": IMAGES.clone().requires_grad_(),
    "expanded": IMAGES[:1].expand(4, -1, -1, -1),
}


@pytest.mark.parametrize("route", ["auto", "grouped"])
@pytest.mark.parametrize("inputs", INPUTS)
def test_a_later_batch_of_another_shape_or_layout(inputs: str, route: Any) -> None:
    plain, model = twins(Convolutional)
    taps = moda.observe(model, route=route)
    for x in (IMAGES, INPUTS[inputs], IMAGES):
        wanted = one_pass(plain, ((x,), {}), 3)
        assert_same_pass(one_pass(model, ((x,), {}), 3, lambda: check_loss(taps, model)), wanted)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("route", ["auto", "grouped"])
def test_another_dtype(dtype: torch.dtype, route: Any) -> None:
    plain, model = twins(Convolutional)
    taps = moda.observe(model, route=route)
    for to in (torch.float32, dtype):  # probed in one, gone on in the other
        plain.to(to), model.to(to)
        wanted = one_pass(plain, ((IMAGES.to(to),), {}), 3)
        assert_same_pass(one_pass(model, ((IMAGES.to(to),), {}), 3, lambda: check_loss(taps, model)), wanted)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("route", ["auto", "grouped", "fused"])
def test_autocast_around_the_model(first: bool, route: Any) -> None:
    plain, model = twins(Convolutional)
    taps = moda.observe(model, route=route)
    for enabled in (first, True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            wanted = one_pass(plain, ((IMAGES,), {}), 3)
            got = one_pass(model, ((IMAGES,), {}), 3, lambda: check_loss(taps, model))
        assert_same_pass(got, wanted)


def test_channels_last_model() -> None:
    plain, model = (each.to(memory_format=torch.channels_last) for each in twins(Convolutional))
    x = IMAGES.to(memory_format=torch.channels_last)
    taps = moda.observe(model)
    for _ in range(2):
        wanted = one_pass(plain, ((x,), {}), 3)
        assert_same_pass(one_pass(model, ((x,), {}), 3, lambda: check_loss(taps, model)), wanted)


@pytest.mark.parametrize("route", ["auto", "grouped", "fused"])
def test_gradients_add_up_over_batches(route: Any) -> None:
    plain, model = twins(Convolutional)
    taps = moda.observe(model, route=route)
    for each, of in ((plain, None), (model, taps)):
        torch.manual_seed(0)
        for part in IMAGES.split(2):
            each(part).square().sum().backward()
            if of is not None:
                of.activations()
    for wanted, got in zip(plain.parameters(), model.parameters(), strict=True):
        assert torch.equal(wanted.grad, got.grad)


@pytest.mark.parametrize("route", ["auto", "grouped", "fused"])
def test_a_gradient_penalty_differentiates_the_model_twice(route: Any) -> None:
    def penalty(model: nn.Module) -> list[Tensor]:
        x = IMAGES.double().requires_grad_()
        (gradient,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        return list(torch.autograd.grad((gradient.norm() - 1) ** 2, list(model.parameters()), allow_unused=True))

    plain, model = (each.double().eval() for each in twins(Convolutional))
    wanted = penalty(plain)
    with moda.observe(model, route=route) as taps:
        for _ in range(2):
            try:
                got = penalty(model)
            except RuntimeError as error:
                assert route != "grouped"
                assert 'route="grouped"' in str(error)  # noqa: PT017
                return
            taps.clear()
            for a, b in zip(got, wanted, strict=True):
                assert (a is None and b is None) or torch.allclose(a, b, rtol=1e-9, atol=1e-12)


def test_the_modular_loss_of_a_gradient_penalty_s_pass_is_finite() -> None:
    model = Convolutional().double()
    taps = moda.observe(model, route="grouped")
    x = IMAGES.double().requires_grad_()
    y = model(x)
    loss = ModularLoss(backend="torch")(taps.activations(), Y)
    (gradient,) = torch.autograd.grad(y.square().sum() + loss, x, create_graph=True)
    gradient.square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


# -- several forward passes


def test_two_views_are_read_one_by_one_added_or_refused() -> None:
    model = Convolutional().eval()
    taps = moda.observe(model, route="grouped", example=IMAGES)
    views = IMAGES, IMAGES.flip(3)
    single = []
    for view in views:
        model(view)
        single.append(taps.activations())
    with taps.adding():
        for view in views:
            model(view)
        together = taps.activations()
    assert all(torch.equal(torch.cat([a, b]), c) for a, b, c in zip(*single, together, strict=True))
    for view in views:
        model(view)
    with pytest.raises(RuntimeError, match="two forward passes"):
        taps.activations()
    model(views[0])
    assert all(torch.equal(a, b) for a, b in zip(taps.activations(), single[0], strict=True))


@pytest.mark.parametrize("route", ["auto", "grouped", "fused"])
def test_two_views_before_one_loss_give_the_plain_gradients(route: Any) -> None:
    plain, model = twins(Convolutional)
    taps = moda.observe(model, route=route)
    gradients = []
    for each, of in ((plain, None), (model, taps)):
        torch.manual_seed(0)
        first = each(IMAGES)
        if of is not None:
            before = of.activations()
        second = each(IMAGES.flip(3))
        loss = F.mse_loss(first, second) + first.square().mean()
        if of is not None:
            loss = loss + 0 * ModularLoss()(before, Y) + 0 * ModularLoss()(of.activations(), Y)
        loss.backward()
        gradients.append([p.grad for p in each.parameters()])
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(*gradients, strict=True))


def test_a_pass_without_gradients_between_leaves_the_record_alone() -> None:
    model = Convolutional().eval()
    taps = moda.observe(model, route="grouped")
    model(IMAGES)
    with torch.no_grad():
        model(IMAGES * 2)
    wanted = F.relu(model[1](model[0](IMAGES)))
    assert torch.equal(taps.activations()[0], wanted)


# -- buffers and chance


class FrozenNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Linear(8, 3)
        for name in ("scale", "shift"):
            self.register_buffer(name, torch.ones(8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x) * self.scale.rsqrt() + self.shift).mean((2, 3)))


def test_values_made_of_buffers_follow_a_loaded_state() -> None:
    plain, model = twins(FrozenNorm)
    taps = moda.observe(model, example=IMAGES)
    state = {name: torch.rand_like(value) + 0.5 for name, value in model.state_dict().items()}
    plain.load_state_dict(state), model.load_state_dict(state)
    wanted = one_pass(plain, ((IMAGES,), {}), 0)
    assert_same_pass(one_pass(model, ((IMAGES,), {}), 0, lambda: check_loss(taps, model)), wanted)


class Everything(nn.Module):
    """Counts, averages, keeps a list, and decides by chance."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.register_buffer("average", torch.zeros(8))
        self.register_buffer("unused", None)
        self.register_buffer("hidden", torch.zeros(2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        h = F.relu(self.norm(self.a(x)))
        self.average = self.average * 0.9 + h.detach().mean(0) * 0.1
        self.hidden[0] = float(self.steps)
        if torch.rand(()) < 0.5:
            h = F.dropout(h, 0.5)
        return self.b(h - self.average + self.hidden.sum())


def test_observing_with_an_example_puts_buffers_and_random_state_back() -> None:
    plain, model = twins(Everything)
    state, buffers = torch.get_rng_state(), {name: value.clone() for name, value in model.named_buffers()}
    taps = moda.observe(model, example=(X,))
    assert taps.names
    assert torch.equal(torch.get_rng_state(), state)
    assert buffers.keys() == dict(model.named_buffers()).keys()
    assert all(torch.equal(value, buffers[name]) for name, value in model.named_buffers())
    assert all(p.grad is None for p in model.parameters())
    for seed in range(3):
        assert_same_pass(one_pass(model, ((X,), {}), seed, taps.clear), one_pass(plain, ((X,), {}), seed))


@pytest.mark.parametrize("example", [X, (X,), [X], {"x": X}])
def test_every_form_of_an_example(example: Any) -> None:
    taps = moda.observe(Everything(), example=example)
    assert taps.names == ("relu",)
    args, kwargs = taps.example
    (kept,) = (*args, *kwargs.values())
    assert torch.equal(kept, X[:2])


def test_observing_alone_changes_nothing() -> None:
    model = Everything()
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    taps = moda.observe(model)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in state.items())
    with pytest.raises(RuntimeError, match="first forward pass"):
        _ = taps.names


def test_an_example_that_fails_leaves_a_plain_model() -> None:
    model = Everything()
    before = Trace(model)
    with pytest.raises(RuntimeError, match="shapes"):
        moda.observe(model, example=torch.zeros(2, 5))
    assert Trace(model) == before
    assert int(model.steps) == 0


# -- exceptions, empty batches


class Failing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fail = nn.Linear(6, 8), nn.Linear(8, 3), False

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.a(x))
        if self.fail:
            raise KeyError("the user's own")
        return self.b(F.gelu(h))


@pytest.mark.parametrize("first", [True, False])
def test_a_forward_that_raises_leaves_nothing_behind(first: bool) -> None:
    plain, model = twins(Failing)
    taps = moda.observe(model)
    if not first:
        model(X), taps.activations()
    model.fail = True
    with pytest.raises(KeyError, match="the user's own"):
        model(X)
    assert torch.overrides._len_torch_function_stack() == 0
    model.fail = False
    assert_same_pass(one_pass(model, ((X,), {}), 0, lambda: check_loss(taps, model)), one_pass(plain, ((X,), {}), 0))


@pytest.mark.parametrize("route", ["auto", "grouped", "fused"])
@pytest.mark.parametrize("first", [True, False])
def test_batches_without_samples(route: Any, first: bool) -> None:
    plain, model = twins(Convolutional)
    plain.eval(), model.eval()
    taps = moda.observe(model, route=route)
    empty = IMAGES[:0]
    for x in (empty, IMAGES, empty, IMAGES) if first else (IMAGES, empty, IMAGES):
        wanted = plain(x)
        got = model(x)
        assert torch.equal(got, wanted)
        activations = taps.activations()
        assert [tuple(a.shape[:2]) for a in activations] == [(len(x), 8), (len(x), 8)]
        if len(x):
            assert torch.isfinite(ModularLoss()(activations, torch.arange(len(x)) % 2))


def twins(kind: Callable[[], nn.Module]) -> tuple[Any, Any]:
    """Two equal models."""
    model = kind()
    return model, copy.deepcopy(model)


def check_loss(taps: Any, model: nn.Module) -> None:
    activations = taps.activations()
    model.zero_grad(set_to_none=True)
    loss = ModularLoss()(activations, torch.arange(activations[0].size(0)) % 2)
    assert torch.isfinite(loss)
    if loss.requires_grad:
        loss.backward()
        assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())
