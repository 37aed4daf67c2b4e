"""Sums over a batch per neuron, in parts: of x and its square, or of the gradient g and g * (x - mean) (norm.py).

A part is a range of samples (of positions too, channels_last), and a program sums some neurons of one part:

    ROWS      tiles of SAMPLES x NEURONS x WIDTH, the positions of a neuron contiguous. Neurons with few positions are
              taken together, so that what a warp reads is contiguous all the same
    COLUMNS   tiles of ROWS x NEURONS of the matrix (N * S, C); an (N, C) activation is one

Sums run over the tiles element by element, and over a tile at the end. Parts are as many as keep every multiprocessor
of a large GPU busy several times over, and no more than are quickly joined.
Statistics are (3, parts, C): the shift, sums of x - shift and of (x - shift)^2. Gradients' sums are (2, parts, C).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moda_kernels.triton_kernels import layouts
from moda_kernels.triton_kernels.activation import gradient_of
from moda_kernels.triton_kernels.launching import launch
from moda_kernels.triton_kernels.layouts import Layout, sample_of
from moda_kernels.triton_kernels.relu_pool_forward import normalising, vector_width

PROGRAMS = 1024
MOST_PARTS = 512
LINE = 32  # elements that a warp should find side by side


class Tiles(NamedTuple):
    """The sizes of a kernel's tiles: elements in ROWS, bytes in COLUMNS."""

    rows: int
    columns_bytes: int


STATISTICS_TILES = Tiles(1024, 8192)
GRADIENT_TILES = Tiles(1024, 4096)


@dataclass(frozen=True)
class Parts:
    """How a layout is cut; `samples` or `rows` of a tile, `neurons` and `width` are its sides."""

    columns: bool
    lines: int  # samples, or rows of the matrix
    neurons: int
    width: int
    blocks: int  # of neurons
    count: int
    per_part: int  # lines

    @property
    def grid(self) -> tuple[int, int]:
        """Programs: blocks of neurons times parts."""
        return self.blocks, self.count


