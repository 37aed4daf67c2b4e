"""The Triton losses: values and gradients against float64, PyTorch and the published data; order, memory, autograd."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moda_kernels import closed_form, modular_losses, triton_kernels
from tests.moda_kernels._helpers.triton_oracle import (
    DEVICES,
    HALF,
    assert_three_way,
    leaves,
    make_layers,
    rounded,
    three_ways,
)

pytestmark = pytest.mark.parametrize("device", DEVICES)

GOLDEN = [
    "basic", "batch1", "batch128", "batch2_diff", "batch2_same", "dead", "dead_layer", "no_same_pair", "one_fc_layer",
    "one_same_pair", "signed", "single_class", "tiny_norm",
]  # fmt: skip

# In a gradient g_i and its projection on n_i nearly cancel; 16 units in the last place of what is left is GRADIENT.
GRADIENT = 16

# A block is 32 samples and a tile 128 neurons; the norms take 8 rows by 256 neurons.
BATCHES = {
    # name: (samples, classes, shapes of the layers), and what is there twice or not at all
    "three blocks, segments across them": (70, 3, [(5,), (130,), (3, 2, 2)]),  # two tiles in a layer of 130
    "every sample its own class": (40, 1000, [(6,), (9,)]),  # no segment crosses a block; 32 segments in a block
    "one class over two blocks": (40, 1, [(6,), (4, 3)]),  # no different-class pair; block inside a segment
    "one sample": (1, 1, [(7,), (2, 3)]),  # no pair at all
    "a block to the last sample": (64, 2, [(4,)]),  # no tail; offsets end at a block boundary
    "wide": (9, 3, [(600,)]),  # three rounds of the norms' loop, the last one partial; second program of norms
    "more layers than one look-up": (5, 2, [(3,)] * 66),  # second round of find_layer
}


@pytest.mark.parametrize("name", BATCHES)
def test_values_and_gradients(name, device):
    samples, classes, shapes = BATCHES[name]
    layers = make_layers(shapes, samples, torch.float32, device)
    labels = torch.randint(classes, (samples,), device=device)
    kernel, same_dtype, truth = three_ways(layers, labels)
    for term, *three in zip(("affinity", "dispersion", "compactness"), kernel[0], same_dtype[0], truth[0], strict=True):
        assert_three_way(*three, term)
    for index, three in enumerate(zip(kernel[1], same_dtype[1], truth[1], strict=True)):
        assert_three_way(*three, f"gradient of layer {index}", GRADIENT)


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision(dtype, device):
    """Spatial and (N, C) layers of half precision, with one of float32 between them."""
    layers = make_layers([(8, 4, 4), (20,)], 12, dtype, device)
    layers.insert(1, make_layers([(6,)], 12, torch.float32, device)[0])
    kernel, same_dtype, truth = three_ways(layers, torch.arange(12, device=device) % 4)
    for term, *three in zip(("affinity", "dispersion", "compactness"), kernel[0], same_dtype[0], truth[0], strict=True):
        assert_three_way(*three, term)
    for index, (ours, _, exact) in enumerate(zip(kernel[1], same_dtype[1], truth[1], strict=True)):
        # PyTorch's own gradient of a mean is rounded more than once; the truth rounded once is the stricter measure.
        # The float32 error below moves an element over a rounding border now and then: one unit of the dtype.
        assert ours.dtype == layers[index].dtype
        unit = torch.finfo(ours.dtype).eps * exact.abs() + torch.finfo(ours.dtype).smallest_normal
        assert_three_way(ours, rounded(exact, ours.dtype) + unit.double(), exact, f"gradient of layer {index}")


def test_mixed_layouts_in_one_call(device):
    """NCHW, channels_last, (N, T, C) seen as (N, C, T), a transposed (N, C), and a layout nobody has: all as one."""
    n = 6
    layers = make_layers([(8, 3, 5), (8, 3, 5), (7, 4), (10,), (4, 3, 2)], n, torch.float32, device)
    layers[1] = layers[1].to(memory_format=torch.channels_last)
    layers[2] = layers[2].transpose(1, 2).contiguous().transpose(1, 2)
    layers[3] = layers[3].T.contiguous().T
    layers[4] = layers[4].permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0)
    assert not any(layer.is_contiguous() for layer in layers[1:])
    kernel, same_dtype, truth = three_ways(layers, torch.tensor([0, 1, 0, 2, 1, 0], device=device))
    for three in zip(kernel[0], same_dtype[0], truth[0], strict=True):
        assert_three_way(*three, "loss")
    for index, three in enumerate(zip(kernel[1], same_dtype[1], truth[1], strict=True)):
        assert_three_way(*three, f"gradient of layer {index}", GRADIENT)


@pytest.mark.parametrize("name", GOLDEN)
def test_published_data(golden, name, device, monkeypatch):
    monkeypatch.setattr(triton_kernels, "DEVICES", dict.fromkeys(triton_kernels.OPS, frozenset({device})))
    data = golden(f"losses_{name}")
    layers = [torch.from_numpy(data[key]).to(device) for key in sorted(data) if key.startswith("act_")]
    layers = leaves(layers)
    losses = modular_losses(layers, torch.from_numpy(data["labels"]).to(device), backend="triton")
    expected = np.nan_to_num(data["loss_f64"], nan=0.0)  # the published NaN (no pair) is our 0
    np.testing.assert_allclose([term.item() for term in losses], expected, rtol=2e-5, atol=2e-6)
    total = sum(float(w) * term for w, term in zip(data["weights"], losses, strict=True))
    for index, gradient in enumerate(torch.autograd.grad(total, layers)):
        published, living = data[f"grad_{index:02d}"], data[f"act_{index:02d}"] != 0
        scale = np.abs(np.where(living, published, 0)).reshape(len(published), -1).max(1)
        allowed = (1e-4 * scale + 1e-11).reshape(-1, *[1] * (published.ndim - 1))
        error = np.abs(gradient.cpu().numpy() - published)
        assert (np.where(living, error, 0) <= allowed).all()
        dead = data[f"dead_rows_{index:02d}"]
        assert (gradient.cpu().numpy()[dead] == 0).all()  # ours is 0 where the published one is g / 1e-12


def test_rare_kind_of_pair_is_not_lost(device):
    """One sample among many of one class: for the others s - s_k is its n, of which sums in float32 would lose digits."""
    layers = make_layers([(16,)], 300, torch.float32, device)
    labels = torch.zeros(300, dtype=torch.int64, device=device)
    labels[77] = 5
    kernel, _, truth = three_ways(layers, labels, (0.0, 1.0, 0.0))
    assert_three_way(kernel[0][1], truth[0][1], truth[0][1], "dispersion")
    others, exact = (gradient[0][labels == 0] for gradient in (kernel[1], truth[1]))
    assert_three_way(others, exact, exact, "gradient of the others", 4)
    assert_three_way(kernel[1][0][77], truth[1][0][77], truth[1][0][77], "gradient of the one", GRADIENT)


def test_rows_of_extreme_size(device):
    """All-zero rows, rows below the floor of 1e-12, and rows whose squares leave float32's range."""
    rows = torch.rand(6, 5, device=device) + 0.1
    rows *= torch.tensor([0.0, 1e-14, 1e-25, 1.0, 1e25, 1.0], device=device)[:, None]
    labels = torch.tensor([0, 0, 1, 1, 1, 0], device=device)
    layer = rows.clone().requires_grad_()
    exact = rows.double().requires_grad_()
    ours = triton_kernels.grouped_losses([layer], labels)
    theirs = closed_form.grouped_losses([exact], labels)
    for term, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(term.double(), expected, rtol=1e-6, atol=1e-7)
    (gradient,) = torch.autograd.grad(ours[0] + ours[1], layer)
    (expected,) = torch.autograd.grad(theirs[0] + theirs[1], exact)
    assert (gradient[0] == 0).all()
    # Row by row: the sizes differ by forty orders of magnitude.
    scale = expected.abs().amax(1, keepdim=True)
    assert ((gradient - expected).abs() <= 1e-5 * scale + 1e-37).all()


