"""Gradient of the pooled activations of all layers, in one launch per dtype present.

    dx[n, c, s] = dpooled[n, c] * sign(x[n, c, s]) / S            spatial layers, sign(0) = 0
    dx[n, c]    = dpooled[n, c]                                   (N, C) layers of half precision

Shapes, layouts and dtypes as in pool_forward.py: dpooled float32, dx in the dtype and layout of x.
Determinism: elementwise, each element written once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from moda_kernels.triton_kernels import layouts
from moda_kernels.triton_kernels.launching import launch
from moda_kernels.triton_kernels.pool_forward import (
    COLUMN_NEURONS,
    COLUMN_POSITIONS,
    SPAN,
    TILE,
    Pooling,
)
from moda_kernels.triton_kernels.tables import device_table, find_layer


@triton.jit
def _sign(value):
    return (value > 0).to(tl.float32) - (value < 0).to(tl.float32)


@triton.jit
def _flat(x, dpooled, dx, tile, rows, signed, VEC: tl.constexpr, ACCESS: tl.constexpr):
    index = tile * TILE + tl.arange(0, TILE)
    inside = tl.max_constancy(index < rows, VEC)
    pointers = tl.max_contiguous(tl.multiple_of(x + index, ACCESS), VEC)
    value = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
    sources = tl.max_contiguous(tl.multiple_of(dpooled + index, ACCESS), VEC)
    gradient = tl.load(sources, mask=inside, other=0.0)
    gradient = tl.where(signed != 0, gradient, gradient * _sign(value))
    targets = tl.max_contiguous(tl.multiple_of(dx + index, ACCESS), VEC)
    tl.store(targets, gradient.to(dx.dtype.element_ty), mask=inside)


@triton.jit
def _rows(
    x,
    dpooled,
    dx,
    tile,
    rows,
    positions,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    VEC: tl.constexpr,
    ACCESS: tl.constexpr,
):
    row = tile * ROWS + tl.arange(0, ROWS)
    gradient = tl.load(dpooled + row, mask=row < rows, other=0.0) / positions
    for start in range(0, positions, WIDTH):
        position = start + tl.arange(0, WIDTH)
        offsets = row[:, None] * positions + position[None, :]
        inside = tl.max_constancy((row < rows)[:, None] & (position < positions)[None, :], [1, VEC])
        pointers = tl.max_contiguous(tl.multiple_of(x + offsets, [1, ACCESS]), [1, VEC])
        value = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
        targets = tl.max_contiguous(tl.multiple_of(dx + offsets, [1, ACCESS]), [1, VEC])
        tl.store(targets, (gradient[:, None] * _sign(value)).to(dx.dtype.element_ty), mask=inside)


@triton.jit
def _columns(x, dpooled, dx, tile, neurons, positions, splits, VEC: tl.constexpr, ACCESS: tl.constexpr):
    blocks = tl.cdiv(neurons, COLUMN_NEURONS)
    neuron = (tile % blocks) * COLUMN_NEURONS + tl.arange(0, COLUMN_NEURONS)
    split = (tile // blocks) % splits
    sample = tile // (blocks * splits)
    sources = tl.max_contiguous(tl.multiple_of(dpooled + sample * neurons + neuron, ACCESS), VEC)
    gradient = tl.load(sources, mask=tl.max_constancy(neuron < neurons, VEC), other=0.0) / positions
    for start in range(split * SPAN, tl.minimum(split * SPAN + SPAN, positions), COLUMN_POSITIONS):
        position = start + tl.arange(0, COLUMN_POSITIONS)
        offsets = (sample * positions + position)[:, None] * neurons + neuron[None, :]
        inside = tl.max_constancy((position < positions)[:, None] & (neuron < neurons)[None, :], [1, VEC])
        pointers = tl.max_contiguous(tl.multiple_of(x + offsets, [1, ACCESS]), [1, VEC])
        value = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
        targets = tl.max_contiguous(tl.multiple_of(dx + offsets, [1, ACCESS]), [1, VEC])
        tl.store(targets, (gradient[None, :] * _sign(value)).to(dx.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["layers"])
def pool_backward_kernel(table, layers: tl.int64, DTYPE: tl.constexpr, ACCESS: tl.constexpr):
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
    mode = tl.load(field + 8 * layers)  # of the layout
    dpooled = tl.load(field + 9 * layers).to(tl.pointer_type(tl.float32))
    VEC: tl.constexpr = 8 * ACCESS // DTYPE.primitive_bitwidth  # elements of an access
    if mode == 0:
        _flat(x, dpooled, dx, tile, rows, signed, VEC, ACCESS)
    elif mode == 1:
        _rows(x, dpooled, dx, tile, rows, positions, TILE // 4, 4, VEC if VEC < 4 else 4, ACCESS)
    elif mode == 2:
        _rows(x, dpooled, dx, tile, rows, positions, TILE // 16, 16, VEC, ACCESS)
    elif mode == 3:
        _rows(x, dpooled, dx, tile, rows, positions, TILE // 64, 64, VEC, ACCESS)
    elif mode == 4:
        _rows(x, dpooled, dx, tile, rows, positions, TILE // 256, 256, VEC, ACCESS)
    elif mode == 5:
        _rows(x, dpooled, dx, tile, rows, positions, TILE // 1024, 1024, VEC, ACCESS)
    else:
        _columns(x, dpooled, dx, tile, neurons, positions, splits, VEC, ACCESS)


# Tiles and their reasons: layouts.py; the same programs as forward, which keeps one table layout for both.


def launch_pool_backward(
    pooling: Pooling, addresses: Sequence[int], dpooled: Sequence[int], targets: Sequence[int], device: torch.device
) -> None:
    """Write each layer's gradient to its target, from the addresses of the layer and of its dpooled."""
    for group in pooling.groups(addresses, dpooled, targets):
        columns = [
            group.starts,
            *([given[i] for i in group.which] for given in (addresses, targets)),
            group.sizes,
            [dpooled[i] for i in group.which],
        ]
        launch(
            pool_backward_kernel, (group.programs,),
            device_table(columns, device), len(group.which), group.dtype, group.access, num_warps=layouts.WARPS,
        )  # fmt: skip
