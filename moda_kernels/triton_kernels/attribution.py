"""Attributions of the neurons of one layer for every sample, from one read of the activation and its gradient.

    rows[n, c] = |sum over positions s of x[n, c, s] * g[n, c, s]|

Shapes: (N, C) or (N, C, *spatial), contiguous, channels_last or anything `layouts.arrange` copies; g like x; rows
(N, C).
Dtypes: float16, bfloat16, float32; products, sums and rows in float32.
Determinism: every sum runs in an order fixed by shape and layout; no atomics.

A launch a layer, because gradients come one after the other and each is forgotten when its layer is done. A long
channels_last map is split over programs, and a second small launch adds the signed parts before it takes the magnitude.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from moda_kernels.plain import is_traced
from moda_kernels.tally import Tally
from moda_kernels.triton_kernels import layouts
from moda_kernels.triton_kernels.launching import launch
from moda_kernels.triton_kernels.layouts import Layout, arrange, sum_of_lines
from moda_kernels.triton_kernels.relu_pool_forward import PARTS_BLOCK, vector_width
from moda_kernels.triton_kernels.segment_sums import class_sums
from moda_kernels.triton_kernels.tables import on_device_of


@triton.jit
def _products(x, g, offsets, inside, ALIGN: tl.constexpr, GROUP: tl.constexpr):
    """The products x * g at `offsets`, in float32; ALIGN bytes and GROUP elements describe the accesses."""
    values = tl.max_contiguous(tl.multiple_of(x + offsets, ALIGN), GROUP)
    gradients = tl.max_contiguous(tl.multiple_of(g + offsets, ALIGN), GROUP)
    value = tl.load(values, mask=inside, other=0.0).to(tl.float32)
    return value * tl.load(gradients, mask=inside, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["rows", "positions"])
def attribution_rows_kernel(
    x, g, out, rows: tl.int64, positions: tl.int64, ROWS: tl.constexpr, WIDTH: tl.constexpr, VEC: tl.constexpr
):
    """2048 elements: ROWS rows of one (sample, neuron) each, walked to their end."""
    ALIGN: tl.constexpr = VEC * (x.dtype.element_ty.primitive_bitwidth // 8)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    for start in range(0, positions, WIDTH):
        position = start + tl.arange(0, WIDTH)
        offsets = row[:, None] * positions + position[None, :]
        inside = tl.max_constancy((row < rows)[:, None] & (position < positions)[None, :], [1, VEC])
        total += _products(x, g, offsets, inside, [1, ALIGN], [1, VEC])
    tl.store(out + row, tl.abs(tl.sum(total, 1)), mask=row < rows)


@triton.jit(do_not_specialize=["rows"])
def attribution_flat_kernel(x, g, out, rows: tl.int64, TILE: tl.constexpr, VEC: tl.constexpr):
    """TILE elements, one position each."""
    ALIGN: tl.constexpr = VEC * (x.dtype.element_ty.primitive_bitwidth // 8)
    index = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = tl.max_constancy(index < rows, VEC)
    product = _products(x, g, index, inside, ALIGN, VEC)
    targets = tl.max_contiguous(tl.multiple_of(out + index, ALIGN), VEC)
    tl.store(targets, tl.abs(product), mask=inside)


@triton.jit(do_not_specialize=["rows", "neurons", "positions", "splits"])
def attribution_columns_kernel(
    x, g, parts, rows: tl.int64, neurons: tl.int64, positions: tl.int64, splits: tl.int64,
    SPAN: tl.constexpr, POSITIONS: tl.constexpr, NEURONS: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """32 neurons of one sample over SPAN positions; the sum of a part keeps its sign."""
    ALIGN: tl.constexpr = VEC * (x.dtype.element_ty.primitive_bitwidth // 8)
    tile = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(neurons, NEURONS)
    neuron = (tile % blocks) * NEURONS + tl.arange(0, NEURONS)
    split = (tile // blocks) % splits
    sample = tile // (blocks * splits)
    total = tl.zeros([POSITIONS, NEURONS], tl.float32)
    for start in range(split * SPAN, tl.minimum(split * SPAN + SPAN, positions), POSITIONS):
        position = start + tl.arange(0, POSITIONS)
        offsets = (sample * positions + position)[:, None] * neurons + neuron[None, :]
        inside = tl.max_constancy((position < positions)[:, None] & (neuron < neurons)[None, :], [1, VEC])
        total += _products(x, g, offsets, inside, [1, ALIGN], [1, VEC])
    part = sum_of_lines(tl.reshape(total, [1, POSITIONS, NEURONS]), VEC)
    part = tl.reshape(part, [NEURONS])
    part = tl.where(splits == 1, tl.abs(part), part)
    tl.store(parts + split * rows + sample * neurons + neuron, part, mask=neuron < neurons)


# Where a part begins is known at run time; a thread that wrote vectors of `out` would read numbers that lie apart.
@triton.jit(do_not_specialize=["rows", "splits"], do_not_specialize_on_alignment=["parts", "out"])
def add_attribution_parts_kernel(parts, out, rows: tl.int64, splits: tl.int64, BLOCK: tl.constexpr):
    """The magnitude of the sum over splits, split after split."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for split in range(0, splits):
        total += tl.load(parts + split * rows + index, mask=index < rows, other=0.0)
    tl.store(out + index, tl.abs(total), mask=index < rows)


