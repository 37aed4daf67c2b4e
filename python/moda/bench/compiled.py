"""Makes `torch.compile` a contender."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile `function` for the shapes it is called with.

    Earlier compilations are discarded first: at its limit of recompilations PyTorch would silently run the plain
    function.
    """
    torch.compiler.reset()
    return torch.compile(function, dynamic=False)


@functools.cache
def compile_problem(device_type: str) -> str:
    """Say why Inductor cannot compile for this device, or return "" if it can. It tries one small function, once."""
    try:
        compiled(lambda x: x * 2 + 1)(torch.ones(8, device=device_type))
    except Exception as error:  # any error is the reason to show
        return f"torch.compile fails here: {type(error).__name__}: {str(error).splitlines()[0][:200]}"
    return ""
