"""Puts the `moda` command together, and is its entry point."""

from __future__ import annotations

import importlib
import sys
import traceback
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from moda.cli.commands import Deferred, Interrupted

INTERRUPTED = 130  # what a shell reports for a command stopped by Ctrl-C
STUDY = "The paper's study"


def commands() -> dict[str, Deferred]:
    """Give all commands by name, in the order in which the help lists them."""
    listed = (
        Deferred("train", "moda.cli.training", "train"),
        Deferred("decompose", "moda.cli.modules", "decompose"),
        Deferred("modularize", "moda.cli.comparison", "modularize"),
        Deferred("compose", "moda.cli.modules", "compose"),
        Deferred("evaluate", "moda.cli.modules", "evaluate"),
        Deferred("doctor", "moda.cli.machine", "doctor"),
        Deferred("bench", "moda.cli.machine", "bench"),
        Deferred("demo", "moda.cli.demo", "demo"),
        Deferred("reuse", "moda.cli.study", "reuse", panel=STUDY),
        Deferred("analyze", "moda.cli.study", "analyze", panel=STUDY),
        Deferred("sweep", "moda.cli.study", "sweep", panel=STUDY),
        Deferred("replace", "moda.cli.replacement", "replace", panel=STUDY),
        Deferred("repair", "moda.cli.replacement", "replace", hidden=True),
        Deferred("export", "moda.cli.files", "export", panel=STUDY),
        Deferred("import", "moda.cli.files", "import_published", panel=STUDY),
        Deferred("study", "moda.cli.study", "study", panel=STUDY),
        Deferred("compare", "moda.cli.comparison", "compare", panel=STUDY),
        Deferred("report", "moda.cli.report", "report", panel=STUDY),
    )
    return {str(command.name): command for command in listed}


class _Moda(TyperGroup):
    """The main command, with all others below it."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        for command in commands().values():
            self.add_command(command)


app = typer.Typer(
    name="moda",
    cls=_Moda,
    help="Train modular, decompose, recombine: modular training of neural networks (MODA, arXiv 2411.01074).",
    epilog="Start with: moda demo",
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(asked: bool) -> None:
    if asked:  # the package imports PyTorch, which nothing else here needs
        print(f"moda-kernels {importlib.import_module('moda_kernels').__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback too when there is an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Declare --debug for the help alone: `main` takes it from anywhere on the command line."""


def main() -> None:
    """Run the command that the command line names; an error is one line on stderr.

    The exit status is 0, or 1 after an error, 2 for a command line that makes no sense, 130 after Ctrl-C.
    """
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    arguments = arguments or ["--help"]
    try:
        status = app(args=arguments, prog_name="moda", standalone_mode=False)
    except Interrupted as interrupt:
        _fail(str(interrupt), INTERRUPTED, debug=debug)
    except typer.Abort:
        status = INTERRUPTED
    except Exception as error:
        # The parser's own errors (no such option, missing argument, ...) have a message without its decoration.
        usage = getattr(error, "format_message", None)
        message = usage() if usage else str(error) or type(error).__name__
        _fail(message, 2 if usage else 1, debug=debug)
    if status == INTERRUPTED:  # Ctrl-C where it left nothing to say
        _fail("interrupted", INTERRUPTED, debug=debug)
    sys.exit(status if isinstance(status, int) else 0)


def _fail(message: str, status: int, *, debug: bool) -> NoReturn:
    if debug:
        traceback.print_exc()
    # Blanks inside a line stay: they may be part of a path, and of a command line to copy.
    print(f"moda: {' '.join(line.strip() for line in message.splitlines())}", file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    main()
