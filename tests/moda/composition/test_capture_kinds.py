"""Kinds of code that models of the zoo are made of: each is exported, read, and composed as small as it can be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moda.composition.compose import compose
from moda.composition.masking import mask
from moda.observation.taps import observe, taps_of
from tests.moda._helpers.composing import random_modules, watched, widths


class Calls(nn.Module):
    """Two linear layers with an activation between them that is a function."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 16), nn.Linear(16, 5)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self.first(x)))


def sizes(model: nn.Module) -> list[tuple[int, ...]]:
    return [tuple(parameter.shape) for parameter in model.parameters()]


@pytest.mark.parametrize(
    "function",
    [
        nn.ReLU(inplace=True),
        nn.Hardswish(inplace=True),
        nn.SiLU(inplace=True),
        F.relu_,
        F.leaky_relu_,
        lambda x: F.relu(x, inplace=True),
        lambda x: x.relu_(),
        lambda x: F.elu(x, inplace=True) * 2,
    ],
)
def test_an_activation_that_overwrites_its_input_is_cut(function):
    model = watched(Calls(function).double().eval())
    x = torch.randn(4, 6, dtype=torch.float64)
    decomposition = random_modules(widths(model, x), 5, 0.2)
    kept = int(decomposition.select([3, 0])[only_tap(model)].sum())
    composed = compose(model, decomposition, [3, 0])
    assert sizes(composed) == [(kept, 6), (kept,), (2, kept), (2,)]
    torch.testing.assert_close(composed(x), mask(model, decomposition, [3, 0])(x), rtol=1e-10, atol=1e-10)


def only_tap(model: nn.Module) -> str:
    taps = taps_of(model)
    assert taps is not None
    (name,) = taps.names
    return name


class Depth(nn.Module):
    """A block that is left out for some samples in training, as torchvision's stochastic depth."""

    def __init__(self, draw: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 5)
        self.draw = draw

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        y = F.relu(self.inner(x))
        if self.training:
            y = y * self.draw(torch.empty(x.shape[0], 1, dtype=x.dtype, device=x.device))
        return self.last(x + y)


@pytest.mark.parametrize(
    "draw",
    [lambda x: x.bernoulli_(0.5).div_(0.5), lambda x: x.uniform_(0, 2), lambda x: x.normal_(1, 0.1), torch.rand_like],
)
def test_random_numbers_drawn_in_place_are_drawn_in_training(draw):
    model = watched(Depth(draw).double())
    x = torch.randn(64, 6, dtype=torch.float64)
    decomposition = random_modules(widths(model, x), 5, 0.4)
    composed = compose(model, decomposition, [3, 0])
    composed.train()
    assert not torch.equal(composed(x), composed(x))
    composed.eval()
    torch.testing.assert_close(composed(x), mask(model.eval(), decomposition, [3, 0])(x), rtol=1e-10, atol=1e-10)


class Foreach(nn.Module):
    """Writes into several tensors by one call, which is not followed, in training alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = F.relu(x)
        if self.training:
            x, y = x.clone(), x.clone()
            torch._foreach_add_([x, y], 1.0)
        return self.last(x)


def test_what_cannot_be_followed_in_training_composes_for_inference():
    model = watched(Foreach().double().eval())
    x = torch.randn(4, 6, dtype=torch.float64)
    decomposition = random_modules(widths(model, x), 5, 0.4)
    composed = compose(model, decomposition, [3, 0])
    torch.testing.assert_close(composed(x), mask(model, decomposition, [3, 0])(x), rtol=1e-10, atol=1e-10)
    with pytest.raises(RuntimeError, match=r"test_capture_kinds\.py.*several tensors"):
        composed.train()


class Tokens(nn.Module):
    """A classifier of texts of any length: tokens, and which of them count."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.hidden, self.last = nn.Embedding(30, 8), nn.Linear(8, 16), nn.Linear(16, 5)

    def forward(self, tokens: Tensor, attention: Tensor) -> Tensor:
        x = F.gelu(self.hidden(self.table(tokens))) * attention[..., None]
        return self.last(x.sum(1) / attention.sum(1, keepdim=True))


