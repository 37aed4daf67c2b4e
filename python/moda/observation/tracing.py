"""Turns a model into a graph that does the same, or says which line of the model does not allow it.

`torch.fx` by itself freezes what it cannot see: the training flag handed to `F.dropout`, random tensors made in
forward, gradient checkpointing, hooks of modules, `x += y` as the in-place operation it is. Here each of these is
kept alive or refused. Numbers and flags that a model keeps as plain attributes are read once, at tracing.
"""

from __future__ import annotations

import operator
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import CodeType, FrameType, TracebackType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import checkpoint

from moda.observation.calls import INPLACE_OPERATORS, calling_module, has_hooks, source_of


class TracingError(ValueError):
    """The model cannot be turned into a graph; the message names the line of the model that is the cause."""


def refusal(why: str, source: str) -> TracingError:
    """The error that says why, where, and what else can be done."""
    where = f"{source}: " if source else ""
    return TracingError(
        f"model: cannot be traced faithfully: {where}{why}. Change that, or use "
        'instrument(model, method="hooks"), which sees activation modules only'
    )


def trace(model: nn.Module) -> tuple[fx.Graph, dict[str, Tensor]]:
    """Graph of `model`, and the tensors that its forward makes from constants, by the names the graph gives them.

    `model` is as before afterwards. Each node's `meta["source"]` is the line of the model that made it.
    """
    graph, constants = _trace_in_mode(model, training=True)
    other, other_constants = _trace_in_mode(model, training=False)
    _merge_modes(graph, other)
    for name, value in constants.items():
        if not torch.equal(value, other_constants[name]):
            node = next(node for node in graph.nodes if node.target == name)
            raise refusal("a tensor made here is random; a trace would freeze it", source_of(node))
    return graph, constants


def _trace_in_mode(model: nn.Module, training: bool) -> tuple[fx.Graph, dict[str, Tensor]]:
    before = {module: dict(module.__dict__) for module in model.modules()}
    _refuse_hooks(model, "")
    try:
        for module in before:
            module.training = training  # not train(): a module may override it
        graph = _Tracer().trace(model)
        made = {name: value for name, value in model.__dict__.items() if name not in before[model]}
    except TracingError:
        raise
    except Exception as error:
        raise refusal(f"{type(error).__name__}: {error}".rstrip("."), _cause(error.__traceback__)) from error
    finally:
        for module, attributes in before.items():
            module.__dict__.clear()
            module.__dict__.update(attributes)
    return graph, {name: value for name, value in made.items() if name.startswith("_tensor_constant")}


# ---- one trace ---


class _Proxy(fx.Proxy):
    """Traces `x += y` as the in-place operation it is; torch.fx by itself makes a new value of it."""


def _traced(function: Callable[..., Any]) -> Callable[[fx.Proxy, Any], Any]:
    def method(self: fx.Proxy, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return method


for _function in INPLACE_OPERATORS:
    setattr(_Proxy, f"__{_function.__name__}__", _traced(_function))


class _Tracer(fx.Tracer):
    """Notes the model's line behind every node, and refuses what a trace would silently lose."""

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        frames = list(_frames(sys._getframe()))
        node.meta["source"] = _innermost(frames) or _start_of(self.root)
        inside = [i for i, frame in enumerate(frames) if frame.f_code.co_filename == checkpoint.__file__]
        if inside:
            why = "gradient checkpointing inside the model would be lost (checkpoint the whole model's call)"
            raise refusal(why, _innermost(frames[inside[-1] :]))
        return node

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        path = self.path_of_module(m)
        if not self.is_leaf_module(m, path):
            _refuse_hooks(m, path)
        return super().call_module(m, forward, args, kwargs)


def _refuse_hooks(module: nn.Module, path: str) -> None:
    if has_hooks(module):
        which = f"module {path!r}" if path else "the model"
        raise refusal(f"{which} has hooks, which a traced graph does not call", "")


_NOT_THE_MODEL = (f"{Path(torch.__file__).parent}{os.sep}", __file__, "<")


def _is_models(code: CodeType) -> bool:
    return not code.co_filename.startswith(_NOT_THE_MODEL)


def _frames(frame: FrameType | None) -> Iterator[FrameType]:
    """From `frame` outwards, to where tracing began."""
    while frame is not None and frame.f_code is not _trace_in_mode.__code__:
        yield frame
        frame = frame.f_back


def _line(code: CodeType, line: int) -> str:
    return f"{code.co_filename}:{line} in {code.co_name}"


def _innermost(frames: Sequence[FrameType]) -> str:
    """Line of the model that is being run, "" if none."""
    return next((_line(frame.f_code, frame.f_lineno) for frame in frames if _is_models(frame.f_code)), "")


def _cause(traceback: TracebackType | None) -> str:
    """Last line of the model that an exception passed through, "" if none."""
    line = ""
    while traceback is not None:
        if _is_models(traceback.tb_frame.f_code):
            line = _line(traceback.tb_frame.f_code, traceback.tb_lineno)
        traceback = traceback.tb_next
    return line


def _start_of(model: nn.Module) -> str:
    code = getattr(type(model).forward, "__code__", None)
    return _line(code, code.co_firstlineno) if code is not None and _is_models(code) else ""


# ---- two traces made one ---


def _merge_modes(train: fx.Graph, evaluation: fx.Graph) -> None:
    """Make `train` follow the training flag, where flags are all that differs between the two graphs."""
    twins = dict(zip(evaluation.nodes, train.nodes, strict=False))
    for other, node in twins.items():
        merge = _ModeMerger(node, twins)
        try:
            if (node.op, node.target) != (other.op, other.target):
                raise _DifferentError
            node.args, node.kwargs = merge(node.args, other.args), merge(node.kwargs, other.kwargs)
        except _DifferentError:
            raise refusal("the model does different things in train and eval mode", source_of(node)) from None


class _DifferentError(Exception):
    pass


class _ModeMerger:
    """Arguments of a node of the train graph, compared with those of its twin in the eval graph."""

    def __init__(self, node: fx.Node, twins: dict[fx.Node, fx.Node]) -> None:
        self.node, self.twins = node, twins

    def __call__(self, train: Any, other: Any) -> Any:
        _require(type(train) is type(other))
        if isinstance(train, fx.Node):
            _require(self.twins.get(other) is train)
        elif isinstance(train, bool) and train != other:
            return self._live_flag(train)
        elif isinstance(train, dict):
            _require(train.keys() == other.keys())
            return {key: self(value, other[key]) for key, value in train.items()}
        elif isinstance(train, slice):
            return slice(*self(*[(part.start, part.stop, part.step) for part in (train, other)]))
        elif isinstance(train, tuple | list):
            _require(len(train) == len(other))
            merged = [self(*pair) for pair in zip(train, other, strict=True)]
            return type(train)(*merged) if hasattr(train, "_fields") else type(train)(merged)
        else:
            _require(repr(train) == repr(other))
        return train

    def _live_flag(self, in_training: bool) -> fx.Node:
        path, graph = calling_module(self.node), self.node.graph
        with graph.inserting_before(self.node):
            flag = graph.create_node("get_attr", f"{path}.training" if path else "training")
            flag.meta = dict(self.node.meta)
            return flag if in_training else graph.call_function(operator.not_, (flag,))


def _require(same: bool) -> None:
    if not same:
        raise _DifferentError
