"""Conditions on the sizes of inputs under which a captured graph is the model's: `L['inputs'][0].size()[2] >= 5`.

torch.export writes them as Python expressions. They are parsed, not run: whole numbers, sizes, arithmetic and
comparisons are all that one may hold.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

__all__ = ["holds", "is_readable"]

_OPERATORS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.USub: operator.neg,
    ast.Not: operator.not_,
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {"max": max, "min": min}


def is_readable(condition: str, sizes: Sequence[Sequence[int]]) -> bool:
    """Whether a condition can be checked, and holds for these sizes."""
    try:
        return holds(condition, sizes)
    except ValueError:
        return False


def holds(condition: str, sizes: Sequence[Sequence[int]]) -> bool:
    """Whether inputs of these sizes meet a condition.

    Raises:
        ValueError: the condition holds something else than sizes and arithmetic.
    """
    try:
        tree = ast.parse(condition, mode="eval")
        return bool(_value(tree.body, sizes))
    except (SyntaxError, IndexError, ZeroDivisionError, RecursionError):
        raise ValueError(f"{condition!r}: no condition on sizes") from None


def _value(node: ast.AST, sizes: Sequence[Sequence[int]]) -> Any:
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return node.value
    if isinstance(node, ast.Subscript):
        return _size(node, sizes)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.left, sizes), _value(node.right, sizes))
    if isinstance(node, ast.UnaryOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.operand, sizes))
    if isinstance(node, ast.BoolOp):
        values = [_value(part, sizes) for part in node.values]
        return all(values) if isinstance(node.op, ast.And) else any(values)
    if isinstance(node, ast.Compare):
        parts = [_value(part, sizes) for part in (node.left, *node.comparators)]
        kinds = [_OPERATORS.get(type(op)) for op in node.ops]
        if None not in kinds:
            return all(kind(*pair) for kind, pair in zip(kinds, pairwise(parts), strict=True) if kind)
    if (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in _FUNCTIONS
        and not node.keywords
    ):
        return _FUNCTIONS[node.func.id](*(_value(part, sizes) for part in node.args))
    raise ValueError(f"{ast.unparse(node)!r}: no condition on sizes")


def _size(node: ast.Subscript, sizes: Sequence[Sequence[int]]) -> int:
    """`L['inputs'][place].size()[dim]`."""
    text = ast.unparse(node)
    match node:
        case ast.Subscript(
            value=ast.Call(
                func=ast.Attribute(
                    value=ast.Subscript(
                        value=ast.Subscript(value=ast.Name(id="L"), slice=ast.Constant(value="inputs")),
                        slice=ast.Constant(value=int(place)),
                    ),
                    attr="size",
                ),
                args=[],
                keywords=[],
            ),
            slice=ast.Constant(value=int(dim)),
        ):
            return sizes[place][dim]
    raise ValueError(f"{text!r}: no size of an input")
