"""norm_relu_pool in Triton against float64 and ATen: in the interpreter without a GPU, on it with one."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moda_kernels import norm_relu_pool, triton_kernels
from moda_kernels.batch_norm import ACTIVATIONS, BatchNorm
from tests.moda_kernels._helpers.norms import (
    Case,
    as_leaves,
    assert_three_way,
    make_case,
    neurons_last,
    outcome,
)
from tests.moda_kernels._helpers.triton_oracle import DEVICES

# The interpreter calculates in NumPy, which reports every infinity.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = (
    (70, 33),  # a matrix
    (6, 5, 1, 1),  # one position
    (5, 31, 2),
    (20, 21, 2, 2),  # neurons taken together, and some more
    (4, 7, 7),
    (3, 17, 4, 4),
    (3, 5, 7, 7),  # rows that start anywhere
    (2, 3, 14, 14),
    (2, 3, 33, 33),  # more than a tile of positions
    (2, 3, 4, 5, 6),
)
OPTIONS = (
    {},
    {"residual": True},
    {"training": False},
    {"training": False, "residual": True},
    {"affine": False, "running": False},
)


def run(x: Tensor, norm) -> tuple[Tensor, Tensor]:
    return triton_kernels.norm_relu_pool(x, norm)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("last", [False, True], ids=["positions_last", "neurons_last"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_three_ways(shape, last, device):
    for index, options in enumerate(OPTIONS):
        dtype = DTYPES[index % 3]
        case = make_case(shape, dtype, last=last, seed=index, half_parameters=index == 1, device=device, **options)
        # The interpreter adds up the rows of a tile one by one.
        ours = assert_three_way(case, run, ulps=64 if device == "cpu" else 16)
        assert ours.y.stride() == case.x.stride()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("last", [False, True], ids=["positions_last", "neurons_last"])
@pytest.mark.parametrize("shape", [(128, 64, 32, 32), (64, 256, 14, 14), (64, 96, 7, 7), (128, 512, 2, 2), (4000, 300)])
def test_full_sizes(shape, last, dtype):
    for options in OPTIONS:
        ours = assert_three_way(make_case(shape, dtype, last=last, device="cuda", **options), run, ulps=16)
        again = outcome(make_case(shape, dtype, last=last, device="cuda", **options), run)
        for name, tensor in ours.named().items():
            assert torch.equal(tensor, again.named()[name]), f"{name} differs from run to run"


OTHERS = [activation for activation in ACTIVATIONS if activation != "relu"]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("last", [False, True], ids=["positions_last", "neurons_last"])
@pytest.mark.parametrize("activation", OTHERS)
def test_other_activations(activation, last, device):
    for index, shape in enumerate(SHAPES):
        turn = index + OTHERS.index(activation) + last  # options and dtypes take turns
        options = OPTIONS[turn % len(OPTIONS)]
        case = make_case(shape, DTYPES[turn % 3], activation=activation, last=last, seed=turn, device=device, **options)
        if len(shape) == 2:  # an own pool's gradient is rounded, which sums of many terms show
            case = replace(case, dpooled=None)
        ours = assert_three_way(case, run, ulps=64)
        assert ours.y.stride() == case.x.stride()
        if index == 4:
            again = outcome(case, run).named()
            for name, tensor in ours.named().items():
                assert torch.equal(tensor, again[name]), f"{name} differs from run to run"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("last", [False, True], ids=["positions_last", "neurons_last"])
@pytest.mark.parametrize("activation", OTHERS)
def test_full_sizes_of_other_activations(activation, last, dtype):
    for shape in ((128, 64, 32, 32), (64, 96, 7, 7), (128, 512, 2, 2), (4000, 300)):
        for options in OPTIONS[:3]:
            case = make_case(shape, dtype, activation=activation, last=last, device="cuda", **options)
            case = replace(case, dpooled=None) if len(shape) == 2 else case
            ours, again = assert_three_way(case, run, ulps=16), outcome(case, run)
            for name, tensor in ours.named().items():
                assert torch.equal(tensor, again.named()[name]), f"{name} differs from run to run"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("activation", OTHERS)
def test_one_gradient_only_of_other_activations(activation, device):
    for index, (shape, last) in enumerate((((4, 7, 3), False), ((4, 7, 6, 6), True))):
        case = make_case(shape, activation=activation, last=last, residual=last, seed=index, device=device)
        assert_three_way(Case(case.x, case.norm, case.dy, None), run, ulps=64)
        assert_three_way(Case(case.x, case.norm, None, case.dpooled), run, ulps=64)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("activation", OTHERS)
def test_a_residual_that_lies_otherwise(activation, device):
    """Where it is kept for backward it comes as it was given."""
    case = make_case((3, 5, 4, 4), activation=activation, residual=True, device=device)
    apart = Case(case.x, case.norm._replace(residual=neurons_last(case.norm.residual)), case.dy, case.dpooled)
    assert apart.norm.residual.stride() != case.x.stride()
    expected, got = outcome(case, run).named(), outcome(apart, run).named()
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name


EXTREMES = (-3e38, -1e30, -1e5, -200.0, -50.0, -3.0, -1e-20, -0.0, 0.0, 1e-20, 3.0, 6.0, 50.0, 1e5, 1e30, 3e38)


def alone(values: tuple[float, ...], activation: str, device: str) -> tuple[Tensor, BatchNorm]:
    """One sample of two neurons that batch norm leaves as it is."""
    x = torch.tensor([values, values[::-1]], device=device)[None].requires_grad_()
    zero, one = torch.zeros(2, device=device), torch.ones(2, device=device)
    return x, BatchNorm(zero, one, None, None, None, False, 0.0, 0.0, activation)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("activation", OTHERS)
def test_large_numbers_and_bounds(activation, device):
    """Finite for finite numbers, and at the bounds as in PyTorch."""
    x, norm = alone(EXTREMES, activation, device)
    y, pooled = run(x, norm)
    (dx,) = torch.autograd.grad([y, pooled], x, [torch.full_like(y, 2.0), torch.full_like(pooled, 16.0)])
    exact = x.detach().double().requires_grad_()
    expected = getattr(F, activation)(exact)
    means = expected.abs().mean(2)
    near = 1e-7 if activation == "gelu" else 1e-30  # 1 + erf(z / sqrt 2) loses digits, as in PyTorch
    torch.testing.assert_close(y, expected.float(), rtol=1e-5, atol=near)
    torch.testing.assert_close(pooled, means.float(), rtol=1e-6, atol=0)
    (upstream,) = torch.autograd.grad([expected, means], exact, [torch.full_like(exact, 2), torch.full_like(means, 16)])
    torch.testing.assert_close(dx, upstream.float(), rtol=1e-5, atol=max(near, 1e-18))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("activation", OTHERS)
def test_infinities_and_nan_as_in_pytorch(activation, device):
    x, norm = alone((torch.inf, -torch.inf, torch.nan, 1.0), activation, device)
    y, pooled = run(x, norm)
    (dx,) = torch.autograd.grad(y, x, torch.full_like(y, 2.0))
    same = x.detach().clone().requires_grad_()
    expected = getattr(F, activation)(same)
    torch.testing.assert_close(y, expected, equal_nan=True)
    (upstream,) = torch.autograd.grad(expected, same, torch.full_like(y, 2.0))
    if activation in ("relu6", "hardswish"):  # PyTorch's vectorised code on a CPU stops NaN's gradient, or returns NaN
        upstream = torch.where(x.isnan(), 2.0, upstream)
    torch.testing.assert_close(dx, upstream, equal_nan=True)
    assert pooled.isnan().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("used", ["dy", "dpooled"])
def test_one_gradient_only(used, device):
    for shape, last in (((4, 7, 3), False), ((4, 7, 6, 6), True), ((5, 6), False)):
        for options in OPTIONS[:2]:
            case = make_case(shape, last=last, device=device, **options)
            kept = {"dy": case.dy, "dpooled": case.dpooled} | {"dy" if used == "dpooled" else "dpooled": None}
            assert_three_way(type(case)(case.x, case.norm, **kept), run, ulps=32)


@pytest.mark.parametrize("device", DEVICES)
def test_a_mean_far_from_zero_costs_no_digits(device):
    for last in (False, True):
        case = make_case((16, 3, 8, 8), last=last, constant=False, device=device)
        far = case.x * 0.01 + 1000
        _, _, saved = _kernels().norm_relu_pool_forward(far, case.norm)
        exact = far.double()
        torch.testing.assert_close(saved[0].double(), exact.mean((0, 2, 3)), rtol=1e-6, atol=0)
        deviation = exact.var((0, 2, 3), unbiased=False).add(case.norm.eps).rsqrt()
        torch.testing.assert_close(saved[1].double(), deviation, rtol=2e-6, atol=0)


def _kernels():
    from moda_kernels.triton_kernels import norm

    return norm


@pytest.mark.parametrize("device", DEVICES)
def test_a_tensor_that_starts_anywhere_and_numbers_with_gaps(device):
    """Accesses are no wider than every tensor's alignment; numbers per neuron may be strided."""
    case = make_case((4, 8, 4, 4), device=device)
    whole = torch.empty(case.x.numel() + 1, device=device)
    shifted = whole[1:].view(case.x.shape).copy_(case.x)
    gaps = [torch.stack([tensor, tensor], 1)[:, 0].detach() for tensor in case.norm.tensors()]
    norm = case.norm._replace(**dict(zip(("running_mean", "running_var", "weight", "bias"), gaps, strict=True)))
    expected, got = outcome(case, run), outcome(type(case)(shifted, norm, case.dy, case.dpooled), run)
    for name, tensor in expected.named().items():
        torch.testing.assert_close(got.named()[name], tensor, rtol=1e-5, atol=1e-6)
    run(shifted, norm)
    assert not torch.equal(norm.running_mean, case.norm.running_mean)


