"""Checks of single values, put together into descriptions of whole files and settings.

A check is a function of a value's name and the value. It gives the value back, perhaps converted, or raises a TypeError
or ValueError that names the value, what was expected and what was given:

    >>> number(0, 1)("threshold", 0.9)
    0.9
    >>> record({"name": text(), "neurons": integer(1)})("taps[0]", {"name": "relu", "neurons": -5})
    Traceback (most recent call last):
    ...
    ValueError: taps[0].neurons: expected at least 1, got -5
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

__all__ = [
    "Bounds",
    "Check",
    "cell_integer",
    "cell_number",
    "check_count",
    "check_names",
    "check_number",
    "digest",
    "flag",
    "integer",
    "items",
    "json_value",
    "mapping",
    "number",
    "one_of",
    "optional",
    "record",
    "relative_path",
    "text",
]

Check: TypeAlias = Callable[[str, Any], Any]

LONGEST_TEXT = 1 << 16
DEEPEST = 64
"""Levels of lists and objects in a free JSON value; every recursion over one stays far from Python's limit."""
LARGEST_INTEGER = 1 << 53
"""Beyond it a JSON number is no longer the same integer in every reader."""


def text(*, longest: int = LONGEST_TEXT, empty: bool = False) -> Check:
    """A string that can be encoded, of at most `longest` characters."""

    def check(name: str, value: Any) -> str:
        if not isinstance(value, str):
            raise TypeError(f"{name}: expected a string, got {type(value).__name__}")
        if not value and not empty:
            raise ValueError(f"{name}: expected a non-empty string")
        if len(value) > longest:
            raise ValueError(f"{name}: expected at most {longest} characters, got {len(value)}")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{name}: expected text that UTF-8 can hold, got {value!a:.80}") from None
        return value

    return check


def integer(low: int = -LARGEST_INTEGER, high: int = LARGEST_INTEGER) -> Check:
    """An integer in [low, high]; a bool is none."""

    def check(name: str, value: Any) -> int:
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
        if not low <= value <= high:
            wanted = f"at least {low}" if value < low else f"at most {high}"
            raise ValueError(f"{name}: expected {wanted}, got {_shown(value)}")
        return value

    return check


def number(low: float = -math.inf, high: float = math.inf) -> Check:
    """A finite number in [low, high], as a float; a bool is none."""

    def check(name: str, value: Any) -> float:
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise TypeError(f"{name}: expected a number{_within(low, high)}, got {type(value).__name__}")
        if not (abs(value) <= 1.7976931348623157e308 and low <= value <= high):
            raise ValueError(f"{name}: expected a finite number{_within(low, high)}, got {_shown(value)}")
        return float(value)

    return check


def _within(low: float, high: float) -> str:
    if math.isinf(high):
        return "" if math.isinf(low) else f" of at least {low:g}"
    return f" in [{low:g}, {high:g}]"


def _shown(value: Any) -> str:
    """The value as text, but no kilobytes of it.

    As `moda_kernels.validation.shown`; but that package imports PyTorch, for which the command's help does not wait.
    """
    if isinstance(value, int) and abs(value) > 1 << 64:
        return f"one of {value.bit_length()} bits"
    try:
        shown = repr(value)
    except ValueError:  # Python does not write the largest integers, inside of others neither
        return f"a {type(value).__name__}"
    return shown if len(shown) <= 80 else f"{shown[:80]}..."


def flag(name: str, value: Any) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected true or false, got {_shown(value)}")
    return value


def one_of(choices: Collection[str]) -> Check:
    """One of some strings."""

    def check(name: str, value: Any) -> str:
        if not isinstance(value, str) or value not in choices:
            raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {_shown(value)}")
        return value

    return check


def digest(name: str, value: Any) -> str:
    """A SHA-256 in hex."""
    if not isinstance(value, str) or len(value) != 64 or set(value) - set("0123456789abcdef"):
        raise ValueError(f"{name}: expected a SHA-256, 64 hexadecimal digits, got {_shown(value)}")
    return value


def relative_path(name: str, value: Any) -> str:
    """A path below the folder of the file that names it."""
    path: str = text(longest=4096)(name, value)
    parts = path.split("/")
    if path.startswith("/") or ".." in parts or "\\" in path or ":" in parts[0] or "\0" in path:
        raise ValueError(f"{name}: expected a path below the file's own folder, got {_shown(value)}")
    return path


def optional(check: Check) -> Check:
    """None, or what `check` takes."""

    def checked(name: str, value: Any) -> Any:
        return None if value is None else check(name, value)

    return checked


def items(check: Check, *, least: int = 0, most: int = 1 << 20) -> Check:
    """A list of at least `least` and at most `most` values that `check` takes."""

    def checked(name: str, value: Any) -> list[Any]:
        if not isinstance(value, list | tuple):
            raise TypeError(f"{name}: expected a list, got {type(value).__name__}")
        if not least <= len(value) <= most:
            wanted = f"at least {least}" if len(value) < least else f"at most {most}"
            raise ValueError(f"{name}: expected {wanted} entries, got {len(value)}")
        return [check(f"{name}[{index}]", entry) for index, entry in enumerate(value)]

    return checked


