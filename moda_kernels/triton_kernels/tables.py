"""Tables in device memory that let one launch work on every layer, and the lookup a program does in them.

A table is int64, one column of `layers` entries per field, the first field being the first program of each layer
(ascending). Tensors enter as addresses, so the number of kernel arguments does not depend on the number of layers.

A table goes up in one copy from pinned memory, which does not synchronise, and is kept by its content: the caching
allocator hands the same addresses out step after step, so a training loop copies nothing after its first steps.
While a CUDA graph is captured a copy would read host memory at every replay; there the entries travel as arguments of
small kernels instead, and belong to the graph. What is kept belongs to no graph: torch.compile warms its graphs up with
a pool of memory in the place of the calling thread's own, and takes it back, so tables are made in another thread.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from itertools import chain

import torch
import triton
import triton.language as tl
from torch import Tensor

LOOKUP = tl.constexpr(64)  # layers compared at once; more take another round of the loop
CAPACITY = 256  # tables kept; each is a few KiB at most
KEEPING = frozenset({"cuda"})  # types of devices whose tables are kept
_kept: OrderedDict[tuple[object, ...], Tensor] = OrderedDict()


@triton.jit
def find_layer(first, layers, program):
    """Layer whose range of programs, starting at first[layer], holds `program`."""
    lanes = tl.arange(0, LOOKUP)
    started = 0
    for base in range(0, layers, LOOKUP):
        inside = base + lanes < layers
        starts = tl.load(first + base + lanes, mask=inside, other=0)
        started += tl.sum((inside & (starts <= program)).to(tl.int32))
    return started - 1


# Table entries that one launch of _write_kernel takes; arguments of a kernel may have 4096 bytes together.
_ENTRIES = (64, 256)
# Integers in a tuple are compiled in by their size and divisibility; odd ones of 63 bits are all alike.
_ODD = tl.constexpr((1 << 62) + 1)


@triton.jit(do_not_specialize=["count"])
def _write_kernel(table, count: tl.int64, entries):
    """table[:count] = the first `count` entries, each of which is its double plus _ODD."""
    for index in tl.static_range(len(entries)):
        if index < count:
            tl.store(table + index, (entries[index] - _ODD) >> 1)


def device_table(columns: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Put the columns one after the other, as int64, on `device` without a synchronisation."""
    entries = tuple(chain.from_iterable(columns))
    if device.type not in KEEPING:
        return torch.tensor(entries, dtype=torch.int64, device=device)
    on_gpu = device.type == "cuda"
    if on_gpu and torch.cuda.is_current_stream_capturing():
        return _written_by_kernels(entries, device)
    # Memory freed by one stream may still be read by another: a table serves the stream it was made on.
    key = (device, torch.cuda.current_stream(device).cuda_stream if on_gpu else 0, entries)
    table = _kept.get(key)
    if table is None:
        if on_gpu:
            _make_capturable(device)
            copying = _copier().submit(_copied, entries, torch.cuda.current_stream(device))
            table = _kept[key] = copying.result()
        else:
            table = _kept[key] = torch.tensor(entries, dtype=torch.int64, device=device)
        if len(_kept) > CAPACITY:
            _kept.popitem(last=False)
    else:
        _kept.move_to_end(key)
    return table


@lru_cache
def _copier() -> ThreadPoolExecutor:
    """A thread that never captures and has no pool of its own."""
    return ThreadPoolExecutor(1, "moda tables")


def _copied(entries: tuple[int, ...], stream: torch.cuda.Stream) -> Tensor:
    """The table on the stream's device, for work that comes behind on the stream."""
    with torch.cuda.stream(stream):
        return torch.tensor(entries, dtype=torch.int64, pin_memory=True).to(stream.device, non_blocking=True)


@lru_cache
def _make_capturable(device: torch.device) -> None:
    """Compile and load the kernels that a later capture needs: neither can be done while capturing."""
    for size in _ENTRIES:
        _written_by_kernels((0,) * size, device)


def _written_by_kernels(entries: Sequence[int], device: torch.device) -> Tensor:
    table = torch.empty(len(entries), dtype=torch.int64, device=device)
    most = _ENTRIES[-1]
    for base in range(0, len(entries), most):
        chunk = [2 * entry + _ODD.value for entry in entries[base : base + most]]
        size = next(size for size in _ENTRIES if len(chunk) <= size)
        given = (*chunk, *[_ODD.value] * (size - len(chunk)))
        _write_kernel[(1,)](table[base:], len(chunk), given, num_warps=1)
    return table


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """A context in which the tensor's device is current, as a launch needs it."""
    if tensor.device.type == "cuda" and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return nullcontext()