@pytest.mark.parametrize("device", DEVICES)
def test_nan_and_negative_zero_as_in_relu(device):
    case = make_case((2, 3, 4, 4), training=False, device=device)
    case.x[0, 0, 1, 1] = torch.nan
    y, pooled = run(case.x, case.norm)
    assert y.isnan().nonzero().tolist() == [[0, 0, 1, 1]]
    assert pooled.isnan().nonzero().tolist() == [[0, 0]]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_differentiable_twice(activation, device):
    case = as_leaves(make_case((4, 3, 5, 5), activation=activation, constant=False, residual=True, device=device))
    y, pooled = run(case.x, case.norm)
    upstream = [case.dy, case.dpooled]
    plain = torch.autograd.grad([y, pooled], case.leaves(), upstream, retain_graph=True)
    graphed = torch.autograd.grad([y, pooled], case.leaves(), upstream, create_graph=True)
    for a, b in zip(plain, graphed, strict=True):
        assert b.requires_grad
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
def test_the_front_door_takes_it_on_a_gpu():
    case = make_case((4, 3, 5, 5), device="cuda")
    door = lambda backend, x, norm: norm_relu_pool(x, **norm._asdict(), backend=backend)  # noqa: E731
    named, auto = outcome(case, partial(door, "triton")), outcome(case, partial(door, "auto"))
    for name, tensor in named.named().items():
        assert torch.equal(tensor, auto.named()[name]), name


@pytest.mark.gpu
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_compiles_whole(activation):
    case = make_case((4, 3, 5, 5), activation=activation, residual=True, device="cuda")
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    eager = outcome(case, run).named()
    for name, tensor in outcome(case, compiled).named().items():
        assert torch.equal(tensor, eager[name]), name


@pytest.mark.gpu
def test_no_synchronisation_and_in_a_graph():
    case = as_leaves(make_case((16, 8, 12, 12), device="cuda"))

    def everything():
        y, pooled = run(case.x, case.norm)
        return [y, pooled, *torch.autograd.grad([y, pooled], case.leaves(), [case.dy, case.dpooled])]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        everything()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            everything()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            captured = everything()
        with torch.no_grad():
            case.x.copy_(torch.randn_like(case.x))
        graph.replay()
        replayed = [tensor.clone() for tensor in captured]
        for a, b in zip(replayed, everything(), strict=True):
            assert torch.equal(a, b)
    torch.cuda.current_stream().wait_stream(stream)
