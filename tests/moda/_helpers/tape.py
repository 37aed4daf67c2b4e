"""CUDA graphs played on the CPU: the operations of a capture are written down, and a replay runs them in the same memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moda.training import graphed


class Tape(TorchDispatchMode):
    """In the place of a `torch.cuda.CUDAGraph`; what reads a value on the host cannot be captured, as there."""

    def __init__(self, reading: bool = False) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []
        self.before: dict[int, tuple[Tensor, Tensor]] = {}  # what there was before the capture, which computes nothing
        self.made: set[int] = set()
        self.reading = reading
        self.replays = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default and not self.reading:
            raise RuntimeError("operation not permitted when stream is capturing")
        for given in tree_leaves((args, kwargs)):
            if isinstance(given, Tensor) and given.data_ptr() not in self.made:
                self.before.setdefault(given.data_ptr(), (given, given.detach().clone()))
        result = function(*args, **(kwargs or {}))
        self.made |= {each.data_ptr() for each in tree_leaves(result) if isinstance(each, Tensor)} - self.before.keys()
        self.calls.append((function, args, kwargs or {}, result))
        return result

    @torch.no_grad()
    def undo(self) -> None:
        for given, value in self.before.values():
            given.copy_(value)

    @torch.no_grad()
    def replay(self) -> None:
        self.replays += 1
        for function, args, kwargs, result in self.calls:
            for mine, again in zip(tree_leaves(result), tree_leaves(function(*args, **kwargs)), strict=True):
                if isinstance(mine, Tensor) and mine.data_ptr() != again.data_ptr():
                    mine.copy_(again)


def play_graphs(patch: pytest.MonkeyPatch, *, reading: bool = False) -> list[Tape]:
    """Let the CPU have graphs; gives those that are captured. `reading` lets values be read on the host meanwhile."""
    tapes: list[Tape] = []

    def graph() -> Tape:
        tapes.append(Tape(reading))
        return tapes[-1]

    @contextmanager
    def capturing(tape: Tape, stream: Any) -> Iterator[None]:
        try:
            with tape:
                yield
        finally:
            tape.undo()

    stream = SimpleNamespace(wait_stream=lambda other: None)
    patch.setattr(graphed, "DEVICE", "cpu")
    patch.setattr(torch.cuda, "CUDAGraph", graph)
    patch.setattr(torch.cuda, "graph", capturing)
    patch.setattr(torch.cuda, "synchronize", lambda: None)
    patch.setattr(torch.cuda, "Stream", lambda: stream)
    patch.setattr(torch.cuda, "current_stream", lambda: stream)
    patch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    return tapes
