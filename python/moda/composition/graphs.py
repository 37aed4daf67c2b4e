"""Graphs of composed models as JSON (a checked description: nothing in it is ever run) and as Python code."""

from __future__ import annotations

import keyword
import math
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx, nn

from moda.composition.activations import MODULES
from moda.composition.functional import writes

__all__ = ["code_of", "compiled", "describe", "restore"]

_PLAIN = (bool, int, str, type(None))
_KINDS: dict[str, tuple[type, dict[str, Any]]] = {
    name: (kind, {str(v).removeprefix("torch."): v for v in vars(torch).values() if isinstance(v, kind)})
    for name, kind in (("dtype", torch.dtype), ("layout", torch.layout), ("memory_format", torch.memory_format))
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{f"operator.{name}": getattr(operator, name) for name in (
        "add", "eq", "floordiv", "ge", "getitem", "gt", "le", "lt", "mod", "mul", "ne", "neg", "pow", "sub", "truediv",
        "and_", "or_", "not_",
    )},
    **{f"torch.{name}": getattr(torch, name) for name in ("sym_max", "sym_min", "sym_not", "sym_float", "sym_int")},
}  # fmt: skip
_NAMES_OF_FUNCTIONS = {id(function): name for name, function in _FUNCTIONS.items()}
_NAMESPACES = ("aten", "prim", "torchvision")
_FORBIDDEN = re.compile(r"from_file|set_data|^set_?$|resize|storage|_cuda|save|load")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_PATH = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")


# ---- JSON -----------------------------------------------------------------------------------------------------


def describe(graph: fx.Graph) -> list[dict[str, Any]]:
    """A graph as JSON can hold it.

    Raises:
        ValueError: it calls something that a description has no word for; the message says what.
    """
    nodes = []
    for node in graph.nodes:
        entry: dict[str, Any] = {"name": node.name, "op": node.op, "target": _target(node)}
        if node.op in ("call_function", "call_module", "output"):
            entry["args"] = [_encoded(item) for item in node.args]
            entry["kwargs"] = {key: _encoded(item) for key, item in node.kwargs.items()}
        if "autocast" in node.meta:
            device, dtype, enabled, cache = node.meta["autocast"]
            entry["autocast"] = [device, _encoded(dtype), enabled, cache]
        nodes.append(entry)
    return nodes


def _target(node: fx.Node) -> str:
    target: Any = node.target
    if node.op != "call_function":
        return str(target)
    if id(target) in _NAMES_OF_FUNCTIONS:
        return _NAMES_OF_FUNCTIONS[id(target)]
    if isinstance(target, torch._ops.OpOverload) and target.namespace in _NAMESPACES:
        return f"{target.namespace}.{target._overloadpacket.__name__}.{target._overloadname}"
    raise ValueError(f"{target}: an operation that a file cannot describe")


def _encoded(item: Any) -> Any:
    if isinstance(item, fx.Node):
        return {"node": item.name}
    for kind, (type_, _) in _KINDS.items():
        if isinstance(item, type_):
            return {kind: str(item).removeprefix("torch.")}
    if isinstance(item, float):
        return item if math.isfinite(item) else {"float": str(item)}
    if isinstance(item, _PLAIN):
        return item
    if isinstance(item, list | tuple):
        return [_encoded(part) for part in item]
    if isinstance(item, torch.device):
        return {"device": str(item)}
    raise ValueError(f"{type(item).__name__}: an argument that a file cannot describe")


def restore(description: Any) -> fx.Graph:
    """The graph that `describe` described; every name, operation and argument is checked.

    Raises:
        ValueError: it is not such a description.
    """
    if not isinstance(description, list) or not description:
        raise ValueError("graph: expected a list of nodes")
    try:
        return _restored(description)
    except (RuntimeError, TypeError, KeyError, AttributeError, IndexError, AssertionError) as error:
        raise ValueError(f"graph: {error}") from None


