"""Command lines in messages: a shell reads them as the words that were meant."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from moda.hints import command_line

NAMES = (
    "run",
    "my run",
    "two  blanks",
    "é",
    "日本",
    "it's",
    'a"b',
    "$HOME",
    "`id`",
    "a;b",
    "a&b",
    "(x)",
    "~",
    "*",
    "a\\b",
    "#x",
)


@pytest.mark.parametrize("name", NAMES)
def test_words_come_back(name):
    assert shlex.split(command_line("decompose", Path(name), "--rule", "share")) == [
        "moda",
        "decompose",
        name,
        "--rule",
        "share",
    ]


@pytest.mark.skipif(shutil.which("sh") is None, reason="needs a shell")
def test_a_shell_reads_them():
    line = command_line(*map(Path, NAMES)).removeprefix("moda ")
    read = subprocess.run(["sh", "-c", f"printf '%s\\n' {line}"], capture_output=True, check=True).stdout
    assert read.decode().splitlines() == list(NAMES)


def test_a_path_that_looks_like_an_option():
    assert command_line("evaluate", Path("-c")) == "moda evaluate ./-c"
    assert command_line("evaluate", Path("x"), "-c", "1") == "moda evaluate x -c 1"
