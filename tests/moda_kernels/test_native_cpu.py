"""The C++ kernels on the CPU against the closed form, every instruction set that this processor runs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import moda_kernels
from moda_kernels import FiringCounter, _native_calls, closed_form, modular_losses, native, precision
from moda_kernels.tally import Tally
from tests.moda_kernels._helpers.firing_batches import assert_sums, batch_of_layers, summed
from tests.moda_kernels._helpers.native_needed import needs_native

pytestmark = needs_native

ISAS = native.build_info()["cpu_isas"] if native.unavailable() is None else ["not built"]
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Results are compared in the accumulation dtype; gradients come back rounded to the activation's own.
CLOSE = {torch.float64: {"rtol": 1e-11, "atol": 1e-12}, torch.float32: {"rtol": 1e-5, "atol": 1e-6}}
GRADIENT = {
    torch.float64: {"rtol": 1e-10, "atol": 1e-11},
    torch.float32: {"rtol": 2e-4, "atol": 2e-5},
    torch.bfloat16: {"rtol": 2e-2, "atol": 2e-3},
    torch.float16: {"rtol": 2e-3, "atol": 2e-4},
}
# Positions around the vectors' widths and the blocks of 64 and of 4096; neurons around a cache line, a block of 128, of 512.
SHAPES = (
    (3, 5, 1, 1),  # one position
    (4, 7, 2, 2),  # rows shorter than a vector
    (3, 11, 2, 4),
    (5, 7, 4, 4),  # as many rows as a vector has lanes, and some more
    (2, 33, 3, 5),
    (3, 8, 8, 8),
    (2, 70, 9, 11),  # no multiple of anything
    (2, 3, 65, 64),  # more than a block of positions
    (2, 515, 3, 3),  # more than a block of neurons
    (3, 5, 6),  # tokens
    (2, 3, 4, 5, 6),  # volumes
)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The instruction set in use for the test, of those that this processor runs."""
    extension = _native_calls.extension()
    best = native.build_info()["cpu_isa"]
    extension.use_isa(request.param)
    yield request.param
    extension.use_isa(best)


