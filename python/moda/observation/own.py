"""Calls of activation functions that the user wrote: while a model is observed, the function itself sees to it.

A function of Python cannot be seen from outside when it is called, by whatever name; so its code is another one as long
as a model is observed that names it in `activations=`. Outside of forward passes of such models it does what it did.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from types import CodeType, FunctionType
from typing import Any

from moda.observation.activations import ActivationFunction
from moda.observation.handle import Handle


def _in_its_place(*args: Any, _moda_calls: Any = None, **kwargs: Any) -> Any:
    return _moda_calls(*args, **kwargs)


class OwnFunction:
    """A function whose calls are looked at."""

    def __init__(self, function: FunctionType) -> None:
        self.function = function
        self.known = ActivationFunction(function.__name__, False, None)
        self.code: CodeType = function.__code__
        self.defaults = function.__defaults__, function.__kwdefaults__
        self.original = FunctionType(
            function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
        )
        self.original.__kwdefaults__ = function.__kwdefaults__
        self.handles: tuple[weakref.ref[Handle], ...] = ()
        function.__code__ = _in_its_place.__code__.replace(co_freevars=self.code.co_freevars)
        function.__defaults__ = None
        function.__kwdefaults__ = {"_moda_calls": self}

    def restore(self) -> None:
        """Give the function its own code back."""
        self.function.__code__ = self.code
        self.function.__defaults__, self.function.__kwdefaults__ = self.defaults

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What a call of the function does."""
        for handle in self.handles:
            taps = handle()
            run = None if taps is None else taps._run
            if run is not None and run.watching and not run.inside:
                return run.call_function(_quietly(run, self.original), self.known, args, kwargs)
        return self.original(*args, **kwargs)


def _quietly(run: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    """Calls inside the function are no activations of their own."""

    def call(*args: Any, **kwargs: Any) -> Any:
        caller, inside = run.caller, run.inside
        run.caller, run.inside = None, True
        try:
            return function(*args, **kwargs)
        finally:
            run.caller, run.inside = caller, inside

    return call


_own: dict[FunctionType, OwnFunction] = {}


def look_at(functions: tuple[FunctionType, ...], taps: Handle) -> None:
    """Let the taps see calls of these functions."""
    for function in functions:
        own = _own.get(function)
        if own is None:
            own = _own[function] = OwnFunction(function)
        if all(handle() is not taps for handle in own.handles):
            own.handles = (*(handle for handle in own.handles if handle() is not None), weakref.ref(taps))


def look_away(functions: tuple[FunctionType, ...], taps: Handle) -> None:
    """The opposite of `look_at`."""
    for function in functions:
        own = _own.get(function)
        if own is None:
            continue
        own.handles = tuple(handle for handle in own.handles if handle() is not None and handle() is not taps)
        if not own.handles:
            own.restore()
            del _own[function]
