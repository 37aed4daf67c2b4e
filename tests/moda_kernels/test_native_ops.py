"""The native kernels as operators: what torch.library demands of them, and that torch.compile sees them whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

import moda_kernels
from moda_kernels import _native_ops as ops
from moda_kernels import closed_form, native
from moda_kernels.segments import Segments
from moda_kernels.tally import Tally
from tests.moda_kernels._helpers.native_needed import needs_native

pytestmark = needs_native

LABELS = torch.tensor([0, 1, 0, 2])


def layers() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 3, 5, 5, generator=generator)
    last = torch.randn(4, 8, 3, 3, generator=generator).contiguous(memory_format=torch.channels_last)
    flat = torch.randn(4, 6, generator=generator)
    return [x.requires_grad_(), last.requires_grad_(), flat.requires_grad_()]


def segment_tensors() -> list[Tensor]:
    return list(Segments.from_labels(LABELS))


def zero_counts(widths: list[int]) -> tuple[list[Tensor], Tensor, Tensor]:
    counts = [torch.zeros(3, width, dtype=torch.int64) for width in widths]
    return counts, torch.zeros(3, dtype=torch.int64), torch.zeros((), dtype=torch.int64)


def test_opcheck():
    x, last, flat = layers()
    opcheck(ops.relu_pool, (x,))
    opcheck(ops.relu_pool, (last,))
    opcheck(ops.pool, ([x, last],))
    opcheck(ops.grouped_losses, ([x, last, flat], segment_tensors()))
    opcheck(ops.class_sums, ([flat.detach()], LABELS, 3))
    counting = ([x.detach(), flat.detach()], LABELS, 0.0, *zero_counts([3, 6]))
    opcheck(ops.count_firings, (*counting, []))
    sums = [torch.zeros(3, 3), torch.zeros(3, 6)]
    opcheck(ops.count_firings, (*counting, sums))
    gradients = [x.detach(), flat.detach() * 2]
    opcheck(ops.add_attributions, (counting[0], gradients, LABELS, *zero_counts([])[1:], sums))


def losses(x: list[Tensor]) -> Tensor:
    affinity, dispersion, compactness = native.grouped_losses(x, LABELS)
    return affinity + 2 * dispersion + 0.3 * compactness


def pooling(x: list[Tensor]) -> Tensor:
    y, pooled = native.relu_pool(x[0], False)
    return y.square().sum() + sum(p.square().sum() for p in [pooled, *native.pool(x)])


@pytest.mark.parametrize("function", [losses, pooling])
def test_compiled_whole(function):
    eager, compiled = layers(), layers()
    expected = function(eager)
    result = torch.compile(function, fullgraph=True, backend="aot_eager")(compiled)
    assert result.item() == pytest.approx(expected.item(), rel=1e-6)
    expected.backward()
    result.backward()
    for a, b in zip(compiled, eager, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_counts_are_added_to_in_place_when_compiled():
    x = [layer.detach() for layer in layers()]
    counts, sizes, invalid = zero_counts([3, 8, 6])
    count = torch.compile(native.count_firings, fullgraph=True, backend="aot_eager")
    count(x, LABELS, 0.5, Tally(counts, sizes, invalid))
    count(x, LABELS, 0.5, Tally(counts, sizes, invalid))
    expected, expected_sizes, _ = zero_counts([3, 8, 6])
    closed_form.count_firings(x, LABELS, 0.5, Tally(expected, expected_sizes, torch.zeros((), dtype=torch.int64)))
    assert torch.equal(sizes, 2 * expected_sizes)
    for count, once in zip(counts, expected, strict=True):
        assert torch.equal(count, 2 * once)


def test_sums_are_added_to_in_place_when_compiled():
    x = [layer.detach() for layer in layers()]
    counts, sizes, invalid = zero_counts([3, 8, 6])
    sums = [torch.zeros(3, layer.shape[1]) for layer in x]
    count = torch.compile(native.count_firings, fullgraph=True, backend="aot_eager")
    count(x, LABELS, 0.5, Tally(counts, sizes, invalid, sums))
    count(x, LABELS, 0.5, Tally(counts, sizes, invalid, sums))
    expected, expected_sizes, _ = zero_counts([3, 8, 6])
    once = [torch.zeros_like(total) for total in sums]
    closed_form.count_firings(x, LABELS, 0.5, Tally(expected, expected_sizes, invalid, once))
    assert torch.equal(sizes, 2 * expected_sizes)
    assert all(torch.equal(count, 2 * of_one) for count, of_one in zip(counts, expected, strict=True))
    for total, of_one in zip(sums, once, strict=True):
        torch.testing.assert_close(total, 2 * of_one)


def test_double_backward_of_an_operator_is_the_same_error():
    x = layers()[0]
    gradient = torch.autograd.grad(ops.relu_pool(x)[1].sum(), x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match='differentiable once.*backend="torch"'):
        gradient.sum().backward()


def free_memory() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))


def test_more_than_2_to_the_31_elements():
    """A neuron beyond the 2^31st element fires, and is pooled; float16, 4 GiB."""
    if free_memory() < 16 << 30:
        pytest.skip("needs 16 GiB of free memory")
    x = torch.zeros(1, 3, (1 << 31) // 3 + 5, dtype=torch.float16)
    x[0, 2, -1] = 1
    counts, sizes, invalid = zero_counts([3])
    native.count_firings([x], LABELS[:1], 0.0, Tally(counts, sizes, invalid))
    assert counts[0][0].tolist() == [0, 0, 1]
    assert native.pool([x])[0].tolist() == [[0, 0, pytest.approx(1 / x.shape[2])]]


@pytest.mark.parametrize(
    "function",
    [
        lambda x, labels: moda_kernels.norm_relu_pool(x, None, None, training=True, backend="native")[1],
        lambda x, labels: moda_kernels.relu_pool(x, backend="native")[1],
        lambda x, labels: moda_kernels.pool([x], backend="native")[0],
        lambda x, labels: torch.stack(moda_kernels.modular_losses([x], labels, backend="native")),
    ],
)
def test_the_backend_asked_for_by_name_compiles_whole(function):
    torch._dynamo.reset()
    x, labels = torch.randn(6, 3, 5, 5), torch.tensor([0, 1, 0, 1, 2, 2])
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, labels), function(x, labels))
