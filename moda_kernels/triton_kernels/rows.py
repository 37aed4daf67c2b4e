"""The pooled rows of all layers as the loss kernels walk them.

The samples stand in the order of their segments and are cut into blocks of 32; the neurons of every layer are cut
into tiles of 128, numbered through all layers. A program works on one block x tile. A segment that lies inside one
block is summed in registers wherever it is needed; only a segment that crosses a block boundary is kept in memory, in
the slot of the block it starts in, and at most one segment starts in a block and leaves it. So class sums take
1/32 of the memory of the pooled rows, whatever the number of classes, and neither a batch of one class nor a batch of
as many classes as samples is slower than another.

The table's fields, one column of `layers` entries each: first tile, address of the rows ((N, C) float32), C, whether
16-byte accesses are aligned, an address for what the kernel writes per layer (0: nothing), and what that is divided by.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
import triton
import triton.language as tl

from moda_kernels.triton_kernels.layouts import VECTOR_BYTES
from moda_kernels.triton_kernels.tables import device_table

# 32 x 128 float32 is 32 values for each of 128 threads, eight 16-byte loads in flight; 32 samples bound the number of
# segments a program sums in registers, 128 neurons are 512 contiguous bytes of a row that is gathered by sample.
BLOCK_SAMPLES = 32
TILE_NEURONS = 128
WARPS = 4

BLOCK = tl.constexpr(BLOCK_SAMPLES)
NEURONS = tl.constexpr(TILE_NEURONS)


# Triton deals a tile out to lanes, warps and registers from its last axis on. Of (samples, neurons) each of W warps
# would get some samples; sums over samples would go through shared memory, where 16 or 32 lanes would want the same
# bank, because each has four neurons side by side. So a tile has four axes,
#
#     (samples / W, W, W, neurons / W)          sample W i + k and neuron (neurons / W) j + l at (i, j, k, l)
#
# of which the last two are the lanes of a warp, which has neurons of its own, and the first is in registers.


@triton.jit
def per_sample(values, W: tl.constexpr):
    """A value per sample, to be joined with a tile."""
    return tl.reshape(values, [values.shape[0] // W, W])[:, None, :, None]


@triton.jit
def per_neuron(values, W: tl.constexpr):
    """A value per neuron, to be joined with a tile."""
    return tl.reshape(values, [W, values.shape[0] // W])[None, :, None, :]


@triton.jit
def sum_of_samples(tile):
    """The sums of a tile over samples, without shared memory."""
    sums = tl.sum(tl.sum(tile, 0), 1)
    return tl.reshape(sums, [sums.shape[0] * sums.shape[1]])


@triton.jit
def sum_of_neurons(tile):
    """The sums of a tile over neurons. Warps exchange theirs by sample, so that no two lanes want the same bank."""
    sums = tl.permute(tl.sum(tile, 3), [0, 2, 1])
    return tl.sum(tl.reshape(sums, [sums.shape[0] * sums.shape[1], sums.shape[2]]), 1)


@triton.jit
def _pointers(rows, sample, neurons, neuron, VEC: tl.constexpr, W: tl.constexpr):
    pointers = rows + per_sample(sample, W) * neurons + per_neuron(neuron, W)
    return tl.max_contiguous(tl.multiple_of(pointers, [1, 1, 1, 4 * VEC]), [1, 1, 1, VEC])


@triton.jit
def _mask(inside, neurons, neuron, VEC: tl.constexpr, W: tl.constexpr):
    return tl.max_constancy(per_sample(inside, W) & per_neuron(neuron < neurons, W), [1, 1, 1, VEC])


@triton.jit
def _load(rows, sample, inside, neurons, neuron, VEC: tl.constexpr, W: tl.constexpr):
    pointers = _pointers(rows, sample, neurons, neuron, VEC, W)
    return tl.load(pointers, mask=_mask(inside, neurons, neuron, VEC, W), other=0.0)


@triton.jit
def load_rows(rows, sample, inside, neurons, neuron, aligned, W: tl.constexpr):
    """A tile of rows[sample, neuron], 0 outside of the batch and the layer; `neurons` is the layer's C."""
    if aligned != 0:
        values = _load(rows, sample, inside, neurons, neuron, 4, W)
    else:
        values = _load(rows, sample, inside, neurons, neuron, 1, W)
    return values


@triton.jit
def _store(rows, sample, inside, neurons, neuron, values, VEC: tl.constexpr, W: tl.constexpr):
    pointers = _pointers(rows, sample, neurons, neuron, VEC, W)
    tl.store(pointers, values, mask=_mask(inside, neurons, neuron, VEC, W))


@triton.jit
def store_rows(rows, sample, inside, neurons, neuron, aligned, values, W: tl.constexpr):
    """rows[sample, neuron] = a tile, inside of the batch and the layer."""
    if aligned != 0:
        _store(rows, sample, inside, neurons, neuron, values, 4, W)
    else:
        _store(rows, sample, inside, neurons, neuron, values, 1, W)


@triton.jit
def members(position, start, end, W: tl.constexpr):
    """Whether samples at these positions are of the segment [start, end), to be joined with a tile."""
    return per_sample((position >= start) & (position < end), W)


@triton.jit
def segment_bounds(order, offsets, segment, block, samples):
    """First and last segment of a block of samples, and whether the first starts before and the last ends after it."""
    begin = block * BLOCK
    end = tl.minimum(begin + BLOCK, samples)
    first = tl.load(segment + tl.load(order + begin))
    last = tl.load(segment + tl.load(order + end - 1))
    return first, last, tl.load(offsets + first) < begin, tl.load(offsets + last + 1) > end


class Tiling:
    """How the rows of some layers are cut.

    Attributes:
        samples: N.
        neurons: C of each layer.
        blocks: the number of blocks of samples.
        tiles: the number of tiles of neurons in all layers.
        width: the number of neurons of all layers, each layer rounded up to whole tiles.
    """

    def __init__(self, samples: int, neurons: tuple[int, ...]) -> None:
        tiles = [-(-width // TILE_NEURONS) for width in neurons]
        self.samples, self.neurons = samples, neurons
        self.blocks, self.tiles = -(-samples // BLOCK_SAMPLES), sum(tiles)
        self.width = self.tiles * TILE_NEURONS
        self._starts = [0, *accumulate(tiles[:-1])]
        self._whole = [int(width * 4 % VECTOR_BYTES == 0) for width in neurons]
        self._undivided = [1] * len(neurons)

    def table(
        self,
        addresses: Sequence[int],
        device: torch.device,
        targets: Sequence[int] | None = None,
        divisors: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """The device table of rows at these addresses.

        `targets` gives the address per layer that the kernel writes to, `divisors` what it divides by.
        """
        targets = targets or [0] * len(addresses)
        aligned = [
            int(whole and (address | target) % VECTOR_BYTES == 0)
            for whole, address, target in zip(self._whole, addresses, targets, strict=True)
        ]
        columns = [self._starts, addresses, self.neurons, aligned, targets, divisors or self._undivided]
        return device_table(columns, device)
