"""The numbers per neuron of a batch norm from sums in parts, and the passes that use them (norm.py).

    numbers      mean, 1 / sqrt(var + eps), scale, bias: from the batch's sums, or from running statistics; running
                 statistics move towards the batch's
    apply        y = activation((x - mean) * scale + bias [+ residual]) and its pooled activation
    join         gradients of weight and bias, and the two means that dx takes: from the sums of g and g * (x - mean)
    gradient     dx = scale * (g - mean of g - (x - mean) * 1 / (var + eps) * mean of g * (x - mean))

Parts are joined in float64. Tiles are those of relu_pool_forward.py, whose kernel does the second channels_last.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moda_kernels.batch_norm import BatchNorm
from moda_kernels.triton_kernels import layouts
from moda_kernels.triton_kernels.activation import activated, gradient_of, magnitude
from moda_kernels.triton_kernels.launching import launch
from moda_kernels.triton_kernels.layouts import Layout, mean_of, sample_of, unit_of
from moda_kernels.triton_kernels.norm_sums import Sums
from moda_kernels.triton_kernels.relu_pool_forward import COLUMNS_TILE, launch_columns, normalising, vector_width

JOINED_NEURONS = 8  # a program's; few, so that many programs share the work of joining
JOINED_PARTS = 64  # at a time
GRADIENT_ROWS_TILE = 1024


@triton.jit(do_not_specialize=["neurons", "parts", "lines", "per_part", "positions"])
def numbers_kernel(
    sums, weight, bias, running_mean, running_var, saved,
    neurons: tl.int64, parts: tl.int64, lines: tl.int64, per_part: tl.int64, positions: tl.int64, momentum, eps,
    NEURONS: tl.constexpr, PARTS: tl.constexpr,
    TRAINING: tl.constexpr, RUNNING: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """NEURONS neurons; `lines` lines of `positions` values were summed in parts of `per_part` lines."""
    neuron = tl.program_id(0).to(tl.int64) * NEURONS + tl.arange(0, NEURONS)
    there = neuron < neurons
    if TRAINING:
        count = (lines * positions).to(tl.float64)
        total = tl.zeros([PARTS, NEURONS], tl.float64)
        for start in range(0, parts, PARTS):
            part = start + tl.arange(0, PARTS)
            inside = (part < parts)[:, None] & there[None, :]
            offsets = part[:, None] * neurons + neuron[None, :]
            values = tl.minimum(per_part, lines - part * per_part) * positions
            shift = tl.load(sums + offsets, mask=inside, other=0.0).to(tl.float64)
            first = tl.load(sums + parts * neurons + offsets, mask=inside, other=0.0).to(tl.float64)
            total += tl.where(inside, values[:, None].to(tl.float64) * shift + first, 0.0)
        mean = tl.sum(total, 0) / count
        total = tl.zeros([PARTS, NEURONS], tl.float64)
        for start in range(0, parts, PARTS):
            part = start + tl.arange(0, PARTS)
            inside = (part < parts)[:, None] & there[None, :]
            offsets = part[:, None] * neurons + neuron[None, :]
            values = tl.minimum(per_part, lines - part * per_part) * positions
            away = mean[None, :] - tl.load(sums + offsets, mask=inside, other=0.0).to(tl.float64)
            first = tl.load(sums + parts * neurons + offsets, mask=inside, other=0.0).to(tl.float64)
            second = tl.load(sums + 2 * parts * neurons + offsets, mask=inside, other=0.0).to(tl.float64)
            deviations = second - 2 * away * first + values[:, None].to(tl.float64) * away * away
            total += tl.where(inside, deviations, 0.0)
        deviations = tl.sum(total, 0)
        variance = tl.where(deviations < 0, 0.0, deviations) / count
        if RUNNING:
            kept = tl.load(running_mean + neuron, mask=there, other=0.0).to(tl.float32).to(tl.float64)
            moved = (1 - momentum) * kept + momentum * mean
            tl.store(running_mean + neuron, moved.to(tl.float32).to(running_mean.dtype.element_ty), mask=there)
            kept = tl.load(running_var + neuron, mask=there, other=0.0).to(tl.float32).to(tl.float64)
            moved = (1 - momentum) * kept + momentum * (variance * (count / (count - 1)))
            tl.store(running_var + neuron, moved.to(tl.float32).to(running_var.dtype.element_ty), mask=there)
    else:
        mean = tl.load(running_mean + neuron, mask=there, other=0.0).to(tl.float32).to(tl.float64)
        variance = tl.load(running_var + neuron, mask=there, other=1.0).to(tl.float32).to(tl.float64)
    inverse = 1 / tl.sqrt(variance + eps)
    scale = inverse
    if WEIGHT:
        scale = inverse * tl.load(weight + neuron, mask=there, other=0.0).to(tl.float32).to(tl.float64)
    added = tl.zeros([NEURONS], tl.float32)
    if BIAS:
        added = tl.load(bias + neuron, mask=there, other=0.0).to(tl.float32)
    tl.store(saved + neuron, mean.to(tl.float32), mask=there)
    tl.store(saved + neurons + neuron, inverse.to(tl.float32), mask=there)
    tl.store(saved + 2 * neurons + neuron, scale.to(tl.float32), mask=there)
    tl.store(saved + 3 * neurons + neuron, added, mask=there)


@triton.jit(do_not_specialize=["neurons", "parts", "count"])
def join_kernel(
    sums, saved, parameters, means, neurons: tl.int64, parts: tl.int64, count: tl.int64,
    NEURONS: tl.constexpr, PARTS: tl.constexpr, TRAINING: tl.constexpr,
):  # fmt: skip
    """Gradients of weight and bias, and what dx subtracts: mean of g, and 1 / (var + eps) * mean of g * (x - mean)."""
    neuron = tl.program_id(0).to(tl.int64) * NEURONS + tl.arange(0, NEURONS)
    there = neuron < neurons
    total = tl.zeros([PARTS, NEURONS], tl.float64)
    product = tl.zeros([PARTS, NEURONS], tl.float64)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        inside = (part < parts)[:, None] & there[None, :]
        offsets = part[:, None] * neurons + neuron[None, :]
        total += tl.load(sums + offsets, mask=inside, other=0.0).to(tl.float64)
        product += tl.load(sums + parts * neurons + offsets, mask=inside, other=0.0).to(tl.float64)
    inverse = tl.load(saved + neurons + neuron, mask=there, other=0.0).to(tl.float32).to(tl.float64)
    summed, product = tl.sum(total, 0), tl.sum(product, 0)
    tl.store(parameters + neuron, (product * inverse).to(tl.float32), mask=there)
    tl.store(parameters + neurons + neuron, summed.to(tl.float32), mask=there)
    if TRAINING:
        values = count.to(tl.float64)
        tl.store(means + neuron, (summed / values).to(tl.float32), mask=there)
        tl.store(means + neurons + neuron, (product / values * inverse * inverse).to(tl.float32), mask=there)


@triton.jit(do_not_specialize=["rows", "neurons", "positions"])
def apply_rows_kernel(
    x, residual, y, pooled, saved, rows: tl.int64, neurons: tl.int64, positions: tl.int64,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, VEC: tl.constexpr, ALIGN: tl.constexpr, RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
):  # fmt: skip
    """2048 elements: ROWS rows of one (sample, neuron) each, walked to their end."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = row < rows
    neuron = row % neurons
    mean, scale, bias = normalising(saved, neuron, neurons, there)
    mean, scale, bias = mean[:, None], scale[:, None], bias[:, None]
    unit = unit_of(positions)
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    for start in range(0, positions, WIDTH):
        position = start + tl.arange(0, WIDTH)
        offsets = row[:, None] * positions + position[None, :]
        inside = tl.max_constancy(there[:, None] & (position < positions)[None, :], [1, VEC])
        pointers = tl.max_contiguous(tl.multiple_of(x + offsets, [1, ALIGN]), [1, VEC])
        value = (tl.load(pointers, mask=inside, other=0.0).to(tl.float32) - mean) * scale + bias
        if RESIDUAL:
            sources = tl.max_contiguous(tl.multiple_of(residual + offsets, [1, ALIGN]), [1, VEC])
            value += tl.load(sources, mask=inside, other=0.0).to(tl.float32)
        value = tl.where(inside, activated(value, ACTIVATION), 0.0)
        targets = tl.max_contiguous(tl.multiple_of(y + offsets, [1, ALIGN]), [1, VEC])
        tl.store(targets, value.to(y.dtype.element_ty), mask=inside)
        total += magnitude(value, ACTIVATION) * unit
    tl.store(pooled + row, mean_of(tl.sum(total, 1), positions, unit), mask=there)


