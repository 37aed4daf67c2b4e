"""Inverse norms of the pooled rows of all layers, in one launch.

    inverse[l, i] = 1 / max(|a_i|, 1e-12), and 0 for an all-zero row, so that a row times it is n_i

Shapes: rows (N, C) per layer, inverse (L, N). Dtypes: float32 in and out; squares are summed in float64, so that
neither 1e-30 nor 1e30 in a row is lost to underflow or overflow.
Determinism: one program per group of rows, a fixed order over neurons; no atomics.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from moda_kernels.triton_kernels.rows import Rows, load_rows


@triton.jit(do_not_specialize=["layers", "samples"])
def row_norms_kernel(table, inverse, layers: tl.int64, samples: tl.int64, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """ROWS rows of one layer."""
    layer = tl.program_id(1).to(tl.int64)
    rows = tl.load(table + layers + layer).to(tl.pointer_type(tl.float32))
    neurons = tl.load(table + 2 * layers + layer)
    aligned = tl.load(table + 3 * layers + layer)
    sample = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    squares = tl.zeros([ROWS, WIDTH], tl.float64)
    for start in range(0, neurons, WIDTH):
        neuron = start + tl.arange(0, WIDTH)
        values = load_rows(rows, sample, sample < samples, neurons, neuron, aligned).to(tl.float64)
        squares += values * values
    norm = tl.sqrt(tl.sum(squares, 1))
    floored = tl.where(norm < 1e-12, 1e-12, norm)  # NaN stays NaN
    result = tl.where(norm == 0, 0.0, 1.0 / floored)
    result = tl.where(norm == float("inf"), float("nan"), result)  # as everywhere: one makes all of its row NaN
    tl.store(inverse + layer * samples + sample, result.to(tl.float32), mask=sample < samples)


# 8 x 256: one step covers the rows of most convolution layers whole, and eight rows share its latency; fewer rows
# would leave threads idle on layers of 64 neurons, more would leave multiprocessors idle on batches of 128.
ROWS = 8
WIDTH = 256
WARPS = 4


def launch_row_norms(rows: Rows, table: Tensor, inverse: Tensor) -> None:
    """Write `inverse`, (L, N) float32."""
    layers = len(rows.neurons)
    grid = (-(-rows.samples // ROWS), layers)
    row_norms_kernel[grid](table, inverse, layers, rows.samples, ROWS, WIDTH, num_warps=WARPS)
