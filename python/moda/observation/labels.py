"""Which axis holds what: labels of samples and neurons, followed through the operations of a forward pass.

Labels are numbers along one axis of a tensor: at a model's input, of the samples along the first axis; at an operation
that owns neurons (a convolution, a linear layer, a norm), of its neurons. Operations that only move data are run on a
tensor of labels, and where these land is read off, whatever the operation does. Others keep the axis where they keep
the number of axes and its size. What cannot be known is None.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Kind = Literal["samples", "neurons"]

_SECOND = frozenset((
    "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "convolution",
    "deform_conv2d", "batch_norm", "instance_norm", "group_norm", "native_batch_norm", "native_group_norm",
))  # fmt: skip
_LAST = frozenset((
    "linear", "bilinear", "embedding", "embedding_bag", "multi_head_attention_forward", "lstm", "gru", "rnn_tanh",
    "rnn_relu",
))  # fmt: skip
_LAYER_NORMS = frozenset(("layer_norm", "rms_norm", "native_layer_norm"))
_PRODUCTS = frozenset(("matmul", "mm", "bmm", "__matmul__"))
_SUMMED_PRODUCTS = frozenset(("addmm", "baddbmm", "addbmm"))
_JOINS = frozenset(("cat", "concat", "concatenate", "hstack", "vstack", "dstack", "stack"))
_MOVERS = frozenset((
    "__getitem__", "broadcast_to", "channel_shuffle", "chunk", "diagonal", "dsplit", "expand",
    "expand_as", "flatten", "flip", "fliplr", "flipud", "gather", "hsplit", "index_select", "movedim", "moveaxis",
    "narrow", "native_channel_shuffle", "permute", "pixel_shuffle", "pixel_unshuffle", "ravel", "repeat",
    "repeat_interleave", "reshape", "reshape_as", "roll", "rot90", "select", "split", "split_with_sizes", "squeeze",
    "swapaxes", "swapdims", "t", "tensor_split", "tile", "transpose", "unbind", "unflatten", "unfold", "unsafe_chunk",
    "unsafe_split", "unsqueeze", "view", "view_as", "vsplit", "T", "mT", "H", "mH",
))  # fmt: skip
_INTO_SHAPES: dict[str, Callable[..., Any]] = {"view": Tensor.reshape, "view_as": Tensor.reshape_as}
_REDUCTIONS = frozenset((
    "mean", "sum", "amax", "amin", "max", "min", "std", "var", "norm", "vector_norm", "linalg_vector_norm", "logsumexp",
    "prod", "nansum", "nanmean", "median", "argmax", "argmin", "any", "all", "std_mean", "var_mean", "count_nonzero",
))  # fmt: skip

# The operations that keep the order of elements, and change the shape alone.
_RESHAPES = frozenset((
    "flatten", "ravel", "reshape", "reshape_as", "squeeze", "unflatten", "unsqueeze", "view", "view_as",
))  # fmt: skip
SEQUENCES = (list, tuple)
_NUMBERS = frozenset((int, float, bool, str, type(None)))

_fresh = count(1)


@dataclass(frozen=True)
class Along:
    """Labels along one axis: `values[i]` is what lies at position i of `axis`; -1 is nothing in particular."""

    axis: int
    values: Tensor


@dataclass(frozen=True, eq=False)
class Ref:
    """A tensor given to an operation: where it came from and how large it was; its values if they may be indices."""

    node: Node | None
    shape: tuple[int, ...]
    value: Tensor | None = None


class Node:
    """One result of one operation of the forward pass."""

    __slots__ = ("_found", "_labels", "args", "function", "kwargs", "name", "output", "shape")

    def __init__(
        self,
        function: Callable[..., Any],
        name: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        shape: tuple[int, ...],
        output: int | None = None,
    ) -> None:
        self.function = function
        self.name = name
        self.args = args
        self.kwargs = kwargs
        self.shape = shape
        self.output = output  # which one, where the operation gave several
        self._labels: dict[Kind, Along | None] = {}
        self._found: list[Ref] | None = None

    @classmethod
    def of_input(cls, shape: tuple[int, ...], samples: int, sample_dim: int = 0) -> Node:
        """A tensor that the model was given."""
        node = cls(_no_function, "input", (), {}, shape)
        axis = dim_of_samples(shape, sample_dim)
        of_samples = len(shape) > 0 and shape[axis] == samples
        node._labels["samples"] = Along(axis, torch.arange(samples)) if of_samples else None
        node._labels["neurons"] = None
        return node

    def label(self, kind: Kind) -> Along | None:
        """Where the samples or neurons of this result are; None where that is not known."""
        pending = [self]
        while pending:
            node = pending[-1]
            missing = [source for source in node._sources(kind) if kind not in source._labels]
            if kind in node._labels:
                pending.pop()
            elif missing:
                pending.extend(missing)
            else:
                node._labels[kind] = _follow(node, kind)
        return self._labels[kind]

    def _sources(self, kind: Kind) -> Iterator[Node]:
        if kind in self._labels or (kind == "neurons" and self._owned_axis() is not None):
            return
        for ref in self.refs():
            if ref.node is not None:
                yield ref.node
                if (
                    kind == "neurons"
                    and self.name in _PRODUCTS | _SUMMED_PRODUCTS
                    and "samples" not in ref.node._labels
                ):
                    ref.node.label("samples")

    def refs(self) -> list[Ref]:
        """The tensors that the operation was given."""
        if self._found is None:
            self._found = _refs((self.args, self.kwargs))
        return self._found

    def _owned_axis(self) -> int | None:
        """The axis of the neurons that belong to this operation itself."""
        dims = len(self.shape)
        if self.name in _SECOND:
            spatial = int(self.name[-2]) if self.name[-2:] in ("1d", "2d", "3d") else dims - 2
            return 0 if dims == spatial + 1 else 1
        if self.name in _LAST and self.output in (None, 0):
            return dims - 1
        if self.name in _LAYER_NORMS and self.output in (None, 0):
            shape = self.args[1] if len(self.args) > 1 else self.kwargs.get("normalized_shape")
            return dims - 1 if isinstance(shape, Sequence) and len(shape) == 1 else None
        return None


def _no_function(*_args: Any, **_kwargs: Any) -> None:
    """Stands where no operation made a tensor."""


def _refs(value: Any) -> list[Ref]:
    if isinstance(value, Ref):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    elif not isinstance(value, SEQUENCES):
        return []
    return [ref for item in value if type(item) not in _NUMBERS for ref in _refs(item)]


def map_refs(value: Any, function: Callable[[Any], Any], kind: type) -> Any:
    """`value` with every `kind` of object in its lists, tuples and dicts replaced by what `function` makes of it."""
    if isinstance(value, kind):
        return function(value)
    if type(value) in _NUMBERS:
        return value
    if isinstance(value, SEQUENCES):
        items = [map_refs(item, function, kind) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, dict):
        return {key: map_refs(item, function, kind) for key, item in value.items()}
    return value


# ---- rules ---


def _follow(node: Node, kind: Kind) -> Along | None:
    if kind == "neurons":
        axis = node._owned_axis()
        if axis is not None:
            return _own(node, axis)
        if node.name in _PRODUCTS or node.name in _SUMMED_PRODUCTS:
            return _of_product(node)
    if node.name == "einsum":
        return _of_einsum(node, kind)
    if node.name in _JOINS:
        return _of_join(node, kind)
    if node.name in _MOVERS:
        return _of_mover(node, kind)
    if node.name == "fold":
        return _of_fold(node, kind)
    if node.name in ("view_as_complex", "view_as_real"):  # an axis behind the others goes, or comes
        return next((label for _, label in _labelled(node.refs(), kind) if label.axis < len(node.shape)), None)
    if kind == "samples" and node.name in ("embedding", "one_hot"):
        return _of_lookup(node)
    if kind == "samples" and node.name == "embedding_bag":  # a row a bag: of 2-D input, or of the offsets
        bags = (label for ref, label in _labelled(node.refs(), kind) if ref.shape[0] == node.shape[0])
        return next((label for label in bags if label.axis == 0), None)
    if node.name in _REDUCTIONS:
        return _of_reduction(node, kind)
    return _kept(node.refs(), node.shape, kind)


def dim_of_samples(shape: Sequence[int], sample_dim: int) -> int:
    """The axis of samples of an input: the first one, where it has not as many."""
    return sample_dim if sample_dim < len(shape) else 0


def _own(node: Node, axis: int) -> Along:
    size = node.shape[axis]
    first = next(_fresh) << 20  # labels of different owners differ
    return Along(axis, torch.arange(first, first + size))


def _labelled(refs: Iterable[Ref], kind: Kind) -> Iterator[tuple[Ref, Along]]:
    for ref in refs:
        label = ref.node.label(kind) if ref.node is not None else None
        if label is not None:
            yield ref, label


def _kept(refs: Iterable[Ref], shape: tuple[int, ...], kind: Kind) -> Along | None:
    """As in an operand, axes counted from the last one; in one of the result's shape, if there is one."""
    refs = list(refs)
    if all(len(ref.shape) != len(shape) for ref in refs):
        return None  # no operation that broadcasts
    candidates = list(_labelled(refs, kind))
    candidates.sort(key=lambda pair: pair[0].shape != shape)
    for ref, label in candidates:
        axis = label.axis + len(shape) - len(ref.shape)
        if axis >= 0 and shape[axis] == ref.shape[label.axis]:
            return Along(axis, label.values)
    return None


