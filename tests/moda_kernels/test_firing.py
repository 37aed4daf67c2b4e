from __future__ import annotations

import copy
import pickle
import re
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moda_kernels import FiringCounter, class_means, pool, relu_pool
from moda_kernels.reference import published_masks, published_rates
from tests.moda_kernels._helpers.native_needed import needs_native

BACKENDS = ["torch", "reference", "auto"]


def golden_batches(data):
    for b in range(sum(key.startswith("labels_b") for key in data)):
        keys = sorted(key for key in data if key.startswith(f"act_b{b:02d}_"))
        yield [torch.from_numpy(data[key]) for key in keys], torch.from_numpy(data[f"labels_b{b:02d}"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["basic", "signed", "exact_rates"])
def test_golden_counts_and_rates(golden, name, backend):
    data = golden(f"firing_{name}")
    counter = FiringCounter(int(data["num_classes"]), backend=backend)
    for activations, labels in golden_batches(data):
        counter.update(activations, labels)
    assert np.array_equal(counter.class_sizes, data["class_counts"])
    assert counter.empty_classes == np.flatnonzero(data["class_counts"] == 0).tolist()
    for layer, (count, rate) in enumerate(zip(counter.counts, counter.rates, strict=True)):
        assert np.array_equal(count, data[f"counts_l{layer:02d}"])
        assert rate.dtype == torch.float32
        assert np.array_equal(rate, data[f"rates_l{layer:02d}"])  # bitwise


@pytest.mark.parametrize("name", ["basic", "signed", "exact_rates"])
def test_published_rates_are_the_golden_ones(golden, name):
    data = golden(f"firing_{name}")
    batches = list(golden_batches(data))
    layers = [torch.cat(parts) for parts in zip(*(acts for acts, _ in batches), strict=True)]
    labels = torch.cat([y for _, y in batches])
    for layer, rate in enumerate(published_rates(layers, labels, int(data["num_classes"]))):
        assert np.array_equal(rate, data[f"rates_l{layer:02d}"])


@pytest.mark.parametrize("name", ["k4", "k10", "below_min"])
def test_published_masks_are_the_golden_ones(golden, name):
    data = golden(f"masks_{name}")
    rates = [torch.from_numpy(data[key]) for key in sorted(data) if key.startswith("rates_l")]
    for t, tau in enumerate(data["tau"]):
        for layer, mask in enumerate(published_masks(rates, float(tau))):
            key = f"t{t}_l{layer:02d}"
            clear = ~data[f"ambiguous_{key}"]
            assert np.array_equal(mask[clear], data[f"mask_{key}"][clear])
            assert np.array_equal(mask.sum(1), data[f"k_{key}"])


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_counts_by_hand(data):
    samples, classes = data.draw(st.integers(1, 8)), data.draw(st.integers(1, 4))
    shape = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    threshold = data.draw(st.sampled_from([0.0, 0.5]))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    act = torch.randn(samples, *shape).round(decimals=1)
    act[torch.rand(act.shape) < 0.1] = float("nan")
    labels = torch.randint(classes, (samples,))
    counters = [FiringCounter(classes, threshold=threshold, backend=backend) for backend in BACKENDS]
    for counter in counters:
        counter.update([act], labels)
    fired = [
        [any(not abs(v) <= threshold for v in act[i, c].reshape(-1).tolist()) for c in range(shape[0])]
        for i in range(samples)
    ]
    expected = [
        [sum(fired[i][c] for i in range(samples) if labels[i] == k) for c in range(shape[0])] for k in range(classes)
    ]
    for counter in counters:
        assert counter.counts[0].tolist() == expected
        assert counter.class_sizes.tolist() == [int((labels == k).sum()) for k in range(classes)]


def random_batch(samples=12, classes=3, seed=0):
    torch.manual_seed(seed)
    return [torch.randn(samples, 4, 3, 3).relu(), torch.randn(samples, 5).relu()], torch.randint(classes, (samples,))


@pytest.mark.parametrize("backend", BACKENDS)
def test_invariants(backend):
    activations, labels = random_batch()
    whole, parts, shuffled = (FiringCounter(3, backend=backend) for _ in range(3))
    whole.update(activations, labels)
    for half in (slice(0, 5), slice(5, None)):
        parts.update([act[half] for act in activations], labels[half])
    order = torch.randperm(len(labels))
    shuffled.update([act[order] for act in activations], labels[order])
    for counter in (parts, shuffled):
        assert [a.tolist() for a in counter.counts] == [a.tolist() for a in whole.counts]
        assert counter.class_sizes.tolist() == whole.class_sizes.tolist()
    assert all((count <= whole.class_sizes[:, None]).all() for count in whole.counts)


def exact_means(activation, labels, classes):
    """Float64, class by class; NaN where there is no sample."""
    rows = activation.double() if activation.dim() == 2 else activation.double().abs().flatten(2).mean(2)
    return torch.stack([rows[labels == k].mean(0) for k in range(classes)])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_sums_and_means_by_hand(backend, dtype):
    """Two batches of every kind of layer, a signed (N, C) one among them; class 3 is empty. Counts are those without sums."""
    torch.manual_seed(0)
    acts = [torch.randn(20, *shape).to(dtype) for shape in [(4, 3, 3), (5,), (6, 7), (3, 2, 2, 2), (7, 1, 1)]]
    acts[0] = acts[0].contiguous(memory_format=torch.channels_last)
    labels = torch.randint(3, (20,))
    counter, without = FiringCounter(4, threshold=0.3, backend=backend, sums=True), FiringCounter(4, threshold=0.3)
    for part in (slice(0, 13), slice(13, None)):
        counter.update([act[part] for act in acts], labels[part])
        without.update([act[part] for act in acts], labels[part])
    assert all(map(torch.equal, counter.counts, without.counts))
    assert torch.equal(counter.class_sizes, without.class_sizes)
    wide = dtype == torch.float64
    for act, total, mean, alone in zip(acts, counter.sums, counter.means, class_means(acts, labels, 4), strict=True):
        assert total.dtype == mean.dtype == (torch.float64 if wide else torch.float32)
        exact = exact_means(act, labels, 4).nan_to_num()
        tolerance = {"rtol": 1e-12, "atol": 1e-13} if wide else {"rtol": 2e-6, "atol": 1e-6}
        torch.testing.assert_close(mean.double(), exact, **tolerance)
        torch.testing.assert_close(mean, alone, **tolerance)
        torch.testing.assert_close(mean * counter.class_sizes[:, None], total, **tolerance)
        assert not mean[3].any()


def test_long_runs_of_sums_lose_little():
    """4000 batches of 64: each is summed before it joins, so that there are 4000 roundings of a large sum and not 256000."""
    counter = FiringCounter(1, sums=True)
    batch = [torch.full((64, 2), 0.1)], torch.zeros(64, dtype=torch.int64)
    for _ in range(4000):
        counter.update(*batch)
    exact = float(np.float32(0.1)) * 64 * 4000
    one_by_one = float(np.full(64 * 4000, 0.1, np.float32).cumsum()[-1])
    error = abs(counter.sums[0][0, 0].item() - exact)
    assert error < 1e-4 * exact
    assert error < abs(one_by_one - exact) / 10


@pytest.mark.parametrize("backend", BACKENDS)
def test_labels_out_of_range_are_in_no_sum(backend, monkeypatch):
    monkeypatch.setattr("moda_kernels.firing.check_label_range", lambda labels, classes: None)  # as on a GPU
    counter = FiringCounter(3, backend=backend, sums=True)
    wrong = torch.full((2, 2, 3), float("nan"))  # not even as NaN
    counter.update([torch.cat([torch.ones(2, 2, 3), wrong])], torch.tensor([0, 2, 3, -1]))
    assert counter._sums[0].tolist() == [[1, 1], [0, 0], [1, 1]]
    for read in ("sums", "means"):
        with pytest.raises(ValueError, match="got 2 samples with a class outside of it"):
            getattr(counter, read)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sums", [False, True])
def test_activations_of_a_training_step_leave_no_graph(backend, sums):
    x, y = torch.randn(6, 4, 3, 2, requires_grad=True), torch.arange(6) % 3
    counter = FiringCounter(3, backend=backend, sums=sums)
    for layer in (x * 1, (x * 1).transpose(2, 3)[:, :, ::2]):  # as it lies, and one that is copied first
        counter.update([layer, layer.mean((2, 3))], y)
    assert counter.class_sizes.tolist() == [4, 4, 4]
    assert not any(result.requires_grad for result in [*counter.counts, *(counter.sums if sums else ())])


def test_sums_merge_and_round_trip():
    one, two, both = (FiringCounter(3, sums=True) for _ in range(3))
    for counter, seed in [(one, 0), (two, 1), (both, 0), (both, 1)]:
        counter.update(*random_batch(seed=seed))
    fresh = FiringCounter(3, sums=True)
    fresh.merge(one)
    fresh.merge(FiringCounter(3, sums=True))
    assert set(fresh.state_dict()) == {"counts.0", "counts.1", "sums.0", "sums.1", "class_sizes", "threshold"}
    fresh.load_state_dict(fresh.state_dict())
    fresh.merge(two)
    assert all(map(torch.equal, fresh.sums, both.sums))
    assert all(map(torch.equal, fresh.counts, both.counts))
    assert repr(fresh) == "FiringCounter(num_classes=3, threshold=0, neurons=[4, 5], sums=True)"
    state = {name: value.T.contiguous().T if value.dim() == 2 else value for name, value in fresh.state_dict().items()}
    fresh.load_state_dict(state)  # of other strides
    fresh.update(*random_batch())
    both.update(*random_batch())
    assert all(map(torch.equal, fresh.sums, both.sums))
    assert all(map(torch.equal, fresh.counts, both.counts))


def test_a_state_from_before_there_were_sums_loads():
    state = {
        "counts.0": torch.tensor([[1, 2], [3, 4]]),
        "class_sizes": torch.tensor([4, 4]),
        "threshold": torch.tensor(0.0, dtype=torch.float64),
    }
    counter = FiringCounter(2)
    counter.load_state_dict(state)
    assert counter.rates[0].tolist() == [[0.25, 0.5], [0.75, 1]]


def test_merge_and_state_round_trip():
    one, two, both = FiringCounter(3), FiringCounter(3), FiringCounter(3)
    for counter, seed in [(one, 0), (two, 1), (both, 0), (both, 1)]:
        counter.update(*random_batch(seed=seed))
    fresh = FiringCounter(3)
    fresh.merge(one)
    fresh.merge(FiringCounter(3))  # nothing counted: nothing added
    fresh.load_state_dict(fresh.state_dict())
    fresh.merge(two)
    assert [a.tolist() for a in fresh.counts] == [a.tolist() for a in both.counts]
    assert fresh.class_sizes.tolist() == both.class_sizes.tolist()
    assert repr(fresh) == "FiringCounter(num_classes=3, threshold=0, neurons=[4, 5])"


def test_empty_class_has_rate_zero_and_is_reported():
    counter = FiringCounter(4)
    counter.update([torch.ones(3, 2)], torch.tensor([0, 2, 2]))
    assert counter.empty_classes == [1, 3]
    assert counter.rates[0].tolist() == [[1, 1], [0, 0], [1, 1], [0, 0]]


def test_bad_labels_count_nothing():
    counter = FiringCounter(3)
    counter.update([torch.ones(2, 4)], torch.tensor([0, 1]))
    for labels, wrong in [([0, 3], 3), ([-1, 0], -1)]:
        with pytest.raises(ValueError, match=re.escape(f"labels: expected classes in [0, 3), got {wrong}")):
            counter.update([torch.ones(2, 4)], torch.tensor(labels))
    assert counter.class_sizes.tolist() == [1, 1, 0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_invalid_labels_found_by_a_backend_are_reported_at_the_read(backend, monkeypatch):
    monkeypatch.setattr("moda_kernels.firing.check_label_range", lambda labels, classes: None)  # as on a GPU
    counter = FiringCounter(3, backend=backend)
    counter.update([torch.ones(4, 2)], torch.tensor([0, 3, -1, 2]))
    assert counter._class_sizes.tolist() == [1, 0, 1]
    assert counter._counts[0].tolist() == [[1, 1], [0, 0], [1, 1]]
    for read in ("counts", "rates", "class_sizes", "empty_classes"):
        with pytest.raises(ValueError, match="got 2 samples with a class outside of it"):
            getattr(counter, read)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: FiringCounter(0), ValueError, "num_classes: expected at least 1, got 0"),
        (lambda: FiringCounter(2.0), TypeError, "num_classes: expected an int, got float"),
        (lambda: FiringCounter(2, threshold=-1), ValueError, "threshold: expected a finite number of at least 0, got -1"),
        (lambda: filled().update([torch.ones(2, 3)], torch.tensor([0, 1])), ValueError,
         "activations: expected layers of [4, 5] neurons as counted so far, got [3]"),
        (lambda: filled().merge(FiringCounter(4)), ValueError, "other: expected num_classes=3 as here, got 4"),
        (lambda: filled().merge(FiringCounter(3, threshold=1)), ValueError, "other: expected threshold=0.0 as here, got 1.0"),
        (lambda: filled().load_state_dict({"counts.0": torch.zeros(1)}), ValueError, "state: expected class_sizes, threshold"),
        (lambda: filled().load_state_dict(filled().state_dict() | {"class_sizes": torch.zeros(3)}), ValueError,
         "state['class_sizes']: expected int64 of shape (3,), got torch.float32 (3,)"),
        (lambda: filled().load_state_dict(FiringCounter(3, threshold=2).state_dict()), ValueError,
         "state['threshold']: expected 0.0 as here, got 2.0"),
        (lambda: FiringCounter(2, sums=1), TypeError, "sums: expected True or False, got int"),
        (lambda: filled().sums, ValueError, "sums: expected a counter made with FiringCounter(..., sums=True), got one made without"),
        (lambda: filled().means, ValueError, "sums: expected a counter made with FiringCounter(..., sums=True), got one made without"),
        (lambda: filled().merge(filled(sums=True)), ValueError, "other: expected sums=False as here, got True"),
        (lambda: filled(sums=True).merge(FiringCounter(3)), ValueError, "other: expected sums=True as here, got False"),
        (lambda: filled().load_state_dict(filled(sums=True).state_dict()), ValueError,
         "state: expected class_sizes, threshold and counts.0, counts.1, ..., as of a counter made with sums=False, got ["),
        (lambda: filled(sums=True).load_state_dict(filled().state_dict()), ValueError,
         "state: expected class_sizes, threshold and counts.0, sums.0, counts.1, sums.1, ..., as of a counter made with sums=True, got ["),
        (lambda: filled(sums=True).load_state_dict(filled(sums=True).state_dict() | {"sums.0": torch.zeros(3, 5)}), ValueError,
         "state['sums.0']: expected float32 or float64 of shape (3, 4), got torch.float32 (3, 5)"),
        (lambda: filled(sums=True).load_state_dict(filled(sums=True).state_dict() | {"sums.0": torch.zeros(3, 4).half()}), ValueError,
         "state['sums.0']: expected float32 or float64 of shape (3, 4), got torch.float16 (3, 4)"),
        (lambda: filled(sums=True).update([x.double() for x in random_batch()[0]], random_batch()[1]), ValueError,
         "activations: expected layers whose sums are ['float32', 'float32'] as so far, got ['float64', 'float64']"),
    ],
)  # fmt: skip
def test_bad_input_is_named(make, error, message):
    with pytest.raises(error, match=re.escape(message)):
        make()


