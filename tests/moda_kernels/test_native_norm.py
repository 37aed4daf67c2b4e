"""norm_relu_pool in C++ against float64 and ATen, every instruction set that this processor runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

from moda_kernels import _native_calls, _norm_ops, native, norm_relu_pool
from moda_kernels.batch_norm import ACTIVATIONS, BatchNorm
from tests.moda_kernels._helpers.native_needed import needs_native
from tests.moda_kernels._helpers.norms import (
    DEFINITIONS,
    as_leaves,
    assert_three_way,
    aten,
    make_case,
    outcome,
    truth,
)

pytestmark = needs_native

ISAS = native.build_info()["cpu_isas"] if native.unavailable() is None else ["not built"]
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SHAPES = (
    (9, 5),  # a matrix
    (70, 515),  # more neurons than a block of columns, more samples than are added up together
    (6, 5, 1, 1),  # one position
    (5, 131, 2),  # rows shorter than a vector, together: a whole number of vectors and some more
    (5, 67, 3),  # and not a power of two
    (70, 21, 2, 2),  # more samples than are added up together
    (4, 41, 7),
    (3, 17, 4, 4),
    (2, 9, 5, 5),
    (3, 35, 31),  # the last rows of the flat kind
    (3, 35, 32),  # the first of the other
    (3, 5, 33),  # vectors that end with the row
    (3, 10, 7, 7),
    (2, 11, 8, 8),
    (2, 3, 65, 64),  # more than a block of positions
    (1, 2, 64, 65),  # a block of positions and less than a vector
    (3, 5, 6),  # tokens
    (2, 3, 4, 5, 6),  # volumes
    (200, 2, 23, 23),  # more than a chunk of samples
)
OPTIONS = (
    {},
    {"residual": True},
    {"training": False},
    {"training": False, "residual": True},
    {"affine": False, "running": False},
)
SMOOTH = (
    {"activation": "relu6", "residual": True},
    {"activation": "silu"},
    {"activation": "gelu", "residual": True},
    {"activation": "silu", "training": False, "residual": True},
)
"""Options with an activation that has no kink on the way."""


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The instruction set in use for the test, of those that this processor runs."""
    extension = _native_calls.extension()
    best = native.build_info()["cpu_isa"]
    extension.use_isa(request.param)
    yield request.param
    extension.use_isa(best)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["positions_last", "neurons_last"])
def test_three_ways(isa: str, shape: tuple[int, ...], last: bool):
    for index, options in enumerate(OPTIONS):
        case = make_case(shape, last=last, seed=index, **options)
        ours = assert_three_way(case, native.norm_relu_pool, ulps=16)  # vectors of four lanes: longer sums
        assert ours.y.stride() == case.x.stride()


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("last", [False, True], ids=["positions_last", "neurons_last"])
def test_three_ways_in_other_dtypes(isa: str, dtype: torch.dtype, last: bool):
    for index, shape in enumerate(SHAPES[:-1]):
        case = make_case(shape, dtype, last=last, half_parameters=index % 2 == 0, **OPTIONS[index % len(OPTIONS)])
        assert_three_way(case, native.norm_relu_pool)


@pytest.mark.parametrize("activation", ACTIVATIONS[1:])
@pytest.mark.parametrize("last", [False, True], ids=["positions_last", "neurons_last"])
def test_three_ways_with_other_activations(isa: str, activation: str, last: bool):
    for index, shape in enumerate(SHAPES[:-1]):
        for dtype in (DTYPES[0], DTYPES[1 + index % 3]):
            options = OPTIONS[(index + last) % len(OPTIONS)]
            case = make_case(shape, dtype, last=last, seed=index, activation=activation, **options)
            if len(shape) == 2:  # an own pool's gradient is rounded, which sums of many terms show
                case = replace(case, dpooled=None)
            ours = assert_three_way(case, native.norm_relu_pool, ulps=16)
            assert ours.y.stride() == case.x.stride()


