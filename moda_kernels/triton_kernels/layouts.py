"""How an activation lies in memory, and the tiles in which the pooling kernels walk it.

Three modes cover every activation whose neurons or positions are contiguous; any other is copied first.

    FLAT      one value per (sample, neuron): (N, C), or one position
    ROWS      NCHW: a row per (sample, neuron), its positions contiguous
    COLUMNS   channels_last, and (N, T, C) seen as (N, C, T): positions apart, neurons contiguous

A tile holds 2048 elements, 16 for each of 128 threads: in float32 four 16-byte loads in flight per thread, in half
precision two, and few enough registers that many programs share a multiprocessor. 4096 elements took twice the
registers (128 a thread) for the same bytes in flight. ROWS chooses among five shapes of that tile by the
number of positions, so that a tile of small maps (2 x 2, 4 x 4) is as full as one of large maps; maps beyond 1024
positions are walked in a loop. COLUMNS takes 32 neurons at a time (128 bytes of float32, a whole cache line) and
splits long maps over programs, or a layer of 64 neurons would occupy a handful of multiprocessors.

ReLU with pooling and batch norm take tiles of other sizes in some passes, each the fastest of 1024 to 8192 elements on
an H200: 4096 where a program writes as many elements as it reads, 1024 where it keeps two sums of every element.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 2048
WARPS = 4

FLAT = 0
ROWS = 1  # 1..5: index into ROW_WIDTHS, plus one
ROW_WIDTHS = (4, 16, 64, 256, 1024)
COLUMNS = ROWS + len(ROW_WIDTHS)

COLUMN_NEURONS = 32
COLUMN_POSITIONS = TILE // COLUMN_NEURONS
SPAN = 32 * COLUMN_POSITIONS  # positions per program in COLUMNS: 32 tiles hide the cost of the final reduction

PROGRAMS = 2048  # that a launch of some tiles each should have, for a large GPU to be busy to the end
VECTOR_BYTES = 16
LINE_BYTES = 128  # of neurons, contiguous in a matrix, that a tile takes: a cache line


LARGEST = tl.constexpr(torch.finfo(torch.float32).max)


@triton.jit
def unit_of(positions):
    """The power of two by which 1/2 <= positions * unit < 1: a sum of as many numbers in this unit is finite."""
    exponent = positions.to(tl.float32).to(tl.int32, bitcast=True) >> 23
    return ((253 - exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def mean_of(total, positions, unit):
    """The mean from a sum in that unit; rounding makes no mean of finite numbers infinite."""
    mean = total / (positions * unit)
    return tl.where(mean > LARGEST, tl.where(total > LARGEST, total, LARGEST), mean)


@triton.jit
def sum_of_lines(tile, VEC: tl.constexpr):
    """The sums of a tile (groups, lines, neurons) over lines; each thread has VEC neurons of a line side by side.

    Warps exchange theirs through shared memory, neuron after neuron. Of neurons in their order, lanes would want the
    same banks; so the first ones of all lanes come first, then the second ones.
    """
    lanes: tl.constexpr = tile.shape[2] // VEC
    taken = tl.permute(tl.reshape(tile, [tile.shape[0], tile.shape[1], lanes, VEC]), [0, 1, 3, 2])
    sums = tl.sum(tl.reshape(taken, tile.shape), 1)
    ordered = tl.permute(tl.reshape(sums, [tile.shape[0], VEC, lanes]), [0, 2, 1])
    return tl.reshape(ordered, [tile.shape[0], tile.shape[2]])


@triton.jit
def sample_of(line, positions, LARGE: tl.constexpr):
    """The sample of a row of the matrix (N * S, C); divisions of 64 bits are slow."""
    if LARGE:  # noqa: SIM108 - Triton compiles the branch taken alone
        sample = line // positions
    else:
        sample = (line.to(tl.int32) // positions.to(tl.int32)).to(tl.int64)
    return sample


@dataclass(frozen=True)
class Layout:
    """One activation as the pooling kernels see it; `rows` is N * C, `run` the length of a contiguous stretch."""

    mode: int
    rows: int
    neurons: int
    positions: int
    splits: int
    programs: int
    run: int

    @property
    def as_matrix(self) -> Layout:
        """FLAT as COLUMNS of one position, for kernels that take neurons apart; any other layout as it is."""
        return replace(self, mode=COLUMNS, run=self.neurons) if self.mode == FLAT else self

    def aligned_bytes(self, itemsize: int, *addresses: int) -> int:
        """The widest access, up to 16 bytes, that is aligned in every stretch from these addresses on."""
        bits = self.run * itemsize | VECTOR_BYTES
        for address in addresses:
            bits |= address
        return bits & -bits


def arrange(activation: Tensor) -> tuple[Tensor, Layout]:
    """The activation and its layout; the activation is copied if it lies in none of the three ways."""
    layout = layout_of(activation.shape, activation.stride())
    if layout is None:
        activation, layout = activation.contiguous(), layout_of(activation.shape)
    return activation, cast(Layout, layout)  # contiguous memory always has one


def is_arranged(activation: Tensor) -> bool:
    """Whether `arrange` takes the activation as it lies. Traceable."""
    if activation.is_contiguous():
        return True
    shape, stride = activation.shape, activation.stride()
    last = (0, *range(2, len(shape)), 1)
    return _contiguous([shape[d] for d in last], [stride[d] for d in last])


class Tile(NamedTuple):
    """The sides of a tile of the matrix (N * S, C)."""

    lines: int
    neurons: int


def matrix_tile(layout: Layout, itemsize: int, elements: int) -> Tile:
    """A tile of so many elements: a cache line of neurons, or all of them where they are fewer."""
    neurons = min(LINE_BYTES // itemsize, triton.next_power_of_2(layout.neurons))
    return Tile(elements // neurons, neurons)


@lru_cache(maxsize=4096)
def layout_of(shape: tuple[int, ...], stride: tuple[int, ...] | None = None) -> Layout | None:
    """The layout of memory of this shape and these strides, contiguous if none are given; None if it has none."""
    rows, neurons, positions = shape[0] * shape[1], shape[1], math.prod(shape[2:])
    if stride is None or _contiguous(shape, stride):
        if positions == 1:
            return Layout(FLAT, rows, neurons, 1, 1, _ceil(rows, TILE), rows)
        return _rows(rows, neurons, positions)
    last = (0, *range(2, len(shape)), 1)
    if _contiguous([shape[d] for d in last], [stride[d] for d in last]):
        splits = _ceil(positions, SPAN)
        programs = shape[0] * splits * _ceil(neurons, COLUMN_NEURONS)
        return Layout(COLUMNS, rows, neurons, positions, splits, programs, neurons)
    return None


def _rows(rows: int, neurons: int, positions: int) -> Layout:
    index = next((i for i, width in enumerate(ROW_WIDTHS) if positions <= width), len(ROW_WIDTHS) - 1)
    programs = _ceil(rows, TILE // ROW_WIDTHS[index])
    return Layout(ROWS + index, rows, neurons, positions, 1, programs, positions)


def _contiguous(shape: Sequence[int], stride: Sequence[int]) -> bool:
    expected = 1
    for size, step in zip(reversed(shape), reversed(stride), strict=True):
        if size != 1:
            if step != expected:
                return False
            expected *= size
    return True


def _ceil(value: int, step: int) -> int:
    return -(-value // step)


def address_after(base: Tensor, elements: int) -> int:
    """Address of the element `elements` after the start of `base`."""
    return base.data_ptr() + elements * base.element_size()


def gradient_like(activation: Tensor) -> Tensor:
    """Uninitialised memory for the gradient of an activation: laid out as it is if arranged, else contiguous."""
    kept = torch.preserve_format if is_arranged(activation) else torch.contiguous_format
    return torch.empty_like(activation, memory_format=kept)
