"""Kinds of code that models of the zoo are made of: each is exported, read, and composed as small as it can be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

from moda.composition.building import _folds
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


class Computed(nn.Module):
    """Two linear layers whose weights are computed of parameters."""

    def __init__(self, weight: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> None:
        super().__init__()
        self.first, self.last = nn.Parameter(torch.randn(shape)), nn.Linear(16, 5)
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.gelu(F.linear(x, self.weight(self.first))))


@pytest.mark.parametrize(
    ("weight", "shape", "axis"),
    [
        (lambda w: F.batch_norm(w.reshape(1, 16, -1), None, None, training=True).reshape_as(w), (16, 6), 0),
        (lambda w: (w - w.mean(1, keepdim=True)) / w.std(1, keepdim=True), (16, 6), 0),
        (lambda w: F.normalize(w, dim=1), (16, 6), 0),
        (lambda w: w.softmax(-1), (16, 6), 0),
        (lambda w: w[:, :16].t() @ w[:, 16:], (4, 22), None),
        (lambda w: w[1, :, ::2], (2, 16, 12), 1),
        (lambda w: w.chunk(2, dim=1)[1], (16, 12), 0),
        (lambda w: torch.cat([w, 2 * w], dim=1), (16, 3), 0),
        (lambda w: torch.where(w > 0, w, 0.1 * w), (16, 6), 0),
        (lambda w: F.pad(w, (1, 2)), (16, 3), 0),
        (lambda w: w.unflatten(0, (16, 6)), (96,), None),
    ],
)
def test_weights_computed_of_parameters_are_cut(weight, shape, axis):
    model = watched(Computed(weight, shape).double().eval())
    x = torch.randn(4, 6, dtype=torch.float64)
    decomposition = random_modules(widths(model, x), 5, 0.2)
    kept = int(decomposition.select([3, 0])[only_tap(model)].sum())
    composed = compose(model, decomposition, [3, 0])
    torch.testing.assert_close(composed(x), mask(model, decomposition, [3, 0])(x), rtol=1e-10, atol=1e-10)
    if axis is not None:
        assert composed.get_parameter("first").shape[axis] == kept


def shifted(x: Tensor) -> Tensor:
    y = x.new_zeros(x.shape)
    y[:, 1:] = x[:, :-1].clone()
    y[:, 0] = 2
    return y


def overlapping(x: Tensor) -> Tensor:
    y = x.clone()
    first, last = y[:, :4], y[:, 2:]
    first += 1
    last *= 2
    first -= 3
    y[0] = 7
    return first.sum(1, keepdim=True) + y + last.sum(1, keepdim=True)


def under_views(x: Tensor) -> Tensor:
    y = x.clone()
    flat, turned = y.view(-1), y.t()
    flat[::2] = 0
    turned[1] = 5
    flat += 1
    turned.mul_(2)
    return y + turned.t()


def in_parts(x: Tensor) -> Tensor:
    y = x.clone()
    first, last = y.chunk(2, dim=1)
    first.add_(1)
    last.mul_(first)
    first.zero_()
    F.relu(last, inplace=True)
    y.narrow(1, 1, 2).sub_(1)
    return y + torch.cat([last, first], dim=1)


class Before(nn.Module):
    """Overwrites its input in some way, before layers."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.first, self.last = nn.Linear(6, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.gelu(self.first(self.function(x))))


@pytest.mark.parametrize("function", [shifted, overlapping, under_views, in_parts])
def test_values_that_are_overwritten_more_than_once(function):
    model = watched(Before(function).double().eval())
    x = torch.randn(4, 6, dtype=torch.float64)
    decomposition = random_modules(widths(model, x), 5, 0.3)
    composed, masked = (make(model, decomposition, [3, 0]) for make in (compose, mask))
    for count in (4, 7):
        x = torch.randn(count, 6, dtype=torch.float64)
        torch.testing.assert_close(composed(x), masked(x), rtol=1e-10, atol=1e-10)


