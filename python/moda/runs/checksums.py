"""What the files of a run must be: their SHA-256, in a file that is written before each of them.

`checksums.json` names files relative to its folder. While a file is being replaced it lists the digests of the old and
the new one, so that a kill at any moment leaves a folder that agrees with it. Files that it does not name (of runs that
earlier releases made) are read unchecked.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from moda.checks import digest, items, mapping
from moda.files import LARGEST_TENSORS, Format, FormatError, read_bytes, sha256_of, write_bytes

__all__ = ["CHECKSUMS", "read_checked", "write_checked"]

CHECKSUMS = Format("moda-checksums", {"files": mapping(items(digest, least=1, most=2))})
NAME = "checksums.json"


def write_checked(folder: Path, path: Path, data: bytes) -> None:
    """Write a file in a run's folder, atomically, and note its SHA-256."""
    known, name = _known(folder), path.relative_to(folder).as_posix()
    new = hashlib.sha256(data).hexdigest()
    old = _present(path, known.get(name, []))
    _note(folder, known | {name: list(dict.fromkeys([*old, new]))})
    write_bytes(path, data)
    _note(folder, known | {name: [new]})


def read_checked(folder: Path, path: Path, largest: int = LARGEST_TENSORS) -> bytes:
    """Read a file of a run's folder.

    Raises:
        FormatError: it is missing, too large, or not the file that was written.
    """
    data = read_bytes(path, largest)
    expected = _known(folder).get(path.relative_to(folder).as_posix())
    found = hashlib.sha256(data).hexdigest()
    if expected is not None and found not in expected:
        raise FormatError(
            f"{path}: its SHA-256 is {found}, {folder / NAME} says {' or '.join(expected)}: it was damaged or changed"
        )
    return data


def _known(folder: Path) -> dict[str, list[str]]:
    if not (folder / NAME).exists():
        return {}
    files: dict[str, list[str]] = CHECKSUMS.read(folder / NAME)["files"]
    return files


def _present(path: Path, noted: list[str]) -> list[str]:
    """The digest of the file as it is; read from it where a kill has left two possible ones, or none is noted."""
    if not path.exists():
        return []
    return noted if len(noted) == 1 else [sha256_of(path)]


def _note(folder: Path, files: dict[str, list[str]]) -> None:
    CHECKSUMS.write(folder / NAME, {"files": files})
