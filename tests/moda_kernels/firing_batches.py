"""Batches for the tests of firing counts, and how a backend counts them. No hypothesis here: the GPU tests import this."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from moda_kernels import _native_calls

Count = Callable[[Sequence[Tensor], Tensor, float, Sequence[Tensor], Tensor, Tensor], None]

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
    device = labels.device
    counts = [torch.full((classes, x.shape[1]), 7, device=device) for x in layers]
    sizes, invalid = torch.full((classes,), 3, device=device), torch.tensor(11, device=device)
    count(layers, labels, threshold, counts, sizes, invalid)
    return [*(x - 7 for x in counts), sizes - 3, invalid - 11]


def count_emulated(
    activations: Sequence[Tensor],
    labels: Tensor,
    threshold: float,
    counts: Sequence[Tensor],
    class_sizes: Tensor,
    invalid: Tensor,
) -> None:
    """The CUDA kernel's walk, on the host."""
    layers = [_native_calls.dense(x) for x in activations]
    fields = [_native_calls._firing_fields(x, threshold, count) for x, count in zip(layers, counts, strict=True)]
    wide = int(labels.dtype == torch.int64)
    batch = (labels.data_ptr(), wide, len(labels), len(class_sizes), class_sizes.data_ptr(), invalid.data_ptr())
    _native_calls.extension().count_firings_emulated(_native_calls._flat(fields), batch)
