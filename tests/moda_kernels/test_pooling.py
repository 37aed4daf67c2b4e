from __future__ import annotations

import pytest
import torch

from moda_kernels import pool, relu_pool


@pytest.mark.parametrize("backend", ["torch", "reference", "auto"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_pool_is_the_mean_magnitude(dtype, backend):
    x = torch.randn(3, 4, 5, 6).to(dtype)
    flat = torch.randn(3, 7).to(dtype)
    spatial, linear = pool([x, flat], backend=backend)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert spatial.dtype == linear.dtype == wide
    torch.testing.assert_close(spatial.double(), x.double().abs().mean((2, 3)), rtol=1e-6, atol=1e-7)
    assert torch.equal(linear, flat.to(wide))


@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 5), (4, 3, 5, 6)])
def test_relu_pool_matches_relu_and_pool(shape, inplace, backend):
    x = torch.randn(shape, dtype=torch.float64)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    source = ours * 1.0  # a non-leaf, so that it may be overwritten
    y, pooled = relu_pool(source, inplace=inplace, backend=backend)
    expected = torch.relu(theirs)
    expected_pooled = expected if expected.dim() == 2 else expected.flatten(2).mean(2)
    torch.testing.assert_close((y, pooled), (expected, expected_pooled))
    assert (y.data_ptr() == source.data_ptr()) is inplace
    dy, dpooled = torch.randn_like(y), torch.randn_like(pooled)
    torch.autograd.backward([y, pooled], [dy, dpooled])
    torch.autograd.backward([expected, expected_pooled], [dy, dpooled])
    torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_relu_pool_passes_nan_on_as_relu_does(backend):
    x = torch.tensor([[[1.0, float("nan")], [-1.0, 2.0]]])
    y, pooled = relu_pool(x, backend=backend)
    assert y.isnan().tolist() == [[[False, True], [False, False]]]
    assert pooled.isnan().tolist() == [[True, False]]
    assert pooled[0, 1].item() == 1.0


def test_bad_input_is_named():
    with pytest.raises(TypeError, match="x: expected a floating-point dtype, got torch.int64"):
        relu_pool(torch.zeros(2, 3).long())
    with pytest.raises(ValueError, match=r"x: expected shape \(N, C\) or \(N, C, \*spatial\), got \(3,\)"):
        relu_pool(torch.zeros(3))
    with pytest.raises(ValueError, match="activations: expected at least one layer, got none"):
        pool([])
