"""What a node of a traced graph calls: an activation function, something in place, a view."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

ACTIVATION_MODULES = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish,
    nn.Hardswish, nn.Softplus,
)  # fmt: skip
_ACTIVATION_NAMES = frozenset((
    "relu", "relu6", "leaky_relu", "prelu", "rrelu", "elu", "selu", "celu", "gelu", "silu", "mish", "hardswish",
    "softplus",
))  # fmt: skip
_ACTIVATION_FUNCTIONS: dict[object, str] = {
    function: name
    for name in sorted(_ACTIVATION_NAMES)
    for place in (F, torch)
    for form in (name, f"{name}_")
    if (function := getattr(place, form, None)) is not None
}

INPLACE_OPERATORS: tuple[Callable[..., Any], ...] = (
    operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv, operator.imod, operator.ipow,
    operator.iand, operator.ior, operator.ixor, operator.ilshift, operator.irshift, operator.imatmul,
)  # fmt: skip

# Dropout is here because in eval mode it gives back its very input.
_VIEWS = frozenset((
    "T", "alias", "alpha_dropout", "bfloat16", "broadcast_to", "chunk", "contiguous", "cpu", "cuda", "detach",
    "diagonal", "double", "dropout", "dropout1d", "dropout2d", "dropout3d", "dsplit", "expand", "expand_as",
    "feature_alpha_dropout", "flatten", "float", "getattr", "getitem", "half", "hsplit", "imag", "mT", "moveaxis",
    "movedim", "narrow", "permute", "real", "reshape", "reshape_as", "select", "split", "squeeze", "swapaxes",
    "swapdims", "t", "tensor_split", "to", "transpose", "type", "unbind", "unflatten", "unfold", "unsqueeze", "view",
    "view_as", "vsplit",
))  # fmt: skip
_VIEW_MODULES = (nn.Flatten, nn.Unflatten, nn.Identity, nn.modules.dropout._DropoutNd)


def module_of(node: fx.Node, modules: nn.Module) -> nn.Module | None:
    """The module this node calls, if it calls one."""
    return modules.get_submodule(str(node.target)) if node.op == "call_module" else None


def called(node: fx.Node) -> str:
    """Name of the function or method, or path of the module, that this node calls."""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def source_of(node: fx.Node) -> str:
    """Line of the model that made this node, "" where none is known."""
    return str(node.meta.get("source", ""))


def calling_module(node: fx.Node) -> str:
    """Path of the module whose forward made this node; "" for the model itself."""
    stack = node.meta.get("nn_module_stack") or {}
    return str(next(reversed(stack.values()))[0]) if stack else ""


def activation_name(node: fx.Node, modules: nn.Module) -> str | None:
    """Name of the activation function this node calls ("" for a module), None if it calls none."""
    if node.op == "call_module":
        return "" if isinstance(module_of(node, modules), ACTIVATION_MODULES) else None
    if node.op == "call_function":
        return _ACTIVATION_FUNCTIONS.get(node.target)
    name = called(node).removesuffix("_")
    return name if node.op == "call_method" and name in _ACTIVATION_NAMES else None


def is_plain_relu(node: fx.Node, modules: nn.Module) -> bool:
    """Whether this node is a ReLU call that something else may compute in its stead (no hook waits on it)."""
    module = module_of(node, modules)
    if module is None:
        return activation_name(node, modules) == "relu"
    return type(module) is nn.ReLU and not has_hooks(module)


def has_hooks(module: nn.Module) -> bool:
    """Whether hooks run when this module is called or differentiated."""
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    return any(hooks)


def is_inplace(node: fx.Node, modules: nn.Module) -> bool:
    """Whether this node overwrites a value; which one, `overwritten` tells."""
    if node.op == "call_module":
        return bool(getattr(module_of(node, modules), "inplace", False))
    if node.op not in ("call_method", "call_function"):
        return False
    name = called(node)
    if node.target in INPLACE_OPERATORS or node.target is operator.setitem:
        return True
    if name.endswith("_") and not name.endswith("__"):
        return True
    return node.op == "call_function" and bool(_argument(node, "inplace") or "out" in node.kwargs)


def _argument(node: fx.Node, name: str) -> Any:
    """Argument `name` of a function call, however it was given; None where the function has none."""
    if name in node.kwargs:
        return node.kwargs[name]
    try:
        parameters = list(inspect.signature(node.target).parameters)  # type: ignore[arg-type]
    except (TypeError, ValueError):  # builtins without a signature take no `inplace`
        return None
    place = parameters.index(name) if name in parameters else len(node.args)
    return node.args[place] if place < len(node.args) else None


def overwritten(node: fx.Node) -> fx.Node | None:
    """The value that an in-place node overwrites; None if that is no value of the graph."""
    out = node.kwargs.get("out")
    return out if isinstance(out, fx.Node) else subject(node)


def subject(node: fx.Node) -> fx.Node | None:
    """The value a call works on: its first argument, or the keyword `input`."""
    value = node.args[0] if node.args else node.kwargs.get("input")
    return value if isinstance(value, fx.Node) else None


def may_view(node: fx.Node, modules: nn.Module) -> bool:
    """Whether this node's output may share memory with the value it works on."""
    if node.op == "call_module":
        module = module_of(node, modules)
        return isinstance(module, _VIEW_MODULES) or getattr(module, "may_return_input", False)
    if node.op == "call_function" and not _is_torchs(node.target):
        return True  # a function of someone else's, kept whole by torch.fx.wrap
    return node.op in ("call_method", "call_function") and called(node) in _VIEWS


def _is_torchs(function: object) -> bool:
    home = getattr(function, "__module__", None) or "torch"
    return home.split(".")[0] in ("torch", "_operator", "operator", "math", "builtins")
