"""Files that a reader may trust: written whole or not at all, read without running anything in them."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import pickle
import secrets
import stat
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from moda.checks import Check, record, text
from moda_kernels import __version__

__all__ = [
    "Format",
    "FormatError",
    "as_path",
    "check_own_folder",
    "check_result_file",
    "check_result_folder",
    "check_study_folder",
    "check_tensors",
    "format_errors",
    "is_partial",
    "is_temporary",
    "meant",
    "parse_json",
    "parse_tensors",
    "parse_torch",
    "read_bytes",
    "read_csv",
    "read_tensors",
    "remove_partial_files",
    "sha256_of",
    "sha256_of_bytes",
    "tensor_bytes",
    "write_bytes",
    "write_errors",
    "write_json",
    "write_tensors",
]

PARTIAL = ".moda-partial"
"""How the name of a file ends that is being written, beside its place; see `write_bytes`."""
NEXT = ".moda-next"
"""How the name of a file ends that waits until its description is written; see `Format.write_with`."""
LOCK = ".moda-lock"
"""How the name of a lock ends; see `moda.runs.lock`."""

LONGEST_MESSAGE = 1000
LONGEST_VERSION = 200
HEADER = 200
"""Bytes within which a file of ours names its format."""
LARGEST_JSON = 1 << 28
LARGEST_TABLE = 1 << 30
LARGEST_TENSORS = 1 << 36
"""Bytes of a file that is read: what is larger is refused before memory is taken for it."""


class FormatError(ValueError):
    """A file or folder is not what it should be; the message names it and says what is wrong.

    What was found may be of any length: a message is cut off at a thousand characters.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message if len(message) <= LONGEST_MESSAGE else f"{message[:LONGEST_MESSAGE]}...")


@contextmanager
def format_errors(path: Path | str) -> Iterator[None]:
    """Turn what is raised by the values that the file `path` holds into a FormatError that names the file."""
    try:
        yield
    except FormatError:
        raise
    except KeyError as error:
        raise FormatError(f"{path}: entry {error} is missing") from None
    except (TypeError, ValueError, OverflowError) as error:
        raise FormatError(f"{path}: {error}") from None


def as_path(name: str, value: Any) -> Path:
    """Give the path that a value is.

    Raises:
        TypeError, ValueError: it is no path, or none that a system can have; the message begins with `name`.
    """
    path = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(path, str):
        raise TypeError(f"{name}: expected a path, got {type(value).__name__}")
    try:
        encoded = os.fsencode(path)
    except UnicodeEncodeError:
        encoded = b"\0"
    if b"\0" in encoded:
        raise ValueError(f"{name}: expected a path that a file can have, got {path!a:.200}")
    return Path(path)


# ---- where results may go ----------------------------------------------------------------------------------------


def check_result_folder(folder: Path, description: str, *, force: bool) -> None:
    """Raise ValueError unless a folder may take a result whose description is the file `description`.

    It may be new or empty, or, with `force`, hold such a result already.
    """
    if not folder.is_dir():
        if folder.exists():
            raise ValueError(f"{folder}: expected a folder, found a file")
        return
    if (folder / description).exists():
        if not force:
            raise ValueError(f"{folder}: holds a result already; replace it with --force, or choose another folder")
    elif not all(map(is_temporary, folder.iterdir())):
        raise ValueError(f"{folder}: is not empty and holds no {description}; choose another folder")


DESCRIPTIONS = (
    *("config.json", "decomposition.json", "rates.json", "composed.json", "ensemble.json"),
    *("study.json", "replacement.json", "repair.json", "comparison.json"),
)
"""Files that say what a folder of ours is."""


def check_own_folder(folder: Path, description: str) -> None:
    """Raise ValueError if a folder is one of ours already, but not one that `description` describes."""
    others = [name for name in DESCRIPTIONS if name != description and (folder / name).exists()]
    if others and not (folder / description).exists():
        raise ValueError(f"folder: {folder} is of another kind (it has {others[0]}); choose another folder")


