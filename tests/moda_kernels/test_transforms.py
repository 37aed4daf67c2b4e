"""Function transforms and tracers: "auto" works under all of them, a backend that cannot says which one can."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.func import grad, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from moda_kernels import BackendUnavailableError, modular_losses, relu_pool
from tests.moda_kernels._helpers.native_needed import needs_native

LABELS = torch.tensor([0, 1, 0, 1])
NATIVE = pytest.param("native", marks=needs_native)


def losses(x: Tensor, backend: str) -> Tensor:
    return sum(modular_losses([x], LABELS, backend=backend))


def pooled(x: Tensor, backend: str) -> Tensor:
    y, rows = relu_pool(x, backend=backend)
    return y.sum() + rows.square().sum()


def batch(samples: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(samples, 3, 5, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradient(function, x: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(function(leaf, "torch"), leaf)[0]


@pytest.mark.parametrize("function", [losses, pooled])
@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
class TestThatWork:
    def test_grad(self, function, backend):
        torch.testing.assert_close(grad(lambda x: function(x, backend))(batch()), gradient(function, batch()))

    def test_vmap(self, function, backend):
        x = torch.stack([batch(), batch(seed=1)])
        right = torch.stack([function(one, "torch") for one in x])
        torch.testing.assert_close(vmap(lambda x: function(x, backend))(x), right)

    def test_per_sample_gradients(self, function, backend):
        x = torch.stack([batch(), batch(seed=1)])
        right = torch.stack([gradient(function, one) for one in x])
        torch.testing.assert_close(vmap(grad(lambda x: function(x, backend)))(x), right)

    def test_jvp(self, function, backend):
        direction = batch(seed=2)
        _, along = jvp(lambda x: function(x, backend), (batch(),), (direction,))
        torch.testing.assert_close(along, (gradient(function, batch()) * direction).sum())

    def test_jit_trace(self, function, backend):
        traced = torch.jit.trace(lambda x: function(x, backend), (batch(),), check_trace=False)
        torch.testing.assert_close(traced(batch(seed=3)), function(batch(seed=3), "torch"))


@pytest.mark.parametrize("function", [losses, pooled])
@needs_native
def test_a_named_backend_without_a_rule_names_one_that_has_it(function):
    x = batch()
    for transformed in (
        lambda f: grad(f)(x),
        lambda f: vmap(f)(x[None]),
        lambda f: jvp(f, (x,), (x,)),
        lambda f: torch.jit.trace(f, (x,), check_trace=False),
    ):
        with pytest.raises(BackendUnavailableError, match='backend="torch"'):
            transformed(lambda x: function(x, "native"))


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("backend", ["auto", NATIVE])
@pytest.mark.parametrize("function", [losses, pooled])
def test_make_fx_records_what_is_computed(function, backend, mode):
    """With gradients; other numbers go through the graph afterwards."""

    def step(x: Tensor, labels: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        value = sum(modular_losses([x], labels, backend=backend)) if function is losses else function(x, backend)
        return torch.autograd.grad(value, x)[0]

    graph = make_fx(step, tracing_mode=mode)(batch(), LABELS)
    torch.testing.assert_close(graph(batch(seed=4), LABELS), gradient(function, batch(seed=4)))


@needs_native
def test_a_recorded_kernel_is_an_operator():
    graph = make_fx(lambda x: relu_pool(x, backend="native"))(batch())
    assert torch.ops.moda_kernels.native_relu_pool.default in [node.target for node in graph.graph.nodes]


# Second derivatives.


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_second_derivatives(backend):
    signed = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    x = batch().abs().add(0.1).requires_grad_()
    assert torch.autograd.gradgradcheck(
        lambda a, b: sum(modular_losses([a, b], LABELS, backend=backend)), [x, signed], atol=1e-4
    )


def penalty(function, backend: str) -> Tensor:
    """The gradient of a gradient's norm."""
    x = batch().requires_grad_()
    (first,) = torch.autograd.grad(function(x, backend), x, create_graph=True)
    return torch.autograd.grad(first.square().sum(), x)[0]


@needs_native
def test_a_second_derivative_of_the_losses_kernels_is_an_error_that_says_what_to_use():
    with pytest.raises(RuntimeError, match='backend="torch"'):
        penalty(losses, "native")


@needs_native
def test_second_derivatives_of_the_fused_operation():
    torch.testing.assert_close(penalty(pooled, "native"), penalty(pooled, "torch"))


@needs_native
@pytest.mark.parametrize("function", [losses, pooled])
def test_a_batch_of_gradients_is_taken_or_the_error_says_what_takes_it(function):
    def together(backend: str) -> Tensor:
        x = batch().requires_grad_()
        weights = torch.tensor([1.0, 2.0], dtype=torch.float64)
        return torch.autograd.grad(function(x, backend), x, weights, is_grads_batched=True)[0]

    one = gradient(function, batch())
    torch.testing.assert_close(together("torch"), torch.stack([one, 2 * one]))
    with pytest.raises(TypeError, match='gradient: .*a batch of gradients .*backend="torch"'):
        together("native")
