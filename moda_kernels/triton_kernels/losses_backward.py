"""Gradient of the three modular losses with respect to the pooled rows of all layers, in one launch.

With upstream gradients u_a, u_d, u_c of affinity, dispersion and compactness, read on the device and times weights:

    g_i     = -u_a / (L P_same) (s_k - n_i)  +  u_d / (L P_diff) (s - s_k)
    dL/da_i = ( g_i - (g_i . n_i) n_i ) / |a_i|  +  u_c / (L N C) sign(a_i)

g_i . n_i comes from the terms that forward kept (pair_terms.py), so nothing is reduced here. A kind of pair that does
not occur has coefficient 0; an all-zero row gets 0; a row with 0 < |a_i| < 1e-12 gets g_i * 1e12 (its norm is
floored, so there is no projection).

The gradient of a layer whose mean over positions is spread over them (grouped.py) is divided by their number.

Shapes: gradient (N, C) per layer; layers with address 0 in the table are left out. Dtypes: float32, s - s_k in float64.
Determinism: each element written once; no atomics.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from moda_kernels.closed_form import Weights
from moda_kernels.segments import Segments
from moda_kernels.triton_kernels.launching import launch
from moda_kernels.triton_kernels.pair_terms import but
from moda_kernels.triton_kernels.rows import (
    BLOCK,
    NEURONS,
    Tiling,
    load_rows,
    members,
    per_neuron,
    per_sample,
    segment_bounds,
    store_rows,
)
from moda_kernels.triton_kernels.segment_sums import in_parts, segment_sum, total_of
from moda_kernels.triton_kernels.tables import find_layer

# Block and tile and their reasons: rows.py. Twice the warps: rows, gradient and sums in float64 are in registers at
# once; with four warps a thread would need up to 252 registers of the 255 there are, with eight it needs up to 196.
WARPS = 8
W = tl.constexpr(WARPS)


@triton.jit
def _times(upstream, weight):
    """The upstream gradient times its weight; 0 for weight 0, whatever lies there."""
    return tl.where(weight == 0.0, 0.0, tl.load(upstream) * weight)


@triton.jit
def _per_pair(upstream, weight, pairs, layers):
    """The weighted upstream gradient over L P; 0 without a pair."""
    count = tl.load(pairs)
    return tl.where(count > 0, _times(upstream, weight) / (1.0 * layers * tl.maximum(count, 1)), 0.0)


@triton.jit
def _terms_of_layer(terms, first_tile, tiles, position, inside, samples):
    """Sum of a term over a layer's tiles, (BLOCK,), four tiles at a time."""
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, tiles, 4):
        for tile in tl.static_range(4):
            there = inside & (start + tile < tiles)
            total += tl.load(terms + (first_tile + start + tile) * samples + position, mask=there, other=0.0)
    return total


# Scalars lie anywhere; a variant for each of their alignments would be compiled for nothing.
_ANY_ALIGNMENT = ["upstream_affinity", "upstream_dispersion", "upstream_compactness"]


@triton.jit(do_not_specialize=["layers", "samples", "width"], do_not_specialize_on_alignment=_ANY_ALIGNMENT)
def losses_backward_kernel(
    table, inverse, order, offsets, segment, sums, terms,
    same_pairs, diff_pairs, upstream_affinity, upstream_dispersion, upstream_compactness,
    weight_affinity: tl.float32, weight_dispersion: tl.float32, weight_compactness: tl.float32,
    layers: tl.int64, samples: tl.int64, width: tl.int64, IN_PARTS: tl.constexpr,
):  # fmt: skip
    """One block of 32 samples x one tile of 128 neurons."""
    block = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1).to(tl.int64)
    layer = find_layer(table, layers, tile)
    address = tl.load(table + 4 * layers + layer)
    if address == 0:
        return
    target = address.to(tl.pointer_type(tl.float32))
    rows = tl.load(table + layers + layer).to(tl.pointer_type(tl.float32))
    neurons = tl.load(table + 2 * layers + layer)
    aligned = tl.load(table + 3 * layers + layer)
    first_tile = tl.load(table + layer)
    neuron = (tile - first_tile) * NEURONS + tl.arange(0, NEURONS)
    column = tile * NEURONS + tl.arange(0, NEURONS)

    position = block * BLOCK + tl.arange(0, BLOCK)
    inside = position < samples
    sample = tl.load(order + position, mask=inside, other=0)
    first, last, _, _ = segment_bounds(order, offsets, segment, block, samples)

    of_same = -_per_pair(upstream_affinity, weight_affinity, same_pairs, layers)
    of_different = _per_pair(upstream_dispersion, weight_dispersion, diff_pairs, layers)
    of_magnitude = _times(upstream_compactness, weight_compactness) / (1.0 * layers * samples * neurons)
    different = terms + (width // NEURONS) * samples
    tiles = tl.cdiv(neurons, NEURONS)
    projection = of_same * _terms_of_layer(terms, first_tile, tiles, position, inside, samples)
    projection += of_different * _terms_of_layer(different, first_tile, tiles, position, inside, samples)

    scale = per_sample(tl.load(inverse + layer * samples + sample, mask=inside, other=0.0), W)
    values = load_rows(rows, sample, inside, neurons, neuron, aligned, W)
    sign = (values > 0).to(tl.float32) - (values < 0).to(tl.float32)
    values *= scale
    blocks = tl.cdiv(samples, BLOCK)
    everything = total_of(sums, blocks, width, column, IN_PARTS)
    gradient = of_same * values + of_different * but(everything, values, W)  # of a sample alone in its segment
    for index in range(first, last + 1):
        start = tl.load(offsets + index)
        end = tl.load(offsets + index + 1)
        if end - start > 1:
            member = members(position, start, end, W)
            of_class = segment_sum(values, member, start, end, sums, block, blocks, width, column, IN_PARTS)
            pull = of_same * of_class.to(tl.float32) + of_different * (everything - of_class).to(tl.float32)
            gradient = tl.where(member, per_neuron(pull, W), gradient)
    gradient -= of_same * values
    floored = scale >= 1e12
    gradient -= tl.where(floored, 0.0, per_sample(projection, W)) * values
    gradient = gradient * scale + of_magnitude * sign
    gradient /= tl.load(table + 5 * layers + layer).to(tl.float32)
    store_rows(target, sample, inside, neurons, neuron, aligned, gradient, W)


def launch_losses_backward(
    tiling: Tiling,
    table: Tensor,
    segments: Segments,
    saved: tuple[Tensor, Tensor, Tensor],
    upstream: tuple[Tensor, Tensor, Tensor],
    weights: Weights,
) -> None:
    """Write the gradients to the addresses in `table`; `saved` is (inverse, sums, terms).

    The upstream gradients are times weights; where a weight is 0 the tensor is not looked at.
    """
    inverse, sums, terms = saved
    launch(
        losses_backward_kernel, (tiling.blocks, tiling.tiles),
        table, inverse, segments.order, segments.offsets, segments.segment, sums, terms,
        segments.same_pairs, segments.diff_pairs, *upstream, *weights,
        len(tiling.neurons), tiling.samples, tiling.width, in_parts(tiling.samples), num_warps=WARPS,
    )  # fmt: skip
