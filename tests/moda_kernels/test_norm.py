"""The front door of norm_relu_pool and its definition in plain PyTorch."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from moda_kernels import norm_relu_pool
from moda_kernels.batch_norm import ACTIVATIONS
from tests.moda_kernels._helpers.norms import Case, as_leaves, assert_three_way, make_case, outcome, truth

BACKENDS = ("torch", "auto")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def front_door(backend: str):
    return lambda x, norm: norm_relu_pool(x, **norm._asdict(), backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(6, 3), (4, 3, 5), (4, 3, 5, 6), (2, 3, 2, 3, 4)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"residual": True},
        {"training": False},
        {"affine": False},
        {"running": False},
        {"last": True, "residual": True},
        *({"activation": name, "residual": name in ("relu6", "silu")} for name in ACTIVATIONS[1:]),
    ],
    ids=str,
)
def test_three_ways(shape, dtype, backend, options):
    assert_three_way(make_case(shape, dtype, **options), front_door(backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "options", [{}, {"residual": True}, {"training": False, "residual": True}, {"affine": False}], ids=str
)
def test_gradcheck(options, backend):
    case = as_leaves(make_case((3, 4, 2, 2), torch.float64, constant=False, running="training" in options, **options))

    def run(*leaves: torch.Tensor):
        given = iter(leaves)
        x, norm = next(given), case.norm
        for name in ("residual", "weight", "bias"):
            if getattr(norm, name) is not None:
                norm = norm._replace(**{name: next(given)})
        return norm_relu_pool(x, **norm._asdict(), backend=backend)

    assert torch.autograd.gradcheck(run, case.leaves())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_module_keeps_its_running_statistics(backend):
    """Momentum and cumulative average over several steps, beside nn.BatchNorm2d."""
    for momentum in (0.1, None):
        theirs, ours = nn.BatchNorm2d(3, momentum=momentum), nn.BatchNorm2d(3, momentum=momentum)
        for step in range(1, 4):
            x = torch.randn(4, 3, 5, 5) * step + step
            expected = theirs(x).relu()
            y, _ = norm_relu_pool(
                x, ours.running_mean, ours.running_var, ours.weight, ours.bias,
                training=True, momentum=1 / step if momentum is None else momentum, eps=ours.eps, backend=backend,
            )  # fmt: skip
            torch.testing.assert_close(y, expected)
        torch.testing.assert_close(ours.running_mean, theirs.running_mean)
        torch.testing.assert_close(ours.running_var, theirs.running_var)


@pytest.mark.parametrize("backend", BACKENDS)
def test_running_statistics_are_left_alone_in_eval(backend):
    case = make_case((4, 3, 5, 5), training=False)
    before = [tensor.clone() for tensor in case.norm.tensors()]
    front_door(backend)(case.x, case.norm)
    for tensor, kept in zip(case.norm.tensors(), before, strict=True):
        assert torch.equal(tensor, kept)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_goes_through_as_in_relu(backend):
    case = make_case((2, 3, 4, 4), training=False)
    case.x[0, 0, 1, 1] = torch.nan
    y, pooled = front_door(backend)(case.x, case.norm)
    expected, _ = truth(case.x, case.norm)
    assert torch.equal(y.isnan(), expected.isnan())
    assert pooled.isnan().nonzero().tolist() == [[0, 0]]


def test_compiles_whole():
    case = make_case((4, 3, 5, 5), residual=True)
    run = front_door("auto")
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for name, tensor in outcome(case, compiled).named().items():
        torch.testing.assert_close(tensor, outcome(case, run).named()[name], rtol=1e-5, atol=1e-6)


def test_fake_tensors_go_to_plain_pytorch():
    with FakeTensorMode():
        x = torch.empty(4, 3, 5, 5, device="cpu", requires_grad=True)
        y, pooled = norm_relu_pool(x, torch.zeros(3), torch.ones(3), training=True)
        (y.sum() + pooled.sum()).backward()
        assert x.grad is not None
    assert y.shape == (4, 3, 5, 5)
    assert pooled.shape == (4, 3)


def test_other_tensors_without_memory_of_their_own_go_to_plain_pytorch():
    """A pending negation, a batch of vmap's, a subclass, a derivative of torch.func's."""
    x = torch.randn(4, 3, 5, 5)
    statistics = (torch.zeros(3), torch.ones(3))
    expected = norm_relu_pool(-x, *statistics, backend="torch")
    negative = torch._neg_view(x)
    assert negative.is_neg()
    torch.testing.assert_close(norm_relu_pool(negative, *statistics), expected)
    torch.testing.assert_close(
        norm_relu_pool((-x).as_subclass(Marked), *statistics)[1].as_subclass(torch.Tensor), expected[1]
    )
    batched = torch.func.vmap(lambda one: norm_relu_pool(one, *statistics)[1])(torch.stack([-x, x]))
    torch.testing.assert_close(batched[0], expected[1])
    gradient = torch.func.grad(lambda one: norm_relu_pool(one, *statistics)[1].sum())(-x)
    torch.testing.assert_close(gradient, (x < 0) / (25 * (1 + 1e-5) ** 0.5))


class Marked(torch.Tensor):
    """A subclass that adds nothing."""


def test_meta_tensors_have_shapes():
    x = torch.empty(4, 3, 5, 5, device="meta")
    y, pooled = norm_relu_pool(x, torch.empty(3, device="meta"), torch.empty(3, device="meta"))
    assert (y.shape, pooled.shape) == ((4, 3, 5, 5), (4, 3))


def wrong(change: dict[str, object]) -> Case:
    case = make_case((4, 3, 5, 5))
    x = change.pop("x", case.x)
    return Case(x, case.norm._replace(**change), None, None)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"x": torch.zeros(2, 3).long()}, TypeError, "x: expected a floating-point dtype"),
        ({"x": torch.zeros(3)}, ValueError, r"x: expected shape \(N, C\)"),
        ({"x": torch.zeros(1, 3, 1, 1)}, ValueError, r"Expected more than 1 value per channel when training, got input size torch.Size\(\[1, 3, 1, 1\]\)"),
        ({"x": torch.zeros(4, 3, 5, 5).to_sparse()}, TypeError, "x: expected a strided tensor"),
        ({"weight": torch.ones(4)}, ValueError, r"weight: expected shape \(3,\), one number per neuron, got \(4,\)"),
        ({"bias": torch.ones(3, 1)}, ValueError, r"bias: expected shape \(3,\)"),
        ({"running_var": None}, ValueError, "running_var: expected both"),
        ({"running_mean": None}, ValueError, "running_mean: expected both"),
        ({"residual": torch.zeros(4, 3, 5, 5).to_sparse()}, TypeError, "residual: expected a strided tensor"),
        ({"weight": [1, 2, 3]}, TypeError, "weight: expected a tensor or None, got list"),
        ({"weight": torch.ones(3).double()}, TypeError, "weight: expected torch.float32 beside x of torch.float32, got torch.float64"),
        ({"weight": torch.ones(3).bfloat16()}, TypeError, "weight: expected torch.float32"),
        ({"bias": torch.ones(3, device="meta")}, ValueError, "bias: expected device cpu as x is on, got meta"),
        ({"residual": torch.zeros(4, 3, 5, 1)}, ValueError, r"residual: expected shape \(4, 3, 5, 5\) as x has"),
        ({"residual": torch.zeros(4, 3, 5, 5).double()}, TypeError, "residual: expected torch.float32 as x has"),
        ({"residual": 0.5}, TypeError, "residual: expected a tensor or None, got float"),
        ({"residual": torch.zeros(4, 3, 5, 5, device="meta")}, ValueError, "residual: expected device cpu"),
        ({"training": 1}, TypeError, "training: expected a bool, got int"),
        ({"momentum": None}, TypeError, "momentum: expected a number, got NoneType; for a cumulative average pass 1 / num_batches_tracked"),
        ({"momentum": float("nan")}, ValueError, "momentum: expected a finite number, got nan"),
        ({"activation": "tanh"}, ValueError, "activation: expected one of 'relu', 'relu6', 'hardswish', 'silu', 'gelu', got 'tanh'"),
        ({"activation": torch.relu}, TypeError, "activation: expected a str, got builtin_function_or_method"),
        ({"running_mean": torch.zeros(3, requires_grad=True)}, ValueError, "running_mean: expected a tensor that requires no gradient when training"),
        ({"eps": "1e-5"}, TypeError, "eps: expected a number, got str"),
        ({"eps": 0.0}, ValueError, "eps: expected a positive number when training, got 0.0"),
        ({"eps": -1.0, "training": False}, ValueError, "eps: expected a number of at least 0, got -1.0"),
        ({"running_mean": None, "running_var": None, "training": False}, ValueError, "running_mean: expected running statistics where training is False"),
    ],
)  # fmt: skip
def test_bad_input_is_named(change, kind, message):
    case = wrong(dict(change))
    before = [tensor.clone() for tensor in (case.norm.running_mean, case.norm.running_var) if tensor is not None]
    with pytest.raises(kind, match=message):
        front_door("auto")(case.x, case.norm)
    after = [tensor for tensor in (case.norm.running_mean, case.norm.running_var) if tensor is not None]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
