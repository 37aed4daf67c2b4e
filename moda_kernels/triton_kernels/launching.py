"""Launches, past Triton's dispatch once a kernel is compiled for arguments of their kind.

At every launch Triton binds the arguments, works out what each means for compilation, and looks the compiled kernel up
by all of that. What it comes to here is little: constants, types and alignment of tensors, options. A launch finds the
compiled kernel by these, and hands it addresses instead of tensors, which the launcher would ask the driver about. What
Triton tells profilers that hook into launches is left out where there is none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor
from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import JITFunction


class _Compiled(NamedTuple):
    """A compiled kernel, and what a launch of it takes."""

    kernel: Any
    run: Any
    function: Any
    metadata: Any

    @staticmethod
    def of(kernel: Any) -> _Compiled:
        return _Compiled(kernel, kernel.run, kernel.function, kernel.packed_metadata)


_compiled: dict[tuple[object, ...], _Compiled] = {}
_constants: dict[int, tuple[bool, ...]] = {}  # by a kernel's id: which arguments are constants


def launch(kernel: Any, grid: Sequence[int], *arguments: Any, **options: int) -> None:
    """`kernel[grid](*arguments, **options)` on the current device, for all arguments of the kernel.

    Integers have to be declared as not to be specialised on; floating-point numbers never are.
    """
    if type(kernel) is not JITFunction:  # the interpreter's
        kernel[tuple(grid)](*arguments, **options)
        return
    constants = _constants.get(id(kernel))
    if constants is None:
        constants = _constants[id(kernel)] = _declared_constants(kernel)
    active = driver.active
    device = active.get_current_device()
    kind: list[object] = [id(kernel), id(active), device, *options.values()]
    given: list[object] = []
    for argument, constant in zip(arguments, constants, strict=True):
        if constant or argument is None:
            kind.append(argument)
            given.append(argument)
        elif isinstance(argument, Tensor):
            address = argument.data_ptr()
            kind.append(argument.dtype)
            kind.append(address % 16 == 0)
            given.append(address)
        else:
            given.append(argument)
    key = tuple(kind)
    compiled = _compiled.get(key)
    if compiled is None:
        _compiled[key] = _Compiled.of(kernel[tuple(grid)](*arguments, **options))
        return
    x, y, z = (*grid, 1, 1)[:3]
    if _is_hooked():
        compiled.kernel[x, y, z](*given)
        return
    stream = active.get_current_stream(device)
    compiled.run(x, y, z, stream, compiled.function, compiled.metadata, None, None, None, *given)


def _is_hooked() -> bool:
    """Whether somebody asked to be told of launches: by a chain with functions in it, or a function in its place."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


def _declared_constants(kernel: Any) -> tuple[bool, ...]:
    """Which parameters are constants."""
    for parameter in kernel.params:
        integer = str(parameter.annotation_type or "").startswith("i")
        if integer and not parameter.do_not_specialize:
            raise TypeError(f"{kernel.__name__}: {parameter.name} is specialised on, which a launch here does not see")
    return tuple(parameter.is_constexpr for parameter in kernel.params)
