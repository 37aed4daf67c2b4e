"""The folder of a demo: what may be in it, and how a new demo takes the place of an earlier one.

demo.html      the page
demo.png       its figures as a picture
results.json   its numbers
runs/          seed-<s>/standard and seed-<s>/modular, the trained runs
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moda.demo.results import DEMO
from moda.files import NEXT, PARTIAL, FormatError, is_temporary, meant
from moda.runs.lock import locked

__all__ = ["PAGE", "PICTURE", "RESULTS", "RUNS", "check_demo_folder", "replaced"]

RUNS, PAGE, PICTURE, RESULTS = "runs", "demo.html", "demo.png", "results.json"
_MAKING = f".demo{PARTIAL}"
"""Where a demo is made, within its folder."""
_MADE = f".demo{NEXT}"
"""Where a demo waits that is made but for its place."""


def check_demo_folder(folder: Path, *, force: bool) -> None:
    """Raise ValueError unless a folder may take a demo.

    It may be new or empty, or, with `force`, hold an earlier demo and nothing else.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: expected a folder, found a file")
    if not folder.exists() or (all(map(is_temporary, folder.iterdir())) and not (folder / _MADE).exists()):
        return
    strangers = _strangers(folder)
    if strangers:
        raise ValueError(f"{folder}: holds {strangers[0]!r}, which no demo made; choose another folder")
    if not force:
        raise ValueError(f"{folder}: holds a demo already; replace it with --force, or choose another folder")


def _strangers(folder: Path) -> list[str]:
    """Names in a folder of what is no part of a demo; without a demo's numbers everything is."""
    names = sorted(path.name for path in folder.iterdir() if not is_temporary(path))
    try:
        DEMO.read(folder / RESULTS)
    except FormatError:
        return names
    own = (RUNS, PAGE, PICTURE, RESULTS)
    within = [path.relative_to(folder).as_posix() for path in sorted((folder / RUNS).glob("*/*"))]
    others = [name for name in within if not re.fullmatch(rf"{RUNS}/seed-\d+/(standard|modular)", name)]
    return [name for name in names if name not in own] + others


@contextmanager
def replaced(folder: Path) -> Iterator[Path]:
    """Make a demo in the folder that is given, which takes its place in `folder` when the block ends.

    Where the block raises, what `folder` holds stays as it is. A kill leaves the earlier demo or, from the moment at
    which the new one is whole, one whose parts take their places when this is called next.

    Raises:
        ValueError: `folder` holds something else than a demo, or another process is making one there.
    """
    check_demo_folder(folder, force=True)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        _take_places(folder)
        making = folder / _MAKING
        _remove(making)
        try:
            with meant(making, folder):
                making.mkdir()
                yield making
                making.rename(folder / _MADE)
        except BaseException:
            _remove(making)
            raise
        _take_places(folder)


def _take_places(folder: Path) -> None:
    """Put the parts of a demo that is made in the places of those of an earlier one."""
    made = folder / _MADE
    if not made.is_dir():
        return
    for part in sorted(made.iterdir()):
        place = folder / part.name
        with meant(made, folder):
            if part.is_dir() and place.exists():
                _remove(folder / _MAKING)
                place.rename(folder / _MAKING)
            part.replace(place)
    made.rmdir()
    _remove(folder / _MAKING)


def _remove(path: Path) -> None:
    if path.exists():
        shutil.rmtree(path)