def _restored(description: list[Any]) -> fx.Graph:
    graph, made = fx.Graph(), dict[str, fx.Node]()
    for entry in description:
        if not isinstance(entry, dict) or not isinstance(entry.get("op"), str):
            raise ValueError(f"graph: expected nodes, got {entry!r}")
        name, target = entry.get("name"), entry.get("target")
        if not isinstance(name, str) or not _NAME.fullmatch(name) or keyword.iskeyword(name) or name in made:
            raise ValueError(f"graph: {name!r} is no new name of a node")
        args = tuple(_decoded(item, made) for item in entry.get("args", []))
        kwargs = {_checked_name(key): _decoded(item, made) for key, item in entry.get("kwargs", {}).items()}
        made[name] = _node(graph, entry["op"], name, target, args, kwargs)
        if "autocast" in entry:
            made[name].meta["autocast"] = _autocast(entry["autocast"])
    if description[-1]["op"] != "output":
        raise ValueError("graph: expected an output at its end")
    _check_writes(graph)
    graph.lint()
    return graph


def _checked_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError(f"graph: {name!r} is no name of an argument")
    return name


def _node(graph: fx.Graph, op: str, name: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
    if op == "placeholder":
        node = graph.placeholder(_checked_name(str(target)))
        node.name = name
        return node
    if op == "output":
        output: fx.Node = graph.output(*args)
        return output
    if op in ("get_attr", "call_module"):
        if not isinstance(target, str) or not _PATH.fullmatch(target):
            raise ValueError(f"graph: {target!r} is no name of a parameter or module")
        return graph.create_node(op, target, args, kwargs, name=name)
    if op != "call_function":
        raise ValueError(f"graph: unknown kind of node {op!r}")
    return graph.create_node(op, _function(target), args, kwargs, name=name)


def _function(target: Any) -> Callable[..., Any]:
    if target in _FUNCTIONS:
        return _FUNCTIONS[target]
    parts = target.split(".") if isinstance(target, str) else []
    if len(parts) == 3 and parts[0] in _NAMESPACES and all(_NAME.fullmatch(part) for part in parts):
        allowed = not _FORBIDDEN.search(parts[1]) and (parts[0] != "prim" or parts[1] == "device")
        packet = getattr(getattr(torch.ops, parts[0]), parts[1], None) if allowed else None
        overload = getattr(packet, parts[2], None)
        if isinstance(overload, torch._ops.OpOverload):
            return overload
    raise ValueError(f"graph: {target!r} is no operation that a composed model calls")


def _decoded(item: Any, made: Mapping[str, fx.Node]) -> Any:
    if isinstance(item, list):
        return [_decoded(part, made) for part in item]
    if isinstance(item, dict) and len(item) == 1:
        ((kind, value),) = item.items()
        if kind == "node" and value in made:
            return made[value]
        if kind in _KINDS and value in _KINDS[kind][1]:
            return _KINDS[kind][1][value]
        if kind == "float" and value in ("inf", "-inf", "nan"):
            return float(value)
        if kind == "device" and re.fullmatch(r"[a-z]+(:\d+)?", str(value)):
            return torch.device(value)
    elif isinstance(item, float | bool | int | str | None):
        return item
    raise ValueError(f"graph: {item!r} is no argument")


def _autocast(item: Any) -> tuple[str, torch.dtype | None, bool, bool | None]:
    if not isinstance(item, list) or len(item) != 4 or not re.fullmatch(r"[a-z]+", str(item[0])):
        raise ValueError(f"graph: {item!r} is no setting of autocast")
    dtype = _decoded(item[1], {})
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise ValueError(f"graph: {item!r} is no setting of autocast")
    return str(item[0]), dtype, bool(item[2]), None if item[3] is None else bool(item[3])


def _check_writes(graph: fx.Graph) -> None:
    """Only buffers may be written to."""
    for node in graph.nodes:
        if node.op == "call_function" and writes(node) and not any(map(_is_leaf, node.all_input_nodes)):
            raise ValueError(f"graph: {node.name} writes to what is no buffer")


def _is_leaf(node: fx.Node) -> bool:
    while node.op == "call_function" and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    return node.op == "get_attr"


# ---- Python ---------------------------------------------------------------------------------------------------


def code_of(graph: fx.Graph, state: Callable[[str], str], module: Callable[[str], str], name: str = "forward") -> str:
    """The graph as a Python function of `self` and the inputs.

    Args:
        graph: of a composed model.
        state: how a parameter, buffer or constant is got from `self`.
        module: how an activation module is.
        name: of the function.
    """
    last = _last_uses(graph)
    inputs = [node.name for node in graph.nodes if node.op == "placeholder"]
    lines = [f"def {name}(self{''.join(f', {inp}' for inp in inputs)}):"]
    for node in graph.nodes:
        if node.op == "output":
            lines.append(f"    return {_written(node.args[0])}")
        elif node.op != "placeholder":
            forget = "".join(f"{used} = " for used in last.get(node.name, []))
            lines.extend(_statement(node, state, module))
            lines.extend([f"    {forget}None"] if forget else [])
    return "\n".join(lines) + "\n"


def _last_uses(graph: fx.Graph) -> dict[str, list[str]]:
    """Per node the values that nobody uses after it."""
    found: dict[str, list[str]] = {}
    seen: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        for source in node.all_input_nodes:
            if source not in seen and node.op != "output":
                found.setdefault(node.name, []).append(source.name)
            seen.add(source)
    return found


def _statement(node: fx.Node, state: Callable[[str], str], module: Callable[[str], str]) -> list[str]:
    if node.op == "get_attr":
        return [f"    {node.name} = {state(str(node.target))}"]
    called = module(str(node.target)) if node.op == "call_module" else _callable(node)
    given = [_written(item) for item in node.args] + [f"{key}={_written(item)}" for key, item in node.kwargs.items()]
    line = f"{node.name} = {called}({', '.join(given)})"
    if "autocast" not in node.meta:
        return [f"    {line}"]
    device, dtype, enabled, cache = node.meta["autocast"]
    return [
        f"    with torch.autocast({device!r}, dtype={dtype}, enabled={enabled}, cache_enabled={cache}):",
        f"        {line}",
    ]


def _callable(node: fx.Node) -> str:
    name = _target(node)
    return name if name in _FUNCTIONS else f"torch.ops.{name}"


def _written(item: Any) -> str:
    if isinstance(item, fx.Node):
        return item.name
    if isinstance(item, list | tuple):
        return f"[{', '.join(map(_written, item))}]"
    if isinstance(item, float) and not math.isfinite(item):
        return f'float("{item}")'
    if isinstance(item, torch.device):
        return f'torch.device("{item}")'
    return repr(item)


def compiled(code: str, name: str = "forward") -> Callable[..., Any]:
    """The function in a piece of code that `code_of` wrote."""
    scope: dict[str, Any] = {"torch": torch, "operator": operator}
    exec(compile(code, "<composed model>", "exec"), scope)
    function: Callable[..., Any] = scope[name]
    return function


def module_settings(module: nn.Module) -> dict[str, Any]:
    """An activation module as JSON can hold it."""
    for packet, (kind, settings) in MODULES.items():
        if type(module) is kind:
            return {"kind": packet, **{own: getattr(module, own) for own in settings}}
    raise ValueError(f"{type(module).__name__}: a module that a file cannot describe")


def module_of(settings: Any) -> nn.Module:
    """The module that `module_settings` described.

    Raises:
        ValueError: it is not such a description.
    """
    if not isinstance(settings, dict) or settings.get("kind") not in MODULES:
        raise ValueError(f"{settings!r} describes no activation module")
    kind, names = MODULES[settings["kind"]]
    values = {own: settings[own] for own in names if own in settings}
    if len(values) != len(names) or not all(isinstance(value, float | int | str) for value in values.values()):
        raise ValueError(f"{settings!r} describes no activation module")
    return kind(**values)
