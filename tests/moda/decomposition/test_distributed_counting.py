"""count_firings over the shares of several processes: no sample twice, the same decomposition for any number of them."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, TensorDataset

import moda

SAMPLES = 23  # leaves a rest for 2, 3, 4 and 5 processes


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 8), nn.ReLU(), nn.Linear(8, 3))


def make_data(samples=SAMPLES):
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(3, (samples,), generator=generator)
    return TensorDataset(torch.randn(samples, 1, 4, 4, generator=generator), labels)


def share(dataset, ranks, rank, *, shuffle=False, batch_size=4):
    sampler = DistributedSampler(dataset, ranks, rank, shuffle=shuffle)
    return DataLoader(dataset, batch_size, sampler=sampler)


def added(parts):
    """Firing rates as the sums of the ranks' counts give them."""
    counts = {tap: sum(part.counts[tap] for part in parts) for tap in parts[0].taps}
    sizes = sum(part.class_sizes for part in parts)
    rates = {tap: (count.double() / sizes.clamp_min(1)[:, None]).float() for tap, count in counts.items()}
    return moda.FiringRates(parts[0].taps, rates, counts, sizes)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("shuffle", [False, True])
def test_padding_is_not_counted_and_the_decomposition_is_the_same(ranks, shuffle):
    model, dataset = make_model(), make_data()
    whole = moda.count_firings(model, DataLoader(dataset, 5), 3)
    parts = [moda.count_firings(model, share(dataset, ranks, rank, shuffle=shuffle), 3) for rank in range(ranks)]
    together = added(parts)
    assert together.class_sizes.tolist() == torch.bincount(dataset.tensors[1]).tolist()
    for tap in whole.taps:
        assert torch.equal(together.counts[tap], whole.counts[tap])
    expected, got = (moda.decompose(rates, threshold=0.6) for rates in (whole, together))
    for tap in whole.taps:
        assert torch.equal(got.masks[tap], expected.masks[tap])


def test_more_processes_than_samples():
    """7 processes for 3 samples: each is given one, four of them a repeated one, which has no batch to count."""
    model, dataset = make_model(), make_data(3)
    for rank in range(7):
        if rank < 3:
            assert moda.count_firings(model, share(dataset, 7, rank), 3).class_sizes.sum() == 1
        else:
            with pytest.raises(ValueError, match="loader: expected at least one batch"):
                moda.count_firings(model, share(dataset, 7, rank), 3)


def test_repeated_samples_run_all_the_same():
    """Every process runs as many batches as the others: a sharded model gathers its weights in each."""
    model, dataset, seen = make_model(), make_data(), []
    model.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    moda.count_firings(model, share(dataset, 4, 3), 3)
    assert seen == [4, 2]  # 23 = 4 * 6 - 1: this process's sixth sample is a repeated one


def test_batch_samplers_and_dropped_samples():
    model, dataset = make_model(), make_data()
    batches = BatchSampler(DistributedSampler(dataset, 4, 3, shuffle=False), 3, drop_last=False)
    assert moda.count_firings(model, DataLoader(dataset, batch_sampler=batches), 3).class_sizes.sum() == 5
    dropping = DistributedSampler(dataset, 4, 3, shuffle=False, drop_last=True)
    assert moda.count_firings(model, DataLoader(dataset, 4, sampler=dropping), 3).class_sizes.sum() == 5


def test_with_a_group(tmp_path):
    model, dataset = make_model(), make_data()
    expected = moda.count_firings(model, DataLoader(dataset, 5), 3)
    dist.init_process_group("gloo", f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        got = moda.count_firings(model, share(dataset, 1, 0), 3, group="world")
    finally:
        dist.destroy_process_group()
    for tap in expected.taps:
        assert torch.equal(got.counts[tap], expected.counts[tap])
        assert torch.equal(got.rates[tap], expected.rates[tap])


def rank_scores(rank, folder):
    """Attributions and shares of a rank's part of 5 samples; the last of three ranks has none of its own."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=3)
    model, dataset = make_model().double(), make_data(5)
    dataset = TensorDataset(dataset.tensors[0].double(), dataset.tensors[1])
    loader = share(dataset, 3, rank) if rank < 2 else []
    made = [
        score(model, loader, 3, group="world", progress=False) for score in (moda.attribute, moda.activation_shares)
    ]
    torch.save([(each.scores, each.class_sizes) for each in made], f"{folder}/{rank}")
    dist.destroy_process_group()


def test_scores_over_ranks_one_of_which_has_no_batch(tmp_path):
    torch.multiprocessing.start_processes(rank_scores, (str(tmp_path),), nprocs=3, start_method="spawn")
    model, data = make_model().double(), make_data(5)
    counted = [0, 1, 3, 4]  # of ranks 0 and 1 of 3; sample 2 is the third's, which has no loader
    loader = [(data.tensors[0][counted].double(), data.tensors[1][counted])]
    alone = [score(model, loader, 3, progress=False) for score in (moda.attribute, moda.activation_shares)]
    for rank in range(3):
        for (scores, sizes), expected in zip(torch.load(tmp_path / str(rank)), alone, strict=True):
            assert torch.equal(sizes, expected.class_sizes)
            for tap, given in scores.items():
                torch.testing.assert_close(given, expected.scores[tap], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("score", [moda.attribute, moda.activation_shares])
def test_a_process_with_repeated_samples_alone_has_none(score):
    model, dataset = make_model(), make_data(3)
    assert score(model, share(dataset, 7, 2), 3, progress=False).class_sizes.sum() == 1
    with pytest.raises(ValueError, match="loader: expected at least one batch"):
        score(model, share(dataset, 7, 5), 3, progress=False)
