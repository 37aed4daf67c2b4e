"""`torch.compile` as a contender."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` compiled for the shapes it is called with.

    What was compiled before is forgotten: at its limit of recompilations PyTorch would quietly run the plain function.
    """
    torch.compiler.reset()
    return torch.compile(function, dynamic=False)


@functools.cache
def compile_problem(device_type: str) -> str:
    """Why Inductor cannot compile for this device; empty if it can. Tried once, on one small function."""
    try:
        compiled(lambda x: x * 2 + 1)(torch.ones(8, device=device_type))
    except Exception as error:  # whatever it is, it is the reason that is shown
        return f"torch.compile fails here: {type(error).__name__}: {str(error).splitlines()[0][:200]}"
    return ""
