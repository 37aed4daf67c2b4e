"""Labels become segments in one launch, where PyTorch takes 17 operations, some of them several launches.

    position of sample j in the order = #{k: label_k < label_j} + #{k < j: label_k = label_j}

so nothing is sorted: every label is compared with every other. One program does it for up to 512 samples, in some
microseconds; larger batches are left to PyTorch, whose time is nothing beside that of a step on them.

Shapes and dtypes: labels (N,) of int64 or int32; results as in `moda_kernels.segments.Segments`.
Determinism: integers; the order of the samples of a class is that of the batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moda_kernels.plain import is_traced
from moda_kernels.segments import Segments
from moda_kernels.triton_kernels.tables import on_device_of


@triton.jit(do_not_specialize=["samples"])
def segments_kernel(
    labels, order, offsets, segment, same_pairs, diff_pairs, samples: tl.int64,
    SIZE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program; SIZE is at least the number of samples, ROWS of which are compared with all at a time."""
    index = tl.arange(0, SIZE)
    inside = index < samples
    mine = tl.load(labels + index, mask=inside, other=0).to(tl.int64)
    before = tl.zeros([SIZE], tl.int32)
    alike = tl.zeros([SIZE], tl.int32)
    for start in range(0, samples, ROWS):
        other = start + tl.arange(0, ROWS)
        theirs = tl.load(labels + other, mask=other < samples, other=0).to(tl.int64)
        there = (other < samples)[:, None]
        before += tl.sum((there & (theirs[:, None] < mine[None, :])).to(tl.int32), 0)
        same = there & (theirs[:, None] == mine[None, :]) & (other[:, None] < index[None, :])
        alike += tl.sum(same.to(tl.int32), 0)

    # Where a segment begins, in its order, is read again by other threads than those that wrote it.
    position = before + alike
    tl.store(order + position, index.to(tl.int64), mask=inside)
    tl.store(segment + position, (alike == 0).to(tl.int64), mask=inside)
    tl.debug_barrier()
    begins = tl.load(segment + index, mask=inside, other=0)
    sample = tl.load(order + index, mask=inside, other=0)
    tl.debug_barrier()
    ordinal = tl.cumsum(begins, 0) - 1
    tl.store(segment + sample, ordinal, mask=inside)
    tl.store(offsets + ordinal, index.to(tl.int64), mask=inside & (begins == 1))
    tl.store(offsets + index, samples, mask=inside & (index >= tl.sum(begins, 0)))
    tl.store(offsets + samples, samples)
    pairs = tl.sum(tl.where(inside, alike, 0).to(tl.int64), 0)
    tl.store(same_pairs, pairs)
    tl.store(diff_pairs, samples * (samples - 1) // 2 - pairs)


# 2048 comparisons at a time are 16 for each of 128 threads. 512 labels take about as long as PyTorch's launches would.
COMPARED = 2048
MOST_SAMPLES = 512
WARPS = 4


def segments_of(labels: Tensor) -> Segments:
    """`Segments.from_labels`, by the kernel where it is the faster way."""
    samples = labels.shape[0]
    if samples > MOST_SAMPLES or is_traced():
        return Segments.from_labels(labels)
    labels = labels.contiguous()
    order, segment = (torch.empty(samples, dtype=torch.int64, device=labels.device) for _ in range(2))
    offsets = torch.empty(samples + 1, dtype=torch.int64, device=labels.device)
    same_pairs, diff_pairs = (torch.empty((), dtype=torch.int64, device=labels.device) for _ in range(2))
    size = max(16, triton.next_power_of_2(samples))
    with on_device_of(labels):
        segments_kernel[(1,)](
            labels, order, offsets, segment, same_pairs, diff_pairs, samples, size, COMPARED // size, num_warps=WARPS
        )
    return Segments(order, offsets, segment, same_pairs, diff_pairs)
