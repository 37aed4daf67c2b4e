"""The numbers that stand for sizes which follow the input, while a composition is planned.

A plan is made with numbers, and has to hold for inputs of any size. Where an axis is folded of several, heads of all
samples say, what varies along it is told from what repeats itself by a number of samples that shares no factor with
anything else. Sizes that depend on the values of tensors are those of the example.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, fx

from moda.composition.conditions import holds
from moda.composition.functional import writes
from moda.composition.values import is_tensor, let_sizes_be

__all__ = ["set_sizes"]

_SAMPLES = (3, 5, 7, 11, 13, 17, 19, 23)


def set_sizes(
    graph: fx.Graph, tensors: Mapping[str, Tensor], inputs: Sequence[Tensor], conditions: Sequence[str]
) -> list[fx.Node]:
    """Choose the numbers; returns the nodes with sizes for which there is none.

    Args:
        graph: as captured, not functional yet.
        tensors: parameters, buffers and constants by name.
        inputs: the example's tensors.
        conditions: on sizes of inputs.
    """
    sizes = {node: list(_symbolic(node.meta.get("val"))) for node in graph.nodes}
    every = [size for found in sizes.values() for size in found]
    if not every:
        return []
    known = {s.node.expr: int(s.node.hint) for s in every if s.node.expr.is_symbol and s.node.hint is not None}
    unknown = {symbol for size in every for symbol in size.node.expr.free_symbols} - set(known)
    if unknown:
        known |= _observed(graph, tensors, inputs)
    else:
        known |= _apart(graph, known, {size.node.expr for size in every}, conditions)
    let_sizes_be(every[0].node.shape_env, known)
    return [node for node, found in sizes.items() if any(not s.node.expr.free_symbols <= set(known) for s in found)]


def _symbolic(value: Any) -> Iterator[Any]:
    """The sizes in a value that are no numbers."""
    for one in value if isinstance(value, list | tuple) else [value]:
        parts = one.shape if isinstance(one, Tensor) else [one]
        yield from (part for part in parts if isinstance(part, torch.SymInt))


def _apart(
    graph: fx.Graph, known: Mapping[Any, int], expressions: set[Any], conditions: Sequence[str]
) -> dict[Any, int]:
    """A number of samples that shares no factor with what it is multiplied with; none if it is no free size."""
    shapes = [node.meta["val"].shape for node in graph.nodes if node.op == "placeholder" and is_tensor(node)]
    firsts = [shape[0] for shape in shapes if len(shape) and isinstance(shape[0], torch.SymInt)]
    symbol = firsts[0].node.expr if firsts else None
    if symbol not in known:
        return {}
    beside = {int(e.xreplace({**known, symbol: 1})) for e in expressions if symbol in e.free_symbols}
    for number in _SAMPLES:
        chosen = {**known, symbol: number}
        sizes = [[s if isinstance(s, int) else int(s.node.expr.xreplace(chosen)) for s in shape] for shape in shapes]
        if all(size % number for size in beside) and all(holds(condition, sizes) for condition in conditions):
            return {symbol: number}
    return {}


def _observed(graph: fx.Graph, tensors: Mapping[str, Tensor], inputs: Sequence[Tensor]) -> dict[Any, int]:
    """What the symbols are when the graph runs on the example."""
    found: dict[Any, int] = {}
    values: dict[fx.Node, Any] = {}
    given = iter(inputs)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for node in graph.nodes:
            if node.op == "placeholder":
                values[node] = next(given)
            elif node.op == "get_attr":
                tensor = tensors[str(node.target)]
                values[node] = tensor.clone() if any(map(writes, node.users)) else tensor
            elif node.op == "call_function":
                values[node] = _called(node, values)
            _note(node.meta.get("val"), values.get(node), found)
    return found


def _called(node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    target: Any = node.target
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda source: values[source])
    device, dtype, enabled, cache = node.meta.get("autocast", (None, None, None, None))
    context = nullcontext() if device is None else torch.autocast(device, dtype, enabled=enabled, cache_enabled=cache)
    with context:
        return target(*args, **kwargs)


def _note(value: Any, given: Any, found: dict[Any, int]) -> None:
    """Take the numbers of sizes that are symbols themselves."""
    pairs = (
        zip(value, given, strict=True) if isinstance(value, list | tuple) and given is not None else [(value, given)]
    )
    for one, other in pairs:
        sizes = zip(one.shape, other.shape, strict=True) if isinstance(one, Tensor) else [(one, other)]
        for size, number in sizes:
            if isinstance(size, torch.SymInt) and size.node.expr.is_symbol:
                found[size.node.expr] = int(number)
