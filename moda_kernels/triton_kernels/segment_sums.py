"""Class sums of all layers, in two launches.

    n_i = a_i / max(|a_i|, 1e-12)          s_k = sum of n_i over segment k          s = sum of all n_i

The first launch sums each block of 32 samples (rows.py): all of it, the part of its first segment and the part of its
last one. The second adds the blocks: the total s, and s_k of each segment that crosses a block boundary, in the slot
of the block it starts in. Segments inside one block need no memory: who wants their sum has their rows at hand.

The same kernels give the (K, C) sums per class of `class_sums`; without normalisation they are sums of activations,
which over the class sizes are the per-class means.

Shapes: rows (N, C) per layer; sums (blocks, width) and (width,), all layers side by side, each rounded up to whole
tiles of 128 (zeros beyond C).
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

from moda_kernels.segments import Segments
from moda_kernels.triton_kernels.label_segments import segments_of
from moda_kernels.triton_kernels.row_norms import launch_row_norms
from moda_kernels.triton_kernels.rows import (
    BLOCK,
    NEURONS,
    WARPS,
    Rows,
    load_rows,
    segment_bounds,
)
from moda_kernels.triton_kernels.tables import find_layer, on_device_of


@triton.jit
def _store_class(target, neurons, neuron, labels, order, offsets, segment_index, classes, values):
    """target[label of the segment] = values, for a label in [0, classes)."""
    label = tl.load(labels + tl.load(order + tl.load(offsets + segment_index)))
    known = (label >= 0) & (label < classes)
    tl.store(target + label * neurons + neuron, values, mask=known & (neuron < neurons))


@triton.jit(do_not_specialize=["layers", "samples", "width", "classes"])
def block_sums_kernel(
    table, inverse, order, offsets, segment, labels, totals, heads, tails,
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
    of_segment = tl.load(segment + sample, mask=inside, other=-1)
    first, last, first_crosses, last_crosses = segment_bounds(order, offsets, segment, block, samples)

    values = load_rows(rows, sample, inside, neurons, neuron, aligned)
    if NORMALIZE:
        values *= tl.load(inverse + layer * samples + sample, mask=inside, other=0.0)[:, None]
    target = block * width + tile * NEURONS + tl.arange(0, NEURONS)
    exact = values.to(tl.float64)
    tl.store(totals + target, tl.sum(exact, 0))
    tl.store(heads + target, tl.sum(tl.where((of_segment == first)[:, None], exact, 0.0), 0))
    tl.store(tails + target, tl.sum(tl.where((of_segment == last)[:, None], exact, 0.0), 0))

    if PER_CLASS:
        out = tl.load(table + 4 * layers + layer).to(tl.pointer_type(tl.float32))
        for index in range(first + first_crosses.to(tl.int64), last + 1 - last_crosses.to(tl.int64)):
            total = tl.sum(tl.where((of_segment == index)[:, None], values, 0.0), 0)
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
    table, order, offsets, segment, labels, totals, heads, tails, total, crossing,
    layers: tl.int64, samples: tl.int64, width: tl.int64, classes: tl.int64,
    PER_CLASS: tl.constexpr,
):  # fmt: skip
    """Program 0 of a tile: the total. Program 1 + b: the segment that starts in block b and leaves it, or 0."""
    tile = tl.program_id(1).to(tl.int64)
    column = tile * NEURONS + tl.arange(0, NEURONS)
    blocks = tl.cdiv(samples, BLOCK)
    if tl.program_id(0) == 0:
        tl.store(total + column, _add_blocks(totals, 0, blocks, column, width))
    else:
        block = tl.program_id(0).to(tl.int64) - 1
        _, last, _, crosses = segment_bounds(order, offsets, segment, block, samples)
        values = tl.zeros([NEURONS], tl.float64)
        if crosses & (tl.load(offsets + last) >= block * BLOCK):
            end = tl.cdiv(tl.load(offsets + last + 1), BLOCK)
            values = tl.load(tails + block * width + column) + _add_blocks(heads, block + 1, end, column, width)
            if PER_CLASS:
                layer = find_layer(table, layers, tile)
                out = tl.load(table + 4 * layers + layer).to(tl.pointer_type(tl.float32))
                neurons = tl.load(table + 2 * layers + layer)
                neuron = (tile - tl.load(table + layer)) * NEURONS + tl.arange(0, NEURONS)
                rounded = values.to(tl.float32)
                _store_class(out, neurons, neuron, labels, order, offsets, last, classes, rounded)
        tl.store(crossing + block * width + column, values)


# Block, tile and warps and their reasons: rows.py.


@dataclass(frozen=True)
class Labelling:
    """The label of each sample (int64) and the number of classes, where sums per class are wanted."""

    labels: Tensor
    classes: int
    normalize: bool


def launch_class_sums(
    rows: Rows, table: Tensor, inverse: Tensor, segments: Segments, labelling: Labelling | None = None
) -> tuple[Tensor, Tensor]:
    """The total (width,) and the sums of the segments that cross a block boundary (blocks, width), float64.

    With a labelling the sums of all segments go to the addresses in `table` as well.
    """
    parts = torch.empty(3, rows.blocks, rows.width, dtype=torch.float64, device=rows.device)
    totals, heads, tails = parts.unbind()
    total = torch.empty(rows.width, dtype=torch.float64, device=rows.device)
    crossing = torch.empty(rows.blocks, rows.width, dtype=torch.float64, device=rows.device)
    labels = segments.order if labelling is None else labelling.labels
    sizes = (len(rows.neurons), rows.samples, rows.width, 0 if labelling is None else labelling.classes)
    where = (segments.order, segments.offsets, segments.segment, labels)
    normalize = labelling is None or labelling.normalize
    block_sums_kernel[(rows.blocks, rows.tiles)](
        table, inverse, *where, totals, heads, tails, *sizes, labelling is not None, normalize, num_warps=WARPS
    )
    combine_kernel[(1 + rows.blocks, rows.tiles)](
        table, *where, totals, heads, tails, total, crossing, *sizes, labelling is not None, num_warps=WARPS
    )
    return total, crossing


def class_sums(pooled: Sequence[Tensor], labels: Tensor, num_classes: int, *, normalize: bool = True) -> list[Tensor]:
    """Per layer the (K, C) float32 sum over each class's samples of the rows, L2-normalised unless told otherwise."""
    layers = [layer.detach().float().contiguous() for layer in pooled]
    samples, device = labels.shape[0], labels.device
    neurons = tuple(layer.shape[1] for layer in layers)
    rows = Rows(samples, neurons, tuple(layer.data_ptr() for layer in layers), device)
    sums = [torch.zeros(num_classes, width, dtype=torch.float32, device=device) for width in neurons]
    with on_device_of(labels):
        table = rows.table([layer.data_ptr() for layer in sums])
        inverse = torch.empty(len(layers), samples, dtype=torch.float32, device=device)
        if normalize:
            launch_row_norms(rows, table, inverse)
        labelling = Labelling(labels.long().contiguous(), num_classes, normalize)
        launch_class_sums(rows, table, inverse, segments_of(labels), labelling)
    return sums
