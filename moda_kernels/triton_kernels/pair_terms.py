"""The three modular losses from pooled rows and class sums, in one launch.

With s_k the class sum of sample i's segment and s the total (segment_sums.py), per layer

    same_i = n_i . (s_k - n_i)          diff_i = n_i . (s - s_k)

and, over all layers,

    affinity    = 1 - sum_i same_i / (2 L P_same)       0 without a same-class pair
    dispersion  =     sum_i diff_i / (2 L P_diff)       0 without a different-class pair
    compactness =     sum |a| / (L N C)

Written per sample, the sum over pairs of one class has no difference of large numbers: a segment of one sample gives
exactly 0. Every program writes same and diff per sample of its tile of neurons, which backward needs again, and one
partial sum of each kind; the program that is done last adds those of all.

Shapes: same and diff (tiles, N) in the order of segments; losses 0-d. Dtypes: float32; sums of partials in float64.
Determinism: fixed order everywhere, whichever program is the last.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moda_kernels.closed_form import Weights
from moda_kernels.triton_kernels.launching import launch
from moda_kernels.triton_kernels.layouts import LARGEST
from moda_kernels.triton_kernels.preparation import Preparation
from moda_kernels.triton_kernels.rows import (
    BLOCK,
    NEURONS,
    WARPS,
    Tiling,
    load_rows,
    members,
    per_neuron,
    per_sample,
    segment_bounds,
    sum_of_neurons,
    sum_of_samples,
)
from moda_kernels.triton_kernels.segment_sums import in_parts, segment_sum, total_of
from moda_kernels.triton_kernels.tables import find_layer

W = tl.constexpr(WARPS)


@triton.jit
def but(everything, values, W: tl.constexpr):
    """The difference, rounded once or nearly so: the float64 in two parts, so that no element takes float64."""
    high = everything.to(tl.float32)
    low = (everything - high.to(tl.float64)).to(tl.float32)
    return (per_neuron(high, W) - values) + per_neuron(low, W)


@triton.jit
def _mean_over_pairs(pair_sum, pairs, layers):
    """Half the sum over samples, per pair and layer; 0 without a pair."""
    return tl.where(pairs > 0, pair_sum / (2.0 * layers * tl.maximum(pairs, 1)), 0.0)


@triton.jit
def _weighted(value, weight):
    """The product; a term of weight 0 is left out, because 0 * inf would make the sum NaN."""
    return tl.where(weight == 0.0, 0.0, value * weight)


@triton.jit
def _losses(
    partials, same_pairs, diff_pairs, weighted, affinity, dispersion, compactness,
    weight_affinity, weight_dispersion, weight_compactness, count, layers, WIDTH: tl.constexpr,
):  # fmt: skip
    """Add `count` partial sums of each kind, write the three losses and their weighted sum."""
    same = tl.zeros([WIDTH], tl.float64)
    different = tl.zeros([WIDTH], tl.float64)
    magnitude = tl.zeros([WIDTH], tl.float64)
    for start in range(0, count, WIDTH):
        index = start + tl.arange(0, WIDTH)
        inside = index < count
        same += tl.load(partials + index, mask=inside, other=0.0)
        different += tl.load(partials + count + index, mask=inside, other=0.0)
        magnitude += tl.load(partials + 2 * count + index, mask=inside, other=0.0)
    pairs = tl.load(same_pairs)
    similar = _mean_over_pairs(tl.sum(same, 0), pairs, layers)
    of_affinity = tl.where(pairs > 0, 1.0 - similar, 0.0).to(tl.float32)
    of_dispersion = _mean_over_pairs(tl.sum(different, 0), tl.load(diff_pairs), layers).to(tl.float32)
    mean = 2.0 * tl.sum(magnitude, 0) / layers
    of_compactness = tl.where((mean > LARGEST) & (mean < float("inf")), LARGEST, mean).to(tl.float32)
    tl.store(affinity, of_affinity)
    tl.store(dispersion, of_dispersion)
    tl.store(compactness, of_compactness)
    total = _weighted(of_affinity, weight_affinity) + _weighted(of_dispersion, weight_dispersion)
    tl.store(weighted, total + _weighted(of_compactness, weight_compactness))


@triton.jit
def _is_last(arrivals, programs):
    """Whether all other programs came here before, so that what they stored can be read.

    The barrier puts all threads' stores before the one thread's release; its acquire comes before all threads' loads.
    """
    tl.debug_barrier()
    return tl.atomic_add(arrivals, 1, sem="acq_rel", scope="gpu") == programs - 1


@triton.jit(do_not_specialize=["layers", "samples", "width"])
def pair_terms_kernel(
    table, inverse, order, offsets, segment, sums, terms, partials, arrivals,
    same_pairs, diff_pairs, weighted, affinity, dispersion, compactness,
    weight_affinity: tl.float32, weight_dispersion: tl.float32, weight_compactness: tl.float32,
    layers: tl.int64, samples: tl.int64, width: tl.int64, IN_PARTS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One block of 32 samples x one tile of 128 neurons."""
    block = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1).to(tl.int64)
    layer = find_layer(table, layers, tile)
    rows = tl.load(table + layers + layer).to(tl.pointer_type(tl.float32))
    neurons = tl.load(table + 2 * layers + layer)
    aligned = tl.load(table + 3 * layers + layer)
    neuron = (tile - tl.load(table + layer)) * NEURONS + tl.arange(0, NEURONS)
    column = tile * NEURONS + tl.arange(0, NEURONS)

    position = block * BLOCK + tl.arange(0, BLOCK)
    inside = position < samples
    sample = tl.load(order + position, mask=inside, other=0)
    first, last, _, _ = segment_bounds(order, offsets, segment, block, samples)

    values = load_rows(rows, sample, inside, neurons, neuron, aligned, W)
    # In a unit in which as many numbers as a tile has can be added, whatever they are.
    magnitude = tl.sum(sum_of_samples(tl.abs(values) * (1.0 / (BLOCK * NEURONS))), 0)
    magnitude *= (BLOCK * NEURONS) / (2.0 * neurons * samples)
    values *= per_sample(tl.load(inverse + layer * samples + sample, mask=inside, other=0.0), W)

    blocks = tl.cdiv(samples, BLOCK)
    everything = total_of(sums, blocks, width, column, IN_PARTS)
    own = values  # where a sample is the only one of its segment
    others = but(everything, values, W)
    for index in range(first, last + 1):
        start = tl.load(offsets + index)
        end = tl.load(offsets + index + 1)
        if end - start > 1:
            member = members(position, start, end, W)
            of_class = segment_sum(values, member, start, end, sums, block, blocks, width, column, IN_PARTS)
            own = tl.where(member, per_neuron(of_class.to(tl.float32), W), own)
            others = tl.where(member, per_neuron((everything - of_class).to(tl.float32), W), others)
    same_term = sum_of_neurons(values * (own - values))
    different_term = sum_of_neurons(values * others)

    tl.store(terms + tile * samples + position, same_term, mask=inside)
    different = terms + (width // NEURONS) * samples
    tl.store(different + tile * samples + position, different_term, mask=inside)
    programs = tl.num_programs(0).to(tl.int64) * tl.num_programs(1)
    slot = partials + tile * tl.num_programs(0) + block
    tl.store(slot, tl.sum(same_term, 0))
    tl.store(slot + programs, tl.sum(different_term, 0))
    tl.store(slot + 2 * programs, magnitude)
    if _is_last(arrivals, programs):
        _losses(
            partials, same_pairs, diff_pairs, weighted, affinity, dispersion, compactness,
            weight_affinity, weight_dispersion, weight_compactness, programs, layers, WIDTH,
        )  # fmt: skip


# Block, tile and warps and their reasons: rows.py. Of the partial sums, 512 a step: its latency is paid a few times
# only (ResNet18 at N = 128: once), and the program needs no more registers for them than for its rows.
PARTIALS = 512


def launch_pair_terms(
    tiling: Tiling,
    table: Tensor,
    prepared: Preparation,
    sums: Tensor,
    weights: Weights,
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The weighted sum, affinity, dispersion and compactness, float32 0-d, and the terms (2, tiles, N) that backward
    reads.
    """
    segments, inverse, arrivals = prepared
    terms = torch.empty(2, tiling.tiles, tiling.samples, dtype=torch.float32, device=table.device)
    partials = torch.empty(3, tiling.blocks * tiling.tiles, dtype=torch.float32, device=table.device)
    losses = tuple(torch.empty((), dtype=torch.float32, device=table.device) for _ in range(4))
    launch(
        pair_terms_kernel, (tiling.blocks, tiling.tiles),
        table, inverse, segments.order, segments.offsets, segments.segment, sums, terms, partials, arrivals,
        segments.same_pairs, segments.diff_pairs, *losses, *weights, len(tiling.neurons), tiling.samples, tiling.width,
        in_parts(tiling.samples), PARTIALS, num_warps=WARPS,
    )  # fmt: skip
    return losses, terms  # type: ignore[return-value]
