"""AttributionSums against float64 by hand, on every backend of the CPU."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moda_kernels import AttributionSums, FiringCounter, closed_form, native
from moda_kernels.precision import accumulation
from moda_kernels.tally import Tally
from tests.moda_kernels._helpers.firing_batches import DTYPES, SHAPES, neurons_last
from tests.moda_kernels._helpers.native_needed import needs_native

BACKENDS = ["torch", "reference", "auto"]


def exact(x: Tensor, g: Tensor, labels: Tensor, classes: int) -> Tensor:
    """(K, C) in float64, class after class."""
    product = x.double() * g.double()
    rows = (product if product.dim() == 2 else product.flatten(2).sum(2)).abs()
    return torch.stack([rows[labels == k].sum(0) for k in range(classes)])


def layouts(samples: int, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """Every shape, positions last and neurons last; gradients that lie otherwise than their activation; gaps; views that
    start where no wide load may; an expanded gradient."""
    pairs = []
    for shape in SHAPES:
        x, g = torch.randn(2, samples, *shape).to(dtype)
        pairs.append((x, g))
        if x.dim() > 2:
            pairs += [(neurons_last(x), neurons_last(g)), (neurons_last(x), g), (x, g[..., :1].expand_as(x))]
    x, g = torch.randn(2, samples * 8 * 27 + 1).to(dtype)[:, 1:].unbind()
    pairs += [(x.view(samples, 8, 27), g.view(samples, 8, 27))]
    wide, of_wide = torch.randn(2, samples, 6, 5, 8).to(dtype)
    return [*pairs, (wide[..., ::2], of_wide[..., ::2])]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_and_means_by_hand(backend, dtype):
    """Two batches of every layout, of different sizes; class 3 has no sample."""
    pairs = layouts(11, dtype)
    labels = torch.randint(3, (11,))
    totals = AttributionSums(4, backend=backend)
    for part in (slice(0, 7), slice(7, None)):
        totals.update([x[part] for x, _ in pairs], [g[part] for _, g in pairs], labels[part])
    assert totals.class_sizes.tolist() == [int((labels == k).sum()) for k in range(4)]
    assert totals.empty_classes == [3]
    for (x, g), total, mean in zip(pairs, totals.sums, totals.means, strict=True):
        expected = exact(x, g, labels, 4)
        assert total.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        # Signs cancel: the error is of the largest terms' size.
        tolerance = {"rtol": 1e-11, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 2e-3}
        torch.testing.assert_close(total.double(), expected, **tolerance)
        torch.testing.assert_close(mean * totals.class_sizes.clamp_min(1)[:, None], total, rtol=1e-6, atol=1e-6)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_and_runs_give_the_same_bits(dtype):
    pairs, labels = layouts(13, dtype), torch.randint(5, (13,))
    results = []
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        totals = AttributionSums(5, backend="native")
        totals.update([x for x, _ in pairs], [g for _, g in pairs], labels)
        results.append(totals.sums)
    for other in results[1:]:
        assert all(map(torch.equal, other, results[0]))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_backends_agree_over_random_shapes(data):
    """With NaN and infinity where they may be, and labels that are no class."""
    samples, classes = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 5))
    shape = [samples, data.draw(st.integers(1, 40)), *data.draw(st.lists(st.integers(1, 9), max_size=3))]
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    x, g = torch.randn(2, *shape).to(data.draw(st.sampled_from(DTYPES)))
    if data.draw(st.booleans()):
        x.view(-1)[data.draw(st.integers(0, x.numel() - 1))] = data.draw(st.sampled_from([float("nan"), float("inf")]))
    if data.draw(st.booleans()) and len(shape) > 2:
        x = neurons_last(x)
    labels = torch.tensor(data.draw(st.lists(st.integers(-1, classes), min_size=samples, max_size=samples)))
    for add in (native.add_attributions, closed_form.add_attributions):
        sums = [torch.ones(classes, shape[1], dtype=accumulation(x.dtype))]
        sizes, invalid = torch.full((classes,), 3), torch.tensor(11)
        add([x], [g], labels, Tally((), sizes, invalid, sums))
        assert sizes.tolist() == [3 + int((labels == k).sum()) for k in range(classes)]
        assert int(invalid) == 11 + int(((labels < 0) | (labels >= classes)).sum())
        expected = exact(x, g, labels, classes)
        torch.testing.assert_close(sums[0].double() - 1, expected, rtol=1e-5, atol=1e-4, equal_nan=True)


def test_a_sample_far_from_the_others_is_not_lost_in_them():
    """The magnitude is the sample's: opposite signs in two samples add up, in two positions they cancel."""
    x = torch.tensor([[[1.0, 1.0]], [[1.0, 0.0]], [[1.0, 0.0]]])
    g = torch.tensor([[[2.0, -2.0]], [[3.0, 9.0]], [[-3.0, 9.0]]])
    totals = AttributionSums(2)
    totals.update([x], [g], torch.tensor([0, 1, 1], dtype=torch.int32))
    assert totals.sums[0].tolist() == [[0.0], [6.0]]
    assert totals.means[0].tolist() == [[0.0], [3.0]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backward_pass_leaves_no_graph(backend):
    x = torch.randn(4, 3, 2, 2, requires_grad=True)
    totals = AttributionSums(2, backend=backend)
    totals.update([x * 1, x.flatten(2).mean(2)], [(x * 2), x.mean((2, 3))], torch.tensor([0, 1, 1, 0]))
    assert not any(total.requires_grad for total in totals.sums)


@pytest.mark.parametrize("backend", BACKENDS)
def test_labels_out_of_range_are_in_no_sum(backend, monkeypatch):
    monkeypatch.setattr("moda_kernels.attribution.check_label_range", lambda labels, classes: None)  # as on a GPU
    totals = AttributionSums(3, backend=backend)
    x = torch.cat([torch.ones(2, 2, 3), torch.full((2, 2, 3), float("nan"))])
    totals.update([x], [torch.ones_like(x)], torch.tensor([0, 2, 3, -1]))
    assert totals._sums[0].tolist() == [[3, 3], [0, 0], [3, 3]]
    for read in ("sums", "means", "class_sizes", "empty_classes"):
        with pytest.raises(ValueError, match="got 2 samples with a class outside of it"):
            getattr(totals, read)


def filled(seed: int = 0, dtype: torch.dtype = torch.float32) -> AttributionSums:
    generator = torch.Generator().manual_seed(seed)
    totals = AttributionSums(3)
    x, g = (torch.randn(6, 4, 3, generator=generator).to(dtype) for _ in range(2))
    totals.update([x, x[:, :, 0]], [g, g[:, :, 0]], torch.arange(6) % 3)
    return totals


def test_merge_and_state_round_trip():
    both = filled(0)
    both.merge(filled(1))
    fresh = AttributionSums(3)
    fresh.merge(AttributionSums(3))  # nothing seen: nothing added
    fresh.load_state_dict(filled(0).state_dict())
    fresh.merge(filled(1))
    assert all(map(torch.equal, fresh.sums, both.sums))
    assert set(fresh.state_dict()) == {"sums.0", "sums.1", "class_sizes"}
    assert fresh.class_sizes.tolist() == [4, 4, 4]
    assert repr(fresh) == "AttributionSums(num_classes=3, neurons=[4, 4])"


X, Y = torch.ones(2, 3, 4), torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: AttributionSums(0), ValueError, "num_classes: expected at least 1, got 0"),
        (lambda: AttributionSums(2).update([X], X, Y), TypeError, "gradients: expected a sequence of tensors, one per layer, got Tensor"),
        (lambda: AttributionSums(2).update([X], [], Y), ValueError, "gradients: expected 1, one per layer, got 0"),
        (lambda: AttributionSums(2).update([X], [None], Y), TypeError, "gradients[0]: expected a tensor, got NoneType"),
        (lambda: AttributionSums(2).update([X], [X[:1]], Y), ValueError,
         "gradients[0]: expected shape (2, 3, 4) of the activation, got (1, 3, 4)"),
        (lambda: AttributionSums(2).update([X], [X.half()], Y), ValueError,
         "gradients[0]: expected dtype torch.float32 of the activation, got torch.float16"),
        (lambda: AttributionSums(2).update([X], [X.to("meta")], Y), ValueError,
         "gradients[0]: expected device cpu of the activation, got meta"),
        (lambda: AttributionSums(2).update([X], [X], Y + 1), ValueError, "labels: expected classes in [0, 2), got 2"),
        (lambda: filled().update([X], [X], Y), ValueError,
         "activations: expected layers of [4, 4] neurons as summed so far, got [3]"),
        (lambda: filled().merge(filled(dtype=torch.float64)), ValueError,
         "activations: expected layers whose sums are ['float32', 'float32'] as so far, got ['float64', 'float64']"),
        (lambda: filled().merge(FiringCounter(3)), TypeError, "other: expected AttributionSums as here, got FiringCounter"),
        (lambda: filled().merge(AttributionSums(4)), ValueError, "other: expected num_classes=3 as here, got 4"),
        (lambda: filled().load_state_dict({"sums.0": torch.zeros(1)}), ValueError,
         "state: expected class_sizes and sums.0, sums.1, ..., got ['sums.0']"),
        (lambda: filled().load_state_dict(filled().state_dict() | {"sums.0": torch.zeros(3, 4).half()}), ValueError,
         "state['sums.0']: expected float32 or float64 of shape (3, C), got torch.float16 (3, 4)"),
    ],
)  # fmt: skip
def test_bad_input_is_named(make, error, message):
    with pytest.raises(error, match=re.escape(message)):
        make()
