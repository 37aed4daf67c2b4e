"""Conditions on the sizes of inputs under which a captured graph is the model's: `L['inputs'][0].size()[2] >= 5`.

torch.export writes them as Python expressions. They are parsed, not run: whole numbers, sizes, arithmetic and
comparisons are all that one may hold.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

__all__ = ["check_condition", "holds", "is_readable", "leaves_free"]

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
    except (SyntaxError, IndexError, TypeError, ZeroDivisionError, RecursionError, MemoryError):
        raise ValueError(f"{condition!r:.200}: no condition on sizes") from None


def check_condition(condition: str, fixed: Sequence[Sequence[int | None]]) -> None:
    """Check that a condition is one on the sizes of inputs, of which some are fixed.

    Raises:
        ValueError: it holds something else than sizes and arithmetic, or a size that no input has.
    """
    # Large numbers for those that may be any: no difference of two is 0, by which a condition might divide.
    holds(
        condition, [[1009 * (dim + 1) if size is None else size for dim, size in enumerate(sizes)] for sizes in fixed]
    )


_SIZE = r"L\['inputs'\]\[(\d+)\]\.size\(\)\[(\d+)\]"
_SAME_SIZES = re.compile(rf"{_SIZE} == {_SIZE}")  # of tokens and their mask, or the sides of a square
_FACTORS = (2, 3, 5, 7, 11, 13)


def leaves_free(conditions: Sequence[str], sizes: Sequence[Sequence[int]], free: Sequence[Sequence[bool]]) -> bool:
    """Whether inputs of other sizes meet these conditions, too: multiples of those of the example, each its own.

    Sizes that have to be the same are multiplied alike. What is left are conditions by which sizes determine each
    other: the features of all positions have to be as many as a linear layer takes, say.

    Args:
        conditions: as torch.export writes them.
        sizes: of the example.
        free: which of them may be others.
    """
    group = {(place, dim): (place, dim) for place, shape in enumerate(sizes) for dim in range(len(shape))}
    for condition in conditions:
        if match := _SAME_SIZES.fullmatch(condition):
            place, dim, other, along = map(int, match.groups())
            one, two = group[place, dim], group[other, along]
            group = {key: one if value == two else value for key, value in group.items()}
    fixed = {group[key] for key in group if not free[key[0]][key[1]]}
    groups = [value for value in dict.fromkeys(group.values()) if value not in fixed]
    for shift in range(2):
        factors = {value: _FACTORS[(place + shift) % len(_FACTORS)] for place, value in enumerate(groups)}
        others = [
            [size * factors.get(group[place, dim], 1) for dim, size in enumerate(shape)]
            for place, shape in enumerate(sizes)
        ]
        if not all(holds(condition, others) for condition in conditions if "==" in condition):
            return False
    return True


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
