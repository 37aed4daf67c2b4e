"""What an observed model's modules become: subclasses of their own class, the same objects as before.

A module keeps its attributes, hooks and keys of its state; pickled, or copied by itself, it is the plain module.
"""

from __future__ import annotations

import copy
import copyreg
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._C import _pop_torch_function_stack, _push_on_torch_function_stack

from moda.observation.activations import PLAIN, plain_class
from moda.observation.handle import Handle
from moda.observation.plan import Tap

PART = "moda part"  # which no name in code can be, so that no attribute or submodule of the user's is


class Part:
    """What a module has to do with the observation of a model."""

    def __init__(self, taps: Handle) -> None:
        self.taps = taps

    def call(self, module: nn.Module, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a call of the module does; `call` is the module's own."""
        return call(*args, **kwargs)


class Root(Part):
    """The observed model itself."""

    def __init__(self, taps: Handle) -> None:
        super().__init__(taps)
        self.inner: Part | None = None  # what it is besides

    def call(self, module: nn.Module, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A forward pass."""
        taps = self.taps
        run = taps._begin(args, kwargs)
        if run is None:
            return self._within(module, call, args, kwargs)
        try:
            output = run.settled(run.conduct(partial(self._within, module, call, args, kwargs)))
            run.finish(output)
            if taps._after is not None and run.record is not None:
                output = taps._after(args, kwargs, output)
            return output
        except BaseException:
            run.abandon()
            raise
        finally:
            taps._run = None

    def _within(
        self, module: nn.Module, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        return call(*args, **kwargs) if self.inner is None else self.inner.call(module, call, args, kwargs)


class Site(Part):
    """Where activations come from: a module that is one, or the calls of one function by one module."""

    def __init__(self, taps: Handle, *, opaque: bool = False) -> None:
        super().__init__(taps)
        self.opaque = opaque  # calls inside are no activations of their own
        self.planned: list[tuple[Tap | None, ...]] = [(), ()]  # its calls in eval and in train mode; None is skipped
        self.only: list[Tap | None] = [None, None]  # its one call, if that can take the short way
        self.simple: list[Tap | None] = [None, None]  # the same, if the activation is recorded as it is
        self.hits = 0  # calls of this forward pass, counted where there are several

    def plan(self, training: int, calls: tuple[Tap | None, ...]) -> None:
        """Let the calls in one mode be these."""
        self.planned[training] = calls
        only = self.only[training] = calls[0] if len(calls) == 1 and not self.opaque else None
        self.simple[training] = only if only is not None and only.as_it_is else None

    def call(self, module: nn.Module, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """An activation module is called."""
        run = self.taps._run
        if run is None or run.inside:
            return call(*args, **kwargs)
        return run.call_module(self, module, call, args, kwargs)


class Norm(Part):
    """A batch norm that feeds nothing but one activation, directly or through one addition.

    Attributes:
        dims: axes of that activation in the probes in eval and in train mode; 0 where there was none of that mode
            or the last one saw something else.
    """

    def __init__(self, taps: Handle) -> None:
        super().__init__(taps)
        self.dims = [0, 0]

    def call(self, module: nn.Module, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Its result may be left to the activation."""
        run = self.taps._run
        if run is None or run.inside or torch.compiler.is_compiling():
            return call(*args, **kwargs)
        outer, run.caller = run.caller, None  # the function that it calls is none of the calls of whoever called it
        try:
            return run.call_norm(self, module, call, args, kwargs)
        finally:
            run.caller = outer


class Caller(Part):
    """A module that calls activation functions, or the function that is a batch norm."""

    def __init__(self, taps: Handle) -> None:
        super().__init__(taps)
        self.functions: dict[str, Site] = {}
        self.norm: Norm | None = None

    def call(self, module: nn.Module, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Its calls of functions are looked at while it runs."""
        run = self.taps._run
        if run is None or run.inside:
            return call(*args, **kwargs)
        outer, run.caller = run.caller, self
        try:
            if run.watching:
                return call(*args, **kwargs)
            run.watching = True
            if torch.compiler.is_compiling():
                try:
                    with self.taps._mode:
                        return call(*args, **kwargs)
                finally:
                    run.watching = False
            _push_on_torch_function_stack(self.taps._mode)  # as `with` does, for less
            try:
                return call(*args, **kwargs)
            finally:
                _pop_torch_function_stack()
                run.watching = False
        finally:
            run.caller = outer


class Whole(Part):
    """A module whose forward pass takes another road where calls of functions are watched: they are not."""

    def call(self, module: nn.Module, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Nothing inside is looked at."""
        run = self.taps._run
        if run is None or not run.watching or torch.compiler.is_compiling():
            return call(*args, **kwargs)
        args, kwargs = run.plain(args), run.plain(kwargs)
        with torch._C.DisableTorchFunction():
            output = call(*args, **kwargs)
        run.whole(module, args, kwargs, output)
        return output


class _Attached:
    """Mixed into the class of a module that has a part; nothing of that is copied or saved."""

    def __init_subclass__(cls, **_settings: Any) -> None:
        """What a class of the user's does when a subclass of it is made is not done for ours."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self, _Attached):  # a method bound before remove(), which torch.compile keeps
            return type(self).__call__(self, *args, **kwargs)
        return self.__dict__[PART].call(self, super().__call__, args, kwargs)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced = super().__reduce_ex__(protocol)
        if isinstance(reduced, str):
            return reduced
        function, args, *rest = reduced
        kind = type(self)
        if function is copyreg.__newobj__ and args == (kind,):  # type: ignore[attr-defined]
            function, args = copyreg._reconstructor, (kind, object, None)  # type: ignore[attr-defined]
        args = tuple(plain_class(kind) if arg is kind else arg for arg in args)
        if rest and isinstance(rest[0], dict):
            rest[0] = {name: value for name, value in rest[0].items() if name != PART}
        return (function, args, *rest)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        inherited = getattr(super(), "__deepcopy__", None)
        made = _plain_copy(self, memo) if inherited is None else inherited(memo)
        if type(made) is type(self):
            _reclass(made, plain_class(type(self)))
        made.__dict__.pop(PART, None)
        memo[id(self)] = made
        part = self.__dict__[PART]
        if isinstance(part, Root):
            part.taps._copied(made, memo)
        return made


class _AttachedSite(_Attached):
    """Mixed into the class of an activation module: there are so many calls of these that what each costs shows."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self, _AttachedSite) or torch.compiler.is_dynamo_compiling():
            return _Attached.__call__(self, *args, **kwargs)
        site = self.__dict__[PART]
        run = site.taps._run
        if run is None or type(site) is not Site or run.inside:
            return super().__call__(*args, **kwargs)
        tap = site.only[run.training]
        if tap is not None and len(args) == 1 and not kwargs:
            if run.notes:
                y = run.noted_module(tap, self, args[0]) if tap.as_it_is else None
            elif run.relu_pool is not None:
                y = run.fused_module(tap, self, args[0])
            else:
                y = None
            if y is not None:
                return y
        return super().__call__(*args, **kwargs)


def _plain_copy(module: Any, memo: dict[int, Any]) -> Any:
    return copy._reconstruct(module, memo, *module.__reduce_ex__(4))  # type: ignore[attr-defined]


def attach(module: nn.Module, part: Part) -> None:
    """Let a module have a part in the observation."""
    present = part_of(module)
    if isinstance(present, Root):
        present.inner = part
        return
    if not isinstance(module, _Attached):
        kind = type(module)
        names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__, PLAIN: kind}
        mixed = _AttachedSite if isinstance(part, Site) else _Attached
        _reclass(module, type(kind.__name__, (mixed, kind), names))
    if isinstance(part, Root) and present is not None:
        part.inner = present
    module.__dict__[PART] = part


def detach(module: nn.Module) -> None:
    """Make a module again what it was."""
    module.__dict__.pop(PART, None)
    kind = _without(type(module))
    if kind is not type(module):
        _reclass(module, kind)


def _reclass(module: object, kind: type) -> None:
    object.__setattr__(module, "__class__", kind)  # the user's class may let no attribute be set


def _without(kind: type) -> type:
    """The class without ours among its bases: somebody else may have made a subclass of it since."""
    if PLAIN in vars(kind):
        return plain_class(kind)
    if not issubclass(kind, _Attached):
        return kind
    names = {name: value for name, value in vars(kind).items() if name not in ("__dict__", "__weakref__")}
    return type(kind.__name__, tuple(_without(base) for base in kind.__bases__), names)


def part_of(module: nn.Module) -> Part | None:
    """The part that a module has; None for a plain one."""
    part: Part | None = module.__dict__.get(PART)
    return part
