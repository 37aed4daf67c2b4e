"""Attributions against autograd with everything kept; shares by hand; what is put back."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import moda
from moda.decomposition.targets import TARGETS
from tests.moda._helpers.tapping import Tokens, small_cnn

CLASSES = 4


class Residual(nn.Module):
    """A ReLU whose output is overwritten by an addition; the same activation called twice; a function in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3, padding=1), nn.Linear(6, CLASSES)
        self.act = nn.GELU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.first(x))
        x += F.silu(self.second(x.clone()), inplace=True)  # overwrites what the GELU gave
        return self.head(self.act(x).mean((2, 3)))


def batches(sizes=(5, 7), size=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(n, 3, size, size, generator=generator), torch.arange(n) % 3)  # class 3 has no sample
        for n in sizes
    ]


def kept_activations(model, x):
    """The activations of each call, in order, as tensors of the graph whose gradients are kept."""
    taps, kept = moda.observe(model, example=x), []

    def keep(_index, activation):
        activation = activation * 1 if activation.requires_grad else activation.clone().requires_grad_()
        activation.retain_grad()
        kept.append(activation)
        return activation.clone()  # which the model may overwrite

    with taps.recording(lambda *_: None), taps.replacing(keep):
        output = model(x)
    taps.remove()
    return output, kept


class HandsOn(nn.Module):
    """An activation that gives what it was given."""

    def forward(self, x):
        return x


class InPlace(nn.Module):
    """The first activation is the input itself: overwritten, or handed on."""

    def __init__(self, first):
        super().__init__()
        self.first, self.second = first, nn.Linear(4, 3)

    def forward(self, x):
        return self.second(self.first(x))


@pytest.mark.parametrize("first", [lambda: nn.ReLU(inplace=True), HandsOn], ids=["overwritten", "handed on"])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_inputs_stay_the_users(first, requires_grad):
    model = InPlace(first())
    x = torch.rand(5, 4, requires_grad=requires_grad)
    labels = torch.tensor([0, 1, 2, 0, 1])
    taps = moda.observe(model, activations=(HandsOn,))
    for _ in range(2):
        scores = moda.attribute(taps, [(x, labels)], 3, progress=False)
    assert x.is_leaf
    assert x.requires_grad == requires_grad
    assert x.grad is None
    assert all(parameter.grad is None and parameter.is_leaf for parameter in model.parameters())
    (name,) = scores.scores
    assert scores.scores[name].abs().sum() > 0


def by_hand(model, loader, target):
    """In float64, the whole data in one batch, every gradient kept."""
    x, labels = (torch.cat(parts) for parts in zip(*loader, strict=True))
    model = model.double().eval()
    logits, kept = kept_activations(model, x.double())
    target(logits, labels).sum().backward()
    expected = []
    for activation in kept:
        rows = activation.detach() * activation.grad
        rows = (rows if rows.dim() == 2 else rows.flatten(2).sum(2)).abs()
        of_classes = [rows[labels == k].mean(0) for k in range(3)]
        expected.append(torch.stack([*of_classes, torch.zeros(rows.shape[1])]))
    model.float()
    return expected


class Vit(Tokens):
    def forward(self, x):
        return F.pad(super().forward(x), (0, 1))  # four logits


MODELS = {"cnn": small_cnn, "residual": Residual, "tokens": Vit}


@pytest.mark.parametrize("target", ["margin", "logit", "cross_entropy"])
@pytest.mark.parametrize("name", MODELS)
def test_attributions_by_hand(name, target):
    model = MODELS[name]()
    expected = by_hand(model, batches(), TARGETS[target])
    found = moda.attribute(model, batches(), CLASSES, target=target, progress=False)
    assert found.target == target
    assert found.class_sizes.tolist() == [5, 4, 3, 0]
    assert found.empty_classes == [3]
    assert len(found.taps) == len(expected) > 1
    for tap, rows in zip(found.taps, expected, strict=True):
        assert found.scores[tap].dtype == torch.float32
        torch.testing.assert_close(found.scores[tap].double(), rows, rtol=1e-4, atol=1e-7)
        assert rows.abs().max() > 0


def test_order_and_batches_do_not_matter():
    model = small_cnn()
    (x, labels), (more, others) = batches()
    x, labels = torch.cat([x, more]), torch.cat([labels, others])
    order = torch.randperm(12)
    one = moda.attribute(model, [(x, labels)], CLASSES, progress=False)
    shuffled = [(x[part], labels[part].int()) for part in order.split(5)]
    other = moda.attribute(model, shuffled, CLASSES, progress=False)
    for tap in one.taps:
        torch.testing.assert_close(one.scores[tap], other.scores[tap], rtol=1e-5, atol=1e-8)


