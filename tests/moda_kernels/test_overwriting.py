"""`relu_pool(inplace=True)` writes over what may be written over, and over nothing else."""

from __future__ import annotations

import pytest
import torch

from moda_kernels import relu_pool
from tests.moda_kernels._helpers.native_needed import needs_native

BACKENDS = ["auto", "torch", pytest.param("native", marks=needs_native)]


def values() -> torch.Tensor:
    return torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def leaf():
    x = values().requires_grad_()
    return x, x


def view_of_a_leaf():
    x = values().requires_grad_()
    return x[:], x


def one_of_several_views():
    x = values().requires_grad_() * 1
    return x.unbind(1)[0], x


def expanded():
    x = values()[:1]
    return x.expand(2, 3, 4, 4), x


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("make", [leaf, view_of_a_leaf, one_of_several_views, expanded])
def test_refused_before_anything_is_written(make, backend):
    x, memory = make()
    before = memory.detach().clone()
    with pytest.raises(RuntimeError, match=r"leaf|view|single memory location"):
        relu_pool(x, inplace=True, backend=backend)
    assert torch.equal(memory.detach(), before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_view_may_be_written_over(backend):
    leaf = values().requires_grad_()
    whole = leaf * 2
    y, pooled = relu_pool(whole[:, 1:], inplace=True, backend=backend)
    (gradient,) = torch.autograd.grad(whole.square().sum() + pooled.square().sum(), leaf)
    other = values().requires_grad_()
    doubled = other * 2
    rectified = torch.cat([doubled[:, :1], doubled[:, 1:].relu()], 1)
    right = rectified.square().sum() + rectified[:, 1:].mean((2, 3)).square().sum()
    torch.testing.assert_close(gradient, torch.autograd.grad(right, other)[0])
    assert y.data_ptr() == whole[:, 1:].data_ptr()


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_gradients_anything_with_memory_of_its_own_is(backend):
    for x in (values(), values()[:, 1:], values().contiguous(memory_format=torch.channels_last)):
        right = x.relu()
        version = x._version
        with torch.no_grad():
            y, pooled = relu_pool(x, inplace=True, backend=backend)
        assert y is x or y.data_ptr() == x.data_ptr()
        assert torch.equal(x, right)
        assert x._version > version
        torch.testing.assert_close(pooled, right.mean((2, 3)))
