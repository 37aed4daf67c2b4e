"""Takes overwriting out of a graph: every value is written once, so that a value can be read without its history.

Where the model overwrites a value (`x += y`, `x[:, 0] = 0`, `relu(x, inplace=True)`) the graph gets a new value, and
whoever reads the old one afterwards, under whatever view, reads the new one. Buffers of the model (the counter of a
batch norm) stay what they are: they are written to.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

__all__ = ["UnfollowedError", "make_functional", "writes"]

aten = torch.ops.aten


class UnfollowedError(ValueError):
    """A value is overwritten in a way that cannot be followed."""


def writes(node: fx.Node) -> bool:
    """Whether an operation overwrites something it is given."""
    schema: Any = getattr(node.target, "_schema", None)
    return bool(schema) and any(a.alias_info is not None and a.alias_info.is_write for a in schema.arguments)


def _written(node: fx.Node) -> list[fx.Node]:
    """The one value that an operation overwrites."""
    target: Any = node.target
    places = [(i, a.name) for i, a in enumerate(target._schema.arguments) if a.alias_info and a.alias_info.is_write]
    given = [node.kwargs.get(name, node.args[i] if i < len(node.args) else None) for i, name in places]
    if len(given) != 1 or not isinstance(given[0], fx.Node):
        raise _refusal(node, "writes into several tensors at once")
    return [given[0]]


def make_functional(graph: fx.Graph) -> None:
    """Rewrite `graph` so that only leaves (`get_attr`) are ever overwritten.

    Raises:
        UnfollowedError: a value is overwritten in a way that cannot be followed; the message has the line.
    """
    if any(node.op == "call_function" and writes(node) for node in graph.nodes):
        for node in list(graph.nodes):
            if node.op == "call_function" and _name(node) in _SPLITS:
                _take_apart(graph, node)
        _Rewriter(graph).run()
    graph.lint()


_SPLITS = ("split", "split_with_sizes", "chunk", "tensor_split", "unbind", "unsafe_split", "unsafe_chunk")


def _name(node: fx.Node) -> str:
    target: Any = node.target
    return str(getattr(getattr(target, "_overloadpacket", target), "__name__", ""))


def _take_apart(graph: fx.Graph, node: fx.Node) -> None:
    """Let parts of a value, which may be overwritten one by one, be slices of it."""
    target: Any = node.target
    place = next(i for i, argument in enumerate(target._schema.arguments) if argument.name == "dim")
    source, dim = node.args[0], int(node.kwargs.get("dim", node.args[place] if place < len(node.args) else 0))  # type: ignore[arg-type]
    values = node.meta["val"]
    removed = _name(node) == "unbind"
    sizes = [1 if removed else value.shape[dim] for value in values]
    if not all(isinstance(size, int) for size in sizes):
        return
    for user in list(node.users):
        part = int(user.args[1])  # type: ignore[arg-type]
        start = sum(sizes[:part])
        with graph.inserting_before(user):
            args = (source, dim, start) if removed else (source, dim, start, start + sizes[part])
            made = graph.call_function(aten.select.int if removed else aten.slice.Tensor, args)
        made.meta = dict(user.meta)
        user.replace_all_uses_with(made)
        graph.erase_node(user)
    graph.erase_node(node)


class _Rewriter:
    """Follows which values share memory, and their newest names."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.parent: dict[fx.Node, fx.Node] = {}  # of a view, the value that it looks at
        self.given: dict[fx.Node, fx.Node] = {}  # of a view, what that was when the view was made
        self.current: dict[fx.Node, fx.Node] = {}  # newest value of what a node once made
        self.seen: dict[fx.Node, int] = {}  # how often the memory was overwritten when `current` was made
        self.overwritten: dict[fx.Node, int] = {}  # per root

    def run(self) -> None:
        for node in list(self.graph.nodes):
            if node.op not in ("call_function", "output"):
                continue
            with self.graph.inserting_before(node):
                if node.op == "call_function" and writes(node):
                    self._overwrite(node)
                    continue
                self._note_view(node)
                node.args = fx.map_arg(node.args, self._newest)
                node.kwargs = fx.map_arg(node.kwargs, self._newest)

    def _note_view(self, node: fx.Node) -> None:
        """Remember what a node's value shares memory with, and what that holds now."""
        sources = [n for n in node.all_input_nodes if _storages(n) & _storages(node)]
        if node.op == "call_function" and sources:
            self.parent[node] = sources[0]
            self.given[node] = self._newest(sources[0])
            self.seen[node] = self.overwritten.get(self._root(node), 0)

    def _root(self, node: fx.Node) -> fx.Node:
        while node in self.parent:
            node = self.parent[node]
        return node

    def _newest(self, node: fx.Node) -> fx.Node:
        """What the memory that `node` looks at holds now."""
        root = self._root(node)
        count = self.overwritten.get(root, 0)
        if self.seen.get(node, 0) < count and node is not root:
            source = self._newest(self.parent[node])
            self.current[node] = self._again(node, self.parent[node], source)
            self.seen[node] = count
        return self.current.get(node, node)

    def _again(self, view: fx.Node, parent: fx.Node, source: fx.Node) -> fx.Node:
        made = self.graph.create_node(
            "call_function",
            view.target,
            fx.map_arg(view.args, lambda n: source if n in (parent, self.given.get(view)) else n),
            view.kwargs,
        )
        made.meta = dict(view.meta)
        return made

    def _overwrite(self, node: fx.Node) -> None:
        (target,) = _written(node)
        root = self._root(target)
        node.args = fx.map_arg(node.args, lambda n: n if n is target else self._newest(n))
        node.kwargs = fx.map_arg(node.kwargs, lambda n: n if n is target else self._newest(n))
        if root.op == "get_attr":  # a buffer of the model, which is to be written to
            self.parent[node] = target
            return
        old = self._newest(target)
        made = self._functional(node, old)
        self.overwritten[root] = self.overwritten.get(root, 0) + 1
        self._write_back(node, target, made)
        node.replace_all_uses_with(target)
        self.graph.erase_node(node)

    def _write_back(self, node: fx.Node, target: fx.Node, value: fx.Node) -> None:
        """Let everything from `target` up to its root be what it is now."""
        count = self.overwritten[self._root(target)]
        while True:
            self.current[target], self.seen[target] = value, count
            if target not in self.parent:
                return
            parent = self.parent[target]
            value = self._through(node, target, parent, value, self.current.get(parent, parent))
            target = parent

    def _functional(self, node: fx.Node, old: fx.Node) -> fx.Node:
        target: Any = node.target
        packet, overload = target._overloadpacket.__name__, target._overloadname
        value = node.meta["val"]
        if packet == "copy_":
            made = self._copied(node, old, value)
        elif packet == "zero_":
            made = self._call(aten.zeros_like.default, (old,), value)
        else:
            made = self._call(*_pure(node, packet, overload, old), value)
            if "out" in node.kwargs:  # whose precision may be another
                made = self._call(aten.to.dtype, (made, value.dtype), value)
        made.meta = {**node.meta, "val": value}
        return made

    def _copied(self, node: fx.Node, old: fx.Node, value: Any) -> fx.Node:
        """What `old` holds after something was copied into it: that, where it is of the same kind."""
        source = node.args[1]
        given = source.meta.get("val") if isinstance(source, fx.Node) else None
        if not isinstance(source, fx.Node) or not isinstance(given, Tensor) or not _alike(given, value):
            return self._call(aten.copy.default, (old, *node.args[1:]), value)
        buffer = self._root(source).op == "get_attr"  # which may be written to afterwards
        return self._call(aten.clone.default if buffer else aten.alias.default, (source,), value)

    def _through(self, node: fx.Node, view: fx.Node, parent: fx.Node, value: fx.Node, old: fx.Node) -> fx.Node:
        """`old` with what `view` looks at replaced by `value`."""
        shape = parent.meta["val"]
        packet = _name(view)
        if not isinstance(shape, Tensor):
            raise _refusal(node, "writes into a part of a tensor, of a size that follows the input")
        args: tuple[Any, ...] = view.args
        if packet == "slice":
            return self._call(aten.slice_scatter.default, (old, value, *args[1:]), shape)
        if packet == "select":
            return self._call(aten.select_scatter.default, (old, value, *args[1:]), shape)
        if packet == "unsqueeze":
            return self._call(aten.squeeze.dim, (value, args[1]), shape)
        if packet in ("transpose", "t"):
            dims = args[1:] or (0, 1)
            return self._call(aten.transpose.int, (value, *dims), shape)
        if packet == "permute":
            rank = len(args[1])
            order = [dim % rank for dim in args[1]]
            return self._call(aten.permute.default, (value, [order.index(dim) for dim in range(rank)]), shape)
        if tuple(view.meta["val"].shape) == tuple(shape.shape):  # detach, contiguous, dropout in evaluation mode
            return value
        if packet == "narrow" and all(isinstance(arg, int) for arg in args[1:]):
            dim, start, length = args[1:]
            return self._call(aten.slice_scatter.default, (old, value, dim, start, start + length), shape)
        if packet in ("view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "ravel"):
            return self._call(aten.reshape.default, (value, self._sizes(old, shape)), shape)
        raise _refusal(node, f"writes into a part of a tensor under {packet}")

    def _sizes(self, old: fx.Node, like: Tensor) -> list[Any]:
        """A shape as arguments: a single size that follows the input is left open, several are asked for."""
        follow = [dim for dim, size in enumerate(like.shape) if not isinstance(size, int)]
        if len(follow) < 2:
            return [-1 if dim in follow else size for dim, size in enumerate(like.shape)]
        return [
            self._call(aten.sym_size.int, (old, dim), size) if dim in follow else size
            for dim, size in enumerate(like.shape)
        ]

    def _call(self, target: Any, args: tuple[Any, ...], *rest: Any) -> fx.Node:
        """Call `target(*args, **kwargs)`; the rest is the value, or the keyword arguments and the value."""
        *kwargs, value = rest
        made = self.graph.create_node("call_function", target, args, dict(kwargs[0]) if kwargs else {})
        made.meta = {"val": value, "where": "", "path": ""}
        return made


def _pure(node: fx.Node, packet: str, overload: str, old: fx.Node) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """The operation that gives what `node` writes, with its arguments."""
    target: Any = node.target
    if packet.endswith("_"):
        renamed = _RANDOM.get((packet, overload))
        if renamed is not None:
            return renamed, (old, *_numbers(node)), {}
        function = getattr(getattr(aten, packet.removesuffix("_"), None), overload, None)
        if function is not None:
            return function, (old, *node.args[1:]), dict(node.kwargs)
    if "out" in node.kwargs:
        wanted = [a.name for a in target._schema.arguments if a.name != "out"]
        for name in target._overloadpacket.overloads():
            candidate = getattr(target._overloadpacket, name)
            if [a.name for a in candidate._schema.arguments] == wanted:
                return candidate, node.args, {key: value for key, value in node.kwargs.items() if key != "out"}
    raise _refusal(node, f"writes into a tensor by {packet}")


_RANDOM = {  # those whose names differ by more than an underscore
    ("bernoulli_", "float"): aten.bernoulli.p,
    ("bernoulli_", "Tensor"): aten.bernoulli.Tensor,
    ("normal_", "default"): aten.normal_functional.default,
}


def _numbers(node: fx.Node) -> list[Any]:
    """What a call that draws random numbers is given besides its tensor, defaults included."""
    target: Any = node.target
    known = [argument for argument in target._schema.arguments[1:] if not argument.kwarg_only]
    given = [*node.args[1:], *(argument.default_value for argument in known[len(node.args) - 1 :])]
    return [node.kwargs.get(argument.name, value) for argument, value in zip(known, given, strict=True)]


def _alike(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and one.device == other.device


def _storages(node: fx.Node) -> set[int]:
    value = node.meta.get("val")
    values = value if isinstance(value, list | tuple) else [value]
    return {x.untyped_storage()._cdata for x in values if isinstance(x, Tensor)}


def _refusal(node: fx.Node, what: str) -> UnfollowedError:
    place = node.meta.get("where") or "a line that is not known"
    return UnfollowedError(
        f"model: {place}: {what}, which cannot be followed; write it without (torch.where, torch.cat)"
    )