def _of_product(node: Node) -> Along | None:
    """Neurons of a matrix product: of its right side, its own where that is made of parameters alone."""
    operands = [ref for ref in _refs(node.args) if ref.shape][-2:]
    if len(operands) < 2 or not node.shape:
        return None
    left, right = operands
    last = len(node.shape) - 1
    for ref, inner in ((right, -2), (left, -1)):
        label = ref.node.label("neurons") if ref.node is not None else None
        if label is not None and (len(ref.shape) < 2 or label.axis != len(ref.shape) + inner):
            axis = label.axis + len(node.shape) - len(ref.shape)
            if axis >= 0 and node.shape[axis] == ref.shape[label.axis]:
                return Along(axis, label.values)
    of_samples = right.node.label("samples") if right.node is not None else None
    return _own(node, last) if of_samples is None and len(right.shape) == 2 else None


def _of_einsum(node: Node, kind: Kind) -> Along | None:
    equation = node.args[0] if node.args and isinstance(node.args[0], str) else ""
    operands = _refs(node.args[1:])
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if not arrow or "." in equation or len(terms) != len(operands):
        return None
    weights = []
    for term, ref in zip(terms, operands, strict=True):
        label = ref.node.label(kind) if ref.node is not None else None
        if label is not None and term[label.axis] in output:
            return Along(output.index(term[label.axis]), label.values)
        if kind == "neurons" and (ref.node is None or ref.node.label("samples") is None):
            weights.append(term)
    others = "".join(term for term in terms if term not in weights)
    own = [letter for letter in output if letter not in others and any(letter in term for term in weights)]
    return _own(node, output.index(own[0])) if len(own) == 1 else None


