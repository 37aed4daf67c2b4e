"""What a training step costs in launches, and what its shorter ways give: segments, weights, gradients as views."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import triton.runtime.interpreter as interpreter
from torch import nn

from moda_kernels import ModularLoss, closed_form, triton_kernels
from moda_kernels.segments import Segments
from moda_kernels.triton_kernels import grouped
from moda_kernels.triton_kernels.preparation import MOST_SAMPLES
from tests.moda_kernels._helpers.triton_oracle import DEVICES, leaves, make_layers

WEIGHTS = [(1.0, 1.0, 0.3), (0.0, 2.0, 0.0), (0.5, 0.0, 1.0), (0.0, 0.0, 0.0)]
BATCHES = {
    "one sample": [3],
    "two classes": [1, 0],
    "one class": [7] * 33,
    "each its own": list(range(40, 0, -1)),
    "negative and far apart": [-(2**63), 2**63 - 1, 0, -1, 2**40, 0, -(2**63), 2**63 - 1],
    "a power of two": [i % 5 for i in range(64)],
    "beyond a power of two": [i * 7 % 11 for i in range(129)],
    "as many as the kernel takes": [i % 100 for i in range(MOST_SAMPLES)],
    "more": [i % 3 for i in range(MOST_SAMPLES + 1)],
}


@pytest.fixture(autouse=True)
def interpreted_too(monkeypatch):
    """Front doors hand tensors of the CPU to the kernels, which the interpreter then runs."""
    monkeypatch.setattr(triton_kernels, "DEVICES", None)


def segments_of(labels):
    """As the losses find them."""
    layer = torch.ones(len(labels), 1, device=labels.device)
    return grouped.losses_forward([layer], labels)[1].segments


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", BATCHES)
def test_segments(name, device):
    labels = torch.tensor(BATCHES[name], device=device)
    for mine, theirs in zip(segments_of(labels), Segments.from_labels(labels), strict=True):
        assert mine.dtype == theirs.dtype
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("device", DEVICES)
def test_segments_of_short_and_of_strided_labels(device):
    labels = torch.tensor([4, 9, 4, -1, 9, 9], dtype=torch.int32, device=device)
    for given in (labels, labels.long().repeat_interleave(2)[::2]):
        assert all(map(torch.equal, segments_of(given), Segments.from_labels(labels)))


def batch(device, dtype=torch.float32):
    torch.manual_seed(1)
    return make_layers([(3, 2, 2), (5,), (2, 3, 3)], 6, dtype, device), torch.tensor([0, 1, 0, 2, 1, 1], device=device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_weights_in_the_kernels_are_weights_outside(weights, device):
    layers, labels = batch(device)
    mine, theirs = leaves(layers), leaves(layers, torch.float64)
    loss = ModularLoss(*weights, backend="triton")
    value = loss(mine, labels)
    expected = ModularLoss(*weights, backend="torch")
    wanted = expected(theirs, labels)
    torch.testing.assert_close(value.double(), wanted, rtol=1e-6, atol=1e-7)
    for ours, other in zip(loss.last, expected.last, strict=True):
        assert not ours.requires_grad
        torch.testing.assert_close(ours.double(), other, rtol=1e-6, atol=1e-7)
    assert value.requires_grad == wanted.requires_grad == any(weights)
    if not any(weights):
        return
    (3 * value).backward()
    (3 * wanted).backward()
    for x, y in zip(mine, theirs, strict=True):
        torch.testing.assert_close(x.grad.double(), y.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_a_term_of_weight_0_is_left_out_though_it_is_infinite(device):
    layer = torch.full((4, 3), 3e38, device=device).requires_grad_()
    layer.data[0, 0] = float("inf")
    labels = torch.tensor([0, 0, 1, 1], device=device)
    assert ModularLoss(0, 0, 1, backend="triton")([layer], labels).isinf()
    assert ModularLoss(0, 0, 0, backend="triton")([layer], labels) == 0


class Network(nn.Module):
    """Maps and rows behind ReLUs: as modules, in place, and one whose output is read twice."""

    def __init__(self, channels_last: bool, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1)
        self.third, self.last = nn.Conv2d(6, 4, 1), nn.Linear(4, 3)
        self.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format, dtype=dtype)

    def forward(self, x):
        a = F.relu(self.first(x))
        b = F.relu_(self.second(a) + a.repeat(1, 2, 1, 1)[:, :6])
        c = torch.tanh(self.third(b))
        d = F.relu(self.last(F.relu(c).mean((2, 3))))
        return [a, b, c, d]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_of_rectified_layers_are_views_and_right(channels_last, dtype, device):
    """Parameters get the gradient of the published |x|, though no gradient of an activation's size is written."""
    x = torch.randn(6, 2, 4, 4, dtype=dtype).to(device)
    labels = torch.tensor([0, 1, 0, 2, 1, 1], device=device)
    mine, theirs = (Network(channels_last, dtype).to(device) for _ in range(2))
    loss = ModularLoss(backend="triton")
    activations = mine(x)
    seen = []
    node = activations[0].grad_fn
    node.register_prehook(lambda gradients: seen.append(gradients[0]))
    b = activations[1]
    reader = b.grad_fn
    reader.register_prehook(lambda gradients: seen.append(gradients[0]))
    loss(activations, labels).backward()
    ModularLoss(backend="torch")(theirs(x), labels).backward()
    tolerance = {"rtol": 1e-4, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 5e-2, "atol": 2e-3}
    for (name, a), other in zip(mine.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, other.grad, msg=lambda text, name=name: f"{name}: {text}", **tolerance)
    assert len(seen) == 2