def cut(layout: Layout, itemsize: int, tiles: Tiles) -> Parts:
    """The parts of an activation."""
    if layout.mode == layouts.COLUMNS:
        lines, neurons = layouts.matrix_tile(layout, itemsize, tiles.columns_bytes // itemsize)
        width, total = 1, layout.rows // layout.neurons * layout.positions
    else:
        width = layouts.ROW_WIDTHS[layout.mode - layouts.ROWS]
        neurons = max(1, LINE // width)
        lines, total = max(1, tiles.rows // (neurons * width)), layout.rows // layout.neurons
    blocks = -(-layout.neurons // neurons)
    whole = -(-total // lines)
    count = max(1, min(whole, MOST_PARTS, PROGRAMS // blocks))
    per_part = -(-whole // count) * lines
    return Parts(layout.mode == layouts.COLUMNS, lines, neurons, width, blocks, -(-total // per_part), per_part)


@triton.jit(do_not_specialize=["samples", "neurons", "positions", "per_part"])
def statistics_rows_kernel(
    x, sums, samples: tl.int64, neurons: tl.int64, positions: tl.int64, per_part: tl.int64,
    SAMPLES: tl.constexpr, NEURONS: tl.constexpr, WIDTH: tl.constexpr, VEC: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """NEURONS neurons over `per_part` samples."""
    part = tl.program_id(1).to(tl.int64)
    neuron = tl.program_id(0).to(tl.int64) * NEURONS + tl.arange(0, NEURONS)
    first = part * per_part
    there = neuron < neurons
    position = tl.arange(0, WIDTH)
    inside = there[:, None] & (position < positions)[None, :]
    row = tl.load(x + (first * neurons + neuron[:, None]) * positions + position[None, :], mask=inside, other=0.0)
    shift = tl.sum(row.to(tl.float32), 1) / tl.minimum(positions, WIDTH)
    total = tl.zeros([SAMPLES, NEURONS, WIDTH], tl.float32)
    square = tl.zeros([SAMPLES, NEURONS, WIDTH], tl.float32)
    for start in range(first, tl.minimum(first + per_part, samples), SAMPLES):
        sample = start + tl.arange(0, SAMPLES)
        for begin in range(0, positions, WIDTH):
            at = begin + position
            offsets = (sample[:, None, None] * neurons + neuron[None, :, None]) * positions + at[None, None, :]
            valid = (sample < samples)[:, None, None] & there[None, :, None] & (at < positions)[None, None, :]
            valid = tl.max_constancy(valid, [1, 1, VEC])
            pointers = tl.max_contiguous(tl.multiple_of(x + offsets, [1, 1, ALIGN]), [1, 1, VEC])
            value = tl.load(pointers, mask=valid, other=0.0).to(tl.float32)
            value = tl.where(valid, value - shift[None, :, None], 0.0)
            total += value
            square += value * value
    parts = tl.num_programs(1).to(tl.int64)
    tl.store(sums + part * neurons + neuron, shift, mask=there)
    tl.store(sums + (parts + part) * neurons + neuron, tl.sum(tl.sum(total, 2), 0), mask=there)
    tl.store(sums + (2 * parts + part) * neurons + neuron, tl.sum(tl.sum(square, 2), 0), mask=there)


@triton.jit(do_not_specialize=["rows", "neurons", "per_part"])
def statistics_columns_kernel(
    x, sums, rows: tl.int64, neurons: tl.int64, per_part: tl.int64,
    ROWS: tl.constexpr, NEURONS: tl.constexpr, VEC: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """NEURONS neurons over `per_part` rows of the matrix."""
    part = tl.program_id(1).to(tl.int64)
    neuron = tl.program_id(0).to(tl.int64) * NEURONS + tl.arange(0, NEURONS)
    first = part * per_part
    end = tl.minimum(first + per_part, rows)
    there = neuron < neurons
    probe = first + tl.arange(0, 8)
    inside = (probe < end)[:, None] & there[None, :]
    row = tl.load(x + probe[:, None] * neurons + neuron[None, :], mask=inside, other=0.0)
    shift = tl.sum(row.to(tl.float32), 0) / tl.minimum(end - first, 8)
    total = tl.zeros([ROWS, NEURONS], tl.float32)
    square = tl.zeros([ROWS, NEURONS], tl.float32)
    for start in range(first, end, ROWS):
        at = start + tl.arange(0, ROWS)
        valid = tl.max_constancy((at < end)[:, None] & there[None, :], [1, VEC])
        pointers = x + at[:, None] * neurons + neuron[None, :]
        pointers = tl.max_contiguous(tl.multiple_of(pointers, [1, ALIGN]), [1, VEC])
        value = tl.load(pointers, mask=valid, other=0.0).to(tl.float32)
        value = tl.where(valid, value - shift[None, :], 0.0)
        total += value
        square += value * value
    parts = tl.num_programs(1).to(tl.int64)
    tl.store(sums + part * neurons + neuron, shift, mask=there)
    tl.store(sums + (parts + part) * neurons + neuron, tl.sum(total, 0), mask=there)
    tl.store(sums + (2 * parts + part) * neurons + neuron, tl.sum(square, 0), mask=there)


@triton.jit(do_not_specialize=["samples", "neurons", "positions", "per_part"])
def gradient_sums_rows_kernel(
    x, kept, saved, dy, dpooled, dresidual, sums,
    samples: tl.int64, neurons: tl.int64, positions: tl.int64, per_part: tl.int64,
    SAMPLES: tl.constexpr, NEURONS: tl.constexpr, WIDTH: tl.constexpr, VEC: tl.constexpr, ALIGN: tl.constexpr,
    HAS_DY: tl.constexpr, HAS_DPOOLED: tl.constexpr, RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """NEURONS neurons over `per_part` samples; with a residual, its gradient g is written."""
    part = tl.program_id(1).to(tl.int64)
    neuron = tl.program_id(0).to(tl.int64) * NEURONS + tl.arange(0, NEURONS)
    first = part * per_part
    there = neuron < neurons
    mean, scale, bias = normalising(saved, neuron, neurons, there)
    mean, scale, bias = mean[None, :, None], scale[None, :, None], bias[None, :, None]
    total = tl.zeros([SAMPLES, NEURONS, WIDTH], tl.float32)
    product = tl.zeros([SAMPLES, NEURONS, WIDTH], tl.float32)
    for start in range(first, tl.minimum(first + per_part, samples), SAMPLES):
        sample = start + tl.arange(0, SAMPLES)
        row = sample[:, None] * neurons + neuron[None, :]
        row_inside = (sample < samples)[:, None] & there[None, :]
        share = tl.zeros([SAMPLES, NEURONS], tl.float32)
        if HAS_DPOOLED:
            share = tl.load(dpooled + row, mask=row_inside, other=0.0) / positions
        for begin in range(0, positions, WIDTH):
            at = begin + tl.arange(0, WIDTH)
            offsets = row[:, :, None] * positions + at[None, None, :]
            valid = tl.max_constancy(row_inside[:, :, None] & (at < positions)[None, None, :], [1, 1, VEC])
            pointers = tl.max_contiguous(tl.multiple_of(x + offsets, [1, 1, ALIGN]), [1, 1, VEC])
            centred = tl.load(pointers, mask=valid, other=0.0).to(tl.float32) - mean
            gradient = tl.broadcast_to(share[:, :, None], [SAMPLES, NEURONS, WIDTH])
            arriving = gradient
            if HAS_DY:
                sources = tl.max_contiguous(tl.multiple_of(dy + offsets, [1, 1, ALIGN]), [1, 1, VEC])
                arriving = tl.load(sources, mask=valid, other=0.0).to(tl.float32)
            beside = centred
            if RESIDUAL:
                sources = tl.max_contiguous(tl.multiple_of(kept + offsets, [1, 1, ALIGN]), [1, 1, VEC])
                beside = tl.load(sources, mask=valid, other=0.0).to(tl.float32)
            gradient = gradient_of(
                centred, scale, bias, beside, gradient, arriving,
                x.dtype.element_ty, RESIDUAL, HAS_DY, HAS_DPOOLED, ACTIVATION,
            )  # fmt: skip
            if RESIDUAL:
                targets = tl.max_contiguous(tl.multiple_of(dresidual + offsets, [1, 1, ALIGN]), [1, 1, VEC])
                tl.store(targets, gradient.to(dresidual.dtype.element_ty), mask=valid)
            gradient = tl.where(valid, gradient, 0.0)
            total += gradient
            product += tl.where(valid, gradient * centred, 0.0)
    parts = tl.num_programs(1).to(tl.int64)
    tl.store(sums + part * neurons + neuron, tl.sum(tl.sum(total, 2), 0), mask=there)
    tl.store(sums + (parts + part) * neurons + neuron, tl.sum(tl.sum(product, 2), 0), mask=there)


@triton.jit(do_not_specialize=["rows", "neurons", "positions", "per_part"])
def gradient_sums_columns_kernel(
    x, kept, saved, dy, dpooled, dresidual, sums,
    rows: tl.int64, neurons: tl.int64, positions: tl.int64, per_part: tl.int64,
    ROWS: tl.constexpr, NEURONS: tl.constexpr, VEC: tl.constexpr, ALIGN: tl.constexpr, LARGE: tl.constexpr,
    HAS_DY: tl.constexpr, HAS_DPOOLED: tl.constexpr, RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """NEURONS neurons over `per_part` rows of the matrix; with a residual, its gradient g is written."""
    part = tl.program_id(1).to(tl.int64)
    neuron = tl.program_id(0).to(tl.int64) * NEURONS + tl.arange(0, NEURONS)
    first = part * per_part
    end = tl.minimum(first + per_part, rows)
    there = neuron < neurons
    mean, scale, bias = normalising(saved, neuron, neurons, there)
    mean, scale, bias = mean[None, :], scale[None, :], bias[None, :]
    total = tl.zeros([ROWS, NEURONS], tl.float32)
    product = tl.zeros([ROWS, NEURONS], tl.float32)
    for start in range(first, end, ROWS):
        at = start + tl.arange(0, ROWS)
        valid = tl.max_constancy((at < end)[:, None] & there[None, :], [1, VEC])
        offsets = at[:, None] * neurons + neuron[None, :]
        pointers = tl.max_contiguous(tl.multiple_of(x + offsets, [1, ALIGN]), [1, VEC])
        centred = tl.load(pointers, mask=valid, other=0.0).to(tl.float32) - mean
        gradient = tl.zeros([ROWS, NEURONS], tl.float32)
        if HAS_DPOOLED:
            sample = sample_of(at, positions, LARGE)
            shares = dpooled + sample[:, None] * neurons + neuron[None, :]
            gradient = tl.load(shares, mask=valid, other=0.0) / positions
        arriving = gradient
        if HAS_DY:
            sources = tl.max_contiguous(tl.multiple_of(dy + offsets, [1, ALIGN]), [1, VEC])
            arriving = tl.load(sources, mask=valid, other=0.0).to(tl.float32)
        beside = centred
        if RESIDUAL:
            sources = tl.max_contiguous(tl.multiple_of(kept + offsets, [1, ALIGN]), [1, VEC])
            beside = tl.load(sources, mask=valid, other=0.0).to(tl.float32)
        gradient = gradient_of(
            centred, scale, bias, beside, gradient, arriving,
            x.dtype.element_ty, RESIDUAL, HAS_DY, HAS_DPOOLED, ACTIVATION,
        )  # fmt: skip
        if RESIDUAL:
            targets = tl.max_contiguous(tl.multiple_of(dresidual + offsets, [1, ALIGN]), [1, VEC])
            tl.store(targets, gradient.to(dresidual.dtype.element_ty), mask=valid)
        gradient = tl.where(valid, gradient, 0.0)
        total += gradient
        product += tl.where(valid, gradient * centred, 0.0)
    parts = tl.num_programs(1).to(tl.int64)
    tl.store(sums + part * neurons + neuron, tl.sum(total, 0), mask=there)
    tl.store(sums + (parts + part) * neurons + neuron, tl.sum(product, 0), mask=there)


@dataclass(frozen=True)
class Sums:
    """Sums of every part, and how many lines a part has."""

    values: Tensor
    parts: Parts


def launch_statistics(x: Tensor, layout: Layout) -> Sums:
    """(3, parts, C) float32 of x, which lies as `layout` says."""
    parts = cut(layout, x.element_size(), STATISTICS_TILES)
    sums = torch.empty((3, parts.count, layout.neurons), dtype=torch.float32, device=x.device)
    vec = min(vector_width(layout, x), parts.neurons if parts.columns else parts.width)
    align = vec * x.element_size()
    samples = layout.rows // layout.neurons
    if parts.columns:
        launch(
            statistics_columns_kernel, parts.grid,
            x, sums, samples * layout.positions, layout.neurons, parts.per_part, parts.lines, parts.neurons, vec, align,
            num_warps=layouts.WARPS,
        )  # fmt: skip
    else:
        launch(
            statistics_rows_kernel, parts.grid,
            x, sums, samples, layout.neurons, layout.positions, parts.per_part,
            parts.lines, parts.neurons, parts.width, vec, align, num_warps=layouts.WARPS,
        )  # fmt: skip
    return Sums(sums, parts)


def launch_gradient_sums(
    x: Tensor, kept: Tensor | None, saved: Tensor, dy: Tensor | None, dpooled: Tensor | None, dresidual: Tensor | None,
    layout: Layout, activation: str,
) -> Sums:  # fmt: skip
    """(2, parts, C) float32; dresidual is written if it is there. Every tensor of x's shape lies as x does."""
    parts = cut(layout, x.element_size(), GRADIENT_TILES)
    sums = torch.empty((2, parts.count, layout.neurons), dtype=torch.float32, device=x.device)
    present = [tensor for tensor in (x, kept, dy, dresidual) if tensor is not None]
    vec = min(vector_width(layout, *present), parts.neurons if parts.columns else parts.width)
    align = vec * x.element_size()
    samples = layout.rows // layout.neurons
    tensors = (
        x,
        x if kept is None else kept,
        saved,
        x if dy is None else dy,
        saved if dpooled is None else dpooled,
        x if dresidual is None else dresidual,
        sums,
    )  # an absent one is never touched
    have = (dy is not None, dpooled is not None, kept is not None, activation)
    if parts.columns:
        launch(
            gradient_sums_columns_kernel, parts.grid,
            *tensors, samples * layout.positions, layout.neurons, layout.positions, parts.per_part,
            parts.lines, parts.neurons, vec, align, samples * layout.positions >= 2**31, *have, num_warps=layouts.WARPS,
        )  # fmt: skip
    else:
        launch(
            gradient_sums_rows_kernel, parts.grid,
            *tensors, samples, layout.neurons, layout.positions, parts.per_part,
            parts.lines, parts.neurons, parts.width, vec, align, *have, num_warps=layouts.WARPS,
        )  # fmt: skip
    return Sums(sums, parts)