def mapping(check: Check, *, least: int = 0) -> Check:
    """An object of any names, whose values `check` takes."""

    def checked(name: str, value: Any) -> dict[str, Any]:
        _require_object(name, value)
        if len(value) < least:
            raise ValueError(f"{name}: expected at least {least} entries, got {len(value)}")
        return {key: check(f"{name}[{key!r}]", entry) for key, entry in value.items()}

    return checked


def record(fields: Mapping[str, Check], optional: Mapping[str, Check] | None = None) -> Check:
    """An object with these entries, and perhaps the optional ones; others are let through as they are."""

    def checked(name: str, value: Any) -> dict[str, Any]:
        _require_object(name, value)
        missing = [field for field in fields if field not in value]
        if missing:
            raise ValueError(f"{name + ': ' if name else ''}entry {missing[0]!r} is missing")
        known = {**fields, **(optional or {})}
        prefix = f"{name}." if name else ""
        return {
            key: known[key](f"{prefix}{key}", entry) if key in known else json_value(f"{prefix}{key}", entry)
            for key, entry in value.items()
        }

    return checked


def _require_object(name: str, value: Any) -> None:
    if not isinstance(value, Mapping):
        raise TypeError(f"{name}: expected an object, got {type(value).__name__}")
    for key in value:
        text(empty=True)(f"{name}: a name of an entry", key)


def json_value(name: str, value: Any) -> Any:
    """Whatever JSON can hold: no NaN or infinity, not too deep. Mappings and tuples become objects and lists."""
    return _json_value(name, value, 0)


def _json_value(name: str, value: Any, depth: int) -> Any:
    if depth > DEEPEST:
        raise ValueError(f"{name}: expected at most {DEEPEST} levels of lists and objects, got more")
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return number()(name, value)
    if isinstance(value, str):
        return text(empty=True, longest=1 << 24)(name, value)
    if isinstance(value, list | tuple):
        return [_json_value(f"{name}[{index}]", entry, depth + 1) for index, entry in enumerate(value)]
    if isinstance(value, Mapping):
        _require_object(name, value)
        return {key: _json_value(f"{name}[{key!r}]", entry, depth + 1) for key, entry in value.items()}
    raise TypeError(f"{name}: expected only what JSON can hold, got {type(value).__name__}")


def check_count(name: str, value: Any, least: int = 1, most: int = LARGEST_INTEGER) -> int:
    """`value`, if it is an int in [least, most]; a bool is none."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if not least <= value <= most:
        wanted = f"at least {least}" if value < least else f"at most {most}"
        raise ValueError(f"{name}: expected {wanted}, got {_shown(value)}")
    return value


@dataclass(frozen=True)
class Bounds:
    """The bounds of a number; None where there is none.

    Attributes:
        at_least: the least value allowed.
        above: a number that the value must exceed.
        at_most: the largest value allowed.
        below: a number that the value must stay under.
    """

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None

    def hold(self, value: float) -> bool:
        """Say whether a number is within the bounds."""
        return (
            (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )

    def of(self, *, several: bool = False) -> str:
        """Say which numbers are within the bounds: "a finite number of at least 0", "numbers in [0, 1]"."""
        number, finite = ("numbers", "finite numbers") if several else ("a number", "a finite number")
        if self.at_least is not None and self.at_most is not None:
            return f"{number} in [{self.at_least:g}, {self.at_most:g}]"
        words = [
            f"{word} {bound:g}"
            for word, bound in (
                ("of at least", self.at_least),
                ("greater than", self.above),
                ("of at most", self.at_most),
                ("less than", self.below),
            )
            if bound is not None
        ]
        return " ".join([finite, " and ".join(words)]).rstrip()


def check_number(name: str, value: Any, bounds: Bounds = Bounds()) -> float:
    """`value` as a float, if it is a finite number within these bounds; a bool is none."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not (abs(value) <= sys.float_info.max and bounds.hold(value)):
        raise ValueError(f"{name}: expected {bounds.of()}, got {_shown(value)}")
    return float(value)


def check_names(name: str, value: Any) -> None:
    """Check that `value` is None or a sequence of strings, and no string itself."""
    if value is None:
        return
    if isinstance(value, str) or not isinstance(value, Sequence) or not all(isinstance(each, str) for each in value):
        raise TypeError(f"{name}: expected a sequence of names, got {_shown(value)}")


_NUMBER = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|nan|[-+]?inf", re.ASCII)
_INTEGER = re.compile(r"[-+]?[0-9]{1,18}", re.ASCII)


def cell_number(name: str, cell: Any) -> float:
    """The number in a cell of a table, as it is written there; not all that Python would take for one.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(cell, str) or len(cell) > LONGEST_TEXT or not _NUMBER.fullmatch(cell):
        raise ValueError(f"{name}: expected a number, got {_shown(cell)}")
    return float(cell)


def cell_integer(name: str, cell: Any) -> int:
    """The integer in a cell of a table.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(cell, str) or not _INTEGER.fullmatch(cell):
        raise ValueError(f"{name}: expected an integer, got {_shown(cell)}")
    return int(cell)
