"""ReLU and its pooled activation in one pass over one activation.

    y = relu(x)          pooled[n, c] = mean over positions s of y[n, c, s]

Shapes: (N, C) or (N, C, *spatial), contiguous, channels_last or anything `layouts.arrange` copies; pooled (N, C).
Dtypes: float16, bfloat16, float32; sums and pooled in float32. NaN stays NaN, as in torch.relu.
Determinism: every sum runs in an order fixed by shape and layout; no atomics.

y may be x itself (in place): every element is read and written by one thread. A long channels_last map is split over
programs, and a second small launch adds the parts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moda_kernels.triton_kernels import layouts
from moda_kernels.triton_kernels.activation import activated, magnitude
from moda_kernels.triton_kernels.launching import launch
from moda_kernels.triton_kernels.layouts import Layout, mean_of, sum_of_lines, unit_of
from moda_kernels.triton_kernels.tables import on_device_of


@triton.jit
def normalising(numbers, neuron, neurons, there):
    """Mean, scale and bias of these neurons, from the (4, C) numbers that norm.py keeps."""
    mean = tl.load(numbers + neuron, mask=there, other=0.0)
    scale = tl.load(numbers + 2 * neurons + neuron, mask=there, other=0.0)
    bias = tl.load(numbers + 3 * neurons + neuron, mask=there, other=0.0)
    return mean, scale, bias


@triton.jit(do_not_specialize=["rows", "positions"])
def relu_pool_rows_kernel(
    x, y, pooled, rows: tl.int64, positions: tl.int64, ROWS: tl.constexpr, WIDTH: tl.constexpr, VEC: tl.constexpr
):
    """2048 elements: ROWS rows of one (sample, neuron) each, walked to their end."""
    ALIGN: tl.constexpr = VEC * (x.dtype.element_ty.primitive_bitwidth // 8)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    unit = unit_of(positions)
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    for start in range(0, positions, WIDTH):
        position = start + tl.arange(0, WIDTH)
        offsets = row[:, None] * positions + position[None, :]
        inside = tl.max_constancy((row < rows)[:, None] & (position < positions)[None, :], [1, VEC])
        pointers = tl.max_contiguous(tl.multiple_of(x + offsets, [1, ALIGN]), [1, VEC])
        value = activated(tl.load(pointers, mask=inside, other=0.0).to(tl.float32), "relu")
        targets = tl.max_contiguous(tl.multiple_of(y + offsets, [1, ALIGN]), [1, VEC])
        tl.store(targets, value.to(y.dtype.element_ty), mask=inside)
        total += value * unit
    tl.store(pooled + row, mean_of(tl.sum(total, 1), positions, unit), mask=row < rows)


@triton.jit(do_not_specialize=["rows"])
def relu_pool_flat_kernel(x, y, pooled, rows: tl.int64, TILE: tl.constexpr, VEC: tl.constexpr):
    """TILE elements, one position each."""
    ALIGN: tl.constexpr = VEC * (x.dtype.element_ty.primitive_bitwidth // 8)
    index = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = tl.max_constancy(index < rows, VEC)
    pointers = tl.max_contiguous(tl.multiple_of(x + index, ALIGN), VEC)
    value = activated(tl.load(pointers, mask=inside, other=0.0).to(tl.float32), "relu")
    targets = tl.max_contiguous(tl.multiple_of(y + index, ALIGN), VEC)
    tl.store(targets, value.to(y.dtype.element_ty), mask=inside)
    means = tl.max_contiguous(tl.multiple_of(pooled + index, ALIGN), VEC)
    tl.store(means, value, mask=inside)


@triton.jit(do_not_specialize=["rows", "samples", "neurons", "positions", "splits", "span"])
def relu_pool_columns_kernel(
    x, residual, y, parts, numbers,
    rows: tl.int64, samples: tl.int64, neurons: tl.int64, positions: tl.int64, splits: tl.int64, span: tl.int64,
    SAMPLES: tl.constexpr, POSITIONS: tl.constexpr, NEURONS: tl.constexpr, VEC: tl.constexpr,
    NORM: tl.constexpr, RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """NEURONS neurons of SAMPLES samples over `span` positions; with NORM, x is normalised first (norm_apply.py)."""
    ALIGN: tl.constexpr = VEC * (x.dtype.element_ty.primitive_bitwidth // 8)
    neuron = tl.program_id(0).to(tl.int64) * NEURONS + tl.arange(0, NEURONS)
    split = tl.program_id(1).to(tl.int64) % splits
    sample = tl.program_id(1).to(tl.int64) // splits * SAMPLES + tl.arange(0, SAMPLES)
    there = neuron < neurons
    row_inside = (sample < samples)[:, None] & there[None, :]
    if NORM:
        mean, scale, bias = normalising(numbers, neuron, neurons, there)
        mean, scale, bias = mean[None, None, :], scale[None, None, :], bias[None, None, :]
    unit = unit_of(positions)
    total = tl.zeros([SAMPLES, POSITIONS, NEURONS], tl.float32)
    for start in range(split * span, tl.minimum(split * span + span, positions), POSITIONS):
        position = start + tl.arange(0, POSITIONS)
        line = sample[:, None] * positions + position[None, :]
        offsets = line[:, :, None] * neurons + neuron[None, None, :]
        inside = tl.max_constancy(row_inside[:, None, :] & (position < positions)[None, :, None], [1, 1, VEC])
        pointers = tl.max_contiguous(tl.multiple_of(x + offsets, [1, 1, ALIGN]), [1, 1, VEC])
        value = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
        if NORM:
            value = (value - mean) * scale + bias
        if RESIDUAL:
            sources = tl.max_contiguous(tl.multiple_of(residual + offsets, [1, 1, ALIGN]), [1, 1, VEC])
            value += tl.load(sources, mask=inside, other=0.0).to(tl.float32)
        value = activated(value, ACTIVATION)
        if NORM:
            value = tl.where(inside, value, 0.0)
        targets = tl.max_contiguous(tl.multiple_of(y + offsets, [1, 1, ALIGN]), [1, 1, VEC])
        tl.store(targets, value.to(y.dtype.element_ty), mask=inside)
        total += magnitude(value, ACTIVATION) * unit
    means = mean_of(sum_of_lines(total, VEC), positions, unit)
    tl.store(parts + split * rows + sample[:, None] * neurons + neuron[None, :], means, mask=row_inside)


# Where a part begins is known at run time; a thread that wrote vectors of `pooled` would read numbers that lie apart.
@triton.jit(do_not_specialize=["rows", "splits"], do_not_specialize_on_alignment=["parts", "pooled"])
def add_parts_kernel(parts, pooled, rows: tl.int64, splits: tl.int64, BLOCK: tl.constexpr):
    """The sum over splits of the partial means, split after split."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for split in range(0, splits):
        total += tl.load(parts + split * rows + index, mask=index < rows, other=0.0)
    tl.store(pooled + index, total, mask=index < rows)


