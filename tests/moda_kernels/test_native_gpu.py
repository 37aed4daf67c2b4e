"""The CUDA firing counter on the device: what test_native_cuda.py checks on the host, and what only a device can show."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from moda_kernels import FiringCounter, closed_form, native
from moda_kernels.tally import Tally
from tests.moda_kernels._helpers.firing_batches import (
    DTYPES,
    assert_sums,
    batch_of_layers,
    counted,
    exact_sums,
    one_per_row,
    summed,
)

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _cuda_half() -> None:
    """On a machine with a GPU a build without the CUDA half is a failure, not a skip."""
    assert native.unavailable(torch.device("cuda")) is None


def on_device(tensors: list[Tensor]) -> list[Tensor]:
    """Copies with the same strides; views that start inside an allocation still do."""
    moved = []
    for x in tensors:
        whole = torch.empty(x.numel() + x.storage_offset(), dtype=x.dtype, device="cuda")
        moved.append(whole[x.storage_offset() :].as_strided(x.shape, x.stride()).copy_(x))
    return moved


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("samples", "classes"), [(1, 1), (5, 3), (70, 3), (70, 1000), (300, 10)])
@pytest.mark.parametrize("threshold", [0.0, 0.1])
def test_counts_are_the_oracle_s(dtype: torch.dtype, samples: int, classes: int, threshold: float):
    generator = torch.Generator().manual_seed(samples)
    layers = batch_of_layers(samples, dtype, generator)
    labels = torch.randint(-1, classes + 1, (samples,), generator=generator)
    expected = counted(closed_form.count_firings, layers, labels, classes, threshold)
    for kind in (labels, labels.int()):
        mine = counted(native.count_firings, on_device(layers), kind.cuda(), classes, threshold)
        for a, b in zip(mine, expected, strict=True):
            assert torch.equal(a.cpu(), b)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("samples", "classes"), [(1, 1), (5, 3), (70, 3), (70, 1000), (300, 10)])
def test_sums_are_the_oracle_s(dtype: torch.dtype, samples: int, classes: int):
    """And bitwise the same a second time; the counts beside them are those without sums."""
    generator = torch.Generator().manual_seed(samples)
    layers = batch_of_layers(samples, dtype, generator)
    labels = torch.randint(-1, classes + 1, (samples,), generator=generator)
    expected = counted(closed_form.count_firings, layers, labels, classes, 0.1)
    for kind in (labels, labels.int()):
        counts, sums = summed(native.count_firings, on_device(layers), kind.cuda(), classes, 0.1)
        assert all(torch.equal(a.cpu(), b) for a, b in zip(counts, expected, strict=True))
        assert_sums([x.cpu() for x in sums], layers, labels, classes)
        again = summed(native.count_firings, on_device(layers), kind.cuda(), classes, 0.1)[1]
        assert all(map(torch.equal, sums, again))


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_fires(dtype: torch.dtype):
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    x = torch.tensor([[0.0, -0.0, smallest, -smallest, float("nan"), -float("inf"), 0.1, -0.1]], dtype=dtype).cuda()
    labels = torch.zeros(1, dtype=torch.int64, device="cuda")
    for layer in (x, x[..., None].expand(1, 8, 33).contiguous()):
        assert counted(native.count_firings, [layer], labels, 1, 0.0)[0].tolist() == [[0, 0, 1, 1, 1, 1, 1, 1]]
        assert counted(native.count_firings, [layer], labels, 1, 0.1)[0].tolist() == [[0, 0, 0, 0, 1, 1, 0, 0]]


@pytest.mark.parametrize("name", ["firing_basic", "firing_signed", "firing_exact_rates"])
def test_published_counts(name: str, golden):
    data = golden(name)
    layers = sum(key.startswith("counts_l") for key in data)
    counter = FiringCounter(int(data["num_classes"]), backend="native")
    for b in range(sum(key.startswith("labels_b") for key in data)):
        activations = [torch.from_numpy(data[f"act_b{b:02d}_l{i:02d}"]).cuda() for i in range(layers)]
        counter.update(activations, torch.from_numpy(data[f"labels_b{b:02d}"]).cuda())
    assert counter.class_sizes.tolist() == data["class_counts"].tolist()
    for i, (count, rate) in enumerate(zip(counter.counts, counter.rates, strict=True)):
        assert count.tolist() == data[f"counts_l{i:02d}"].tolist()
        assert rate.tolist() == data[f"rates_l{i:02d}"].tolist()


def small_batch(samples: int = 40) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)
    layers = [one_per_row(samples, shape, generator).cuda() for shape in [(64, 8, 8), (32, 5, 5), (100,)]]
    return layers, torch.randint(0, 4, (samples,), generator=generator).cuda()


def test_more_layers_than_a_launch_takes():
    generator = torch.Generator().manual_seed(0)
    layers = [one_per_row(9, (5 + i % 7, 3, 4), generator) for i in range(130)]
    labels = torch.randint(0, 4, (9,), generator=generator)
    expected = counted(closed_form.count_firings, layers, labels, 4, 0.0)
    mine = counted(native.count_firings, on_device(layers), labels.cuda(), 4, 0.0)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(mine, expected, strict=True))
    counts, sums = summed(native.count_firings, on_device(layers), labels.cuda(), 4, 0.0)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(counts, expected, strict=True))
    assert_sums([x.cpu() for x in sums], layers, labels, 4)


@pytest.mark.parametrize("sums", [False, True], ids=["counts", "sums"])
def test_no_synchronisation(sums: bool):
    layers, labels = small_batch()
    counter = FiringCounter(4, backend="native", sums=sums)
    counter.update(layers, labels)  # makes the counts
    torch.cuda.set_sync_debug_mode("error")
    try:
        counter.update(layers, labels)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert counter.class_sizes.sum() == 80


def test_runs_on_the_current_stream():
    """Counts what a slow kernel of the same stream writes before it: on another stream it would read what was there."""
    layers, labels = small_batch()
    expected = counted(closed_form.count_firings, layers, labels, 4, 0.0)
    targets = [torch.zeros_like(x) for x in layers]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        for target, x in zip(targets, layers, strict=True):
            target.copy_(x)
        mine = counted(native.count_firings, targets, labels, 4, 0.0)
        sums = summed(native.count_firings, targets, labels, 4, 0.0)[1]
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(mine, expected, strict=True))
    assert_sums(sums, layers, labels, 4)


def test_captured_in_a_graph():
    layers, labels = small_batch()
    counts = [torch.zeros(4, x.shape[1], dtype=torch.int64, device="cuda") for x in layers]
    sizes, invalid = torch.zeros(4, dtype=torch.int64, device="cuda"), torch.zeros((), dtype=torch.int64, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        native.count_firings(layers, labels, 0.0, Tally(counts, sizes, invalid))
    assert sizes.sum() == 0  # captured, not run
    for _ in range(3):
        graph.replay()
    expected = counted(closed_form.count_firings, layers, labels, 4, 0.0)
    assert torch.equal(sizes, 3 * expected[-2])
    for count, once in zip(counts, expected, strict=False):
        assert torch.equal(count, 3 * once)


def test_sums_captured_in_a_graph():
    """Sorting, the room for the rows and both kernels; replayed on other activations and labels."""
    layers, labels = small_batch()
    counts = [torch.zeros(4, x.shape[1], dtype=torch.int64, device="cuda") for x in layers]
    sums = [count.float() for count in counts]
    sizes, invalid = torch.zeros(4, dtype=torch.int64, device="cuda"), torch.zeros((), dtype=torch.int64, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what a first call allocates, it allocates outside of the graph
        summed(native.count_firings, layers, labels, 4, 0.0)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        native.count_firings(layers, labels, 0.0, Tally(counts, sizes, invalid, sums))
    assert sizes.sum() == 0  # captured, not run
    expected = [torch.zeros_like(total, dtype=torch.float64) for total in sums]
    for _ in range(3):
        labels.copy_(labels.roll(1))
        layers[0].mul_(2)
        graph.replay()
        for total, batch in zip(expected, exact_sums(layers, labels, 4), strict=True):
            total += batch
    assert sizes.sum() == 3 * len(labels)
    for total, exact in zip(sums, expected, strict=True):
        torch.testing.assert_close(total.double(), exact, rtol=1e-5, atol=1e-6)


def test_labels_out_of_range_are_reported_at_the_next_read():
    layers, labels = small_batch()
    labels[3] = 7
    counter = FiringCounter(4, backend="native")
    counter.update(layers, labels)
    with pytest.raises(ValueError, match="1 samples with a class outside"):
        _ = counter.counts


def test_more_than_2_to_the_31_elements():
    if torch.cuda.mem_get_info()[0] < 8 << 30:
        pytest.skip("needs 8 GiB of free device memory")
    x = torch.zeros(2, 3, 1 << 29, dtype=torch.float16, device="cuda")  # 3 * 2^30 elements
    x[1, 2, -1] = 1
    labels = torch.tensor([0, 1], device="cuda")
    assert counted(native.count_firings, [x], labels, 2, 0.0)[0].tolist() == [[0, 0, 0], [0, 0, 1]]
    last = x.view(2, 3 << 19, 1024).movedim(-1, 1)
    counts = counted(native.count_firings, [last], labels, 2, 0.0)[0]
    assert counts[1, 1023] == 1
    assert counts.sum() == 1


def test_a_second_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    layers, labels = small_batch()
    expected = counted(closed_form.count_firings, layers, labels, 4, 0.0)
    mine = counted(native.count_firings, [x.to("cuda:1") for x in layers], labels.to("cuda:1"), 4, 0.0)
    assert torch.cuda.current_device() == 0
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(mine, expected, strict=True))


def test_a_cuda_error_is_an_exception_with_its_name():
    """In a process of its own: an illegal address leaves the device unusable to it."""
    code = (
        "import torch; from moda_kernels import _native_calls as calls; torch.zeros(1).cuda()\n"
        "s = torch.cuda.current_stream()\n"
        "calls.extension().count_firings_cuda([], (0, 1, 0, 1, 0, 0), 99, s.cuda_stream)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=False)
    assert "RuntimeError: cudaErrorInvalidDevice: invalid device ordinal" in done.stderr


def test_compute_sanitizer_finds_nothing(tmp_path):
    import shutil

    if shutil.which("compute-sanitizer") is None:
        pytest.skip("needs compute-sanitizer")
    tests = [f"{__file__}::test_{name}_are_the_oracle_s" for name in ("counts", "sums")]
    command = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-m", "pytest"]
    done = subprocess.run(
        [*command, "-q", "-n0", *tests, "-k", "70-3"], capture_output=True, text=True, env=os.environ, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:]