@pytest.mark.parametrize("activation", ACTIVATIONS[1:])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual", [False, True])
def test_activations_over_all_numbers(isa: str, activation: str, dtype: torch.dtype, residual: bool):
    """Every value of half precision, and far beyond what an exponential holds in the others; as PyTorch's function."""
    if dtype.itemsize == 2:
        z = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    else:
        ends = torch.tensor([0.0, -0.0, 3.0, -3.0, 6.0, torch.inf, -torch.inf, torch.nan], dtype=dtype)
        z = torch.cat(
            [torch.linspace(-30, 30, 100_001, dtype=dtype), torch.linspace(-2000, 2000, 3999, dtype=dtype), ends]
        )
        z = torch.cat(
            [z, 10 ** torch.linspace(-37, 37, 999, dtype=dtype), -(10 ** torch.linspace(-37, 37, 999, dtype=dtype))]
        )
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    ones, zeros = torch.ones(1, dtype=wide), torch.zeros(1, dtype=wide)
    x = z.view(1, 1, -1).detach().requires_grad_()
    added = torch.zeros_like(x).detach() if residual else None
    norm = BatchNorm(zeros, ones, None, None, added, False, 0.1, 0.0, activation)
    y, _ = native.norm_relu_pool(x, norm)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    exact = z.double().requires_grad_()
    expected = DEFINITIONS[activation](exact)
    (slope,) = torch.autograd.grad(expected.sum(), exact)
    theirs = z.clone().requires_grad_()
    (their_slope,) = torch.autograd.grad((their_y := getattr(F, activation)(theirs)).sum(), theirs)
    finite = z.isfinite()
    unit = torch.finfo(dtype).eps
    for mine, other, right in ((y, their_y, expected), (dx, their_slope, slope)):
        mine, other, right = (
            mine.detach().flatten()[finite].double(),
            other.detach()[finite].double(),
            right.detach()[finite],
        )
        error = (mine - right).abs() - (other - right).abs() - 2 * unit * right.abs() - 4 * torch.finfo(wide).eps
        if activation == "hardswish":  # at -3 and 3 PyTorch decides, as here; the definition's derivative lies between
            error = torch.where(mine == other, 0, error)
        assert not mine.isnan().any()
        rounded = right.abs() > torch.finfo(dtype).max  # too large for the dtype
        assert (error[~rounded] <= 0).all(), (z[finite][error.argmax()], error.max())
    assert torch.equal(y.flatten().isnan(), their_y.isnan())


@pytest.mark.parametrize("used", ["dy", "dpooled"])
@pytest.mark.parametrize("shape", [(4, 7, 3), (4, 7, 6, 6)])
@pytest.mark.parametrize("last", [False, True])
def test_one_gradient_only(isa: str, used: str, shape: tuple[int, ...], last: bool):
    for options in (*OPTIONS, {"activation": "silu"}, {"activation": "relu6", "residual": True}):
        case = make_case(shape, last=last, **options)
        kept = {"dy": case.dy, "dpooled": case.dpooled} | {"dy" if used == "dpooled" else "dpooled": None}
        assert_three_way(type(case)(case.x, case.norm, **kept), native.norm_relu_pool)


@pytest.mark.parametrize("options", [*OPTIONS, *SMOOTH], ids=str)
@pytest.mark.parametrize("shape", [(4, 3), (3, 4, 3), (2, 3, 6, 6)])
@pytest.mark.parametrize("last", [False, True])
def test_gradcheck(isa: str, options: dict[str, bool], shape: tuple[int, ...], last: bool):
    case = as_leaves(make_case(shape, torch.float64, constant=False, last=last, **options))

    def run(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        given = iter(leaves)
        x, norm = next(given), case.norm
        for name in ("residual", "weight", "bias"):
            if getattr(norm, name) is not None:
                norm = norm._replace(**{name: next(given)})
        return native.norm_relu_pool(x, norm._replace(running_mean=None, running_var=None) if norm.training else norm)

    assert torch.autograd.gradcheck(run, case.leaves())


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("shape", [(8, 6), (4, 40, 3), (4, 40, 4, 4), (2, 40, 33)])
def test_backward_cuts_where_forward_did(isa: str, shape: tuple[int, ...], last: bool):
    """With frozen statistics a gradient is 0 exactly where y is: also where z is within a rounding error of 0."""
    case = make_case(shape, training=False, last=last)
    norm = case.norm._replace(weight=None, bias=None)
    neurons = norm.running_mean.view(1, -1, *[1] * (len(shape) - 2))
    noise = torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(1)) * 2.0**-22
    norm = norm._replace(bias=torch.randn(shape[1]) * 1e-7)
    x = torch.empty_like(case.x).copy_(neurons * (1 + noise)).requires_grad_()
    y, _ = native.norm_relu_pool(x, norm)
    assert 0.1 < (y > 0).float().mean() < 0.9
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert torch.equal(dx != 0, y > 0)


