"""Properties of the native kernels over random shapes, layouts, dtypes, thresholds and labels."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moda_kernels import closed_form, native
from tests.moda_kernels._helpers.firing_batches import (
    DTYPES,
    assert_sums,
    count_emulated,
    counted,
    neurons_last,
    summed,
)
from tests.moda_kernels._helpers.native_needed import needs_native

pytestmark = needs_native

QUICK = settings(max_examples=60, deadline=None, derandomize=True)


@st.composite
def activation(draw: st.DrawFn, samples: int) -> Tensor:
    """(N, C) or (N, C, *spatial) in a drawn dtype and layout, with zeros, NaN and infinities among its values."""
    spatial = draw(st.lists(st.integers(1, 9), max_size=3))
    shape = [samples, draw(st.integers(1, 40)), *spatial]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn(shape, generator=generator)
    x[torch.rand(shape, generator=generator) < draw(st.sampled_from([0.0, 0.5, 0.95, 1.0]))] = 0
    if draw(st.booleans()):
        x.view(-1)[draw(st.integers(0, x.numel() - 1))] = draw(st.sampled_from([float("nan"), float("inf")]))
    x = x.to(draw(st.sampled_from(DTYPES)))
    layout = draw(st.sampled_from(["positions last", "neurons last", "gaps"]))
    if layout == "gaps":
        return torch.stack([x, torch.ones_like(x)], dim=-1)[..., 0]
    return neurons_last(x) if layout == "neurons last" and spatial else x


@st.composite
def batch(draw: st.DrawFn) -> tuple[list[Tensor], Tensor, int, float]:
    samples, classes = draw(st.integers(1, 12)), draw(st.integers(1, 6))
    layers = draw(st.lists(activation(samples), min_size=1, max_size=3))
    labels = torch.tensor(draw(st.lists(st.integers(-1, classes), min_size=samples, max_size=samples)))
    return layers, labels, classes, draw(st.sampled_from([0.0, 0.01, 0.5, 1.0, 3.0]))


@QUICK
@given(batch())
def test_counts_are_the_oracle_s_on_every_road(drawn: tuple[list[Tensor], Tensor, int, float]):
    expected = counted(closed_form.count_firings, *drawn)
    for count in (native.count_firings, count_emulated):
        for a, b in zip(counted(count, *drawn), expected, strict=True):
            assert torch.equal(a, b)


@QUICK
@given(batch(), st.randoms(use_true_random=False))
def test_counts_add_up(drawn: tuple[list[Tensor], Tensor, int, float], random):
    """Counts are at most the class sizes; a permuted batch counts the same; two halves add up to the whole."""
    layers, labels, classes, threshold = drawn
    *counts, sizes, invalid = whole = counted(native.count_firings, *drawn)
    assert all(((count >= 0) & (count <= sizes[:, None])).all() for count in counts)
    assert sizes.sum() + invalid == len(labels)
    order = list(range(len(labels)))
    random.shuffle(order)
    shuffled = counted(native.count_firings, [x[order] for x in layers], labels[order], classes, threshold)
    half = len(order) // 2
    first, second = (
        (
            counted(native.count_firings, [x[part] for x in layers], labels[part], classes, threshold)
            for part in (slice(0, max(half, 1)), slice(max(half, 1), None))
            if len(labels[part])
        )
        if len(labels) > 1
        else (whole, [torch.zeros_like(x) for x in whole])
    )
    for i, total in enumerate(whole):
        assert torch.equal(shuffled[i], total)
        assert torch.equal(first[i] + second[i], total)


@QUICK
@given(batch())
def test_sums_are_the_oracle_s_on_every_road(drawn: tuple[list[Tensor], Tensor, int, float]):
    """And the counts beside them are those without sums."""
    layers, labels, classes, _ = drawn
    expected = counted(closed_form.count_firings, *drawn)
    for count in (native.count_firings, count_emulated, closed_form.count_firings):
        counts, sums = summed(count, *drawn)
        assert all(map(torch.equal, counts, expected))
        assert_sums(sums, layers, labels, classes)


@QUICK
@given(batch(), st.randoms(use_true_random=False))
def test_sums_add_up(drawn: tuple[list[Tensor], Tensor, int, float], random):
    """A permuted batch and two halves give the same sums but for rounding; the same batch gives the same bits."""
    layers, labels, classes, threshold = drawn
    whole = summed(native.count_firings, *drawn)[1]
    for again, total in zip(summed(native.count_firings, *drawn)[1], whole, strict=True):
        torch.testing.assert_close(again, total, rtol=0, atol=0, equal_nan=True)
    order = list(range(len(labels)))
    random.shuffle(order)
    shuffled = summed(native.count_firings, [x[order] for x in layers], labels[order], classes, threshold)[1]
    cut = random.randint(0, len(order))
    halves = [
        summed(native.count_firings, [x[part] for x in layers], labels[part], classes, threshold)[1]
        for part in (order[:cut], order[cut:])
        if part
    ]
    for i, total in enumerate(whole):
        close = {"rtol": 1e-5, "atol": 1e-5, "equal_nan": True}
        torch.testing.assert_close(shuffled[i], total, **close)
        torch.testing.assert_close(sum(half[i] for half in halves), total, **close)


@QUICK
@given(st.data(), st.integers(1, 12))
def test_losses_are_the_closed_form_s(data: st.DataObject, samples: int):
    layers = [x.nan_to_num(1, 1, 1) for x in data.draw(st.lists(activation(samples), min_size=1, max_size=3))]
    labels = torch.tensor(data.draw(st.lists(st.integers(0, 4), min_size=samples, max_size=samples)))
    mine = [x.clone().requires_grad_() for x in layers]
    exact = [x.double().requires_grad_() for x in layers]
    terms, expected = native.grouped_losses(mine, labels), closed_form.grouped_losses(exact, labels)
    for term, value in zip(terms, expected, strict=True):
        torch.testing.assert_close(term.double(), value, rtol=2e-5, atol=2e-6)
    sum(terms).backward()
    sum(expected).backward()
    for x, y in zip(mine, exact, strict=True):
        width = torch.finfo(x.dtype).eps if x.dtype.itemsize == 2 else 1e-5
        scale = y.grad.abs().amax().item()
        torch.testing.assert_close(x.grad.double(), y.grad, rtol=20 * width, atol=20 * width * scale + 1e-7)


@QUICK
@given(st.data())
def test_pooled_activations_are_the_closed_form_s(data: st.DataObject):
    x = data.draw(activation(data.draw(st.integers(1, 5))))
    tolerance = {"rtol": 1e-5, "atol": 1e-6, "equal_nan": True}
    torch.testing.assert_close(native.pool([x])[0], closed_form.pool([x])[0], **tolerance)
    (y, pooled), (expected_y, expected) = native.relu_pool(x, False), closed_form.relu_pool(x, False)
    torch.testing.assert_close(y, expected_y, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(pooled, expected, **tolerance)