def test_everything_is_put_back():
    model = small_cnn()
    model[0].weight.requires_grad_(False)
    model[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    seen = []
    model[3].weight.register_hook(lambda _: seen.append("gradient of a parameter"))
    moda.attribute(model, batches(), CLASSES, progress=False)

    def fails(logits, labels):
        raise ValueError("no target")

    with pytest.raises(ValueError, match="no target"):
        moda.attribute(model, batches(), CLASSES, target=fails, progress=False)
    assert not seen
    assert model.training
    assert not model[1].training
    assert model[3].training
    assert [p.requires_grad for p in model.parameters()] == [False, *[True] * (len(list(model.parameters())) - 1)]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert type(model[2]) is nn.ReLU  # observed no longer


def test_no_gradient_outlives_its_layer():
    """When a layer's gradient arrives, those of later layers are gone, but for the one that it was made from."""
    import gc
    import weakref

    alive, most = weakref.WeakSet(), 0

    class Watching(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            nonlocal most
            made = gradient.clone()
            alive.add(made)
            gc.collect()
            most = max(most, len(alive))
            return made

    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(8))
            self.head = nn.Linear(6, CLASSES)

        def forward(self, x):
            for layer in self.layers:
                x = Watching.apply(F.relu(layer(x)))
            return self.head(x)

    moda.attribute(Deep(), [(torch.randn(9, 6), torch.arange(9) % CLASSES)], CLASSES, progress=False)
    assert most <= 2


def test_observed_models_and_forms_of_batches():
    model = small_cnn()
    plain = moda.attribute(model, batches(), CLASSES, progress=False)
    dicts = [{"input": x, "labels": y} for x, y in batches()]
    with moda.observe(model) as taps:
        for given, loader, unpack in (
            (taps, batches(), None),
            (model, dicts, None),
            (model, [(y, x) for x, y in batches()], lambda pair: (pair[1], pair[0])),
        ):
            again = moda.attribute(given, loader, CLASSES, unpack=unpack, progress=False)
            assert all(torch.equal(again.scores[tap], plain.scores[tap]) for tap in plain.taps)


def test_repeated_samples_of_a_distributed_sampler_are_not_counted():
    x, labels = torch.cat([b[0] for b in batches()])[:11], torch.arange(11) % 3
    data = TensorDataset(x, labels)
    sampler = DistributedSampler(data, num_replicas=2, rank=1, shuffle=False)  # repeats sample 0 at its end
    found = moda.attribute(small_cnn(), DataLoader(data, 4, sampler=sampler), CLASSES, progress=False)
    assert found.class_sizes.tolist() == [2, 2, 1, 0]  # samples 1, 3, 5, 7, 9


def test_a_branch_that_leads_nowhere_has_no_attribution():
    class Aside(nn.Module):
        def __init__(self):
            super().__init__()
            self.main, self.side, self.head = nn.Linear(5, 6), nn.Linear(5, 3), nn.Linear(6, CLASSES)

        def forward(self, x):
            F.gelu(self.side(x))
            return self.head(F.relu(self.main(x)))

    found = moda.attribute(Aside(), [(torch.randn(8, 5), torch.arange(8) % CLASSES)], CLASSES, progress=False)
    silent, told = found.taps
    assert not found.scores[silent].any()
    assert found.scores[told].any()
    with pytest.warns(UserWarning, match=re.escape(f"{silent} for classes [0, 1, 2, 3]")):
        masks = moda.decompose(found, epsilon=0.1).masks
    assert masks[silent].sum(1).tolist() == [1] * CLASSES


def test_shares_by_hand():
    model = MODELS["tokens"]()
    found = moda.activation_shares(model, batches(), CLASSES, progress=False)
    x, labels = (torch.cat(parts) for parts in zip(*batches(), strict=True))
    _, kept = kept_activations(model.eval(), x)
    for tap, activation in zip(found.taps, kept, strict=True):
        rows = activation.detach().abs()
        rows = rows if rows.dim() == 2 else rows.flatten(2).mean(2)
        expected = torch.stack([rows[labels == k].mean(0) if k < 3 else rows[0] * 0 for k in range(CLASSES)])
        torch.testing.assert_close(found.scores[tap], expected, rtol=1e-5, atol=1e-7)
        shares = found.shares[tap]
        torch.testing.assert_close(shares.sum(1), torch.tensor([1.0, 1, 1, 0], dtype=torch.float64))


def test_shares_of_signed_units_are_of_their_magnitudes():
    model = nn.Sequential(nn.Linear(2, 2), nn.GELU(), nn.Linear(2, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(2))
        model[0].bias.zero_()
    x = torch.tensor([[-0.7, 1.0], [2.0, 1.0]])
    found = moda.activation_shares(model, [(x, torch.zeros(2, dtype=torch.int64))], 1, progress=False)
    torch.testing.assert_close(found.scores["1"][0], F.gelu(x).abs().mean(0))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda m: moda.attribute(m, batches(), CLASSES, target="loss"), ValueError,
         "target: expected one of margin, logit, cross_entropy or a function, got 'loss'"),
        (lambda m: moda.attribute(m, batches(), CLASSES, target=3), TypeError, "target: expected one of margin, logit"),
        (lambda m: moda.attribute(m, batches(), CLASSES, target=lambda z, y: z), ValueError,
         "target: expected a function that gives shape (5,), one per sample, got (5, 4)"),
        (lambda m: moda.attribute(m, batches(), CLASSES, target=lambda z, y: y.float()), ValueError,
         "target: expected a function of the logits, got values that do not depend on any tap"),
        (lambda m: moda.attribute(m, batches(), 3), ValueError, "model: expected logits (N, 3) as its output"),
        (lambda m: moda.attribute(m, batches(), 2), ValueError, "labels: expected classes in [0, 2), got 2"),
        (lambda m: moda.attribute(m, [], CLASSES), ValueError, "loader: expected at least one batch, got none"),
        (lambda m: moda.attribute(nn.Linear(3, CLASSES), [(torch.ones(2, 3), torch.tensor([0, 1]))], CLASSES), ValueError,
         "found no call of an activation function"),
    ],
)  # fmt: skip
def test_bad_input_is_named(make, error, message):
    with pytest.raises(error, match=re.escape(message)):
        make(small_cnn())