def test_lengths_that_have_to_be_equal_stay_free():
    model = Tokens().double().eval()
    tokens, attention = torch.randint(30, (4, 9)), torch.rand(4, 9).double().round() + 0.5
    taps = observe(model)
    model(tokens, attention)
    decomposition = random_modules(dict(zip(taps.names, taps.widths, strict=True)), 5, 0.4)
    composed = compose(model, decomposition, [3, 0])
    masked = mask(model, decomposition, [3, 0])
    for length in (9, 4, 13):
        wide = tokens.repeat(1, 2)[:3, :length], attention.repeat(1, 2)[:3, :length]
        torch.testing.assert_close(composed(*wide), masked(*wide), rtol=1e-10, atol=1e-10)
    with pytest.raises(ValueError, match="input"):
        composed(tokens, attention[:, :8])


class Cache:
    """What is no tensor."""

    def __init__(self, *tensors: Tensor) -> None:
        self.tensors = tensors


class WithCache(Calls):
    """A language model's output: logits, and a cache that its next call may be given."""

    def forward(self, x: Tensor) -> dict[str, Any]:  # type: ignore[override]
        return {"logits": super().forward(x), "cache": Cache(x), "all": (x, [Cache(x), 1])}


def test_what_an_output_holds_besides_tensors_is_left_out():
    model = WithCache(F.gelu).double().eval()
    x = torch.randn(4, 6, dtype=torch.float64)
    taps = observe(model)
    model(x)
    decomposition = random_modules(dict(zip(taps.names, taps.widths, strict=True)), 5, 0.3)
    got, expected = (make(model, decomposition, [3, 0])(x) for make in (compose, mask))
    torch.testing.assert_close(got["logits"], expected["logits"], rtol=1e-10, atol=1e-10)
    assert got["cache"] is expected["cache"] is None
    assert torch.equal(got["all"][0], x)
    assert got["all"][1] == expected["all"][1] == [None, 1]


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_grouped_convolutions_under_weight_norm_are_cut(dim):
    """Of wav2vec 2.0: norms of a weight along its last axis need all of its rows."""
    conv = nn.utils.parametrizations.weight_norm(nn.Conv1d(8, 16, 3, padding=1, groups=2), dim=dim)
    model = nn.Sequential(nn.Conv1d(3, 8, 1), nn.ReLU(), conv, nn.GELU(), nn.Flatten(), nn.Linear(64, 5))
    model = watched(model.double().eval())
    x = torch.randn(4, 3, 4, dtype=torch.float64)
    decomposition = random_modules(widths(model, x), 5, 0.3)
    composed = compose(model, decomposition, [3, 0])
    torch.testing.assert_close(composed(x), mask(model, decomposition, [3, 0])(x), rtol=1e-10, atol=1e-10)


class Weighted(nn.Module):
    """Two linear layers written as products with their transposed weights."""

    def __init__(self, transpose: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 16, bias=False), nn.Linear(16, 5, bias=False)
        self.transpose = transpose

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x @ self.transpose(self.first.weight)) @ self.transpose(self.last.weight)


@pytest.mark.parametrize(
    "transpose",
    [
        lambda w: w.T,
        lambda w: w.mT,
        lambda w: w.t(),
        lambda w: w.swapaxes(-1, 0),
        lambda w: w.movedim(0, 1),
        lambda w: w.permute(1, 0).contiguous(),
        lambda w: (2 * w).adjoint(),
    ],
)
def test_products_with_transposed_weights_are_cut(transpose):
    model = watched(Weighted(transpose).double().eval())
    x = torch.randn(4, 6, dtype=torch.float64)
    decomposition = random_modules(widths(model, x), 5, 0.2)
    kept = int(decomposition.select([3, 0])[only_tap(model)].sum())
    composed = compose(model, decomposition, [3, 0])
    assert sizes(composed) == [(kept, 6), (2, kept)]
    torch.testing.assert_close(composed(x), mask(model, decomposition, [3, 0])(x), rtol=1e-10, atol=1e-10)


class Asserting(Calls):
    """Looks at values for an assertion alone."""

    def forward(self, x: Tensor) -> Tensor:
        lengths = (x > 0).sum(1)
        torch._check(lengths.max().item() <= x.shape[1])
        return super().forward(x)


def test_values_that_only_an_assertion_looks_at():
    model = watched(Asserting(F.gelu).double().eval())
    x = torch.randn(4, 6, dtype=torch.float64)
    decomposition = random_modules(widths(model, x), 5, 0.3)
    composed = compose(model, decomposition, [3, 0])
    torch.testing.assert_close(composed(x), mask(model, decomposition, [3, 0])(x), rtol=1e-10, atol=1e-10)