@triton.jit(do_not_specialize=["rows", "neurons", "positions"])
def gradient_rows_kernel(
    x, dy, dpooled, saved, means, dx, rows: tl.int64, neurons: tl.int64, positions: tl.int64,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, VEC: tl.constexpr, ALIGN: tl.constexpr,
    HAS_DY: tl.constexpr, HAS_DPOOLED: tl.constexpr, MASKED: tl.constexpr, TRAINING: tl.constexpr,
    ACTIVATION: tl.constexpr,
):  # fmt: skip
    """2048 elements: ROWS rows of one (sample, neuron) each, walked to their end. MASKED: dy is g already."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = row < rows
    neuron = row % neurons
    mean, scale, bias = normalising(saved, neuron, neurons, there)
    mean, scale, bias = mean[:, None], scale[:, None], bias[:, None]
    share = tl.zeros([ROWS], tl.float32)
    if HAS_DPOOLED:
        share = tl.load(dpooled + row, mask=there, other=0.0) / positions
    if TRAINING:
        level = tl.load(means + neuron, mask=there, other=0.0)[:, None]
        slope = tl.load(means + neurons + neuron, mask=there, other=0.0)[:, None]
    for start in range(0, positions, WIDTH):
        position = start + tl.arange(0, WIDTH)
        offsets = row[:, None] * positions + position[None, :]
        inside = tl.max_constancy(there[:, None] & (position < positions)[None, :], [1, VEC])
        pointers = tl.max_contiguous(tl.multiple_of(x + offsets, [1, ALIGN]), [1, VEC])
        centred = tl.load(pointers, mask=inside, other=0.0).to(tl.float32) - mean
        gradient = tl.broadcast_to(share[:, None], [ROWS, WIDTH])
        arriving = gradient
        if HAS_DY:
            sources = tl.max_contiguous(tl.multiple_of(dy + offsets, [1, ALIGN]), [1, VEC])
            arriving = tl.load(sources, mask=inside, other=0.0).to(tl.float32)
        if MASKED:
            gradient += arriving
        else:
            gradient = gradient_of(
                centred, scale, bias, centred, gradient, arriving,
                x.dtype.element_ty, False, HAS_DY, HAS_DPOOLED, ACTIVATION,
            )  # fmt: skip
        if TRAINING:
            gradient = gradient - level - centred * slope
        targets = tl.max_contiguous(tl.multiple_of(dx + offsets, [1, ALIGN]), [1, VEC])
        tl.store(targets, (gradient * scale).to(dx.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["lines", "neurons", "positions", "per_program"])
def gradient_columns_kernel(
    x, dy, dpooled, saved, means, dx, lines: tl.int64, neurons: tl.int64, positions: tl.int64, per_program: tl.int64,
    ROWS: tl.constexpr, NEURONS: tl.constexpr, VEC: tl.constexpr, ALIGN: tl.constexpr, LARGE: tl.constexpr,
    HAS_DY: tl.constexpr, HAS_DPOOLED: tl.constexpr, MASKED: tl.constexpr, TRAINING: tl.constexpr,
    ACTIVATION: tl.constexpr,
):  # fmt: skip
    """NEURONS neurons over `per_program` rows of the matrix (N * S, C). MASKED: dy is g already."""
    neuron = tl.program_id(0).to(tl.int64) * NEURONS + tl.arange(0, NEURONS)
    first = tl.program_id(1).to(tl.int64) * per_program
    end = tl.minimum(first + per_program, lines)
    there = neuron < neurons
    mean, scale, bias = normalising(saved, neuron, neurons, there)
    mean, scale, bias = mean[None, :], scale[None, :], bias[None, :]
    if TRAINING:
        level = tl.load(means + neuron, mask=there, other=0.0)[None, :]
        slope = tl.load(means + neurons + neuron, mask=there, other=0.0)[None, :]
    for start in range(first, end, ROWS):
        at = start + tl.arange(0, ROWS)
        inside = tl.max_constancy((at < end)[:, None] & there[None, :], [1, VEC])
        offsets = at[:, None] * neurons + neuron[None, :]
        pointers = tl.max_contiguous(tl.multiple_of(x + offsets, [1, ALIGN]), [1, VEC])
        centred = tl.load(pointers, mask=inside, other=0.0).to(tl.float32) - mean
        gradient = tl.zeros([ROWS, NEURONS], tl.float32)
        if HAS_DPOOLED:
            sample = sample_of(at, positions, LARGE)
            gradient = (
                tl.load(dpooled + sample[:, None] * neurons + neuron[None, :], mask=inside, other=0.0) / positions
            )
        arriving = gradient
        if HAS_DY:
            sources = tl.max_contiguous(tl.multiple_of(dy + offsets, [1, ALIGN]), [1, VEC])
            arriving = tl.load(sources, mask=inside, other=0.0).to(tl.float32)
        if MASKED:
            gradient += arriving
        else:
            gradient = gradient_of(
                centred, scale, bias, centred, gradient, arriving,
                x.dtype.element_ty, False, HAS_DY, HAS_DPOOLED, ACTIVATION,
            )  # fmt: skip
        if TRAINING:
            gradient = gradient - level - centred * slope
        targets = tl.max_contiguous(tl.multiple_of(dx + offsets, [1, ALIGN]), [1, VEC])
        tl.store(targets, (gradient * scale).to(dx.dtype.element_ty), mask=inside)


def launch_numbers(x: Tensor, layout: Layout, sums: Sums | None, norm: BatchNorm) -> Tensor:
    """(4, C) float32: mean, 1 / sqrt(var + eps), scale, bias; running statistics move if the sums are there."""
    saved = torch.empty((4, layout.neurons), dtype=torch.float32, device=x.device)
    weight, bias, mean, var = (_dense(tensor, saved) for tensor in (norm.weight, norm.bias, *norm[:2]))
    count, lines, per_part, positions = (1, 1, 1, 1) if sums is None else (
        sums.parts.count,
        *((layout.rows // layout.neurons * layout.positions, sums.parts.per_part, 1)
          if sums.parts.columns else (layout.rows // layout.neurons, sums.parts.per_part, layout.positions)),
    )  # fmt: skip
    grid = (-(-layout.neurons // JOINED_NEURONS),)
    launch(
        numbers_kernel, grid,
        saved if sums is None else sums.values, weight, bias, mean, var, saved,
        layout.neurons, count, lines, per_part, positions, float(norm.momentum), float(norm.eps),
        JOINED_NEURONS, JOINED_PARTS, sums is not None,
        norm.running_mean is not None, norm.weight is not None, norm.bias is not None, num_warps=layouts.WARPS,
    )  # fmt: skip
    if sums is not None:
        for given, used in ((norm.running_mean, mean), (norm.running_var, var)):
            if given is not None and given is not used:
                given.copy_(used)
    return saved


def _dense(numbers: Tensor | None, otherwise: Tensor) -> Tensor:
    return otherwise if numbers is None else numbers.contiguous()


def launch_apply(
    x: Tensor, residual: Tensor | None, y: Tensor, saved: Tensor, layout: Layout, activation: str
) -> Tensor:
    """Write y; return pooled (N, C) float32. Every tensor of x's shape lies as x does."""
    if layout.mode == layouts.COLUMNS:
        return launch_columns(x, residual, y, saved, layout, activation)
    pooled = torch.empty(x.shape[:2], dtype=torch.float32, device=x.device)
    width = layouts.ROW_WIDTHS[layout.mode - layouts.ROWS]
    vec = min(vector_width(layout, *(tensor for tensor in (x, residual, y) if tensor is not None)), width)
    launch(
        apply_rows_kernel, (layout.programs,),
        x, x if residual is None else residual, y, pooled, saved, layout.rows, layout.neurons, layout.positions,
        layouts.TILE // width, width, vec, vec * x.element_size(), residual is not None, activation,
        num_warps=layouts.WARPS,
    )  # fmt: skip
    return pooled