@pytest.mark.parametrize(("dtype", "least"), [(torch.float16, 2.0**-24), (torch.bfloat16, 2.0**-133)])
@pytest.mark.parametrize("shape", [(8, 6), (4, 40, 3), (4, 40, 4, 4), (2, 40, 33)])
@pytest.mark.parametrize("last", [False, True])
def test_backward_cuts_what_half_precision_rounds_to_zero(
    isa: str, shape: tuple[int, ...], dtype: torch.dtype, least: float, last: bool
):
    """A positive number that y cannot hold is 0 there, and so is its gradient, as with PyTorch's ReLU."""
    ones = torch.ones(shape[1])
    half = torch.tensor(0.5 * least)  # as near to 0 as to the least number: goes to 0
    bias = torch.stack([-half, half / 2, half, torch.nextafter(half, ones[0]), 2 * half, 3 * half])
    bias = bias.repeat(shape[1] // len(bias) + 1)[: shape[1]]
    norm = make_case(shape, dtype, training=False, last=last).norm
    norm = norm._replace(running_mean=ones, running_var=ones, weight=ones, bias=bias, eps=0.0)
    x = torch.ones_like(make_case(shape, dtype, last=last).x).requires_grad_()
    y, _ = native.norm_relu_pool(x, norm)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert torch.equal(dx, torch.relu(bias.to(dtype)).sign().view(1, -1, *[1] * (len(shape) - 2)).expand(shape))
    assert torch.equal(dx != 0, y > 0)
    assert 0.4 < dx.float().mean() < 0.6


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(
    "values",
    [
        lambda x: x * 1e-3 + 1e4,  # a mean a million times the deviation
        lambda x: x * 1e25,  # squares overflow
        lambda x: x * 1e-25,  # squares underflow
        lambda x: torch.where(torch.arange(x.numel()).view(x.shape) % (x.numel() // 8) == 0, 1e6, x),  # rare outliers
        lambda x: torch.cat([x[:1] * 0 + 1e7, x[1:]]),  # the first sample far from all others
        torch.zeros_like,
        lambda x: x.clamp_min(1.5) - 1.5,  # mostly zeros
    ],
    ids=["far", "huge", "tiny", "outliers", "first", "zeros", "sparse"],
)
@pytest.mark.parametrize("shape", [(64, 3), (64, 5, 4), (16, 5, 8, 8)])
def test_hostile_values(isa: str, values, shape: tuple[int, ...], last: bool):
    """Statistics are as good as ATen's, which sums in float64."""
    case = make_case(shape, last=last)
    x = torch.empty_like(case.x).copy_(values(torch.randn(shape, generator=torch.Generator().manual_seed(2))))
    ours, expected = (
        outcome(type(case)(x, case.norm, case.dy, case.dpooled), run) for run in (native.norm_relu_pool, aten)
    )
    exact = outcome(type(case)(x, case.norm, case.dy, case.dpooled), truth, torch.float64)
    for name in ("y", "pooled", "running_mean", "running_var"):
        mine, theirs, right = (one.named()[name].double() for one in (ours, expected, exact))
        error, scale = (theirs - right).abs().nan_to_num(0.0, 0.0), right.abs().max()
        right_enough = (mine - right).abs() <= error.max() + 1e-6 * scale + 1e-6 * right.abs()
        assert (right_enough | (mine == theirs)).all(), name  # beyond float32 both are infinite


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(4, 3, 2, 3), (4, 3, 6, 6)])
def test_nan_and_infinity_stay_in_their_neuron(isa: str, shape: tuple[int, ...], training: bool):
    for value in (torch.nan, torch.inf):
        case = make_case(shape, training=training)
        case.x[0, 1, 1, 1] = value
        ours, theirs = outcome(case, native.norm_relu_pool), outcome(case, aten)
        for name in ("y", "pooled", "x"):
            mine, other = ours.named()[name], theirs.named()[name]
            assert torch.equal(mine.isnan(), other.isnan()), name
            torch.testing.assert_close(mine[:, [0, 2]], other[:, [0, 2]], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("last", [False, True], ids=["positions_last", "neurons_last"])
def test_more_than_the_caches_hold(isa: str, last: bool):
    """Past 16 MiB stores go past the caches, where rows are whole cache lines, into huge pages."""
    for shape, residual in (((2, 520, 64, 64), last), ((1040, 256, 4, 4), not last)):
        case = make_case(shape, last=last, residual=residual)
        ours, theirs = outcome(case, native.norm_relu_pool), outcome(case, aten)
        torch.testing.assert_close(ours.y, theirs.y, rtol=1e-5, atol=1e-4)  # ATen folds the mean into the bias
        torch.testing.assert_close(ours.pooled, theirs.pooled, rtol=1e-5, atol=1e-4)
        flipped = (ours.y > 0) != (theirs.y > 0)  # where z is as good as 0
        assert flipped.float().mean() < 1e-5
        for name in ("x", "residual") if residual else ("x",):
            mine, other = (one.gradients[name].masked_fill(flipped, 0) for one in (ours, theirs))
            torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-3)


def test_results_do_not_depend_on_the_number_of_threads(isa: str):
    """Nor on the run: bitwise equal, whether a block's two readings are one loop or two."""
    shapes = [(200, 2, 23, 23), (70, 515), (24, 64, 4, 4), (24, 64, 17, 17), (90, 20, 2, 2), (7, 300, 3)]
    cases = [make_case(shape, last=last, residual=last) for shape in shapes for last in (False, True)]
    cases += [make_case(shape, last=last, activation="gelu") for shape in shapes for last in (False, True)]

    def results(threads: int) -> list[Tensor]:
        torch.set_num_threads(threads)
        return [tensor for case in cases for tensor in outcome(case, native.norm_relu_pool).named().values()]

    first = results(1)
    for threads in (1, 2, 3, 8):
        for a, b in zip(first, results(threads), strict=True):
            assert torch.equal(a, b)


def test_the_same_numbers_from_views_and_other_layouts():
    """Tensors with gaps, parameters with strides, a gradient that is expanded, a residual of another layout."""
    case = make_case((4, 6, 5, 5), residual=True)
    wide = torch.zeros(4, 12, 5, 5)
    wide[:, ::2] = case.x
    spread = [torch.stack([t, t], 1)[:, 0] for t in case.norm[:4]]
    assert not spread[0].is_contiguous()
    other = case.norm.residual.contiguous(memory_format=torch.channels_last)
    norm = case.norm._replace(**dict(zip(case.norm._fields[:4], spread, strict=True)), residual=other)
    plain = outcome(case, native.norm_relu_pool)
    apart = outcome(type(case)(wide[:, ::2], norm, case.dy, case.dpooled), native.norm_relu_pool)
    for a, b in zip(plain.named().values(), apart.named().values(), strict=True):
        assert torch.equal(a, b)
    x = case.x.clone().requires_grad_()
    y, _ = native.norm_relu_pool(x, spread_norm := case.norm._replace(running_mean=None, running_var=None))
    (expanded,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    (written,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert torch.equal(expanded, written)
    assert spread_norm.training


def test_running_statistics_of_a_view_are_written_through():
    case = make_case((4, 6, 5, 5))
    table = torch.stack([case.norm.running_mean, case.norm.running_var], 1)
    norm = case.norm._replace(running_mean=table[:, 0], running_var=table[:, 1])
    native.norm_relu_pool(case.x, norm)
    native.norm_relu_pool(case.x, case.norm)
    assert torch.equal(table, torch.stack([case.norm.running_mean, case.norm.running_var], 1))


def test_only_what_is_asked_for_gets_a_gradient():
    case = make_case((4, 6, 5, 5), residual=True)
    weight = case.norm.weight.clone().requires_grad_()
    y, pooled = native.norm_relu_pool(case.x, case.norm._replace(weight=weight))
    (y.sum() + pooled.sum()).backward()
    assert weight.grad is not None
    residual = case.norm.residual.clone().requires_grad_()
    y, pooled = native.norm_relu_pool(case.x, case.norm._replace(residual=residual))
    (2 * y.sum()).backward()
    assert torch.equal(residual.grad, 2 * (y > 0).float())


def test_backward_twice_and_inputs_left_alone():
    case = as_leaves(make_case((4, 6, 5, 5), residual=True))
    kept = [tensor.detach().clone() for tensor in case.leaves()]
    y, pooled = native.norm_relu_pool(case.x, case.norm)
    total = (y * case.dy).sum() + (pooled * case.dpooled).sum()
    first = torch.autograd.grad(total, case.leaves(), retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(total, case.leaves()), strict=True):
        assert torch.equal(a, b)
    assert all(torch.equal(a, b) for a, b in zip(case.leaves(), kept, strict=True))


@pytest.mark.parametrize("options", [*OPTIONS, *SMOOTH], ids=str)
@pytest.mark.parametrize("shape", [(4, 3), (2, 2, 3), (2, 2, 2, 2)])
def test_gradgradcheck(options: dict[str, bool], shape: tuple[int, ...]):
    case = as_leaves(make_case(shape, torch.float64, constant=False, **options))
    frozen = case.norm if not case.norm.training else case.norm._replace(running_mean=None, running_var=None)

    def run(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        given = iter(leaves)
        x, norm = next(given), frozen
        for name in ("residual", "weight", "bias"):
            if getattr(norm, name) is not None:
                norm = norm._replace(**{name: next(given)})
        return native.norm_relu_pool(x, norm)

    assert torch.autograd.gradgradcheck(run, case.leaves())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("used", ["y", "pooled", "both"])
def test_a_gradient_with_a_graph_is_the_gradient(dtype: torch.dtype, used: str):
    smooth = SMOOTH if dtype.itemsize > 2 else SMOOTH[:2]  # with a graph the sum is rounded, which may change its sign
    for options in (*OPTIONS, *smooth, {"activation": "relu6"}):
        case = as_leaves(make_case((4, 6, 5, 5), dtype, **options))
        y, pooled = native.norm_relu_pool(case.x, case.norm)
        outputs = [out for out, name in ((y, "y"), (pooled, "pooled")) if used in (name, "both")]
        upstream = [case.dy if out is y else case.dpooled for out in outputs]
        plain, graphed = (
            torch.autograd.grad(outputs, case.leaves(), upstream, retain_graph=True, create_graph=graph)
            for graph in (False, True)
        )
        rounding = {torch.bfloat16: 2e-2, torch.float16: 3e-3}.get(dtype, 1e-5)
        for a, b in zip(plain, graphed, strict=True):
            assert b.requires_grad
            torch.testing.assert_close(b, a, rtol=rounding, atol=rounding * float(a.abs().max()))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_graph_of_gradients_of_tensors_that_depend_on_one_another(activation: str):
    """As in a ResNet: x is computed from what is added to its norm, and from the norm's own parameters."""
    case = as_leaves(make_case((4, 3, 5, 5), torch.float64, constant=False, residual=True, activation=activation))
    weight, bias, residual = case.norm.weight, case.norm.bias, case.norm.residual
    leaves, found = (weight, bias, residual), []
    for backend in ("native", "torch"):
        x = residual * weight.view(-1, 1, 1) + bias.view(-1, 1, 1)
        norm = case.norm._replace(bias=weight if activation == "silu" else bias, running_mean=None, running_var=None)
        y, pooled = norm_relu_pool(x, **norm._asdict(), backend=backend)
        first = torch.autograd.grad(y.pow(3).sum() + pooled.square().sum(), leaves, create_graph=True)
        found.append([*first, *torch.autograd.grad(sum(g.square().sum() for g in first), leaves)])
    largest = max(float(theirs.abs().max()) for theirs in found[1])  # some are 0 but for rounding: of a bias of x
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9 * largest)


def test_differentiating_an_operators_gradient_is_an_error_that_names_the_way_out():
    case = as_leaves(make_case((4, 6, 5, 5)))
    (gradient,) = torch.autograd.grad(through_operator(case.x, case.norm)[1].sum(), case.x, create_graph=True)
    with pytest.raises(RuntimeError, match='differentiable once.*backend="torch"'):
        gradient.sum().backward()


def test_a_weight_that_changes_before_backward_is_an_error():
    case = as_leaves(make_case((4, 6, 5, 5)))
    y, _ = native.norm_relu_pool(case.x, case.norm)
    with torch.no_grad():
        case.norm.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def through_operator(x: Tensor, norm) -> tuple[Tensor, Tensor]:
    return _norm_ops._through_operator(x, norm)


@pytest.mark.parametrize(
    "options", [*OPTIONS, *SMOOTH, {"half_parameters": True, "dtype": torch.bfloat16, "residual": True}], ids=str
)
def test_operators_and_eager_agree_to_the_bit(options):
    for shape, last in (((4, 6, 5, 5), False), ((4, 6, 5, 5), True), ((4, 6, 3), False)):
        case = make_case(shape, last=last, **options)
        ours, theirs = outcome(case, native.norm_relu_pool), outcome(case, through_operator)
        for name, tensor in ours.named().items():
            assert torch.equal(tensor, theirs.named()[name]), name


@pytest.mark.parametrize("options", [*OPTIONS, *SMOOTH[:2]], ids=str)
@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 5, 5)])
def test_opcheck(options, shape):
    case = as_leaves(make_case(shape, **options))
    norm = case.norm
    arguments = (
        norm.residual,
        norm.weight,
        norm.bias,
        norm.running_mean,
        norm.running_var,
        norm.training,
        norm.momentum,
        norm.eps,
        norm.activation,
    )
    opcheck(_norm_ops.operator, (case.x, *arguments))
    _, _, saved, _, _ = _norm_ops.operator(case.x, *arguments)
    y = None if norm.residual is None else case.x.detach().relu()
    dpooled = None if len(shape) == 2 else case.dpooled
    checks = ("test_schema", "test_faketensor")
    opcheck(
        _norm_ops.operator_backward,
        (case.x.detach(), y, saved, case.dy, dpooled, norm.training, norm.activation),
        test_utils=checks,
    )