def test_nan_and_infinity_show(device):
    for value in (float("nan"), float("inf")):
        layer = torch.rand(4, 3, device=device)
        layer[1, 2] = value
        labels = torch.tensor([0, 0, 1, 1], device=device)
        losses = triton_kernels.grouped_losses([layer], labels)
        assert losses[0].isnan()
        assert losses[1].isnan()
        assert not losses[2].isfinite()


def _run(layers, labels):
    inputs = leaves(layers)
    losses = triton_kernels.grouped_losses(inputs, labels)
    return [*losses, *torch.autograd.grad(sum(losses), inputs)]


def test_every_element_is_written_and_runs_are_equal(device, monkeypatch):
    """Fresh memory full of NaN, then full of other values: the same bits come out, and none of them is NaN."""
    layers = make_layers([(5, 3, 3), (130,), (4, 3, 3)], 40, torch.float32, device)
    layers[2] = layers[2].to(memory_format=torch.channels_last)
    layers.append(make_layers([(9,)], 40, torch.bfloat16, device)[0])
    labels = torch.randint(5, (40,), device=device)
    runs = []
    for poison in (float("nan"), 12345.0):
        _poison(monkeypatch, poison)
        runs.append(_run(layers, labels))
        monkeypatch.undo()
    for first, second in zip(*runs, strict=True):
        assert not first.isnan().any()
        assert torch.equal(first, second)


