"""Writes command lines that a reader can copy, whatever is in the paths that they name."""

from __future__ import annotations

import shlex
from pathlib import Path

__all__ = ["command_line"]


def command_line(*words: str | Path) -> str:
    """Give a `moda` command line that a POSIX shell splits into exactly these words.

    A path that begins with a dash is written so that it is not taken for an option.

    >>> command_line("decompose", Path("my runs"), "--rule", "share")
    "moda decompose 'my runs' --rule share"
    >>> command_line("evaluate", Path("-run"))
    'moda evaluate ./-run'
    """
    return shlex.join(["moda", *map(_word, words)])


def _word(word: str | Path) -> str:
    return f"./{word}" if isinstance(word, Path) and str(word).startswith("-") else str(word)