def check_study_folder(folder: Path, description: str, *begun: str) -> None:
    """Raise ValueError unless a folder may take a study, which goes on there after a kill.

    Args:
        folder: the folder; it may be new or empty.
        description: the file that says what a study is; a folder that has it may take one.
        begun: patterns of the names that a study has in its folder before there is a description.
    """
    if not folder.is_dir():
        if folder.exists():
            raise ValueError(f"{folder}: expected a folder, found a file")
        return
    check_own_folder(folder, description)
    names = (description, *begun)
    if not all(map(is_temporary, folder.iterdir())) and not any(any(folder.glob(name)) for name in names):
        raise ValueError(f"{folder}: is not empty and holds no {description}; choose another folder")


def check_result_file(path: Path, *, force: bool, begins: bytes = b"") -> None:
    """Raise ValueError unless a result may be written to `path`.

    Args:
        path: the file.
        force: whether it may replace one that is there.
        begins: what files of the result's format begin with; no other one is replaced, whatever is asked for.
    """
    if path.is_dir():
        raise ValueError(f"{path}: expected a file, found a folder")
    if not path.exists():
        return
    if not force:
        raise ValueError(f"{path}: exists already; replace it with --force, or choose another name")
    if _beginning(path, len(begins)) != begins:
        raise ValueError(f"{path}: holds something else than such a result; choose another name")


def _beginning(path: Path, length: int) -> bytes:
    with _opened(path, sys.maxsize) as file:
        return bytes(file.read(length))


