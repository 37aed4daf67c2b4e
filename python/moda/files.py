"""Files that a reader may trust: written whole or not at all, read without running anything in them."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor


class FormatError(ValueError):
    """A file or folder is not what it should be; the message names it and says what is wrong."""


@contextmanager
def format_errors(path: Path) -> Iterator[None]:
    """Turn what is raised by the values that the file `path` holds into a FormatError that names the file."""
    try:
        yield
    except FormatError:
        raise
    except KeyError as error:
        raise FormatError(f"{path}: entry {error} is missing") from None
    except (TypeError, ValueError) as error:
        raise FormatError(f"{path}: {error}") from None


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path` so that a crash at any moment leaves the old file or the new one, never a part of it."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o666 & ~_umask())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _umask() -> int:
    """The process's file mode mask (reading it means setting it)."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object, indented, atomically.

    Raises:
        TypeError, ValueError: `value` holds something that JSON has no word for (a tensor, NaN).
    """
    write_bytes(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def read_json(path: Path, kind: str, version: int, *, formerly: str | None = None) -> dict[str, Any]:
    """Read a JSON object whose "format" is `kind` and whose "format_version" is `version`.

    `formerly` is what an earlier release called the same format; it is read as well.

    Raises:
        FormatError: it is missing, no JSON object, of another kind or of another version.
    """
    value = _parse_json(path)
    if value.get("format") not in (kind, formerly or kind):
        raise FormatError(f'{path}: expected "format": "{kind}", got {value.get("format")!r}')
    if value.get("format_version") != version:
        raise FormatError(
            f"{path}: expected format_version {version}, got {value.get('format_version')!r}; "
            "read it with the moda-kernels version that wrote it "
            f"({value.get('library_version', 'not recorded')})"
        )
    return value


def _parse_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FormatError(f"{path}: no such file") from None
    except OSError as error:
        raise FormatError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise FormatError(f"{path}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise FormatError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write tensors in safetensors format, atomically; returns the file's SHA-256 in hex."""
    data = safetensors.torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    write_bytes(path, data)
    return hashlib.sha256(data).hexdigest()


def read_tensors(path: Path, sha256: str | None = None) -> dict[str, Tensor]:
    """Read a safetensors file onto the CPU; nothing in it is unpickled or run.

    Args:
        path: the file.
        sha256: what `write_tensors` returned, if known.

    Raises:
        FormatError: it is missing, malformed, or not the file that `sha256` is of.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise FormatError(f"{path}: no such file") from None
    except OSError as error:
        raise FormatError(f"{path}: cannot be read: {error.strerror}") from None
    digest = hashlib.sha256(data).hexdigest()
    if sha256 is not None and digest != sha256:
        raise FormatError(
            f"{path}: its SHA-256 is {digest}, the description beside it is of {sha256}: "
            "damaged, or from another save than the description"
        )
    try:
        return dict(safetensors.torch.load(data))
    except (SafetensorError, KeyError, ValueError) as error:
        raise FormatError(f"{path}: not a safetensors file: {error}") from None
