"""The Triton pooling, relu_pool and class sums against float64 and PyTorch, in every layout, dtype and tile shape."""

from __future__ import annotations

import pytest
import torch

from moda_kernels import class_similarity, closed_form, pool, relu_pool, triton_kernels
from moda_kernels.triton_kernels import layouts
from tests.moda_kernels._helpers.triton_oracle import DEVICES, HALF, assert_three_way, leaves

pytestmark = pytest.mark.parametrize("device", DEVICES)

DTYPES = (torch.float32, *HALF)

# A tile is 2048 elements: 2048 values, 512 x 4, 128 x 16, 32 x 64, 8 x 256 or 2 x 1024 of NCHW, 64 positions x 32 neurons.
SHAPES = {
    # (N, C, *spatial): what is there twice
    "one position": (3, 700, 1, 1),  # FLAT: two programs, the second partial
    "2 x 2": (3, 260, 2, 2),  # width 4: two programs; aligned in float32
    "3": (2, 300, 3),  # width 4, positions not a multiple of four: narrow accesses
    "4 x 4": (3, 50, 4, 4),  # width 16: two programs, aligned in every dtype
    "7 x 7": (2, 40, 7, 7),  # width 64: three programs, narrow
    "8 x 8": (2, 20, 8, 8),  # width 64: two programs, aligned
    "14 x 14": (2, 9, 14, 14),  # width 256: aligned in float32, narrow in half precision
    "28 x 28": (1, 3, 28, 28),  # width 1024: two programs
    "45 x 45": (1, 2, 45, 45),  # width 1024: two rounds of the loop, narrow
    "48 x 48": (1, 3, 48, 48),  # width 1024: three rounds of the loop, two programs, aligned; as COLUMNS two splits
    "3-d": (2, 33, 2, 3, 5),  # as COLUMNS two blocks of neurons, narrow
    "11 x 11": (2, 40, 11, 11),  # as COLUMNS two blocks of neurons, two rounds of positions, aligned
}
LAYOUTS = ("contiguous", "channels_last", "other")