# ---- writing -----------------------------------------------------------------------------------------------------


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path` so that a crash at any moment leaves the old file or the new one, never a part of it.

    It is written beside its place first, as `.<name>.<random>.moda-partial`, flushed to disk and then renamed.

    Raises:
        OSError: it cannot be written; the error names `path`.
    """
    partial = path.parent / f".{path.name[:50]}.{secrets.token_hex(4)}{PARTIAL}"
    with write_errors(path):
        try:
            with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except BaseException:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            raise


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Turn an OSError while something is written into one that names `path`, the file or folder that was meant."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


@contextmanager
def meant(temporary: Path, place: Path) -> Iterator[None]:
    """Turn an OSError that names something in a temporary folder into one that names it in the folder's place."""
    try:
        yield
    except OSError as error:
        named = Path(error.filename or place)
        path = place / named.relative_to(temporary) if named.is_relative_to(temporary) else named
        raise OSError(error.errno, error.strerror, str(path)) from None


def _next(path: Path) -> Path:
    return path.with_name(f".{path.name}{NEXT}")


def _take_places(description: Path, names: Iterable[str]) -> None:
    """Put files in their places that a kill has left waiting, if they are what the description is of."""
    described = description.read_bytes() if description.is_file() else b""
    for name in names:
        waiting = _next(description.with_name(name))
        if waiting.is_file() and sha256_of(waiting).encode() in described:
            with write_errors(description.with_name(name)):
                waiting.replace(description.with_name(name))


def is_partial(path: Path) -> bool:
    """Whether a file is one that `write_bytes` had not finished when its process was killed."""
    return path.name.startswith(".") and path.name.endswith(PARTIAL)


def is_temporary(path: Path) -> bool:
    """Whether a file is there only while a process of ours writes, or is what a killed one has left: no content."""
    return path.name.startswith(".") and path.name.endswith((PARTIAL, NEXT, LOCK))


def remove_partial_files(folder: Path) -> None:
    """Remove what a killed process left of files it was writing; nothing else."""
    if folder.is_dir():
        for path in folder.iterdir():
            if is_partial(path) and not path.is_dir():
                path.unlink(missing_ok=True)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object, indented, atomically.

    Raises:
        TypeError, ValueError: `value` holds something that JSON has no word for (a tensor, NaN).
    """
    write_bytes(path, _json(value))


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, allow_nan=False) + "\n").encode()


def tensor_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """Tensors in safetensors format."""
    return safetensors.torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})


def sha256_of_bytes(data: bytes) -> str:
    """SHA-256 in hex."""
    return hashlib.sha256(data).hexdigest()


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write tensors in safetensors format, atomically; returns the file's SHA-256 in hex."""
    data = tensor_bytes(tensors)
    write_bytes(path, data)
    return hashlib.sha256(data).hexdigest()


# ---- reading -----------------------------------------------------------------------------------------------------


def read_bytes(path: Path, largest: int) -> bytes:
    """The content of a regular file of at most `largest` bytes.

    Raises:
        FormatError: it is missing, cannot be read, is larger, or is no regular file (a pipe would never end).
    """
    with _opened(path, largest) as file:
        return bytes(file.read())


def sha256_of(path: Path, largest: int = LARGEST_TENSORS) -> str:
    """SHA-256 of a regular file, in hex, a piece at a time.

    Raises:
        FormatError: as `read_bytes`.
    """
    with _opened(path, largest) as file:
        digest = hashlib.sha256()
        while piece := file.read(1 << 20):
            digest.update(piece)
        return digest.hexdigest()


@contextmanager
def _opened(path: Path, largest: int) -> Iterator[Any]:
    try:
        # Opening a pipe would wait for a writer, and a terminal could become this process's.
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0))
    except (FileNotFoundError, NotADirectoryError):
        raise FormatError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the name
        raise FormatError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    try:
        _check_regular(path, os.fstat(handle), largest)
    except FormatError:
        os.close(handle)
        raise
    with os.fdopen(handle, "rb") as file:
        try:
            yield file
        except OSError as error:
            raise FormatError(f"{path}: cannot be read: {error.strerror}") from None


def _check_regular(path: Path, status: os.stat_result, largest: int) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "no regular file"
        raise FormatError(f"{path}: cannot be read: it is {kind}")
    if status.st_size > largest:
        raise FormatError(f"{path}: expected at most {largest} bytes, got {status.st_size}")


def parse_json(path: Path | str, data: bytes) -> dict[str, Any]:
    """The JSON object in `data`, which the file `path` holds.

    Raises:
        FormatError: it is not UTF-8 or no JSON object, names an entry twice, is nested too deep, or holds NaN.
    """
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_object, parse_constant=_no_constant)
    except RecursionError:
        raise FormatError(f"{path}: not JSON: its lists and objects are nested too deep") from None
    except ValueError as error:
        raise FormatError(f"{path}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise FormatError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"entry {twice!r} is there twice")
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def read_csv(path: Path) -> tuple[tuple[str, ...], list[dict[str, str]]]:
    """Columns and rows of a CSV file with a header; a last line whose writing was cut short is left out.

    A row that is too short has None in its last columns, one that is too long has a column None.

    Raises:
        FormatError: it is missing, no text in UTF-8, or no CSV.
    """
    data = read_bytes(path, LARGEST_TABLE)
    try:
        text = data[: data.rfind(b"\n") + 1].decode("utf-8")
        reader = csv.DictReader(io.StringIO(text, newline=""))
        columns = tuple(reader.fieldnames or ())
        if len(set(columns)) != len(columns):
            raise ValueError("a column is there twice")
        return columns, list(reader)
    except (ValueError, csv.Error) as error:
        raise FormatError(f"{path}: not a CSV file: {error}") from None


@dataclass(frozen=True)
class Format:
    """A kind of JSON file: its header, and what it must hold.

    Attributes:
        name: what its "format" says.
        fields: entries that it must have, each with its check.
        optional: entries that it may have, each with its check. Further ones are let through.
        version: the "format_version" that is written.
        formerly: what earlier releases called the same format.
        renamed: entries that earlier releases called otherwise, by that name.
        upgrades: for each earlier version that can be read still, a function of that version's entries that gives
            those of the next one.
        largest: bytes of the file.
    """

    name: str
    fields: Mapping[str, Check]
    optional: Mapping[str, Check] = field(default_factory=dict)
    version: int = 1
    formerly: str | None = None
    renamed: Mapping[str, str] = field(default_factory=dict)
    upgrades: Mapping[int, Callable[[dict[str, Any]], dict[str, Any]]] = field(default_factory=dict)
    largest: int = LARGEST_JSON

    def header(self) -> dict[str, Any]:
        """The entries that every file of ours begins with."""
        return {"format": self.name, "format_version": self.version, "library_version": __version__}

    def write(self, path: Path, entries: Mapping[str, Any]) -> None:
        """Write the header and the entries, atomically.

        Raises:
            TypeError, ValueError: an entry is not as the format says, or `path` is a file of another format.
            OSError: it cannot be written; the error names `path`.
        """
        data = self.to_bytes(entries)
        self.check_replaceable(path)
        write_bytes(path, data)

    def write_with(self, path: Path, entries: Mapping[str, Any], files: Mapping[str, bytes]) -> None:
        """Write a description and the files beside it whose hashes it has: a kill leaves the old result or the new one.

        The files are written as `.<name>.moda-next` first. Writing the description is the moment from which the new
        result holds; then they take the places of the old ones. `read_tensors` takes one that has not got that far.

        Args:
            path: the description; its folder is made if need be.
            entries: as `write`.
            files: the contents of the other files by name.

        Raises:
            TypeError, ValueError, OSError: as `write`; an OSError names the file.
        """
        data = self.to_bytes(entries)
        self.check_replaceable(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_partial_files(path.parent)
        _take_places(path, files)
        try:
            for name, content in files.items():
                with write_errors(path.with_name(name)):
                    write_bytes(_next(path.with_name(name)), content)
            write_bytes(path, data)
        except BaseException:
            with suppress(OSError):
                for name in files:
                    _next(path.with_name(name)).unlink(missing_ok=True)
            raise
        for name in files:
            with write_errors(path.with_name(name)):
                _next(path.with_name(name)).replace(path.with_name(name))

    def check_replaceable(self, path: Path) -> None:
        """Raise ValueError if something is there that is not of this format; a damaged file of it is no loss."""
        if not path.exists():
            return
        data = read_bytes(path, self.largest)
        names = [name for name in (self.name, self.formerly) if name is not None]
        try:
            there = parse_json(path, data).get("format")
        except FormatError:
            if not data or any(f'"{name}"'.encode() in data[:HEADER] for name in names):
                return
            raise ValueError(f"{path}: is a file of another kind (no JSON object); choose another name") from None
        if there not in names:
            raise ValueError(f"{path}: is a file of another kind (format {there!r:.80}); choose another name")

    def to_bytes(self, entries: Mapping[str, Any]) -> bytes:
        """What `write` writes."""
        return _json({**self.header(), **record(self.fields, self.optional)("", entries)})

    def read(self, path: Path) -> dict[str, Any]:
        """The entries of a file, as those of the version that is written today.

        Raises:
            FormatError: it is missing, malformed, of another format or version; the message names the file, and the
                entry that is wrong.
        """
        return self.parse(path, read_bytes(path, self.largest))

    def parse(self, path: Path | str, data: bytes) -> dict[str, Any]:
        """`read` of bytes that are there already; `path` is for messages."""
        value = parse_json(path, data)
        if value.get("format") not in (self.name, self.formerly or self.name):
            raise FormatError(f'{path}: expected "format": "{self.name}", got {value.get("format")!r:.80}')
        version = value.get("format_version")
        known = sorted([*self.upgrades, self.version])
        if type(version) is not int or version not in known:
            raise FormatError(
                f"{path}: expected format_version {' or '.join(map(str, known))}, got {version!r:.80}; "
                "read it with the moda-kernels version that wrote it "
                f"({value.get('library_version', 'not recorded')!s:.80})"
            )
        with format_errors(path):
            if "library_version" in value:
                text(longest=LONGEST_VERSION)("library_version", value["library_version"])
            for earlier in range(version, self.version):
                value = self.upgrades[earlier](value)
            value = {self.renamed.get(name, name): entry for name, entry in value.items()}
            return dict(record(self.fields, self.optional)("", value))


def read_tensors(
    path: Path, sha256: str | None = None, shapes: Mapping[str, tuple[int, ...]] | None = None
) -> dict[str, Tensor]:
    """Read a safetensors file onto the CPU; nothing in it is unpickled or run.

    Args:
        path: the file.
        sha256: what `write_tensors` returned, if known.
        shapes: of every tensor that it must hold, if known: no larger file is then taken into memory.

    Raises:
        FormatError: it is missing, malformed, or not the file that `sha256` is of.
    """
    largest = LARGEST_TENSORS if shapes is None else _most_bytes(shapes)
    if sha256 is not None and _next(path).exists():  # a kill came between a description and the file that it describes
        data = read_bytes(_next(path), largest)
        if hashlib.sha256(data).hexdigest() == sha256:
            return parse_tensors(path, data)
    data = read_bytes(path, largest)
    found = hashlib.sha256(data).hexdigest()
    if sha256 is not None and found != sha256:
        raise FormatError(
            f"{path}: its SHA-256 is {found}, the description beside it is of {sha256}: "
            "damaged, or from another save than the description"
        )
    return parse_tensors(path, data)


def parse_tensors(path: Path, data: bytes) -> dict[str, Tensor]:
    """The tensors in `data`, which the safetensors file `path` holds.

    Raises:
        FormatError: it is malformed.
    """
    try:
        return dict(safetensors.torch.load(data))
    except (SafetensorError, KeyError, ValueError, TypeError, OverflowError, RuntimeError) as error:
        raise FormatError(f"{path}: not a safetensors file: {error}") from None


def _most_bytes(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Of a file with these tensors, of any dtype: 16 bytes an element, and room for the header."""
    elements = 0
    for shape in shapes.values():
        count = 1
        for extent in shape:
            count *= extent
        elements += count
    return min(LARGEST_TENSORS, 16 * elements + (1 << 20) + sum(len(name) + 200 for name in shapes))


def parse_torch(path: Path, data: bytes) -> Any:
    """The value in `data`, which the file `path` of PyTorch's own format holds: tensors and plain values, on the CPU.

    Nothing in it is run, and it takes no more memory than the file does: PyTorch stores tensors as they are, so that
    compressed entries, and tensors that repeat a few stored numbers, are not its work.

    Raises:
        FormatError: it is malformed, or holds anything else.
    """
    try:
        _refuse_compressed(data)
        value = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        _refuse_expanded(value)
    except Exception as error:  # a malformed file makes the reader stumble in many ways
        # PyTorch's own words advise to switch the protection off.
        unsafe = isinstance(error, pickle.UnpicklingError) and "weights_only" in str(error).lower()
        reason = "it holds more than tensors and plain values" if unsafe else str(error).strip().partition("\n")[0]
        raise FormatError(
            f"{path}: not a file of tensors alone, and so not read: {reason or type(error).__name__}"
        ) from None
    return value


def _refuse_compressed(data: bytes) -> None:
    if data[:2] != b"PK":  # older files are no archives
        return
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise ValueError("it holds compressed entries")


def _refuse_expanded(value: Any) -> None:
    """Go through lists and mappings, each once, without recursion: they may hold themselves."""
    waiting, seen, total = [value], set(), 0
    storages: dict[int, int] = {}
    while waiting:
        item = waiting.pop()
        if isinstance(item, Tensor):
            stored = item.untyped_storage()
            storages[stored.data_ptr()] = stored.nbytes()
            total += item.numel() * item.element_size()
        elif id(item) not in seen and isinstance(item, Mapping | list | tuple):
            seen.add(id(item))
            waiting += [*item.keys(), *item.values()] if isinstance(item, Mapping) else item
    if total > 4 * sum(storages.values()):  # shared weights count once for each name
        raise ValueError(f"its tensors have {total} bytes, of which {sum(storages.values())} are stored")


def check_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype | None = None,
) -> None:
    """Raise FormatError unless a file holds tensors of these names, shapes and dtype, and in a bool tensor 0 and 1."""
    if tensors.keys() != shapes.keys():
        missing, unknown = sorted(shapes.keys() - tensors.keys()), sorted(tensors.keys() - shapes.keys())
        raise FormatError(f"{path}: expected other tensors: missing {missing}, unknown {unknown}")
    for name, shape in shapes.items():
        tensor = tensors[name]
        if tuple(tensor.shape) != shape or (dtype and tensor.dtype != dtype):
            kind = f"{str(dtype).removeprefix('torch.')} " if dtype else ""
            raise FormatError(f"{path}: {name}: expected {kind}{shape}, got {tensor.dtype} {tuple(tensor.shape)}")
        if tensor.dtype == torch.bool and tensor.numel() and int(tensor.view(torch.uint8).max()) > 1:
            raise FormatError(f"{path}: {name}: expected bytes 0 and 1 in a bool tensor, got others")
