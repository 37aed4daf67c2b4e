"""Gradient of ReLU with pooling, in one launch.

    dx = (y > 0) * (dy + dpooled / S)          where y is NaN the gradient passes, as in torch.relu

Shapes, layouts and dtypes as in relu_pool_forward.py: dy and dx like y, dpooled (N, C) float32; either
gradient may be absent.
Determinism: elementwise, each element written once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moda_kernels.triton_kernels import layouts
from moda_kernels.triton_kernels.launching import launch
from moda_kernels.triton_kernels.layouts import Layout, sample_of
from moda_kernels.triton_kernels.relu_pool_forward import vector_width
from moda_kernels.triton_kernels.tables import on_device_of


@triton.jit
def _gradient(y, dy, dx, offsets, inside, gradient, HAS_DY: tl.constexpr, ALIGN: tl.constexpr, GROUP: tl.constexpr):
    """Write (y > 0) * (dy + gradient) at `offsets`; ALIGN bytes and GROUP elements describe the accesses."""
    pointers = tl.max_contiguous(tl.multiple_of(y + offsets, ALIGN), GROUP)
    value = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
    if HAS_DY:
        sources = tl.max_contiguous(tl.multiple_of(dy + offsets, ALIGN), GROUP)
        gradient = gradient + tl.load(sources, mask=inside, other=0.0).to(tl.float32)
    targets = tl.max_contiguous(tl.multiple_of(dx + offsets, ALIGN), GROUP)
    tl.store(targets, tl.where(value <= 0, 0.0, gradient).to(dx.dtype.element_ty), mask=inside)


@triton.jit
def _pooled_gradient(dpooled, index, inside, positions, HAS_DPOOLED: tl.constexpr, SIZE: tl.constexpr):
    if HAS_DPOOLED:
        gradient = tl.load(dpooled + index, mask=inside, other=0.0) / positions
    else:
        gradient = tl.zeros([SIZE], tl.float32)
    return gradient


@triton.jit(do_not_specialize=["rows", "positions"])
def relu_pool_rows_backward_kernel(
    y, dy, dpooled, dx, rows: tl.int64, positions: tl.int64,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, VEC: tl.constexpr, HAS_DY: tl.constexpr, HAS_DPOOLED: tl.constexpr,
):  # fmt: skip
    """2048 elements: ROWS rows of one (sample, neuron) each, walked to their end."""
    ALIGN: tl.constexpr = VEC * (y.dtype.element_ty.primitive_bitwidth // 8)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    gradient = _pooled_gradient(dpooled, row, row < rows, positions, HAS_DPOOLED, ROWS)
    for start in range(0, positions, WIDTH):
        position = start + tl.arange(0, WIDTH)
        offsets = row[:, None] * positions + position[None, :]
        inside = tl.max_constancy((row < rows)[:, None] & (position < positions)[None, :], [1, VEC])
        _gradient(
            y, dy, dx, offsets, inside, tl.broadcast_to(gradient[:, None], [ROWS, WIDTH]),
            HAS_DY, [1, ALIGN], [1, VEC],
        )  # fmt: skip


@triton.jit(do_not_specialize=["rows"])
def relu_pool_flat_backward_kernel(
    y, dy, dpooled, dx, rows: tl.int64,
    TILE: tl.constexpr, VEC: tl.constexpr, HAS_DY: tl.constexpr, HAS_DPOOLED: tl.constexpr,
):  # fmt: skip
    """TILE elements, one position each."""
    ALIGN: tl.constexpr = VEC * (y.dtype.element_ty.primitive_bitwidth // 8)
    index = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = tl.max_constancy(index < rows, VEC)
    gradient = tl.zeros([TILE], tl.float32)
    if HAS_DPOOLED:
        sources = tl.max_contiguous(tl.multiple_of(dpooled + index, ALIGN), VEC)
        gradient = tl.load(sources, mask=inside, other=0.0)
    _gradient(y, dy, dx, index, inside, gradient, HAS_DY, ALIGN, VEC)


@triton.jit(do_not_specialize=["lines", "neurons", "positions", "per_program"])
def relu_pool_columns_backward_kernel(
    y, dy, dpooled, dx, lines: tl.int64, neurons: tl.int64, positions: tl.int64, per_program: tl.int64,
    LINES: tl.constexpr, NEURONS: tl.constexpr, VEC: tl.constexpr, LARGE: tl.constexpr,
    HAS_DY: tl.constexpr, HAS_DPOOLED: tl.constexpr,
):  # fmt: skip
    """NEURONS neurons over `per_program` rows of the matrix (N * S, C)."""
    ALIGN: tl.constexpr = VEC * (y.dtype.element_ty.primitive_bitwidth // 8)
    neuron = tl.program_id(0).to(tl.int64) * NEURONS + tl.arange(0, NEURONS)
    first = tl.program_id(1).to(tl.int64) * per_program
    end = tl.minimum(first + per_program, lines)
    for start in range(first, end, LINES):
        line = start + tl.arange(0, LINES)
        inside = tl.max_constancy((line < end)[:, None] & (neuron < neurons)[None, :], [1, VEC])
        gradient = tl.zeros([LINES, NEURONS], tl.float32)
        if HAS_DPOOLED:
            shares = dpooled + sample_of(line, positions, LARGE)[:, None] * neurons + neuron[None, :]
            shares = tl.max_contiguous(tl.multiple_of(shares, [1, ALIGN]), [1, VEC])
            gradient = tl.load(shares, mask=inside, other=0.0) / positions
        offsets = line[:, None] * neurons + neuron[None, :]
        _gradient(y, dy, dx, offsets, inside, gradient, HAS_DY, [1, ALIGN], [1, VEC])


# Tiles and their reasons: layouts.py; the same programs as forward. An absent gradient is a compile-time variant: a
# tensor of zeros in its place would cost a pass of its own.
COLUMNS_TILE = 1024


def launch_relu_pool_backward(y: Tensor, dy: Tensor | None, dpooled: Tensor | None, layout: Layout) -> Tensor:
    """dx, which lies as y does; dy, if given, lies as y does too."""
    dx = torch.empty_like(y)
    vec = vector_width(layout, *(tensor for tensor in (y, dy, dpooled, dx) if tensor is not None))
    have = (dy is not None, dpooled is not None)
    tensors = (y, y if dy is None else dy, dx if dpooled is None else dpooled, dx)  # an absent one is never read
    grid = (layout.programs,)
    with on_device_of(y):
        if layout.mode == layouts.FLAT:
            launch(
                relu_pool_flat_backward_kernel,
                grid,
                *tensors,
                layout.rows,
                layouts.TILE,
                vec,
                *have,
                num_warps=layouts.WARPS,
            )
        elif layout.mode == layouts.COLUMNS:
            _launch_columns(tensors, layout, vec, have)
        else:
            width = layouts.ROW_WIDTHS[layout.mode - layouts.ROWS]
            launch(
                relu_pool_rows_backward_kernel, grid,
                *tensors, layout.rows, layout.positions, layouts.TILE // width, width, min(vec, width), *have,
                num_warps=layouts.WARPS,
            )  # fmt: skip
    return dx


def _launch_columns(tensors: tuple[Tensor, ...], layout: Layout, vec: int, have: tuple[bool, bool]) -> None:
    tile = layouts.matrix_tile(layout, tensors[0].element_size(), COLUMNS_TILE)
    lines, blocks = layout.rows // layout.neurons * layout.positions, -(-layout.neurons // tile.neurons)
    per_program = max(1, lines * blocks // (tile.lines * 2 * layouts.PROGRAMS)) * tile.lines
    launch(
        relu_pool_columns_backward_kernel, (blocks, -(-lines // per_program)),
        *tensors, lines, layout.neurons, layout.positions, per_program,
        tile.lines, tile.neurons, min(vec, tile.neurons), lines >= 2**31, *have, num_warps=layouts.WARPS,
    )  # fmt: skip
