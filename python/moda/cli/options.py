"""Makes the options of a command from the fields of a settings class: names, types, help, defaults."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import typer

from moda.cli.arguments import parse_integers, parse_numbers, parse_words
from moda.settings import Kind, Setting, Settings, kinds_of, settings_of

_Command = Callable[..., None]
_PARSERS: dict[type, Callable[[str, str], tuple[Any, ...]]] = {
    int: parse_integers,
    float: parse_numbers,
    str: lambda _, text: parse_words(text),
}


def takes(settings: type[Settings], command: str, *, defaults: bool = True) -> Callable[[_Command], _Command]:
    """Give a command an option for each field that it offers.

    The decorated function has a parameter `given` in their place: a mapping of the fields whose option is on the
    command line to their values.

    Args:
        settings: the class that declares the fields.
        command: the name of the command.
        defaults: whether the help shows the fields' defaults; not where something else decides what is not given.
    """
    offered = _Offer.of(settings, command)

    def decorate(function: _Command) -> _Command:
        @functools.wraps(function)
        def run(**values: Any) -> None:
            options = {offer.key: values.pop(offer.key) for offer in offered}
            try:
                function(**values, given=_given(offered, options))
            except (TypeError, ValueError) as error:
                if option := _refused(offered, options, str(error)):
                    raise type(error)(option) from error
                raise

        own = inspect.signature(function, eval_str=True).parameters
        kept = [parameter.replace(kind=parameter.KEYWORD_ONLY) for name, parameter in own.items() if name != "given"]
        made = [offer.parameter(shown=defaults) for offer in offered]
        run.__signature__ = inspect.Signature([*kept, *made])  # type: ignore[attr-defined]
        return run

    return decorate


def option_of(settings: type[Settings], name: str, value: Any = None) -> str:
    """Give the option of a field as a user writes it; of a mapping, that of the first entry of `value`."""
    declared = settings_of(settings)[name]
    if declared.entries is not None:
        return option_of(declared.entries, next(iter(value)))
    return _names(name, declared)[0].partition("/")[0]


class _Offer:
    """One option, which stands for a field, or for an entry of a field that is a mapping."""

    def __init__(self, settings: type[Settings], field: str, panel: str, inside: str = "") -> None:
        self.field = field
        self.inside = inside
        self.key = field
        self.declared: Setting = settings_of(settings)[field]
        self.kind: Kind = kinds_of(settings)[field]
        self.panel = self.declared.panel or panel
        self.default = getattr(settings(), field)

    @classmethod
    def of(cls, settings: type[Settings], command: str) -> list[_Offer]:
        """List every option that a command takes from the settings."""
        offers = []
        for name, declared in settings_of(settings, command).items():
            if declared.entries is None:
                offers.append(cls(settings, name, declared.panel))
            else:
                entries = settings_of(declared.entries, command)
                offers += [cls(declared.entries, entry, declared.panel, inside=name) for entry in entries]
        return offers

    def parameter(self, *, shown: bool) -> inspect.Parameter:
        """Give the parameter that typer makes the option of; it is None where the option is not given."""
        kind: type = str if self.kind.several else self.kind.of
        default = _shown(self.default) if shown else ""
        option = typer.Option(
            *_names(self.field, self.declared),
            help=f"{self.declared.help}  \\[default: {default}]" if default else self.declared.help,
            show_default=False,
            rich_help_panel=self.panel or None,
        )
        optional: Any = kind | None
        return inspect.Parameter(
            self.key, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[optional, option]
        )

    def value(self, given: Any) -> Any:
        """Give the value of the field for what stands on the command line."""
        if not self.kind.several:
            return given
        if given in self.declared.words:
            return self.declared.words[given]
        return _PARSERS[self.kind.of](_names(self.field, self.declared)[0], given)


def _refused(offered: list[_Offer], options: Mapping[str, Any], message: str) -> str:
    """Name the option in a message that begins with the name of a field that was given; nothing for other messages."""
    for offer in (offer for offer in offered if options[offer.key] is not None):
        option = _names(offer.field, offer.declared)[0].partition("/")[0]
        if message.startswith(f"{offer.field}: "):
            return f"{option}: {message.removeprefix(f'{offer.field}: ')}"
        if offer.inside and message.startswith("options: ") and message.endswith(f" {offer.field}"):
            return f"{option}: {message}"
    return ""


def _given(offered: list[_Offer], options: Mapping[str, Any]) -> dict[str, Any]:
    given: dict[str, Any] = {}
    for offer in offered:
        if options[offer.key] is not None:
            target = given.setdefault(offer.inside, {}) if offer.inside else given
            target[offer.field] = offer.value(options[offer.key])
    return given


def _names(field: str, declared: Setting) -> list[str]:
    return declared.option.split() or [f"--{field.replace('_', '-')}"]


def _shown(default: Any) -> str:
    """Give a default as the help shows it; nothing where there is none worth showing."""
    if isinstance(default, tuple):
        return ",".join(map(str, default))
    return "" if default is None or isinstance(default, bool | dict) else str(default)