# Tiles and their reasons: layouts.py; parts: relu_pool_forward.py.


def launch_attribution(x: Tensor, g: Tensor, layout: Layout) -> Tensor:
    """The rows (N, C) of an arranged activation; g lies as x does."""
    rows = torch.empty(x.shape[:2], dtype=torch.float32, device=x.device)
    vec = vector_width(layout, x, g)
    grid = (layout.programs,)
    with on_device_of(x):
        if layout.mode == layouts.FLAT:
            launch(attribution_flat_kernel, grid, x, g, rows, layout.rows, layouts.TILE, vec, num_warps=layouts.WARPS)
        elif layout.mode == layouts.COLUMNS:
            _launch_columns(x, g, rows, layout, vec)
        else:
            width = layouts.ROW_WIDTHS[layout.mode - layouts.ROWS]
            launch(
                attribution_rows_kernel, grid,
                x, g, rows, layout.rows, layout.positions, layouts.TILE // width, width, min(vec, width),
                num_warps=layouts.WARPS,
            )  # fmt: skip
    return rows


def _launch_columns(x: Tensor, g: Tensor, rows: Tensor, layout: Layout, vec: int) -> None:
    split = layout.splits > 1
    parts = torch.empty(layout.splits * layout.rows, dtype=torch.float32, device=x.device) if split else rows
    launch(
        attribution_columns_kernel, (layout.programs,),
        x, g, parts, layout.rows, layout.neurons, layout.positions, layout.splits,
        layouts.SPAN, layouts.COLUMN_POSITIONS, layouts.COLUMN_NEURONS, vec, num_warps=layouts.WARPS,
    )  # fmt: skip
    if split:
        grid = (-(-layout.rows // PARTS_BLOCK),)
        launch(
            add_attribution_parts_kernel, grid,
            parts, rows, layout.rows, layout.splits, PARTS_BLOCK, num_warps=layouts.WARPS,
        )  # fmt: skip


@torch.library.custom_op(
    "moda_kernels::attributions", mutates_args=(), schema="(Tensor activation, Tensor gradient) -> Tensor"
)
def attributions_op(activation: Tensor, gradient: Tensor) -> Tensor:
    """The attributions (N, C) of one layer; the gradient may lie otherwise than the activation."""
    return attributions(activation, gradient)


@attributions_op.register_fake
def _(activation: Tensor, gradient: Tensor) -> Tensor:
    return activation.new_empty(activation.shape[:2], dtype=torch.float32)


def attributions(activation: Tensor, gradient: Tensor) -> Tensor:
    """The attributions (N, C) of one layer, float32."""
    x, layout = arrange(activation)
    g = gradient if gradient.stride() == x.stride() else torch.empty_like(x).copy_(gradient)
    return launch_attribution(x, g, layout)


@torch.no_grad()
def add_attributions(activations: Sequence[Tensor], gradients: Sequence[Tensor], labels: Tensor, tally: Tally) -> None:
    """Contract of `moda_kernels.backends.Backend.add_attributions`, in float32."""
    classes = tally.class_sizes.shape[0]
    rows_of = torch.ops.moda_kernels.attributions if is_traced() else attributions
    rows = [rows_of(x.detach(), g.detach()) for x, g in zip(activations, gradients, strict=True)]
    for total, batch in zip(tally.sums, class_sums(rows, labels, classes, normalize=False), strict=True):
        total += batch
    valid = (labels >= 0) & (labels < classes)
    tally.class_sizes.index_add_(0, torch.where(valid, labels, 0).long(), valid.long())
    tally.invalid.add_((~valid).sum())