def _of_join(node: Node, kind: Kind) -> Along | None:
    refs = _refs(node.args[:1] or tuple(node.kwargs.values()))
    given = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
    if node.name == "stack":
        found = next(_labelled(refs, kind), None)
        if found is None:
            return None
        axis = found[1].axis
        return Along(axis + (given % len(node.shape) <= axis), found[1].values)
    dim = {"hstack": min(1, len(node.shape) - 1), "vstack": 0, "dstack": 2}.get(node.name, given) % len(node.shape)
    labels = dict(_labelled(refs, kind))
    if not labels:
        return None
    first = next(iter(labels.values()))
    if first.axis != dim:
        same = all(label.axis == first.axis for label in labels.values())
        if kind == "samples":  # what is joined to a row has to be of the same sample
            different = (label for label in labels.values() if label.values is not first.values)
            same = same and all(torch.equal(label.values, first.values) for label in different)
        return first if same else None
    parts = []
    for ref in refs:
        label = labels.get(ref)
        if label is not None and label.axis != dim:
            return None
        parts.append(_missing(ref.shape[dim], kind) if label is None else label.values)
    return Along(dim, torch.cat(parts))


def _missing(size: int, kind: Kind) -> Tensor:
    first = next(_fresh) << 20
    return torch.arange(first, first + size) if kind == "neurons" else torch.full((size,), -1)


