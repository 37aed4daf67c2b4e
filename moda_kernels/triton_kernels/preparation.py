"""What the losses need before anything is added up, in one launch: inverse norms of rows, and segments of labels.

    inverse[l, i] = 1 / max(|a_i|, 1e-12), and 0 for an all-zero row, so that a row times it is n_i

    position of sample j in the order = #{k: label_k < label_j} + #{k < j: label_k = label_j}

so labels are not sorted: every one is compared with every other. One program does it for up to 512 samples, in some
microseconds, while others take the norms; PyTorch, which does it for larger batches, takes 17 operations, whose time is
nothing beside that of a step on them.

Shapes: rows (N, C) per layer, inverse (L, N); labels (N,), results as in `moda_kernels.segments.Segments`.
Dtypes: rows and inverse norms float32; squares are summed in float64, so that neither 1e-30 nor 1e30 in a row is lost
to underflow or overflow. Labels of int64 or int32.
Determinism: one program per group of rows, a fixed order over neurons; no atomics. The samples of a class keep the
order of the batch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moda_kernels.segments import Segments
from moda_kernels.triton_kernels.launching import launch
from moda_kernels.triton_kernels.rows import Tiling, load_rows, sum_of_neurons


@triton.jit
def _norms(table, inverse, layer, layers, samples, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """ROWS rows of one layer."""
    rows = tl.load(table + layers + layer).to(tl.pointer_type(tl.float32))
    neurons = tl.load(table + 2 * layers + layer)
    aligned = tl.load(table + 3 * layers + layer)
    sample = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    squares = tl.zeros([ROWS, 1, 1, WIDTH], tl.float64)
    for start in range(0, neurons, WIDTH):
        neuron = start + tl.arange(0, WIDTH)
        values = load_rows(rows, sample, sample < samples, neurons, neuron, aligned, 1).to(tl.float64)
        squares += values * values
    norm = tl.sqrt(sum_of_neurons(squares))
    floored = tl.where(norm < 1e-12, 1e-12, norm)  # NaN stays NaN
    result = tl.where(norm == 0, 0.0, 1.0 / floored)
    result = tl.where(norm == float("inf"), float("nan"), result)  # as everywhere: one makes all of its row NaN
    tl.store(inverse + layer * samples + sample, result.to(tl.float32), mask=sample < samples)


@triton.jit
def _segments(
    labels, order, offsets, segment, same_pairs, diff_pairs, samples, SIZE: tl.constexpr, COMPARED: tl.constexpr
):
    """All samples; SIZE is at least their number, COMPARED the comparisons at a time."""
    index = tl.arange(0, SIZE)
    inside = index < samples
    mine = tl.load(labels + index, mask=inside, other=0).to(tl.int64)
    before = tl.zeros([SIZE], tl.int32)
    alike = tl.zeros([SIZE], tl.int32)
    for start in range(0, samples, COMPARED // SIZE):
        other = start + tl.arange(0, COMPARED // SIZE)
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


@triton.jit(do_not_specialize=["layers", "samples"])
def prepare_kernel(
    table, inverse, arrivals, labels, order, offsets, segment, same_pairs, diff_pairs,
    layers: tl.int64, samples: tl.int64,
    LABELS: tl.constexpr, SIZE: tl.constexpr, COMPARED: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Plane 0 of the grid: the labels, if LABELS. Every other one: ROWS rows of one layer. `arrivals` becomes 0."""
    plane = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) == 0
    if first & (plane == 0):
        tl.store(arrivals, 0)
    if LABELS:
        if plane > 0:
            _norms(table, inverse, plane - 1, layers, samples, ROWS, WIDTH)
        elif first:
            _segments(labels, order, offsets, segment, same_pairs, diff_pairs, samples, SIZE, COMPARED)
    else:
        _norms(table, inverse, plane, layers, samples, ROWS, WIDTH)


# 8 x 256: one step covers the rows of most convolution layers whole, and eight rows share its latency; fewer rows
# would leave threads idle on layers of 64 neurons, more would leave multiprocessors idle on batches of 128.
ROWS = 8
WIDTH = 256
# 2048 comparisons at a time are 16 for each of 128 threads. 512 labels take about as long as PyTorch's launches would.
COMPARED = 2048
MOST_SAMPLES = 512
WARPS = 4


class Preparation(NamedTuple):
    """What the losses need before anything is added up."""

    segments: Segments
    inverse: Tensor  # (L, N) float32, or (0, N)
    arrivals: Tensor  # () int32, 0: programs of a later launch count themselves


def launch_preparation(tiling: Tiling, table: Tensor, labels: Tensor, *, norms: bool = True) -> Preparation:
    """Segments of the labels and, if wanted, inverse norms of the rows."""
    samples, layers, device = tiling.samples, len(tiling.neurons) if norms else 0, table.device
    inverse = torch.empty(layers, samples, dtype=torch.float32, device=device)
    arrivals = torch.empty((), dtype=torch.int32, device=device)
    by_kernel = samples <= MOST_SAMPLES
    if by_kernel:
        labels = labels.contiguous()
        order, segment = (torch.empty(samples, dtype=torch.int64, device=device) for _ in range(2))
        offsets = torch.empty(samples + 1, dtype=torch.int64, device=device)
        same_pairs, diff_pairs = (torch.empty((), dtype=torch.int64, device=device) for _ in range(2))
        segments = Segments(order, offsets, segment, same_pairs, diff_pairs)
    else:
        segments = Segments.from_labels(labels)
    size = max(16, triton.next_power_of_2(samples)) if by_kernel else 16
    if layers + by_kernel:
        launch(
            prepare_kernel, (-(-samples // ROWS), layers + by_kernel),
            table, inverse, arrivals, labels, *segments, layers, samples, by_kernel, size, COMPARED, ROWS, WIDTH,
            num_warps=WARPS,
        )  # fmt: skip
    return Preparation(segments, inverse, arrivals)
