"""Settings: a dataclass field says all there is to know of one, and the rest follows from it.

    @dataclass(frozen=True)
    class Training(Settings, command="train"):
        \"\"\"How a model is trained.\"\"\"

        epochs: int = setting(200, help="The passes over the training data.", at_least=1)

The field's type, default, bounds and help text stand there and nowhere else. From them come the checks when a
`Training` is made, the section "Attributes" of its docstring, the options of the command `moda train`
(`moda.cli.options`) and the JSON schema of its files.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Any, ClassVar, TypeVar, Union, get_args, get_origin, get_type_hints

from moda.checks import Bounds, check_number, flag, integer, one_of, text

__all__ = [
    "Bounds",
    "Kind",
    "Setting",
    "Settings",
    "check_setting",
    "json_schema",
    "kinds_of",
    "setting",
    "settings_of",
]

_KEY = "moda"
_Settings = TypeVar("_Settings", bound="Settings")


UNBOUNDED = Bounds()


@dataclass(frozen=True)
class Setting:
    """What a field's metadata say of a setting.

    Attributes:
        help: what the setting is, in a sentence.
        bounds: the bounds of its number, or of each of its numbers.
        choices: the words that it may be, or that each of its entries may be; empty: any.
        entry: what one of its entries is called in messages, where it has several.
        words: words of the command line that stand for whole values, such as "paper".
        entries: for a mapping, a class whose fields are the entries that commands offer as options.
        option: the names of its option, separated by blanks; empty: made from the field's name.
        panel: the heading that commands show the option under.
        commands: the commands that offer it; None: the one that its class is for.
        runtime: whether it decides how something runs, not what comes out.
    """

    help: str
    bounds: Bounds = UNBOUNDED
    choices: tuple[str, ...] = ()
    entry: str = ""
    words: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    entries: type[Settings] | None = None
    option: str = ""
    panel: str = ""
    commands: tuple[str, ...] | None = None
    runtime: bool = False


def setting(
    default: Any,
    *,
    help: str,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    **attributes: Any,
) -> Any:
    """Declare a field of a `Settings` class.

    Args:
        default: the value of the field where none is given.
        help: what the setting is, in a sentence.
        at_least: see `Bounds`.
        above: see `Bounds`.
        at_most: see `Bounds`.
        below: see `Bounds`.
        attributes: the other attributes of `Setting`.
    """
    declared = Setting(help, Bounds(at_least, above, at_most, below), **attributes)
    if isinstance(default, Mapping):
        return dataclasses.field(default_factory=lambda: dict(default), metadata={_KEY: declared})
    return dataclasses.field(default=default, metadata={_KEY: declared})


@dataclass(frozen=True)
class Settings:
    """The base of frozen dataclasses whose fields are settings; a value that a field does not allow is refused."""

    command: ClassVar[str] = ""

    def __init_subclass__(cls, command: str = "", **options: Any) -> None:
        """Note the command that the settings are for, and describe the fields in the docstring."""
        super().__init_subclass__(**options)
        cls.command = command
        own = {name: value.metadata[_KEY].help for name, value in vars(cls).items() if _is_setting(value)}
        lines = [f"    {name}: {text}" for name, text in own.items()]
        cls.__doc__ = "\n".join([inspect.cleandoc(cls.__doc__ or ""), "", "Attributes:", *lines])

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            TypeError, ValueError: a field is of a wrong type or out of range; the message names it.
        """
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, check_setting(type(self), field.name, getattr(self, field.name)))

    def to_dict(self) -> dict[str, Any]:
        """Give the fields as JSON can hold them."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls: type[_Settings], values: Mapping[str, Any]) -> _Settings:
        """Make the settings that `to_dict` gave; fields that are missing get their defaults.

        Raises:
            TypeError, ValueError: a field is unknown, of a wrong type or out of range.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(f"{unknown[0]}: unknown setting; expected one of {', '.join(known)}")
        return cls(**values)

    def changed(self: _Settings, **values: Any) -> _Settings:
        """Give a copy with other values in some fields."""
        return dataclasses.replace(self, **values)


def _is_setting(value: Any) -> bool:
    return isinstance(value, dataclasses.Field) and _KEY in value.metadata


@dataclass(frozen=True)
class Kind:
    """The type of a field.

    Attributes:
        of: str, int, float, bool or dict.
        optional: whether None is allowed.
        several: whether it is a tuple of values.
    """

    of: type
    optional: bool = False
    several: bool = False


def kinds_of(settings: type[Settings]) -> Mapping[str, Kind]:
    """Give the type of every field."""
    if settings not in _KINDS:
        hints = get_type_hints(settings)
        _KINDS[settings] = {field.name: _kind(hints[field.name]) for field in dataclasses.fields(settings)}
    return _KINDS[settings]


_KINDS: dict[type[Settings], Mapping[str, Kind]] = {}