def _of_fold(node: Node, kind: Kind) -> Along | None:
    """Sums of patches, `(N, C * positions of a kernel, patches)`, laid over an image."""
    for _, label in _labelled(node.refs(), kind):
        if kind == "samples":
            return label if label.axis == 0 and len(node.shape) == 4 else None
        if label.axis == 1 and len(node.shape) == 4:
            return Along(1, label.values.view(node.shape[1], -1)[:, 0])
    return None


def _of_lookup(node: Node) -> Along | None:
    for _, label in _labelled(node.refs(), "samples"):
        return label
    return None


def _of_reduction(node: Node, kind: Kind) -> Along | None:
    source = next(_labelled(node.refs(), kind), None)
    if source is None:
        return None
    ref, label = source
    if ref.shape == node.shape:  # max and min of two tensors
        return label
    given = node.kwargs.get("dim", node.kwargs.get("axis"))
    place = 2 if node.name in ("norm", "vector_norm", "linalg_vector_norm") else 1
    if given is None and len(node.args) > place:
        given = node.args[place]
    if given is None:
        return None
    dims = {axis % len(ref.shape) for axis in (given if isinstance(given, Sequence) else (given,))}
    if label.axis in dims:
        return None
    kept = len(node.shape) == len(ref.shape)
    axis = label.axis if kept else label.axis - sum(dim < label.axis for dim in dims)
    return Along(axis, label.values) if axis < len(node.shape) else None


def _of_mover(node: Node, kind: Kind) -> Along | None:
    """Run on labels."""
    source = next(_labelled(node.refs(), kind), None)
    if source is None:
        return None
    ref, label = source
    if node.name in _RESHAPES and math.prod(node.shape) == math.prod(ref.shape) > 0 and _differ(label):
        return _of_reshape(label, ref.shape, node.shape, kind)
    moved = _replayed(node, ref, _spread(label, ref.shape))
    return None if moved is None or tuple(moved.shape) != node.shape else _read(moved, label, ref.shape, kind)


def _differ(label: Along) -> bool:
    """Whether there are several labels."""
    known = label.values[label.values >= 0]
    return len(known) > 1 and bool((known != known[0]).any())


def _of_reshape(label: Along, before: tuple[int, ...], after: tuple[int, ...], kind: Kind) -> Along | None:
    """Labels in another shape: of the axes alone that the labelled one is joined with or divided into."""
    start, stop, first, last = _block(before, after, label.axis)
    inside = Along(label.axis - start, label.values)
    found = _read(_spread(inside, before[start:stop]).reshape(after[first:last]), inside, before[start:stop], kind)
    return None if found is None else Along(found.axis + first, found.values)


def _block(before: tuple[int, ...], after: tuple[int, ...], axis: int) -> tuple[int, int, int, int]:
    """The fewest axes around `axis`, from the first to the one after the last, and those of the same elements after."""
    stop = last = 0
    while True:
        start, first = stop, last
        sizes = [1, 1]
        while stop == start or sizes[0] != sizes[1]:
            if stop == start or sizes[0] < sizes[1]:
                sizes[0] *= before[stop]
                stop += 1
            else:
                sizes[1] *= after[last]
                last += 1
        if axis < stop:
            return start, stop, first, last


def _spread(label: Along, shape: tuple[int, ...]) -> Tensor:
    sizes = [1] * len(shape)
    sizes[label.axis] = -1
    return label.values.view(sizes).expand(shape)


