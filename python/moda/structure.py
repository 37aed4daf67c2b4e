"""How the inputs and outputs of a model are nested, so that a graph of plain tensors can take and give the same."""

from __future__ import annotations

import dataclasses
import sys
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Fields", "Structure", "flatten", "flatten_output"]

_PLAIN = (bool, int, float, str, type(None))


class Fields(OrderedDict[str, Any]):
    """Stands in for a data class that is not at hand: its fields by name, as items and as attributes."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


@dataclass(frozen=True)
class Structure:
    """A nest of tensors and constants.

    Attributes:
        kind: "tensor", "constant", "list", "tuple", "dict", "named" (a named tuple) or "fields" (a data class).
        value: of a constant.
        keys: of a dict, a named tuple or a data class, in order.
        parts: what it holds, in order.
        type: where the class of a named tuple or a data class is, `module:name`.
    """

    kind: str
    value: bool | int | float | str | None = None
    keys: tuple[str, ...] = ()
    parts: tuple[Structure, ...] = ()
    type: str = ""

    def rebuild(self, tensors: Iterator[Any]) -> Any:
        """The nest with the next tensors in the places of its own."""
        if self.kind == "tensor":
            return next(tensors)
        if self.kind == "constant":
            return self.value
        parts = [part.rebuild(tensors) for part in self.parts]
        if self.kind in ("list", "tuple"):
            return parts if self.kind == "list" else tuple(parts)
        if self.kind == "dict":
            return dict(zip(self.keys, parts, strict=True))
        made = _class_at(self.type)
        return (made or Fields)(**dict(zip(self.keys, parts, strict=True)))

    def paths(self, at: str = "") -> Iterator[str]:
        """Where each tensor is: `['logits']`, `[0]`, `.logits`; '' for one alone."""
        if self.kind == "tensor":
            yield at
        for place, part in enumerate(self.parts):
            key = self.keys[place] if self.keys else place
            yield from part.paths(f"{at}.{key}" if self.kind in ("named", "fields") else f"{at}[{key!r}]")

    def describe(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {
            "kind": self.kind,
            "value": self.value,
            "keys": list(self.keys),
            "parts": [part.describe() for part in self.parts],
            "type": self.type,
        }

    @classmethod
    def of(cls, description: Any) -> Structure:
        """What `describe` gave.

        Raises:
            ValueError: it is no such description.
        """
        if not isinstance(description, dict) or set(description) != {"kind", "value", "keys", "parts", "type"}:
            raise ValueError(f"expected the description of a nest of tensors, got {description!r:.200}")
        kind, value, keys, parts, type_ = (description[name] for name in ("kind", "value", "keys", "parts", "type"))
        if kind not in ("tensor", "constant", "list", "tuple", "dict", "named", "fields"):
            raise ValueError(f"unknown kind of nest: {kind!r:.80}")
        lists = isinstance(keys, list) and isinstance(parts, list)
        if not lists or not isinstance(value, _PLAIN) or not isinstance(type_, str):
            raise ValueError("a nest's value, keys, parts or type is not plain")
        if not all(isinstance(key, str) for key in keys) or len(set(keys)) != len(keys):
            raise ValueError(f"a nest's keys: expected names, each once, got {keys!r:.200}")
        keyed = kind in ("dict", "named", "fields")
        if len(keys) != (len(parts) if keyed else 0) or (parts and kind in ("tensor", "constant")):
            raise ValueError(f"a nest of kind {kind!r} has {len(keys)} keys and {len(parts)} parts")
        if (value is not None and kind != "constant") or bool(type_) != (kind in ("named", "fields")):
            raise ValueError(f"a nest of kind {kind!r} has the value {value!r:.80} and the type {type_!r:.80}")
        return cls(kind, value, tuple(keys), tuple(cls.of(part) for part in parts), type_)


def flatten(value: Any, name: str = "value") -> tuple[Structure, list[Tensor]]:
    """The structure of a nest, and its tensors in order.

    Args:
        value: tensors and plain constants in lists, tuples, dicts with text as keys, named tuples and data classes.
        name: what the value is called in messages.

    Raises:
        TypeError: it holds something else.
    """
    tensors: list[Any] = []
    return _flatten(value, name, tensors), tensors


def flatten_output(value: Any) -> tuple[Structure, list[Tensor]]:
    """The structure of what a model puts out, and its tensors in order.

    What a nest holds besides tensors and constants (the cache of keys and values of a language model) is left out: None
    stands for it.

    Raises:
        TypeError: the whole output is something else.
    """
    tensors: list[Any] = []
    return _flatten(value, "output of the model", tensors, others=True), tensors


def _flatten(value: Any, name: str, tensors: list[Any], others: bool = False) -> Structure:
    if isinstance(value, Tensor | torch.SymInt):
        tensors.append(value)
        return Structure("tensor")
    if isinstance(value, _PLAIN):
        return Structure("constant", value)
    named = _named_parts(value)
    if named is not None:
        kind, items = named
        parts = tuple(_part(part, f"{name}[{key!r}]", tensors, others) for key, part in items)
        type_ = "" if kind == "dict" else f"{type(value).__module__}:{type(value).__qualname__}"
        return Structure(kind, keys=tuple(key for key, _ in items), parts=parts, type=type_)
    if isinstance(value, list | tuple):
        parts = tuple(_part(part, f"{name}[{place}]", tensors, others) for place, part in enumerate(value))
        return Structure("list" if isinstance(value, list) else "tuple", parts=parts)
    raise TypeError(
        f"{name}: expected tensors and plain constants in lists, tuples, dicts, named tuples and data classes, got "
        f"{type(value).__name__}"
    )


def _part(value: Any, name: str, tensors: list[Any], others: bool) -> Structure:
    """A part of a nest; None for one of another kind, if there may be `others`."""
    count = len(tensors)
    try:
        return _flatten(value, name, tensors, others)
    except TypeError:
        if not others:
            raise
    del tensors[count:]
    return Structure("constant", None)


def _named_parts(value: Any) -> tuple[str, Sequence[tuple[str, Any]]] | None:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        held = value.items() if isinstance(value, Mapping) else _fields(value)  # a ModelOutput lists what is there
        return "fields", list(held)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return "named", [(key, getattr(value, key)) for key in value._fields]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return "dict", list(value.items())
    return None


def _fields(value: Any) -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(value):
        if field.init:
            yield field.name, getattr(value, field.name)


def _class_at(place: str) -> Any:
    """The class, if its module is imported already: nothing is imported on the word of a file."""
    module, _, name = place.partition(":")
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    known = isinstance(found, type) and (dataclasses.is_dataclass(found) or issubclass(found, tuple))
    return found if known else None