@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 5, 5)])
@pytest.mark.parametrize("options", [*OPTIONS, SMOOTH[1]], ids=str)
def test_compiles_whole(options, shape):
    torch._dynamo.reset()  # every case is a recompilation of one function
    case = make_case(shape, **options)
    compiled = torch.compile(native.norm_relu_pool, fullgraph=True, backend="aot_eager")
    ours, theirs = outcome(case, native.norm_relu_pool), outcome(case, compiled)
    for name, tensor in ours.named().items():
        assert torch.equal(tensor, theirs.named()[name]), name


def test_fake_tensors_and_modes_go_through_the_operator():
    with FakeTensorMode():
        x = torch.empty(4, 3, 5, 5, requires_grad=True)
        y, pooled = norm_relu_pool(x, torch.zeros(3), torch.ones(3), training=True, backend="native")
        (y.sum() + pooled.sum()).backward()
        assert x.grad.shape == x.shape
    assert (y.shape, pooled.shape) == ((4, 3, 5, 5), (4, 3))


def test_the_front_door_takes_it_on_the_cpu(monkeypatch: pytest.MonkeyPatch):
    case = make_case((4, 3, 5, 5))
    ours = outcome(case, native.norm_relu_pool)
    theirs = outcome(case, lambda x, norm: norm_relu_pool(x, **norm._asdict()))
    for name, tensor in ours.named().items():
        assert torch.equal(tensor, theirs.named()[name]), name
