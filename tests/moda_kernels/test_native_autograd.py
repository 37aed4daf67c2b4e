"""relu_pool as a node of autograd in C++: the function in Python is the oracle, bit for bit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from moda_kernels import _native_relu_pool, closed_form, native, relu_pool
from moda_kernels.marks import is_pooled

SHAPE = (4, 5, 7, 3)


@pytest.fixture
def function() -> _native_relu_pool.CompiledReluPool:
    found = _native_relu_pool.compiled()
    assert found is not None, "autograd was not built for this PyTorch; see docs/build.md"
    assert native.build_info()["autograd"] == "C++"
    return found


def leaf(dtype: torch.dtype = torch.float32, last: bool = False, shape: tuple[int, ...] = SHAPE) -> Tensor:
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(dtype)
    x = x.to(memory_format=torch.channels_last) if last else x
    return x.requires_grad_()


@pytest.mark.parametrize("flows", ["both", "y", "pooled"])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_values_and_gradients_of_the_function_in_python(function, dtype, last, inplace, flows) -> None:
    results = []
    for run in (function, _native_relu_pool._ReluPool.apply):
        x = leaf(dtype, last)
        y, pooled = run(x * 1, inplace)
        assert y.grad_fn is not None
        above = torch.randn(SHAPE, generator=torch.Generator().manual_seed(2)).to(y)  # contiguous, whatever y is
        rows = torch.linspace(-1, 1, 5, dtype=pooled.dtype).expand(4, 5)  # as a mean gives it
        roots = {"both": [(y, above), (pooled, rows)], "y": [(y, above)], "pooled": [(pooled, rows)]}[flows]
        torch.autograd.backward(*zip(*roots, strict=True))
        results.append((y.detach(), pooled.detach(), x.grad, y.stride(), x.grad.stride(), y._version))
    for mine, theirs in zip(*results, strict=True):
        assert torch.equal(mine, theirs) and mine.dtype == theirs.dtype if isinstance(mine, Tensor) else mine == theirs
    assert is_pooled(function(leaf(dtype, last), False)[1])


def test_the_second_derivative(function) -> None:
    def penalty(run: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Tensor:
        x = leaf(torch.float64)
        y, pooled = run(x * x)
        (gradient,) = torch.autograd.grad(y.pow(3).sum() + pooled.pow(2).sum(), x, create_graph=True)
        gradient.pow(2).sum().backward()
        return x.grad

    torch.testing.assert_close(
        penalty(lambda x: function(x, False)), penalty(lambda x: closed_form.relu_pool(x, False))
    )


def test_gradients_that_no_kernel_reads_are_asked_of_python(function) -> None:
    x = leaf()
    y, _ = function(x * 1, False)
    y.backward(torch.ones(SHAPE)._neg_view())
    assert torch.equal(x.grad, -(x > 0).float())


def test_an_error_of_python_in_the_backward_pass_is_its_own(function, monkeypatch: pytest.MonkeyPatch) -> None:
    x = leaf()
    y, _ = function(x * 1, False)

    def fail(*_: object) -> None:
        raise TypeError("gradient: of no use")

    monkeypatch.setattr(_native_relu_pool.calls, "relu_pool_backward", fail)
    with pytest.raises(TypeError, match="gradient: of no use"):
        y.backward(torch.ones(SHAPE)._neg_view())


def freed() -> Tensor:
    x = torch.ones(SHAPE)
    x.untyped_storage().resize_(0)
    return x


def in_inference_mode() -> Tensor:
    with torch.inference_mode():
        return torch.ones(SHAPE)


@pytest.mark.parametrize(
    ("make", "inplace"),
    [
        pytest.param(lambda: torch.ones(3, 4), False, id="matrix"),
        pytest.param(lambda: torch.ones(2, 3, 0), False, id="empty"),
        pytest.param(lambda: torch.ones(2, 3, 4, dtype=torch.int32), False, id="integers"),
        pytest.param(lambda: torch.ones(2, 3, 4, 5)[..., ::2], False, id="gaps"),
        pytest.param(lambda: torch.ones(SHAPE)._neg_view(), False, id="negated"),
        pytest.param(lambda: torch._efficientzerotensor(SHAPE), False, id="zero"),
        pytest.param(lambda: torch.ones(SHAPE, device="meta"), False, id="meta"),
        pytest.param(lambda: torch.ones(SHAPE).to_sparse(), False, id="sparse"),
        pytest.param(freed, False, id="freed"),
        pytest.param(in_inference_mode, False, id="inference"),
        pytest.param(leaf, True, id="leaf in place"),
        pytest.param(lambda: (leaf() * 1).view(4, 5, -1), True, id="view in place"),
        pytest.param(lambda: [1.0], False, id="list"),
    ],
)
def test_what_is_not_plain_is_left_to_others(function, make, inplace) -> None:
    assert function(make(), inplace) is None


def test_nothing_is_done_where_somebody_looks_on(function) -> None:
    x = leaf()
    seen = []
    with FlopCounterMode(display=False):
        assert function(x, False) is None
    torch.func.vmap(lambda row: seen.append(function(row, False)) or row)(torch.ones(2, *SHAPE))
    with forward_ad.dual_level():
        seen.append(function(x, False))
    torch.jit.trace(lambda x: seen.append(function(x, False)) or x * 1, torch.ones(SHAPE), check_trace=False)
    assert seen == [None, None, None]
    with torch.no_grad():
        assert function(x, False, 4) is None  # as a tap asks
        y, pooled = function(x, False)
    assert [y.requires_grad, pooled.requires_grad] == [False, False]
    assert function(x, False, 3) is None


def test_whoever_saves_tensors_saves_what_the_node_keeps(function) -> None:
    kept: list[Tensor] = []
    with saved_tensors_hooks(lambda x: kept.append(x.detach().clone()) or len(kept) - 1, lambda index: kept[index]):
        x = leaf()
        y, _ = function(x.exp() - 1, False)
    assert any(torch.equal(x, y) for x in kept)
    y.sum().backward()
    torch.testing.assert_close(x.grad, x.detach().exp() * (x > 0))


@pytest.mark.parametrize("field", ["torch_version", "source_digest"])
def test_one_that_was_built_for_others_is_not_used(function, field, monkeypatch: pytest.MonkeyPatch) -> None:
    from moda_kernels import _autograd

    monkeypatch.setattr(_autograd, field, "another")
    assert _native_relu_pool.compiled.__wrapped__() is None
    monkeypatch.setattr(_native_relu_pool, "compiled", lambda: None)
    x = leaf()
    y, pooled = relu_pool(x, backend="native")
    assert type(y.grad_fn).__name__ == "_ReluPoolBackward"
    torch.testing.assert_close(pooled, x.relu().mean((2, 3)))
