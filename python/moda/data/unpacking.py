"""What a model is given, and the labels, out of a batch of whatever form."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from numbers import Number
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

Unpack: TypeAlias = "Callable[[Any], tuple[Any, Tensor]]"
"""Gives a batch's inputs (a tensor, a tuple of positional arguments or a dict of keyword arguments) and its labels."""

_LABELS = ("labels", "label")


@dataclass(frozen=True)
class Inputs:
    """What a model is called with."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, given: Any) -> Inputs:
        """One tensor, a tuple or list of positional arguments, or a dict of keyword arguments."""
        if isinstance(given, Mapping):
            return cls((), dict(given))
        return cls(tuple(given) if isinstance(given, tuple | list) else (given,), {})

    def to(self, device: torch.device | str) -> Inputs:
        """The same on a device."""
        return self._with(lambda value: value.to(device))

    def detached(self) -> Inputs:
        """The same memory in tensors of our own, to which no graph of ours is attached from outside."""
        return self._with(Tensor.detach)

    def _with(self, function: Callable[[Tensor], Tensor]) -> Inputs:
        args, kwargs = tree_map(
            lambda value: function(value) if isinstance(value, Tensor) else value, (self.args, self.kwargs)
        )
        return Inputs(args, kwargs)

    def into(self, model: nn.Module) -> Any:
        """Call the model."""
        return model(*self.args, **self.kwargs)


def check_loader(loader: Any, *, name: str = "loader", again: bool = False) -> None:
    """Refuse what gives no batches.

    Args:
        loader: what should give batches.
        name: what errors call it.
        again: whether it is run through more than once, which an iterator cannot be.

    Raises:
        TypeError: it is nothing of that kind.
    """
    gives = hasattr(type(loader), "__iter__") or hasattr(type(loader), "__getitem__")
    if not gives or isinstance(loader, str | bytes | Number | Tensor | Mapping | type):
        raise TypeError(f"{name}: expected batches of (inputs, labels), got {type(loader).__name__}")
    if again and isinstance(loader, Iterator):
        raise TypeError(
            f"{name}: expected batches that can be run through again, such as a list or a DataLoader, "
            f"got a {type(loader).__name__}, which gives them once"
        )


def check_callable(function: Any, name: str) -> None:
    """Refuse what is neither None nor a function.

    Raises:
        TypeError: it is something else.
    """
    if function is not None and not callable(function):
        raise TypeError(f"{name}: expected a function, got {type(function).__name__}")


def unpacked(batch: Any, unpack: Unpack | None = None, name: str = "loader") -> tuple[Inputs, Tensor]:
    """A batch's inputs and labels; `name` is what errors call the loader.

    Without `unpack`, a batch is (inputs, labels), where inputs may be several tensors in a tuple, list or dict;
    (input, input, ..., labels); or a dict that has its labels under "labels", the rest being keyword arguments.

    Raises:
        TypeError: the batch is of another form, or `unpack` gives no pair.
    """
    if unpack is not None:
        pair = unpack(batch)
        if not isinstance(pair, tuple | list) or len(pair) != 2 or not isinstance(pair[1], Tensor):
            raise TypeError(f"unpack: expected a function that gives (inputs, labels), got {type(pair).__name__} of it")
        return Inputs.of(pair[0]), pair[1]
    if isinstance(batch, Mapping):
        return _of_mapping(batch, name)
    if not isinstance(batch, tuple | list):
        raise _other_form(name, f"{type(batch).__name__}")
    if len(batch) < 2:
        raise _other_form(name, f"{type(batch).__name__} of {len(batch)}")
    several = len(batch) > 2 and not _are_labels(batch[1]) and _are_labels(batch[-1])
    inputs, labels = (list(batch[:-1]), batch[-1]) if several else batch[:2]
    if not isinstance(labels, Tensor):
        raise _other_form(name, f"labels of type {type(labels).__name__}")
    if not isinstance(inputs, Tensor | Mapping | tuple | list):
        raise _other_form(name, f"inputs of type {type(inputs).__name__}")
    return Inputs.of(inputs), labels


def _other_form(name: str, what: str) -> TypeError:
    return TypeError(
        f"{name}: expected batches of (inputs, labels), got {what}; dicts with 'labels' will do too, and unpack= takes "
        "others apart"
    )


def _of_mapping(batch: Mapping[str, Any], name: str) -> tuple[Inputs, Tensor]:
    key = next((key for key in _LABELS if key in batch), None)
    if key is None:
        raise _other_form(name, f"a dict of {sorted(map(str, batch))}")
    if not isinstance(batch[key], Tensor):
        raise _other_form(name, f"labels of type {type(batch[key]).__name__}")
    return Inputs((), {name: value for name, value in batch.items() if name != key}), batch[key]


def _are_labels(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 1 and value.dtype in (torch.int64, torch.int32)
