"""Class sums of all layers, in one launch or two.

    n_i = a_i / max(|a_i|, 1e-12)          s_k = sum of n_i over segment k          s = sum of all n_i

The first launch sums each block of 32 samples (rows.py): all of it, the part of its first segment and the part of its
last one. Whoever wants the total s, or s_k of a segment that crosses a block boundary, adds up the parts of a few
blocks; of more than 16, a second launch adds them: the total, and each such segment in the slot of the block it starts
in. Segments inside one block need no memory: who wants their sum has their rows at hand.

The same kernels give the (K, C) sums per class of `class_sums`; without normalisation they are sums of activations,
which over the class sizes are the per-class means.

Shapes: rows (N, C) per layer; sums (3, blocks, width) in parts or (1 + blocks, width) added up, all layers side by
side, each rounded up to whole tiles of 128 (zeros beyond C).
Dtypes: rows and (K, C) results float32, block sums float64: s - s_k is the sum of the other classes, which float32
would lose where one class is nearly the whole batch.
Determinism: blocks are cut by position, parts are added in the order of blocks; no atomics.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from moda_kernels.triton_kernels.launching import launch
from moda_kernels.triton_kernels.preparation import Preparation, launch_preparation
from moda_kernels.triton_kernels.rows import (
    BLOCK,
    BLOCK_SAMPLES,
    NEURONS,
    WARPS,
    Tiling,
    load_rows,
    members,
    per_sample,
    segment_bounds,
    sum_of_samples,
)
from moda_kernels.triton_kernels.tables import find_layer, on_device_of

W = tl.constexpr(WARPS)


@triton.jit
def _store_class(target, neurons, neuron, labels, order, offsets, segment_index, classes, values):
    """target[label of the segment] = values, for a label in [0, classes)."""
    label = tl.load(labels + tl.load(order + tl.load(offsets + segment_index)))
    known = (label >= 0) & (label < classes)
    tl.store(target + label * neurons + neuron, values, mask=known & (neuron < neurons))


@triton.jit(do_not_specialize=["layers", "samples", "width", "classes"])
def block_sums_kernel(
    table, inverse, order, offsets, segment, labels, parts,
    layers: tl.int64, samples: tl.int64, width: tl.int64, classes: tl.int64,
    PER_CLASS: tl.constexpr, NORMALIZE: tl.constexpr,
):  # fmt: skip
    """One block of 32 samples x one tile of 128 neurons."""
    block = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1).to(tl.int64)
    layer = find_layer(table, layers, tile)
    rows = tl.load(table + layers + layer).to(tl.pointer_type(tl.float32))
    neurons = tl.load(table + 2 * layers + layer)
    aligned = tl.load(table + 3 * layers + layer)
    neuron = (tile - tl.load(table + layer)) * NEURONS + tl.arange(0, NEURONS)

    position = block * BLOCK + tl.arange(0, BLOCK)
    inside = position < samples
    sample = tl.load(order + position, mask=inside, other=0)
    first, last, first_crosses, last_crosses = segment_bounds(order, offsets, segment, block, samples)

    values = load_rows(rows, sample, inside, neurons, neuron, aligned, W)
    if NORMALIZE:
        values *= per_sample(tl.load(inverse + layer * samples + sample, mask=inside, other=0.0), W)
    target = parts + block * width + tile * NEURONS + tl.arange(0, NEURONS)
    apart = tl.num_programs(0) * width
    exact = values.to(tl.float64)
    tl.store(target, sum_of_samples(exact))
    of_first = members(position, 0, tl.load(offsets + first + 1), W)
    of_last = members(position, tl.load(offsets + last), samples, W)
    tl.store(target + apart, sum_of_samples(tl.where(of_first, exact, 0.0)))
    tl.store(target + 2 * apart, sum_of_samples(tl.where(of_last, exact, 0.0)))

    if PER_CLASS:
        out = tl.load(table + 4 * layers + layer).to(tl.pointer_type(tl.float32))
        for index in range(first + first_crosses.to(tl.int64), last + 1 - last_crosses.to(tl.int64)):
            member = members(position, tl.load(offsets + index), tl.load(offsets + index + 1), W)
            total = sum_of_samples(tl.where(member, values, 0.0))
            _store_class(out, neurons, neuron, labels, order, offsets, index, classes, total)


@triton.jit
def _add_blocks(parts, first, last, column, width):
    """parts[first] + ... + parts[last - 1] in `column`, 32 blocks at a time."""
    total = tl.zeros([BLOCK, NEURONS], tl.float64)
    for start in range(first, last, BLOCK):
        block = start + tl.arange(0, BLOCK)
        pointers = parts + block[:, None] * width + column[None, :]
        total += tl.load(pointers, mask=(block < last)[:, None], other=0.0)
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=["layers", "samples", "width", "classes"])
def combine_kernel(
    table, order, offsets, segment, labels, parts, sums,
    layers: tl.int64, samples: tl.int64, width: tl.int64, classes: tl.int64,
    PER_CLASS: tl.constexpr,
):  # fmt: skip
    """Program 0 of a tile: the total. Program 1 + b: the segment that starts in block b and leaves it, or 0."""
    tile = tl.program_id(1).to(tl.int64)
    column = tile * NEURONS + tl.arange(0, NEURONS)
    blocks = tl.cdiv(samples, BLOCK)
    if tl.program_id(0) == 0:
        tl.store(sums + column, _add_blocks(parts, 0, blocks, column, width))
    else:
        block = tl.program_id(0).to(tl.int64) - 1
        _, last, _, crosses = segment_bounds(order, offsets, segment, block, samples)
        values = tl.zeros([NEURONS], tl.float64)
        if crosses & (tl.load(offsets + last) >= block * BLOCK):
            end = tl.cdiv(tl.load(offsets + last + 1), BLOCK)
            values = tl.load(parts + (2 * blocks + block) * width + column)
            values += _add_blocks(parts + blocks * width, block + 1, end, column, width)
            if PER_CLASS:
                layer = find_layer(table, layers, tile)
                out = tl.load(table + 4 * layers + layer).to(tl.pointer_type(tl.float32))
                neurons = tl.load(table + 2 * layers + layer)
                neuron = (tile - tl.load(table + layer)) * NEURONS + tl.arange(0, NEURONS)
                rounded = values.to(tl.float32)
                _store_class(out, neurons, neuron, labels, order, offsets, last, classes, rounded)
        tl.store(sums + (1 + block) * width + column, values)


@triton.jit
def _add_few(parts, first, last, column, width):
    """parts[first] + ... + parts[last - 1] in `column`, four blocks at a time."""
    total = tl.zeros([NEURONS], tl.float64)
    for start in range(first, last, 4):
        for block in tl.static_range(4):
            there = start + block < last
            total += tl.load(parts + (start + block) * width + column, mask=there, other=0.0)
    return total


@triton.jit
def total_of(sums, blocks, width, column, IN_PARTS: tl.constexpr):
    """The sum of all rows in `column`, float64."""
    return _add_few(sums, 0, blocks, column, width) if IN_PARTS else tl.load(sums + column)


@triton.jit
def _crossing_sum(sums, first, end, blocks, width, column, IN_PARTS: tl.constexpr):
    """The sum of a segment that starts in block `first` and goes on to the one before `end`."""
    if IN_PARTS:
        total = tl.load(sums + (2 * blocks + first) * width + column)
        total += _add_few(sums + blocks * width, first + 1, end, column, width)
    else:
        total = tl.load(sums + (1 + first) * width + column)
    return total


@triton.jit
def segment_sum(values, member, start, end, sums, block, blocks, width, column, IN_PARTS: tl.constexpr):
    """s_k of segment [start, end) in `column`, float64: from memory if it crosses a block boundary, else added up."""
    if (start < block * BLOCK) | (end > block * BLOCK + BLOCK):
        total = _crossing_sum(sums, start // BLOCK, tl.cdiv(end, BLOCK), blocks, width, column, IN_PARTS)
    else:
        total = sum_of_samples(tl.where(member, values, 0.0)).to(tl.float64)
    return total


# Block, tile and warps and their reasons: rows.py. Parts of up to 16 blocks, 512 samples, are added up by those who
# read them; of more, who read them all would take longer than a launch.
MOST_PARTS = 16


def in_parts(samples: int) -> bool:
    """Whether whoever reads the sums has to add up the parts of blocks."""
    return samples <= MOST_PARTS * BLOCK_SAMPLES


@dataclass(frozen=True)
class Labelling:
    """The label of each sample (int64) and the number of classes, where sums per class are wanted."""

    labels: Tensor
    classes: int
    normalize: bool


def sums_shape(samples: int, width: int) -> tuple[int, ...]:
    """The shape of what `launch_class_sums` gives."""
    blocks = -(-samples // BLOCK_SAMPLES)
    return (3, blocks, width) if in_parts(samples) else (1 + blocks, width)


def launch_class_sums(
    tiling: Tiling, table: Tensor, prepared: Preparation, labelling: Labelling | None = None
) -> Tensor:
    """The sums, float64: of blocks in parts, or the total and the segments that cross a block boundary.

    With a labelling the sums of all segments go to the addresses in `table` as well.
    """
    parts = torch.empty(3, tiling.blocks, tiling.width, dtype=torch.float64, device=table.device)
    segments, inverse, _ = prepared
    labels = segments.order if labelling is None else labelling.labels
    sizes = (len(tiling.neurons), tiling.samples, tiling.width, 0 if labelling is None else labelling.classes)
    where = (segments.order, segments.offsets, segments.segment, labels)
    normalize = labelling is None or labelling.normalize
    launch(
        block_sums_kernel, (tiling.blocks, tiling.tiles),
        table, inverse, *where, parts, *sizes, labelling is not None, normalize, num_warps=WARPS,
    )  # fmt: skip
    if labelling is None and in_parts(tiling.samples):
        return parts
    sums = torch.empty(1 + tiling.blocks, tiling.width, dtype=torch.float64, device=table.device)
    launch(
        combine_kernel, (1 + tiling.blocks, tiling.tiles),
        table, *where, parts, sums, *sizes, labelling is not None, num_warps=WARPS,
    )  # fmt: skip
    return sums


def class_sums(pooled: Sequence[Tensor], labels: Tensor, num_classes: int, *, normalize: bool = True) -> list[Tensor]:
    """Per layer the (K, C) float32 sum over each class's samples of the rows, L2-normalised unless told otherwise."""
    layers = [layer.detach().float().contiguous() for layer in pooled]
    samples, device = labels.shape[0], labels.device
    neurons = tuple(layer.shape[1] for layer in layers)
    tiling = Tiling(samples, neurons)
    sums = [torch.zeros(num_classes, width, dtype=torch.float32, device=device) for width in neurons]
    with on_device_of(labels):
        addresses, targets = ([tensor.data_ptr() for tensor in given] for given in (layers, sums))
        table = tiling.table(addresses, device, targets)
        prepared = launch_preparation(tiling, table, labels, norms=normalize)
        labelling = Labelling(labels.long().contiguous(), num_classes, normalize)
        launch_class_sums(tiling, table, prepared, labelling)
    return sums
