"""Lets a command be declared in a file of its own, which is loaded only when the command is used.

A command's file imports PyTorch. `moda --help` must not, so that it answers at once: the main command knows of each
command only its name and the file it is in, and reads the line that the help shows out of that file's source.
"""

from __future__ import annotations

import ast
import importlib
from functools import cache
from importlib.util import find_spec
from typing import Any

import typer
from typer.core import TyperCommand
from typer.main import get_group


class Interrupted(Exception):  # noqa: N818
    """Ctrl-C was pressed, and there is something to say; typer swallows a KeyboardInterrupt and its message."""


def group() -> typer.Typer:
    """Make what the commands of a file are added to; the file names it `commands`."""
    return typer.Typer(rich_markup_mode="rich", pretty_exceptions_enable=False)


def example(*lines: str) -> str:
    """Give command lines as the help shows them."""
    return "[bold]Examples[/bold]\n\n" + "\n\n".join(f"[cyan]$ {line}[/cyan]" for line in lines)


class Deferred(TyperCommand):
    """A command whose file is imported when the command is used.

    Args:
        name: the name of the command.
        module: its file; a command of that name belongs to the file's `commands`.
        function: the function in that file; the first line of its docstring is what the main help shows.
        panel: the panel of the main help that lists it; None means the general one.
        hidden: whether the main help leaves the command out.
    """

    def __init__(
        self, name: str, module: str, function: str, *, panel: str | None = None, hidden: bool = False
    ) -> None:
        summary = None if hidden else _summaries(module)[function]
        super().__init__(name, help=summary, rich_help_panel=panel, hidden=hidden)
        self._module = module

    def load(self) -> Any:
        """Import the command's file, and give the command itself."""
        command = get_group(importlib.import_module(self._module).commands).commands[str(self.name)]
        command.help = _flowing(command.help or "")
        return command

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        """Hand over to the command itself, which parses the command line and then runs."""
        return self.load().make_context(*args, **kwargs)


def _flowing(text: str) -> str:
    """Join the lines of each paragraph, so that the help breaks them where the terminal ends."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))


@cache
def _summaries(module: str) -> dict[str, str | None]:
    """Read the first line of each function's docstring in a module that is not imported."""
    spec = find_spec(module)
    source = spec.loader.get_source(module) if spec and spec.loader else None  # type: ignore[attr-defined]
    functions = [node for node in ast.parse(source or "").body if isinstance(node, ast.FunctionDef)]
    return {node.name: (ast.get_docstring(node) or "").partition("\n")[0] for node in functions}