@pytest.mark.parametrize("device", DEVICES)
def test_whoever_looks_at_an_activation_s_gradient_sees_the_published_one(device):
    """Of |y|, which is 0 where y is 0: for leaves, hooks and retained gradients. What is not looked at is a view."""
    x = torch.randn(6, 3, 4, 4, device=device)
    labels = torch.tensor([0, 1, 0, 2, 1, 1], device=device)
    kept = {}
    for way in ("retained", "hooked", "leaf", "view"):
        source = x.clone().requires_grad_()
        y = torch.relu(source) if way != "leaf" else torch.relu(x).requires_grad_()
        if way == "retained":
            y.retain_grad()
        if way == "hooked":
            y.register_hook(lambda gradient: kept.update(hooked=gradient))
        if way == "view":
            y.grad_fn.register_prehook(lambda gradients: kept.update(view=gradients[0]))
        ModularLoss(backend="triton")([y], labels).backward()
        kept.setdefault(way, y.grad if way != "view" else None)
        if way != "leaf":
            kept[way + " source"] = source.grad
    assert torch.equal(kept["retained"], kept["leaf"])
    assert torch.equal(kept["hooked"], kept["leaf"])
    assert torch.equal(kept["leaf"] == 0, torch.relu(x) == 0)
    assert kept["view"].stride()[2:] == (0, 0)
    for way in ("hooked", "view"):
        torch.testing.assert_close(kept[way + " source"], kept["retained source"])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "asked", ["activation", "activation and parameters", "activation and input", "late hook", "late retain"]
)
def test_who_asks_for_an_activation_s_gradient_later_gets_the_published_one(asked, device):
    layer = nn.Conv2d(3, 3, 1).to(device)
    x = torch.randn(6, 3, 4, 4, device=device, requires_grad=True)
    y = torch.relu(layer(x))
    loss = ModularLoss(backend="triton")([y], torch.tensor([0, 1, 0, 2, 1, 1], device=device))
    seen = []
    if asked == "late hook":
        y.register_hook(seen.append)
        loss.backward()
    elif asked == "late retain":
        y.retain_grad()
        loss.backward()
        seen.append(y.grad)
    else:
        others = {"activation": [], "activation and parameters": list(layer.parameters()), "activation and input": [x]}
        seen.append(torch.autograd.grad(loss, [y, *others[asked]])[0])
    assert torch.equal(seen[0] == 0, y == 0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("samples", "classes"), [(33, 2), (100, 1), (128, 10), (129, 3), (512, 5), (513, 1), (700, 40)]
)
def test_segments_over_blocks_of_samples(samples, classes, device):
    """Parts of few blocks are added up by their readers, of many by a launch; the last program adds up the losses."""
    generator = torch.Generator().manual_seed(samples)
    labels = torch.randint(0, classes, (samples,), generator=generator).to(device)
    layers = [torch.randn(samples, width, generator=generator).to(device) for width in (3, 200)]
    mine, theirs = leaves(layers), leaves(layers, torch.float64)
    weights = (1.0, 2.0, 0.5)
    total, terms = triton_kernels.weighted_losses(mine, labels, weights)
    expected, others = closed_form.weighted_losses(theirs, labels, weights)
    torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.stack(terms).double(), torch.stack(others), rtol=1e-5, atol=1e-6)
    total.backward()
    expected.backward()
    for x, y in zip(mine, theirs, strict=True):
        torch.testing.assert_close(x.grad.double(), y.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("device", DEVICES[:1])
def test_launches_of_a_step_beside_its_taps(device, monkeypatch):
    """Segments and norms, sums, terms and losses; one back."""
    launched = []
    call = interpreter.GridExecutor.__call__
    monkeypatch.setattr(
        interpreter.GridExecutor, "__call__",
        lambda self, *args, **kwargs: (launched.append(self.fn.__name__), call(self, *args, **kwargs)),
    )  # fmt: skip
    sources = leaves(batch(device)[0])
    rows = [source[:, :, 0, 0].contiguous() if source.dim() > 2 else source for source in sources]
    labels = batch(device)[1]
    value = ModularLoss(backend="triton")(rows, labels)
    assert launched == ["prepare_kernel", "block_sums_kernel", "pair_terms_kernel"]
    launched.clear()
    value.backward()
    assert launched == ["losses_backward_kernel"]


@pytest.mark.parametrize("device", DEVICES)
def test_closed_form_gives_the_same_sum(device):
    layers, labels = batch(device)
    total, terms = closed_form.weighted_losses(layers, labels, (1.0, 2.0, 0.5))
    mine, ours = triton_kernels.weighted_losses(layers, labels, (1.0, 2.0, 0.5))
    torch.testing.assert_close(mine, total)
    torch.testing.assert_close(ours, terms)
