"""Finite numbers, however large or small, give finite losses and the right ones; NaN and infinity follow one rule."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moda_kernels import (
    ModularLoss,
    class_similarity,
    closed_form,
    modular_losses,
    native,
    pool,
    relu_pool,
    triton_kernels,
)
from tests.moda_kernels._helpers.native_needed import needs_native

LABELS = torch.tensor([0, 1, 0, 1, 2])
SHAPES = ((5, 8), (5, 300), (5, 8, 5, 5), (5, 6, 2, 2), (5, 6, 41), "channels last")
SCALES = (1e-40, 1e-30, 1e-20, 1e-13, 1.0, 1e15, 1e19, 1e25, 3e37, "largest")


@pytest.fixture(params=["reference", "torch", pytest.param("native", marks=needs_native), "triton"])
def backend(request, monkeypatch):
    if request.param == "triton":
        request.getfixturevalue("triton_interpreted")
    return request.param


@pytest.fixture
def triton_interpreted(monkeypatch):
    if triton_kernels.unavailable(torch.device("cpu")) is not None:
        pytest.skip("needs Triton's interpreter")
    monkeypatch.setattr(triton_kernels, "DEVICES", None)


def made(shape, scale, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    if shape == "channels last":
        x = torch.rand(5, 8, 6, 7, generator=generator).contiguous(memory_format=torch.channels_last)
    else:
        x = torch.rand(shape, generator=generator)
        x = x * 2 - 1 if len(shape) == 2 else x
    return (x.double() * (torch.finfo(dtype).max if scale == "largest" else scale)).to(dtype)


def weighted(layers: list[Tensor], backend: str) -> tuple[list[Tensor], Tensor]:
    losses = modular_losses(layers, LABELS, backend=backend)
    return list(losses), 0.7 * losses.affinity + 0.5 * losses.dispersion + 0.3 * losses.compactness


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_losses_and_gradients(backend, shape, scale, mixed):
    """Against float64, in which these numbers are ordinary; `mixed` has ordinary rows and one of zeros beside them."""
    x = made(shape, scale)
    if mixed:
        x[0], x[2] = made(shape, 1.0)[0], 0
    exact, x = x.double().requires_grad_(), x.requires_grad_()
    truth, of_truth = weighted([exact], "torch")
    terms, of_terms = weighted([x], backend)
    for term, right in zip(terms[:2], truth, strict=False):
        assert term.item() == pytest.approx(right.item(), abs=1e-5)
    assert terms[2].item() == pytest.approx(truth[2].item(), rel=1e-5, abs=1e-37)
    (right,) = torch.autograd.grad(of_truth, exact)
    (gradient,) = torch.autograd.grad(of_terms, x)
    size = right.abs().amax(tuple(range(1, right.dim())), keepdim=True)  # of a row's gradient, which differ widely
    assert ((gradient.double() - right).abs() <= 1e-4 * size + 1e-37).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES[2:], ids=str)
def test_pooling_of_the_largest_number(backend, shape, dtype):
    largest = torch.finfo(dtype).max
    x = torch.full_like(made(shape, 1.0, dtype), largest)
    expected = torch.full(x.shape[:2], largest)
    torch.testing.assert_close(pool([x], backend=backend)[0], expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(relu_pool(x, backend=backend)[1], expected, rtol=1e-6, atol=0)
    assert modular_losses([x], LABELS, backend=backend).compactness.item() == pytest.approx(largest, rel=1e-6)


@pytest.mark.parametrize("backend", ["reference", "torch", pytest.param("native", marks=needs_native)])
@pytest.mark.parametrize("scale", [1e-300, 1e-200, 1e160, 1e300, "largest"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float64(backend, shape, scale):
    x = made(shape, scale, torch.float64).requires_grad_()
    ordinary = made(shape, 1.0, torch.float64)
    terms, total = weighted([x], backend)
    right, _ = weighted([ordinary], "torch")
    floored = isinstance(scale, float) and scale < 1  # below 1e-12 rows are not normalised: their cosines vanish
    for term, expected in zip(terms[:2], [1.0, 0.0] if floored else right, strict=False):
        assert float(term) == pytest.approx(float(expected), abs=1e-12)
    assert terms[2].isfinite()
    assert torch.autograd.grad(total, x)[0].isfinite().all()


@pytest.mark.parametrize("backend", ["torch", pytest.param("native", marks=needs_native)])
@pytest.mark.parametrize("scale", [1.0, 1e25, "largest"])
def test_class_similarity(backend, scale):
    x, ordinary = made((5, 300), scale), made((5, 300), 1.0)
    right = class_similarity([ordinary.double()], LABELS, 3, backend="torch")[0]
    result = class_similarity([x], LABELS, 3, backend=backend)[0]
    torch.testing.assert_close(result.double(), right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("shape", [(5, 8), (5, 8, 3, 3)], ids=str)
def test_one_value_that_is_no_number_makes_its_row_nan(backend, shape, value):
    """And through it both cosine terms; compactness is what the mean of magnitudes is."""
    x = made(shape, 1.0)
    x[1, 2] = value
    affinity, dispersion, compactness = modular_losses([x], LABELS, backend=backend)
    assert affinity.isnan()
    assert dispersion.isnan()
    assert compactness.isnan() if value != value else compactness == value
    if backend in ("torch", "native"):
        kept = [closed_form, native][backend == "native"].class_sums(pool([x]), LABELS, 3)[0]
        assert kept[1].isnan().all()
        assert kept[[0, 2]].isfinite().all()


@needs_native
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("weights", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("labels", [[0, 0, 1, 1, 2, 2], [0] * 6, [0, 1, 2, 3, 4, 5]], ids=str)
@pytest.mark.parametrize("neurons", [5, 20])
def test_gradients_are_no_numbers_at_the_same_places(value, weights, labels, neurons):
    """A term of weight 0 is left out, and a row of zeros has no gradient, whatever the others hold."""
    gradients = []
    for backend in ("torch", "native"):
        layers = [made((6, neurons), 1.0), made((6, 4), 1.0)]
        layers[0][1] = 0
        layers[0][2, 3] = value
        inputs = [layer.requires_grad_() for layer in layers]
        loss = ModularLoss(*weights, backend=backend)(inputs, torch.tensor(labels))
        gradients.append(torch.autograd.grad(loss, inputs))
    for right, result in zip(*gradients, strict=True):
        torch.testing.assert_close(result, right, rtol=1e-4, atol=1e-6, equal_nan=True)