class Marked(nn.Module):
    """Classifies a sequence by its positions that hold a mark, and by the place of the first one, as BART and GPT do."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.inner, self.last = nn.Embedding(9, 6), nn.Linear(6, 16), nn.Linear(16, 5)

    def forward(self, words: Tensor) -> Tensor:
        h = F.gelu(self.inner(self.words(words)))
        marks = words == 1
        chosen = h[marks].view(h.shape[0], -1, h.shape[-1])[:, -1]
        return self.last(chosen + h[torch.arange(h.shape[0]), marks.int().argmax(1)])


def test_positions_that_the_input_chooses():
    model = watched(Marked().double().eval())
    words = torch.tensor([[2, 1, 3, 1], [1, 4, 5, 1]])
    decomposition = random_modules(widths(model, words), 5, 0.2)
    kept = int(decomposition.select([3, 0])[only_tap(model)].sum())
    composed = compose(model, decomposition, [3, 0])
    assert composed.get_parameter("last.weight").shape == (2, kept)
    masked = mask(model, decomposition, [3, 0])
    for other in (words, torch.tensor([[1, 1, 7], [8, 1, 1], [1, 2, 1]])):
        torch.testing.assert_close(composed(other), masked(other), rtol=1e-10, atol=1e-10)


class Lengths(Calls):
    """Reads the size of one input off another, as GPT-2 does, so that sizes are tied to each other."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return super().forward(x + y.view(x.shape[0], -1))


def test_conditions_that_other_sizes_meet_leave_them_free():
    model = Lengths(F.gelu).double().eval()
    inputs = [torch.randn(4, 6, dtype=torch.float64) for _ in range(2)]
    taps = observe(model)
    model(*inputs)
    decomposition = random_modules(dict(zip(taps.names, taps.widths, strict=True)), 5, 0.3)
    composed, masked = (make(model, decomposition, [3, 0]) for make in (compose, mask))
    inputs = [torch.randn(7, 6, dtype=torch.float64) for _ in range(2)]
    torch.testing.assert_close(composed(*inputs), masked(*inputs), rtol=1e-10, atol=1e-10)


class Counting(Calls):
    """Keeps count in an attribute, and lets it decide or not."""

    def __init__(self, decides: bool) -> None:
        super().__init__(F.gelu)
        self.calls, self.decides = 0, decides

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x * self.calls if self.decides else x)


@pytest.mark.parametrize("decides", [True, False])
def test_attributes_that_forward_assigns(decides):
    model = watched(Counting(decides).double().eval())
    x = torch.randn(4, 6, dtype=torch.float64)
    decomposition = random_modules(widths(model, x), 5, 0.3)
    before = model.calls
    if decides:
        with pytest.raises(ValueError, match="assigns calls"):
            compose(model, decomposition, [3, 0])
    else:
        composed = compose(model, decomposition, [3, 0])
        torch.testing.assert_close(composed(x), mask(model, decomposition, [3, 0])(x), rtol=1e-10, atol=1e-10)
        before += 1
    assert model.calls == before


def folded(*shape: int) -> np.ndarray:
    """A mask of an axis that is folded of three, the middle one of which repeats the others' values."""
    before, times, after = shape
    values = np.random.default_rng(0).random((before, 1, after)) < 0.5
    return np.broadcast_to(values, (before, times, after)).reshape(1, -1)


@pytest.mark.parametrize("shape", [(1, 3, 4), (4, 3, 1), (2, 5, 4), (4, 7, 2)])
def test_masks_of_folded_axes_are_read_off_a_number_of_samples_that_shares_no_factor(shape):
    values = folded(*shape)
    found = _folds(values, 1)
    assert found is not None
    before, after = found
    small = values.reshape(before, -1, after)[:, :1]
    grown = folded(shape[0], 2 * shape[1], shape[2])
    np.testing.assert_array_equal(np.repeat(small, grown.size // (before * after), axis=1).reshape(1, -1), grown)


class Parametrized(nn.Module):
    """Spectral norm, which overwrites a buffer in training, and pruning, which assigns a weight before each call."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 16))
        self.middle, self.last = nn.Linear(16, 12), nn.Linear(12, 5)
        prune.random_unstructured(self.middle, "weight", 0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.middle(F.gelu(self.first(x)))))


class Scripted(nn.Module):
    """A part of it is compiled by TorchScript."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 16), nn.Linear(8, 5)
        self.middle = torch.jit.script(nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Tanh()))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(F.relu(self.first(x))))


@pytest.mark.parametrize("kind", [Parametrized, Scripted])
def test_weights_that_a_module_computes_or_hides_are_cut_in_both_modes(kind):
    model, x = kind().double().eval(), torch.randn(2, 6, dtype=torch.float64)
    with observe(model, example=x) as taps:
        decomposition = random_modules(dict(zip(taps.names, taps.widths, strict=True)), 5, 0.5)
        composed = compose(taps, decomposition, [3, 0])
        assert sum(p.numel() for p in composed.parameters()) < 0.9 * sum(p.numel() for p in model.parameters())
        state = {name: value.clone() for name, value in model.state_dict().items()}
        for training in (False, True):
            expected = mask(taps, decomposition, [3, 0]).train(training)(x)
            model.load_state_dict(state)
            torch.testing.assert_close(composed.train(training)(x), expected, rtol=1e-9, atol=1e-9)