def launch_join(x: Tensor, layout: Layout, sums: Sums, saved: Tensor, training: bool) -> tuple[Tensor, Tensor]:
    """Gradients of weight and bias (2, C), and what dx subtracts (2, C), which nothing reads without `training`."""
    parameters, means = torch.empty((2, 2, layout.neurons), dtype=torch.float32, device=x.device).unbind()
    launch(
        join_kernel, (-(-layout.neurons // JOINED_NEURONS),),
        sums.values, saved, parameters, means, layout.neurons, sums.parts.count, x.numel() // layout.neurons,
        JOINED_NEURONS, JOINED_PARTS, training, num_warps=layouts.WARPS,
    )  # fmt: skip
    return parameters, means


def launch_gradient(
    x: Tensor, saved: Tensor, dy: Tensor | None, dpooled: Tensor | None, masked: Tensor | None, means: Tensor,
    layout: Layout, training: bool, activation: str,
) -> Tensor:  # fmt: skip
    """dx, which lies as x does; `masked`, if given, is g, and stands in for dy and dpooled."""
    dx = torch.empty_like(x)
    if masked is not None:
        dy, dpooled, activation = masked, None, "relu"  # g is that of every activation
    vec = vector_width(layout, *(tensor for tensor in (x, dy, dx) if tensor is not None))
    tensors = (x, x if dy is None else dy, saved if dpooled is None else dpooled, saved, means, dx)
    have = (dy is not None, dpooled is not None, masked is not None, training, activation)
    if layout.mode != layouts.COLUMNS:
        width = layouts.ROW_WIDTHS[layout.mode - layouts.ROWS]
        vec, rows = min(vec, width), GRADIENT_ROWS_TILE // width
        launch(
            gradient_rows_kernel, (-(-layout.rows // rows),),
            *tensors, layout.rows, layout.neurons, layout.positions,
            rows, width, vec, vec * x.element_size(), *have, num_warps=layouts.WARPS,
        )  # fmt: skip
        return dx
    tile = layouts.matrix_tile(layout, x.element_size(), COLUMNS_TILE)
    lines = layout.rows // layout.neurons * layout.positions
    blocks = -(-layout.neurons // tile.neurons)
    per_program = max(1, lines * blocks // (tile.lines * 2 * layouts.PROGRAMS)) * tile.lines
    vec = min(vec, tile.neurons)
    launch(
        gradient_columns_kernel, (blocks, -(-lines // per_program)),
        *tensors, lines, layout.neurons, layout.positions, per_program,
        tile.lines, tile.neurons, vec, vec * x.element_size(), lines >= 2**31, *have, num_warps=layouts.WARPS,
    )  # fmt: skip
    return dx
