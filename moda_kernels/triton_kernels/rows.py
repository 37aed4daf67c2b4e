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
from dataclasses import dataclass

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


@triton.jit
def _load(rows, sample, inside, neurons, neuron, VEC: tl.constexpr):
    pointers = rows + sample[:, None] * neurons + neuron[None, :]
    pointers = tl.max_contiguous(tl.multiple_of(pointers, [1, 4 * VEC]), [1, VEC])
    mask = tl.max_constancy(inside[:, None] & (neuron < neurons)[None, :], [1, VEC])
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def load_rows(rows, sample, inside, neurons, neuron, aligned):
    """rows[sample, neuron], 0 outside of the batch and the layer; `neurons` is the layer's C."""
    if aligned != 0:
        values = _load(rows, sample, inside, neurons, neuron, 4)
    else:
        values = _load(rows, sample, inside, neurons, neuron, 1)
    return values


@triton.jit
def segment_bounds(order, offsets, segment, block, samples):
    """First and last segment of a block of samples, and whether the first starts before and the last ends after it."""
    begin = block * BLOCK
    end = tl.minimum(begin + BLOCK, samples)
    first = tl.load(segment + tl.load(order + begin))
    last = tl.load(segment + tl.load(order + end - 1))
    return first, last, tl.load(offsets + first) < begin, tl.load(offsets + last + 1) > end


@dataclass(frozen=True)
class Rows:
    """Pooled rows of all layers: addresses of (N, C) float32, one C each."""

    samples: int
    neurons: tuple[int, ...]
    addresses: tuple[int, ...]
    device: torch.device

    @property
    def blocks(self) -> int:
        """The number of blocks of samples."""
        return -(-self.samples // BLOCK_SAMPLES)

    @property
    def tiles(self) -> int:
        """The number of tiles of neurons in all layers."""
        return sum(-(-neurons // TILE_NEURONS) for neurons in self.neurons)

    @property
    def width(self) -> int:
        """The number of neurons of all layers, each layer rounded up to whole tiles."""
        return self.tiles * TILE_NEURONS

    def table(self, targets: Sequence[int], divisors: Sequence[int] | None = None) -> torch.Tensor:
        """The device table; `targets` gives the address per layer that the kernel writes to, `divisors` what it divides
        by.
        """
        first, starts = 0, []
        for neurons in self.neurons:
            starts.append(first)
            first += -(-neurons // TILE_NEURONS)
        aligned = [
            int((neurons * 4) % VECTOR_BYTES == 0 and address % VECTOR_BYTES == 0 and target % VECTOR_BYTES == 0)
            for neurons, address, target in zip(self.neurons, self.addresses, targets, strict=True)
        ]
        columns = [starts, self.addresses, self.neurons, aligned, targets, divisors or [1] * len(starts)]
        return device_table(columns, self.device)