def arranged(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values laid out otherwise; "other" is a layout the kernels know only by copying."""
    if layout == "contiguous":
        return x
    if layout == "channels_last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    return x.movedim(0, -1).contiguous().movedim(-1, 0)


def make(name: str, layout: str, dtype: torch.dtype, device: str) -> torch.Tensor:
    return arranged(torch.randn(SHAPES[name]).to(dtype).to(device), layout)


# Every shape in float32 in both layouts, every shape in half precision once, one copied layout.
CASES = [
    *[(name, layout, torch.float32) for name in SHAPES for layout in LAYOUTS[:2]],
    *[(name, LAYOUTS[index % 2], HALF[index // 2 % 2]) for index, name in enumerate(SHAPES)],
    ("7 x 7", "other", torch.float32),
    *[("4 x 4", "contiguous", dtype) for dtype in HALF],
    *[("11 x 11", "channels_last", dtype) for dtype in HALF],
]


@pytest.mark.parametrize(("name", "layout", "dtype"), CASES, ids=str)
def test_pool(name, layout, dtype, device):
    x = make(name, layout, dtype, device)
    inputs, same, exact = leaves([x]), leaves([x]), leaves([x], torch.float64)
    (ours,), (theirs,), (truth,) = (
        triton_kernels.pool(inputs), closed_form.pool(same), closed_form.pool(exact),
    )  # fmt: skip
    assert ours.dtype == torch.float32
    assert_three_way(ours, theirs, truth, "pooled")
    upstream = torch.randn_like(ours)
    ours.backward(upstream)
    theirs.backward(upstream)
    truth.backward(upstream.double())
    assert inputs[0].grad.dtype == dtype
    gradient, expected = inputs[0].grad, exact[0].grad.to(dtype)
    assert ((gradient == 0) == (x == 0)).all()
    torch.testing.assert_close(
        gradient, expected, rtol=1.01 * torch.finfo(dtype).eps, atol=1e-7 if dtype in HALF else 0
    )


@pytest.mark.parametrize(("name", "layout", "dtype"), CASES, ids=str)
def test_relu_pool(name, layout, dtype, device):
    x = make(name, layout, dtype, device)
    (ours,), (same,), (exact,) = leaves([x]), leaves([x]), leaves([x], torch.float64)
    y, pooled = triton_kernels.relu_pool(ours, False)
    expected, theirs = closed_form.relu_pool(same, False)
    _, truth = closed_form.relu_pool(exact, False)
    assert torch.equal(y, expected)
    assert y.dtype == dtype
    assert pooled.dtype == torch.float32
    assert_three_way(pooled, theirs, truth, "pooled")
    assert torch.equal(ours, x)  # untouched
    dy, dpooled = torch.randn_like(y), torch.randn_like(pooled)
    torch.autograd.backward([y, pooled], [dy, dpooled])
    positions = x[0, 0].numel()
    spread = dpooled.double().reshape(*dpooled.shape, *[1] * (x.dim() - 2)) / positions
    gradient = torch.where(x > 0, dy.double() + spread, 0.0)
    tolerance = torch.finfo(dtype).eps
    torch.testing.assert_close(ours.grad.double(), gradient, rtol=tolerance, atol=2e-7)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_relu_pool_in_place(dtype, layout, device):
    x = make("4 x 4", layout, dtype, device)
    (leaf,) = leaves([x])
    source = leaf * 1.0
    stride = source.stride()
    y, pooled = triton_kernels.relu_pool(source, True)
    assert y.data_ptr() == source.data_ptr()
    assert y.stride() == stride
    assert torch.equal(source, x.relu())
    (pooled.sum() + 2 * y.sum()).backward()
    torch.testing.assert_close(leaf.grad, (x > 0) * torch.tensor(2 + 1 / 16, dtype=dtype, device=device))


def test_relu_pool_of_a_matrix(device):
    """(N, C): the pooled activation is y itself, widened."""
    for dtype in DTYPES:
        x = torch.randn(70, 33, device=device).to(dtype).requires_grad_()
        y, pooled = triton_kernels.relu_pool(x, False)
        assert torch.equal(y, x.relu())
        assert torch.equal(pooled, y.float())
        (pooled * 3).sum().backward()
        assert torch.equal(x.grad, (x > 0) * torch.tensor(3, dtype=dtype, device=device))


def test_relu_pool_with_one_gradient_absent(device):
    for layout in ("contiguous", "channels_last"):
        x = make("7 x 7", layout, torch.float32, device).requires_grad_()
        y, pooled = triton_kernels.relu_pool(x, False)
        dy = torch.randn_like(y)
        (from_y,) = torch.autograd.grad(y, x, dy, retain_graph=True)
        assert torch.equal(from_y, torch.where(x > 0, dy, 0.0))
        (from_pooled,) = torch.autograd.grad(pooled.sum(), x, retain_graph=True)
        torch.testing.assert_close(from_pooled, (x > 0) / 49.0)
        # A gradient that is expanded, as that of a sum is, and one from another layout.
        (expanded,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
        assert torch.equal(expanded, (x > 0).float())
        (other,) = torch.autograd.grad(y, x, arranged(dy, "other"))
        assert torch.equal(other, from_y)


def test_relu_pool_treats_nan_and_zeros_as_relu_does(device):
    x = torch.tensor([[[1.0, float("nan")], [-1.0, 2.0], [0.0, -0.0]]], device=device, requires_grad=True)
    y, pooled = triton_kernels.relu_pool(x, False)
    assert y.isnan().tolist() == [[[False, True], [False, False], [False, False]]]
    assert pooled.isnan().tolist() == [[True, False, False]]
    assert pooled[0, 1:].tolist() == [1.0, 0.0]
    y.backward(torch.ones_like(y))
    twin = x.detach().clone().requires_grad_()
    torch.relu(twin).backward(torch.ones_like(y))
    assert torch.equal(x.grad, twin.grad)


def test_memory_that_is_not_16_byte_aligned(device):
    """A view that starts in the middle of an allocation takes narrow accesses, forward and backward."""
    for dtype in DTYPES:
        base = torch.randn(1 + 2 * 8 * 16, device=device).to(dtype)
        x = base[1:].view(2, 8, 4, 4)
        assert x.data_ptr() % 16 != 0
        (ours,) = triton_kernels.pool([x])
        torch.testing.assert_close(ours, closed_form.pooled_activation(x))
        leaf = x.detach().requires_grad_()
        y, pooled = triton_kernels.relu_pool(leaf, False)
        assert torch.equal(y, x.relu())
        torch.autograd.backward([y, pooled], [torch.ones_like(y), torch.zeros_like(pooled)])
        assert torch.equal(leaf.grad, (x > 0).to(dtype))


def test_pool_leaves_a_float32_matrix_alone_and_widens_others(device):
    matrix, half = torch.randn(4, 3, device=device), torch.randn(4, 5, device=device).bfloat16()
    first, second = triton_kernels.pool([matrix, half])
    assert first is matrix
    assert torch.equal(second, half.float())


def test_pool_takes_only_the_gradients_it_gets(device):
    layers = leaves(
        [make("4 x 4", "contiguous", torch.float32, device), make("3", "contiguous", torch.float32, device)]
    )
    pooled = triton_kernels.pool(layers)
    pooled[1].sum().backward()
    assert layers[0].grad is None
    torch.testing.assert_close(layers[1].grad, layers[1].detach().sign() / 3)


def test_second_derivatives_of_pooling_are_a_clear_error(device):
    (x,) = leaves([make("4 x 4", "contiguous", torch.float32, device)])
    (gradient,) = torch.autograd.grad(triton_kernels.pool([x])[0].sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match='backend="torch"'):
        gradient.sum().backward()


def test_second_derivatives_of_relu_and_pooling_are_those_of_pytorch(device):
    """The gradient of a sum is a constant: its derivative is 0 and no error; that of a square is not."""
    values = make("4 x 4", "contiguous", torch.float32, device)
    values[0, 0, 0, 0] = torch.nan
    for outer in (torch.sum, lambda y: y.square().sum()):
        for output in (0, 1):
            (x,), (expected,) = leaves([values]), leaves([values])
            plain = torch.relu(expected)
            reference = (plain, plain.mean((2, 3)))
            pairs = []
            for leaf, outputs in ((x, triton_kernels.relu_pool(x, False)), (expected, reference)):
                (gradient,) = torch.autograd.grad(outer(outputs[output]), leaf, create_graph=True)
                gradient.sum().backward()
                pairs.append((gradient.detach(), leaf.grad))
            torch.testing.assert_close(pairs[0], pairs[1], equal_nan=True)


def test_front_doors_reach_the_kernels(device, monkeypatch):
    monkeypatch.setattr(triton_kernels, "DEVICES", dict.fromkeys(triton_kernels.OPS, frozenset({device})))
    x = make("4 x 4", "channels_last", torch.float32, device)
    torch.testing.assert_close(pool([x], backend="triton"), pool([x], backend="torch"))
    torch.testing.assert_close(relu_pool(x, backend="triton"), relu_pool(x, backend="torch"))
    labels = torch.tensor([1, 0, 1], device=device)
    with_kernels = class_similarity([x], labels, 2)
    monkeypatch.undo()
    torch.testing.assert_close(with_kernels, class_similarity([x.double()], labels, 2), check_dtype=False)


# 70 samples are three blocks of 32, 130 neurons two tiles; classes 0 and 1 cross block boundaries, class 4 is empty.
def test_class_sums(device):
    labels = torch.cat([torch.zeros(40), torch.ones(25), torch.tensor([2.0, 3, 5, 2, 3])]).long()
    labels = labels[torch.randperm(70)].to(device)
    layers = [torch.randn(70, 130, device=device), torch.rand(70, 3, device=device).bfloat16()]
    sums = triton_kernels.class_sums(layers, labels.int(), 6)
    wide = [layer.float() for layer in layers]
    same = closed_form.class_sums(wide, labels, 6)
    truth = closed_form.class_sums([layer.double() for layer in layers], labels, 6)
    for index, three in enumerate(zip(sums, same, truth, strict=True)):
        assert_three_way(*three, f"class sums of layer {index}")
        assert (three[0][4] == 0).all()
    means = triton_kernels.class_sums(layers, labels, 6, normalize=False)
    for ours, layer in zip(means, layers, strict=True):
        exact = torch.zeros(6, layer.shape[1], dtype=torch.float64, device=device).index_add(0, labels, layer.double())
        assert_three_way(ours, exact, exact, "sums of activations", ulps=8)
    again = triton_kernels.class_sums(layers, labels, 6)
    assert all(torch.equal(a, b) for a, b in zip(sums, again, strict=True))


def test_every_layout_is_recognised(device):
    """The modes the shapes above are meant for; a change of layouts.py that moves one shows here."""
    modes = {name: layouts.arrange(torch.empty(shape, device=device))[1].mode for name, shape in SHAPES.items()}
    assert sorted(set(modes.values())) == [0, 1, 2, 3, 4, 5]
    columns = [layouts.arrange(arranged(torch.empty(shape), "channels_last"))[1] for shape in SHAPES.values()]
    assert {layout.mode for layout in columns} == {layouts.FLAT, layouts.COLUMNS}
    assert max(layout.splits for layout in columns) == 2