def neurons_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def sparse(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Signed values with dead neurons, and elements that are exactly zero."""
    x = torch.randn(shape, generator=generator)
    x[torch.rand(shape, generator=generator) < 0.3] = 0
    x[torch.rand(shape[:2], generator=generator) < 0.3] = 0
    return x.to(dtype)


def both_ways(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.clone().requires_grad_(), x.clone().requires_grad_()


def accumulation(dtype: torch.dtype) -> torch.dtype:
    return precision.accumulation(dtype)


def test_the_extension_is_there():
    """Everything below would be skipped or run on another backend without it."""
    assert native.unavailable() is None
    assert moda_kernels.backends()["native"]
    info = native.build_info()
    assert info["version"] == moda_kernels.__version__
    assert info["threading"] == "torch's OpenMP pool"


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("last", [False, True], ids=["positions_last", "neurons_last"])
def test_pool(isa: str, shape: tuple[int, ...], dtype: torch.dtype, last: bool):
    generator = torch.Generator().manual_seed(1)
    x = sparse(shape, dtype, generator)
    mine, theirs = both_ways(neurons_last(x) if last else x)
    (pooled,), (expected,) = native.pool([mine]), closed_form.pool([theirs])
    assert pooled.dtype == expected.dtype
    torch.testing.assert_close(pooled, expected, **CLOSE[accumulation(dtype)])
    upstream = torch.randn(pooled.shape, dtype=pooled.dtype, generator=generator)
    pooled.backward(upstream)
    expected.backward(upstream)
    torch.testing.assert_close(mine.grad, theirs.grad, **GRADIENT[dtype])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("last", [False, True], ids=["positions_last", "neurons_last"])
def test_relu_pool(isa: str, shape: tuple[int, ...], dtype: torch.dtype, last: bool):
    generator = torch.Generator().manual_seed(2)
    x = sparse(shape, dtype, generator)
    mine, theirs = both_ways(neurons_last(x) if last else x)
    y, pooled = native.relu_pool(mine, False)
    expected_y, expected = closed_form.relu_pool(theirs, False)
    assert torch.equal(y, expected_y)
    assert y.stride() == mine.stride()
    torch.testing.assert_close(pooled, expected, **CLOSE[accumulation(dtype)])
    upstream = [torch.randn(y.shape, generator=generator).to(dtype), torch.randn(pooled.shape, dtype=pooled.dtype)]
    torch.autograd.backward([y, pooled], upstream)
    torch.autograd.backward([expected_y, expected], upstream)
    torch.testing.assert_close(mine.grad, theirs.grad, **GRADIENT[dtype])


@pytest.mark.parametrize("used", ["y", "pooled"])
def test_relu_pool_with_one_gradient_only(isa: str, used: str):
    mine, theirs = both_ways(torch.randn(3, 4, 5, 5))
    for x, backend in ((mine, native), (theirs, closed_form)):
        y, pooled = backend.relu_pool(x, False)
        (y if used == "y" else pooled).square().sum().backward()
    torch.testing.assert_close(mine.grad, theirs.grad)


def test_relu_pool_in_place(isa: str):
    start = torch.randn(3, 4, 5, 5)
    mine, theirs = both_ways(start)
    for x, backend in ((mine, native), (theirs, closed_form)):
        hidden = x * 2
        y, pooled = backend.relu_pool(hidden, True)
        assert y.data_ptr() == hidden.data_ptr()
        (y.sum() + pooled.square().sum()).backward()
    torch.testing.assert_close(mine.grad, theirs.grad)


def test_relu_pool_in_place_of_a_view_with_gaps(isa: str):
    whole = torch.randn(3, 4, 5, 10)
    kept = whole.clone()
    y, pooled = native.relu_pool(whole[..., ::2], True)
    assert torch.equal(whole[..., ::2], kept[..., ::2].relu())
    assert torch.equal(whole[..., 1::2], kept[..., 1::2])
    torch.testing.assert_close(pooled, y.mean((2, 3)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_go_through_relu_as_in_torch(isa: str, dtype: torch.dtype):
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 0.0, 1.0, -1.0] * 3, dtype=dtype).reshape(
        1, 3, 7
    )
    mine, theirs = both_ways(x)
    y, pooled = native.relu_pool(mine, False)
    expected_y, expected = closed_form.relu_pool(theirs, False)
    torch.testing.assert_close(y, expected_y, equal_nan=True, rtol=0, atol=0)
    torch.testing.assert_close(pooled, expected, equal_nan=True)
    upstream = [torch.full_like(y, 2), torch.full_like(pooled, 7)]
    torch.autograd.backward([y, pooled], upstream)
    torch.autograd.backward([expected_y, expected], upstream)
    torch.testing.assert_close(mine.grad, theirs.grad)


@pytest.mark.parametrize("last", [False, True], ids=["positions_last", "neurons_last"])
def test_relu_pool_of_more_than_the_caches_hold(isa: str, last: bool):
    """Past 16 MiB stores go past the caches, where rows are whole cache lines, into huge pages."""
    generator = torch.Generator().manual_seed(3)
    for positions in (64, 63):
        x = torch.randn(2, 544, 64, positions, generator=generator)
        mine = (neurons_last(x) if last else x).requires_grad_()
        y, pooled = native.relu_pool(mine, False)
        assert torch.equal(y, x.relu())
        torch.testing.assert_close(pooled, x.relu().mean((2, 3)), rtol=1e-5, atol=1e-6)
        upstream = torch.randn(pooled.shape, generator=generator)
        (gradient,) = torch.autograd.grad([y, pooled], mine, [torch.ones_like(y), upstream])
        expected = (x > 0) * (1 + upstream[..., None, None] / (64 * positions))
        torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("samples", "classes"), [(1, 1), (2, 1), (2, 2), (7, 3), (33, 5), (12, 100)])
def test_grouped_losses(isa: str, dtype: torch.dtype, samples: int, classes: int):
    generator = torch.Generator().manual_seed(samples)
    layers = [
        sparse((samples, *shape), dtype, generator)
        for shape in [(3,), (130,), (17, 5, 5), (64, 4, 4), (9, 7), (5, 1, 1)]
    ]
    layers[2] = neurons_last(layers[2])
    layers[0][0] = 0  # a dead row
    labels = torch.randint(0, classes, (samples,), generator=generator)
    mine = [x.clone().requires_grad_() for x in layers]
    exact = [x.double().requires_grad_() for x in layers]
    terms, expected = native.grouped_losses(mine, labels), closed_form.grouped_losses(exact, labels)
    for term, value in zip(terms, expected, strict=True):
        assert term.dtype == accumulation(dtype)
        assert term.item() == pytest.approx(value.item(), rel=1e-5, abs=1e-6 if dtype != torch.float64 else 1e-12)
    (terms[0] + 2 * terms[1] + 0.3 * terms[2]).backward()
    (expected[0] + 2 * expected[1] + 0.3 * expected[2]).backward()
    for x, y in zip(mine, exact, strict=True):
        assert x.grad is not None
        torch.testing.assert_close(x.grad.double(), y.grad, **GRADIENT[dtype])


def test_layers_of_two_dtypes_give_float64_losses():
    generator = torch.Generator().manual_seed(4)
    layers = [torch.randn(6, 5, generator=generator), torch.randn(6, 4, dtype=torch.float64, generator=generator)]
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    losses = modular_losses(layers, labels, backend="native")
    expected = modular_losses([x.double() for x in layers], labels, backend="torch")
    assert losses.affinity.dtype == torch.float64
    torch.testing.assert_close(torch.stack(losses), torch.stack(expected), rtol=1e-6, atol=1e-7)


def test_gradcheck():
    labels = torch.tensor([0, 1, 0, 2, 1])
    layers = [torch.randn(5, *s, dtype=torch.float64, requires_grad=True) for s in [(4,), (3, 2, 2)]]
    assert torch.autograd.gradcheck(lambda *x: native.grouped_losses(x, labels), layers)
    assert torch.autograd.gradcheck(lambda *x: tuple(native.pool(x)), layers)
    assert torch.autograd.gradcheck(lambda x: native.relu_pool(x, False), layers[1:])


@pytest.mark.parametrize("scale", [1e-30, 1e-13, 1e-20, 1e25])
def test_rows_outside_of_what_a_float32_square_holds(isa: str, scale: float):
    """Squares of 1e-30 underflow and of 1e25 overflow in float32; a row's norm does not."""
    generator = torch.Generator().manual_seed(5)
    rows = torch.rand(6, 5, generator=generator) + 0.1
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    mine = (rows * scale).requires_grad_()
    exact = mine.detach().double().requires_grad_()
    affinity = native.grouped_losses([mine], labels)[0]
    expected = closed_form.grouped_losses([exact], labels)[0]
    assert affinity.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-6)
    affinity.backward()
    expected.backward()
    torch.testing.assert_close(mine.grad.double(), exact.grad, rtol=1e-3, atol=1e-4 * exact.grad.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_class_sums(isa: str, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(6)
    pooled = [torch.randn(9, width, dtype=dtype, generator=generator) for width in (3, 129, 640)]
    pooled[0][2] = 0
    labels = torch.randint(0, 4, (9,), generator=generator)
    sums = native.class_sums(pooled, labels.int(), 6)
    for mine, theirs in zip(sums, closed_form.class_sums(pooled, labels, 6), strict=True):
        torch.testing.assert_close(mine, theirs, **CLOSE[dtype])


def counted(backend: object, layers: list[Tensor], labels: Tensor, classes: int, threshold: float) -> list[Tensor]:
    """Counts on top of numbers that are no zeros, so that an overwrite shows."""
    counts = [torch.full((classes, x.shape[1]), 7) for x in layers]
    sizes, invalid = torch.full((classes,), 3), torch.tensor(11)
    backend.count_firings(layers, labels, threshold, Tally(counts, sizes, invalid))
    return [*counts, sizes, invalid]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threshold", [0.0, 0.1, 1e6])
def test_count_firings(isa: str, dtype: torch.dtype, threshold: float):
    """Rows of one small value among zeros, at every offset of a vector and its neighbours, in both layouts.

    Rows of every length up to a cache line of half precision, and short ones of more neurons than a task takes.
    """
    generator = torch.Generator().manual_seed(7)
    layers = []
    for shape in [
        (3,),
        (1030,),
        (17, 5, 5),
        (70, 9, 15),
        (520, 13),
        (3, 101),
        (6, 2, 3, 2),
        (2101, 3, 3),
        (1101, 2, 4),
        *((67, positions) for positions in range(1, 35)),
    ]:
        x = torch.zeros(13, *shape)
        flat = x.flatten(2) if x.dim() > 2 else x[..., None]
        at = torch.randint(0, flat.shape[2], flat.shape[:2], generator=generator)
        value = torch.tensor([0.0, -0.05, 0.2, -0.3])[torch.randint(0, 4, flat.shape[:2], generator=generator)]
        flat.scatter_(2, at[..., None], value[..., None])
        x = x.to(dtype)
        layers += [x, neurons_last(x)] if x.dim() > 2 else [x]
    labels = torch.randint(-1, 6, (13,), generator=generator)
    mine = counted(native, layers, labels, 5, threshold)
    for a, b in zip(mine, counted(closed_form, layers, labels, 5, threshold), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(mine, counted(native, layers, labels.int(), 5, threshold), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_fires(isa: str, dtype: torch.dtype):
    """The smallest subnormal and NaN fire; what equals the threshold, as PyTorch rounds it, does not."""
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    x = torch.tensor([[0.0, -0.0, smallest, -smallest, float("nan"), -float("inf"), 0.1, -0.1]], dtype=dtype)
    fires = counted(native, [x], torch.tensor([0]), 1, 0.0)[0] - 7
    assert fires.tolist() == [[0, 0, 1, 1, 1, 1, 1, 1]]
    fires = counted(native, [x], torch.tensor([0]), 1, 0.1)[0] - 7
    assert fires.tolist() == [[0, 0, 0, 0, 1, 1, 0, 0]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threshold", [0.0, 0.1])
@pytest.mark.parametrize(("samples", "classes"), [(1, 1), (13, 5), (40, 300)])
def test_class_statistics(isa: str, dtype: torch.dtype, threshold: float, samples: int, classes: int):
    """Counts and sums from one read, of fewer classes than samples and of more; labels that are none add nothing."""
    generator = torch.Generator().manual_seed(samples)
    layers = batch_of_layers(samples, dtype, generator)
    layers.append(torch.randn(samples, 3, 65, 64, generator=generator).to(dtype))  # more than a block of positions
    labels = torch.randint(-1, classes + 1, (samples,), generator=generator)
    before = [*[7] * len(layers), 3, 11]
    expected = [x - y for x, y in zip(counted(closed_form, layers, labels, classes, threshold), before, strict=True)]
    for kind in (labels, labels.int()):
        counts, sums = summed(native.count_firings, layers, kind, classes, threshold)
        assert all(map(torch.equal, counts, expected))
        assert_sums(sums, layers, labels, classes)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_fires_beside_a_sum(isa: str, dtype: torch.dtype):
    """A mean of the smallest subnormal is 0 and fires all the same; NaN fires, and its class's sum is NaN."""
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    values = torch.tensor([0.0, -0.0, smallest, -smallest, float("nan"), -float("inf"), 0.1, -0.1], dtype=dtype)
    x = torch.zeros(1, 8, 33, dtype=dtype)
    x[0, :, 20] = values
    for layer in (values[None], x, neurons_last(x)):
        for threshold, fires in ((0.0, [0, 0, 1, 1, 1, 1, 1, 1]), (0.1, [0, 0, 0, 0, 1, 1, 0, 0])):
            (counts, _, _), (sums,) = summed(native.count_firings, [layer], torch.tensor([0]), 1, threshold)
            assert counts.tolist() == [fires]
            assert sums.isnan().tolist() == [[False] * 4 + [True] + [False] * 3]
            assert sums[0, 5].item() == (float("inf") if layer.dim() > 2 else -float("inf"))


@pytest.mark.parametrize("name", ["firing_basic", "firing_signed", "firing_exact_rates"])
def test_published_counts(isa: str, name: str, golden):
    data = golden(name)
    layers = sum(key.startswith("counts_l") for key in data)
    batches = sum(key.startswith("labels_b") for key in data)
    counter = FiringCounter(int(data["num_classes"]), backend="native")
    for b in range(batches):
        activations = [torch.from_numpy(data[f"act_b{b:02d}_l{i:02d}"]) for i in range(layers)]
        counter.update(activations, torch.from_numpy(data[f"labels_b{b:02d}"]))
    assert counter.class_sizes.tolist() == data["class_counts"].tolist()
    for i, (count, rate) in enumerate(zip(counter.counts, counter.rates, strict=True)):
        assert count.tolist() == data[f"counts_l{i:02d}"].tolist()
        assert rate.tolist() == data[f"rates_l{i:02d}"].tolist()


@pytest.mark.parametrize("name", ["losses_basic", "losses_batch128", "losses_one_same_pair", "losses_tiny_norm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_published_losses(isa: str, name: str, dtype: torch.dtype, golden):
    data = golden(name)
    keys = sorted(key for key in data if key.startswith("act_"))
    layers = [torch.from_numpy(data[key]).to(dtype).requires_grad_() for key in keys]
    losses = modular_losses(layers, torch.from_numpy(data["labels"]), backend="native")
    rtol, atol = (2e-5, 2e-6) if dtype == torch.float32 else (1e-10, 1e-12)
    for term, expected in zip(losses, data["loss_f64"], strict=True):
        assert term.item() == pytest.approx(expected, rel=rtol, abs=atol)
    total = sum(w * t for w, t in zip(data["weights"].tolist(), losses, strict=True))
    total.backward()
    for key, x in zip(keys, layers, strict=True):
        expected = torch.from_numpy(data[key.replace("act", "grad")]).double()
        live = x.detach() != 0
        row = expected.where(live, 0).flatten(1).abs().amax(1).reshape(-1, *[1] * (x.dim() - 1))
        bound = 1e-4 * row if dtype == torch.float32 else 1e-8 * expected.abs() + 1e-11 + 1e-9 * row
        assert ((x.grad.double() - expected).abs() <= bound)[live].all()


def test_results_do_not_depend_on_the_number_of_threads():
    """Nor on the run: bitwise equal, for every operation that sums."""
    generator = torch.Generator().manual_seed(8)
    layers = [torch.randn(24, *s, generator=generator) for s in [(700,), (64, 17, 17), (96, 5, 5)]]
    layers.append(neurons_last(layers[1]))
    labels = torch.randint(0, 4, (24,), generator=generator)

    def results(threads: int) -> list[Tensor]:
        torch.set_num_threads(threads)
        inputs = [x.clone().requires_grad_() for x in layers]
        terms = native.grouped_losses(inputs, labels)
        gradients = torch.autograd.grad(sum(terms), inputs)
        counts, sums = summed(native.count_firings, layers, labels, 3, 0.5)  # samples of class 3 count nowhere
        return [*terms, *gradients, *native.pool(layers), native.relu_pool(layers[1], False)[1], *counts, *sums]

    first = results(1)
    for threads in (1, 2, 3, 8):
        for a, b in zip(first, results(threads), strict=True):
            assert torch.equal(a, b)


def test_double_backward_is_an_error_that_names_the_way_out():
    x = torch.randn(3, 4, 5, 5, requires_grad=True)
    labels = torch.tensor([0, 0, 1])
    for output in (
        native.pool([x])[0].sum(),
        sum(native.grouped_losses([x], labels)),
    ):
        (gradient,) = torch.autograd.grad(output, x, create_graph=True)
        with pytest.raises(RuntimeError, match='differentiable once.*backend="torch"'):
            gradient.sum().backward()


def test_relu_pool_is_differentiable_twice():
    x = torch.randn(3, 4, 5, 5, dtype=torch.float64)
    x = torch.where(x.abs() < 0.1, x + 0.3, x).requires_grad_()  # away from the kink
    assert torch.autograd.gradgradcheck(lambda x: native.relu_pool(x * x.cos(), False), (x,))
    y, _ = native.relu_pool(x, False)
    (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    assert torch.equal(gradient, 2 * x.clamp(min=0))
    (second,) = torch.autograd.grad(gradient.sum(), x)
    assert torch.equal(second, 2.0 * (x > 0))


def test_backward_twice_and_inputs_left_alone():
    x = torch.randn(3, 4, 5, 5, requires_grad=True)
    kept = x.detach().clone()
    labels = torch.tensor([0, 0, 1])
    total = sum(native.grouped_losses([x], labels))
    first = torch.autograd.grad(total, x, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(total, x)[0])
    assert torch.equal(x, kept)


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )


def test_an_instruction_set_that_does_not_exist_is_a_readable_reason():
    done = run_python("from moda_kernels import native; print(native.unavailable())", MODA_CPU_ISA="mmx")
    assert "MODA_CPU_ISA: expected portable, avx2 or avx512, got mmx" in done.stdout


def test_the_instruction_set_can_be_forced():
    done = run_python("from moda_kernels import native; print(native.build_info()['cpu_isa'])", MODA_CPU_ISA="portable")
    assert done.stdout.strip() == "portable"


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("version", "0.0.1", r"is of version 0\.0\.1, the package of .*pip install"),
        ("source_digest", "0", r"built from other sources.*pip install"),
    ],
)
def test_a_stale_extension_is_refused(monkeypatch: pytest.MonkeyPatch, field: str, value: str, reason: str):
    real = _native_calls.extension()
    stale = {**real.build_info(), field: value}
    monkeypatch.setattr(real, "build_info", lambda: stale)
    with pytest.raises(_native_calls.NotBuiltError, match=reason):
        _native_calls._checked_extension()
