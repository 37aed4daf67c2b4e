"""Pooled activations of all layers in one launch per dtype present.

    pooled[n, c] = mean over positions s of |x[n, c, s]|          spatial layers
    pooled[n, c] = x[n, c]                                        (N, C) layers (widening half precision)

Shapes: layers (N, C) or (N, C, *spatial), contiguous, channels_last or anything `layouts.arrange` copies.
Dtypes: float16, bfloat16, float32 in; sums and results in float32.
Determinism: every sum runs in an order fixed by shapes and layout; no atomics; bitwise equal from run to run.

Each activation is read once. Layers are looked up in a device table (tables.py), so a launch covers layers of any
shape and layout; a long channels_last map is split over programs, and a second small launch adds the parts.

Layers whose stretches of memory are not aligned for 16-byte accesses (rows of 7 x 7, 14 x 14 in half precision) are
pooled by a launch of their own: lanes are laid out for the widest access of a kernel, and narrower ones would be apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from moda_kernels.triton_kernels import layouts
from moda_kernels.triton_kernels.launching import launch
from moda_kernels.triton_kernels.layouts import Layout, address_after, mean_of, sum_of_lines, unit_of
from moda_kernels.triton_kernels.tables import device_table, find_layer

TILE = tl.constexpr(layouts.TILE)
COLUMN_NEURONS = tl.constexpr(layouts.COLUMN_NEURONS)
COLUMN_POSITIONS = tl.constexpr(layouts.COLUMN_POSITIONS)
SPAN = tl.constexpr(layouts.SPAN)


@triton.jit
def _flat(x, out, tile, rows, signed, VEC: tl.constexpr, ACCESS: tl.constexpr):
    index = tile * TILE + tl.arange(0, TILE)
    pointers = tl.max_contiguous(tl.multiple_of(x + index, ACCESS), VEC)
    inside = tl.max_constancy(index < rows, VEC)
    value = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
    targets = tl.max_contiguous(tl.multiple_of(out + index, ACCESS), VEC)
    tl.store(targets, tl.where(signed != 0, value, tl.abs(value)), mask=inside)


@triton.jit
def _rows(
    x, out, tile, rows, positions, ROWS: tl.constexpr, WIDTH: tl.constexpr, VEC: tl.constexpr, ACCESS: tl.constexpr
):
    row = tile * ROWS + tl.arange(0, ROWS)
    unit = unit_of(positions)
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    for start in range(0, positions, WIDTH):
        position = start + tl.arange(0, WIDTH)
        pointers = x + row[:, None] * positions + position[None, :]
        pointers = tl.max_contiguous(tl.multiple_of(pointers, [1, ACCESS]), [1, VEC])
        inside = tl.max_constancy((row < rows)[:, None] & (position < positions)[None, :], [1, VEC])
        total += tl.abs(tl.load(pointers, mask=inside, other=0.0).to(tl.float32)) * unit
    tl.store(out + row, mean_of(tl.sum(total, 1), positions, unit), mask=row < rows)


@triton.jit
def _columns(x, out, tile, rows, neurons, positions, splits, VEC: tl.constexpr, ACCESS: tl.constexpr):
    blocks = tl.cdiv(neurons, COLUMN_NEURONS)
    neuron = (tile % blocks) * COLUMN_NEURONS + tl.arange(0, COLUMN_NEURONS)
    split = (tile // blocks) % splits
    sample = tile // (blocks * splits)
    unit = unit_of(positions)
    total = tl.zeros([COLUMN_POSITIONS, COLUMN_NEURONS], tl.float32)
    for start in range(split * SPAN, tl.minimum(split * SPAN + SPAN, positions), COLUMN_POSITIONS):
        position = start + tl.arange(0, COLUMN_POSITIONS)
        pointers = x + (sample * positions + position)[:, None] * neurons + neuron[None, :]
        pointers = tl.max_contiguous(tl.multiple_of(pointers, [1, ACCESS]), [1, VEC])
        inside = tl.max_constancy((position < positions)[:, None] & (neuron < neurons)[None, :], [1, VEC])
        total += tl.abs(tl.load(pointers, mask=inside, other=0.0).to(tl.float32)) * unit
    sums = sum_of_lines(tl.reshape(total, [1, COLUMN_POSITIONS, COLUMN_NEURONS]), VEC)
    mean = mean_of(tl.reshape(sums, [COLUMN_NEURONS]), positions, unit)
    tl.store(out + split * rows + sample * neurons + neuron, mean, mask=neuron < neurons)


@triton.jit(do_not_specialize=["layers"])
def pool_kernel(table, layers: tl.int64, DTYPE: tl.constexpr, ACCESS: tl.constexpr):
    """One tile of one layer: 2048 elements, or as many rows or columns walked to their end."""
    program = tl.program_id(0).to(tl.int64)
    layer = find_layer(table, layers, program)
    field = table + layer
    tile = program - tl.load(field)
    x = tl.load(field + layers).to(tl.pointer_type(DTYPE))
    out = tl.load(field + 2 * layers).to(tl.pointer_type(tl.float32))
    rows = tl.load(field + 3 * layers)
    neurons = tl.load(field + 4 * layers)
    positions = tl.load(field + 5 * layers)
    splits = tl.load(field + 6 * layers)
    signed = tl.load(field + 7 * layers)
    mode = tl.load(field + 8 * layers)  # of the layout
    VEC: tl.constexpr = 8 * ACCESS // DTYPE.primitive_bitwidth  # elements of an access
    if mode == 0:
        _flat(x, out, tile, rows, signed, VEC, ACCESS)
    elif mode == 1:
        _rows(x, out, tile, rows, positions, TILE // 4, 4, VEC if VEC < 4 else 4, ACCESS)
    elif mode == 2:
        _rows(x, out, tile, rows, positions, TILE // 16, 16, VEC, ACCESS)
    elif mode == 3:
        _rows(x, out, tile, rows, positions, TILE // 64, 64, VEC, ACCESS)
    elif mode == 4:
        _rows(x, out, tile, rows, positions, TILE // 256, 256, VEC, ACCESS)
    elif mode == 5:
        _rows(x, out, tile, rows, positions, TILE // 1024, 1024, VEC, ACCESS)
    else:
        _columns(x, out, tile, rows, neurons, positions, splits, VEC, ACCESS)


@triton.jit(do_not_specialize=["layers"])
def add_splits_kernel(table, layers: tl.int64, BLOCK: tl.constexpr):
    """The sum over splits of the partial means, split after split."""
    program = tl.program_id(0).to(tl.int64)
    layer = find_layer(table, layers, program)
    field = table + layer
    index = (program - tl.load(field)) * BLOCK + tl.arange(0, BLOCK)
    partial = tl.load(field + layers).to(tl.pointer_type(tl.float32))
    out = tl.load(field + 2 * layers).to(tl.pointer_type(tl.float32))
    rows = tl.load(field + 3 * layers)
    splits = tl.load(field + 4 * layers)
    total = tl.zeros([BLOCK], tl.float32)
    for split in range(0, splits):
        total += tl.load(partial + split * rows + index, mask=index < rows, other=0.0)
    tl.store(out + index, total, mask=index < rows)


# Tiles and their reasons: layouts.py. The cap makes the assembler take the registers it needs (64 for 16-byte accesses
# in half precision, up to 127 for single elements); left alone it settled on too few for bfloat16 on sm_90 and spilled.
REGISTERS = 128
# Parts are few and small; 512 of them per program spreads them out.
SPLIT_BLOCK = 512


class PooledLayer(NamedTuple):
    """A layer to pool, but for its memory; `signed` is whether it keeps its sign."""

    dtype: torch.dtype
    layout: Layout
    signed: bool


class Group:
    """Layers that one launch can take together, and what is known of its table before there are addresses.

    Attributes:
        dtype: that of the layers, as Triton has it.
        access: bytes of an access.
        which: places of the layers among those that are pooled.
        programs: how many the launch has.
        starts, sizes: the first column of the table, and those behind the addresses.
        split: places in `which` of the layers whose positions are split over programs.
    """

    def __init__(self, layers: Sequence[PooledLayer], which: Sequence[int], access: int) -> None:
        chosen = [layers[i].layout for i in which]
        self.dtype, self.access, self.which = TRITON_DTYPE[layers[which[0]].dtype], access, tuple(which)
        *starts, self.programs = _starts(layout.programs for layout in chosen)
        self.starts = starts
        self.sizes: list[int] = []
        for name in ("rows", "neurons", "positions", "splits"):
            self.sizes += [getattr(layout, name) for layout in chosen]
        self.sizes += [int(layers[i].signed) for i in which]
        self.sizes += [layout.mode for layout in chosen]
        self.split = [place for place, layout in enumerate(chosen) if layout.splits > 1]
        self.split_layouts = [chosen[place] for place in self.split]


class Pooling:
    """Layers to pool, in as few launches as can be."""

    def __init__(self, layers: Sequence[PooledLayer]) -> None:
        self.layers = tuple(layers)
        self._aligned = self._groups([layouts.VECTOR_BYTES] * len(layers))

    def groups(self, addresses: Sequence[int], pooled: Sequence[int], targets: Sequence[int] = ()) -> list[Group]:
        """What is launched for layers at these addresses.

        Args:
            addresses: of the layers.
            pooled: of their pooled rows, which are read or written in vectors for FLAT and COLUMNS.
            targets: of what is written in the layout of the layers, too.
        """
        bits = 0
        for address in (*addresses, *targets, *pooled):
            bits |= address
        if bits % layouts.VECTOR_BYTES == 0:
            return self._aligned
        each = zip(self.layers, addresses, pooled, targets or addresses, strict=True)
        vectors = (layouts.FLAT, layouts.COLUMNS)
        return self._groups([a | t | (p if layer.layout.mode in vectors else 0) for layer, a, p, t in each])

    def _groups(self, addresses: Sequence[int]) -> list[Group]:
        found: dict[tuple[torch.dtype, bool], dict[int, int]] = {}
        for i, (layer, address) in enumerate(zip(self.layers, addresses, strict=True)):
            size = layer.dtype.itemsize
            aligned = layer.layout.aligned_bytes(size, address)
            found.setdefault((layer.dtype, aligned == layouts.VECTOR_BYTES), {})[i] = max(aligned, size)
        return [Group(self.layers, list(group), min(group.values())) for group in found.values()]


TRITON_DTYPE = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


def launch_pool(pooling: Pooling, addresses: Sequence[int], pooled: Sequence[int], device: torch.device) -> None:
    """Write the pooled rows of every layer, from and to these addresses, on the current device."""
    for group in pooling.groups(addresses, pooled):
        outputs = [pooled[i] for i in group.which]
        offsets = list(_starts(layout.splits * layout.rows for layout in group.split_layouts))
        if group.split:
            parts = torch.empty(offsets[-1], dtype=torch.float32, device=device)
            for place, offset in zip(group.split, offsets, strict=False):
                outputs[place] = address_after(parts, offset)
        table = device_table([group.starts, [addresses[i] for i in group.which], outputs, group.sizes], device)
        launch(
            pool_kernel, (group.programs,),
            table, len(group.which), group.dtype, group.access, num_warps=layouts.WARPS, maxnreg=REGISTERS,
        )  # fmt: skip
        if group.split:
            _add_splits(group, outputs, pooled, device)


def _add_splits(group: Group, parts: Sequence[int], pooled: Sequence[int], device: torch.device) -> None:
    *starts, programs = _starts(-(-layout.rows // SPLIT_BLOCK) for layout in group.split_layouts)
    columns = [
        starts,
        [parts[place] for place in group.split],
        [pooled[group.which[place]] for place in group.split],
        [layout.rows for layout in group.split_layouts],
        [layout.splits for layout in group.split_layouts],
    ]
    table = device_table(columns, device)
    launch(add_splits_kernel, (programs,), table, len(group.split), SPLIT_BLOCK, num_warps=layouts.WARPS)


def _starts(sizes: Iterable[int]) -> Iterator[int]:
    """0, then the running sum of `sizes`."""
    total = 0
    yield total
    for size in sizes:
        total += size
        yield total
