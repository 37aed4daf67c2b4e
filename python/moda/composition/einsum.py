"""Einstein sums and products over several axes, written as transpositions and matrix products, which have rules.

    nhtd,nhsd->nhts    a product of two activations, one a head
    ntd,hkd->nthk      an activation times a parameter, its axes joined before and told apart afterwards

What has letters twice in one operand (a diagonal), or axes of one position that broadcast, stays as it is.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from moda.composition.movers import argument, packet_of
from moda.composition.values import is_tensor, shape_of

__all__ = ["write_out"]

aten = torch.ops.aten


def write_out(graph: fx.Graph) -> None:
    """Replace the sums of a graph by transpositions, sums and matrix products."""
    depends: set[fx.Node] = set()
    for node in list(graph.nodes):
        if node.op == "placeholder" or any(source in depends for source in node.all_input_nodes):
            depends.add(node)
        found = _read(node)
        if found is None:
            continue
        operands, result = found
        with graph.inserting_before(node):
            value = _Writer(graph, node, depends).contracted(operands, result)
        if node in depends:
            depends.add(value)
        node.replace_all_uses_with(value)
        graph.erase_node(node)


@dataclass(frozen=True)
class _Operand:
    """A tensor, and a letter for each of its axes."""

    node: fx.Node
    letters: str


def _read(node: fx.Node) -> tuple[list[_Operand], str] | None:
    """The operands of a call, and the letters of its result; None if it is no sum, or one that stays."""
    packet = packet_of(node) if node.op == "call_function" else ""
    if packet == "einsum":
        found = _read_einsum(node)
    elif packet == "tensordot" and "out" not in node.kwargs:
        found = _read_tensordot(node)
    else:
        return None
    if found is None:
        return None
    operands, result = found
    sizes: dict[str, int] = {}
    for operand in operands:
        if len(operand.letters) != len(set(operand.letters)) or len(operand.letters) != len(shape_of(operand.node)):
            return None
        for letter, size in zip(operand.letters, shape_of(operand.node), strict=True):
            if sizes.setdefault(letter, size) != size:
                return None
    return (operands, result) if len(set(result)) == len(result) and set(result) <= set(sizes) else None


def _read_einsum(node: fx.Node) -> tuple[list[_Operand], str] | None:
    equation, tensors = str(argument(node, "equation")).replace(" ", ""), argument(node, "tensors")
    if not all(is_tensor(tensor) for tensor in tensors):
        return None
    given, arrow, result = equation.partition("->")
    terms = given.split(",")
    if len(terms) != len(tensors):
        return None
    unused = [letter for letter in string.ascii_letters if letter not in equation]
    ranks = [len(shape_of(t)) - len(term.replace("...", "")) for t, term in zip(tensors, terms, strict=True)]
    dots = max((rank for rank, term in zip(ranks, terms, strict=True) if "..." in term), default=0)
    rest = "".join(unused[:dots])
    spelt = [term.replace("...", rest[dots - rank :]) for term, rank in zip(terms, ranks, strict=True)]
    if not arrow:
        every = "".join(terms).replace(".", "")
        result = ("..." if "..." in given else "") + "".join(sorted(c for c in set(every) if every.count(c) == 1))
    operands = [_Operand(tensor, letters) for tensor, letters in zip(tensors, spelt, strict=True)]
    return operands, result.replace("...", rest)


def _read_tensordot(node: fx.Node) -> tuple[list[_Operand], str] | None:
    one, other = (argument(node, name) for name in ("self", "other"))
    first, second = (argument(node, name) for name in ("dims_self", "dims_other"))
    if not is_tensor(one) or not is_tensor(other):
        return None
    rank, width = len(shape_of(one)), len(shape_of(other))
    letters = string.ascii_letters[:rank]
    others = list(string.ascii_letters[rank : rank + width])
    for mine, theirs in zip(first, second, strict=True):
        others[theirs] = letters[mine]
    result = "".join(c for c in letters if c not in others) + "".join(c for c in others if c not in letters)
    return [_Operand(one, letters), _Operand(other, "".join(others))], result


class _Writer:
    """Writes the calls that take the place of one."""

    def __init__(self, graph: fx.Graph, node: fx.Node, depends: set[fx.Node]) -> None:
        self.graph = graph
        self.meta: dict[str, Any] = {key: node.meta[key] for key in ("where", "path", "autocast") if key in node.meta}
        self.depends = depends

    def contracted(self, operands: Sequence[_Operand], result: str) -> fx.Node:
        """The operands one after the other, each letter summed over when nobody needs it any more."""
        first, *others = operands
        while others:
            second, *others = others
            later = set(result).union(*(operand.letters for operand in others))
            first = self._pair(self._summed(first, later | set(second.letters)), second, later)
        return self._permuted(self._summed(first, set(result)), result)

    def _summed(self, operand: _Operand, needed: set[str]) -> _Operand:
        dims = [place for place, letter in enumerate(operand.letters) if letter not in needed]
        if not dims:
            return operand
        left = "".join(letter for letter in operand.letters if letter in needed)
        return _Operand(self._call(aten.sum.dim_IntList, operand.node, dims), left)

    def _permuted(self, operand: _Operand, letters: str) -> fx.Node:
        order = [operand.letters.index(letter) for letter in letters]
        if order == list(range(len(order))):
            return operand.node
        return self._call(aten.permute.default, operand.node, order)

    def _pair(self, left: _Operand, right: _Operand, later: set[str]) -> _Operand:
        """Two operands; a parameter is put to the right."""
        right = self._summed(right, later | set(left.letters))
        if left.node not in self.depends and right.node in self.depends:
            left, right = right, left
        both = [letter for letter in left.letters if letter in right.letters]
        shared = "".join(letter for letter in both if letter in later)
        summed = "".join(letter for letter in both if letter not in later)
        rows = "".join(letter for letter in left.letters if letter not in both)
        columns = "".join(letter for letter in right.letters if letter not in both)
        if not summed:
            return self._product(left, right, shared + rows + columns)
        one = self._folded(left, [*shared, *(rows if self._is_weight(right, shared) else [rows]), summed])
        other = self._folded(right, [*shared, summed, columns])
        value = self._call(aten.matmul.default, one, other)
        if len(columns) != 1:
            value = self._unfolded(value, -1, [(right, letter) for letter in columns])
        if len(rows) != 1 and not self._is_weight(right, shared):
            value = self._unfolded(value, len(shared), [(left, letter) for letter in rows])
        return _Operand(value, shared + rows + columns)

    def _is_weight(self, right: _Operand, shared: str) -> bool:
        """Whether a product has a rule for any number of rows: that of an activation with a parameter."""
        return not shared and right.node not in self.depends

    def _product(self, left: _Operand, right: _Operand, letters: str) -> _Operand:
        """Nothing is summed over: element by element, each with the axes of the other."""
        sides = []
        for operand in (left, right):
            value = self._permuted(operand, "".join(letter for letter in letters if letter in operand.letters))
            for place, letter in enumerate(letters):
                if letter not in operand.letters:
                    value = self._call(aten.unsqueeze.default, value, place)
            sides.append(value)
        return _Operand(self._call(aten.mul.Tensor, *sides), letters)

    def _folded(self, operand: _Operand, groups: Sequence[str]) -> fx.Node:
        """With axes in this order; those of a group are one, none are one of size 1."""
        value = self._permuted(operand, "".join(groups))
        for place, group in enumerate(groups):
            if not group:
                value = self._call(aten.unsqueeze.default, value, place)
            elif len(group) > 1:
                value = self._call(aten.flatten.using_ints, value, place, place + len(group) - 1)
        return value

    def _unfolded(self, value: fx.Node, dim: int, axes: Sequence[tuple[_Operand, str]]) -> fx.Node:
        """Axes that were one apart again."""
        if not axes:
            return self._call(aten.squeeze.dim, value, dim)
        sizes: list[Any] = []
        free = 0
        for operand, letter in axes:
            place = operand.letters.index(letter)
            size: Any = operand.node.meta["val"].shape[place]
            if not isinstance(size, int):
                free += 1
                size = -1 if free == 1 else self._call(aten.sym_size.int, operand.node, place)
            sizes.append(size)
        return self._call(aten.unflatten.int, value, dim, sizes)

    def _call(self, target: Any, *args: Any) -> fx.Node:
        made = self.graph.call_function(target, args)
        values = fx.map_arg(args, lambda node: node.meta["val"])
        made.meta = {**self.meta, "val": target(*values)}
        if any(source in self.depends for source in made.all_input_nodes):
            self.depends.add(made)
        return made
