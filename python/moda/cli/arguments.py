"""Declares arguments and options that several commands share, and reads their text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, TypeAlias

import typer

RunArgument: TypeAlias = Annotated[Path, typer.Argument(help="The run folder.", show_default=False)]
DecomposedRun: TypeAlias = Annotated[
    Path, typer.Argument(help="The run folder; the run must be decomposed.", show_default=False)
]
DeviceOption: TypeAlias = Annotated[
    str, typer.Option("--device", help="The device to compute on: auto, cpu, cuda, cuda:1, ...")
]
ClassesOption: TypeAlias = Annotated[
    str, typer.Option("--classes", "-c", help="Names or indices, separated by commas.", show_default=False)
]
OptionalClasses: TypeAlias = Annotated[
    str | None, typer.Option("--classes", "-c", help="Names or indices, separated by commas.", show_default=False)
]
ForceOption: TypeAlias = Annotated[bool, typer.Option("--force", help="Replace a result that is there already.")]
TasksOption: TypeAlias = Annotated[
    str, typer.Option("--tasks", help="auto (all subsets of up to 12 classes, else sampled), all, or sampled.")
]
PER_SIZE = "At most this many sub-tasks of each size, drawn at random."


def parse_classes(text: str, names: Sequence[str]) -> list[int]:
    """Read class indices from "cat,dog" or "3,5"; a word that is a class's name is that class, else it is an index.

    Raises:
        ValueError: a word is neither, or a class comes twice.
    """
    chosen = []
    for word in (part.strip() for part in text.split(",")):
        if word in names:
            chosen.append(names.index(word))
        elif word.isdigit() and int(word) < len(names):
            chosen.append(int(word))
        else:
            known = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
            raise ValueError(f"--classes: expected names or indices of {len(names)} classes ({known}), got {word!r}")
    twice = sorted({names[index] for index in chosen if chosen.count(index) > 1})
    if twice:
        raise ValueError(f"--classes: expected every class once, got {', '.join(twice)} more than once")
    return chosen


def parse_integers(option: str, text: str) -> tuple[int, ...]:
    """Read integers from "2,3".

    Raises:
        typer.BadParameter: a word is no integer; the message names the option.
    """
    return tuple(int(number) for number in _parsed(option, text, int))


def parse_numbers(option: str, text: str) -> tuple[float, ...]:
    """Read numbers from "0.5,0.9".

    Raises:
        typer.BadParameter: a word is no number; the message names the option.
    """
    return tuple(_parsed(option, text, float))


def parse_words(text: str) -> tuple[str, ...]:
    """Read words from "lenet5, vgg16"; empty ones are left out."""
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _parsed(option: str, text: str, kind: type[int] | type[float]) -> list[float]:
    try:
        return [kind(word.strip()) for word in text.split(",")]
    except ValueError:
        what = "integers" if kind is int else "numbers"
        raise typer.BadParameter(f"{option}: expected {what} separated by commas, got {text!r}") from None