def _kind(hint: Any) -> Kind:
    if get_origin(hint) in (Union, UnionType):
        (inner,) = (part for part in get_args(hint) if part is not NoneType)
        return dataclasses.replace(_kind(inner), optional=True)
    if get_origin(hint) is tuple:
        return Kind(get_args(hint)[0], several=True)
    return Kind(dict if get_origin(hint) is not None else hint)


def settings_of(settings: type[Settings], command: str | None = None) -> dict[str, Setting]:
    """Give the declarations of all fields, or of those that a command offers, in their order."""
    declared = {field.name: field.metadata[_KEY] for field in dataclasses.fields(settings)}
    if command is None:
        return declared
    return {name: each for name, each in declared.items() if command in _commands(settings, each)}


def _commands(settings: type[Settings], declared: Setting) -> tuple[str, ...]:
    return (settings.command,) if declared.commands is None else declared.commands


def check_setting(settings: type[Settings], name: str, value: Any) -> Any:
    """Give the value that a field has when it is given `value`.

    Raises:
        TypeError, ValueError: the field allows no such value; the message names it.
    """
    declared, kind = settings_of(settings)[name], kinds_of(settings)[name]
    if value is None and kind.optional:
        return None
    if kind.several:
        return _check_several(name, value, declared, kind)
    return _check_one(name, value, declared, kind)


def _check_one(name: str, value: Any, declared: Setting, kind: Kind) -> Any:
    if declared.choices:
        return one_of(declared.choices)(name, value)
    if kind.of is int:
        return _check_integer(name, value, declared.bounds)
    if kind.of is float:
        return check_number(name, value, declared.bounds)
    return {str: text(), bool: flag, dict: _check_options}[kind.of](name, value)


def _check_integer(name: str, value: Any, bounds: Bounds) -> int:
    given = {"low": bounds.at_least, "high": bounds.at_most}
    checked: int = integer(**{end: int(bound) for end, bound in given.items() if bound is not None})(name, value)
    return checked


def _check_options(name: str, value: Any) -> dict[str, Any]:
    """Give a copy of a mapping of names to values that JSON has words for, nested once at most."""
    if not isinstance(value, Mapping):
        raise TypeError(f"{name}: expected a mapping, got {type(value).__name__}")
    for key, option in value.items():
        nested = (
            option.values() if isinstance(option, Mapping) and all(isinstance(k, str) for k in option) else [option]
        )
        if not isinstance(key, str) or not all(isinstance(item, str | int | float | bool | None) for item in nested):
            raise TypeError(f"{name}[{key!r}]: expected a string, number, true, false or null, got {option!r}")
    return {key: dict(option) if isinstance(option, Mapping) else option for key, option in value.items()}


def _check_several(name: str, value: Any, declared: Setting, kind: Kind) -> tuple[Any, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise TypeError(f"{name}: expected a sequence, got {type(value).__name__}")
    if declared.choices:
        unknown = [entry for entry in value if entry not in declared.choices]
        if unknown or not value:
            raise ValueError(f"{name}: expected some of {', '.join(declared.choices)}, got {unknown or 'none'}")
    if not value:
        raise ValueError(f"{name}: expected at least one{declared.entry and ' '}{declared.entry}, got none")
    if kind.of is float:
        return tuple(_check_entry(name, entry, declared.bounds) for entry in value)
    return tuple(_check_one(name, entry, declared, kind) for entry in value)


def _check_entry(name: str, value: Any, bounds: Bounds) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool) and not bounds.hold(value):
        raise ValueError(f"{name}: expected {bounds.of(several=True)}, got {value}")
    return check_number(name, value)


def json_schema(settings: type[Settings]) -> dict[str, Any]:
    """Give the JSON schema (draft 2020-12) of what `Settings.to_dict` gives and `Settings.from_dict` reads."""
    defaults = settings().to_dict()
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": settings.__name__,
        "type": "object",
        "additionalProperties": False,
        "properties": {
            name: _schema(declared, kinds_of(settings)[name])
            | {"description": declared.help, "default": _json(defaults[name])}
            for name, declared in settings_of(settings).items()
        },
    }


_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean", dict: "object"}


def _schema(declared: Setting, kind: Kind) -> dict[str, Any]:
    if declared.choices:
        one: dict[str, Any] = {"enum": list(declared.choices)}
    else:
        words = {"at_least": "minimum", "above": "exclusiveMinimum", "at_most": "maximum", "below": "exclusiveMaximum"}
        bounds = {
            words[name]: value for name, value in dataclasses.asdict(declared.bounds).items() if value is not None
        }
        one = {"type": _TYPES[kind.of], **bounds} | ({"minLength": 1} if kind.of is str else {})
    if kind.several:
        one = {"type": "array", "items": one, "minItems": 1}
    return {"anyOf": [one, {"type": "null"}]} if kind.optional else one


def _json(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
