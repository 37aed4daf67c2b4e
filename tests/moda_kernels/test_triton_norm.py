"""norm_relu_pool in Triton against float64 and ATen: in the interpreter without a GPU, on it with one."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from moda_kernels import norm_relu_pool, triton_kernels
from tests.moda_kernels._helpers.norms import as_leaves, assert_three_way, make_case, outcome
from tests.moda_kernels._helpers.triton_oracle import DEVICES

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
def test_differentiable_twice(device):
    case = as_leaves(make_case((4, 3, 5, 5), constant=False, residual=True, device=device))
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
def test_compiles_whole():
    case = make_case((4, 3, 5, 5), residual=True, device="cuda")
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