def _poison(monkeypatch, value):
    for name in ("empty", "empty_like"):
        make = getattr(torch, name)

        def poisoned(*args, make=make, **kwargs):
            tensor = make(*args, **kwargs)
            return tensor.fill_(value) if tensor.is_floating_point() else tensor.fill_(-7)

        monkeypatch.setattr(torch, name, poisoned)


def test_only_wanted_gradients(device):
    layers = make_layers([(4, 3), (5,), (6, 2)], 8, torch.float32, device)
    labels = torch.arange(8, device=device) % 3
    everything = _run(layers, labels)[3:]
    for wanted in ([True, False, False], [False, True, False], [False, False, True]):
        inputs = [x.clone().requires_grad_(want) for x, want in zip(layers, wanted, strict=True)]
        sum(triton_kernels.grouped_losses(inputs, labels)).backward()
        for x, want, expected in zip(inputs, wanted, everything, strict=True):
            assert torch.equal(x.grad, expected) if want else x.grad is None


def test_one_term_alone_and_backward_twice(device):
    layers = leaves(make_layers([(4, 3), (5,)], 8, torch.float32, device))
    copies = [layer.detach().clone() for layer in layers]
    exact = leaves(layers, torch.float64)
    labels = torch.arange(8, device=device) % 3
    for index, (ours, theirs) in enumerate(
        zip(triton_kernels.grouped_losses(layers, labels), closed_form.grouped_losses(exact, labels), strict=True)
    ):
        first = torch.autograd.grad(ours, layers, retain_graph=True)
        second = torch.autograd.grad(ours, layers, retain_graph=True)
        expected = torch.autograd.grad(theirs, exact, retain_graph=True)
        for a, b, truth in zip(first, second, expected, strict=True):
            assert torch.equal(a, b)
            assert_three_way(a, truth, truth, f"gradient of term {index}", GRADIENT)
    assert all(torch.equal(layer, copy) for layer, copy in zip(layers, copies, strict=True))  # inputs are untouched


def test_second_derivative_is_a_clear_error(device):
    layers = leaves(make_layers([(4, 3), (5,)], 4, torch.float32, device))
    labels = torch.tensor([0, 0, 1, 1], device=device)
    gradients = torch.autograd.grad(triton_kernels.grouped_losses(layers, labels)[0], layers, create_graph=True)
    with pytest.raises(RuntimeError, match='backend="torch"'):
        sum(gradient.sum() for gradient in gradients).backward()


def test_autocast(device):
    """What a half-precision forward pass hands over under autocast; the losses stay float32."""
    weight = torch.randn(6, 5, device=device, requires_grad=True)
    labels = torch.tensor([0, 0, 1, 1], device=device)
    x = torch.randn(4, 5, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        layer = torch.relu(torch.nn.functional.linear(x, weight))
        losses = triton_kernels.grouped_losses([layer], labels)
        expected = closed_form.grouped_losses([layer.double()], labels)
    assert layer.dtype == torch.bfloat16
    for ours, theirs in zip(losses, expected, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-6, atol=1e-6)
    sum(losses).backward()
    assert weight.grad.isfinite().all()


def test_labels_of_any_value(device):
    """Only equality counts; memory follows the classes in the batch."""
    layers = make_layers([(5,)], 6, torch.float32, device)
    small = torch.tensor([0, 1, 0, 2, 1, 0], device=device)
    large = torch.tensor([2**62, -5, 2**62, 0, -5, 2**62], device=device)
    for ours, theirs in zip(_run(layers, small), _run(layers, large), strict=True):
        torch.testing.assert_close(ours, theirs)  # segments come in another order
