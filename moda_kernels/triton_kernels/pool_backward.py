"""Gradient of the pooled activations of all layers, in one launch per dtype present.

    dx[n, c, s] = dpooled[n, c] * sign(x[n, c, s]) / S            spatial layers, sign(0) = 0
    dx[n, c]    = dpooled[n, c]                                   (N, C) layers of half precision

Shapes, layouts and dtypes as in pool_forward.py: dpooled float32, dx in the dtype and layout of x.
Determinism: elementwise, each element written once.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl

from moda_kernels.triton_kernels import layouts
from moda_kernels.triton_kernels.pool_forward import (
    COLUMN_NEURONS,
    COLUMN_POSITIONS,
    SPAN,
    TILE,
    Pooling,
    by_dtype,
    pool_columns,
)
from moda_kernels.triton_kernels.tables import device_table, find_layer, on_device_of


@triton.jit
def _sign(value):
    return (value > 0).to(tl.float32) - (value < 0).to(tl.float32)


@triton.jit
def _flat(x, dpooled, dx, tile, rows, signed, VEC: tl.constexpr):
    index = tile * TILE + tl.arange(0, TILE)
    inside = tl.max_constancy(index < rows, VEC)
    pointers = tl.max_contiguous(tl.multiple_of(x + index, 16 if VEC > 1 else 1), VEC)
    value = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
    sources = tl.max_contiguous(tl.multiple_of(dpooled + index, 16 if VEC > 1 else 4), VEC)
    gradient = tl.load(sources, mask=inside, other=0.0)
    gradient = tl.where(signed != 0, gradient, gradient * _sign(value))
    targets = tl.max_contiguous(tl.multiple_of(dx + index, 16 if VEC > 1 else 1), VEC)
    tl.store(targets, gradient.to(dx.dtype.element_ty), mask=inside)


@triton.jit
def _rows(x, dpooled, dx, tile, rows, positions, ROWS: tl.constexpr, WIDTH: tl.constexpr, VEC: tl.constexpr):
    row = tile * ROWS + tl.arange(0, ROWS)
    gradient = tl.load(dpooled + row, mask=row < rows, other=0.0) / positions
    for start in range(0, positions, WIDTH):
        position = start + tl.arange(0, WIDTH)
        offsets = row[:, None] * positions + position[None, :]
        inside = tl.max_constancy((row < rows)[:, None] & (position < positions)[None, :], [1, VEC])
        pointers = tl.max_contiguous(tl.multiple_of(x + offsets, [1, 16 if VEC > 1 else 1]), [1, VEC])
        value = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
        targets = tl.max_contiguous(tl.multiple_of(dx + offsets, [1, 16 if VEC > 1 else 1]), [1, VEC])
        tl.store(targets, (gradient[:, None] * _sign(value)).to(dx.dtype.element_ty), mask=inside)


@triton.jit
def _columns(x, dpooled, dx, tile, neurons, positions, splits, VEC: tl.constexpr):
    blocks = tl.cdiv(neurons, COLUMN_NEURONS)
    neuron = (tile % blocks) * COLUMN_NEURONS + tl.arange(0, COLUMN_NEURONS)
    split = (tile // blocks) % splits
    sample = tile // (blocks * splits)
    gradient = tl.load(dpooled + sample * neurons + neuron, mask=neuron < neurons, other=0.0) / positions
    for start in range(split * SPAN, tl.minimum(split * SPAN + SPAN, positions), COLUMN_POSITIONS):
        position = start + tl.arange(0, COLUMN_POSITIONS)
        offsets = (sample * positions + position)[:, None] * neurons + neuron[None, :]
        inside = tl.max_constancy((position < positions)[:, None] & (neuron < neurons)[None, :], [1, VEC])
        pointers = tl.max_contiguous(tl.multiple_of(x + offsets, [1, 16 if VEC > 1 else 1]), [1, VEC])
        value = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
        targets = tl.max_contiguous(tl.multiple_of(dx + offsets, [1, 16 if VEC > 1 else 1]), [1, VEC])
        tl.store(targets, (gradient[None, :] * _sign(value)).to(dx.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["layers"])
def pool_backward_kernel(table, layers: tl.int64, DTYPE: tl.constexpr):
    """One tile of one layer; the same programs as forward."""
    program = tl.program_id(0).to(tl.int64)
    layer = find_layer(table, layers, program)
    field = table + layer
    tile = program - tl.load(field)
    x = tl.load(field + layers).to(tl.pointer_type(DTYPE))
    dx = tl.load(field + 2 * layers).to(tl.pointer_type(DTYPE))
    rows = tl.load(field + 3 * layers)
    neurons = tl.load(field + 4 * layers)
    positions = tl.load(field + 5 * layers)
    splits = tl.load(field + 6 * layers)
    signed = tl.load(field + 7 * layers)
    mode = tl.load(field + 8 * layers)
    dpooled = tl.load(field + 9 * layers).to(tl.pointer_type(tl.float32))
    VEC: tl.constexpr = 128 // DTYPE.primitive_bitwidth  # at most the width of the tile
    if mode == 0:
        _flat(x, dpooled, dx, tile, rows, signed, 1)
    elif mode == 1:
        _flat(x, dpooled, dx, tile, rows, signed, VEC)
    elif mode == 2:
        _rows(x, dpooled, dx, tile, rows, positions, TILE // 4, 4, 1)
    elif mode == 3:
        _rows(x, dpooled, dx, tile, rows, positions, TILE // 4, 4, 4)
    elif mode == 4:
        _rows(x, dpooled, dx, tile, rows, positions, TILE // 16, 16, 1)
    elif mode == 5:
        _rows(x, dpooled, dx, tile, rows, positions, TILE // 16, 16, VEC)
    elif mode == 6:
        _rows(x, dpooled, dx, tile, rows, positions, TILE // 64, 64, 1)
    elif mode == 7:
        _rows(x, dpooled, dx, tile, rows, positions, TILE // 64, 64, VEC)
    elif mode == 8:
        _rows(x, dpooled, dx, tile, rows, positions, TILE // 256, 256, 1)
    elif mode == 9:
        _rows(x, dpooled, dx, tile, rows, positions, TILE // 256, 256, VEC)
    elif mode == 10:
        _rows(x, dpooled, dx, tile, rows, positions, TILE // 1024, 1024, 1)
    elif mode == 11:
        _rows(x, dpooled, dx, tile, rows, positions, TILE // 1024, 1024, VEC)
    elif mode == 12:
        _columns(x, dpooled, dx, tile, neurons, positions, splits, 1)
    else:
        _columns(x, dpooled, dx, tile, neurons, positions, splits, VEC)


# Tiles and their reasons: layouts.py; the same programs as forward, which keeps one table layout for both.


def launch_pool_backward(layers: Sequence[Pooling], gradients: Sequence[int]) -> None:
    """Write the gradient of each layer to its address; `Pooling.pooled` holds the address of dpooled."""
    if not layers:
        return
    targets = {id(layer): address for layer, address in zip(layers, gradients, strict=True)}
    with on_device_of(layers[0].activation):
        for dtype, group in by_dtype(layers):
            columns, programs = pool_columns(group, [targets[id(layer)] for layer in group])
            columns.append([layer.pooled for layer in group])
            table = device_table(columns, group[0].activation.device)
            pool_backward_kernel[(programs,)](table, len(group), dtype, num_warps=layouts.WARPS)
