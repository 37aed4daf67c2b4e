"""Batches for the tests of the firing counter, and how a backend counts them. No hypothesis here: the GPU tests import this."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from moda_kernels import _native_calls
from moda_kernels.precision import accumulation
from moda_kernels.tally import Tally

Count = Callable[[Sequence[Tensor], Tensor, float, Tally], None]  # Backend.count_firings

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# (C, *spatial): fewer neurons than a vector, rows of fewer than 16 bytes, of a warp's first step, of several steps and a rest;
# more neurons than a block's tile; one position.
SHAPES = ((3,), (64,), (1030,), (6, 2, 3, 2), (17, 5, 5), (64, 4, 4), (130, 13), (16, 32, 32), (3, 1001), (70, 9, 15))


def neurons_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def one_per_row(samples: int, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Zeros but for one small value (or none) in a random position of each row: whoever skips a position miscounts."""
    x = torch.zeros(samples, *shape)
    flat = x.flatten(2) if x.dim() > 2 else x[..., None]
    at = torch.randint(0, flat.shape[2], flat.shape[:2], generator=generator)
    value = torch.tensor([0.0, -0.05, 0.2, -0.3])[torch.randint(0, 4, flat.shape[:2], generator=generator)]
    flat.scatter_(2, at[..., None], value[..., None])
    return x


def batch_of_layers(samples: int, dtype: torch.dtype, generator: torch.Generator) -> list[Tensor]:
    """Every shape in both layouts, and views that start where no 16-byte load may."""
    layers = []
    for shape in SHAPES:
        x = one_per_row(samples, shape, generator).to(dtype)
        layers += [x, neurons_last(x)] if x.dim() > 2 else [x]
    shifted = torch.cat([torch.ones(1), one_per_row(samples, (8, 27), generator).flatten()]).to(dtype)[1:]
    return [*layers, shifted.view(samples, 8, 27), shifted.view(samples, 27, 8).movedim(-1, 1)]


def counted(count: Count, layers: Sequence[Tensor], labels: Tensor, classes: int, threshold: float) -> list[Tensor]:
    """Counts, class sizes and invalid labels, added to numbers that are not zero so that an overwrite shows."""
    tally = started_tally(layers, labels, classes)
    count(layers, labels, threshold, tally)
    return counts_of(tally)


def started_tally(layers: Sequence[Tensor], labels: Tensor, classes: int, sums: Sequence[Tensor] = ()) -> Tally:
    device = labels.device
    counts = [torch.full((classes, x.shape[1]), 7, device=device) for x in layers]
    return Tally(counts, torch.full((classes,), 3, device=device), torch.tensor(11, device=device), sums)


def counts_of(tally: Tally) -> list[Tensor]:
    """What was added to a started tally."""
    return [*(x - 7 for x in tally.counts), tally.class_sizes - 3, tally.invalid - 11]


def summed(
    count: Count, layers: Sequence[Tensor], labels: Tensor, classes: int, threshold: float
) -> tuple[list[Tensor], list[Tensor]]:
    """What `counted` gives, from the kernels that also sum; and the sums, added to ones so that an overwrite shows."""
    sums = [torch.ones(classes, x.shape[1], dtype=accumulation(x.dtype), device=x.device) for x in layers]
    tally = started_tally(layers, labels, classes, sums)
    count(layers, labels, threshold, tally)
    return counts_of(tally), [x - 1 for x in sums]


def exact_sums(layers: Sequence[Tensor], labels: Tensor, classes: int) -> list[Tensor]:
    """The sums in float64, class after class."""
    sums = []
    for x in layers:
        rows = x.double() if x.dim() == 2 else x.double().abs().flatten(2).mean(2)
        sums.append(torch.stack([rows[labels == k].sum(0) for k in range(classes)]))
    return sums


def assert_sums(mine: Sequence[Tensor], layers: Sequence[Tensor], labels: Tensor, classes: int) -> None:
    for total, expected in zip(mine, exact_sums(layers, labels, classes), strict=True):
        # The ones that `summed` begins with are 1e-7 of rounding; an own pool's positive and negative values cancel out.
        tolerance = {"rtol": 1e-12, "atol": 1e-13} if total.dtype == torch.float64 else {"rtol": 4e-6, "atol": 1e-6}
        torch.testing.assert_close(total.double(), expected, **tolerance, equal_nan=True)


def count_emulated(activations: Sequence[Tensor], labels: Tensor, threshold: float, tally: Tally) -> None:
    """What the CUDA kernels do, on the host."""
    calls = _native_calls
    layers = [calls.dense(x) for x in activations]
    if not tally.sums:
        fields = [calls._firing_fields(x, threshold, count) for x, count in zip(layers, tally.counts, strict=True)]
        calls.extension().count_firings_emulated(calls._flat(fields), calls._firing_batch(labels, tally))
        return
    rows = [calls._statistics_rows(x) for x in layers]
    ordered, order = labels.sort(stable=True)
    fields = [
        calls._statistics_fields(x, row, threshold, count, total)
        for x, row, count, total in zip(layers, rows, tally.counts, tally.sums, strict=True)
    ]
    batch = (*calls._firing_batch(ordered, tally), order.data_ptr())
    calls.extension().class_statistics_emulated(calls._flat(fields), batch)
