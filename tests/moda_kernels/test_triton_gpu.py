"""What only a GPU shows: graphs, streams, synchronisation, races, memory beyond 2^31 elements, a second device.

Values and gradients on the GPU are in the other test_triton files, whose tests run on both devices.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from moda_kernels import class_similarity, closed_form, modular_losses, pool, relu_pool, triton_kernels

pytestmark = pytest.mark.gpu

# The taps of ResNet18 on CIFAR10 at batch 128, a hidden (N, C) layer, and one layer in each other layout and dtype.
SHAPES = [(64, 32, 32)] * 2 + [(128, 16, 16), (256, 8, 8), (512, 4, 4), (512,), (48, 7, 7)]


def _batch(samples=128, classes=10, device="cuda"):
    layers = [torch.randn(samples, *shape, device=device).relu() for shape in SHAPES]
    layers[1] = layers[1].to(memory_format=torch.channels_last)
    layers[3] = layers[3].bfloat16()
    layers[4] = layers[4].half().to(memory_format=torch.channels_last)
    return [layer.requires_grad_() for layer in layers], torch.randint(classes, (samples,), device=device)


def _step(layers, labels):
    losses = modular_losses(layers, labels, backend="triton")
    total = losses.affinity + 0.7 * losses.dispersion + 0.3 * losses.compactness
    return [*losses, *torch.autograd.grad(total, layers)]


def _exact(layers, labels):
    wide = [layer.detach().double().requires_grad_() for layer in layers]
    losses = closed_form.grouped_losses(wide, labels)
    return [*losses, *torch.autograd.grad(losses[0] + 0.7 * losses[1] + 0.3 * losses[2], wide)]


def _assert_right(results, exact):
    for index, (ours, truth) in enumerate(zip(results, exact, strict=True)):
        unit, subnormal = torch.finfo(ours.dtype).eps, torch.finfo(ours.dtype).smallest_normal
        error = (ours.detach().double() - truth).abs()
        # Below the smallest normal number, what is rounded to is as far apart as there.
        allowed = unit * truth.abs().clamp_min(subnormal) + 2e-5 * truth.abs().max()
        assert (error <= allowed).all(), f"result {index}: off by {error.max().item():.3g}"


def test_auto_chooses_triton():
    layers, labels = _batch()
    for ours, auto in zip(_step(layers, labels)[:3], modular_losses(layers, labels), strict=True):
        assert torch.equal(ours, auto)


def test_values_and_gradients_at_full_size():
    layers, labels = _batch()
    _assert_right(_step(layers, labels), _exact(layers, labels))


@pytest.mark.parametrize("classes", [1, 10, 100000])
def test_a_large_batch_of_any_number_of_classes(classes):
    """65536 samples are 2048 blocks; one class crosses all of them."""
    layers = [torch.rand(65536, width, device="cuda").requires_grad_() for width in (200, 37)]
    labels = torch.randint(classes, (65536,), device="cuda")
    _assert_right(_step(layers, labels), _exact(layers, labels))


def test_a_thousand_runs_are_bitwise_equal():
    """A race shows as a difference between runs on the same memory contents."""
    layers, labels = _batch()
    first = _step(layers, labels)
    for _ in range(1000):
        for a, b in zip(first, _step(layers, labels), strict=True):
            assert torch.equal(a, b)


def test_no_synchronisation():
    layers, labels = _batch()
    x = torch.randn(8, 64, 56, 56, device="cuda").to(memory_format=torch.channels_last).requires_grad_()

    def everything():
        y, pooled = relu_pool(x, backend="triton")
        rows = pool([y], backend="triton")[0]
        (y.sum() + pooled.sum() + rows.sum()).backward()
        return _step(layers, labels)

    everything()  # compiles; copies tables
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        everything()
        fresh = [layer.detach().clone().requires_grad_() for layer in layers]  # other addresses: other tables
        _step(fresh, labels)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_cuda_graph():
    layers, labels = _batch()
    x = torch.randn(4, 64, 56, 56, device="cuda").to(memory_format=torch.channels_last).requires_grad_()

    def everything():
        y, pooled = relu_pool(x, backend="triton")
        return [*_step(layers, labels), *torch.autograd.grad(y.sum() + 3 * pooled.sum(), x)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            everything()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = everything()
    for seed in range(3):
        torch.manual_seed(seed)
        with torch.no_grad():
            for layer in layers:
                layer.copy_(torch.randn_like(layer).relu())
            x.copy_(torch.randn_like(x))
            labels.copy_(torch.randint(7, labels.shape, device="cuda"))
        graph.replay()
        replayed = [tensor.clone() for tensor in captured]
        for a, b in zip(replayed, everything(), strict=True):
            assert torch.equal(a, b)


def test_side_stream():
    """Work goes to the current stream: inputs written there a moment ago are seen."""
    layers, labels = _batch()
    expected = _step(layers, labels)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        late = [torch.zeros_like(layer) for layer in layers]
        torch.cuda._sleep(50_000_000)
        with torch.no_grad():
            for target, layer in zip(late, layers, strict=True):
                target.copy_(layer)
        got = _step([layer.requires_grad_() for layer in late], labels)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


def _needs(gigabytes):
    free, _ = torch.cuda.mem_get_info()
    if free < gigabytes * 2**30:
        pytest.skip(f"needs {gigabytes} GiB of free device memory, there are {free / 2**30:.0f}")


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_more_than_2_31_elements(layout):
    _needs(32)
    x = torch.randn(33, 64, 1024, 1024, dtype=torch.float16, device="cuda")  # 2.2e9 elements, 4.4 GB
    if layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    assert x.numel() > 2**31
    x.requires_grad_()
    y, pooled = relu_pool(x, backend="triton")
    rows = triton_kernels.pool([x])[0]
    for sample in (0, 32):
        last = x[sample].detach().float()
        assert torch.equal(y[sample], x[sample].relu())
        torch.testing.assert_close(pooled[sample], last.relu().mean((1, 2)), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(rows[sample], last.abs().mean((1, 2)), rtol=1e-5, atol=1e-6)
    (from_pooled,) = torch.autograd.grad(pooled.sum() * 1024, x)
    assert torch.equal(from_pooled[32], (x[32] > 0).half() / 1024)
    del from_pooled, y
    (from_rows,) = torch.autograd.grad(rows.sum() * 1024, x)
    assert torch.equal(from_rows[32], x[32].sign() / 1024)


def test_more_than_2_31_elements_of_rows():
    _needs(48)
    layer = torch.rand(70000, 32768, device="cuda")  # 2.3e9 elements, 9.2 GB
    assert layer.numel() > 2**31
    layer.requires_grad_()
    labels = torch.arange(70000, device="cuda") % 3
    losses = modular_losses([layer], labels, backend="triton")
    (gradient,) = torch.autograd.grad(losses.compactness * 2**31, layer, retain_graph=True)
    torch.testing.assert_close(gradient[-1], torch.full_like(gradient[-1], 2**31 / layer.numel()))
    del gradient
    # Uniform rows: the cosine of two independent ones is near 3/4.
    assert abs(losses.dispersion.item() - 0.75) < 1e-3
    assert abs(losses.affinity.item() - 0.25) < 1e-3
    (gradient,) = torch.autograd.grad(losses.dispersion, layer)
    row = layer[-1].detach().double()
    assert gradient[-1].abs().max() > 0
    assert abs(gradient[-1].double().dot(row)) <= 1e-5 * gradient[-1].double().norm() * row.norm()  # it is a projection


def test_second_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one device")
    layers, labels = _batch(32, device="cuda:1")
    assert torch.cuda.current_device() == 0
    results = _step(layers, labels)
    assert all(tensor.device == torch.device("cuda:1") for tensor in results)
    _assert_right(results, _exact(layers, labels))
    x = torch.randn(4, 8, 9, 9, device="cuda:1")
    torch.testing.assert_close(relu_pool(x, backend="triton"), relu_pool(x, backend="torch"))


def test_number_of_launches_does_not_depend_on_the_number_of_layers():
    def launches(count):
        layers = [torch.rand(16, 8, 4, 4, device="cuda").requires_grad_() for _ in range(count)]
        labels = torch.arange(16, device="cuda") % 4
        _step(layers, labels)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            _step(layers, labels)
            torch.cuda.synchronize()
        return sum(event.count for event in profile.key_averages() if event.key.endswith("_kernel"))

    assert launches(2) == launches(40)


def test_class_similarity():
    layers, labels = _batch()
    ours = class_similarity([layer.detach() for layer in layers], labels, 10)
    exact = class_similarity([layer.detach().double() for layer in layers], labels, 10)
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)