def filled(**options):
    counter = FiringCounter(3, **options)
    counter.update(*random_batch())
    return counter


@pytest.mark.parametrize("backend", [*BACKENDS, pytest.param("native", marks=needs_native)])
def test_threads_share_a_counter(backend):
    """None of their batches is lost; without the lock some were, in most runs."""
    counter = FiringCounter(3, backend=backend, sums=True)
    x, y = torch.rand(8, 300, 2, 2), torch.arange(8) % 3

    def count() -> None:
        for _ in range(40):
            counter.update([x], y)

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    once = FiringCounter(3, backend=backend)
    once.update([x], y)
    assert torch.equal(counter.class_sizes, 160 * once.class_sizes)
    assert torch.equal(counter.counts[0], 160 * once.counts[0])


def test_a_counter_can_be_copied_and_pickled():
    counter = FiringCounter(2)
    counter.update([torch.ones(2, 3)], torch.tensor([0, 1]))
    for other in (copy.deepcopy(counter), pickle.loads(pickle.dumps(counter))):
        other.update([torch.ones(2, 3)], torch.tensor([0, 1]))
        assert other.class_sizes.tolist() == [2, 2]
    assert counter.class_sizes.tolist() == [1, 1]


@pytest.mark.parametrize("backend", [*BACKENDS, pytest.param("native", marks=needs_native)])
@pytest.mark.parametrize("sums", [False, True])
def test_state_made_in_inference_mode_is_added_to_outside_of_it(backend, sums):
    x, y = [torch.randn(4, 3), torch.randn(4, 2, 5, 5)], torch.tensor([0, 1, 0, 1])
    with torch.inference_mode():
        inside = FiringCounter(2, backend=backend, sums=sums)
        inside.update(x, y)
        loaded = FiringCounter(2, backend=backend, sums=sums)
        loaded.load_state_dict(inside.state_dict())
    merged = FiringCounter(2, backend=backend, sums=sums)
    with torch.inference_mode():
        merged.merge(inside)
    for counter in (inside, loaded, merged):
        counter.update(x, y)
        assert counter.class_sizes.tolist() == [4, 4]
        assert not any(tensor.is_inference() for tensor in [*counter.counts, counter.class_sizes])


def test_pooled_rows_are_no_activations():
    x, y = torch.rand(4, 3, 5, 5), torch.tensor([0, 1, 0, 1])
    own = relu_pool(torch.rand(4, 3))[1]
    for rows in (relu_pool(x)[1], pool([x])[0]):
        counter = FiringCounter(2, threshold=0.5)
        with pytest.raises(ValueError, match=r"activations\[1\]: .*threshold 0.5, got pooled rows"):
            counter.update([x, rows], y)
        assert counter.counts == []
        FiringCounter(2).update([rows], y)  # a mean of magnitudes is above 0 where one of them is
        counter.update([x, own], y)  # an (N, C) activation is its own pool


@pytest.mark.parametrize("threshold", ["0", None, [0.5], True])
def test_a_threshold_that_is_no_number(threshold):
    with pytest.raises(TypeError, match="threshold: expected a number, got"):
        FiringCounter(2, threshold=threshold)