# Tiles and their reasons: layouts.py. Parts are few and small; 512 of them per program spreads them out.
PARTS_BLOCK = 512
COLUMNS_TILE = 4096
MOST_POSITIONS = 64  # of a sample; more samples fill a tile of few neurons, and sums are shorter
LEAST_TILES = 4  # of a program of COLUMNS, whose sum over a tile's positions goes through shared memory


def vector_width(layout: Layout, *tensors: Tensor) -> int:
    """Elements of the first tensor per access: as many as 16 bytes hold, fewer where a tensor is less aligned."""
    itemsize = tensors[0].element_size()
    return max(1, layout.aligned_bytes(itemsize, *(tensor.data_ptr() for tensor in tensors)) // itemsize)


def launch_relu_pool(x: Tensor, y: Tensor, layout: Layout) -> Tensor:
    """Write relu(x) to y, which lies as x does (or is x); return pooled (N, C) float32."""
    if layout.mode == layouts.COLUMNS:
        with on_device_of(x):
            return launch_columns(x, None, y, None, layout, "relu")
    pooled = torch.empty(x.shape[:2], dtype=torch.float32, device=x.device)
    vec = vector_width(layout, x, y)
    grid = (layout.programs,)
    with on_device_of(x):
        if layout.mode == layouts.FLAT:
            launch(relu_pool_flat_kernel, grid, x, y, pooled, layout.rows, layouts.TILE, vec, num_warps=layouts.WARPS)
        else:
            width = layouts.ROW_WIDTHS[layout.mode - layouts.ROWS]
            launch(
                relu_pool_rows_kernel, grid,
                x, y, pooled, layout.rows, layout.positions, layouts.TILE // width, width, min(vec, width),
                num_warps=layouts.WARPS,
            )  # fmt: skip
    return pooled


def launch_columns(
    x: Tensor, residual: Tensor | None, y: Tensor, numbers: Tensor | None, layout: Layout, activation: str
) -> Tensor:
    """As `launch_relu_pool`, for COLUMNS and any activation; x is normalised by `numbers` and a residual added, if they
    are there.
    """
    samples = layout.rows // layout.neurons
    pooled = torch.empty((samples, layout.neurons), dtype=torch.float32, device=x.device)
    tile = layouts.matrix_tile(layout, x.element_size(), COLUMNS_TILE)
    vec = min(vector_width(layout, *(tensor for tensor in (x, residual, y) if tensor is not None)), tile.neurons)
    positions = min(tile.lines, triton.next_power_of_2(layout.positions), MOST_POSITIONS)
    together = tile.lines // positions
    blocks, groups = -(-layout.neurons // tile.neurons), -(-samples // together)
    span = _span(layout.positions, positions, blocks * groups)
    splits = -(-layout.positions // span)
    parts = pooled if splits == 1 else torch.empty(splits * layout.rows, dtype=torch.float32, device=x.device)
    launch(
        relu_pool_columns_kernel, (blocks, groups * splits),
        x, x if residual is None else residual, y, parts, x if numbers is None else numbers,
        layout.rows, samples, layout.neurons, layout.positions, splits, span,
        together, positions, tile.neurons, vec, numbers is not None, residual is not None, activation,
        num_warps=layouts.WARPS,
    )  # fmt: skip
    if splits > 1:
        grid = (-(-layout.rows // PARTS_BLOCK),)
        launch(add_parts_kernel, grid, parts, pooled, layout.rows, splits, PARTS_BLOCK, num_warps=layouts.WARPS)
    return pooled


def _span(positions: int, tile: int, programs: int) -> int:
    """Positions of a program: whole tiles, at least LEAST_TILES, and as few as give a large GPU its programs."""
    tiles = -(-positions // tile)
    splits = max(1, min(-(-tiles // LEAST_TILES), -(-layouts.PROGRAMS // programs)))
    return -(-tiles // splits) * tile