def _replayed(node: Node, labelled: Ref, labels: Tensor) -> Tensor | None:
    def stand_in(ref: Ref) -> Tensor:
        if ref is labelled:
            return labels
        return torch.empty(()).expand(ref.shape) if ref.value is None else ref.value.cpu()

    # Labels are spread over memory of another layout than the tensor's, which a view need not fit.
    function: Callable[..., Any] = _INTO_SHAPES.get(node.name, node.function)
    patches = function is F.unfold
    if patches:  # takes floating-point numbers alone, and pads with zeros: those become -1
        labels = labels.double() + 1
    try:
        with torch.no_grad():
            result = function(*map_refs(node.args, stand_in, Ref), **map_refs(node.kwargs, stand_in, Ref))
    except (RuntimeError, TypeError, ValueError, IndexError):
        return None
    if node.output is not None:
        result = result[node.output]
    if patches:
        result = result.long() - 1
    return result if isinstance(result, Tensor) else None


def _read(moved: Tensor, before: Along, shape: tuple[int, ...], kind: Kind) -> Along | None:
    """The one axis along which labels vary; for neurons, one on which the label alone says where it is."""
    if moved.numel() == 0 or moved.dim() == 0:
        return None
    distinct = before.values[before.values >= 0].unique()
    if len(distinct) <= 1:
        return _read_single(moved, before, shape, kind)
    moved = _compact(moved)
    for axis in range(moved.dim()):
        line = moved.amax([dim for dim in range(moved.dim()) if dim != axis]) if moved.dim() > 1 else moved.clone()
        same = (moved == _as_axis(line, axis, moved.dim())) | (moved == -1)
        if moved.shape[axis] > 1 and bool(same.all()):
            return Along(axis, line)
    if kind == "samples":
        return None
    return next(
        (Along(axis, values) for axis in range(moved.dim()) if (values := _separated(moved, axis)) is not None), None
    )


def _compact(moved: Tensor) -> Tensor:
    """The same with one position of every axis along which a view repeats itself."""
    for axis in range(moved.dim()):
        if moved.stride(axis) == 0 and moved.shape[axis] > 1:
            moved = moved.narrow(axis, 0, 1)
    return moved


def _line(moved: Tensor, axis: int) -> Tensor:
    return moved[tuple(slice(None) if dim == axis else 0 for dim in range(moved.dim()))].clone()


def _as_axis(line: Tensor, axis: int, dims: int) -> Tensor:
    return line.view([-1 if dim == axis else 1 for dim in range(dims)])


def _read_single(moved: Tensor, before: Along, shape: tuple[int, ...], kind: Kind) -> Along | None:
    """One label alone does not tell its axis: the one that it can be, if there is only one."""
    if kind == "samples":
        return Along(0, _line(moved, 0))
    if tuple(moved.shape) == shape:
        return before
    ones = [axis for axis in range(moved.dim()) if moved.shape[axis] == 1 and axis > 0]
    if len(ones) > 1 and before.axis in ones and moved.dim() == len(shape):
        ones = [before.axis]
    return Along(ones[0], _line(moved, ones[0])) if len(ones) == 1 else None


def _separated(moved: Tensor, axis: int) -> Tensor | None:
    """Labels of the positions along `axis`, if no label is at two of them (several may share one: pixel shuffle)."""
    if moved.shape[axis] == 1:
        return None
    _, labels = moved.unique(return_inverse=True)
    positions = _as_axis(torch.arange(moved.shape[axis]), axis, moved.dim()).expand(moved.shape)
    size = int(labels.max()) + 1
    lowest = torch.full((size,), math.inf).scatter_reduce(0, labels.flatten(), positions.flatten().float(), "amin")
    highest = torch.full((size,), -1.0).scatter_reduce(0, labels.flatten(), positions.flatten().float(), "amax")
    return _line(moved, axis) if bool((lowest == highest).all()) else None


# ---- what the labels of an activation say ---


def fold_of(label: Along | None, samples: int) -> tuple[bool, bool] | None:
    """(folded, outermost) of a label of samples; None where rows do not belong to samples in a regular way."""
    if label is None:
        return None
    order = torch.arange(samples)
    if torch.equal(label.values, order):
        return False, True
    repeats, rest = divmod(len(label.values), max(samples, 1))
    if rest or samples == 0:
        return None
    if torch.equal(label.values, order.repeat_interleave(repeats)):
        return True, True
    return (True, False) if torch.equal(label.values, order.repeat(repeats)) else None
