"""Tells the C library's allocator to keep large blocks."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # parameters of glibc's mallopt
_NEVER = 2**31 - 1
_LARGEST_MMAP_THRESHOLD = 32 << 20  # what glibc's own adaptation settles at in a process that frees large blocks


@contextmanager
def kept_memory() -> Iterator[None]:
    """Keep freed memory with the process and hand it out again; PyTorch's CPU allocator asks the C library.

    By default glibc takes every block of more than 32 MiB from the operating system and gives it back when it is freed.
    A tensor of that size then costs its page faults each time it is made, several times what a kernel takes to
    fill it, and the same kernel looks much slower from that size on. The block has no effect where there is no glibc.
    """
    settings = getattr(ctypes.CDLL(None), "mallopt", None)
    if settings is None:
        yield
        return
    settings(_MMAP_THRESHOLD, _NEVER)
    settings(_TRIM_THRESHOLD, _NEVER)
    try:
        yield
    finally:
        settings(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
        settings(_TRIM_THRESHOLD, 2 * _LARGEST_MMAP_THRESHOLD)
        ctypes.CDLL(None).malloc_trim(0)
