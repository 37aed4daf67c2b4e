"""Every Python snippet of README and the docs runs as it stands, and every command line in them is one that moda takes.

A page's snippets run one after the other in one namespace, which begins with the set-up that docs/how-to/set_up.md shows;
pages that need nothing before them begin with an empty one.
"""

from __future__ import annotations

import re
import shlex
import socket
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from moda.cli.app import commands as moda_commands

ROOT = Path(__file__).resolve().parents[2]
SET_UP = "docs/how-to/set_up.md"
WHOLE = {"README.md", "docs/tutorial.md", SET_UP}
"""Pages that bring everything with them."""
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NEEDS = re.compile(r"^(?:import|from) (lightning|onnxruntime|onnx|transformers)", re.MULTILINE)
COMMAND = re.compile(r"(?:[A-Z_]+=\S+ )*(?:moda|make|torchrun|python3?) ")
LONGEST = 130
"""Characters of a line of a snippet: more would be cut off on the site."""


def blocks(page: str, *languages: str) -> list[str]:
    """The fenced blocks of a page that are in one of these languages."""
    return [text for language, text in FENCE.findall((ROOT / page).read_text("utf-8")) if language in languages]


def command_lines(page: str) -> list[list[str]]:
    """The command lines of a page as words, without comments and what a shell puts around them."""
    lines = "".join(blocks(page, "", "sh")).replace("\\\n", " ").splitlines()
    stripped = (line.partition("; done")[0].strip() for line in lines)
    return [shlex.split(line, comments=True) for line in stripped if COMMAND.match(line)]


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch):
    """As torchrun starts one process."""
    values = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def run(page: str, text: str, namespace: dict[str, Any]) -> None:
    """Run one snippet; an error names the page's line."""
    line = (ROOT / page).read_text("utf-8").partition(text)[0].count("\n")
    exec(compile("\n" * line + text, page, "exec"), namespace)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
@pytest.mark.usefixtures("one_process")
def test_snippets_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    snippets = blocks(page, "python")
    for package in NEEDS.findall("".join(snippets)):
        pytest.importorskip(package)
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "snippets"}
    if page not in WHOLE:
        run(SET_UP, *blocks(SET_UP, "python"), namespace)
    for text in snippets:
        run(page, text, namespace)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_snippets_fit_the_page(page: str):
    assert [line for text in blocks(page, "python") for line in text.splitlines() if len(line) > LONGEST] == []


MESSAGE = re.compile(r"^\| `([^`]+)` \|", re.MULTILINE)


@pytest.mark.parametrize("page", ["docs/troubleshooting.md", "docs/build.md"])
def test_messages_that_pages_explain_are_given(page: str):
    """Each is in a source as it stands: a message that was reworded would be searched for in vain."""
    folders = (ROOT / "python", ROOT / "moda_kernels")
    sources = [*(path for folder in folders for path in folder.rglob("*.py")), ROOT / "setup.py"]
    text = "".join(path.read_text("utf-8") for path in sources)
    joined = re.sub(r"""["']\s*\n\s*f?["']""", "", text)
    wanted = (ROOT / page).read_text("utf-8").rpartition("| message | what to do |")[2]
    found = [message for message in MESSAGE.findall(wanted) if message != "message"]
    assert len(found) >= 5
    assert [message for message in found if message not in joined] == []


def moda_lines() -> list[tuple[str, list[str]]]:
    """Every command line of moda in the docs: the page, and the words behind `moda`."""
    found = []
    for page in PAGES:
        for words in command_lines(page):
            if "moda" in words:
                found.append((page, words[words.index("moda") + 1 :]))
    return found


@pytest.mark.parametrize(("page", "words"), moda_lines(), ids=str)
def test_command_lines_are_understood(page: str, words: list[str]):
    """The parser of the command takes them; nothing is run."""
    if words[0].startswith("--"):
        assert words[0] in {"--install-completion", "--show-completion", "--version"}
        return
    command = moda_commands()[words[0]].load()
    command.make_context(words[0], list(words[1:]))


def test_targets_and_modules_in_command_lines_are_there():
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for page in PAGES:
        for words in command_lines(page):
            if words[0] == "make":
                assert re.search(rf"^{re.escape(words[1])}:", makefile, re.MULTILINE), (page, words)
            if "-m" in words and words[words.index("-m") + 1].startswith("benchmarks"):
                assert find_spec(words[words.index("-m") + 1]), (page, words)
            if words[0] in {"python", "python3"} and words[1].endswith(".py"):
                assert (ROOT / words[1]).exists(), (page, words)
