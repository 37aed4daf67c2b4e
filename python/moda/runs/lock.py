"""One process at a time: a lock beside what is being written, with the host and process that hold it.

The kernel gives the lock back when its process ends, however it ends, so that a lock file that was left behind on this
host says nothing. One that another host has left, where folders are shared, is believed: nobody here can tell.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moda.checks import integer, text
from moda.files import LOCK, Format, FormatError, write_errors

try:
    import fcntl
except ImportError:  # Windows has none: nothing is locked there
    fcntl = None  # type: ignore[assignment]

__all__ = ["BusyError", "locked"]

HELD_BY = Format("moda-lock", {"host": text(), "pid": integer(1)})

_held: dict[Path, int] = {}  # locks of this process, and how often each was taken
_guard = threading.RLock()


class BusyError(ValueError):
    """Another process is writing there; the message names it."""


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """Keep other processes from writing `target`, a folder that exists or a file, while the block runs.

    A process may take a lock again that it holds.

    Raises:
        BusyError: another process holds the lock; the message says which.
        OSError: nothing can be written there; the error names `target`.
    """
    lock = target / LOCK if target.is_dir() else target.with_name(f".{target.name}{LOCK}")
    name = lock.absolute()
    with _guard:
        handle = None if name in _held or fcntl is None else _taken(lock, target)
        _held[name] = _held.get(name, 0) + 1
    try:
        yield
    finally:
        with _guard:
            _held[name] -= 1
            if not _held[name]:
                del _held[name]
        if handle is not None:
            lock.unlink(missing_ok=True)
            os.close(handle)


def _taken(lock: Path, target: Path) -> int:
    """A handle of the lock file, which this process holds locked."""
    while True:
        with write_errors(target):
            handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not _is_at(handle, lock):  # its holder has removed it since it was opened
                os.close(handle)
                continue
            _refuse_other_host(lock, os.pread(handle, 1 << 16, 0))
        except BlockingIOError:
            held = os.pread(handle, 1 << 16, 0)
            os.close(handle)
            raise BusyError(f"{lock.parent}: {_holder(lock, held)} is writing there; wait until it ends") from None
        except BaseException:
            os.close(handle)
            raise
        try:
            with write_errors(target):
                os.ftruncate(handle, 0)
                os.pwrite(handle, HELD_BY.to_bytes({"host": socket.gethostname(), "pid": os.getpid()}), 0)
        except BaseException:
            lock.unlink(missing_ok=True)
            os.close(handle)
            raise
        return handle


def _is_at(handle: int, lock: Path) -> bool:
    try:
        there = lock.stat()
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(handle), there)


def _refuse_other_host(lock: Path, content: bytes) -> None:
    described = _described(lock, content)
    if described is not None and described["host"] != socket.gethostname():
        raise BusyError(
            f"{lock.parent}: {_holder(lock, content)} was writing there; if it has ended, remove {lock} and try again"
        )


def _holder(lock: Path, content: bytes) -> str:
    described = _described(lock, content)
    if described is None:
        return "another process"
    return f"process {described['pid']} of {described['host']}"


def _described(lock: Path, content: bytes) -> dict[str, Any] | None:
    """What a lock file says; None for one that a kill has left unfinished."""
    try:
        return HELD_BY.parse(lock, content)
    except FormatError:
        return None
