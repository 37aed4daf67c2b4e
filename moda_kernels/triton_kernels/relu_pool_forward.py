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
from moda_kernels.triton_kernels.layouts import Layout, mean_of, unit_of
from moda_kernels.triton_kernels.tables import on_device_of


@triton.jit
def _relu(value):
    return tl.where(value <= 0, 0.0, value)  # a comparison with NaN is false


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
        value = _relu(tl.load(pointers, mask=inside, other=0.0).to(tl.float32))
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
    value = _relu(tl.load(pointers, mask=inside, other=0.0).to(tl.float32))
    targets = tl.max_contiguous(tl.multiple_of(y + index, ALIGN), VEC)
    tl.store(targets, value.to(y.dtype.element_ty), mask=inside)
    means = tl.max_contiguous(tl.multiple_of(pooled + index, ALIGN), VEC)
    tl.store(means, value, mask=inside)


@triton.jit(do_not_specialize=["rows", "neurons", "positions", "splits"])
def relu_pool_columns_kernel(
    x, y, parts, rows: tl.int64, neurons: tl.int64, positions: tl.int64, splits: tl.int64,
    SPAN: tl.constexpr, POSITIONS: tl.constexpr, NEURONS: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """32 neurons of one sample over SPAN positions."""
    ALIGN: tl.constexpr = VEC * (x.dtype.element_ty.primitive_bitwidth // 8)
    tile = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(neurons, NEURONS)
    neuron = (tile % blocks) * NEURONS + tl.arange(0, NEURONS)
    split = (tile // blocks) % splits
    sample = tile // (blocks * splits)
    unit = unit_of(positions)
    total = tl.zeros([POSITIONS, NEURONS], tl.float32)
    for start in range(split * SPAN, tl.minimum(split * SPAN + SPAN, positions), POSITIONS):
        position = start + tl.arange(0, POSITIONS)
        offsets = (sample * positions + position)[:, None] * neurons + neuron[None, :]
        inside = tl.max_constancy((position < positions)[:, None] & (neuron < neurons)[None, :], [1, VEC])
        pointers = tl.max_contiguous(tl.multiple_of(x + offsets, [1, ALIGN]), [1, VEC])
        value = _relu(tl.load(pointers, mask=inside, other=0.0).to(tl.float32))
        targets = tl.max_contiguous(tl.multiple_of(y + offsets, [1, ALIGN]), [1, VEC])
        tl.store(targets, value.to(y.dtype.element_ty), mask=inside)
        total += value * unit
    mean = mean_of(tl.sum(total, 0), positions, unit)
    tl.store(parts + split * rows + sample * neurons + neuron, mean, mask=neuron < neurons)


@triton.jit(do_not_specialize=["rows", "splits"])
def add_parts_kernel(parts, pooled, rows: tl.int64, splits: tl.int64, BLOCK: tl.constexpr):
    """The sum over splits of the partial means, split after split."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for split in range(0, splits):
        total += tl.load(parts + split * rows + index, mask=index < rows, other=0.0)
    tl.store(pooled + index, total, mask=index < rows)


# Tiles and their reasons: layouts.py. Parts are few and small; 512 of them per program spreads them out.
PARTS_BLOCK = 512


def vector_width(layout: Layout, *tensors: Tensor) -> int:
    """Elements of the first tensor per access: as many as 16 bytes hold, fewer where a tensor is less aligned."""
    itemsize = tensors[0].element_size()
    return max(1, layout.aligned_bytes(itemsize, *(tensor.data_ptr() for tensor in tensors)) // itemsize)


def launch_relu_pool(x: Tensor, y: Tensor, layout: Layout) -> Tensor:
    """Write relu(x) to y, which lies as x does (or is x); return pooled (N, C) float32."""
    pooled = torch.empty(x.shape[:2], dtype=torch.float32, device=x.device)
    vec = vector_width(layout, x, y)
    grid = (layout.programs,)
    with on_device_of(x):
        if layout.mode == layouts.FLAT:
            relu_pool_flat_kernel[grid](x, y, pooled, layout.rows, layouts.TILE, vec, num_warps=layouts.WARPS)
        elif layout.mode == layouts.COLUMNS:
            _launch_columns(x, y, pooled, layout, vec)
        else:
            width = layouts.ROW_WIDTHS[layout.mode - layouts.ROWS]
            relu_pool_rows_kernel[grid](
                x, y, pooled, layout.rows, layout.positions, layouts.TILE // width, width, min(vec, width),
                num_warps=layouts.WARPS,
            )  # fmt: skip
    return pooled


def _launch_columns(x: Tensor, y: Tensor, pooled: Tensor, layout: Layout, vec: int) -> None:
    split = layout.splits > 1
    parts = torch.empty(layout.splits * layout.rows, dtype=torch.float32, device=x.device) if split else pooled
    relu_pool_columns_kernel[(layout.programs,)](
        x, y, parts, layout.rows, layout.neurons, layout.positions, layout.splits,
        layouts.SPAN, layouts.COLUMN_POSITIONS, layouts.COLUMN_NEURONS, vec, num_warps=layouts.WARPS,
    )  # fmt: skip
    if split:
        grid = (-(-layout.rows // PARTS_BLOCK),)
        add_parts_kernel[grid](parts, pooled, layout.rows, layout.splits, PARTS_BLOCK, num_warps=layouts.WARPS)
